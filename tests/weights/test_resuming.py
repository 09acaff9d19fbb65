"""A run's checkpoints on their way back: the newest good one, and nothing that does not fit."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("mmdet")
from torch import nn

from lf_dense.errors import UsageError
from lf_dense.weights.resuming import latest_good_checkpoint, load_weights
from support import ROOT
from support.driving import call, refused

DEMO = "configs/retinanet_lf_demo.py"
TOO_SMALL = {"state": {}, "param_groups": [{"params": [0]}]}


def save(path, mtime, **options):
    torch.save({"state_dict": {"weight": torch.arange(1000.0)}}, path, **options)
    os.utime(path, (mtime, mtime))
    return path


def test_newest_good_checkpoint_wins(tmp_path):
    good = save(tmp_path / "epoch_2.pth", 20)
    save(tmp_path / "epoch_1.pth", 10)
    save(tmp_path / "best_coco_epoch_2.pth", 50)
    (tmp_path / "epoch_3.pth").write_bytes(good.read_bytes()[:-50])
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_3.pth"))
    assert latest_good_checkpoint(tmp_path) == str(good)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pointed = save(elsewhere / "epoch_9.pth", 30)
    (tmp_path / "last_checkpoint").write_text(f"{pointed}\n")
    assert latest_good_checkpoint(tmp_path) == str(pointed)


def test_empty_pointer_and_no_checkpoint(tmp_path):
    (tmp_path / "last_checkpoint").write_text("")
    with pytest.raises(UsageError, match="nothing to resume"):
        latest_good_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="nothing to resume"):
        latest_good_checkpoint(tmp_path / "never_made")


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_arrive(process_group, prefix, wrapped):
    model, source = nn.Linear(2, 3), nn.Linear(2, 3)
    target = nn.parallel.DistributedDataParallel(model) if wrapped else model
    load_weights(target, "x.pth", {prefix + k: v for k, v in source.state_dict().items()})
    assert torch.equal(model.weight, source.weight)
    assert torch.equal(model.bias, source.bias)


def test_weights_have_to_fit():
    model = nn.Linear(2, 3)
    with pytest.raises(UsageError, match=r"1 of 2 tensors: bias \(missing\)"):
        load_weights(model, "x.pth", {"weight": model.weight})
    with pytest.raises(UsageError, match=r"1 of 2 tensors: size mismatch for weight.*\[3, 3\].*\[3, 2\]"):
        load_weights(model, "x.pth", {"weight": torch.zeros(3, 3), "bias": model.bias})


def test_weights_that_do_not_fit_name_the_config_beside_them(tmp_path):
    checkpoint = tmp_path / "epoch_1.pth"
    torch.save({}, checkpoint)
    (tmp_path / "other.py").write_text("import sys\n")
    with pytest.raises(UsageError, match=r"use the config that it was trained with\.$"):
        load_weights(nn.Linear(2, 3), str(checkpoint), {})
    (tmp_path / "mask_shapes.py").write_text("default_scope = 'mmdet'\nmodel = dict(type='MaskRCNN')\n")
    with pytest.raises(UsageError, match=r"trained with, as it was saved beside it: \S+/mask_shapes\.py\.$"):
        load_weights(nn.Linear(2, 3), str(checkpoint), {})


def test_a_models_own_conversion_of_old_weights_runs_first():
    model = nn.Linear(2, 3)
    model.register_load_state_dict_pre_hook(
        lambda module, state, prefix, *_: state.update(weight=state.pop("old_weight"))
    )
    load_weights(model, "x.pth", {"old_weight": torch.ones(3, 2), "bias": torch.zeros(3)})
    assert torch.equal(model.weight, torch.ones(3, 2))


@pytest.fixture(scope="module")
def with_average(shapes, tmp_path_factory):
    """The demo's config on a few images, with a moving average of the weights."""
    path = tmp_path_factory.mktemp("config") / "with_average.py"
    path.write_text(
        f"_base_ = {str(ROOT / DEMO)!r}\n"
        "custom_hooks = [dict(type='EMAHook')]\n"
        "train_dataloader = dict(batch_size=6)\n"
        "train_cfg = dict(val_interval=1)\n"
        "default_hooks = dict(checkpoint=dict(interval=1))\n"
    )
    return path


@pytest.fixture(scope="module")
def trained(shapes, with_average, tmp_path_factory):
    """A checkpoint of one epoch."""
    out = tmp_path_factory.mktemp("trained")
    options = ("--cfg-options", f"data_root={shapes}", "train_cfg.max_epochs=1")
    call("train.py", with_average, "--work-dir", out, *options)
    return out / "epoch_1.pth"


def test_a_run_with_a_moving_average_goes_on(trained, with_average, shapes, tmp_path):
    options = ("--resume", trained, "--cfg-options", f"data_root={shapes}", "train_cfg.max_epochs=2")
    assert "resumed epoch: 1, iter: 2" in call("train.py", with_average, "--work-dir", tmp_path, *options)
    assert (tmp_path / "epoch_2.pth").is_file()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"optimizer": None}, "has no optimizer"),
        ({"meta": {}}, "has no meta.epoch, meta.iter"),
        ({"message_hub": None, "param_schedulers": None}, "has no message_hub, param_schedulers"),
        ({"state_dict": {"conv1.weight": torch.zeros(1)}}, "does not fit the config's model"),
        ({"optimizer": TOO_SMALL}, "its optimizer has 1 parameters in 1 groups"),
    ],
    ids=["optimizer", "meta", "hub", "model", "groups"],
)
def test_what_cannot_be_resumed(change, reason, trained, shapes, tmp_path, monkeypatch, capsys):
    changed = {**torch.load(trained, weights_only=False), **change}
    content = {key: value for key, value in changed.items() if value is not None}
    torch.save(content, tmp_path / "x.pth")
    options = ("--resume", tmp_path / "x.pth", "--cfg-options", f"data_root={shapes}")
    arguments = (DEMO, "--work-dir", tmp_path / "out", *options)
    assert reason in refused(monkeypatch, capsys, "train.py", *arguments)


def test_a_start_of_which_nothing_fits(shapes, tmp_path, monkeypatch, capsys):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, tmp_path / "x.pth")
    options = ("--cfg-options", f"data_root={shapes}", f"load_from={tmp_path / 'x.pth'}")
    arguments = (DEMO, "--work-dir", tmp_path / "out", *options)
    assert "no tensor of the checkpoint" in refused(monkeypatch, capsys, "train.py", *arguments)
