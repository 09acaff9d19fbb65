"""Rows of attention: they are the weights that the layer gives."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("mmengine")

from torch.utils._python_dispatch import TorchDispatchMode

from lf_dense import laplacian_attention
from lf_dense.errors import UsageError
from lf_dense.explain import attention_rows, capture
from lf_dense.explain.rows import exact_rows, nystroem_rows, row_at, softmax_rows, token_at
from lf_dense.functional import NORMALIZATIONS

SIZES = [(75, 109), (64, 64), (33, 200)]


def attended_by(layer, image, backbone):
    """What the layer's operator really returned during a forward pass, ``(heads, N, d)``."""
    found = []
    attend = layer.attend
    layer.attend = lambda *inputs: found.append(attend(*inputs)) or found[-1]
    try:
        backbone(image)
    finally:
        del layer.attend
    return found[0][0].transpose(0, 1).double()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("learn", [False, True], ids=["fixed scale", "learnt scale"])
def test_rows_times_values_are_what_the_layer_attends(small, normalization, size, learn):
    backbone = small(normalization=normalization, learn_kernel_scale=learn)
    if learn:
        for name, parameter in backbone.named_parameters():
            if name.endswith("log_scale"):
                parameter.data.normal_(0, 0.3)
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        for inputs in capture(backbone, image):
            outputs = attended_by(inputs.layer, image, backbone)
            tokens = sorted({0, inputs.q.shape[1] // 3, inputs.q.shape[1] - 1})
            rows, _ = nystroem_rows(inputs, tokens)
            expected = outputs[:, tokens]
            assert (rows @ inputs.v - expected).abs().max() <= 2e-4 * expected.abs().max(), inputs.stage


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_rows_times_values_in_float64(small, normalization, image):
    backbone = small(normalization=normalization)
    for inputs in capture(backbone, image):
        outputs = laplacian_attention(
            *(x[None] for x in (inputs.q, inputs.k, inputs.v, inputs.landmarks)), normalization=normalization
        )[0]
        rows, weights = nystroem_rows(inputs, range(inputs.q.shape[1]))
        torch.testing.assert_close(rows @ inputs.v, outputs, rtol=1e-9, atol=1e-9)
        assert weights.shape == (*rows.shape[:2], inputs.landmarks.shape[1])


def test_rows_of_mass_sum_to_one(backbone, image):
    for inputs in capture(backbone, image):
        for rows in (nystroem_rows(inputs, [0, 1])[0], exact_rows(inputs, [0, 1]), softmax_rows(inputs, [0])):
            torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]).double())


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_exact_row_has_the_layer_s_normalisation_or_its_own_sum(small, normalization, image):
    backbone = small(normalization=normalization)
    (inputs,) = capture(backbone, image, [2])
    q, k, scale = inputs.q, inputs.k, inputs.layer.kernel_scale
    kernel = torch.exp(-(q[:, 5, None] - k).abs().sum(-1) / scale)
    tau = backbone.stages[1].blocks[1].attn.tau if normalization == "mass" else 0
    mean = kernel.mean(-1, keepdim=True)
    expected = (kernel - mean) / (kernel.shape[-1] * (mean + tau)) + 1 / kernel.shape[-1]
    torch.testing.assert_close(exact_rows(inputs, [5])[:, 0], expected)


def test_softmax_is_that_of_the_same_queries_and_keys(backbone, image):
    (inputs,) = capture(backbone, image, [3])
    weights = torch.nn.functional.scaled_dot_product_attention(
        inputs.q[None], inputs.k[None], torch.eye(inputs.k.shape[1]).double().expand(1, 3, -1, -1)
    )[0]
    torch.testing.assert_close(softmax_rows(inputs, [2, 7]), weights[:, [2, 7]])


def test_landmarks_at_every_token_leave_the_exact_row(small, image):
    """With as many landmarks as tokens the approximation is off by the solver's ridge alone."""
    for row in attention_rows(small(landmark_grid=(40, 40)), image, (50, 40)):
        assert row.agreement() > 0.99
        assert row.landmarks.shape == row.nystroem.shape


def test_a_row_per_stage_has_the_map_s_shape(backbone, image):
    rows = attention_rows(backbone, image, (108, 74))
    assert [row.nystroem.shape for row in rows] == [(1, 19, 28), (2, 10, 14), (3, 5, 7), (4, 3, 4)]
    assert [row.landmarks.shape for row in rows] == [(1, 7, 7), (2, 7, 7), (3, 5, 7), (4, 3, 4)]
    assert [row.token for row in rows] == [(18, 27), (9, 13), (4, 6), (2, 3)]
    assert all(row.exact.shape == row.softmax.shape == row.nystroem.shape for row in rows)
    assert [row.block for row in rows] == [1, 2, 1, 1]


def test_agreement_is_a_correlation(backbone, image):
    (inputs,) = capture(backbone, image, [2])
    row = row_at(inputs, (4, 4))
    pair = torch.stack([row.nystroem[1].flatten(), row.exact[1].flatten()])
    assert row.agreement(1) == pytest.approx(float(torch.corrcoef(pair)[0, 1]))
    assert 0 < row.agreement() < 1


def test_the_mass_says_how_far_a_row_is_from_plain_averaging(small, backbone, image):
    (inputs,) = capture(backbone, image, [2])
    kernel = torch.exp(-(inputs.q[:, 0, None] - inputs.k).abs().sum(-1) / 4)
    torch.testing.assert_close(row_at(inputs, (0, 0)).mass, kernel.mean(-1))
    near, far = (attention_rows(small(kernel_scale=scale), image, (9, 9), [2])[0] for scale in (4.0, 0.05))
    assert far.mass.max() < 1e-3 * near.mass.min()
    assert (far.exact * far.exact[0].numel() - 1).abs().max() < (near.exact * 140 - 1).abs().max()


def test_the_token_of_a_point(backbone, image):
    (inputs,) = capture(backbone, image, [1])
    assert token_at(inputs, 0, 0) == (0, 0)
    assert token_at(inputs, 7.9, 8.0) == (2, 1)


@pytest.mark.parametrize("query", [(-1, 0), (109, 10), (10, 75)])
def test_a_query_outside_the_image(query, backbone, image):
    with pytest.raises(UsageError, match=r"outside the image of 109 x 75 pixels: give X from 0 to 108"):
        attention_rows(backbone, image, query)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made within its block."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_nothing_larger_than_n_times_m_is_made(small, normalization):
    (inputs,) = capture(small(normalization=normalization), torch.randn(1, 3, 256, 256), [2])
    heads, num_tokens, _ = inputs.q.shape
    assert num_tokens == 1024
    with Largest() as largest:
        row_at(inputs, (5, 5))
    assert largest.numel == heads * num_tokens * 49


def test_a_photograph(small, shared_data):
    pytest.importorskip("mmcv")
    from mmengine.model import ImgDataPreprocessor

    from lf_dense.explain import Subject, place_image

    path = next(iter(sorted((shared_data / "camvid" / "images" / "validation").glob("*.jpg"))))
    image = place_image(Subject(small(), ImgDataPreprocessor((120.0,) * 3, (60.0,) * 3), ()), path).inputs
    backbone = small()
    with torch.no_grad():
        for inputs in capture(backbone, image):
            expected = attended_by(inputs.layer, image, backbone)[:, 7]
            rows, _ = nystroem_rows(inputs, [7])
            assert ((rows @ inputs.v)[:, 0] - expected).abs().max() <= 2e-4 * expected.abs().max()
