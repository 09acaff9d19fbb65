"""The tools, driven as a user drives them: as subprocesses, on real images or on the embedded set."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.driving import COCO_OPTIONS, ROOT, call, command, environment, kill_after, refusal, refused

pytest.importorskip("mmengine")

RETINANET = "configs/retinanet_lf.py"


def train_through_a_kill(config: str, work_dir: Path, options: tuple[str, ...], iterations: int) -> Path:
    """Train three epochs with a SIGKILL after the first, and return the last checkpoint.

    When training resumes, a newer but torn checkpoint lies in its way.
    """
    intervals = ("train_cfg.val_interval=1", "default_hooks.checkpoint.interval=1")
    options = (*options, "train_cfg.max_epochs=3", *intervals)
    training = command("train.py", config, "--work-dir", work_dir, "--cfg-options", *options)
    kill_after(training, work_dir / "epoch_1.pth")
    assert not (work_dir / "epoch_3.pth").exists()

    whole = (work_dir / "epoch_1.pth").read_bytes()
    torn = work_dir / "epoch_2.pth"
    torn.write_bytes(whole[: len(whole) // 2])
    (work_dir / "last_checkpoint").write_text(str(torn))
    leftover = work_dir / ".epoch_2.pth.abcdefgh"
    leftover.write_bytes(whole[:100])
    resumed = call("train.py", config, "--resume", "--work-dir", work_dir, "--cfg-options", *options)
    assert f"passed over: the checkpoint {torn}" in resumed
    assert f"resumed epoch: 1, iter: {iterations}" in resumed
    assert re.search(rf"Epoch\(train\) +\[2\]\[1/{iterations}\]", resumed)
    assert not re.search(r"Epoch\(train\) +\[1\]", resumed)
    assert re.search(r"coco/bbox_mAP_50: \d", resumed)
    assert not leftover.exists()
    return work_dir / "epoch_3.pth"


def test_demo_config_survives_a_kill(shapes, tmp_path):
    pytest.importorskip("mmdet")
    options = (
        f"data_root={shapes}",
        "model.test_cfg.score_thr=0.0",
        "default_hooks.logger.interval=1",
        "train_dataloader.batch_size=3",
    )
    config = "configs/retinanet_lf_demo.py"
    assert train_through_a_kill(config, tmp_path / "run", options, iterations=4).is_file()


def test_retinanet_on_real_images_survives_a_kill_and_predicts(shared_data, tmp_path):
    """The README's config runs on COCO with --cfg-options alone.

    It trains, evaluates, saves, is killed, resumes past a torn file, and then tests and predicts.
    """
    pytest.importorskip("mmdet")
    coco = shared_data / "coco_mini"
    options = (f"data_root={coco}", *COCO_OPTIONS)
    checkpoint = train_through_a_kill(RETINANET, tmp_path / "run", options, iterations=4)
    outputs = ("--work-dir", tmp_path / "test", "--out", tmp_path / "raw.pkl")
    tested = call("test.py", RETINANET, checkpoint, *outputs, "--cfg-options", *options)
    assert re.search(r"coco/bbox_mAP_50: \d", tested)
    assert (tmp_path / "raw.pkl").stat().st_size > 0

    images = tmp_path / "images"
    images.mkdir()
    for image in sorted((coco / "val2017").iterdir())[:2]:
        (images / image.name).symlink_to(image)
    (images / "broken.jpg").write_bytes(b"this is no picture")
    out = tmp_path / "out"
    all_scores = ("--score-thr", 0.0, "--device", "cpu", "--cfg-options", "model.test_cfg.score_thr=0.0")
    sentence = refusal("predict.py", RETINANET, checkpoint, images, "--out", out, *all_scores)
    assert "1 of 3 files could not be read as images" in sentence
    assert "broken.jpg" in sentence
    result = json.loads((out / "predictions.json").read_text())
    assert len(result["classes"]) == 80
    assert len(result["images"]) == 2
    for name, record in result["images"].items():
        assert (out / "pictures" / f"{name}.png").stat().st_size > 0
        assert record["predictions"]
        for found in record["predictions"]:
            x1, y1, x2, y2 = found["bbox"]
            assert 0 <= x1 <= x2 <= record["width"]
            assert 0 <= y1 <= y2 <= record["height"]
            assert found["class"] in result["classes"]

    demo = ("configs/retinanet_lf_demo.py", checkpoint)
    sentence = refusal("test.py", *demo, "--cfg-options", f"data_root={tmp_path}")
    assert "test_dataloader.dataset.ann_file" in sentence
    sentence = refusal("predict.py", *demo, images, "--out", out)
    assert "does not fit the config's model" in sentence
    cut = tmp_path / "cut.pth"
    cut.write_bytes(checkpoint.read_bytes()[:-100])
    sentence = refusal("predict.py", RETINANET, cut, images, "--out", out)
    assert "truncated" in sentence


def test_a_box_at_the_border_has_no_error_of_float32():
    pytest.importorskip("mmdet")
    import torch
    from mmengine.structures import InstanceData

    from lf_dense.training.prediction import Predictor

    # 426 pixels, scaled to 108 and back.
    border = torch.tensor(108.0) / torch.tensor(108 / 426)
    assert border > 426
    found = InstanceData(
        bboxes=torch.stack([torch.tensor([0.0, 1.2345, 2.0, border])]),
        scores=torch.ones(1),
        labels=torch.zeros(1),
    )
    (record,) = Predictor._instances(found, ["cat"], 0.5)
    assert record["bbox"] == [0.0, 1.23, 2.0, 426.0]


def test_demo_in_short_form(tmp_path):
    pytest.importorskip("mmdet")
    printed = call("demo.py", "--work-dir", tmp_path, "--epochs", 1)
    assert "box AP50 on held-out images" in printed
    for name in ("predictions.png", "curves.png", "predictions/predictions.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert len(json.loads((tmp_path / "predictions/predictions.json").read_text())["images"]) == 80


def clip_of(images: Path, out: Path) -> Path:
    """A video of three frames, 96 x 96."""
    import cv2

    writer = cv2.VideoWriter(str(out), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 96))
    for image in sorted(images.iterdir())[:3]:
        writer.write(cv2.imread(str(image)))
    writer.release()
    return out


def frames_of(out: Path) -> list[dict]:
    """The records of a predicted video, after a look at its drawn frames."""
    import cv2

    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    capture = cv2.VideoCapture(str(out / "pictures.mkv"))
    for _ in records:
        there, picture = capture.read()
        assert there
        assert picture.shape == (96, 96, 3)
    assert not capture.read()[0]
    return records


@pytest.fixture(scope="module")
def demo_checkpoint(tmp_path_factory) -> Path:
    """The demo's detector with random weights that find something everywhere."""
    pytest.importorskip("mmdet")
    import torch

    from lf_dense.frameworks import load_config
    from lf_dense.swap.samples import build_model

    model = build_model(load_config(str(ROOT / "configs" / "retinanet_lf_demo.py")))
    model.init_weights()
    for parameter in (model.bbox_head.retina_cls.weight, model.bbox_head.retina_reg.weight):
        torch.nn.init.normal_(parameter, std=0.05)
    torch.nn.init.constant_(model.bbox_head.retina_cls.bias, -2.0)
    path = tmp_path_factory.mktemp("checkpoint") / "demo.pth"
    torch.save({"state_dict": model.state_dict(), "meta": {}}, path)
    return path


