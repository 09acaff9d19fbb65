"""The operators' cases: shapes of the backbone, each once, on tensors that lie as in the module."""

import torch

from lf_dense import LaplacianAttention
from lf_dense.benchmark import cases
from lf_dense.presets import ARCHS


def test_shapes_are_the_backbones(cases_of):
    options = ("--ops", "laplacian_attention", "--passes", "forward", "--landmarks", "49")
    found = {(case.size, case.stage): case for case in cases_of(*options)}
    tokens = {
        size: [found[size, stage].tokens for stage in range(1, 5)]
        for size in [(224, 224), (800, 1333), (2048, 2048)]
    }
    assert tokens[224, 224] == [3136, 784, 196, 49]
    assert tokens[800, 1333] == [66800, 16700, 4200, 1050]
    assert tokens[2048, 2048] == [262144, 65536, 16384, 4096]
    assert [found[(224, 224), stage].heads for stage in range(1, 5)] == [1, 2, 5, 8]
    assert {case.head_dims for case in found.values()} == {64}


def test_presets_agree_with_the_backbone():
    found = {(arch["embed_dims"], arch["num_heads"]) for arch in ARCHS.values()}
    assert found == {(cases.WIDTHS, cases.HEADS)}


def test_a_case_comes_once(cases_of):
    kernels = cases_of(
        "--ops", "laplacian_kernel", "--passes", "forward", "--sizes", "224x224", "--stages", "3", "4"
    )
    assert [(case.stage, case.landmarks) for case in kernels] == [(3, 49), (3, 196), (4, 49)]
    solvers = cases_of("--ops", "newton_schulz_inverse", "--passes", "forward", "--stages", "4")
    assert [(case.size, case.landmarks) for case in solvers] == [(None, 49), (None, 196)]


def test_a_case_says_what_it_is(cases_of):
    options = ("--passes", "forward", "--sizes", "64x96", "--stages", "1", "--landmarks", "49")
    assert [str(case) for case in cases_of(*options)] == [
        "laplacian_kernel (forward) at 64x96, stage 1, 49 landmarks",
        "newton_schulz_inverse (forward) at any size, stage 1, 49 landmarks",
        "laplacian_attention (forward) at 64x96, stage 1, 49 landmarks",
    ]


def test_tensors_lie_as_in_the_module(problem_of):
    options = ("--ops", "laplacian_attention", "--passes", "forward+backward", "--sizes", "70x130")
    problem = problem_of(*options, "--stages", "2", "--landmarks", "49")
    q, k, v, landmarks = problem.inputs
    assert q.shape == k.shape == v.shape == problem.grad.shape == (1, 2, 9 * 17, 64)
    assert all(
        x.transpose(1, 2).is_contiguous() and x.is_leaf and x.requires_grad for x in (q, k, v, landmarks)
    )
    pooled = LaplacianAttention(128, 2).pool_landmarks(q.detach().transpose(1, 2), (9, 17))
    torch.testing.assert_close(landmarks.detach(), pooled)
