"""Masks of objects in images too large for a dense mask of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PlacedMask:
    """The mask of one object: only the rectangle that holds it is stored.

    Attributes:
        left, top: the rectangle's first column and row in the image.
        coded: COCO run lengths of the rectangle, ``{"size": [h, w], "counts": str}``.
    """

    left: int
    top: int
    coded: dict[str, Any]

    @classmethod
    def of(cls, mask: np.ndarray, left: int = 0, top: int = 0) -> PlacedMask:
        """Of a mask ``(H, W)`` bool whose first pixel is at ``(left, top)`` of the image."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            return cls(left, top, _encode(np.zeros((1, 1), np.uint8)))
        part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return cls(left + int(columns[0]), top + int(rows[0]), _encode(part))

    @classmethod
    def union(cls, masks: list[PlacedMask]) -> PlacedMask:
        """Everything that one of several masks has."""
        parts = [(mask, mask.dense()) for mask in masks]
        left, top = min(mask.left for mask in masks), min(mask.top for mask in masks)
        right = max(mask.left + part.shape[1] for mask, part in parts)
        bottom = max(mask.top + part.shape[0] for mask, part in parts)
        whole = np.zeros((bottom - top, right - left), bool)
        for mask, part in parts:
            rows, columns = mask.top - top, mask.left - left
            whole[rows : rows + part.shape[0], columns : columns + part.shape[1]] |= part
        return cls.of(whole, left, top)

    def dense(self) -> np.ndarray:
        """The rectangle's mask, bool."""
        from pycocotools import mask as coco_mask

        return coco_mask.decode({**self.coded, "counts": self.coded["counts"].encode()}).astype(bool)

    def shrunk(self, step: float, shape: tuple[int, int]) -> np.ndarray:
        """The mask in an image ``(H, W)`` that is ``step`` times smaller: bool, by the nearest pixel."""
        part = self.dense()
        small = np.zeros(shape, bool)
        rows, columns = (((np.arange(length) + 0.5) * step).astype(int) for length in shape)
        rows_in = (rows >= self.top) & (rows < self.top + part.shape[0])
        columns_in = (columns >= self.left) & (columns < self.left + part.shape[1])
        chosen = part[np.ix_(rows[rows_in] - self.top, columns[columns_in] - self.left)]
        small[np.ix_(rows_in, columns_in)] = chosen
        return small

    def in_image(self, height: int, width: int) -> dict[str, Any]:
        """COCO run lengths of the whole image, made without a dense mask of it."""
        from pycocotools import mask as coco_mask

        part = self.dense()
        part = part[: max(0, height - self.top), : max(0, width - self.left)]
        # Runs go down the columns; each begins and ends where the padded column changes.
        padded = np.zeros((part.shape[1], part.shape[0] + 2), np.int8)
        padded[:, 1:-1] = part.T
        column, row = np.nonzero(np.diff(padded, axis=1))
        edges = (column + self.left) * height + row + self.top
        # A run that ends with its column and one that begins with the next are one run.
        joined = np.flatnonzero(edges[:-1] == edges[1:])
        edges = np.delete(edges, np.concatenate([joined, joined + 1]))
        ends = edges if len(edges) and edges[-1] == height * width else [*edges, height * width]
        counts = np.diff(np.concatenate([[0], ends]).astype(np.int64))
        coded = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
        return {"size": list(coded["size"]), "counts": coded["counts"].decode()}

    def as_json(self) -> dict[str, Any]:
        """Plain values, for ``from_json``."""
        return {"left": self.left, "top": self.top, **self.coded}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> PlacedMask:
        """What ``as_json`` stored."""
        return cls(stored["left"], stored["top"], {key: stored[key] for key in ("size", "counts")})


def _encode(part: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    coded = coco_mask.encode(np.asfortranarray(part.astype(np.uint8)))
    return {"size": list(coded["size"]), "counts": coded["counts"].decode()}