def test_prediction_says_where_things_are_and_nothing_else(demo_checkpoint, shapes, tmp_path):
    """Without the ``-W ignore`` of other tests."""
    tool = [sys.executable, str(ROOT / "tools" / "predict.py"), "configs/retinanet_lf_demo.py"]
    arguments = [demo_checkpoint, shapes / "val", "--out", tmp_path, "--device", "cpu", "--score-thr", 0.1]
    done = subprocess.run(
        [*tool, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"wrote {tmp_path / 'predictions.json'} and the pictures beside it\n"
    assert done.stderr == ""
    records = json.loads((tmp_path / "predictions.json").read_text())["images"].values()
    assert all(len(record["predictions"]) > 5 for record in records)


def test_a_video_is_predicted_and_a_bad_one_refused(demo_checkpoint, shapes, tmp_path):
    clip = clip_of(shapes / "val", tmp_path / "clip.mp4")
    demo = ("predict.py", "configs/retinanet_lf_demo.py", demo_checkpoint)
    printed = call(*demo, clip, "--out", tmp_path / "out", "--device", "cpu", "--score-thr", 0.1)
    (line,) = printed.splitlines()
    assert line.startswith("predicted 3 frames: ")
    assert all(record["predictions"] for record in frames_of(tmp_path / "out"))
    clip.write_bytes(b"no video")
    assert "cannot be decoded as a video" in refusal(*demo, clip, "--out", tmp_path / "out")


def test_attention_is_drawn_beside_predictions(demo_checkpoint, shapes, tmp_path):
    pytest.importorskip("lf_dense.explain")
    image = sorted((shapes / "val").iterdir())[0]
    demo = ("predict.py", "configs/retinanet_lf_demo.py", demo_checkpoint)
    points = ("--show-attention", "30,40", "--show-attention", "5.5,5")
    call(*demo, image, "--out", tmp_path, "--device", "cpu", *points)
    assert len(list((tmp_path / "attention").glob("*.png"))) == 2
    assert (tmp_path / "predictions.json").is_file()
    assert (tmp_path / "pictures" / image.name).is_file()


@pytest.mark.parametrize(
    ("source", "point", "reason"),
    [
        ("x.png", "30;40", "--show-attention 30;40 is no point: give X,Y"),
        ("x.png", "1,2,3", "--show-attention 1,2,3 is no point: give X,Y"),
        ("camera:0", "3,4", "--show-attention is for images"),
    ],
)
def test_points_that_have_no_attention(source, point, reason, monkeypatch, capsys):
    pytest.importorskip("mmdet")
    arguments = ("configs/retinanet_lf_demo.py", "x.pth", source, "--out", "x", "--show-attention", point)
    assert reason in refused(monkeypatch, capsys, "predict.py", *arguments)


def test_tensorboard_gets_the_losses(shapes, tmp_path):
    pytest.importorskip("mmdet")
    pytest.importorskip("tensorboard")
    options = (f"data_root={shapes}", "train_cfg.max_epochs=1", "default_hooks.logger.interval=1")
    demo = ("train.py", "configs/retinanet_lf_demo.py", "--work-dir", tmp_path)
    call(*demo, "--tensorboard", "--cfg-options", *options)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tmp_path.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events))
    log.Reload()
    assert len(log.Scalars("loss")) == 3


