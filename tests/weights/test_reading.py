"""No checkpoint runs code: hostile files through every tool that takes one, and mmengine's own loading."""

from __future__ import annotations

import os
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from support import hostile
from support.driving import call, refusal, refused

pytest.importorskip("mmdet")
from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from lf_dense import LaplacianFormer
from lf_dense.errors import UsageError
from lf_dense.weights import reading
from lf_dense.weights.reading import check_checkpoint, read_checkpoint

DEMO = "configs/retinanet_lf_demo.py"
TRAIN = ("train.py", DEMO, "--work-dir", "{out}")
DATA = ("--cfg-options", "data_root={data}")
RETINANET = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
TOOLS = {
    "predict": ("predict.py", DEMO, "{file}", "{image}", "--out", "{out}", "--device", "cpu"),
    "test": ("test.py", DEMO, "{file}", "--work-dir", "{out}", *DATA),
    "train --resume": (*TRAIN, "--resume", "{file}", *DATA),
    "train load_from": (*TRAIN, *DATA, "load_from={file}"),
    "train --pretrained": (*TRAIN, "--pretrained", "{file}"),
    "inspect": ("inspect_checkpoint.py", "{file}"),
    "publish": ("publish.py", "{file}", "{out}/published.pth"),
    "convert": ("convert_pvtv2.py", "{file}", "{out}/converted.pth"),
    "swap": ("swap_config.py", RETINANET, "{out}/new.py", "--pretrained", "{file}"),
}
SENTENCE = {
    hostile.by_system: "holds posix.system, which could run code",
    hostile.by_exec: "holds exec, which could run code",
    hostile.by_setstate: "holds support.hostile.SetsState, which could run code",
    hostile.in_the_optimizer: "holds posix.system, which could run code",
    hostile.in_a_storage: "holds posix.system, which could run code",
    hostile.as_a_bare_pickle: "holds posix.system, which could run code",
}


@pytest.fixture
def canary(tmp_path):
    """A file that no test may find."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


@pytest.fixture
def places(shapes, tmp_path):
    (tmp_path / "out").mkdir()
    return {
        "file": tmp_path / "hostile.pth",
        "out": tmp_path / "out",
        "data": shapes,
        "image": next((shapes / "val").iterdir()),
    }


def weights():
    return {"state_dict": LaplacianFormer("tiny").state_dict(), "meta": {"epoch": 1, "iter": 4}}


@pytest.mark.parametrize("kind", hostile.KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", TOOLS)
def test_no_tool_runs_a_checkpoint_s_code(name, kind, places, canary, monkeypatch, capsys):
    kind(places["file"], weights(), canary)
    tool, *arguments = (part.format(**places) for part in TOOLS[name])
    assert SENTENCE[kind] in refused(monkeypatch, capsys, tool, *arguments)
    assert not list(places["out"].rglob("*.pth"))


@pytest.mark.parametrize("name", ["predict", "test", "train --resume"])
def test_nor_does_one_in_a_process_of_its_own(name, places, canary):
    hostile.by_system(places["file"], weights(), canary)
    tool, *arguments = (part.format(**places) for part in TOOLS[name])
    assert "holds posix.system, which could run code" in refusal(tool, *arguments)


def test_the_canary_dies_where_the_file_is_trusted(places, tmp_path):
    """The hostile files do run their code, and --trust-checkpoint lets them."""
    for index, kind in enumerate(hostile.KINDS):
        died = tmp_path / f"died_{index}"
        kind(places["file"], weights(), died)
        try:
            torch.load(places["file"], weights_only=False)
        except Exception:  # a storage without a type cannot be finished, and its code has run by then
            assert kind is hostile.in_a_storage
        assert died.exists(), kind.__name__
    died = tmp_path / "died"
    hostile.by_system(places["file"], weights(), died)
    call("inspect_checkpoint.py", places["file"], "--trust-checkpoint")
    assert died.exists()


@pytest.fixture
def guarded(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, "_schemes", CheckpointLoader._schemes.copy())
    reading.guard_mmengine()


def test_all_of_mmengine_s_loading_is_guarded(guarded, places, canary):
    assert set(CheckpointLoader._schemes.values()) == {reading._load_from_safe_reader}
    hostile.by_system(places["file"], weights(), canary)
    with pytest.raises(UsageError, match=r"holds posix\.system"):
        load_checkpoint(nn.Linear(1, 1), str(places["file"]))
    module = BaseModule(init_cfg={"type": "Pretrained", "checkpoint": str(places["file"])})
    with pytest.raises(UsageError, match=r"holds posix\.system"):
        module.init_weights()


def test_init_cfg_in_a_training(places, canary, monkeypatch, capsys):
    hostile.by_system(places["file"], weights(), canary)
    options = (
        f"data_root={places['data']}",
        f"model.neck.init_cfg.checkpoint={places['file']}",
        "model.neck.init_cfg.type=Pretrained",
    )
    arguments = (DEMO, "--work-dir", places["out"], "--cfg-options", *options)
    assert "holds posix.system" in refused(monkeypatch, capsys, "train.py", *arguments)


def test_a_config_in_a_checkpoint_is_not_run(guarded, tmp_path, canary):
    """mmengine's resume runs ``meta.config`` as Python; plain text passes every reader of pickles."""
    meta = {"config": f"open({str(canary)!r}, 'w')", "epoch": 1}
    torch.save({"state_dict": {}, "meta": meta}, tmp_path / "x.pth")
    checkpoint = CheckpointLoader.load_checkpoint(str(tmp_path / "x.pth"))
    assert checkpoint["meta"] == {"epoch": 1}


