"""Errors that a config causes deep inside mmengine or torch: a sentence that says what to set."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")
from mmengine.registry import MODELS

from lf_dense import LaplacianFormer
from lf_dense.errors import UsageError
from lf_dense.training.explaining import explained
from support.driving import refused


def build(**settings):
    with explained():
        return MODELS.build({"type": "LaplacianFormer", **settings})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"arch": "giant"}, "LaplacianFormer cannot be built: the arch 'giant' does not exist"),
        ({"out_indices": (4,)}, "LaplacianFormer cannot be built: out_indices is"),
        ({"depth": 50}, "LaplacianFormer cannot be built: .*unexpected keyword argument 'depth'"),
    ],
)
def test_a_component_that_cannot_be_built_is_named(settings, reason):
    with pytest.raises(UsageError, match=reason):
        build(**settings)


def test_a_component_within_another_is_the_one_that_is_named():
    class Holder(nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone = MODELS.build(backbone)

    with pytest.raises(UsageError, match="the config's LaplacianFormer cannot be built"), explained():
        MODELS.build({"type": Holder, "backbone": {"type": "LaplacianFormer", "arch": "giant"}})


def test_what_can_be_built_is_built():
    assert isinstance(build(arch="tiny"), LaplacianFormer)


@pytest.mark.parametrize(
    ("layer", "image"),
    [(nn.Conv2d(128, 8, 1), torch.zeros(1, 64, 4, 4)), (nn.Linear(128, 8), torch.zeros(4, 64))],
    ids=["convolution", "linear"],
)
def test_channels_that_do_not_fit(layer, image):
    with pytest.raises(UsageError, match="takes 128 channels and gets 64"), explained():
        layer(image)


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), ValueError("a defect"), ZeroDivisionError()]
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as info, explained():
        raise error
    assert info.value is error


DEMO = "configs/retinanet_lf_demo.py"


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("model.backbone.arch=giant", "the arch 'giant' does not exist"),
        ("optim_wrapper.optimizer.lr=fast", "optim_wrapper.optimizer.lr is 'fast', and has to be a number"),
        ("optim_wrapper.optimizer.type=AdamX", "the config's OptimWrapper cannot be built"),
        ("model.neck.in_channels=[256,512,1024,2048]", "model.neck.in_channels is [256, 512, 1024, 2048]"),
        ("model.bbox_head.in_channels=128", "a layer of the model takes 128 channels and gets 64"),
        ("train_dataloader.dataset.pipeline.99.scale=3", "--cfg-options do not fit the config: Index 99"),
    ],
)
def test_train_says_what_to_set(option, reason, shapes, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mmdet")
    options = ("--cfg-options", f"data_root={shapes}", option)
    assert reason in refused(monkeypatch, capsys, "train.py", DEMO, "--work-dir", tmp_path, *options)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("README.md", "# No config", "OSError: Only py/yml/yaml/json type are supported"),
        ("name.py", "x = undefined", "NameError: name 'undefined' is not defined"),
        ("syntax.py", "x = (", "SyntaxError: '(' was never closed"),
        ("json.json", "{", "JSONDecodeError"),
    ],
)
def test_a_file_that_is_no_config(name, content, reason, tmp_path, monkeypatch, capsys):
    (tmp_path / name).write_text(content)
    assert reason in refused(monkeypatch, capsys, "train.py", tmp_path / name)
