"""What ``model.json`` says of the exported model beside it, checked field by field."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError, one_line, reason_of
from .decoding import DenseAnchors, Shape
from .preparing import CV2_INTERPOLATIONS, PILLOW_INTERPOLATIONS, Preparation, Resize

VERSION = 1
TASKS = ("detection", "segmentation", "classification", "backbone")
KINDS = {
    "detection": ("dense_anchors", "boxes"),
    "segmentation": ("logits", "labels"),
    "classification": ("scores", "logits"),
    "backbone": ("maps",),
}
# A side that no image, map or stride exceeds.
_LONGEST = 1 << 16


class _Fields:
    """A JSON object whose fields are taken one by one, each as what it has to be."""

    def __init__(self, value: object, place: str, file: Path) -> None:
        self.place, self.file = place, file
        if not isinstance(value, dict):
            raise self.wrong(f"{place or 'the whole'} is no object of names and values")
        self.value = value

    def wrong(self, what: str) -> UsageError:
        return UsageError(
            f"{self.file} does not describe a model, since {what}: export the model again with "
            "tools/export.py."
        )

    def take(self, key: str, what: str, fits: Callable[[Any], bool]) -> Any:
        name = f"{self.place}.{key}" if self.place else key
        if key not in self.value:
            raise self.wrong(f"{name!r} is missing, which has to be {what}")
        value = self.value[key]
        if not fits(value):
            shown = one_line(json.dumps(value))
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise self.wrong(f"{name!r} is {shown} and has to be {what}")
        return value

    def inner(self, key: str) -> _Fields:
        name = f"{self.place}.{key}" if self.place else key
        return _Fields(self.take(key, "an object", lambda value: isinstance(value, dict)), name, self.file)

    def text(self, key: str, choices: Sequence[str] = ()) -> str:
        if choices:
            return self.take(
                key, f"one of {', '.join(choices)}", lambda v: isinstance(v, str) and v in choices
            )
        return self.take(key, "a text", lambda value: isinstance(value, str) and bool(value))

    def flag(self, key: str) -> bool:
        return self.take(key, "true or false", lambda value: isinstance(value, bool))

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        limits = "" if math.isinf(low) else f" of at least {low:g}"
        limits += "" if math.isinf(high) else f" and at most {high:g}"
        return float(
            self.take(key, f"a number{limits}", lambda value: _is_number(value) and low <= value <= high)
        )

    def integer(self, key: str, low: int = 1, high: int = _LONGEST) -> int:
        return self.take(
            key, f"a whole number from {low} to {high}", lambda value: is_whole(value, low, high)
        )

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        return tuple(
            map(float, self.take(key, f"{count} numbers", lambda value: _is_row(value, count, _is_number)))
        )

    def pair(self, key: str, what: str) -> tuple[int, int]:
        first, second = self.take(key, f"{what} in pixels", lambda value: _is_row(value, 2, is_whole))
        return first, second

    def pair_or_none(self, key: str, what: str) -> tuple[int, int] | None:
        return None if self.is_null(key) else self.pair(key, f"null or {what}")

    def is_null(self, key: str) -> bool:
        return key in self.value and self.value[key] is None

    def texts(self, key: str) -> tuple[str, ...]:
        return tuple(self.take(key, "a list of texts", lambda value: _is_row(value, None, _is_text)))


def _is_number(value: object) -> bool:
    # A comparison keeps numbers out that no float holds.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def is_whole(value: object, low: int = 1, high: int = _LONGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_row(value: object, count: int | None, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and (count is None or len(value) == count) and all(map(fits, value))


@dataclass(frozen=True)
class Metadata:
    """What ``model.json`` says of the model beside it.

    Attributes:
        task: one of ``TASKS``.
        own_operators: the model has nodes of ours, which a library has to bring.
        classes: their names.
        palette: their colours, R, G, B; None where there are none.
        preparation: from an image to the input.
        input_name: the input's name.
        dynamic: the input's sides may vary.
        outputs: the outputs' names, in the order in which ``kind`` reads them.
        kind: what the outputs are, one of ``KINDS[task]``.
        anchors: how anchors are decoded, where ``kind`` is ``"dense_anchors"``.
        align_corners: of a segmentation's interpolation.
        threshold: where a segmentation has one logit, what its sigmoid has to exceed.
    """

    task: str
    own_operators: bool
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...] | None
    preparation: Preparation
    input_name: str
    dynamic: bool
    outputs: tuple[str, ...]
    kind: str
    anchors: DenseAnchors | None = None
    align_corners: bool = False
    threshold: float = 0.3

    @property
    def shapes(self) -> list[Shape]:
        """What the outputs have to look like."""
        if self.anchors:
            return self.anchors.shapes
        if self.task == "backbone":
            return [(None, None, None, None)] * len(self.outputs)
        # One logit tells two classes apart.
        binary = self.task == "segmentation" and len(self.classes) <= 2
        count = None if binary else len(self.classes)
        shapes: dict[str, list[Shape]] = {
            "boxes": [(None, 4), (None,), (None,)],
            "labels": [(None, None, None)],
            "scores": [(None, count)],
            "logits": [(None, count) if self.task == "classification" else (None, count, None, None)],
        }
        return shapes[self.kind]


def _read_resize(fields: _Fields) -> Resize | None:
    if fields.is_null("resize"):
        return None
    given = fields.inner("resize")
    backend = given.text("backend", ("cv2", "pillow")) if "backend" in given.value else "cv2"
    names = tuple(CV2_INTERPOLATIONS) if backend == "cv2" else PILLOW_INTERPOLATIONS
    interpolation = given.text("interpolation", names)
    if "short_edge" in given.value:
        edge = given.integer("short_edge")
        return Resize(None, short_edge=edge, interpolation=interpolation, backend=backend)
    scale = given.pair("scale", "[width, height]")
    return Resize(scale, given.flag("keep_ratio"), interpolation=interpolation, backend=backend)


def _read_preparation(whole: _Fields) -> Preparation:
    given, network = whole.inner("preprocess"), whole.inner("input")
    dynamic, fixed_size = network.flag("dynamic"), network.pair_or_none("fixed_size", "[height, width]")
    if dynamic == (fixed_size is not None):
        raise network.wrong("'input.fixed_size' has to be null where 'input.dynamic' is true, and only there")
    mean, std = given.numbers("mean", 3), given.numbers("std", 3)
    if 0 in std:
        raise given.wrong("'preprocess.std' has a 0, and pixels are divided by it")
    return Preparation(
        resize=_read_resize(given),
        center_crop=given.pair_or_none("center_crop", "[height, width]"),
        to_rgb=given.flag("to_rgb"),
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        pad_divisor=given.integer("pad_divisor"),
        pad_value=given.number("pad_value"),
        fixed_size=fixed_size,
    )


def _read_anchors(given: _Fields) -> DenseAnchors:
    def are_anchors(value: object) -> bool:
        return _is_row(
            value, None, lambda level: _is_row(level, None, lambda row: _is_row(row, 4, _is_number)) and level
        ) and bool(value)

    levels = given.take("base_anchors", "a list of boxes [x1, y1, x2, y2] for each level", are_anchors)
    strides = given.take(
        "strides",
        "[width, height] for each level of base_anchors",
        lambda value: _is_row(value, len(levels), lambda row: _is_row(row, 2, _is_number)),
    )
    return DenseAnchors(
        num_classes=given.integer("num_classes"),
        softmax=given.text("activation", ("sigmoid", "softmax")) == "softmax",
        base_anchors=tuple(np.array(level, np.float32) for level in levels),
        strides=tuple((float(width), float(height)) for width, height in strides),
        means=given.numbers("means", 4),
        stds=given.numbers("stds", 4),
        wh_ratio_clip=given.number("wh_ratio_clip", 1e-6, 1),
        ctr_clamp=given.number("ctr_clamp", 0) if given.flag("add_ctr_clamp") else None,
        nms_pre=given.integer("nms_pre", 1, 1 << 20),
        score_thr=given.number("score_thr", 0, 0.999999),
        iou_threshold=given.number("iou_threshold", 0, 1),
        class_agnostic=given.flag("class_agnostic"),
        max_per_img=given.integer("max_per_img"),
        min_bbox_size=given.number("min_bbox_size"),
    )


def read_metadata(path: str | Path) -> Metadata:
    """Read and check a ``model.json``.

    Raises:
        UsageError: the file is not there, is no JSON, is of another version, or a field is missing or wrong.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(
            f"{path} is not there, which says how images become the model's input: keep it beside the model, "
            "or export the model again with tools/export.py."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} cannot be read as JSON ({reason_of(error)}): export the model again with "
            "tools/export.py."
        ) from None
    whole = _Fields(value, "", path)
    version = whole.take("lf_dense", "the version of its layout", lambda value: is_whole(value, 0, 1 << 31))
    if version != VERSION:
        raise UsageError(
            f"{path} is of version {version}, and this lf_dense reads version {VERSION}: install the "
            "lf_dense that exported the model, or export it again."
        )
    task = whole.text("task", TASKS)
    classes = whole.texts("classes")
    palette = None
    if not whole.is_null("palette"):
        rows = whole.take(
            "palette",
            "null or [red, green, blue] for each class",
            lambda value: (
                _is_row(value, None, lambda row: _is_row(row, 3, lambda part: is_whole(part, 0, 255)))
                and len(value) >= len(classes)
            ),
        )
        palette = tuple((red, green, blue) for red, green, blue in rows)
    preparation = _read_preparation(whole)
    if preparation.center_crop and task in ("detection", "segmentation"):
        raise whole.wrong(f"'preprocess.center_crop' is set, and a {task} is of the whole image")
    outputs = whole.texts("outputs")
    if not outputs or (task != "backbone" and not classes):
        raise whole.wrong(f"{'outputs' if not outputs else 'classes'!r} is empty")
    given = whole.inner("postprocess")
    kind = given.text("kind", KINDS[task])
    anchors = _read_anchors(given) if kind == "dense_anchors" else None
    if anchors and anchors.num_classes != len(classes):
        raise given.wrong(
            f"'postprocess.num_classes' is {anchors.num_classes} and 'classes' has {len(classes)}"
        )
    metadata = Metadata(
        task=task,
        own_operators=whole.text("attention", ("standard", "operator")) == "operator",
        classes=classes,
        palette=palette,
        preparation=preparation,
        input_name=whole.inner("input").text("name"),
        dynamic=preparation.fixed_size is None,
        outputs=outputs,
        kind=kind,
        anchors=anchors,
        align_corners=given.flag("align_corners") if (task, kind) == ("segmentation", "logits") else False,
        threshold=given.number("threshold", 1e-6, 0.999999) if "threshold" in given.value else 0.3,
    )
    if len(metadata.shapes) != len(outputs):
        raise whole.wrong(
            f"'outputs' has {len(outputs)} names, and {kind} has {len(metadata.shapes)} outputs"
        )
    return metadata
