"""Layers that are replaced before tracing are the same functions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lf_dense.export.tracing import traceable


@pytest.mark.parametrize("cells", [2, 3, (1, 6), (None, 4), (7, 7)])
@pytest.mark.parametrize("size", [(7, 7), (8, 11), (33, 5), (3, 4)])
def test_pooling(cells, size):
    module = nn.Sequential(nn.AdaptiveAvgPool2d(cells))
    image = torch.randn(2, 5, *size, dtype=torch.float64)
    replaced = traceable(module)
    assert type(replaced[0]) is not nn.AdaptiveAvgPool2d
    torch.testing.assert_close(replaced(image), module(image))


def test_global_pooling_stays():
    assert type(traceable(nn.Sequential(nn.AdaptiveAvgPool2d((1, 1))))[0]) is nn.AdaptiveAvgPool2d


@pytest.mark.parametrize("align_corners", [False, True])
def test_upsampling(align_corners):
    wrappers = pytest.importorskip("mmseg.models.utils.wrappers")
    module = nn.Sequential(wrappers.Upsample(scale_factor=2, mode="bilinear", align_corners=align_corners))
    image = torch.randn(1, 3, 5, 9)
    replaced = traceable(module)
    assert type(replaced[0]) is not wrappers.Upsample
    assert torch.equal(replaced(image), module(image))


def test_the_module_itself_stays_as_it_is():
    module = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Conv2d(3, 3, 1))
    copied = traceable(module)
    assert type(module[0]) is nn.AdaptiveAvgPool2d
    assert copied[1].weight is not module[1].weight
    assert module.training
    assert not copied.training
