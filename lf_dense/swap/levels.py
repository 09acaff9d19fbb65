"""The levels of a backbone: channels and strides of the maps that it returns.

Levels are measured: the backbone is built and runs once on a small image. So any registered backbone can be
replaced, and no table of them goes stale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from ..errors import one_line
from ..frameworks import type_name
from ..presets import STRIDES
from .errors import SwapError
from .settings import without_pretrained

PROBE_SIZE = 128
# These have a table of relative positions, and run at their own size only.
_FIXED_SIZE = ("BEiT", "MAE")


class Levels(NamedTuple):
    """The maps of a backbone from first to last: channels, and pixels of the image per pixel of the map."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]


# Building a large backbone takes seconds, and a session swaps many configs of a few backbones.
_measured: dict[str, Levels] = {}


def measure_levels(backbone: dict[str, Any], scope: str) -> Levels:
    """Build a backbone without its weights and run it once.

    Args:
        backbone: its settings.
        scope: registry scope that they belong to.

    Raises:
        SwapError: it does not run, or returns anything but a sequence of ``(B, C, H, W)`` maps.
    """
    settings = without_pretrained(backbone)
    key = f"{scope} {settings}"
    if key not in _measured:
        _measured[key] = _measure(settings, scope)
    return _measured[key]


def _measure(backbone: dict[str, Any], scope: str) -> Levels:
    size = _probe_size(backbone)
    maps = _run(backbone, scope, torch.zeros(1, backbone.get("in_channels", 3), size, size))
    maps = [maps] if isinstance(maps, Tensor) else maps
    if not _are_maps(maps):
        raise SwapError(
            f"the backbone cannot be replaced: {type_name(backbone)} returns something other than maps, and "
            "this model reads that."
        )
    return Levels(tuple(m.shape[1] for m in maps), tuple(round(size / m.shape[-1]) for m in maps))


def _probe_size(backbone: dict[str, Any]) -> int:
    """Width and height of the image that a backbone is measured with."""
    size: Any = backbone.get("img_size", PROBE_SIZE) if type_name(backbone) in _FIXED_SIZE else PROBE_SIZE
    return int(size if isinstance(size, int) else size[0])


@torch.no_grad()
def _run(backbone: dict[str, Any], scope: str, image: Tensor) -> Any:
    """What a new backbone returns for an image."""
    try:
        with DefaultScope.overwrite_default_scope(scope):
            module = MODELS.build(backbone)
            module.eval()
            return module(image)
    except Exception as error:
        # A registered backbone may raise anything, and no levels are known then.
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise SwapError(
            f"the backbone {type_name(backbone)} of the config does not run here, so its levels are not "
            f"known ({reason})."
        ) from error


def _are_maps(result: Any) -> bool:
    """Whether a backbone returned a sequence of ``(B, C, H, W)`` tensors."""
    if not isinstance(result, (tuple, list)) or not result:
        return False
    return all(isinstance(part, Tensor) and part.ndim == 4 for part in result)


def choose_stages(old: Levels) -> tuple[int, ...]:
    """Our stages that stand for the levels of another backbone, one for each.

    A level becomes the stage of its stride. Where that is not possible (dilated stages, a plain ViT, strides
    we do not have) levels become stages in order, the last one our last.

    Raises:
        SwapError: there are more than four levels, or later levels are finer than earlier ones.
    """
    count = len(old.strides)
    if any(later < earlier for earlier, later in zip(old.strides, old.strides[1:])):
        raise SwapError(
            f"the backbone cannot be replaced: it is a decoder, whose maps get finer (strides {old.strides})."
        )
    if count > len(STRIDES):
        raise SwapError(
            f"the backbone cannot be replaced: it returns {count} maps, and a LaplacianFormer has four."
        )
    if len(set(old.strides)) == count and set(old.strides) <= set(STRIDES):
        return tuple(STRIDES.index(stride) for stride in old.strides)
    return tuple(range(len(STRIDES) - count, len(STRIDES)))
