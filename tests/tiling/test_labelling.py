"""Label maps of blended tiles, against the same blend in float64 and in one piece."""

from __future__ import annotations

import numpy as np
import pytest

from lf_dense.tiling.cutting import Tiling, weights_of
from lf_dense.tiling.labelling import LabelMap, finished_rows
from lf_dense.training.prediction import label_dtype


def tile_logits(tiling, classes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.random((classes, t.rows.length, t.columns.length), dtype=np.float32) for t in tiling]


def blend(tiling, logits):
    """The weighted sum over all tiles in one piece, float64."""
    whole = np.zeros((len(logits[0]), *tiling.shape))
    rows, columns = weights_of(tiling.rows), weights_of(tiling.columns)
    for tile, values in zip(tiling, logits):
        weighted = values * rows[tile.row].astype(float)[:, None] * columns[tile.column]
        whole[:, tile.rows.start : tile.rows.end, tile.columns.start : tile.columns.end] += weighted
    return whole


@pytest.mark.parametrize("classes", [1, 3, 7])
@pytest.mark.parametrize(
    ("height", "width", "size", "overlap"),
    [(50, 60, 64, 0), (301, 402, 96, 32), (257, 511, 130, 96), (700, 90, 128, 64), (90, 700, 96, 64)],
)
def test_labels_are_those_of_the_blend_in_one_piece(tmp_path, classes, height, width, size, overlap):
    tiling = Tiling.of(height, width, size, overlap)
    logits = tile_logits(tiling, classes)
    labels = LabelMap(tmp_path, tiling, classes, threshold=0.5)
    for tile, values in zip(tiling, logits):
        labels.add(tile, values)
    whole = blend(tiling, logits)
    # Where two classes are within rounding of each other, either is right.
    ordered = np.sort(whole, axis=0)
    clear = np.abs(whole[0] - 0.5) > 1e-5 if classes == 1 else ordered[-1] - ordered[-2] > 1e-5
    assert clear.mean() > 0.99
    expected = whole[0] > 0.5 if classes == 1 else whole.argmax(0)
    assert np.array_equal(labels.labels[clear], expected[clear])
    assert finished_rows(tmp_path) == len(tiling.rows)


@pytest.mark.parametrize("stopped_at", [0, 1, 5, 6, 7, 11])
def test_a_map_that_was_interrupted_is_the_same(tmp_path, stopped_at):
    tiling = Tiling.of(301, 402, 96, 32)
    logits = tile_logits(tiling, 4)
    tiles = list(zip(tiling, logits))
    whole = LabelMap(tmp_path / "whole", tiling, 4)
    for tile, values in tiles:
        whole.add(tile, values)
    broken = LabelMap(tmp_path / "broken", tiling, 4)
    for tile, values in tiles[:stopped_at]:
        broken.add(tile, values)
    del broken
    resumed = LabelMap(tmp_path / "broken", tiling, 4)
    first = finished_rows(tmp_path / "broken")
    assert first == stopped_at // len(tiling.columns)
    for tile, values in tiles[first * len(tiling.columns) :]:
        resumed.add(tile, values)
    assert np.array_equal(resumed.labels, whole.labels)


def test_more_than_256_classes_need_two_bytes():
    assert label_dtype(256) is np.uint8
    assert label_dtype(257) is np.uint16
