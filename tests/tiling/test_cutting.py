"""Tiles cover an image, overlap as far as was asked, and count as one where they overlap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lf_dense.errors import UsageError
from lf_dense.tiling.cutting import UNIT, Tiling, check_tile, cut_side, weights_of

sizes = st.integers(2 * UNIT, 1500)


@given(st.data(), sizes, st.integers(1, 9000))
def test_spans_cover_a_side_and_share_what_was_asked(data, size, length):
    overlap = data.draw(st.integers(0, (size // UNIT - 1) * UNIT))
    spans = cut_side(length, size, overlap)
    assert spans[0].start == 0
    assert spans[-1].end == length
    assert all(0 < span.length <= size for span in spans)
    assert all(span.start % UNIT == 0 for span in spans)
    for before, after in zip(spans, spans[1:]):
        assert before.start < after.start
        assert before.end < after.end
        assert before.end - after.start >= overlap
    # Fewer could not do it.
    if len(spans) > 1:
        most, shared = size // UNIT * UNIT, -(-overlap // UNIT) * UNIT
        assert (len(spans) - 1) * most - (len(spans) - 2) * shared < -(-length // UNIT) * UNIT


@given(st.data(), sizes, st.integers(1, 3000))
def test_weights_are_positive_and_add_up_to_one(data, size, length):
    overlap = data.draw(st.integers(0, (size // UNIT - 1) * UNIT))
    spans = cut_side(length, size, overlap)
    total = np.zeros(length)
    for span, weights in zip(spans, weights_of(spans)):
        assert weights.dtype == np.float32
        assert weights.shape == (span.length,)
        assert (weights > 0).all()
        total[span.start : span.end] += weights
    assert total == pytest.approx(np.ones(length), abs=1e-6)


def test_a_tile_counts_less_towards_its_inner_sides():
    first, second = weights_of(cut_side(160, 96, 32))
    assert (np.diff(first) <= 0).all()
    assert (np.diff(second) >= 0).all()
    assert first[0] == second[-1] == 1


def test_tiles_come_row_by_row():
    tiling = Tiling.of(100, 300, 128, 32)
    assert tiling.shape == (100, 300)
    assert len(tiling) == len(list(tiling)) == 3
    assert [(tile.row, tile.column) for tile in tiling] == [(0, 0), (0, 1), (0, 2)]
    assert [tile.box[1::2] for tile in tiling] == [(0, 100)] * 3


@pytest.mark.parametrize(
    ("size", "overlap", "what"),
    [
        (63, 0, "a tile of 63 pixels is too small: --tile has to be at least 64"),
        (512, 600, "an overlap of 600 pixels does not fit tiles of 512: --overlap has to be from 0 to 480"),
        (512, 481, "--overlap has to be from 0 to 480"),
        (512, -1, "an overlap of -1 pixels"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, overlap, what):
    with pytest.raises(UsageError, match=what):
        check_tile(size, overlap)


def test_the_largest_overlap_is_taken():
    check_tile(512, 480)
