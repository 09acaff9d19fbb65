"""The command that measures landmarks: tables, picture and file."""

from __future__ import annotations

import json

import pytest
from PIL import Image

pytest.importorskip("mmdet")
from lf_dense.benchmark.landmarks import make_tables, mean_of, plot
from lf_dense.frameworks import load_config
from support.driving import call, refusal
from support.random_weights import save_random_weights

DEMO = "configs/retinanet_lf_demo.py"


def row(**changed):
    same = {"size": "64x64", "image": "a", "stage": 1, "tokens": 256, "landmarks": 49, "kernel": "laplacian"}
    same |= {"place": "grid", "side": 7, "output": 0.01, "deviation": 0.2, "mass": 0.03, "seconds": 0.001}
    return {**same, **changed}


def test_means_are_over_the_images():
    rows = [row(), row(image="b", deviation=0.4), row(side=14, deviation=1.0)]
    assert mean_of(rows, "deviation", side=7) == pytest.approx(0.3)
    assert mean_of(rows, "deviation", side=20) is None
    assert mean_of([row(seconds=None)], "seconds") is None


def test_tables_say_what_was_measured():
    rows = [row(), row(image="b", deviation=0.4), row(place="random"), row(kernel="gaussian", seconds=None)]
    text = make_tables(rows)
    assert "| 64x64 | 1 | 30.0 |" in text
    assert "| 64x64 | 1 | 30.0 | 20.0 |" in text
    assert "| 64x64 | 1.00 |" in text
    assert "gaussian, error of the output" in text


def test_every_size_is_a_line_in_every_stage():
    rows = [
        row(stage=s, size=size, side=n, landmarks=n * n)
        for s in (1, 2, 3, 4)
        for size in ("64x64", "96x96")
        for n in (4, 7)
    ]
    figure = plot(rows)
    assert [len(panel.lines) for panel in figure.axes] == [2] * 4
    assert all(list(line.get_xdata()) == [16, 49] for line in figure.axes[0].lines)
    # Panels share one axis, which shows the largest error of all.
    low, high = figure.axes[0].get_ylim()
    assert low == 0
    assert high > max(y for panel in figure.axes for line in panel.lines for y in line.get_ydata())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_random_weights(load_config(DEMO), tmp_path_factory.mktemp("weights") / "demo.pth")


def test_the_command(weights, tmp_path):
    Image.effect_noise((300, 200), 80).convert("RGB").save(tmp_path / "noise.png")
    options = ["--sizes", "64x64", "96x128", "--grids", 2, 7, "--queries", 8, "--out", tmp_path / "out"]
    printed = call("benchmark.py", "landmarks", DEMO, weights, tmp_path / "noise.png", *options)
    assert "| 96x128 | 4 |" in printed
    stored = json.loads((tmp_path / "out" / "landmarks.json").read_text())
    # Two kernels of two grids, and three other places, in four stages and two sizes.
    assert len(stored["results"]) == 2 * 4 * (2 * 2 + 3)
    assert stored["images"] == 1
    assert {r["landmarks"] for r in stored["results"] if r["place"] == "grid"} >= {4, 49}
    assert (tmp_path / "out" / "landmarks.md").read_text() in printed
    assert Image.open(tmp_path / "out" / "landmarks.png").size[0] > 1000


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    line = refusal("benchmark.py", "landmarks", DEMO, tmp_path / "none.pth", tmp_path / "a.png")
    assert "none.pth" in line
