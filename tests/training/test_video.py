"""Videos and cameras: every frame predicted, files whole however it ends, memory that does not grow."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import weakref

import cv2
import numpy as np
import pytest

pytest.importorskip("mmengine")
from lf_dense.errors import UsageError
from lf_dense.training import video
from lf_dense.training.video import PICTURES, RECORDS, Video, is_video, predict_video
from support.driving import ROOT, environment


class Echo:
    """A predictor that sees nothing and draws nothing."""

    def predict(self, pixels):
        return None

    def picture(self, name, pixels, sample, score_thr):
        return pixels

    def record(self, sample, score_thr):
        return {"predictions": []}


def frame(number, height=64, width=96):
    """A ground that brightens with the number, in red."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 2] = 10 * number
    return pixels


def write_clip(path, count=20, codec="mp4v", draw=frame):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 12.5, (96, 64))
    assert writer.isOpened()
    for number in range(count):
        writer.write(draw(number))
    writer.release()
    return path


def frames_of(path):
    capture = cv2.VideoCapture(str(path))
    while (read := capture.read())[0]:
        yield read[1]


def records_of(out):
    return [json.loads(line) for line in (out / RECORDS).read_text().splitlines()]


@pytest.mark.parametrize(
    ("source", "answer"),
    [("a.MP4", True), ("camera:0", True), ("rtsp://host/x", True), ("a.png", False), ("folder", False)],
)
def test_what_is_a_video(source, answer):
    assert is_video(source) == answer


def test_a_folder_is_no_video(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    assert not is_video(str(tmp_path / "a.mp4"))


def test_every_frame_has_a_picture_and_a_line(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4")
    assert predict_video(Echo(), Video(str(clip)), tmp_path / "out") == 20
    records = records_of(tmp_path / "out")
    assert [record["frame"] for record in records] == list(range(20))
    assert records[5] == {"frame": 5, "time": 0.4, "height": 64, "width": 96, "predictions": []}
    assert Video(str(tmp_path / "out" / PICTURES)).fps == 12.5
    pictures = list(frames_of(tmp_path / "out" / PICTURES))
    assert len(pictures) == 20
    for number, picture in enumerate(pictures):
        assert picture.shape == (64, 96, 3)
        assert picture[..., 2].mean() == pytest.approx(10 * number, abs=8)  # red stays red
        assert picture[..., 0].mean() < 12


def noise(number):
    """A frame that takes many bytes."""
    return np.random.default_rng(number).integers(0, 255, (64, 96, 3), np.uint8)


def test_a_file_that_was_cut_off_is_predicted_as_far_as_it_goes(tmp_path):
    clip = write_clip(tmp_path / "clip.avi", codec="MJPG", draw=noise)
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=r"clip\.avi ends, .* after \d+ of 20 frames; those are predicted"):
        predict_video(Echo(), Video(str(clip)), tmp_path / "out")
    count = len(records_of(tmp_path / "out"))
    assert 0 < count < 20
    assert len(list(frames_of(tmp_path / "out" / PICTURES))) == count


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("gone.mp4", "is not there: give a video"),
        ("text.mp4", "cannot be decoded as a video"),
        ("empty.mp4", "cannot be decoded as a video"),
        ("camera:front", "names no camera: give camera:0"),
        ("camera:97", "cannot be opened: there is no such camera"),
        ("file:///nowhere/x.mp4", "cannot be decoded as a video"),
    ],
)
def test_sources_that_cannot_be_opened(source, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    write_clip(tmp_path / "empty.mp4", count=0)
    with pytest.raises(UsageError, match=reason):
        Video(source)


def test_a_stream_is_read_by_its_address(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", count=3)
    stream = Video(f"file://{clip}")
    assert stream.live
    assert predict_video(Echo(), stream, tmp_path / "out") == 3


def test_a_video_that_cannot_be_written(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "clip.mp4", count=2)
    monkeypatch.setattr(video, "CODEC", "zzzz")
    with pytest.raises(UsageError, match=r"cannot be written as a video of 96 x 64 pixels at 12\.5 frames"):
        predict_video(Echo(), Video(str(clip)), tmp_path / "out")


class Camera:
    """An endless source in the place of OpenCV's; it may end, or have the process interrupted, at a frame."""

    def __init__(self, ends=10**9, interrupt_at=10**9):
        self.ends, self.interrupt_at = ends, interrupt_at
        self.given, self.most_alive, self.released = [], 0, False

    def __call__(self, number):
        assert number == 0
        return self

    def isOpened(self):
        return True

    def get(self, name):
        return {cv2.CAP_PROP_FPS: 0.0, cv2.CAP_PROP_FRAME_COUNT: -1.0}[name]

    def read(self):
        number = len(self.given)
        if number == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)
        if number == self.ends:
            return False, None
        pixels = frame(number % 20)
        self.given.append(weakref.ref(pixels))
        self.most_alive = max(self.most_alive, sum(reference() is not None for reference in self.given))
        return True, pixels

    def release(self):
        self.released = True


def test_ctrl_c_ends_a_camera_with_whole_files(tmp_path, monkeypatch):
    camera = Camera(interrupt_at=50)
    monkeypatch.setattr(cv2, "VideoCapture", camera)
    before = signal.getsignal(signal.SIGINT)
    done = predict_video(Echo(), Video("camera:0"), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert done == 51  # the frame at hand is finished
    assert camera.released
    assert camera.most_alive <= 2  # no frame is kept
    assert len(records_of(tmp_path)) == len(list(frames_of(tmp_path / PICTURES))) == done
    assert Video(str(tmp_path / PICTURES)).fps == video.DEFAULT_FPS


def test_a_second_ctrl_c_ends_at_once():
    with video.stopping() as asked:
        signal.raise_signal(signal.SIGTERM)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_file_that_is_interrupted_says_how_far_it_got(tmp_path, monkeypatch):
    clip = Video(str(write_clip(tmp_path / "clip.mp4")))
    record = Echo.record

    def interrupt(self, sample, score_thr):
        signal.raise_signal(signal.SIGINT)
        return record(self, sample, score_thr)

    monkeypatch.setattr(Echo, "record", interrupt)
    with pytest.raises(UsageError, match="was stopped after 1 of 20 frames"):
        predict_video(Echo(), clip, tmp_path / "out")
    assert len(records_of(tmp_path / "out")) == 1


def test_no_frame_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", Camera(ends=0))
    with pytest.raises(UsageError, match="camera:0 has no frame that can be decoded"):
        predict_video(Echo(), Video("camera:0"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_drawn_video_can_be_read_after_a_kill(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
import numpy as np
from lf_dense.training.video import _Pictures
pictures = _Pictures(Path({str(tmp_path / PICTURES)!r}), 25.0)
for number in range(60):
    pictures.write(np.random.default_rng(number).integers(0, 255, (480, 640, 3), np.uint8))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=environment(), check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert len(list(frames_of(tmp_path / PICTURES))) > 30
