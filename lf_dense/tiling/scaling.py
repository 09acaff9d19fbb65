"""A config whose test pipeline takes each image, or tile, at its own size."""

from __future__ import annotations

import math
from typing import Any

from mmengine.config import Config

from ..errors import UsageError
from ..frameworks import datasets_of, framework_of, type_name

_RESIZING = ("Resize", "ResizeShortestEdge")
_FIXED = "FixShapeResize"


def at_own_scale(config: Config, scale: float = 1.0) -> None:
    """Let a config's test pipeline scale every image by one factor, in the place of resizing it to a size.

    Tiles of one image have to be at one scale, or they do not fit each other.

    Args:
        config: a detector's or segmentor's, changed in place.
        scale: the factor; above 0.

    Raises:
        UsageError: the framework has no tiles, the model takes one size alone, or the factor is not positive.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise UsageError(f"the factor {scale:g} scales no image: --scale has to be above 0.")
    if framework_of(config).scope not in ("mmdet", "mmseg"):
        raise UsageError(
            "a classifier looks at an image as a whole: tiles are for detection and segmentation, so leave "
            "--tile out."
        )
    _refuse_panoptic(config)
    (_, dataset), *_ = datasets_of(config, ("test",))
    steps = list(dataset["pipeline"])
    places = [index for index, step in enumerate(steps) if type_name(step) in (*_RESIZING, _FIXED)]
    for index in places:
        _refuse_fixed(steps[index])
    scaled: dict[str, Any] = {"type": "Resize", "scale_factor": float(scale), "keep_ratio": True}
    kept = [step for index, step in enumerate(steps) if index not in places]
    kept.insert(places[0] if places else 1, scaled)
    dataset["pipeline"] = kept


def _refuse_fixed(step: dict[str, Any]) -> None:
    """A step that gives every image one size, whatever its shape."""
    size = step.get("scale") or (step.get("width"), step.get("height"))
    keeps = type_name(step) == "ResizeShortestEdge" or step.get("keep_ratio") or "scale_factor" in step
    if type_name(step) == _FIXED or not keeps:
        size = size if isinstance(size, (list, tuple)) else (size, size)
        raise UsageError(
            f"the config resizes every image to {' x '.join(map(str, size))} pixels whatever its shape, so "
            "its model cannot take tiles as they are: predict without --tile."
        )


def _refuse_panoptic(config: Config) -> None:
    """Things and stuff in one map cannot be told apart again at a seam."""
    panoptic = "Panoptic" in type_name(config.model) or "panoptic_head" in config.model
    if panoptic and (config.model.get("test_cfg") or {}).get("panoptic_on", True):
        raise UsageError(
            f"{type_name(config.model)} makes panoptic maps, and those of tiles cannot be put together: "
            "predict without --tile."
        )
