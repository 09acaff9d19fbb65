"""From a training checkpoint to one for others.

It holds only weights and metadata, and its name vouches for its bytes.
"""

import hashlib
import json
import re

import numpy as np
import pytest
import torch

from support.driving import call

pytest.importorskip("mmengine")
from mmengine.logging import HistoryBuffer

from lf_dense import LaplacianFormer, load_pretrained
from lf_dense.errors import UsageError
from lf_dense.presets import ARCHS
from lf_dense.weights.publishing import arch_of, publish, write_checkpoint
from lf_dense.weights.reading import read_checkpoint

SMALL = {
    "embed_dims": (16, 32, 48, 64),
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 2, 2),
}


def training_checkpoint(path, arch):
    """Write what mmengine writes: weights, their averages, optimizer, schedulers, logs and metadata."""
    net = LaplacianFormer(arch)
    state = {f"backbone.{name}": value for name, value in net.state_dict().items()}
    state["head.fc.weight"] = torch.randn(10, net.embed_dims[-1])
    loss = state["head.fc.weight"].square().sum()
    optimizer = torch.optim.AdamW(net.parameters())
    content = {
        "state_dict": state,
        "ema_state_dict": {name: value + 1 for name, value in state.items()},
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [{"last_step": 3}],
        "message_hub": {
            "log_scalars": {
                "train/loss": HistoryBuffer(np.array([float(loss)]), np.array([1])),
                "val/accuracy/top1": HistoryBuffer(np.array([50.0, 62.5]), np.array([1, 1])),
                "val/time": HistoryBuffer(np.array([0.1]), np.array([1])),
            },
            "runtime_info": {},
        },
        "meta": {
            "epoch": 8,
            "iter": 80,
            "cfg": "model = dict()\n",
            "dataset_meta": {"classes": ["a", "b"]},
            "experiment_name": "lf_x",
        },
    }
    torch.save(content, path)
    return net, content


def same(a, b):
    return set(a) == set(b) and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_and_metadata_and_nothing_else(tmp_path, ending):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    net, content = training_checkpoint(tmp_path / "epoch_8.pth", "tiny")
    path, meta = publish(tmp_path / "epoch_8.pth", tmp_path / f"lf.{ending}", dataset="Imagenette")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"lf-{digest[:8]}.{ending}"
    read = read_checkpoint(str(path))
    assert set(read) == {"state_dict", "meta"}
    assert same(read["state_dict"], content["state_dict"])
    said = read["meta"]
    assert (said["arch"], said["recipe"], said["dataset"]) == ("tiny", "lf_x", "Imagenette")
    assert said["metrics"] == meta["metrics"] == {"accuracy/top1": 62.5}
    assert said["epoch"] == 8
    assert said["dataset_meta"] == {"classes": ["a", "b"]}
    assert said["published_with"]["torch"] == torch.__version__
    fresh = LaplacianFormer("tiny")
    load_pretrained(fresh, path)
    assert same(fresh.state_dict(), net.state_dict())
    assert path.stat().st_size < (tmp_path / "epoch_8.pth").stat().st_size * 0.55


def test_the_backbone_alone_and_published_again(tmp_path):
    net, _ = training_checkpoint(tmp_path / "epoch_8.pth", SMALL)
    paths = (tmp_path / "epoch_8.pth", tmp_path / "lf.pth")
    path, meta = publish(*paths, backbone_only=True, metrics={"top1": 1.5})
    assert same(read_checkpoint(str(path))["state_dict"], net.state_dict())
    assert meta["arch"] == {key: SMALL[key] for key in ("embed_dims", "depths", "mlp_ratios")}
    again, meta_again = publish(path, path)
    assert (meta_again["metrics"], meta_again["recipe"]) == ({"top1": 1.5}, "lf_x")
    assert re.fullmatch(r"lf-[0-9a-f]{8}\.pth", again.name)


@pytest.mark.parametrize("arch", ARCHS)
def test_arch_is_read_off_the_weights(arch):
    with torch.device("meta"):
        assert arch_of(LaplacianFormer(arch).state_dict()) == arch


def test_what_cannot_be_published(tmp_path):
    training_checkpoint(tmp_path / "epoch_8.pth", SMALL)
    with pytest.raises(UsageError, match=r"lf\.bin ends in neither \.pth nor \.safetensors"):
        publish(tmp_path / "epoch_8.pth", tmp_path / "lf.bin")
    torch.save({"state_dict": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="no LaplacianFormer in it"):
        publish(tmp_path / "other.pth", tmp_path / "lf.pth")
    assert {path.name for path in tmp_path.iterdir()} == {"epoch_8.pth", "other.pth"}


def test_damaged_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    net = LaplacianFormer(SMALL)
    path = write_checkpoint(tmp_path / "x.safetensors", net.state_dict(), {})
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UsageError, match=r"cut\.safetensors .*truncated or not"):
        load_pretrained(net, tmp_path / "cut.safetensors")
    with pytest.raises(UsageError, match="is not there"):
        load_pretrained(net, tmp_path / "gone.safetensors")
    assert same(net.state_dict(), before)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    net = LaplacianFormer(SMALL)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state["stages.1.norm.weight"][3] = float("nan")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"NaN or infinite weights: stages\.1\.norm\.weight"):
        load_pretrained(net, tmp_path / "x.pth")
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_the_tools(tmp_path):
    training_checkpoint(tmp_path / "epoch_8.pth", "tiny")
    stated = ("--dataset", "Imagenette", "--metric", "top1=62.5")
    printed = call("publish.py", tmp_path / "epoch_8.pth", tmp_path / "lf.pth", *stated)
    (published,) = tmp_path.glob("lf-*.pth")
    assert str(published) in printed
    printed = call("inspect_checkpoint.py", published, "--arch", "tiny", "--tensors")
    for words in (
        "LaplacianFormer, 11,",
        "arch tiny",
        "as its name says",
        "beside them       nothing",
        "Imagenette",
        "100.0% of the backbone",
    ):
        assert words in printed
    printed = call("inspect_checkpoint.py", tmp_path / "epoch_8.pth")
    assert "beside them       ema_state_dict, optimizer, param_schedulers, message_hub" in printed
    renamed = published.rename(tmp_path / "lf-00000000.pth")
    assert "NOT 00000000 as its name says" in call("inspect_checkpoint.py", renamed)
    printed = call("publish.py", tmp_path / "epoch_8.pth", tmp_path / "nowhere" / "lf.pth", code=2)
    (line,) = printed.splitlines()
    assert "make it first" in line


def test_metadata_survives_safetensors_as_values(tmp_path):
    pytest.importorskip("safetensors")
    meta = {"metrics": {"top1": 1.5}, "recipe": "x", "epoch": 3}
    path = write_checkpoint(tmp_path / "x.safetensors", {"a": torch.ones(2)}, meta)
    read = read_checkpoint(str(path))["meta"]
    assert read == {"format": "pt", **meta}
    assert json.dumps(read)
