"""Several processes on one machine, by gloo.

They train as one process does, and the job ends and says so when one of them dies.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from support.driving import ROOT, call, environment, refusal, run

pytest.importorskip("mmengine")
pytest.importorskip("mmdet")
if torch.cuda.is_available():
    pytest.skip("these tests start processes on CPUs, and a GPU is visible", allow_module_level=True)

# Nothing is random: in each step all processes together see what one process sees alone.
OPTIONS = (
    "randomness.seed=0",
    "train_dataloader.sampler.shuffle=False",
    "train_dataloader.dataset.pipeline.3.prob=0.0",
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "val_dataloader.num_workers=0",
    "val_dataloader.persistent_workers=False",
    "test_dataloader.num_workers=0",
    "test_dataloader.persistent_workers=False",
    "train_dataloader.dataset.pipeline.2.scale=(96,96)",
    "val_dataloader.dataset.pipeline.1.scale=(96,96)",
    "test_dataloader.dataset.pipeline.1.scale=(96,96)",
    "model.test_cfg.score_thr=0.0",
    "param_scheduler.0.start_factor=0.5",
    "default_hooks.logger.interval=1",
)
CONFIG = str(ROOT / "configs" / "retinanet_lf_demo.py")


# FCOS divides by the number of objects of all processes, and RetinaNet by that of each process.
FCOS = """
_base_ = ["{base}"]
custom_imports = dict(imports=["lf_dense", "support.loss_log"], allow_failed_imports=False)
custom_hooks = [dict(type="LossLog", path="{log}")]
model = dict(
    type="FCOS",
    bbox_head=dict(
        _delete_=True, type="FCOSHead", num_classes=4, in_channels=64, feat_channels=64, stacked_convs=2,
        strides=[8, 16, 32, 64], regress_ranges=((-1, 32), (32, 64), (64, 128), (128, 1e8)),
    ),
)
"""


def job_environment() -> dict[str, str]:
    """A free port for torchrun, and the tests' own hook within reach of the config."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {**environment(), "PORT": str(port), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT / "tests")}


def script(name: str, *arguments: object) -> list[str]:
    return ["bash", str(ROOT / "tools" / name), *map(str, arguments)]


def run_script(name: str, *arguments: object) -> str:
    done = run(script(name, *arguments), job_environment())
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


Trained = tuple[list[float], dict[str, torch.Tensor]]


def train(folder: Path, shapes: Path, processes: int, *options: str) -> Trained:
    """Train twelve steps of four images each, by one process or two; return the losses and the weights."""
    config, log = folder / "config.py", folder / "losses.json"
    config.write_text(FCOS.format(base=CONFIG, log=log))
    lengths = ("train_cfg.max_epochs=4", "train_cfg.val_interval=10")
    batch_size = f"train_dataloader.batch_size={4 // processes}"
    changes = (f"data_root={shapes}", *OPTIONS, batch_size, *lengths, *options)
    arguments = ("--work-dir", folder, "--cfg-options", *changes)
    if processes == 1:
        call("train.py", config, *arguments, env=job_environment())
    else:
        printed = run_script("dist_train.sh", config, processes, *arguments)
        assert "no GPU is visible: torch.distributed runs on CPUs, by gloo." in printed
        # A gloo thread that is alive while the interpreter ends can abort the process.
        # Two processes may write on one line.
        threads = re.findall(r"threads at exit: (\[.*?\])", printed)
        assert len(threads) == processes
        assert not any("gloo" in names for names in threads), threads
    weights = torch.load(folder / "epoch_4.pth", map_location="cpu", weights_only=False)["state_dict"]
    return json.loads(log.read_text()), weights


@pytest.fixture(scope="module")
def alone(tmp_path_factory, shapes):
    folder = tmp_path_factory.mktemp("alone")
    return folder, *train(folder, shapes, 1)


@pytest.mark.parametrize("with_cp", [False, True])
def test_two_processes_train_as_one_does(with_cp, alone, shapes, tmp_path):
    losses, weights = train(tmp_path, shapes, 2, f"model.backbone.with_cp={with_cp}")
    _, expected_losses, expected_weights = alone
    assert len(losses) == len(expected_losses) == 12
    assert losses[-1] != pytest.approx(losses[0], rel=1e-3)
    assert losses[:10] == pytest.approx(expected_losses[:10], abs=1e-4, rel=1e-4)
    assert weights.keys() == expected_weights.keys()
    moved = max((weights[name] - expected_weights[name]).abs().max().item() for name in weights)
    assert moved < 1e-3


def test_checkpointing_in_one_process_changes_nothing(alone, shapes, tmp_path):
    losses, _ = train(tmp_path, shapes, 1, "model.backbone.with_cp=True")
    assert losses == pytest.approx(alone[1], rel=1e-5)


CLASSIFIER = """
_base_ = ["mmpretrain::_base_/default_runtime.py"]
custom_imports = dict(imports=["lf_dense"], allow_failed_imports=False)
data_preprocessor = dict(num_classes=2, mean=[127.5] * 3, std=[64.0] * 3, to_rgb=True)
model = dict(
    type="ImageClassifier",
    backbone=dict(type="LaplacianFormer", arch="tiny", out_indices=(3,), drop_path_rate=0.0),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=2, in_channels=512, topk=(1,)),
)
pipeline = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
dataset = dict(type="CustomDataset", data_root="{data}", pipeline=pipeline)
in_order = dict(type="DefaultSampler", shuffle=False)
train_dataloader = dict(batch_size=4, num_workers=0, sampler=in_order, dataset=dataset)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.01))
train_cfg = dict(by_epoch=True, max_epochs=2)
custom_hooks = [dict(type="EMAHook", momentum=0.5)]
randomness = dict(seed=0)
"""


