"""Feature maps as colours."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("mmengine")

from lf_dense.explain import feature_maps
from lf_dense.explain.features import principal_components


def test_components_are_the_directions_of_most_variance():
    row, column = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    feature_map = torch.stack([0 * row, 10 * row + 5, -column, 0 * row, 0.01 * torch.randn(20, 30)])
    found, explained = principal_components(feature_map)
    assert found.shape == (20, 30, 3)
    assert (float(found.min()), float(found.max())) == (0.0, 1.0)
    for component, channel in ((0, row), (1, -column)):
        pair = torch.stack([found[..., component].flatten(), channel.flatten()])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.99  # and so its largest entry is positive
    assert explained[0] > 0.9
    assert sum(explained) == pytest.approx(1, abs=1e-6)


def test_a_constant_map_has_no_colours():
    found, explained = principal_components(torch.ones(4, 1, 1))
    assert found.isfinite().all()
    assert explained == (0.0, 0.0, 0.0)


def test_the_maps_are_those_of_the_backbone(small, image):
    backbone = small(out_indices=(1, 3))
    found = feature_maps(backbone, image)
    with torch.no_grad():
        maps = backbone(image)
    assert [(entry.stage, entry.stride) for entry in found] == [(2, 8), (4, 32)]
    for entry, expected in zip(found, maps):
        torch.testing.assert_close(entry.activation, expected[0].double().abs().mean(0))
        assert entry.components.shape == (*entry.activation.shape, 3)
