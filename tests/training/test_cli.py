"""What the command lines share: options, configs with another backbone, ranks."""

from __future__ import annotations

import argparse
import os

import pytest
import torch

pytest.importorskip("mmdet")
from lf_dense import LaplacianFormer
from lf_dense.errors import UsageError
from lf_dense.training import cli
from lf_dense.weights import reading
from support.hostile import Calls

RETINANET = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"


def parse(*arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    cli.add_backbone_options(parser)
    cli.add_config_options(parser)
    cli.add_launcher(parser)
    return parser.parse_args([str(part) for part in arguments])


def test_a_config_alone_is_read_as_it_is():
    config = cli.read_config(parse(RETINANET))
    assert config.model.backbone.type == "ResNet"
    assert config.get("work_dir") is None


def test_another_backbone_has_another_work_dir():
    options = ("--backbone", "small", "--cfg-options", "model.backbone.with_cp=True")
    config = cli.read_config(parse(RETINANET, *options))
    assert config.model.backbone.type == "LaplacianFormer"
    assert config.model.backbone.arch == "small"
    assert config.model.backbone.with_cp  # options count for the new backbone
    assert config.work_dir == "work_dirs/retinanet_r50_fpn_1x_coco_lf-small"


@pytest.mark.parametrize("training", [False, True])
def test_the_new_optimizer_is_news_for_trainings_alone(training, monkeypatch):
    said = []
    monkeypatch.setattr("lf_dense.swap.backbone.print_log", lambda text, **_: said.append(text))
    config = cli.read_config(parse(RETINANET, "--backbone", "tiny"), training=training)
    assert config.optim_wrapper.optimizer.type == "AdamW"
    assert any("SGD" in text for text in said) == training


def test_pretrained_weights_need_a_backbone_of_ours(tmp_path):
    torch.save(LaplacianFormer("tiny").state_dict(), tmp_path / "x.pth")
    with pytest.raises(UsageError, match="add --backbone"):
        cli.read_config(parse(RETINANET, "--pretrained", tmp_path / "x.pth"))
    config = cli.read_config(parse(RETINANET, "--backbone", "tiny", "--pretrained", tmp_path / "x.pth"))
    assert config.model.backbone.init_cfg.checkpoint == str(tmp_path / "x.pth")


def test_trust_is_for_the_weights_that_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_trusted", set())
    torch.save({**LaplacianFormer("tiny").state_dict(), "x": Calls(os.getpid)}, tmp_path / "x.pth")
    arguments = (RETINANET, "--backbone", "tiny", "--pretrained", tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"holds posix\.getpid"):
        cli.read_config(parse(*arguments))
    cli.read_config(parse(*arguments, "--trust-checkpoint"))
    assert reading._trusted == {str(tmp_path / "x.pth")}


def test_the_rank_of_an_older_launcher(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    cli.set_local_rank(parse(RETINANET, "--local-rank", 3).local_rank)
    assert os.environ["LOCAL_RANK"] == "3"
    cli.set_local_rank(0)
    assert os.environ["LOCAL_RANK"] == "3"
    monkeypatch.delenv("LOCAL_RANK")


def test_launchers_are_mmengine_s():
    assert parse(RETINANET).launcher == "none"
    with pytest.raises(SystemExit):
        parse(RETINANET, "--launcher", "rocket")
