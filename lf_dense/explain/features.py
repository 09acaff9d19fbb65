"""Feature maps as pictures: their first principal components, and their mean activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..presets import STRIDES
from .capture import evaluating, find_backbone


@dataclass(frozen=True)
class FeatureMap:
    """One map of the backbone.

    Attributes:
        stage: 1 to 4.
        stride: pixels of the network's input per token.
        components: the first three principal components as RGB ``(H, W, 3)`` in [0, 1].
        explained: share of the variance in each of the three.
        activation: mean absolute activation over the channels ``(H, W)``.
    """

    stage: int
    stride: int
    components: Tensor
    explained: tuple[float, float, float]
    activation: Tensor


def principal_components(feature_map: Tensor) -> tuple[Tensor, tuple[float, float, float]]:
    """The first three principal components of a map ``(C, H, W)`` over its tokens.

    Each is stretched so that its percentiles 1 and 99 are 0 and 1. The sign of a component means nothing; it
    is chosen so that the largest entry of its vector is positive.

    Returns:
        ``(H, W, 3)`` in [0, 1], float64, and the share of the variance in each.
    """
    tokens = feature_map.flatten(1).T.double()
    tokens = tokens - tokens.mean(0)
    variances, vectors = torch.linalg.eigh(tokens.T @ tokens)
    vectors, variances = vectors.flip(1)[:, :3], variances.flip(0).clamp_min(0)
    largest = vectors.gather(0, vectors.abs().argmax(0)[None])
    found = tokens @ (vectors * largest.sign())
    low, high = torch.quantile(found, 0.01, dim=0), torch.quantile(found, 0.99, dim=0)
    found = ((found - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    first, second, third = (variances[:3] / variances.sum().clamp_min(1e-300)).tolist()
    return found.unflatten(0, feature_map.shape[1:]), (first, second, third)


@torch.no_grad()
def feature_maps(model: nn.Module, image: Tensor) -> list[FeatureMap]:
    """The backbone's maps of one image, ready to draw.

    Args:
        model: a LaplacianFormer, or a model with one inside.
        image: normalised image ``(1, C, H, W)`` or ``(C, H, W)`` on the model's device.

    Returns:
        One entry for each stage in the backbone's ``out_indices``.

    Raises:
        UsageError: the model has no LaplacianFormer.
    """
    backbone = find_backbone(model)
    with evaluating(backbone):
        maps = backbone(image if image.ndim == 4 else image[None])
    found = []
    for index, feature_map in zip(backbone.out_indices, maps):
        first = feature_map[0].cpu().double()
        components, explained = principal_components(first)
        found.append(FeatureMap(index + 1, STRIDES[index], components, explained, first.abs().mean(0)))
    return found
