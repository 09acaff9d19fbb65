"""Whole runs in tiles: results, going on after an interruption, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
from mmengine.config import Config
from mmengine.structures import PixelData

from lf_dense.errors import UsageError
from lf_dense.frameworks import load_config
from lf_dense.tiling import TileOptions, at_own_scale, drawing, predict_tiled, predicting
from lf_dense.tiling.comparing import Agreement
from lf_dense.tiling.cutting import Tiling
from lf_dense.tiling.journal import FOLDER
from support.driving import call, command, kill_after, refusal, refused
from support.random_weights import save_random_weights

DEMO = "configs/retinanet_lf_demo.py"
CAMVID = "configs/segmentation/fpn_lf-tiny_4k_camvid-360x360.py"
OPTIONS = TileOptions(128, 64)


@pytest.fixture
def image(tmp_path, make_scene):
    pixels, objects = make_scene(300, 400, seed=3, sizes=(4, 50), count=60)
    path = tmp_path / "in" / "deep" / "scene.png"
    path.parent.mkdir(parents=True)
    cv2.imwrite(str(path), pixels)
    return path, pixels, objects


def test_a_detector_s_results(oracle, image, tmp_path):
    _, _, objects = image
    report = predict_tiled(oracle("mmdet"), tmp_path / "in", tmp_path / "out", OPTIONS)
    stored = json.loads(report.result.read_text())
    (record,) = stored["images"].values()
    assert list(stored["images"]) == ["deep/scene.png"]
    assert (record["height"], record["width"]) == (300, 400)
    names = ["red", "green", "blue"]
    found = sorted((names.index(p["class"]), *map(int, p["bbox"])) for p in record["predictions"])
    assert found == objects
    assert all(p["score"] == pytest.approx(0.9) for p in record["predictions"])
    assert Image.open(tmp_path / "out" / "pictures" / "deep" / "scene.png").size == (400, 300)
    assert not (tmp_path / "out" / FOLDER).exists()
    (done,) = report.images
    assert (done.height, done.width, done.larger) == (300, 400, 0)
    assert done.tiles > 4
    assert done.peak_bytes > 2**20


def test_masks_and_pictures_of_large_images(oracle, make_scene, tmp_path):
    from pycocotools import mask as coco_mask

    pixels, objects = make_scene(1200, 2600, seed=1, sizes=(50, 200), count=40)
    cv2.imwrite(str(tmp_path / "large.png"), pixels)
    predictor = oracle("mmdet", masks=True)
    report = predict_tiled(predictor, tmp_path / "large.png", tmp_path / "out", TileOptions(512, 256))
    (record,) = json.loads(report.result.read_text())["images"].values()
    whole = sum(coco_mask.decode(p["mask"]) for p in record["predictions"])
    assert np.array_equal(whole > 0, pixels.max(2) > 0)
    assert len(record["predictions"]) == len(objects)
    assert Image.open(tmp_path / "out" / "pictures" / "large.png").size == (2048, 945)
    shown = predictor.shown.pred_instances
    drawn = shown.masks.any(0).numpy()
    small = cv2.resize(pixels.max(2), (2048, 945), interpolation=cv2.INTER_NEAREST) > 0
    assert (drawn == small).mean() > 0.99
    assert shown.bboxes[:, 2].max() <= 2048


def test_a_picture_shows_the_best_of_many_and_the_tool_says_so(oracle, tmp_path, monkeypatch):
    pixels = np.zeros((90, 300, 3), np.uint8)
    for index in range(20):
        pixels[10:20, 15 * index : 15 * index + 9, index % 3] = 255
    cv2.imwrite(str(tmp_path / "many.png"), pixels)

    class Graded(oracle):
        def detect(self, pixels):
            sample = super().detect(pixels)
            sample.pred_instances.scores = sample.pred_instances.bboxes[:, 0] / 400 + 0.3
            return sample

        def picture(self, name, pixels, sample, score_thr):
            drawn.append(sample.pred_instances.scores)
            return pixels

    drawn = []
    monkeypatch.setattr(drawing, "SHOWN", 7)
    monkeypatch.setattr(predicting, "SHOWN", 7)
    monkeypatch.setattr(drawing, "AT_ONCE", 3)
    report = predict_tiled(Graded("mmdet"), tmp_path / "many.png", tmp_path / "out", TileOptions(512, 0))
    scores = torch.cat(drawn)
    assert [len(part) for part in drawn] == [3, 3, 1]
    (record,) = json.loads(report.result.read_text())["images"].values()
    best = sorted(entry["score"] for entry in record["predictions"])
    assert len(best) == 20
    assert scores.tolist() == pytest.approx(best[-7:])
    assert "; 20 detections, of which the picture has the 7 with the highest scores" in report.text(OPTIONS)


def test_a_segmentor_s_results(oracle, image, tmp_path):
    path, pixels, _ = image
    report = predict_tiled(oracle("mmseg"), path, tmp_path / "out", OPTIONS._replace(whole=True))
    labels = np.array(Image.open(tmp_path / "out" / "labels" / "scene.png"))
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, pixels[..., ::-1].argmax(2))
    (record,) = json.loads(report.result.read_text())["images"].values()
    assert sum(record["classes"].values()) == pytest.approx(1)
    assert record["classes"]["green"] == pytest.approx((labels == 1).mean())
    assert report.images[0].whole.pixels == 1
    assert "100.00% of the pixels are equal" in report.text(OPTIONS)


def test_the_whole_image_beside_the_tiles(oracle, image, tmp_path):
    path, _, objects = image
    report = predict_tiled(oracle("mmdet"), path, tmp_path / "out", OPTIONS._replace(whole=True))
    whole = report.images[0].whole
    assert (whole.matched, *whole.counts) == (len(objects),) * 3
    assert whole.peak_bytes > 2**20
    assert "100.0% of its" in str(whole)


def test_a_whole_image_that_does_not_fit_says_so(oracle, image, tmp_path):
    class Large(oracle):
        def predict(self, pixels):
            if pixels.shape[0] == 300:
                torch.empty(2**50)
            return super().predict(pixels)

    report = predict_tiled(Large("mmdet"), image[0], tmp_path / "out", OPTIONS._replace(whole=True))
    assert report.images[0].whole == Agreement()
    assert "does not fit into this machine's memory" in report.text(OPTIONS)


def test_an_object_larger_than_a_tile_is_said(oracle, tmp_path):
    pixels = np.zeros((300, 500, 3), np.uint8)
    pixels[100:140, 20:480, 2] = 255
    cv2.imwrite(str(tmp_path / "long.png"), pixels)
    report = predict_tiled(oracle("mmdet"), tmp_path / "long.png", tmp_path / "out", OPTIONS)
    (record,) = json.loads(report.result.read_text())["images"].values()
    assert [p["bbox"] for p in record["predictions"]] == [[20, 100, 480, 140]]
    assert "detections that reach across a whole tile of 128 pixels: 1." in report.text(OPTIONS)


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
@pytest.mark.parametrize("fails_at", [0, 3, 9, 29])
def test_an_interrupted_run_goes_on(oracle, make_scene, tmp_path, scope, fails_at):
    for index in range(2):
        cv2.imwrite(str(tmp_path / f"{index}.png"), make_scene(300, 400, seed=index, sizes=(4, 50))[0])
    (tmp_path / "in").mkdir()
    for index in range(2):
        (tmp_path / f"{index}.png").rename(tmp_path / "in" / f"{index}.png")
    whole = oracle(scope)
    expected = predict_tiled(whole, tmp_path / "in", tmp_path / "whole", OPTIONS).result.read_text()
    broken = oracle(scope, fails_at=fails_at)
    with pytest.raises(KeyboardInterrupt):
        predict_tiled(broken, tmp_path / "in", tmp_path / "out", OPTIONS)
    resumed = oracle(scope)
    report = predict_tiled(resumed, tmp_path / "in", tmp_path / "out", OPTIONS)
    assert report.result.read_text() == expected
    # A detector repeats no tile, a segmentor at most the row that it was in.
    repeated = len(broken.seen) + len(resumed.seen) - len(whole.seen)
    columns = len(Tiling.of(300, 400, *OPTIONS[:2]).columns)
    assert 0 <= repeated <= (0 if scope == "mmdet" else columns)
    if scope == "mmseg":
        for index in range(2):
            labels = [tmp_path / run / "labels" / f"{index}.png" for run in ("whole", "out")]
            assert labels[0].read_bytes() == labels[1].read_bytes()


def test_a_line_that_was_cut_off_is_begun_again(oracle, image, tmp_path):
    expected = predict_tiled(oracle("mmdet"), image[0], tmp_path / "whole", OPTIONS).result.read_text()
    with pytest.raises(KeyboardInterrupt):
        predict_tiled(oracle("mmdet", fails_at=5), image[0], tmp_path / "out", OPTIONS)
    (lines,) = (tmp_path / "out" / FOLDER).rglob("*.jsonl")
    lines.write_bytes(lines.read_bytes()[:-20])
    resumed = oracle("mmdet")
    report = predict_tiled(resumed, image[0], tmp_path / "out", OPTIONS)
    assert report.result.read_text() == expected
    assert len(resumed.seen) == report.images[0].tiles - 4


def test_work_that_was_half_removed_is_not_gone_on_with(oracle, image, tmp_path):
    """A kill inside the removal of finished or stale work leaves some of its files."""
    with pytest.raises(KeyboardInterrupt):
        predict_tiled(oracle("mmdet", fails_at=5), image[0], tmp_path / "out", OPTIONS)
    expected = predict_tiled(oracle("mmdet"), image[0], tmp_path / "whole", OPTIONS)
    for name in ("settings.json", "image.json"):
        with pytest.raises(KeyboardInterrupt):
            predict_tiled(oracle("mmdet", fails_at=5), image[0], tmp_path / "out", OPTIONS)
        (path,) = (tmp_path / "out" / FOLDER).rglob(name)
        path.unlink()
        resumed = oracle("mmdet")
        report = predict_tiled(resumed, image[0], tmp_path / "out", OPTIONS)
        assert len(resumed.seen) == expected.images[0].tiles
        assert report.result.read_text() == expected.result.read_text()
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pictures", "predictions.json"]


def test_sizes_at_which_a_picture_is_rounded_up(oracle, tmp_path):
    for height, width in ((2731, 4096), (1, 5000), (5000, 1)):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[:, width // 2 :, 1] = 255
        cv2.imwrite(str(tmp_path / "a.png"), pixels)
        report = predict_tiled(oracle("mmseg"), tmp_path / "a.png", tmp_path / "out", TileOptions(2048, 0))
        (record,) = json.loads(report.result.read_text())["images"].values()
        assert record["classes"]["green"] == pytest.approx((width - width // 2) / width)


def test_one_channel_is_a_probability(oracle, image, tmp_path):
    class Binary(oracle):
        def segment(self, pixels):
            sample = super().segment(pixels)
            sample.seg_logits = PixelData(data=sample.seg_logits.data[1:2] / 255 * 0.6)
            return sample

    predictor = Binary("mmseg")
    predictor.model = SimpleNamespace(
        decode_head=torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()]), out_channels=1
    )
    predictor.model.decode_head[-1].threshold = 0.55
    predict_tiled(predictor, image[0], tmp_path / "out", OPTIONS)
    labels = np.array(Image.open(tmp_path / "out" / "labels" / "scene.png"))
    assert np.array_equal(labels, image[1][..., 1] > 0)


def test_unfinished_work_of_another_command_is_refused(oracle, image, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        predict_tiled(oracle("mmdet", fails_at=2), image[0], tmp_path / "out", OPTIONS)
    with pytest.raises(UsageError, match=r"unfinished work with another overlap \(64, now 32\)"):
        predict_tiled(oracle("mmdet"), image[0], tmp_path / "out", TileOptions(128, 32))
    with pytest.raises(UsageError, match="another scale"):
        predict_tiled(oracle("mmdet"), image[0], tmp_path / "out", OPTIONS, about={"scale": 2})


def test_somebody_else_s_folder_is_left_alone(oracle, image, tmp_path):
    notes = tmp_path / "out" / FOLDER / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(UsageError, match=r"has other files \(notes\.txt\): move them, or give another --out"):
        predict_tiled(oracle("mmdet"), image[0], tmp_path / "out", OPTIONS)
    assert notes.read_text() == "mine"


def test_an_image_that_changed_meanwhile_is_begun_again(oracle, image, make_scene, tmp_path):
    path, _, _ = image
    with pytest.raises(KeyboardInterrupt):
        predict_tiled(oracle("mmdet", fails_at=4), path, tmp_path / "out", OPTIONS)
    pixels, objects = make_scene(300, 400, seed=8, sizes=(4, 50), count=30)
    cv2.imwrite(str(path), pixels)
    report = predict_tiled(oracle("mmdet"), path, tmp_path / "out", OPTIONS)
    (record,) = json.loads(report.result.read_text())["images"].values()
    assert len(record["predictions"]) == len(objects)


def no_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_loses_nothing(oracle, image, tmp_path, monkeypatch):
    path, pixels, _ = image
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(UsageError, match=r"the disk is full .* make room and give the same command"):
            predict_tiled(oracle("mmseg"), path, tmp_path / "out", OPTIONS)
    predictor = oracle("mmseg")
    predict_tiled(predictor, path, tmp_path / "out", OPTIONS)
    labels = np.array(Image.open(tmp_path / "out" / "labels" / "scene.png"))
    assert np.array_equal(labels, pixels[..., ::-1].argmax(2))


def test_a_disk_that_fills_up_on_the_way_loses_no_tile(oracle, image, tmp_path, monkeypatch):
    synced = os.fsync
    seen = []

    def fill_up(descriptor):
        seen.append(descriptor)
        return no_space() if len(seen) == 6 else synced(descriptor)

    first = oracle("mmdet")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill_up)
        with pytest.raises(UsageError, match="the disk is full"):
            predict_tiled(first, image[0], tmp_path / "out", OPTIONS)
    second = oracle("mmdet")
    report = predict_tiled(second, image[0], tmp_path / "out", OPTIONS)
    assert len(second.seen) < report.images[0].tiles
    (record,) = json.loads(report.result.read_text())["images"].values()
    assert len(record["predictions"]) == len(image[2])


def test_files_that_are_no_images_are_named_when_the_others_are_done(oracle, image, tmp_path):
    (tmp_path / "in" / "broken.png").write_text("no image")
    (tmp_path / "in" / "empty.png").touch()
    with pytest.raises(UsageError, match=r"2 of 3 files could not be read as images: .*broken\.png"):
        predict_tiled(oracle("mmdet"), tmp_path / "in", tmp_path / "out", OPTIONS)
    assert list(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == [
        "deep/scene.png"
    ]


def pipeline(config):
    return config.test_dataloader.dataset.pipeline


@pytest.mark.parametrize("path", [DEMO, CAMVID, "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"])
def test_the_pipeline_scales_every_tile_alike(path):
    config = load_config(path)
    steps = len(pipeline(config))
    at_own_scale(config, 1.5)
    scaled = [step for step in pipeline(config) if step["type"] == "Resize"]
    assert scaled == [{"type": "Resize", "scale_factor": 1.5, "keep_ratio": True}]
    assert len(pipeline(config)) == steps


def test_a_pipeline_without_resizing_gets_the_scale():
    config = load_config(DEMO)
    dataset = config.test_dataloader.dataset
    dataset.pipeline = [step for step in dataset.pipeline if step["type"] != "Resize"]
    at_own_scale(config)
    assert [step["type"] for step in pipeline(config)][1] == "Resize"


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("mmdet::ssd/ssd300_coco.py", "resizes every image to 300 x 300 pixels"),
        ("mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py", "makes panoptic maps"),
        ("mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py", "PanopticFPN makes panoptic maps"),
        ("mmpretrain::resnet/resnet50_8xb32_in1k.py", "a classifier looks at an image as a whole"),
    ],
)
def test_models_that_take_no_tiles_are_refused(path, what):
    pytest.importorskip(path.partition(":")[0])
    with pytest.raises(UsageError, match=what):
        at_own_scale(load_config(path))


def resized_by(*steps):
    config = load_config(DEMO)
    dataset = config.test_dataloader.dataset
    rest = [step for step in dataset.pipeline if step["type"] != "Resize"]
    dataset.pipeline = [rest[0], *steps, *rest[1:]]
    at_own_scale(config, 0.5)
    return [step for step in dataset.pipeline if "Resize" in step["type"]]


def test_other_ways_to_resize():
    scaled = [{"type": "Resize", "scale_factor": 0.5, "keep_ratio": True}]
    assert resized_by({"type": "Resize", "scale_factor": 1.0}) == scaled
    # Two steps become one: the factor counts once.
    assert (
        resized_by(
            {"type": "Resize", "scale": (9, 9), "keep_ratio": True}, {"type": "Resize", "scale_factor": 2}
        )
        == scaled
    )
    with pytest.raises(UsageError, match="resizes every image to 640 x 640 pixels"):
        resized_by({"type": "Resize", "scale": 640})


def test_an_instance_model_with_a_panoptic_head_is_taken():
    config = load_config("mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py")
    at_own_scale(config)
    assert [step["type"] for step in pipeline(config)].count("Resize") == 1


def test_factors_that_scale_nothing_are_refused():
    for factor in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--scale has to be above 0"):
            at_own_scale(Config({"default_scope": "mmdet"}), factor)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the demo's detector and of the CamVid segmentor."""
    out = tmp_path_factory.mktemp("weights")
    for name, path in (("det", DEMO), ("seg", CAMVID)):
        torch.manual_seed(0)
        save_random_weights(load_config(path), out / f"{name}.pth")
    return out


