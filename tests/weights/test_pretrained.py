"""Weights of a LaplacianFormer, from whatever holds one.

Either all of them arrive, or nothing changes and one sentence says why.
"""

import functools
import hashlib
import http.server
import os
import pickle
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, init_default_scope

from lf_dense import LaplacianFormer, load_pretrained, swap_backbone
from lf_dense.errors import UsageError
from lf_dense.weights import reading
from lf_dense.weights.reading import read_checkpoint

SMALL = {
    "embed_dims": (16, 32, 48, 64),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 2, 2),
}


@pytest.fixture
def source():
    torch.manual_seed(1)
    return LaplacianFormer(SMALL)


def save(path, content):
    torch.save(content, path)
    return path


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    ("prefix", "container"),
    [
        ("", None),
        ("", "state_dict"),
        ("backbone.", "state_dict"),
        ("module.backbone.", "state_dict"),
        ("detector.backbone.", "model"),
    ],
)
def test_every_tensor_arrives_from_every_kind_of_model(source, tmp_path, prefix, container):
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    if prefix:
        state["head.fc.weight"] = torch.zeros(3, 3)
    path = save(tmp_path / "x.pth", {container: state, "meta": {"epoch": 3}} if container else state)
    net = LaplacianFormer(SMALL)
    report = load_pretrained(net, path)
    assert same(net.state_dict(), source.state_dict())
    assert report.share == 1.0
    assert not report.left
    assert report.unused == (("head.fc.weight",) if prefix else ())


def test_a_checkpoint_of_mmengine_with_its_logs(source, tmp_path):
    logs = HistoryBuffer(np.array([1.0, 2.0]), np.array([1, 1]))
    hub = {"log_scalars": {"loss": logs}}
    path = save(tmp_path / "x.pth", {"state_dict": source.state_dict(), "message_hub": hub})
    net = LaplacianFormer(SMALL)
    load_pretrained(net, path)
    assert same(net.state_dict(), source.state_dict())


def test_as_a_config_s_initialisation(source, tmp_path):
    state = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    path = save(tmp_path / "x.pth", {"state_dict": state})
    net = LaplacianFormer(SMALL, init_cfg={"type": "LaplacianPretrained", "checkpoint": str(path)})
    assert not same(net.state_dict(), source.state_dict())
    net.init_weights()
    assert same(net.state_dict(), source.state_dict())


def test_another_landmark_grid_needs_no_conversion(source, tmp_path):
    path = save(tmp_path / "x.pth", source.state_dict())
    net = LaplacianFormer(SMALL, landmark_grid=(4, 4))
    assert load_pretrained(net, path).share == 1.0


def test_a_swapped_detector_starts_with_exactly_these_weights(tmp_path):
    pytest.importorskip("mmdet")
    torch.manual_seed(2)
    source = LaplacianFormer("tiny")
    path = save(tmp_path / "x.pth", source.state_dict())
    config = swap_backbone("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", pretrained=str(path))
    config = Config.fromstring(config.dump(), ".py")
    init_default_scope("mmdet")
    model = MODELS.build(config.model)
    model.init_weights()
    assert same(model.backbone.state_dict(), source.state_dict())


