"""Predictions drawn over their images, with OpenCV."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from .preparing import Pixels

Colour = tuple[int, int, int]
_FONT = cv2.FONT_HERSHEY_SIMPLEX
# A segment's name is written where the segment has at least this share of the picture.
_NAMED_SHARE = 0.005


def palette(count: int) -> tuple[Colour, ...]:
    """Colours (R, G, B) that differ from their neighbours; class ``i`` has one for every ``count``."""
    # Steps of the golden ratio never come back to a hue.
    return tuple(
        (round(255 * red), round(255 * green), round(255 * blue))
        for red, green, blue in (
            colorsys.hsv_to_rgb(0.03 + 0.618034 * i, (0.9, 0.6)[i // 2 % 2], (1.0, 0.85)[i % 2])
            for i in range(count)
        )
    )


def _unit(pixels: Pixels) -> float:
    """The size of letters, in those of a picture whose longer side has 1000 pixels."""
    return float(np.clip(max(pixels.shape[:2]) / 1000, 0.55, 4))


class _Tag:
    """Text on a ground of a colour (B, G, R); letters of ``unit`` size."""

    def __init__(self, text: str, colour: Sequence[int], unit: float) -> None:
        self.text, self.colour, self.scale = text, colour, 0.6 * unit
        self.thickness = max(1, round(1.6 * unit))
        (width, self.height), below = cv2.getTextSize(text, _FONT, self.scale, self.thickness)
        self.margin = max(2, round(4 * unit))
        # Width and height.
        self.size = width + 2 * self.margin, self.height + below + 2 * self.margin

    def within(self, canvas: Pixels, left: int, top: int) -> tuple[int, int]:
        """The corner, moved so that the tag lies within the picture."""
        return (
            max(0, min(left, canvas.shape[1] - self.size[0])),
            max(0, min(top, canvas.shape[0] - self.size[1])),
        )

    def write(self, canvas: Pixels, left: int, top: int) -> None:
        """Draw the tag with its corner there, or where it is within the picture."""
        left, top = self.within(canvas, left, top)
        cv2.rectangle(canvas, (left, top), (left + self.size[0], top + self.size[1]), self.colour, cv2.FILLED)
        blue, green, red = self.colour
        dark_on_light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
        ink = (0, 0, 0) if dark_on_light else (255, 255, 255)
        place = left + self.margin, top + self.margin + self.height
        cv2.putText(canvas, self.text, place, _FONT, self.scale, ink, self.thickness, cv2.LINE_AA)


def _free_place(
    canvas: Pixels, tag: _Tag, box: Sequence[int], taken: list[tuple[int, int, int, int]]
) -> tuple[int, int]:
    """A corner for a box's tag: above the box, else within, else below, where no other tag lies already."""
    x1, y1, _, y2 = box
    width, height = tag.size
    places = [tag.within(canvas, x1, top) for top in (y1 - height, y1, y2 - height, y2)]

    def is_free(place: tuple[int, int]) -> bool:
        x, y = place
        return not any(
            x < right and left < x + width and y < low and high < y + height
            for left, high, right, low in taken
        )

    x, y = next(filter(is_free, places), places[0])
    taken.append((x, y, x + width, y + height))
    return x, y


def draw_boxes(pixels: Pixels, found: Sequence[Mapping[str, Any]], colours: Mapping[str, Colour]) -> Pixels:
    """Boxes with class and score.

    Args:
        pixels: ``(H, W, 3)`` uint8 BGR.
        found: each with ``class``, ``score`` and ``bbox``, best first.
        colours: R, G, B of each class.

    Returns:
        A new picture of the same size.
    """
    canvas, unit = pixels.copy(), _unit(pixels)
    taken: list[tuple[int, int, int, int]] = []
    tags = []
    for entry in found:
        box = [round(side) for side in entry["bbox"]]
        tag = _Tag(f"{entry['class']} {entry['score']:.2f}", colours[entry["class"]][::-1], unit)
        tags.append((tag, box, _free_place(canvas, tag, box, taken)))
    # The best box lies on top, and names lie on all boxes.
    for tag, (x1, y1, x2, y2), _ in reversed(tags):
        cv2.rectangle(canvas, (x1, y1), (x2, y2), tag.colour, max(2, round(3 * unit)))
    for tag, _, place in reversed(tags):
        tag.write(canvas, *place)
    return canvas


def draw_labels(
    pixels: Pixels, labels: npt.NDArray[Any], classes: Sequence[str], colours: Sequence[Colour]
) -> Pixels:
    """A label map over its image, and each large class's name on its largest segment.

    Args:
        pixels: ``(H, W, 3)`` uint8 BGR.
        labels: ``(H, W)`` class numbers.
        classes: their names.
        colours: their R, G, B.

    Returns:
        A new picture of the same size.
    """
    table = np.array([colour[::-1] for colour in colours], np.uint8)
    canvas = cv2.addWeighted(pixels, 0.5, table[labels], 0.5, 0)
    unit = _unit(pixels)
    # Where a name goes is found on a small map.
    step = max(1, max(labels.shape) // 512)
    small = labels[::step, ::step]
    numbers, counts = np.unique(small, return_counts=True)
    for number in numbers[counts >= _NAMED_SHARE * small.size].tolist():
        _, pieces, statistics, _ = cv2.connectedComponentsWithStats((small == number).astype(np.uint8))
        largest = 1 + int(statistics[1:, cv2.CC_STAT_AREA].argmax())
        piece = np.pad((pieces == largest).astype(np.uint8), 1)
        # The place that is farthest from the segment's border.
        depth = cv2.distanceTransform(piece, cv2.DIST_L2, 3)
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        x, y = (int(column) - 1) * step, (int(row) - 1) * step
        tag = _Tag(classes[number], table[number].tolist(), unit)
        tag.write(canvas, x - tag.size[0] // 2, y - tag.size[1] // 2)
    return canvas


def draw_scores(pixels: Pixels, found: Sequence[Mapping[str, Any]]) -> Pixels:
    """The best classes with their scores, line by line in the upper left corner.

    Args:
        pixels: ``(H, W, 3)`` uint8 BGR.
        found: each with ``class`` and ``score``, best first.

    Returns:
        A new picture of the same size.
    """
    canvas, unit = pixels.copy(), _unit(pixels)
    # Narrow pictures get smaller letters: a name is no use if it is cut off.
    texts = [f"{entry['class']} {entry['score']:.2f}" for entry in found]
    widest = max((_Tag(text, (0, 0, 0), unit).size[0] for text in texts), default=1)
    unit *= min(1.0, 0.95 * canvas.shape[1] / widest)
    top = 0
    for text in texts:
        tag = _Tag(text, (40, 40, 40), unit)
        tag.write(canvas, 0, top)
        top += tag.size[1]
    return canvas
