"""Pictures: what is drawn lies where it belongs, in its colour, and within the picture."""

import numpy as np
import pytest

pytest.importorskip("cv2")
from lf_dense.export import drawing


@pytest.fixture
def gray():
    return np.full((200, 300, 3), 90, np.uint8)


def test_colours_differ_and_stay():
    colours = drawing.palette(150)
    assert all(0 <= part <= 255 for colour in colours for part in colour)
    assert drawing.palette(3) == colours[:3]
    assert len(set(colours)) == 150
    near = [np.abs(np.subtract(a, b)).max() for a, b in zip(colours, colours[1:])]
    assert min(near) > 60


def test_boxes_have_their_class_s_colour(gray):
    found = [{"class": "cat", "score": 0.87, "bbox": [50.2, 60.0, 150.0, 160.0]}]
    canvas = drawing.draw_boxes(gray, found, {"cat": (255, 0, 10)})
    assert (gray == 90).all()
    assert canvas[110, 50].tolist() == canvas[160, 100].tolist() == [10, 0, 255]
    assert canvas[110, 100].tolist() == [90, 90, 90]
    # The name stands above the box.
    assert (canvas[45:58, 52:90] != 90).any()


def test_a_name_stays_within_the_picture(gray):
    corners = ([0, 0, 20, 20], [280, 0, 300, 20], [290, 190, 300, 200], [-40, 150, 20, 300])
    for box in corners:
        found = [{"class": "a long name of a class", "score": 1.0, "bbox": box}]
        canvas = drawing.draw_boxes(gray, found, {"a long name of a class": (250, 250, 250)})
        # A ground of light colour and the dark letters on it.
        assert (canvas == 250).all(axis=2).sum() > 800
        assert (canvas < 80).all(axis=2).sum() > 40


def test_names_make_way_for_each_other(gray):
    colours = {"cat": (255, 0, 0), "dog": (0, 0, 255)}
    boxes = ([50, 60, 150, 160], [52, 61, 152, 162])
    found = [{"class": name, "score": 0.5, "bbox": box} for name, box in zip(colours, boxes)]
    canvas = drawing.draw_boxes(gray, found, colours)
    alone = [drawing.draw_boxes(gray, [entry], colours) for entry in found]
    # Both grounds are as large as alone but for the lines of the other box.
    for colour, picture in zip(colours.values(), alone):
        here, there = ((image == colour[::-1]).all(axis=2).sum() for image in (canvas, picture))
        assert here > 0.6 * there


def test_a_label_map_shines_through(gray):
    labels = np.zeros((200, 300), np.uint8)
    labels[:, 200:] = 1
    canvas = drawing.draw_labels(gray, labels, ("road", "sky"), ((255, 0, 0), (0, 0, 255)))
    assert canvas[5, 5].tolist() == [45, 45, 172]
    assert canvas[5, 295].tolist() == [172, 45, 45]
    # Each name lies within its segment.
    changed = (canvas != canvas[5, 5]).any(axis=2) & (canvas != canvas[5, 295]).any(axis=2)
    assert changed[:, :200].any()
    assert changed[:, 200:].any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (700, 2), (1, 3000)])
def test_narrow_pictures_are_drawn_on(shape):
    pixels = np.zeros((*shape, 3), np.uint8)
    found = [{"class": "cat", "score": 0.5, "bbox": [0, 0, shape[1], shape[0]]}]
    assert drawing.draw_boxes(pixels, found, {"cat": (9, 9, 9)}).shape == pixels.shape
    assert drawing.draw_scores(pixels, found).shape == pixels.shape
    assert drawing.draw_labels(pixels, np.zeros(shape, np.uint16), ("a",), ((1, 2, 3),)).shape == pixels.shape


def test_scores_are_written_line_by_line(gray):
    found = [{"class": name, "score": 0.2} for name in "abcde"]
    canvas = drawing.draw_scores(gray, found)
    rows = np.flatnonzero((canvas != 90).any(axis=(1, 2)))
    assert len(rows) > 50
    assert drawing.draw_scores(gray, []).tolist() == gray.tolist()
    # A name too long for the picture gets small letters.
    wide = drawing.draw_scores(gray, [{"class": "w" * 60, "score": 0.5}])
    ink = np.flatnonzero((wide > 100).all(axis=2).any(axis=0))
    assert 150 < ink.max() < 300
