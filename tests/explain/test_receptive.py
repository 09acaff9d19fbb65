"""Effective receptive fields."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("mmengine")

from lf_dense.errors import UsageError
from lf_dense.explain import receptive_fields
from lf_dense.explain.receptive import side_that_holds


def test_fields_are_the_mean_absolute_gradient(small):
    """With every sign vector of a one-channel token the same up to its sign, the gradient is that token's."""

    class Shift(torch.nn.Module):
        def forward(self, x):
            return (2 * x[:, :1].roll((0, 3), (2, 3)), x[:, 1:2] ** 2)

    backbone = small()
    backbone.forward = Shift().forward
    images = [torch.full((1, 3, 32, 32), value) for value in (1.0, -3.0)]
    first, second = receptive_fields(backbone, images, projections=2)
    assert first.nonzero().tolist() == [[16, 13]]
    assert float(first[16, 13]) == pytest.approx(2 / 3)  # a third, as a mean over three colours
    assert float(second[16, 16]) == pytest.approx((2 + 6) / 2 / 3)


def test_fields_grow_with_the_stages(backbone):
    fields = receptive_fields(backbone, [torch.randn(1, 3, 128, 128) for _ in range(2)])
    assert [field.shape for field in fields] == [(128, 128)] * 4
    sides = [side_that_holds(field) for field in fields]
    assert sides == sorted(sides)
    assert sides[0] < 20 < sides[3]


def test_the_layernorm_at_the_end_does_not_hide_the_gradient(backbone):
    """The sum of a token's channels is constant under the initial LayerNorm; the fields are not of it."""
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    total = backbone(image)[0][0, :, 8, 8].sum()
    (vanished,) = torch.autograd.grad(total, image)
    (field, *_) = receptive_fields(backbone, [image])
    assert field.max() > 1e4 * vanished.abs().max()


def test_the_weights_take_no_gradient_and_the_mode_stays(backbone):
    backbone.train()
    receptive_fields(backbone, [torch.randn(1, 3, 64, 64)], projections=1)
    assert backbone.training
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_the_square_that_holds_half():
    field = torch.zeros(64, 64)
    field[32, 32] = 3
    field[32, 42] = 1
    assert side_that_holds(field) == 1
    assert side_that_holds(field, 0.9) == 21
    assert side_that_holds(torch.ones(64, 64), 1.0) == 64
    assert side_that_holds(torch.ones(64, 64)) == pytest.approx(64 * 0.5**0.5, abs=2)


def test_no_image(backbone):
    with pytest.raises(UsageError, match="at least one image"):
        receptive_fields(backbone, [])