def test_what_mmengine_keeps_is_read(tmp_path):
    content = {
        "log": HistoryBuffer([1.0, 2.0], [1, 1]),
        "config": Config({"a": 1, "b": {"c": [2]}}),
        "settings": ConfigDict(a=1, b=[{"c": 2}]),
        "array": np.arange(3.0),
        "names": np.array(["cat", "dog"]),
        "number": np.float64(2.5),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "part": slice(1, 2),
        "plain": [1, 2.5, "text", None, True, (1,), {3}, b"bytes"],
    }
    torch.save(content, tmp_path / "x.pth")
    read = read_checkpoint(tmp_path / "x.pth")
    assert read["log"].mean() == 1.5
    assert read["config"].b.c == [2]
    assert read["settings"] == content["settings"]
    assert read["array"].tolist() == [0, 1, 2]
    assert read["names"].tolist() == ["cat", "dog"]
    for key in ("number", "count", "flag", "part", "plain"):
        assert read[key] == content[key]


def test_older_torch_takes_no_names():
    assert any(isinstance(item, tuple) for item in reading._safe_classes(take_names=True))
    assert not any(isinstance(item, tuple) for item in reading._safe_classes(take_names=False))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.array([{}], dtype=object), "a numpy array of object"),
        (hostile.Calls(getattr, np.ndarray, "tofile"), "asks for the attribute 'tofile'"),
        (torch.zeros(1).expand(10**12), "would take 4000000000000 bytes"),
        (torch.zeros(8, device="meta"), "a tensor of torch.strided on meta"),
        (torch.eye(3).to_sparse(), "a tensor of torch.sparse_coo on cpu"),
        (nn.Linear(1, 1), "holds torch.nn.modules.linear.Linear"),
    ],
)
def test_what_is_no_plain_data_is_named(value, reason, tmp_path):
    torch.save({"state_dict": {"x": value}}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=reason):
        read_checkpoint(tmp_path / "x.pth")


def test_what_is_no_file_of_weights_is_named(tmp_path):
    (tmp_path / "empty.pth").touch()
    torch.save([1, 2], tmp_path / "list.pth")
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "program.pth")
    with tarfile.open(tmp_path / "first_format.pth", "w") as archive:
        archive.add(tmp_path / "list.pth", "storages")
    for name, reason in (
        ("program.pth", "is a TorchScript program"),
        ("first_format.pth", "a tar archive"),
        ("", "is a folder: give a file in it"),
        ("gone.pth", "is not there"),
        ("empty.pth", r"is empty \(0 bytes\)"),
        ("list.pth", "holds a list, and a dictionary of weights is expected"),
        ("bomb.pth", "would unpack to 100000000"),
    ):
        with pytest.raises(UsageError, match=reason):
            read_checkpoint(tmp_path / name)


def test_trust_is_for_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_trusted", set())
    for name in ("mine.pth", "other.pth"):
        torch.save({"x": hostile.Calls(os.getpid)}, tmp_path / name)
    reading.trust_checkpoint(tmp_path / "mine.pth")
    assert read_checkpoint(tmp_path / "mine.pth") == {"x": os.getpid()}
    with pytest.raises(UsageError, match=r"other\.pth holds posix\.getpid"):
        read_checkpoint(tmp_path / "other.pth")


def save(path, **options):
    torch.save({"state_dict": {"weight": torch.arange(1000.0)}}, path, **options)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_truncation_at_any_length_is_seen(tmp_path, legacy):
    path = save(tmp_path / "epoch_1.pth", _use_new_zipfile_serialization=not legacy)
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
    path = save(tmp_path / "epoch_1.pth")
    content = bytearray(path.read_bytes())
    at = content.index(torch.arange(1000.0).numpy().tobytes()[400:480])
    content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UsageError, match="truncated or not"):
        check_checkpoint(path)


def test_absent_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="is not there"):
        check_checkpoint(tmp_path / "epoch_1.pth")


def test_lists_within_lists_are_read_in_time(tmp_path):
    """Thirty lists, each twice in the next: a billion paths, and one tensor."""
    nested = [torch.zeros(1)]
    for _ in range(30):
        nested = [nested, nested]
    endless = []
    endless.append(endless)
    torch.save({"nested": nested, "endless": endless}, tmp_path / "x.pth")
    assert len(list(reading._tensors_within(read_checkpoint(tmp_path / "x.pth")))) == 1