def test_options_that_make_no_sense_together_are_refused(weights, image, tmp_path, monkeypatch, capsys):
    start = ["predict.py", DEMO, weights / "det.pth", image[0], "--out", tmp_path / "out"]

    def sentence(*options):
        return refused(monkeypatch, capsys, *start, *options)

    assert "--overlap is for predictions in tiles: give --tile SIZE too" in sentence("--overlap", 32)
    assert "--whole is for predictions in tiles" in sentence("--whole")
    assert "an overlap of 600 pixels does not fit tiles of 512" in sentence("--tile", 512, "--overlap", 600)
    assert "a tile of 20 pixels is too small" in sentence("--tile", 20)
    assert "--scale has to be above 0" in sentence("--tile", 128, "--scale", 0)
    assert "does not go with --show-attention" in sentence("--tile", 128, "--show-attention", "3,3")


def test_a_real_photograph_in_tiles_is_nearly_the_whole_one(weights, shared_data, tmp_path):
    photo = sorted((shared_data / "camvid" / "images" / "validation").glob("*.jpg"))[0]
    options = ["--tile", 256, "--overlap", 96, "--whole", "--out", tmp_path / "seg"]
    printed = call("predict.py", CAMVID, weights / "seg.pth", photo, *options)
    assert "480 x 360 pixels, 6 tiles" in printed
    assert "of the pixels are equal" in printed
    labels = np.array(Image.open(next((tmp_path / "seg" / "labels").iterdir())))
    assert labels.shape == (360, 480)
    # One tile is the whole image: every pixel is equal.
    options = ["--tile", 512, "--whole", "--out", tmp_path / "one"]
    printed = call("predict.py", CAMVID, weights / "seg.pth", photo, *options)
    assert "1 tiles" in printed
    assert "100.00% of the pixels are equal" in printed


