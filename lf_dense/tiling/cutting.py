"""Where an image is cut into tiles, and how much each tile counts where several overlap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from ..presets import STRIDES

# Tiles begin at multiples of it, so that the tokens of a tile lie where those of the whole image would.
UNIT = STRIDES[-1]


class Span(NamedTuple):
    """Pixels ``start`` to ``end`` (not included) along one side of an image."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


class Tile(NamedTuple):
    """A rectangle of an image, and its place in the grid of tiles."""

    row: int
    column: int
    rows: Span
    columns: Span

    @property
    def box(self) -> tuple[int, int, int, int]:
        """``(x1, y1, x2, y2)``."""
        return self.columns.start, self.rows.start, self.columns.end, self.rows.end


def check_tile(size: int, overlap: int) -> None:
    """Make sure that tiles of a size can overlap so far.

    Raises:
        UsageError: the tile is too small, or the overlap is negative or leaves no step.
    """
    if size < 2 * UNIT:
        raise UsageError(f"a tile of {size} pixels is too small: --tile has to be at least {2 * UNIT}.")
    most = (size // UNIT - 1) * UNIT
    if not 0 <= overlap <= most:
        raise UsageError(
            f"an overlap of {overlap} pixels does not fit tiles of {size}: --overlap has to be from 0 to "
            f"{most} for them."
        )


def cut_side(length: int, size: int, overlap: int) -> list[Span]:
    """Cut one side into as few spans as there can be, of one length; the last ends with the side.

    Args:
        length: pixels of the side.
        size: the most pixels of a span.
        overlap: the least pixels that neighbours share; it is rounded up to a multiple of ``UNIT``.
    """
    if length <= size:
        return [Span(0, length)]
    whole, most, shared = -(-length // UNIT), size // UNIT, -(-overlap // UNIT)
    step = most - shared
    count = -(-(whole - most) // step) + 1
    units = min(most, -(-(whole + (count - 1) * shared) // count))
    starts = [index * (whole - units) // (count - 1) * UNIT for index in range(count)]
    return [Span(start, min(start + units * UNIT, length)) for start in starts]


def weights_of(spans: list[Span]) -> list[np.ndarray]:
    """What each span counts at each of its pixels: float32, rising over what it shares; their sum is 1."""
    length = spans[-1].end
    raised, total = [], np.zeros(length)
    for index, span in enumerate(spans):
        place = np.arange(span.length) + 0.5
        left = spans[index - 1].end - span.start if index else 0
        right = span.end - spans[index + 1].start if index + 1 < len(spans) else 0
        rising = np.minimum(1, place / left) if left > 0 else np.ones(span.length)
        falling = np.minimum(1, place[::-1] / right) if right > 0 else np.ones(span.length)
        raised.append(np.minimum(rising, falling))
        total[span.start : span.end] += raised[-1]
    return [
        (weights / total[span.start : span.end]).astype(np.float32) for weights, span in zip(raised, spans)
    ]


@dataclass(frozen=True)
class Tiling:
    """An image's tiles, row by row.

    Attributes:
        rows, columns: the spans along the height and the width.
    """

    rows: list[Span]
    columns: list[Span]

    @classmethod
    def of(cls, height: int, width: int, size: int, overlap: int) -> Tiling:
        """Cut an image of ``(height, width)`` pixels into tiles of at most ``size`` x ``size``."""
        return cls(cut_side(height, size, overlap), cut_side(width, size, overlap))

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.rows[-1].end, self.columns[-1].end

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def __iter__(self) -> Iterator[Tile]:
        for row, rows in enumerate(self.rows):
            for column, columns in enumerate(self.columns):
                yield Tile(row, column, rows, columns)