SEGMENTATION = """
_base_ = ["mmseg::_base_/models/fpn_r50.py", "mmseg::_base_/default_runtime.py"]
custom_imports = dict(imports=["lf_dense"])
classes = ("background", "disk", "rectangle", "triangle", "ring")
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    pretrained=None,
    backbone=dict(_delete_=True, type="LaplacianFormer", arch="tiny"),
    neck=dict(in_channels=[64, 128, 320, 512]),
    decode_head=dict(num_classes=5, norm_cfg=norm_cfg),
)
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
palette = [[40 * i, 255 - 40 * i, 90] for i in range(5)]
dataset = dict(
    type="BaseSegDataset",
    data_root="{data}",
    img_suffix=".png",
    metainfo=dict(classes=classes, palette=palette),
    data_prefix=dict(img_path="train", seg_map_path="semantic/train"),
    pipeline=[*load, dict(type="PackSegInputs")],
)
held_out = dict(**{{**dataset, "data_prefix": dict(img_path="val", seg_map_path="semantic/val")}})
in_order = dict(type="DefaultSampler", shuffle=False)
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type="InfiniteSampler"), dataset=dataset)
val_dataloader = dict(batch_size=1, num_workers=0, sampler=in_order, dataset=held_out)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-4))
train_cfg = dict(type="IterBasedTrainLoop", max_iters=3, val_interval=3)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=3),
    logger=dict(type="LoggerHook", interval=1, log_metric_by_epoch=False),
)
"""

