"""Whether tiles and the whole image say the same."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import numpy as np
import torch

from ..allocator import give_back
from ..memory import PeakMeter, available_gib, is_out_of_memory, limited
from ..training.prediction import Predictor
from .finding import detections_of
from .joining import SAME, Detections, ious


def peak_text(peak_bytes: int | None) -> str:
    """What a line says of peak memory; nothing where it is not known."""
    return "" if peak_bytes is None else f", peak memory {peak_bytes / 2**30:.2f} GiB"


@dataclass
class Agreement:
    """A whole image beside its tiles.

    Attributes:
        seconds, peak_bytes: what the whole image took; None where it did not fit.
        pixels: share of the pixels with the same class; None for a detector.
        counts: boxes of the whole image and of the tiles; None for a segmentor.
        matched: boxes that both have (same class, IoU 0.5).
    """

    seconds: float | None = None
    peak_bytes: int | None = None
    pixels: float | None = None
    counts: tuple[int, int] | None = None
    matched: int = 0

    def __str__(self) -> str:
        if self.seconds is None:
            return "does not fit into this machine's memory"
        took = f"{self.seconds:.1f} s{peak_text(self.peak_bytes)}"
        if self.pixels is not None:
            return f"{took}; {self.pixels:.2%} of the pixels are equal"
        if self.counts is None:
            return took
        of_whole, of_tiles = (f"{self.matched / n:.1%}" if n else "none" for n in self.counts)
        return (
            f"{took}; {of_whole} of its {self.counts[0]} boxes are in the tiles', and {of_tiles} of the "
            f"tiles' {self.counts[1]} in its"
        )


def compare_with_whole(
    predictor: Predictor, pixels: np.ndarray, found: Detections | np.ndarray, score_thr: float
) -> Agreement:
    """Predict an image ``(H, W, 3)`` uint8 BGR at once, and compare with what the tiles found.

    Args:
        predictor: what predicted the tiles.
        pixels: the image.
        found: the tiles' detections, or their label map ``(H, W)``.
        score_thr: detections below it do not count.
    """
    on_gpu = predictor.device.type == "cuda"
    give_back()
    meter, started = PeakMeter(predictor.device), time.perf_counter()
    try:
        with contextlib.nullcontext() if on_gpu else limited(available_gib()):
            sample = predictor.predict(pixels)
    except Exception as error:  # torch, numpy and OpenCV have their own
        if not is_out_of_memory(error):
            raise
        return Agreement()
    finally:
        if on_gpu:
            torch.cuda.empty_cache()
    agreement = Agreement(time.perf_counter() - started, meter.peak())
    if isinstance(found, np.ndarray):
        labels = sample.pred_sem_seg.data.numpy()[0]
        agreement.pixels = float(np.mean([np.mean(a == b) for a, b in zip(labels, found)]))
        return agreement
    whole = detections_of(sample, score_thr)
    agreement.counts, agreement.matched = (len(whole), len(found)), _matched(whole, found)
    return agreement


def _matched(whole: Detections, tiles: Detections) -> int:
    """How many boxes of two lists pair off, the best pairs first."""
    overlap = ious(whole.boxes, tiles.boxes) * (whole.labels[:, None] == tiles.labels[None])
    pairs = 0
    while overlap.size and overlap.max() >= SAME:
        a, b = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[a], overlap[:, b] = 0, 0
        pairs += 1
    return pairs