def test_a_run_that_is_killed_goes_on(weights, shared_data, tmp_path):
    photo = sorted((shared_data / "hires" / "photos").glob("*flower*"))[0]
    start = ["predict.py", DEMO, weights / "det.pth", photo, "--tile", 512, "--overlap", 64]
    start += [
        "--cfg-options",
        "model.test_cfg.score_thr=0.0",
        "model.test_cfg.max_per_img=5",
        "--score-thr",
        0,
    ]
    work = tmp_path / "out" / FOLDER / "images" / photo.name
    kill_after(command(*start, "--out", tmp_path / "out"), work / "detections.jsonl")
    done = len((work / "detections.jsonl").read_text().splitlines())
    assert done >= 1
    call(*start, "--out", tmp_path / "out")
    call(*start, "--out", tmp_path / "whole")
    results = [tmp_path / name / "predictions.json" for name in ("out", "whole")]
    assert results[0].read_bytes() == results[1].read_bytes()


def test_unfinished_work_is_refused_by_the_tool(weights, shared_data, tmp_path):
    photo = sorted((shared_data / "hires" / "photos").glob("*flower*"))[0]
    start = ["predict.py", DEMO, weights / "det.pth", photo, "--out", tmp_path / "out"]
    work = tmp_path / "out" / FOLDER / "images" / photo.name
    kill_after(command(*start, "--tile", 512), work / "detections.jsonl")
    line = refusal(*start, "--tile", 256)
    assert "has unfinished work with another tile (512, now 256)" in line