CLASSIFICATION = """
_base_ = ["mmpretrain::_base_/default_runtime.py"]
custom_imports = dict(imports=["lf_dense"])
data_preprocessor = dict(num_classes=2, mean=[127.5] * 3, std=[64.0] * 3, to_rgb=True)
model = dict(
    type="ImageClassifier",
    backbone=dict(type="LaplacianFormer", arch="tiny", out_indices=(3,)),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=2, in_channels=512, topk=(1,)),
)
pipeline = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
dataset = dict(type="CustomDataset", data_root="{data}", pipeline=pipeline)
shuffled, in_order = (dict(type="DefaultSampler", shuffle=shuffle) for shuffle in (True, False))
train_dataloader = dict(batch_size=4, num_workers=0, sampler=shuffled, dataset=dataset)
val_dataloader = dict(batch_size=4, num_workers=0, sampler=in_order, dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-4))
train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
val_cfg = dict()
test_cfg = dict()
"""


def says_where_things_are(printed: str, work_dir: Path, checkpoint: Path) -> bool:
    """Whether a training says at its start and end where its files are, and they are there."""
    (start,) = re.findall(r"log: (\S+); checkpoints: (\S+); curves.*: (\S+)", printed)
    (end,) = re.findall(r"last checkpoint: (\S+); curves: (\S+); log: (\S+); config.*: (\S+)", printed)
    assert start == (end[2], str(work_dir), end[1])
    assert end[0] == str(checkpoint)
    return all(Path(path).exists() for path in (*start, *end)) and "was not drawn" not in printed


def test_segmentation_by_the_same_tools(shapes, tmp_path):
    pytest.importorskip("mmseg")
    config = tmp_path / "semantic_fpn.py"
    config.write_text(SEGMENTATION.format(data=shapes))
    trained = call("train.py", config, "--work-dir", tmp_path / "run")
    assert re.search(r"mIoU: [\d.]+", trained)
    checkpoint = tmp_path / "run" / "iter_3.pth"
    assert says_where_things_are(trained, tmp_path / "run", checkpoint)
    outputs = ("--work-dir", tmp_path / "test", "--show-dir", tmp_path / "drawn")
    tested = call("test.py", config, checkpoint, *outputs)
    assert re.search(r"mIoU: [\d.]+", tested)
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 4
    out = tmp_path / "out"
    call("predict.py", config, checkpoint, shapes / "val", "--out", out, "--device", "cpu")
    result = json.loads((out / "predictions.json").read_text())
    assert len(result["images"]) == 4
    for name, record in result["images"].items():
        assert sum(record["classes"].values()) == pytest.approx(1)
        assert (out / "labels" / name).is_file()
        assert (out / "pictures" / name).is_file()
    clip = clip_of(shapes / "val", tmp_path / "clip.mp4")
    call("predict.py", config, checkpoint, clip, "--out", tmp_path / "video", "--device", "cpu")
    for record in frames_of(tmp_path / "video"):
        assert sum(record["classes"].values()) == pytest.approx(1)


