"""Predictions tile by tile: memory holds the image and one tile, whatever the image's size."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import nn

from ..allocator import give_back
from ..errors import UsageError, reason_of
from ..files import picture_names, write_atomically
from ..memory import PeakMeter
from ..training.prediction import (
    Predictor,
    class_shares,
    detection_record,
    named_images,
    read_image,
    refuse_unreadable,
    save_png,
)
from ..training.quietness import end_bar, progress_bar
from .comparing import Agreement, compare_with_whole, peak_text
from .cutting import Tile, Tiling, check_tile
from .drawing import SHOWN, draw_detections, draw_labels
from .finding import detections_of
from .joining import Detections, Joined, join
from .journal import FOLDER, ImageJournal, RunJournal, stamp_of
from .labelling import LabelMap, finished_rows

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.structures import BaseDataElement


class TileOptions(NamedTuple):
    """How an image is cut.

    Attributes:
        size: the most pixels of a tile's side, in the image.
        overlap: the least pixels that neighbours share.
        whole: also predict each image as a whole, and compare.
    """

    size: int
    overlap: int
    whole: bool = False


def what_predicts(config: Config, checkpoint: str, scale: float) -> dict[str, Any]:
    """What results depend on beside the tiles, for ``predict_tiled``'s ``about``."""
    digest = hashlib.sha256(config.pretty_text.encode()).hexdigest()[:12]
    stamp = stamp_of(Path(checkpoint)) if Path(checkpoint).is_file() else []
    return {"config": digest, "checkpoint": [checkpoint, *stamp], "scale": scale}