def test_accumulated_gradients_are_those_of_the_larger_batch(shapes, tmp_path):
    """The checkpoint also has the average of the weights that the config asks for."""
    pytest.importorskip("mmpretrain")
    for index, image in enumerate(sorted((shapes / "train").glob("*.png"))):
        folder = tmp_path / "data" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / image.name).write_bytes(image.read_bytes())
    config = tmp_path / "classifier.py"
    config.write_text(CLASSIFIER.format(data=tmp_path / "data"))
    call("train.py", config, "--work-dir", tmp_path / "whole")
    halves = ("--cfg-options", "train_dataloader.batch_size=2", "optim_wrapper.accumulative_counts=2")
    call("train.py", config, "--work-dir", tmp_path / "halves", *halves)
    whole, halves = (
        torch.load(tmp_path / name / "epoch_2.pth", weights_only=False) for name in ("whole", "halves")
    )
    # mmengine's EMAHook saves the average as the weights, and the weights themselves beside it.
    for name in whole["state_dict"]:
        own = f"module.{name}"
        assert torch.allclose(halves["ema_state_dict"][own], whole["ema_state_dict"][own], atol=1e-5), name
    own_weights = {name: whole["ema_state_dict"][f"module.{name}"] for name in whole["state_dict"]}
    assert any((own_weights[name] != value).any() for name, value in whole["state_dict"].items())


def test_evaluation_by_two_processes(alone, shapes, tmp_path):
    config, checkpoint = alone[0] / "config.py", alone[0] / "epoch_4.pth"
    options = ("--cfg-options", f"data_root={shapes}", *OPTIONS)
    one = call("test.py", config, checkpoint, "--work-dir", tmp_path / "one", *options, env=job_environment())
    two = run_script("dist_test.sh", config, checkpoint, 2, "--work-dir", tmp_path / "two", *options)
    metrics = [re.findall(r"coco/bbox_mAP\w*: ([-\d.]+)", printed)[-6:] for printed in (one, two)]
    assert len(metrics[0]) == 6
    assert metrics[0] == metrics[1]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_process_ends_the_job_and_resume_goes_on(shapes, tmp_path):
    work_dir, log = tmp_path / "run", tmp_path / "printed.txt"
    intervals = ("train_cfg.val_interval=10000", "default_hooks.checkpoint.interval=1")
    changes = (f"data_root={shapes}", *OPTIONS, "train_dataloader.batch_size=2", *intervals)
    training = ("dist_train.sh", CONFIG, 2, "--work-dir", work_dir)
    endless = script(*training, "--cfg-options", *changes, "train_cfg.max_epochs=1000")
    with log.open("w") as stream:
        job = subprocess.Popen(endless, cwd=ROOT, env=job_environment(), stdout=stream, stderr=stream)
    deadline = time.monotonic() + 300
    while not (work_dir / "epoch_2.pth").exists():
        assert job.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = children(job.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert job.wait(timeout=120) != 0
    assert "Signal 9 (SIGKILL)" in log.read_text()
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]

    last = max(int(path.stem.partition("_")[2]) for path in work_dir.glob("epoch_*.pth"))
    one_more = (*changes, f"train_cfg.max_epochs={last + 1}")
    resumed = run_script(*training, "--resume", "--cfg-options", *one_more)
    assert f"resumed epoch: {last}," in resumed
    assert (work_dir / f"epoch_{last + 1}.pth").is_file()


def test_scripts_say_how_they_are_called():
    for name in ("dist_train.sh", "dist_test.sh", "slurm_train.sh"):
        done = run(script(name))
        assert done.returncode == 2
        assert done.stdout.startswith("usage: ")


def test_launchers_without_their_environment(tmp_path):
    for launcher, hint in (("pytorch", "torchrun"), ("slurm", "srun"), ("mpi", "mpirun")):
        line = refusal("train.py", CONFIG, "--launcher", launcher, "--work-dir", tmp_path)
        assert f"--launcher {launcher} needs" in line
        assert hint in line


def test_sync_bn_on_cpus_is_refused(shapes, tmp_path):
    pytest.importorskip("mmseg")
    config = ROOT / "configs" / "segmentation" / "fpn_lf-tiny_4k_camvid-360x360.py"
    prefixes = ("data_prefix.img_path=train", "data_prefix.seg_map_path=semantic/train")
    settings = (f"data_root={shapes}", *prefixes)
    splits = ("train", "val", "test")
    data = [f"{split}_dataloader.dataset.{setting}" for split in splits for setting in settings]
    command = script("dist_train.sh", config, 1, "--work-dir", tmp_path, "--cfg-options", *data)
    done = run(command, job_environment())
    assert done.returncode != 0
    said = "the model has SyncBN (model.decode_head.norm_cfg.type), which torch has for GPUs alone"
    assert said in done.stdout
