"""The demo's data: a small, deterministic set of textured shapes, in COCO's format."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator

from ..errors import UsageError, one_line
from ..files import write_atomically

CLASSES = ("disk", "rectangle", "triangle", "ring")
MAX_TILT = math.pi / 9
BACKGROUND = 0
SPLITS = ("train", "val")
# What tells a set of this module from other files: the arguments that it was made by.
MARK = "made_by.json"
MIN_VISIBLE_SHARE = 0.5
MIN_VISIBLE_PIXELS = 60


def _polygon(corners: list[tuple[float, float]], centre: tuple[float, float], size: int) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    points = np.array([(centre[0] + x, centre[1] + y) for x, y in corners])
    cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 1)
    return mask.astype(bool)


def _shape_mask(name: str, rng: Generator, size: int) -> np.ndarray:
    """A boolean mask of one shape; radii spread evenly over the octaves between 7 % and 25 % of the image."""
    radius = size * 0.07 * (0.25 / 0.07) ** rng.random()
    centre = tuple(rng.uniform(0.6 * radius, size - 0.6 * radius, 2))
    turn = rng.uniform(-MAX_TILT, MAX_TILT)
    if name in ("disk", "ring"):
        y, x = np.mgrid[:size, :size]
        distance = np.hypot(x - centre[0], y - centre[1])
        return (distance <= radius) & (distance >= (0.55 * radius if name == "ring" else 0))
    if name == "rectangle":
        aspect = math.atan(rng.uniform(0.5, 1.0))
        angles, lengths = [aspect, math.pi - aspect, math.pi + aspect, -aspect], [radius] * 4
    else:
        angles, lengths = [2 * math.pi * i / 3 - math.pi / 2 for i in range(3)], [radius] * 3
    corners = [
        (length * math.cos(angle + turn), length * math.sin(angle + turn))
        for angle, length in zip(angles, lengths)
    ]
    return _polygon(corners, centre, size)


def _texture(rng: Generator, size: int) -> np.ndarray:
    """An RGB field of two colours mixed by stripes, checks or smooth noise."""
    colours = rng.uniform(20, 235, (2, 3))
    y, x = np.mgrid[:size, :size]
    period, turn = rng.uniform(6, 24), rng.uniform(0, math.pi)
    along = np.sin(2 * math.pi * (x * math.cos(turn) + y * math.sin(turn)) / period)
    kind = rng.integers(3)
    if kind == 0:
        mix = along > 0
    elif kind == 1:
        mix = along * np.sin(2 * math.pi * (y * math.cos(turn) - x * math.sin(turn)) / period) > 0
    else:
        mix = cv2.resize(rng.random((8, 8)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    return colours[0] + (colours[1] - colours[0]) * np.asarray(mix, np.float64)[..., None]


def draw_scene(rng: Generator, size: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]], np.ndarray]:
    """One image, its visible ``(class, mask)`` pairs, and its label map (0 = background).

    The image is ``(size, size, 3)`` uint8 RGB.

    A shape that would leave less than half of another visible is not drawn.
    """
    shapes: list[tuple[int, np.ndarray, int]] = []
    for _ in range(rng.integers(3, 9)):
        label = int(rng.integers(len(CLASSES)))
        mask = _shape_mask(CLASSES[label], rng, size)
        area = int(mask.sum())
        covered = [(old_label, old & ~mask, old_area) for old_label, old, old_area in shapes]
        if area >= MIN_VISIBLE_PIXELS and all(
            old.sum() >= max(MIN_VISIBLE_SHARE * old_area, MIN_VISIBLE_PIXELS) for _, old, old_area in covered
        ):
            shapes = [*covered, (label, mask, area)]
    image = 0.5 * _texture(rng, size) + 60
    labels = np.full((size, size), BACKGROUND, np.uint8)
    for label, mask, _ in shapes:
        image[mask] = _texture(rng, size)[mask]
        labels[mask] = label + 1
    image += rng.normal(0, 6, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), [(label, mask) for label, mask, _ in shapes], labels


def _run_length(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths: columns first, background first."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"counts": [0, *counts] if flat[0] else counts, "size": list(mask.shape)}


def _annotation(identifier: int, image_id: int, label: int, mask: np.ndarray) -> dict[str, Any]:
    ys, xs = np.nonzero(mask)
    left, top = int(xs.min()), int(ys.min())
    return {
        "id": identifier,
        "image_id": image_id,
        "category_id": label + 1,
        "bbox": [left, top, int(xs.max()) - left + 1, int(ys.max()) - top + 1],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": _run_length(mask),
    }


def _write_png(path: Path, image: np.ndarray) -> None:
    if not cv2.imwrite(str(path), image):
        raise OSError(f"could not write {path}")


def _claim(out: Path, arguments: dict[str, Any], overwrite: bool) -> bool:
    """Whether the set has yet to be made in a folder.

    Raises:
        UsageError: the folder is somebody else's, or has another set and may not be overwritten.
    """
    mark = out / MARK
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: name a folder for the set.")
    if not mark.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise UsageError(
                f"{out} holds other files and no set of shapes ({MARK}), so nothing is written there: name a "
                "new folder."
            )
        return True
    try:
        found = json.loads(mark.read_text())
        finished = found.pop("finished", True)
    except (AttributeError, ValueError):
        found, finished = {}, False
    if found == arguments:
        return not finished
    if not overwrite:
        raise UsageError(
            f"{out} has a set of shapes made by other arguments ({one_line(mark.read_text())}): name another "
            "folder, or add --overwrite to replace it."
        )
    return True


def make_shapes(
    out: str | Path,
    train: int = 400,
    val: int = 80,
    size: int = 192,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write the set: images, label maps and annotations.

    Images are PNG files in ``train/`` and ``val/``, maps of class indices are in ``semantic/``, and boxes and
    masks in ``annotations/instances_*.json``.

    The same arguments give the same bytes in every image and annotation; each image depends on the seed and
    its own number alone. Pixel coordinates throughout; boxes are ``[x, y, width, height]`` of the visible
    part.

    Args:
        out: folder, created where needed; a complete set made by the same arguments is left as it is.
        train, val: numbers of images.
        size: height and width in pixels, at least 64.
        seed: any non-negative integer.
        overwrite: replace a set in ``out`` that was made by other arguments.

    Raises:
        UsageError: an argument is out of range, or ``out`` has other files or another set.
    """
    if train < 1 or val < 1 or size < 64 or seed < 0:
        raise UsageError(
            f"a set of {train} + {val} images of {size} pixels, seed {seed}: needs 1 + 1 images, 64 pixels, "
            "seed 0 or more."
        )
    out = Path(out)
    arguments = {"train": train, "val": val, "size": size, "seed": seed, "version": 1}
    if not _claim(out, arguments, overwrite):
        return out
    # A set that is interrupted from here on is known as one, and made again.
    write_atomically(out / MARK, json.dumps({**arguments, "finished": False}).encode())
    for split in SPLITS:
        for folder in (out / split, out / "semantic" / split):
            for old in folder.glob(6 * "[0-9]" + ".png"):
                old.unlink()
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for split_number, (split, count) in enumerate(zip(SPLITS, (train, val))):
        for folder in (out / split, out / "semantic" / split):
            folder.mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id in range(1, count + 1):
            image, instances, labels = draw_scene(np.random.default_rng([seed, split_number, image_id]), size)
            name = f"{image_id:06d}.png"
            _write_png(out / split / name, image[..., ::-1])
            _write_png(out / "semantic" / split / name, labels)
            images.append({"id": image_id, "file_name": name, "width": size, "height": size})
            for label, mask in instances:
                annotations.append(_annotation(len(annotations) + 1, image_id, label, mask))
        categories = [
            {"id": index, "name": name, "supercategory": "shape"} for index, name in enumerate(CLASSES, 1)
        ]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_atomically(out / "annotations" / f"instances_{split}.json", json.dumps(content).encode())
    write_atomically(out / MARK, json.dumps(arguments).encode())
    return out