def tile_options(
    size: int | None, overlap: int | None, scale: float = 1.0, whole: bool = False
) -> TileOptions | None:
    """What a command line asks for; None where no tiles are.

    Raises:
        UsageError: an option needs tiles, or size and overlap do not fit.
    """
    if size is None:
        given = {"--overlap": overlap is not None, "--scale": scale != 1, "--whole": whole}
        for option in (name for name, there in given.items() if there):
            raise UsageError(f"{option} is for predictions in tiles: give --tile SIZE too.")
        return None
    options = TileOptions(size, size // 4 if overlap is None else overlap, whole)
    check_tile(options.size, options.overlap)
    return options


@dataclass
class ImageReport:
    """What the work on one image took.

    Attributes:
        name: the image's path relative to the source.
        height, width: of the image, in pixels.
        tiles: how many there were.
        seconds: for the tiles and putting them together; of the last run alone, if there were several.
        peak_bytes: the most memory that the process held; None where the system does not say.
        detections: how many there are; None for a segmentor.
        larger: objects that reach across a whole tile.
        whole: how the whole image compares, where that was asked for.
    """

    name: str
    height: int
    width: int
    tiles: int
    seconds: float
    peak_bytes: int | None
    detections: int | None
    larger: int
    whole: Agreement | None

    def lines(self, size: int) -> list[str]:
        """The report in words."""
        took = f"{self.seconds:.1f} s{peak_text(self.peak_bytes)}"
        said = [f"{self.name}: {self.width} x {self.height} pixels, {self.tiles} tiles, {took}"]
        if self.detections is not None:
            said[0] += f"; {self.detections} detections"
        if (self.detections or 0) > SHOWN:
            said[0] += f", of which the picture has the {SHOWN} with the highest scores"
        if self.larger:
            said.append(
                f"{self.name}: detections that reach across a whole tile of {size} pixels: {self.larger}. "
                "The model saw parts of these objects: a larger --tile shows them whole."
            )
        if self.whole is not None:
            said.append(f"{self.name}, whole: {self.whole}")
        return said


@dataclass
class Report:
    """The results of a run: ``predictions.json``, and what each image took."""

    result: Path
    images: list[ImageReport]

    def text(self, options: TileOptions) -> str:
        """The report in words, as the tool prints it."""
        lines = [line for image in self.images for line in image.lines(options.size)]
        return "\n".join([*lines, f"wrote {self.result} and the pictures beside it"])


def predict_tiled(
    predictor: Predictor,
    source: str | Path,
    out: str | Path,
    options: TileOptions,
    score_thr: float = 0.3,
    about: dict[str, Any] | None = None,
) -> Report:
    """Predict an image or a folder in tiles.

    Results are those of ``predict_images``: pictures (at most 2,048 pixels long) in ``out/pictures``, label
    maps in ``out/labels``, everything in ``out/predictions.json``. Unfinished work is in ``out/tiles``, and
    the same call goes on with it.

    Args:
        predictor: a detector or segmentor, of a config that ``at_own_scale`` has changed.
        source: image file or folder.
        out: folder for the results.
        options: size and overlap of the tiles.
        score_thr: detections below it are left out.
        about: what else the results depend on (config, checkpoint), as plain JSON values: unfinished work of
            another is refused.

    Raises:
        UsageError: size and overlap do not fit, no image, some that cannot be read, unfinished work with
            other settings, or a disk that is full; what is finished stays.
    """
    check_tile(options.size, options.overlap)
    out = Path(out)
    images = named_images(source, out)
    settings = {
        "source": str(Path(source).resolve()),
        "tile": options.size,
        "overlap": options.overlap,
        "whole": options.whole,
        "score_thr": score_thr,
        **(about or {}),
    }
    with _full_disk_explained(out):
        journal = RunJournal(out, settings)
        pictures = picture_names(images)
        reports, records, unreadable = [], {}, []
        for name, image in images.items():
            work = _ImageWork(
                predictor,
                image,
                name,
                out / "pictures" / pictures[name],
                out / "labels" / pictures[name],
                options,
                score_thr,
                journal.image(name, image),
            )
            done = work.run()
            if done is None:
                unreadable.append(str(image))
                continue
            records[name.as_posix()] = done["prediction"]
            whole = done["report"].pop("whole")
            reports.append(ImageReport(**done["report"], whole=whole and Agreement(**whole)))
        result = out / "predictions.json"
        content = {"classes": list(predictor.meta["classes"]), "images": records}
        write_atomically(result, json.dumps(content, indent=1).encode())
        journal.clear()
    refuse_unreadable(unreadable, len(images))
    return Report(result, reports)


@contextlib.contextmanager
def _full_disk_explained(out: Path) -> Iterator[None]:
    """Say what a full disk means."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UsageError(
            f"the disk is full ({reason_of(error)}): finished tiles are in {out / FOLDER}, so make room and "
            "give the same command again."
        ) from error


@dataclass
class _ImageWork:
    """One image: tiles, then what they make together. ``picture`` and ``labels`` are files to write."""

    predictor: Predictor
    image: Path
    name: Path
    picture: Path
    labels: Path
    options: TileOptions
    score_thr: float
    journal: ImageJournal

    def run(self) -> dict[str, Any] | None:
        """The image's record: its prediction and its report. None where the file is no image."""
        if (record := self.journal.record) is not None:
            return record
        pixels = read_image(self.image)
        if pixels is None:
            return None
        height, width = pixels.shape[:2]
        tiling = Tiling.of(height, width, self.options.size, self.options.overlap)
        give_back()  # what an image before this one took
        meter, started, larger = PeakMeter(self.predictor.device), time.perf_counter(), 0
        prediction: dict[str, Any] = {"height": height, "width": width}
        found: Detections | np.ndarray
        if self.predictor.scope == "mmdet":
            joined = self._detect(pixels, tiling)
            found, larger = joined.detections, joined.larger
            prediction["predictions"] = [self._entry(found, index, pixels) for index in range(len(found))]
        else:
            found = self._segment(pixels, tiling)
            prediction["classes"] = _shares(found, self.predictor.meta["classes"])
        seconds, peak = time.perf_counter() - started, meter.peak()
        save_png(self.picture, self._drawn(pixels, found))
        if isinstance(found, np.ndarray):
            save_png(self.labels, found)
        whole = None
        if self.options.whole:
            whole = compare_with_whole(self.predictor, pixels, found, self.score_thr)
        count = None if isinstance(found, np.ndarray) else len(found)
        name = self.name.as_posix()
        report = ImageReport(name, height, width, len(tiling), seconds, peak, count, larger, whole)
        record = {"prediction": prediction, "report": asdict(report)}
        self.journal.finish(record)
        return record

    def _predicted(self, pixels: np.ndarray, tiles: list[Tile]) -> Iterator[tuple[Tile, BaseDataElement]]:
        """Each tile with its prediction, and a bar."""
        bar = progress_bar(len(tiles)) if len(tiles) > 1 else None
        try:
            for tile in tiles:
                part = pixels[tile.rows.start : tile.rows.end, tile.columns.start : tile.columns.end]
                yield tile, self.predictor.predict(part)
                if bar:
                    bar.update()
        finally:
            end_bar(bar)

    def _detect(self, pixels: np.ndarray, tiling: Tiling) -> Joined:
        tiles = list(tiling)
        found = self.journal.detections()
        for tile, sample in self._predicted(pixels, tiles[len(found) :]):
            found.append(detections_of(sample, self.score_thr, tile))
            self.journal.add(found[-1])
        return join(list(zip(tiles, found)), tiling.shape)

    def _segment(self, pixels: np.ndarray, tiling: Tiling) -> np.ndarray:
        """The label map ``(H, W)``, in a mapped file."""
        first = finished_rows(self.journal.folder) * len(tiling.columns)
        blended = LabelMap(self.journal.folder, tiling, *self._output())
        for tile, sample in self._predicted(pixels, list(tiling)[first:]):
            blended.add(tile, sample.seg_logits.data.float().numpy())
        return blended.labels

    def _output(self) -> tuple[int, float]:
        """Channels of a segmentor's logits, and the threshold where there is one channel."""
        model: Any = self.predictor.model
        # A cascade's output is its last head's.
        head = model.decode_head[-1] if isinstance(model.decode_head, nn.ModuleList) else model.decode_head
        threshold = getattr(head, "threshold", None)
        return int(model.out_channels), 0.5 if threshold is None else float(threshold)

    def _entry(self, found: Detections, index: int, pixels: np.ndarray) -> dict[str, Any]:
        """A detection as ``Predictor.record`` has it."""
        name = self.predictor.meta["classes"][int(found.labels[index])]
        mask = None if found.masks is None else found.masks[index].in_image(*pixels.shape[:2])
        return detection_record(name, float(found.scores[index]), found.boxes[index].tolist(), mask)

    def _drawn(self, pixels: np.ndarray, found: Detections | np.ndarray) -> np.ndarray:
        subject = self.predictor, self.image.name, pixels
        if isinstance(found, np.ndarray):
            return draw_labels(*subject, found)
        return draw_detections(*subject, found)


def _shares(labels: np.ndarray, classes: list[str]) -> dict[str, float]:
    """Each class's share of the pixels, counted in bands of rows."""
    counts = np.zeros(np.iinfo(labels.dtype).max + 1, np.int64)
    for first in range(0, len(labels), 1024):
        counts += np.bincount(labels[first : first + 1024].ravel(), minlength=len(counts))
    return class_shares(counts, classes)
