"""From a network's outputs to boxes, label maps and scores, as the frameworks' heads make them, in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

Floats = npt.NDArray[np.float32]
# What an output has to look like: a number for a side that is known, None for any.
Shape = tuple[int | None, ...]
# Sides of the tiles in which logits become labels: their classes stay in a processor's cache.
_TILE = (64, 128)
# mmcv's split_thr.
_SPLIT = 10000


@dataclass(frozen=True)
class DenseAnchors:
    """mmdet's ``AnchorHead`` with a ``DeltaXYWHBBoxCoder``: what its decoding depends on.

    Attributes:
        num_classes: without the background.
        softmax: the scores are a softmax whose last class is background, else sigmoids.
        base_anchors: per level ``(A, 4)`` float32, x1 y1 x2 y2 around the first cell.
        strides: per level (width, height), in pixels.
        means, stds: of the four deltas.
        wh_ratio_clip: how far a delta may change a side, as a ratio.
        ctr_clamp: how far, in pixels, a delta may move a centre; None is any distance.
        nms_pre: how many boxes a level may give.
        score_thr: lower scores are dropped first.
        iou_threshold: overlap from which the lower box of two goes.
        class_agnostic: boxes of different classes suppress each other.
        max_per_img: how many boxes stay.
        min_bbox_size: sides that are not longer, in the image's pixels, are dropped; -1 drops none.
    """

    num_classes: int
    softmax: bool
    base_anchors: tuple[Floats, ...]
    strides: tuple[tuple[float, float], ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]
    wh_ratio_clip: float
    ctr_clamp: float | None
    nms_pre: int
    score_thr: float
    iou_threshold: float
    class_agnostic: bool
    max_per_img: int
    min_bbox_size: float

    @property
    def shapes(self) -> list[Shape]:
        """The outputs' shapes: all levels' class maps, then all levels' box maps."""
        channels = self.num_classes + self.softmax
        classes: list[Shape] = [(None, len(anchors) * channels, None, None) for anchors in self.base_anchors]
        return classes + [(None, len(anchors) * 4, None, None) for anchors in self.base_anchors]


@dataclass(frozen=True)
class Detections:
    """Boxes ``(K, 4)`` float32 x1 y1 x2 y2 in the image's pixels, ``(K,)`` scores and labels; best first."""

    boxes: Floats
    scores: Floats
    labels: npt.NDArray[np.int64]


def check_shapes(names: Sequence[str], shapes: Sequence[Shape], expected: Sequence[Shape], what: str) -> None:
    """Compare outputs with what they have to look like; an empty shape is not known and passes.

    Raises:
        UsageError: an output has another shape.
    """

    def text(shape: Shape) -> str:
        return "(" + ", ".join("?" if side is None else str(side) for side in shape) + ")"

    for name, shape, wanted in zip(names, shapes, expected):
        fits = len(shape) == len(wanted) and all(
            a == b or a is None or b is None for a, b in zip(shape, wanted)
        )
        if shape and not fits:
            raise UsageError(
                f"{what} gives {name!r} in the shape {text(shape)}, and its metadata ask for {text(wanted)}: "
                "keep the two files of one export together, or export the model again."
            )


