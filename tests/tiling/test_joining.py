"""Detections of tiles: each object once, whatever seams it lies on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lf_dense.tiling.cutting import Tiling
from lf_dense.tiling.finding import detections_of
from lf_dense.tiling.joining import Detections, ious, join
from lf_dense.tiling.masks import PlacedMask


def detect(oracle, pixels, size, overlap):
    """What the tiles find, put together."""
    tiling = Tiling.of(*pixels.shape[:2], size, overlap)
    found = []
    for tile in tiling:
        part = pixels[tile.rows.start : tile.rows.end, tile.columns.start : tile.columns.end]
        found.append((tile, detections_of(oracle.predict(part), 0.5, tile)))
    return join(found, tiling.shape)


def as_objects(detections):
    boxes = detections.boxes.astype(int).tolist()
    return sorted((int(label), *box) for label, box in zip(detections.labels, boxes))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("size", "overlap"), [(128, 96), (160, 64), (256, 128)])
def test_objects_smaller_than_the_overlap_are_found_exactly(oracle, make_scene, seed, size, overlap):
    pixels, objects = make_scene(517, 643, seed, sizes=(4, overlap - 20), count=90)
    joined = detect(oracle("mmdet"), pixels, size, overlap)
    assert as_objects(joined.detections) == objects
    assert joined.larger == 0


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("size", "overlap"), [(128, 32), (160, 64), (192, 0)])
def test_objects_larger_than_overlap_or_tile_are_put_together(oracle, make_scene, seed, size, overlap):
    pixels, objects = make_scene(700, 811, seed, sizes=(60, 300), count=40)
    joined = detect(oracle("mmdet"), pixels, size, overlap)
    found = as_objects(joined.detections)
    if overlap:
        assert found == objects
        larger = [o for o in objects if o[3] - o[1] > size or o[4] - o[2] > size]
        assert joined.larger >= len(larger)
    else:
        # Without a common pixel nobody can tell that two parts are one object: each stays, none is lost.
        assert len(found) >= len(objects)


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_those_of_the_whole_image(oracle, make_scene, seed):
    from pycocotools import mask as coco_mask

    pixels, objects = make_scene(400, 500, seed, sizes=(20, 150), count=30)
    joined = detect(oracle("mmdet", masks=True), pixels, 128, 32)
    assert as_objects(joined.detections) == objects
    for mask, (label, x1, y1, x2, y2) in zip(
        joined.detections.masks,
        [
            (int(label), *box)
            for label, box in zip(joined.detections.labels, joined.detections.boxes.astype(int))
        ],
    ):
        whole = np.zeros((400, 500), np.uint8)
        whole[y1:y2, x1:x2] = pixels[y1:y2, x1:x2, 2 - label] > 0
        expected = coco_mask.encode(np.asfortranarray(whole))
        coded = mask.in_image(400, 500)
        assert coded["counts"] == expected["counts"].decode()


def test_neighbours_of_one_class_in_one_tile_stay_two():
    """The model's own suppression let them be; a second one between tiles must not take them."""
    tiling = Tiling.of(100, 190, 128, 64)
    first, second = list(tiling)
    boxes = np.array([[70.0, 10, 90, 30], [73.0, 10, 93, 30]])
    two = Detections(boxes, np.array([0.9, 0.8]), np.array([1, 1]))
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    assert len(join([(first, two), (second, none)], tiling.shape).detections) == 2


def test_the_higher_score_stays_and_other_classes_are_left_alone():
    tiling = Tiling.of(100, 190, 128, 64)
    first, second = list(tiling)
    box = np.array([[80.0, 20, 100, 40]])
    a = Detections(box, np.array([0.6]), np.array([1]))
    b = Detections(box + 1, np.array([0.8]), np.array([1]))
    joined = join([(first, a), (second, b)], tiling.shape).detections
    assert joined.scores.tolist() == [0.8]
    assert joined.boxes.tolist() == (box + 1).tolist()
    other = Detections(box + 1, np.array([0.8]), np.array([2]))
    assert len(join([(first, a), (second, other)], tiling.shape).detections) == 2


def test_nothing_found_is_nothing_joined():
    tiling = Tiling.of(300, 300, 128, 32)
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    joined = join([(tile, none) for tile in tiling], tiling.shape)
    assert len(joined.detections) == 0
    assert joined.larger == 0


boxes = st.lists(
    st.tuples(*[st.integers(0, 40)] * 4).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])), max_size=6
)


@given(boxes, boxes)
def test_iou_against_counted_pixels(first, second):
    def pixels(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    found = ious(np.array(first, float).reshape(-1, 4), np.array(second, float).reshape(-1, 4))
    assert found.shape == (len(first), len(second))
    for row, a in zip(found, first):
        for value, b in zip(row, second):
            union = len(pixels(a) | pixels(b))
            assert value == pytest.approx(len(pixels(a) & pixels(b)) / union if union else 0)


@pytest.mark.parametrize("seed", range(20))
def test_coded_masks_are_pycocotools_own(seed):
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 60, 2)
    mask = rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98])
    if seed % 3 == 0:
        mask[:, width // 3 :] = True  # runs that go on from one column to the next
    if seed == 1:
        mask[:] = False
    top, left, below, right = rng.integers(0, 9, 4)
    whole = np.zeros((top + height + below, left + width + right), bool)
    whole[top : top + height, left : left + width] = mask
    placed = PlacedMask.from_json(PlacedMask.of(mask, int(left), int(top)).as_json())
    expected = coco_mask.encode(np.asfortranarray(whole.astype(np.uint8)))
    assert placed.in_image(*whole.shape)["counts"] == expected["counts"].decode()
    assert np.array_equal(placed.shrunk(1.0, whole.shape), whole)
