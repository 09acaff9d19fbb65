"""Effective receptive fields: which pixels the centre of each stage's map depends on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..files import find_images
from ..laplacianformer import MIN_SIZE
from .capture import evaluating, find_backbone
from .placing import Subject, preprocess, read_pixels

PROJECTIONS = 4


def square_inputs(subject: Subject, folder: str | Path, size: int, limit: int) -> list[Tensor]:
    """The first images of a folder, resized to a square: inputs ``(1, 3, size, size)``.

    Raises:
        UsageError: the folder has no image, one cannot be read, or the size is too small.
    """
    if size < MIN_SIZE:
        raise UsageError(f"the size {size} is too small: receptive fields need at least {MIN_SIZE} pixels.")
    if limit < 1:
        raise UsageError(f"receptive fields of {limit} images cannot be measured: give at least 1.")
    return [resized_input(subject, path, (size, size)) for path in find_images(folder)[:limit]]


def resized_input(subject: Subject, path: str | Path, size: tuple[int, int]) -> Tensor:
    """An image file resized to ``(height, width)``, whatever its shape: an input ``(1, 3, height, width)``.

    Raises:
        UsageError: it is not there, or is no image.
    """
    import mmcv

    height, width = size
    pixels = mmcv.imresize(read_pixels(path), (width, height))
    image = torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1].transpose(2, 0, 1)))
    return preprocess(subject, {"inputs": image})[..., :height, :width]


def receptive_fields(
    model: nn.Module, images: Iterable[Tensor], projections: int = PROJECTIONS, seed: int = 0
) -> list[Tensor]:
    """The mean absolute gradient of each map's centre token with respect to the image.

    A stage ends with a LayerNorm. The plain sum of its channels is nearly constant, and has no gradient worth
    a look. So the token is projected on vectors of random signs, and the mean is over these as well.

    Args:
        model: a LaplacianFormer, or a model with one inside.
        images: normalised images ``(1, C, H, W)`` on the model's device, all of one size.
        projections: random vectors per image and stage.
        seed: of these vectors.

    Returns:
        One field ``(H, W)`` for each stage in the backbone's ``out_indices``, float32 on the CPU: means over
        images, projections and colour channels.

    Raises:
        UsageError: there is no image, or the model has no LaplacianFormer.
    """
    backbone = find_backbone(model)
    generator = torch.Generator().manual_seed(seed)
    totals: list[Tensor] = []
    count = 0
    with evaluating(backbone), torch.enable_grad():
        for image in images:
            image = image.detach().requires_grad_()
            fields = [_field(feature_map, image, projections, generator) for feature_map in backbone(image)]
            totals = [total + field for total, field in zip(totals, fields)] if totals else fields
            count += 1
    if not count:
        raise UsageError("receptive fields need at least one image: none was given.")
    return [total / count for total in totals]


def _field(feature_map: Tensor, image: Tensor, projections: int, generator: torch.Generator) -> Tensor:
    """The field ``(H, W)`` of one image and one map ``(1, C, h, w)``."""
    token = feature_map[0, :, feature_map.shape[2] // 2, feature_map.shape[3] // 2]
    field = image.new_zeros(image.shape[2:])
    for _ in range(projections):
        signs = torch.randint(0, 2, token.shape, generator=generator).to(token) * 2 - 1
        (gradient,) = torch.autograd.grad(token @ signs, image, retain_graph=True)
        field = field + gradient[0].abs().mean(0)
    return field.cpu() / projections


def side_that_holds(field: Tensor, share: float = 0.5) -> int:
    """Side in pixels of the smallest square around the centre that holds a share of a field's sum.

    The square is cut off at the border, so a field that is the same everywhere has ``sqrt(share)`` of the
    image's side.
    """
    height, width = field.shape
    rows, columns = (torch.arange(size) for size in (height, width))
    distance = torch.maximum((rows - height // 2).abs()[:, None], (columns - width // 2).abs()[None])
    within = torch.zeros(int(distance.max()) + 1, dtype=torch.float64)
    within.index_add_(0, distance.flatten(), field.flatten().double())
    radius = int((within.cumsum(0) < share * within.sum()).sum())
    return min(2 * radius + 1, max(height, width))