def _top_scores(spec: DenseAnchors, maps: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
    """The best scores of one level's class maps ``(A * C, H, W)``, falling, and where each is.

    A place counts as in mmdet: rows, columns, anchors, classes.
    """
    channels, height, width = maps.shape
    if spec.softmax:
        by_anchor = maps.transpose(1, 2, 0).reshape(-1, spec.num_classes + 1)
        shifted = np.exp(by_anchor - by_anchor.max(axis=1, keepdims=True))
        scores = (shifted / shifted.sum(axis=1, keepdims=True))[:, :-1].reshape(-1)
        places = np.flatnonzero(scores > np.float32(spec.score_thr))
        scores = scores[places]
    else:
        # Most logits are far below the threshold: only those near it or above become scores.
        lowest = -math.inf
        if spec.score_thr > 0:
            lowest = math.log(spec.score_thr) - math.log1p(-spec.score_thr) - 1e-3
        flat = maps.reshape(-1)
        found = np.flatnonzero(flat > lowest)
        logits = flat[found]
        if found.size > spec.nms_pre:
            # More than a level may give: those below the last that stays are not looked at.
            # Logits above 8 may share a score.
            least = min(np.partition(logits, -spec.nms_pre)[-spec.nms_pre], np.float32(8))
            near = logits >= least - np.float32(1e-3)
            found, logits = found[near], logits[near]
        with np.errstate(over="ignore"):
            scores = np.float32(1) / (np.float32(1) + np.exp(-logits))
        above = scores > np.float32(spec.score_thr)
        found, scores = found[above], scores[above]
        channel, cell = np.divmod(found, height * width)
        places = cell * channels + channel
        in_order = np.argsort(places)
        places, scores = places[in_order], scores[in_order]
    best = np.argsort(-scores, kind="stable")[: spec.nms_pre]
    return scores[best], places[best]


def _decode(spec: DenseAnchors, anchors: Floats, deltas: Floats, shape: tuple[int, int]) -> Floats:
    """Boxes ``(K, 4)`` of anchors and deltas, within ``shape``, (height, width)."""
    deltas = deltas * np.asarray(spec.stds, np.float32) + np.asarray(spec.means, np.float32)
    centers = (anchors[:, :2] + anchors[:, 2:]) * np.float32(0.5)
    sizes = anchors[:, 2:] - anchors[:, :2]
    shifts, growth = sizes * deltas[:, :2], deltas[:, 2:]
    largest = np.float32(abs(math.log(spec.wh_ratio_clip)))
    if spec.ctr_clamp is None:
        growth = np.clip(growth, -largest, largest)
    else:
        shifts = np.clip(shifts, -spec.ctr_clamp, spec.ctr_clamp)
        growth = np.minimum(growth, largest)
    centers = centers + shifts
    half = sizes * np.exp(growth) * np.float32(0.5)
    boxes: Floats = np.concatenate([centers - half, centers + half], axis=1)
    return _clipped(boxes, shape)


def _clipped(boxes: Floats, shape: tuple[int, int]) -> Floats:
    height, width = shape
    return np.clip(boxes, np.float32(0), np.array([width, height, width, height], np.float32))


def _scaled(boxes: Floats, scale_factor: tuple[float, float]) -> Floats:
    return boxes * np.array([1 / factor for factor in scale_factor] * 2, np.float32)


def suppress(
    boxes: Floats,
    scores: Floats,
    labels: npt.NDArray[np.int64],
    iou_threshold: float,
    class_agnostic: bool = False,
    limit: int | None = None,
) -> npt.NDArray[np.int64]:
    """Non-maximum suppression within each class, as mmcv's ``batched_nms``.

    Args:
        boxes: ``(K, 4)`` float32, x1 y1 x2 y2.
        scores: ``(K,)`` float32.
        labels: ``(K,)``.
        iou_threshold: a box goes that overlaps a better one by more.
        class_agnostic: boxes of all classes suppress each other.
        limit: as many boxes are enough.

    Returns:
        The indices of the boxes that stay, best first.
    """
    kept: list[int] = []
    order = np.argsort(-scores, kind="stable")
    # So many boxes mmcv takes class by class, whatever class_agnostic says.
    if len(boxes) and (not class_agnostic or len(boxes) >= _SPLIT):
        # Classes are moved apart; in float32, since mmcv rounds the overlaps so.
        boxes = boxes + (labels.astype(np.float32) * (boxes.max() + np.float32(1)))[:, None]
    sides = np.ascontiguousarray(boxes[order].T)
    areas = (sides[2] - sides[0]) * (sides[3] - sides[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        while len(order) and (limit is None or len(kept) < limit):
            kept.append(int(order[0]))
            (x1, y1, x2, y2), area = sides[:, 0], areas[0]
            width = np.minimum(x2, sides[2, 1:]) - np.maximum(x1, sides[0, 1:])
            height = np.minimum(y2, sides[3, 1:]) - np.maximum(y1, sides[1, 1:])
            shared = np.maximum(width, 0) * np.maximum(height, 0)
            # Two boxes without an area share 0 / 0, which is above no threshold.
            gone = shared / (area + areas[1:] - shared) > np.float32(iou_threshold)
            stay = 1 + np.flatnonzero(~gone)
            order, sides, areas = order[stay], sides[:, stay], areas[stay]
    return np.array(kept, np.int64)


def detections_of_anchors(
    spec: DenseAnchors, outputs: Sequence[Floats], shape: tuple[int, int], scale_factor: tuple[float, float]
) -> Detections:
    """Decode the maps of one image as mmdet's ``AnchorHead.predict`` does.

    Args:
        spec: the head.
        outputs: class maps ``(1, A * C, H, W)`` of each level before their activation, then box maps
            ``(1, A * 4, H, W)`` of each level.
        shape: (height, width) of the network's input without padding.
        scale_factor: (x, y), from the image's pixels to the input's.
    """
    levels = len(spec.base_anchors)
    boxes, scores, labels = [], [], []
    for level in range(levels):
        class_map, box_map = outputs[level][0], outputs[level + levels][0]
        count, width = len(spec.base_anchors[level]), class_map.shape[2]
        if class_map.shape[1:] != box_map.shape[1:]:
            raise UsageError(
                f"the model's class map of level {level} has {class_map.shape[1]} x {class_map.shape[2]} "
                f"cells and its box map {box_map.shape[1]} x {box_map.shape[2]}: export the model again."
            )
        best, places = _top_scores(spec, class_map)
        anchor_places, classes = np.divmod(places, spec.num_classes)
        cells, anchor = np.divmod(anchor_places, count)
        row, column = np.divmod(cells, width)
        # (A, 4, H, W): the four deltas of each place that scored.
        deltas = box_map.reshape(count, 4, *box_map.shape[1:])[anchor, :, row, column]
        step = np.array(spec.strides[level], np.float32)
        corner = np.stack([column, row], axis=1).astype(np.float32) * step
        anchors = spec.base_anchors[level][anchor] + np.tile(corner, 2)
        boxes.append(_decode(spec, anchors, deltas, shape))
        scores.append(best)
        labels.append(classes)
    found = Detections(
        _scaled(np.concatenate(boxes), scale_factor), np.concatenate(scores), np.concatenate(labels)
    )
    if spec.min_bbox_size >= 0:
        sizes = found.boxes[:, 2:] - found.boxes[:, :2]
        found = _taken(found, np.flatnonzero((sizes > spec.min_bbox_size).all(axis=1)))
    kept = suppress(
        found.boxes, found.scores, found.labels, spec.iou_threshold, spec.class_agnostic, spec.max_per_img
    )
    return _taken(found, kept)


def _taken(found: Detections, indices: npt.NDArray[np.int64]) -> Detections:
    return Detections(found.boxes[indices], found.scores[indices], found.labels[indices])


def detections_of_boxes(
    outputs: Sequence[npt.NDArray[Any]],
    classes: int,
    shape: tuple[int, int],
    scale_factor: tuple[float, float],
) -> Detections:
    """Bring a network's own boxes back to the image.

    Args:
        outputs: boxes ``(K, 4)`` in pixels of the input, scores ``(K,)``, labels ``(K,)`` int64; a label
            below 0 fills a place up.
        classes: how many there are.
        shape: (height, width) of the input without padding.
        scale_factor: (x, y), from the image's pixels to the input's.

    Raises:
        UsageError: the three differ in length, or a label is no class.
    """
    boxes, scores, labels = outputs
    if not len(boxes) == len(scores) == len(labels):
        raise UsageError(
            f"the model gives {len(boxes)} boxes, {len(scores)} scores and {len(labels)} labels, which have "
            "to be as many: export the model again."
        )
    labels = labels.astype(np.int64)
    if len(labels) and labels.max() >= classes:
        raise UsageError(
            f"the model gives the label {labels.max()}, and its metadata name {classes} classes: keep the "
            "two files of one export together, or export the model again."
        )
    found = Detections(
        _scaled(_clipped(boxes.astype(np.float32), shape), scale_factor), scores.astype(np.float32), labels
    )
    return _taken(found, np.flatnonzero(labels >= 0))


def _bilinear(given: int, length: int, align_corners: bool) -> Floats:
    """The ``(length, given)`` weights of torch's bilinear interpolation along one side."""
    places = np.arange(length, dtype=np.float32)
    if given == length:
        source = places
    elif align_corners:
        source = places * np.float32((given - 1) / (length - 1) if length > 1 else 0)
    else:
        step = np.float32(given) / np.float32(length)
        source = np.maximum(step * (places + np.float32(0.5)) - np.float32(0.5), np.float32(0))
    first = np.minimum(source.astype(np.int64), given - 1)
    second = np.minimum(first + 1, given - 1)
    share = source - first.astype(np.float32)
    weights = np.zeros((length, given), np.float32)
    rows = np.arange(length)
    weights[rows, first] = 1 - share
    weights[rows, second] += share
    return weights


def _back_to_image(given: int, padded: int, inside: int, original: int, align_corners: bool) -> Floats:
    """The ``(original, given)`` weights along one side: to the padded input, without padding, to the image.

    mmseg interpolates twice, and both steps are linear, so their product does the same.
    """
    weights: Floats = (
        _bilinear(inside, original, align_corners) @ _bilinear(given, padded, align_corners)[:inside]
    )
    return weights


def _band(weights: Floats, start: int, end: int) -> tuple[Floats, slice]:
    """Some rows of weights without the columns that are zero in all of them, and which columns stay."""
    rows = weights[start:end]
    used = np.flatnonzero(rows.any(axis=0))
    columns = slice(int(used[0]), int(used[-1]) + 1)
    return np.ascontiguousarray(rows[:, columns]), columns


def label_map_of_logits(
    logits: Floats,
    padded: tuple[int, int],
    shape: tuple[int, int],
    original: tuple[int, int],
    align_corners: bool,
    threshold: float = 0.3,
) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """The label map of one image, as mmseg's test step makes it.

    Args:
        logits: ``(C, h, w)`` float32.
        padded: (height, width) of the network's input.
        shape: the same without padding.
        original: (height, width) of the image.
        align_corners: of both interpolations.
        threshold: where C is 1, the sigmoid above which a pixel is 1 and not 0.

    Returns:
        ``original``-sized, uint8, or uint16 for more than 256 classes.
    """
    by_row = _back_to_image(logits.shape[1], padded[0], shape[0], original[0], align_corners)
    by_column = _back_to_image(logits.shape[2], padded[1], shape[1], original[1], align_corners)
    labels = np.empty(original, np.uint8 if len(logits) <= 256 else np.uint16)
    columns = [
        (slice(x, x + _TILE[1]), *_band(by_column, x, x + _TILE[1])) for x in range(0, original[1], _TILE[1])
    ]
    for y in range(0, original[0], _TILE[0]):
        down, rows = _band(by_row, y, y + _TILE[0])
        for place, across, taken in columns:
            tile = np.matmul(np.matmul(down, logits[:, rows, taken]), across.T)
            labels[y : y + _TILE[0], place] = _best_class(tile, threshold)
    return labels


def _best_class(tile: Floats, threshold: float) -> npt.NDArray[Any]:
    if len(tile) == 1:
        above: npt.NDArray[Any] = tile[0] > np.float32(math.log(threshold) - math.log1p(-threshold))
        return above
    # The first of equals is the best, as for argmax, which is slow along a first axis.
    best, label = tile[0].copy(), np.zeros(tile.shape[1:], np.uint16)
    for index in range(1, len(tile)):
        better = tile[index] > best
        np.copyto(best, tile[index], where=better)
        label[better] = index
    return label


def label_map_of_labels(
    labels: npt.NDArray[Any],
    classes: int,
    padded: tuple[int, int],
    shape: tuple[int, int],
    original: tuple[int, int],
) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """A network's own label map ``(h, w)`` without padding, at the image's size; the nearest label serves.

    Raises:
        UsageError: a label is no class.
    """
    if labels.min() < 0 or labels.max() >= classes:
        raise UsageError(
            f"the model gives labels from {labels.min()} to {labels.max()}, and its metadata name {classes} "
            "classes: keep the two files of one export together, or export the model again."
        )

    def along(given: int, whole: int, inside: int, length: int) -> npt.NDArray[np.int64]:
        return (np.arange(length) * inside // length) * given // whole

    rows = along(labels.shape[0], padded[0], shape[0], original[0])
    columns = along(labels.shape[1], padded[1], shape[1], original[1])
    taken = labels[rows][:, columns]
    return taken.astype(np.uint8) if classes <= 256 else taken.astype(np.uint16)


def softmax(logits: Floats) -> Floats:
    """Softmax along the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