class RunsCode:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def failures(tmp_path, source):
    good = save(tmp_path / "good.pth", source.state_dict()).read_bytes()
    (tmp_path / "truncated.pth").write_bytes(good[: len(good) // 2])
    yield "truncated.pth", "truncated"
    yield "gone.pth", "is not there"
    save(tmp_path / "other.pth", {"state_dict": {"conv1.weight": torch.zeros(1)}})
    yield "other.pth", "has no LaplacianFormer in it .*; it has conv1.weight"
    save(tmp_path / "empty.pth", {"state_dict": {}})
    yield "empty.pth", "no tensors at all"
    save(tmp_path / "none.pth", [1, 2, 3])
    yield "none.pth", "holds a list, and a dictionary"
    save(tmp_path / "arch.pth", LaplacianFormer({**SMALL, "embed_dims": (32, 64, 96, 128)}).state_dict())
    shapes = r"shape \(32, 3, 7, 7\) in the file, \(16, 3, 7, 7\) here"
    yield "arch.pth", f"only .*% of the backbone is in .*{shapes}"
    ran = tmp_path / "ran"
    save(tmp_path / "code.pth", {"state_dict": source.state_dict(), "meta": RunsCode(f"touch {ran}")})
    yield "code.pth", "holds posix.system, which could run code"
    (tmp_path / "code.pkl").write_bytes(pickle.dumps(RunsCode(f"touch {ran}")))
    yield "code.pkl", "holds posix.system|not a PyTorch checkpoint"


def test_what_cannot_be_loaded_changes_nothing_and_runs_nothing(source, tmp_path):
    torch.manual_seed(3)
    net = LaplacianFormer(SMALL)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for name, reason in failures(tmp_path, source):
        with pytest.raises(UsageError, match=reason):
            load_pretrained(net, tmp_path / name)
        assert same(net.state_dict(), before), name
    assert not (tmp_path / "ran").exists()


def test_other_attributes_of_other_classes_are_not_to_be_had(tmp_path):
    class Asks:
        def __reduce__(self):
            return getattr, (np.ndarray, "tofile")

    save(tmp_path / "x.pth", {"x": Asks()})
    with pytest.raises(UsageError, match="cannot be read as weights alone"):
        read_checkpoint(str(tmp_path / "x.pth"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The folder ``served`` under an address, and a download cache of its own."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_from_an_address(source, tmp_path, server):
    content = save(tmp_path / "x.pth", source.state_dict()).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    for name in ("plain.pth", f"lf-{digest[:8]}.pth", "lf-00000000.pth"):
        (tmp_path / "served" / name).write_bytes(content)
    for name in ("plain.pth", f"lf-{digest[:8]}.pth"):
        net = LaplacianFormer(SMALL)
        load_pretrained(net, f"{server}/{name}?download=1")
        assert same(net.state_dict(), source.state_dict())
    (tmp_path / "served" / "plain.pth").unlink()
    load_pretrained(LaplacianFormer(SMALL), f"{server}/plain.pth")  # from the cache
    for name, reason in (("lf-00000000.pth", "hash"), ("gone.pth", "404")):
        with pytest.raises(UsageError, match=f"cannot be fetched .*{reason}"):
            load_pretrained(net, f"{server}/{name}")
        assert not (tmp_path / "cache" / "checkpoints" / name).exists()


def test_mmengine_s_short_names_are_read_as_weights_too(tmp_path, server, monkeypatch):
    ran = tmp_path / "ran"
    save(tmp_path / "served" / "code.pth", {"state_dict": RunsCode(f"touch {ran}")})
    monkeypatch.setitem(reading._MODEL_LISTS, "open-mmlab", lambda: {"lf": f"{server}/code.pth"})
    with pytest.raises(UsageError, match=r"holds posix\.system"):
        read_checkpoint("open-mmlab://lf")
    assert not ran.exists()
    with pytest.raises(UsageError, match="none of those that mmengine knows"):
        read_checkpoint("open-mmlab://lg")


def test_a_part_has_to_be_asked_for(source, tmp_path):
    state = source.state_dict()
    part = {name: value for name, value in state.items() if not name.startswith("stages.3")}
    path = save(tmp_path / "x.pth", part)
    net = LaplacianFormer(SMALL)
    with pytest.raises(UsageError, match=r"only .*% of the backbone"):
        load_pretrained(net, path)
    report = load_pretrained(net, path, strict=False)
    reasons = {reason for name, reason in report.left.items() if ".blocks." in name}
    assert reasons == {"stage 3 has 0 blocks in the file"}
    assert all(name.startswith("stages.3") for name in report.left)
    assert same({name: value for name, value in net.state_dict().items() if name in report.taken}, state)
    assert "left at initialisation" in str(report)
