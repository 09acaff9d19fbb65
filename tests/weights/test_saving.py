"""Checkpoints that survive interruption: damage is seen, and the newest good one is found."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("mmengine")
from mmengine.config import Config
from mmengine.fileio import get_file_backend
from torch import nn

from lf_dense import files
from lf_dense.errors import UsageError
from lf_dense.files import write_atomically
from lf_dense.training.runs import keep_previous_checkpoint
from lf_dense.weights import saving
from lf_dense.weights.reading import check_checkpoint
from lf_dense.weights.saving import latest_good_checkpoint, load_weights


def save(path, mtime, **options):
    torch.save({"state_dict": {"weight": torch.arange(1000.0)}}, path, **options)
    os.utime(path, (mtime, mtime))
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_truncation_at_any_length_is_seen(tmp_path, legacy):
    path = save(tmp_path / "epoch_1.pth", 1, _use_new_zipfile_serialization=not legacy)
    check_checkpoint(path)
    whole = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"epoch_1\.pth is empty \(0 bytes\)"):
        check_checkpoint(path)
    for length in (1, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=rf"epoch_1\.pth \({length} bytes\) is truncated"):
            check_checkpoint(path)


def test_damage_in_the_middle_is_seen(tmp_path):
    path = save(tmp_path / "epoch_1.pth", 1)
    content = bytearray(path.read_bytes())
    at = content.index(torch.arange(1000.0).numpy().tobytes()[400:480])
    content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UsageError, match="truncated or not"):
        check_checkpoint(path)


def test_absent_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="is not there"):
        check_checkpoint(tmp_path / "epoch_1.pth")


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


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "epoch_1.pth"
    write_atomically(path, b"old")

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", cut)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["epoch_1.pth"]


def test_mmengine_writes_through_the_atomic_backend(tmp_path, monkeypatch):
    written = []

    def record(path, content):
        written.append((str(path), content))

    monkeypatch.setattr(saving, "write_atomically", record)
    from mmengine.fileio.backends import registry_utils

    for table, key in ((registry_utils.backends, "local"), (registry_utils.prefix_to_backends, "")):
        monkeypatch.setitem(table, key, table[key])  # put back afterwards
    saving.write_checkpoints_atomically()
    path = str(tmp_path / "x.pth")
    get_file_backend(path).put(b"content", path)
    assert written == [(path, b"content")]


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


def test_a_models_own_conversion_of_old_weights_runs_first():
    model = nn.Linear(2, 3)
    model.register_load_state_dict_pre_hook(
        lambda module, state, prefix, *_: state.update(weight=state.pop("old_weight"))
    )
    load_weights(model, "x.pth", {"old_weight": torch.ones(3, 2), "bias": torch.zeros(3)})
    assert torch.equal(model.weight, torch.ones(3, 2))


def test_one_kept_checkpoint_becomes_two():
    config = Config({"default_hooks": {"checkpoint": {"type": "CheckpointHook", "max_keep_ckpts": 1}}})
    keep_previous_checkpoint(config)
    assert config.default_hooks.checkpoint.max_keep_ckpts == 2
    config.default_hooks.checkpoint.max_keep_ckpts = 3
    keep_previous_checkpoint(config)
    assert config.default_hooks.checkpoint.max_keep_ckpts == 3
