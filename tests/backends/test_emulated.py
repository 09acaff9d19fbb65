"""The emulation of the CUDA sources: its own checks, and no operator that relies on a missing barrier."""

import os
import shlex
import subprocess

import pytest
import torch

from lf_dense import laplacian_attention, laplacian_kernel, newton_schulz_inverse, use_backend
from support import emulated
from support.literal import gradients, gram, make_inputs, relative_error

ORDERS = ("forward", "reverse", "random")


def test_emulation_catches_what_a_gpu_would_get_wrong(tmp_path):
    headers = emulated.cuda_headers()
    if headers is None:
        pytest.skip("the CUDA toolkit's headers are not there")
    program = tmp_path / "selftest"
    source = emulated.EMULATION / "selftest.cpp"
    compiler = f"{os.environ.get('CXX', 'g++')} -std=c++20 -O1 -I{emulated.EMULATION} -isystem {headers}"
    emulated.run(f"{compiler} {shlex.quote(str(source))} -o {program}")
    for order in ORDERS:
        env = {**os.environ, "LF_EMULATION_ORDER": order}
        done = subprocess.run([program], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip().endswith("ok")


@pytest.mark.parametrize(
    "shape", [{"n": 150, "d": 12, "m": 9}, {"n": 70, "d": 64, "m": 60}, {"n": 40, "d": 128, "m": 33}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_may_run_in_any_order(shape, dtype, monkeypatch):
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=1, heads=2, dtype=dtype, **shape)
    weight = torch.randn_like(inputs[2])
    upstream = torch.randn(1, 2, shape["n"], shape["m"], dtype=dtype)
    results = []
    with use_backend("native"):
        for order in ORDERS:
            monkeypatch.setenv("LF_EMULATION_ORDER", order)
            torch.manual_seed(1)
            everything = [
                laplacian_attention(*inputs),
                *gradients(laplacian_attention, inputs, weight),
                *gradients(laplacian_kernel, [inputs[0], inputs[3]], upstream),
                newton_schulz_inverse(gram(shape["m"], 0.5, dtype)),
            ]
            results.append(everything)
    for other in results[1:]:
        assert all(torch.equal(mine, right) for mine, right in zip(other, results[0]))


@pytest.mark.parametrize("m", [9, 60])
@pytest.mark.parametrize(
    ("limit", "d"), [(101376, 64), (166912, 128), (232448, 128)], ids=["sm_86", "sm_80", "sm_90"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gpus_with_less_shared_memory(m, limit, d, dtype, monkeypatch):
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=1, heads=1, n=100, d=d, m=m, dtype=dtype)
    weight = torch.randn_like(inputs[2])
    monkeypatch.setenv("LF_EMULATION_SHARED_BYTES", str(limit))
    assert_rounds_like_the_reference(inputs, weight)


@pytest.mark.parametrize(("dtype", "n"), [(torch.float64, 17_000), (torch.float32, 33_500)], ids=str)
def test_chunks_of_several_tiles(dtype, n, monkeypatch):
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=1, heads=1, n=n, d=4, m=3, dtype=dtype)
    assert_rounds_like_the_reference(inputs, torch.randn_like(inputs[2]))


def assert_rounds_like_the_reference(inputs, weight):
    def everything(dtype):
        leaves = [x.to(dtype) for x in inputs]
        return [laplacian_attention(*leaves), *gradients(laplacian_attention, leaves, weight.to(dtype))]

    with use_backend("native"):
        got = everything(weight.dtype)
    with use_backend("reference"):
        plain, exact = everything(weight.dtype), everything(torch.float64)
    # Two float64 computations differ by their own rounding, and nothing more exact is there to compare with.
    floor = 1e-12 if weight.dtype == torch.float64 else 10 * torch.finfo(weight.dtype).eps
    for mine, other, right in zip(got, plain, exact):
        assert relative_error(mine, right) <= 2 * relative_error(other, right) + floor
