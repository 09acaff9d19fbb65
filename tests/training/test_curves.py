"""Curves of a work dir: what is read from logs, and what is drawn."""

from __future__ import annotations

import json

import pytest

from lf_dense.errors import UsageError
from lf_dense.training import curves
from lf_dense.training.curves import compare_losses, logged_metric, plot_curves, read_curves, read_scalars

pytest.importorskip("matplotlib")
import matplotlib.image


def write_log(work_dir, run, *records, tail=""):
    folder = work_dir / run / "vis_data"
    folder.mkdir(parents=True)
    (folder / "scalars.json").write_text("\n".join(map(json.dumps, records)) + tail)
    return work_dir


def losses(*pairs):
    return [{"iter": step, "loss": loss} for step, loss in pairs]


def test_a_resumed_run_replaces_what_it_did_again(tmp_path):
    write_log(tmp_path, "20260101_000000", *losses((1, 9.0), (2, 8.0), (3, 7.0)), {"mAP": 0.1})
    write_log(tmp_path, "20260102_000000", *losses((3, 6.0), (4, 5.0)), {"mAP": 0.2})
    found, scores = read_curves(tmp_path, "mAP")
    assert found == {1: 9.0, 2: 8.0, 3: 6.0, 4: 5.0}
    assert scores == {3: 0.1, 4: 0.2}


def test_a_line_that_was_cut_off_ends_its_file(tmp_path):
    write_log(tmp_path, "run", *losses((1, 2.0)), tail='\n{"iter": 2, "lo')
    assert read_scalars(tmp_path) == losses((1, 2.0))


def test_folders_without_logs(tmp_path):
    with pytest.raises(UsageError, match="holds no log"):
        read_scalars(tmp_path)
    write_log(tmp_path, "run", {"mAP": 0.5})
    with pytest.raises(UsageError, match="of a training run, not of a test"):
        read_curves(tmp_path, "mAP")


def test_the_metric_of_a_log_is_found(tmp_path):
    write_log(tmp_path / "seg", "run", *losses((1, 2.0)), {"aAcc": 50.0, "mIoU": 9.0, "time": 0.1, "step": 4})
    assert logged_metric(tmp_path / "seg") == "mIoU"
    assert logged_metric(tmp_path / "seg", "aAcc") == "aAcc"
    with pytest.raises(UsageError, match="has no coco/bbox_mAP: it has aAcc, mIoU; name one"):
        logged_metric(tmp_path / "seg", "coco/bbox_mAP")
    write_log(tmp_path / "short", "run", *losses((1, 2.0)), {"step": 1, "time": 0.1})
    assert logged_metric(tmp_path / "short") == ""
    with pytest.raises(UsageError, match="has no mIoU: it has no validation yet, or leave --metric out"):
        logged_metric(tmp_path / "short", "mIoU")


def has_colour(path, colour):
    pixels = matplotlib.image.imread(path)[..., :3]
    return bool((abs(pixels - colour).max(-1) < 0.02).any())


BLUE, ORANGE = (31 / 255, 119 / 255, 180 / 255), (1.0, 127 / 255, 14 / 255)


def test_the_picture_has_a_line_for_each_curve(tmp_path):
    write_log(tmp_path, "run", *losses((1, 2.0), (9, 1.0)))
    alone = plot_curves(tmp_path, tmp_path / "new" / "alone.png", "mAP")
    assert has_colour(alone, BLUE)
    assert not has_colour(alone, ORANGE)
    write_log(tmp_path, "run2", {"mAP": 0.5})
    assert has_colour(plot_curves(tmp_path, tmp_path / "both.png", "mAP"), ORANGE)


def test_one_run_alone_is_read(tmp_path):
    write_log(tmp_path, "run1", *losses((1, 9.0), (2, 8.0)))
    write_log(tmp_path, "run2", *losses((1, 3.0)))
    assert read_curves(tmp_path, run="run2")[0] == {1: 3.0}


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path, monkeypatch):
    write_log(tmp_path, "run", *losses((1, 2.0), (2, 1.0)))
    out = plot_curves(tmp_path, tmp_path / "curves.png", "mAP")
    before = out.read_bytes()

    def tear(figure, stream, **options):
        stream.write(b"half a picture")
        raise OSError("no space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", tear)
    with pytest.raises(OSError, match="no space"):
        plot_curves(tmp_path, out, "mAP")
    assert out.read_bytes() == before


@pytest.mark.parametrize(("score", "highest"), [(0.4, 1), (40.0, 100)])
def test_metrics_are_shares_or_per_cent(score, highest, tmp_path, monkeypatch):
    write_log(tmp_path, "run", *losses((1, 2.0)), {"mIoU": score})
    figures = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, out: figures.append(figure))
    plot_curves(tmp_path, tmp_path / "curves.png", "mIoU")
    assert figures[0].axes[1].get_ylim() == (0, highest)


def test_groups_of_runs_are_compared(tmp_path):
    for name, loss in (("a", 3.0), ("b", 2.0), ("c", 1.0)):
        write_log(tmp_path / name, "run", *losses((1, loss), (2, loss / 2)))
    groups = {"first": [tmp_path / "a", tmp_path / "b"], "second": [tmp_path / "c"]}
    picture = compare_losses(groups, tmp_path / "compared.png")
    assert has_colour(picture, BLUE)
    assert has_colour(picture, ORANGE)
    with pytest.raises(UsageError, match="holds no log"):
        compare_losses({"none": [tmp_path / "gone"]}, tmp_path / "compared.png")
