"""From a config to a runner: sections, work dirs, mixed precision, learning rates, resuming."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("mmengine")
from mmengine.config import Config

from lf_dense.errors import UsageError
from lf_dense.training import runs

OPTIMIZER = {"type": "AdamW", "lr": 1e-4}
PARTS = {"model": {}, "train_dataloader": {}, "train_cfg": {}, "optim_wrapper": {"optimizer": OPTIMIZER}}


def test_work_dirs():
    config = Config({}, filename="configs/some_name.py", cfg_text=" ")
    runs.set_work_dir(config, None)
    assert config.work_dir == "work_dirs/some_name"
    runs.set_work_dir(config, None)
    assert config.work_dir == "work_dirs/some_name"
    runs.set_work_dir(config, "elsewhere")
    assert config.work_dir == "elsewhere"


def test_sections_that_are_missing_are_named():
    with pytest.raises(UsageError, match="no model, train_cfg, which training needs"):
        runs.check_sections(Config({"x": 1}), ("model", "x", "train_cfg"), "training")
    runs.check_sections(Config(PARTS), tuple(PARTS), "training")


@pytest.mark.parametrize("key", ["lr", "weight_decay", "momentum"])
def test_numbers_of_the_optimizer_are_numbers(key):
    config = Config({**PARTS, "optim_wrapper": {"optimizer": {**OPTIMIZER, key: "much"}}})
    with pytest.raises(UsageError, match=rf"optim_wrapper\.optimizer\.{key} is 'much'"):
        runs.check_sections(config, tuple(PARTS), "training")


def with_neck(channels, neck="FPN", **backbone):
    backbone = {"type": "LaplacianFormer", **backbone}
    return Config({"model": {"backbone": backbone, "neck": {"type": neck, "in_channels": channels}}})


def test_a_neck_has_the_backbone_s_channels():
    runs.check_neck(with_neck([64, 128, 320, 512]))
    runs.check_neck(with_neck([128, 512], out_indices=(1, 3)))
    runs.check_neck(with_neck([1], neck="SomeOtherNeck"))
    runs.check_neck(with_neck([1], arch="giant"))  # building it says more
    with pytest.raises(UsageError, match=r"in_channels is \[64, 128\], .* maps of \[128, 512\]"):
        runs.check_neck(with_neck([64, 128], out_indices=(1, 3)))


def test_mixed_precision(monkeypatch):
    config = Config({"optim_wrapper": {"type": "OptimWrapper", "optimizer": OPTIMIZER}})
    monkeypatch.setattr(runs, "has_accelerator", lambda: False)
    with pytest.raises(UsageError, match="--amp needs a GPU"):
        runs.enable_amp(config)
    monkeypatch.setattr(runs, "has_accelerator", lambda: True)
    runs.enable_amp(config)
    assert config.optim_wrapper.type == "AmpOptimWrapper"
    assert config.optim_wrapper.loss_scale == "dynamic"
    config.optim_wrapper.type = "DeepSpeedOptimWrapper"
    with pytest.raises(UsageError, match="the config has DeepSpeedOptimWrapper"):
        runs.enable_amp(config)


def test_scaled_learning_rates_need_a_batch_size():
    config = Config({"auto_scale_lr": {"base_batch_size": 16}})
    runs.enable_auto_scale_lr(config)
    assert config.auto_scale_lr.enable
    with pytest.raises(UsageError, match="base_batch_size"):
        runs.enable_auto_scale_lr(Config({}))


def test_one_kept_checkpoint_becomes_two():
    config = Config({"default_hooks": {"checkpoint": {"type": "CheckpointHook", "max_keep_ckpts": 1}}})
    runs.keep_previous_checkpoint(config)
    assert config.default_hooks.checkpoint.max_keep_ckpts == 2
    config.default_hooks.checkpoint.max_keep_ckpts = 3
    runs.keep_previous_checkpoint(config)
    assert config.default_hooks.checkpoint.max_keep_ckpts == 3


def test_resume_takes_the_newest_checkpoint_or_the_one_that_is_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "epoch_3.pth")
    (tmp_path / ".epoch_4.pth.abc").touch()
    config = Config({"work_dir": str(tmp_path)})
    runs.set_resume(config, runs.AUTO)
    assert config.resume
    assert config.load_from == str(tmp_path / "epoch_3.pth")
    assert not (tmp_path / ".epoch_4.pth.abc").exists()
    runs.set_resume(config, "other.pth")
    assert config.load_from == "other.pth"


def test_the_start_is_read_before_anything_is_built(tmp_path):
    runs.check_start(Config({}), trust=False)
    torch.save({"state_dict": {}, "meta": {}}, tmp_path / "x.pth")
    runs.check_start(Config({"load_from": str(tmp_path / "x.pth")}), trust=False)
    with pytest.raises(UsageError, match=r"cannot be resumed, since it has no meta\.epoch"):
        runs.check_start(Config({"load_from": str(tmp_path / "x.pth"), "resume": True}), trust=False)


def test_predictions_are_saved_as_pickles_alone(tmp_path):
    pytest.importorskip("mmdet")
    torch.save({"state_dict": {}}, tmp_path / "x.pth")
    parts = {key: {"dataset": {}} for key in ("model", "test_cfg", "test_evaluator", "test_dataloader")}
    config = Config({"default_scope": "mmdet", **parts}, filename="x.py", cfg_text=" ")
    with pytest.raises(UsageError, match=r"--out raw\.json"):
        runs.build_testing_runner(config, str(tmp_path / "x.pth"), work_dir=str(tmp_path), out="raw.json")
