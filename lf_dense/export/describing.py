"""The description beside an exported model: how images are prepared, and what the outputs mean."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from ..errors import UsageError
from ..frameworks import datasets_of, type_name
from .metadata import VERSION
from .parts import Part

# Steps of a test pipeline that change no pixel.
_NEUTRAL = ("LoadImageFromFile", "LoadImageFromNDArray", "LoadAnnotations", "LoadPanopticAnnotations")
_PACKING = ("PackDetInputs", "PackSegInputs", "PackInputs", "PackReIDInputs")


def _interpolation(step: dict[str, Any]) -> dict[str, Any]:
    wanted = {"interpolation": step.get("interpolation", "bilinear")}
    return wanted if step.get("backend", "cv2") == "cv2" else {**wanted, "backend": "pillow"}


def _square(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else [int(side) for side in size]


def _read_pipeline(config: Config) -> dict[str, Any]:
    """Resizing and cropping of a config's test pipeline.

    Raises:
        UsageError: a step changes images in a way that the runtime has not.
    """
    (_, dataset), *_ = datasets_of(config, ("test",))
    found: dict[str, Any] = {"resize": None, "center_crop": None}
    for step in dataset["pipeline"]:
        name = type_name(step)
        if name == "Resize" and found["resize"] is None:
            width, height = _square(step["scale"])
            keep_ratio = bool(step.get("keep_ratio", False))
            found["resize"] = {"scale": [width, height], "keep_ratio": keep_ratio, **_interpolation(step)}
        elif name == "ResizeEdge" and found["resize"] is None and step.get("edge", "short") == "short":
            found["resize"] = {"short_edge": step["scale"], **_interpolation(step)}
        elif name == "CenterCrop" and found["center_crop"] is None:
            width, height = _square(step["crop_size"])
            found["center_crop"] = [height, width]
        elif name not in (*_NEUTRAL, *_PACKING):
            raise UsageError(
                f"the test pipeline has a step {name}, which the runtime of exported models has not: take it "
                "out, or export the backbone alone (--part backbone)."
            )
    return found


def _preprocess(config: Config) -> dict[str, Any]:
    settings = config.model.get("data_preprocessor") or config.get("data_preprocessor") or {}
    mean, std = settings.get("mean"), settings.get("std")
    test = settings.get("test_cfg") or {}
    if settings.get("rgb_to_bgr"):
        raise UsageError(
            "the data_preprocessor has rgb_to_bgr, which the runtime of exported models has not: images are "
            "read as BGR there."
        )
    if test.get("size"):
        raise UsageError(
            "the data_preprocessor pads test images to a size (test_cfg.size), which the runtime of exported "
            "models does not: set test_cfg.size_divisor in its place."
        )
    divisor = test.get("size_divisor") or settings.get("pad_size_divisor") or 1
    return {
        "to_rgb": bool(settings.get("bgr_to_rgb", settings.get("to_rgb", False))),
        "mean": [float(x) for x in mean or (0.0, 0.0, 0.0)],
        "std": [float(x) for x in std or (1.0, 1.0, 1.0)],
        "pad_divisor": int(divisor),
        "pad_value": float(settings.get("pad_value", settings.get("pad_val", 0))),
    }


def _palette(meta: dict[str, Any]) -> list[list[int]] | None:
    palette, classes = meta.get("palette"), meta["classes"]
    if not isinstance(palette, (list, tuple)) or len(palette) != len(classes):
        return None
    return [[int(channel) for channel in colour] for colour in palette]


def describe(
    part: Part,
    config: Config,
    meta: dict[str, Any],
    form: str,
    size: tuple[int, int] | None,
    precision: str = "float32",
) -> dict[str, Any]:
    """What ``model.json`` says.

    Args:
        part: what is exported.
        config: the model's config, whose test pipeline and preprocessing are described.
        meta: the data set's ``classes`` and ``palette``.
        form: ``"standard"`` or ``"operator"``.
        size: the (height, width) of a model that takes no other.
        precision: of the layers, ``"float32"`` or ``"int8"``.

    Raises:
        UsageError: the test pipeline has a step that the runtime has not.
    """
    pipeline = {"resize": None, "center_crop": None} if part.task == "backbone" else _read_pipeline(config)
    return {
        "lf_dense": VERSION,
        "task": part.task,
        "attention": form,
        "precision": precision,
        "classes": list(meta["classes"]),
        "palette": _palette(meta),
        "preprocess": {**pipeline, **_preprocess(config)},
        "input": {"name": "image", "dynamic": size is None, "fixed_size": list(size) if size else None},
        "outputs": list(part.outputs),
        "postprocess": part.postprocess,
    }
