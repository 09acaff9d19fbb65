"""Pre-train, publish and fine-tune with the tools.

A detector and a segmentor start with exactly the tensors that were published.
"""

import re
from pathlib import Path

import pytest
import torch

from support.driving import COCO_OPTIONS, call, refusal, unpack_imagenette

pytest.importorskip("mmpretrain")
from lf_dense.weights.reading import read_checkpoint


@pytest.fixture(scope="module")
def imagenette(shared_data, tmp_path_factory) -> Path:
    """A few of the real images, in folders."""
    out = tmp_path_factory.mktemp("imagenette")
    for split in ("train", "val"):
        unpack_imagenette(shared_data, out / split, split, 4)
    return out


@pytest.fixture(scope="module")
def published(imagenette, tmp_path_factory) -> Path:
    """A classifier trained for an epoch and published."""
    out = tmp_path_factory.mktemp("published")
    options = [
        f"data_root={imagenette}",
        "train_cfg.max_epochs=1",
        "param_scheduler.1.begin=0",
        "train_dataloader.batch_size=20",
        "train_dataloader.num_workers=0",
        "train_dataloader.persistent_workers=False",
        "val_dataloader.num_workers=0",
        "val_dataloader.persistent_workers=False",
    ]
    config = "configs/imagenet/lf-tiny_8e_imagenette-64x64.py"
    printed = call("train.py", config, "--work-dir", out / "run", "--cfg-options", *options)
    assert re.search(r"accuracy/top1: [\d.]+", printed)
    call("publish.py", out / "run" / "epoch_1.pth", out / "lf-tiny_imagenette.pth", "--dataset", "Imagenette")
    (path,) = out.glob("lf-tiny_imagenette-*.pth")
    meta = read_checkpoint(str(path))["meta"]
    assert (meta["arch"], meta["dataset"]) == ("tiny", "Imagenette")
    assert "lf-tiny_8e_imagenette-64x64" in meta["recipe"]
    assert "accuracy/top1" in meta["metrics"]
    return path


def backbone_of(path):
    state = read_checkpoint(str(path))["state_dict"]
    return {name: value for name, value in state.items() if name.startswith("backbone.")}


@pytest.mark.parametrize(
    ("config", "framework"),
    [
        ("configs/retinanet_lf.py", "mmdet"),
        ("configs/segmentation/upernet_lf-tiny_160k_ade20k-512x512.py", "mmseg"),
    ],
)
def test_fine_tuning_starts_with_what_was_published(published, shared_data, tmp_path, config, framework):
    """A step at a learning rate of 0 moves no weight, so the checkpoint shows what training started with."""
    pytest.importorskip(framework)
    if framework == "mmdet":
        options = [
            f"data_root={shared_data / 'coco_mini'}",
            *COCO_OPTIONS,
            "train_dataloader.dataset.indices=2",
            "train_dataloader.batch_size=2",
            "train_cfg.max_epochs=1",
            "train_cfg.val_begin=9",
        ]
        checkpoint = "epoch_1.pth"
    else:
        options = [
            f"data_root={shared_data / 'ade20k_real_samples'}",
            "train_cfg.max_iters=1",
            "train_cfg.val_interval=99",
            "default_hooks.checkpoint.interval=1",
            "train_dataloader.batch_size=2",
            "train_dataloader.num_workers=0",
            "train_dataloader.persistent_workers=False",
            "train_dataloader.dataset.pipeline.3.crop_size=(96,96)",
            "model.data_preprocessor.size=(96,96)",
        ]
        checkpoint = "iter_1.pth"
    options += ["optim_wrapper.optimizer.lr=0.0"]
    start = ("--work-dir", tmp_path, "--pretrained", published)
    printed = call("train.py", config, *start, "--cfg-options", *options)
    assert "100.0% of the backbone's numbers" in printed
    started, given = backbone_of(tmp_path / checkpoint), backbone_of(published)
    assert set(started) == set(given)
    assert all(torch.equal(value, given[name]) for name, value in started.items())


def test_damaged_weights_stop_the_training_before_it_starts(published, shared_data, tmp_path):
    (tmp_path / "cut.pth").write_bytes(published.read_bytes()[:1000])
    start = ("--work-dir", tmp_path / "run", "--pretrained", tmp_path / "cut.pth")
    sentence = refusal("train.py", "configs/retinanet_lf.py", *start)
    assert "truncated" in sentence
    assert not list((tmp_path / "run").glob("*.pth"))
