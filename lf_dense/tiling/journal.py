"""What a run has done so far, so that the same command goes on after an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..files import append_json_line, read_json_lines, write_atomically, write_json_lines
from .joining import Detections
from .masks import PlacedMask

FOLDER = "tiles"
_SETTINGS, _IMAGES, _STAMP = "settings.json", "images", "image.json"
_DETECTIONS, _RECORD = "detections.jsonl", "record.json"


def stamp_of(path: Path) -> list[int]:
    """Size and time of a file: another version of it has others."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _discard(folder: Path) -> None:
    """Remove a folder so that a kill on the way leaves no part of it that would be gone on with."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        folder.rename(removed)
        shutil.rmtree(removed)


class RunJournal:
    """The unfinished work of a whole run, below ``out/tiles``.

    Args:
        out: the run's folder.
        settings: what the results depend on, as plain JSON values.

    Raises:
        UsageError: the folder has unfinished work with other settings, or somebody else's files.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.folder = out / FOLDER
        path = self.folder / _SETTINGS
        if not path.exists():
            self._begin()
        settings = json.loads(json.dumps(settings))
        if path.exists():
            before = json.loads(path.read_bytes())
            other = [key for key in settings if before.get(key) != settings[key]]
            if other:
                raise UsageError(
                    f"{self.folder} has unfinished work with another {other[0]} ({before.get(other[0])}, now "
                    f"{settings[other[0]]}): go on with the same, or remove the folder."
                )
        else:
            write_atomically(path, json.dumps(settings, indent=1).encode())

    def _begin(self) -> None:
        """Remove what a kill left of an earlier run, and nothing that is somebody else's."""
        others = [path.name for path in self.folder.glob("*") if path.name != _IMAGES]
        if others:
            raise UsageError(
                f"{self.folder} is where unfinished work is kept, and has other files ({others[0]}): move "
                "them, or give another --out."
            )
        _discard(self.folder)

    def image(self, name: Path, path: Path) -> ImageJournal:
        """The part of one image, by its name in the results and its file."""
        return ImageJournal(self.folder / _IMAGES / name, path)

    def clear(self) -> None:
        """Remove everything, when the results are written."""
        _discard(self.folder)


class ImageJournal:
    """The unfinished work on one image, a folder. What was done for another version of its file goes."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.folder = folder
        stamp = json.dumps(stamp_of(image)).encode()
        path = folder / _STAMP
        if not path.exists() or path.read_bytes() != stamp:
            _discard(folder)
        write_atomically(path, stamp)

    @property
    def record(self) -> dict[str, Any] | None:
        """What is to stand in ``predictions.json``, if the image is finished."""
        path = self.folder / _RECORD
        return json.loads(path.read_bytes()) if path.exists() else None

    def finish(self, record: dict[str, Any]) -> None:
        """Store an image's record, and remove all else."""
        write_atomically(self.folder / _RECORD, json.dumps(record).encode())
        for path in self.folder.iterdir():
            if path.name not in (_RECORD, _STAMP):
                path.unlink()

    def detections(self) -> list[Detections]:
        """What an earlier run found, a list for each tile from the first on."""
        path = self.folder / _DETECTIONS
        if not path.exists():
            return []
        lines = read_json_lines(path)
        # What an interruption cut off is removed, so that the next line begins a line.
        write_json_lines(path, lines)
        return [_from_json(line) for line in lines]

    def add(self, detections: Detections) -> None:
        """Store what was found in the next tile."""
        append_json_line(self.folder / _DETECTIONS, _as_json(detections))


def _as_json(detections: Detections) -> dict[str, Any]:
    masks = detections.masks
    return {
        "boxes": detections.boxes.tolist(),
        "scores": detections.scores.tolist(),
        "labels": detections.labels.tolist(),
        "masks": None if masks is None else [mask.as_json() for mask in masks],
    }


def _from_json(line: dict[str, Any]) -> Detections:
    masks = line["masks"]
    return Detections(
        np.array(line["boxes"], float).reshape(-1, 4),
        np.array(line["scores"], float),
        np.array(line["labels"], np.int64),
        None if masks is None else [PlacedMask.from_json(mask) for mask in masks],
    )
