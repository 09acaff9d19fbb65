"""Following a training: which metric is drawn, curves that never stop it, TensorBoard in the config."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("mmengine")
pytest.importorskip("matplotlib")
from mmengine.config import Config
from mmengine.logging import MessageHub

from lf_dense.errors import UsageError
from lf_dense.training import following
from lf_dense.training.following import CURVES, CurvesHook, add_tensorboard, main_metric


@pytest.mark.parametrize(
    ("names", "main"),
    [
        (("data_time", "time", "coco/bbox_mAP", "coco/bbox_mAP_50", "coco/segm_mAP"), "coco/bbox_mAP"),
        (("coco/bbox_mAP_50", "coco/bbox_mAP"), "coco/bbox_mAP"),
        (("aAcc", "mIoU", "mAcc"), "mIoU"),
        (("accuracy/top5", "accuracy/top1"), "accuracy/top1"),
        (("coco_panoptic/PQ",), "coco_panoptic/PQ"),
        (("single-label/precision", "single-label/f1-score"), "single-label/f1-score"),
        (("my/own",), "my/own"),
        (("time",), None),
    ],
)
def test_the_main_metric(names, main):
    assert main_metric(dict.fromkeys(names, 0.5)) == main


def test_what_is_no_number_is_no_metric():
    assert main_metric({"per_class/mAP": [0.1, 0.2], "mIoU": 50.0}) == "mIoU"


@pytest.fixture
def runner(tmp_path, caplog):
    """What the hook sees of a runner, in a work dir where another run has logged before."""
    for name, loss in (("run1", 9.0), ("run2", 2.0)):
        log = tmp_path / name / "vis_data" / "scalars.json"
        log.parent.mkdir(parents=True)
        log.write_text(json.dumps({"iter": 1, "loss": loss}) + "\n")
    caplog.set_level(logging.INFO)
    return SimpleNamespace(
        work_dir=str(tmp_path),
        log_dir=str(tmp_path / "run2"),
        cfg=Config({"resume": False}),
        hooks=[],
        logger=logging.getLogger("following"),
        message_hub=MessageHub("following"),
    )


def drawn_with(monkeypatch):
    """The arguments of each drawing."""
    calls = []
    monkeypatch.setattr(following, "plot_curves", lambda *arguments: calls.append(arguments))
    return calls


def test_curves_are_redrawn_after_epochs_and_evaluations(runner, monkeypatch):
    calls, hook = drawn_with(monkeypatch), CurvesHook()
    hook.after_train_epoch(runner)
    hook.after_val_epoch(runner, {"aAcc": 1.0, "mIoU": 2.0})
    hook.after_train_epoch(runner)
    assert [metric for _, _, metric, _ in calls] == ["", "mIoU", "mIoU"]


def test_a_new_run_leaves_out_the_logs_of_earlier_ones(runner, monkeypatch):
    calls = drawn_with(monkeypatch)
    CurvesHook().after_train_epoch(runner)
    runner.cfg.resume = True
    CurvesHook().after_train_epoch(runner)
    assert [run for *_, run in calls] == ["run2", None]


def test_the_first_process_alone_draws(runner, monkeypatch):
    calls = drawn_with(monkeypatch)
    monkeypatch.setattr(following, "is_main_process", lambda: False)
    CurvesHook().after_train(runner)
    assert calls == []


def test_a_failure_is_a_warning(runner, monkeypatch, caplog):
    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(following, "plot_curves", fail)
    CurvesHook().after_train_epoch(runner)
    assert "curves.png was not drawn: no space left on device" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"


def test_nothing_to_draw_yet_is_no_warning_before_the_end(runner, caplog):
    runner.log_dir += "_without_a_log"
    hook = CurvesHook()
    hook.after_train_epoch(runner)
    assert caplog.text == ""
    hook.after_train(runner)
    assert "curves.png was not drawn: no loss is in " in caplog.text


def test_the_end_names_the_checkpoints(runner, caplog, tmp_path):
    runner.message_hub.update_info("last_ckpt", "w/epoch_3.pth")
    runner.message_hub.update_info("best_ckpt", "w/best.pth")
    CurvesHook().after_train(runner)
    assert (tmp_path / CURVES).stat().st_size > 0
    assert "last checkpoint: w/epoch_3.pth; best checkpoint: w/best.pth; curves: " in caplog.messages[-1]


def backends(config):
    return [backend["type"] for backend in config.visualizer.vis_backends]


def test_tensorboard_joins_the_backends_once(monkeypatch):
    monkeypatch.setattr(following, "find_spec", lambda name: object())
    config = Config({"visualizer": {"type": "X", "vis_backends": [{"type": "LocalVisBackend"}]}})
    for _ in range(2):
        add_tensorboard(config)
        assert backends(config) == ["LocalVisBackend", "TensorboardVisBackend"]
    bare = Config({})
    add_tensorboard(bare)
    assert backends(bare) == ["LocalVisBackend", "TensorboardVisBackend"]


def test_tensorboard_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(following, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        add_tensorboard(Config({}))
