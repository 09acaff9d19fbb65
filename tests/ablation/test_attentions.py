"""Every attention of the ablation against its formula written out."""

import torch

from lf_dense.ablation.attentions import (
    ExactLaplacianAttention,
    GaussianAttention,
    SoftmaxAttention,
    SpatialReductionAttention,
)
from lf_dense.attention import RotaryTable, rotate

HW = (6, 5)


def taken_apart(layer, x):
    """Rotated queries, keys, and values, each ``(B, heads, N, d)`` in float64."""
    table = RotaryTable(HW, layer.head_dims, torch.device("cpu"))
    q, k = (rotate(project(x).unflatten(2, (layer.num_heads, -1)), table) for project in (layer.q, layer.k))
    return [y.transpose(1, 2).double() for y in (q, k, layer.v(x).unflatten(2, (layer.num_heads, -1)))]


def put_together(layer, attended, x):
    local = layer.dwconv(layer.v(x).mT.unflatten(2, HW)).flatten(2).mT
    return layer.proj(attended.transpose(1, 2).flatten(2).float() + local)


def weighed(kernel, v, tau=1e-2):
    """The "mass" normalization of a whole kernel matrix, as docs/method.md defines it."""
    mass = kernel.mean(-1, keepdim=True)
    z = (kernel - mass) / (kernel.shape[-1] * (mass + tau)) + 1 / kernel.shape[-1]
    return z @ v


def test_exact_smoother():
    layer, x = ExactLaplacianAttention(16, 2), torch.randn(2, 30, 16)
    q, k, v = taken_apart(layer, x)
    kernel = torch.exp(-(q[..., :, None, :] - k[..., None, :, :]).abs().sum(-1) / 4)
    torch.testing.assert_close(layer(x, HW), put_together(layer, weighed(kernel, v), x))


def test_gaussian_nystroem():
    layer, x = GaussianAttention(16, 2, landmark_grid=(2, 5)), torch.randn(2, 30, 16)
    q, k, v = taken_apart(layer, x)
    landmarks = q.unflatten(2, HW).unflatten(2, (2, 3)).mean(3).flatten(2, 3)

    def gaussian(a, b):
        return torch.exp(-(a[..., :, None, :] - b[..., None, :, :]).square().sum(-1) / (2 * 8**0.5))

    inverse = torch.linalg.inv(gaussian(landmarks, landmarks) + 1e-2 * torch.eye(10, dtype=torch.float64))
    kernel = gaussian(q, landmarks) @ inverse @ gaussian(k, landmarks).mT
    assert (kernel.mean(-1) > 0).all()
    torch.testing.assert_close(layer(x, HW), put_together(layer, weighed(kernel, v), x))


def test_softmax_and_spatial_reduction():
    layer, x = SoftmaxAttention(16, 2), torch.randn(2, 30, 16)
    q, k, v = taken_apart(layer, x)
    wanted = put_together(layer, (q @ k.mT / 8**0.5).softmax(-1) @ v, x)
    torch.testing.assert_close(layer(x, HW), wanted)
    reduced = SpatialReductionAttention(16, 2, reduction=1)
    reduced.load_state_dict(layer.state_dict())
    torch.testing.assert_close(reduced(x, HW), wanted)


def test_spatial_reduction_attends_to_the_smaller_map():
    layer, x = SpatialReductionAttention(16, 2, reduction=2, rotary=False), torch.randn(2, 30, 16)
    smaller = layer.norm(layer.sr(x.mT.unflatten(2, HW)).flatten(2).mT)
    assert smaller.shape == (2, 6, 16)
    projected = (layer.q(x), layer.k(smaller), layer.v(smaller))
    q, k, v = (y.unflatten(2, (2, 8)).transpose(1, 2) for y in projected)
    torch.testing.assert_close(layer(x, HW), put_together(layer, (q @ k.mT / 8**0.5).softmax(-1) @ v, x))
