"""A label map put together of tiles' logits, on the disk: memory holds a tile's logits and no more."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path

import numpy as np

from ..files import write_atomically
from ..training.prediction import label_dtype
from .cutting import Tile, Tiling, weights_of

PROGRESS = "rows.json"


class LabelMap:
    """Blends the logits of overlapping tiles, and keeps the best class of each pixel.

    Tiles come row by row. What a row shares with the next is kept on the disk (the seam), what a tile shares
    with its right neighbour in memory. The files of finished rows stay after a kill, and a row that was not
    finished is begun again.

    Args:
        folder: for the files; those of an earlier run with the same tiles are gone on with.
        tiling: the image's tiles.
        num_classes: channels of the logits; 1 for the probability of a single class.
        threshold: from which probability on a pixel is of the single class.
    """

    def __init__(self, folder: Path, tiling: Tiling, num_classes: int, threshold: float = 0.5) -> None:
        self.tiling, self.num_classes, self.threshold = tiling, num_classes, threshold
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._row_weights, self._column_weights = weights_of(tiling.rows), weights_of(tiling.columns)
        height, width = tiling.shape
        shared = max([a.end - b.start for a, b in zip(tiling.rows, tiling.rows[1:])], default=0)
        dtype = label_dtype(num_classes)
        self.labels = _mapped(folder / "labels.raw", (height, width), dtype)
        # A row reads one seam and writes the other, so that it can be begun again.
        seam = (num_classes, max(shared, 1), width)
        self._seams = [_mapped(folder / f"seam_{index}.raw", seam, np.float32) for index in range(2)]
        self._carried: np.ndarray | None = None

    def add(self, tile: Tile, logits: np.ndarray) -> None:
        """Blend a tile's logits in, ``(classes, h, w)`` float32.

        Raises:
            OSError: the disk is full, or fails otherwise.
        """
        row, column = tile.row, tile.column
        weighted = logits * self._row_weights[row][:, None]
        weighted *= self._column_weights[column]
        if self._carried is not None and column:
            weighted[:, :, : self._carried.shape[2]] += self._carried
        rows, columns = self.tiling.rows, self.tiling.columns
        # Up to here nothing is added any more by the tiles to come: on the right, and then below.
        done_columns = (
            columns[column + 1].start if column + 1 < len(columns) else tile.columns.end
        ) - tile.columns.start
        done_rows = (rows[row + 1].start if row + 1 < len(rows) else tile.rows.end) - tile.rows.start
        self._carried = weighted[:, :, done_columns:].copy() if column + 1 < len(columns) else None
        finished = weighted[:, :, :done_columns]
        place = slice(tile.columns.start, tile.columns.start + done_columns)
        if row:
            shared = rows[row - 1].end - tile.rows.start
            finished[:, :shared] += self._seams[(row - 1) % 2][:, :shared, place]
        if row + 1 < len(rows):
            left_over = tile.rows.length - done_rows
            self._seams[row % 2][:, :left_over, place] = finished[:, done_rows:]
        self.labels[tile.rows.start : tile.rows.start + done_rows, place] = self._best(
            finished[:, :done_rows]
        )
        _let_go(self.labels, *self._seams)
        if column + 1 == len(columns):
            self._finish_row(row)

    def _best(self, logits: np.ndarray) -> np.ndarray:
        return logits[0] > self.threshold if self.num_classes == 1 else logits.argmax(0)

    def _finish_row(self, row: int) -> None:
        for array in (self.labels, self._seams[row % 2]):
            array.flush()
        write_atomically(self._folder / PROGRESS, json.dumps({"rows": row + 1}).encode())


def finished_rows(folder: Path) -> int:
    """How many rows of tiles an earlier run has finished."""
    path = folder / PROGRESS
    return int(json.loads(path.read_bytes())["rows"]) if path.exists() else 0


def _let_go(*arrays: np.memmap) -> None:
    """Let the system have the pages of mapped files: their content stays in the files."""
    for array in arrays:
        if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            array.base.madvise(mmap.MADV_DONTNEED)


def _reserve(path: Path, size: int) -> None:
    """Give a file its size and its place on the disk: a mapped file that finds none later kills the process.

    Raises:
        OSError: there is no place.
    """
    if path.exists() and path.stat().st_size == size:
        return
    with path.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, size)
        else:
            stream.truncate(size)


def _mapped(path: Path, shape: tuple[int, ...], dtype: type) -> np.memmap:
    _reserve(path, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype, mode="r+", shape=shape)
