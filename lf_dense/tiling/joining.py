"""Detections of tiles put together: an object that several tiles see is found once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from .cutting import Tile
from .masks import PlacedMask

# Two boxes in what their tiles share are one object's from this IoU on, as in COCO's least strict match.
SAME = 0.5
# A box that ends so few pixels from where its tile was cut is a part of an object, as far as one can tell.
MARGIN = 8


@dataclass
class Detections:
    """Objects in one image, or in a part of it.

    Attributes:
        boxes: ``(K, 4)`` float64, x1, y1, x2, y2 in pixels of the whole image.
        scores: ``(K,)`` float64.
        labels: ``(K,)`` int64.
        masks: K masks, or None where the model makes none.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[PlacedMask] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, indices: Any) -> Detections:
        """Some of them, in the order of ``indices``."""
        indices = np.asarray(indices, dtype=np.int64)
        masks = None if self.masks is None else [self.masks[index] for index in indices]
        return Detections(self.boxes[indices], self.scores[indices], self.labels[indices], masks)


@dataclass
class Joined:
    """What ``join`` found.

    Attributes:
        detections: sorted by score, the highest first.
        larger: how many objects reach across a whole tile: they were put together of parts.
    """

    detections: Detections
    larger: int


def ious(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of ``(K, 4)`` and ``(L, 4)`` boxes: ``(K, L)``, 0 where both are empty."""
    corner = np.maximum(boxes[:, None, :2], others[None, :, :2])
    sides = (np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - corner).clip(0)
    common = sides.prod(-1)
    areas, other_areas = ((b[:, 2:] - b[:, :2]).clip(0).prod(-1) for b in (boxes, others))
    union = areas[:, None] + other_areas[None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def cut_sides(boxes: np.ndarray, tile: Tile, shape: tuple[int, int]) -> np.ndarray:
    """At which sides of a tile a box ends: ``(K, 4)`` bool for left, top, right, bottom.

    The image's own borders cut nothing.
    """
    height, width = shape
    inner = np.array(tile.box) != [0, 0, width, height]
    return (np.abs(boxes - np.array(tile.box)) <= MARGIN) & inner


def join(found: list[tuple[Tile, Detections]], shape: tuple[int, int]) -> Joined:
    """Put the detections of all tiles of one image together.

    Boxes of one class in two tiles are compared in what the tiles share. Where they are the same there, and
    neither is cut, the one with the higher score stays: non-maximum suppression, between tiles alone, because
    the model has done its own within each. A cut box beside a whole one of the same object goes. Cut boxes
    alone become the box around them all, with the highest of their scores.

    Args:
        found: the detections of each tile.
        shape: height and width of the image.
    """
    tiles = [tile for tile, detections in found for _ in range(len(detections))]
    everything = concatenate([detections for _, detections in found])
    if not len(everything):
        return Joined(everything, 0)
    sides = np.concatenate([cut_sides(detections.boxes, tile, shape) for tile, detections in found])
    cut = np.asarray(sides.any(1))
    pairs = list(_same_objects(found))
    alive = _suppress(everything.scores, [(a, b) for a, b in pairs if not (cut[a] or cut[b])])
    for a, b in pairs:
        # The whole box may have been suppressed itself, by one that is whole as well.
        if cut[a] != cut[b]:
            alive[a if cut[a] else b] = False
    groups = _groups(len(everything), [(a, b) for a, b in pairs if cut[a] and cut[b]])
    parts, larger = [], 0
    for members in groups:
        members = [index for index in members if alive[index]]
        if not members:
            continue
        across = sides[members]
        larger += bool((across[:, :2] & across[:, 2:]).any() or _spans_a_tile(everything, members, tiles))
        parts.append(_union(everything, members) if len(members) > 1 else everything.take(members))
    kept = concatenate(parts) if parts else everything.take([])
    return Joined(kept.take(np.argsort(-kept.scores, kind="stable")), larger)


def concatenate(parts: list[Detections]) -> Detections:
    """All detections of several lists."""
    masks: list[PlacedMask] | None = None
    full = [part for part in parts if len(part)]
    if full and all(part.masks is not None for part in full):
        masks = [mask for part in full for mask in part.masks or ()]
    return Detections(
        np.concatenate([np.zeros((0, 4)), *(part.boxes for part in parts)]),
        np.concatenate([np.zeros(0), *(part.scores for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.labels for part in parts)]),
        masks,
    )


def _same_objects(found: list[tuple[Tile, Detections]]) -> Iterator[tuple[int, int]]:
    """Pairs of detections, as indices into all, that are one object in what their tiles share."""
    starts = np.cumsum([0, *(len(detections) for _, detections in found)])
    for first, (tile, detections) in enumerate(found):
        for second in range(first + 1, len(found)):
            other, others = found[second]
            if other.rows.start >= tile.rows.end:
                break  # tiles come row by row
            shared = _intersection(tile, other)
            if shared is None or not len(detections) or not len(others):
                continue
            low, high = shared[[0, 1, 0, 1]], shared[[2, 3, 2, 3]]
            same = ious(detections.boxes.clip(low, high), others.boxes.clip(low, high)) >= SAME
            same &= detections.labels[:, None] == others.labels[None]
            for a, b in np.argwhere(same):
                yield int(starts[first] + a), int(starts[second] + b)


def _intersection(tile: Tile, other: Tile) -> np.ndarray | None:
    """What two tiles share, as a box."""
    a, b = np.array(tile.box), np.array(other.box)
    box = np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])]).astype(float)
    return box if (box[2:] > box[:2]).all() else None


def _suppress(scores: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Which detections stay where of each pair one has to go: ``(K,)`` bool."""
    rivals = defaultdict(list)
    for a, b in pairs:
        rivals[a].append(b)
        rivals[b].append(a)
    alive = np.ones(len(scores), bool)
    for index in sorted(rivals, key=lambda index: (-scores[index], index)):
        if alive[index]:
            alive[rivals[index]] = False
    return alive


def _groups(count: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """What is connected by pairs, as lists of indices."""
    first, second = np.array(pairs, np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(first)), (first, second)), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    groups: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels.tolist()):
        groups[label].append(index)
    return list(groups.values())


def _union(everything: Detections, members: list[int]) -> Detections:
    """One detection around several."""
    parts = everything.take(members)
    box = np.concatenate([parts.boxes[:, :2].min(0), parts.boxes[:, 2:].max(0)])
    masks = None if parts.masks is None else [PlacedMask.union(parts.masks)]
    whole = parts.take([int(parts.scores.argmax())])
    return replace(whole, boxes=box[None], masks=masks)


def _spans_a_tile(everything: Detections, members: list[int], tiles: list[Tile]) -> bool:
    """Whether the parts together are longer than the tile of one of them."""
    boxes = everything.boxes[members]
    length = boxes[:, 2:].max(0) - boxes[:, :2].min(0)
    return any(
        length[0] > tiles[index].columns.length or length[1] > tiles[index].rows.length for index in members
    )