def test_classification_by_the_same_tools(shapes, tmp_path):
    pytest.importorskip("mmpretrain.apis", exc_type=ImportError)
    data = tmp_path / "folders"
    for index, image in enumerate(sorted((shapes / "train").iterdir())):
        folder = data / ("even", "odd")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / image.name).symlink_to(image)
    config = tmp_path / "classifier.py"
    config.write_text(CLASSIFICATION.format(data=data))
    trained = call("train.py", config, "--work-dir", tmp_path / "run")
    assert "accuracy/top1" in trained
    checkpoint = tmp_path / "run" / "epoch_1.pth"
    assert says_where_things_are(trained, tmp_path / "run", checkpoint)
    outputs = ("--work-dir", tmp_path / "test", "--show-dir", tmp_path / "drawn")
    assert "accuracy/top1" in call("test.py", config, checkpoint, *outputs)
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 12
    out = tmp_path / "out"
    image = sorted((shapes / "val").iterdir())[0]
    call("predict.py", config, checkpoint, image, "--out", out, "--device", "cpu")
    (record,) = json.loads((out / "predictions.json").read_text())["images"].values()
    assert sum(found["score"] for found in record["predictions"]) == pytest.approx(1, abs=1e-5)
    assert (out / "pictures" / image.name).is_file()
    clip = clip_of(shapes / "val", tmp_path / "clip.mp4")
    call("predict.py", config, checkpoint, clip, "--out", tmp_path / "video", "--device", "cpu")
    assert all(len(frame["predictions"]) == 2 for frame in frames_of(tmp_path / "video"))


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("train.py", [RETINANET, "--cfg-options", "data_root=/nowhere"], "/nowhere is not there"),
        ("train.py", ["configs/no_such.py"], "'configs/no_such.py' is not there"),
        ("train.py", ["mmdet::no/such.py"], "cannot be read"),
        ("train.py", ["mmwrong::no/such.py"], "none of lf_dense, mmdet, mmseg, mmpretrain"),
        ("train.py", ["mmdet::_base_/models/retinanet_r50_fpn.py"], "has no train_dataloader"),
        ("test.py", [RETINANET, "no_such.pth"], "no_such.pth is not there"),
        ("predict.py", [RETINANET, "no.pth", "no_such_folder", "--out", "x"], "no_such_folder is not there"),
        ("predict.py", [RETINANET, "no.pth", "configs", "--out", "x"], "holds no image"),
        ("plot_curves.py", ["configs"], "holds no log"),
        ("make_shapes.py", ["--size", "3"], "64 pixels"),
    ],
)
def test_what_cannot_work_is_one_sentence(tool, arguments, said):
    pytest.importorskip("mmdet")
    assert said in refusal(tool, *arguments)


def test_resume_and_amp_refusals(shapes, tmp_path):
    pytest.importorskip("mmdet")
    torch = pytest.importorskip("torch")
    base = ("configs/retinanet_lf_demo.py", "--work-dir", tmp_path, "--cfg-options", f"data_root={shapes}")
    assert "there is nothing to resume" in refusal("train.py", *base[:3], "--resume", *base[3:])
    assert "is not there" in refusal("train.py", *base[:3], "--resume", tmp_path / "gone.pth", *base[3:])
    (tmp_path / "epoch_1.pth").write_bytes(b"PK\x03\x04 cut off")
    assert "there is nothing to resume" in refusal("train.py", *base[:3], "--resume", *base[3:])
    assert "truncated" in refusal("train.py", *base[:3], "--resume", tmp_path / "epoch_1.pth", *base[3:])
    without_base = (*base[:3], "--auto-scale-lr", *base[3:], "auto_scale_lr={}")
    assert "base_batch_size" in refusal("train.py", *without_base)
    if not torch.cuda.is_available():
        assert "--amp needs a GPU" in refusal("train.py", *base[:3], "--amp", *base[3:])


def test_a_training_step_has_the_same_losses_by_both_backends(tmp_path):
    pytest.importorskip("mmdet")
    figures = tmp_path / "step.json"
    call("benchmark.py", "step", "--shape", 96, 128, "--repeat", 1, "--device", "cpu", "--json", figures)
    losses = json.loads(figures.read_text())["first_losses"]
    assert set(losses["native"]) >= {"loss_cls", "loss_bbox"}
    for name, value in losses["native"].items():
        assert value == pytest.approx(losses["reference"][name], rel=1e-5)


def test_the_detector_trains_through_the_native_backend_by_default():
    pytest.importorskip("mmdet")
    code = """
import torch
from lf_dense.backends import native
from lf_dense.frameworks import load_config
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
assert native.library_obstacle("cpu") is None, native.library_obstacle("cpu")
calls = []
operator = native.laplacian_attention
native.laplacian_attention = lambda *args: calls.append(args) or operator(*args)
model = MODELS.build(load_config("configs/retinanet_lf.py").model)
data = model.data_preprocessor(demo_mm_inputs(1, [(3, 64, 96)], [2], 80), True)
model.loss(data["inputs"], data["data_samples"])["loss_bbox"][0].backward()
print("CALLS", len(calls))
"""
    python = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(python, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "CALLS 8" in done.stdout


def test_the_step_of_what_is_no_detector_is_refused():
    pytest.importorskip("mmseg")
    assert "is not a detector's config" in refusal(
        "benchmark.py", "step", "mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py"
    )
