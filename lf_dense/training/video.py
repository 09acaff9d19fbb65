"""Predictions for a video or a camera, frame by frame: memory does not grow with their number."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import UsageError
from .prediction import Predictor
from .quietness import end_bar, progress_bar

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
CAMERA = "camera:"
DEFAULT_FPS = 25.0
# A Matroska file can be played however its writing ended; an MP4 file that was not closed cannot.
PICTURES = "pictures.mkv"
RECORDS = "predictions.jsonl"
CODEC = "mp4v"
# Some containers state no number of frames, and FFmpeg then estimates it.
_ESTIMATE = 0.02


def is_video(source: str) -> bool:
    """Whether a source is a video by its name, a camera (``camera:0``) or a stream's address."""
    named = source.startswith(CAMERA) or "://" in source
    return named or (Path(source).suffix.lower() in VIDEO_SUFFIXES and not Path(source).is_dir())


class Video:
    """An opened video file, camera or stream. Iterating gives its frames, ``(H, W, 3)`` uint8 BGR, once.

    Attributes:
        name: what the user called it.
        live: it is a camera or a stream, and has no end of its own.
        fps: frames a second.
        count: how many frames it says that it has; 0 if it does not say.

    Args:
        source: path, ``camera:NUMBER``, or an address such as ``rtsp://...``.

    Raises:
        UsageError: it is not there, or cannot be opened or decoded.
    """

    def __init__(self, source: str) -> None:
        self.name = source
        self.live = source.startswith(CAMERA) or "://" in source
        if not self.live and not Path(source).is_file():
            raise UsageError(f"{source} is not there: give a video, or {CAMERA}0 for a camera.")
        self._capture = self._opened(source)
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 1 <= fps <= 1000 else DEFAULT_FPS
        self.count = 0 if self.live else max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    @staticmethod
    def _opened(source: str) -> Any:
        if not source.startswith(CAMERA):
            capture = cv2.VideoCapture(source)
            if not capture.isOpened():
                raise UsageError(
                    f"{source} cannot be decoded as a video: it is damaged, or this OpenCV does not know its "
                    "format, so convert it to MP4 with H.264."
                )
            return capture
        number = source.removeprefix(CAMERA)
        if not number.isdecimal():
            raise UsageError(f"{source} names no camera: give {CAMERA}0, {CAMERA}1 and so on.")
        capture = cv2.VideoCapture(int(number))
        if not capture.isOpened():
            raise UsageError(
                f"{source} cannot be opened: there is no such camera, or another program holds it."
            )
        return capture

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            there, pixels = self._capture.read()
            if not there:
                return
            yield pixels

    def lacks(self, read: int) -> bool:
        """Whether a file ended before its last frame, after ``read`` frames."""
        return self.count - read > max(1, _ESTIMATE * self.count)

    def close(self) -> None:
        """Give the file or the camera back."""
        self._capture.release()


class _Pictures:
    """A video that is written picture by picture; the first one's size is its size."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        self._writer: Any = None
        self._size = (0, 0)

    def write(self, picture: np.ndarray) -> None:
        """Add a picture, ``(H, W, 3)`` uint8 BGR.

        Raises:
            UsageError: OpenCV cannot write such a video.
        """
        if self._writer is None:
            self._size = picture.shape[1], picture.shape[0]
            code = cv2.VideoWriter.fourcc(*CODEC)
            self._writer = cv2.VideoWriter(str(self.path), code, self.fps, self._size)
            if not self._writer.isOpened():
                raise UsageError(
                    f"{self.path} cannot be written as a video of {self._size[0]} x {self._size[1]} pixels "
                    f"at {self.fps:g} frames a second: OpenCV needs FFmpeg with the codec {CODEC}, and leave "
                    "to write there."
                )
        # A stream may change its size; a video cannot.
        if (picture.shape[1], picture.shape[0]) != self._size:
            picture = cv2.resize(picture, self._size)
        self._writer.write(picture)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()


@contextlib.contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that the frame at hand is finished; a second one ends at once.

    Only a main thread gets signals: in others nothing sets it.
    """
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def predict_video(predictor: Predictor, video: Video, out: str | Path, score_thr: float = 0.3) -> int:
    """Predict a video's frames and close it.

    The drawn frames go to ``out/pictures.mkv`` at the video's rate and size (FFmpeg drops the last pixel of
    an odd side). Each frame's result is a line of ``out/predictions.jsonl``: ``{"frame", "time", "height",
    "width", ...}``, frames from 0, the time in seconds: since the first frame of a live source, and else at
    the video's rate. Both files are whole after Ctrl-C or SIGTERM, and can be read after a kill.

    Args:
        predictor: the model.
        video: where the frames come from.
        out: folder for the results.
        score_thr: detections below it are neither drawn nor listed.

    Returns:
        How many frames there were.

    Raises:
        UsageError: there is no frame, the drawn video cannot be written, or a file ended before its last
            frame or was interrupted; what was read by then is written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    done = 0
    with contextlib.ExitStack() as stack:
        stack.callback(video.close)
        asked = stack.enter_context(stopping())
        pictures = stack.enter_context(contextlib.closing(_Pictures(out / PICTURES, video.fps)))
        lines = stack.enter_context(open(out / RECORDS, "w", encoding="utf-8"))
        bar = progress_bar(video.count)
        stack.callback(end_bar, bar)
        started = time.monotonic()
        for pixels in video:
            seconds = time.monotonic() - started if video.live else done / video.fps
            sample = predictor.predict(pixels)
            drawn = predictor.picture(video.name, pixels[..., ::-1], sample, score_thr)
            pictures.write(drawn[..., ::-1])
            height, width = pixels.shape[:2]
            record = {"frame": done, "time": round(seconds, 3), "height": height, "width": width}
            lines.write(json.dumps({**record, **predictor.record(sample, score_thr)}) + "\n")
            lines.flush()
            done += 1
            if bar:
                bar.update()
            if asked.is_set():
                break
    _check_end(video, done, out, asked.is_set())
    return done


def _check_end(video: Video, done: int, out: Path, asked: bool) -> None:
    """Refuse to call a video predicted that was not, or not to its end."""
    if not done and not asked:
        os.unlink(out / RECORDS)
        raise UsageError(f"{video.name} has no frame that can be decoded.")
    if not video.live and video.lacks(done):
        why = "was stopped" if asked else "ends, or cannot be decoded further,"
        raise UsageError(
            f"{video.name} {why} after {done} of {video.count} frames; those are predicted, in {out}."
        )
