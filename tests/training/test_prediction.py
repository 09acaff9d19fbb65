"""Predictions without a command line: which images are found, what a record holds, what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet")
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData, PixelData

from lf_dense.errors import UsageError
from lf_dense.files import picture_names
from lf_dense.frameworks import load_config
from lf_dense.training.prediction import Predictor, dataset_meta, find_images, predict_images
from support import ROOT
from support.random_weights import save_random_weights

DEMO = "configs/retinanet_lf_demo.py"


def test_images_are_found_below_a_folder(tmp_path):
    for name in ("b.JPG", "a.png", "deep/c.tiff", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["a.png", "b.JPG", "deep/c.tiff"]
    assert find_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]  # what is named is taken
    with pytest.raises(UsageError, match="is not there"):
        find_images(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no image"):
        find_images(tmp_path / "empty")


def bare(scope, classes):
    """A predictor without a model, for what it makes of a sample."""
    predictor = Predictor.__new__(Predictor)
    predictor.scope, predictor.meta = scope, {"classes": classes}
    return predictor


def test_a_detection_s_record():
    masks = torch.zeros(2, 4, 6, dtype=torch.bool)
    masks[0, 1:3, 2:5] = True
    instances = InstanceData(
        bboxes=torch.tensor([[2.0, 1.0, 5.0, 3.0], [0.0, 0.0, 1.0, 1.0]]),
        scores=torch.tensor([0.9, 0.2]),
        labels=torch.tensor([1, 0]),
        masks=masks,
    )
    sample = DetDataSample(pred_instances=instances)
    (found,) = bare("mmdet", ["cat", "dog"]).record(sample, score_thr=0.5)["predictions"]
    assert found["class"] == "dog"
    assert found["score"] == pytest.approx(0.9)
    assert found["bbox"] == [2.0, 1.0, 5.0, 3.0]
    from pycocotools import mask as coco_mask

    assert np.array_equal(coco_mask.decode(found["mask"]).astype(bool), masks[0].numpy())
    json.dumps(found)


def test_a_segmentation_s_record():
    sample = DetDataSample()
    sample.pred_sem_seg = PixelData(data=torch.tensor([[[0, 0, 2, 0]]]))
    record = bare("mmseg", ["road", "car", "sky"]).record(sample, score_thr=0.5)
    assert record == {"classes": {"road": 0.75, "sky": 0.25}}


def test_a_label_without_a_name_has_its_number():
    sample = DetDataSample()
    sample.pred_sem_seg = PixelData(data=torch.tensor([[[0, 0, 1, 0]]]))
    assert bare("mmseg", ["road"]).record(sample, 0.5) == {"classes": {"road": 0.75, "class 1": 0.25}}


def test_a_source_inside_the_results_is_no_source(tmp_path):
    save_image(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"lies in .*, where results go: give another --out"):
        predict_images(bare("mmdet", ["cat"]), tmp_path / "a.png", tmp_path)


def test_a_classification_s_record():
    sample = DetDataSample()
    sample.set_field(torch.tensor([0.1, 0.7, 0.2]), "pred_score", dtype=torch.Tensor)
    found = bare("mmpretrain", ["a", "b", "c"]).record(sample, score_thr=0.5)["predictions"]
    assert [entry["class"] for entry in found] == ["b", "c", "a"]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """The demo's detector with random weights, and a threshold that lets some boxes through."""
    config = load_config(DEMO, {"model.test_cfg.score_thr": 0.0})
    path = save_random_weights(config, tmp_path_factory.mktemp("weights") / "demo.pth")
    return Predictor(config, str(path), "cpu")


def test_a_png_keeps_its_name_and_no_two_pictures_share_one():
    names = ("a.jpg", "a.png", "deep/b.PNG", "c.jpg", "c.jpg.png", "c.jpg.png.png")
    found = {str(image): str(picture) for image, picture in picture_names(map(Path, names)).items()}
    assert found == {
        "a.jpg": "a.jpg.png",
        "a.png": "a.png",
        "deep/b.PNG": "deep/b.PNG",
        "c.jpg": "c.jpg.png",
        "c.jpg.png": "c.jpg.png.png",
        "c.jpg.png.png": "c.jpg.png.png.png",
    }


def save_image(path, height=70, width=50):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)).save(path)


def test_pictures_and_records_have_the_images_names(predictor, tmp_path):
    for name in ("in/a.jpg", "in/a.png", "in/deep/b.png"):
        save_image(tmp_path / name)
    result = predict_images(predictor, tmp_path / "in", tmp_path / "in" / "out", score_thr=0.0)
    images = json.loads(result.read_text())["images"]
    assert set(images) == {"a.jpg", "a.png", "deep/b.png"}
    assert all((record["height"], record["width"]) == (70, 50) for record in images.values())
    drawn = [path for path in (tmp_path / "in" / "out" / "pictures").rglob("*") if path.is_file()]
    assert {path.name for path in drawn} == {"a.jpg.png", "a.png", "b.png"}
    # The pictures lie below the source, and are no input of a second call.
    again = json.loads(predict_images(predictor, tmp_path / "in", tmp_path / "in" / "out").read_text())
    assert set(again["images"]) == set(images)


def test_pixels_are_predicted_as_their_file_is(predictor, tmp_path):
    save_image(tmp_path / "a.png")
    pixels = cv2.imread(str(tmp_path / "a.png"))
    of_file, of_pixels = predictor.predict(tmp_path / "a.png"), predictor.predict(pixels)
    assert len(of_file.pred_instances) > 0
    assert torch.equal(of_pixels.pred_instances.bboxes, of_file.pred_instances.bboxes)
    assert torch.equal(of_pixels.pred_instances.scores, of_file.pred_instances.scores)
    assert of_pixels.ori_shape == of_file.ori_shape == (70, 50)


def test_boxes_lie_within_the_image_and_are_drawn_without_warnings(predictor, tmp_path):
    save_image(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*out of bounds")
        result = predict_images(predictor, tmp_path / "a.png", tmp_path / "out", score_thr=0.0)
    boxes = [found["bbox"] for found in json.loads(result.read_text())["images"]["a.png"]["predictions"]]
    assert any(50 in box[::2] or 70 in box[1::2] for box in boxes)  # some end at the border
    assert all(0 <= box[0] <= box[2] <= 50 and 0 <= box[1] <= box[3] <= 70 for box in boxes)


def test_something_else_is_done_for_each_image_and_its_refusal_comes_last(predictor, tmp_path):
    for name in ("in/a.png", "in/deep/b.png"):
        save_image(tmp_path / name)
    done = []

    def also(image, name):
        done.append((image, name.as_posix()))
        if len(done) == 1:
            raise UsageError("the point lies outside")

    with pytest.raises(UsageError, match="the point lies outside"):
        predict_images(predictor, tmp_path / "in", tmp_path / "out", also=also)
    assert done == [(tmp_path / "in" / name, name) for name in ("a.png", "deep/b.png")]
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == 2


def test_files_that_are_no_images_are_named_after_the_others_are_done(predictor, tmp_path):
    save_image(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"1 of 2 files could not be read as images: .*bad\.png"):
        predict_images(predictor, tmp_path / "in", tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == {"good.png"}


def test_classes_have_to_be_known_from_somewhere(tmp_path):
    config = load_config(DEMO)
    config.test_dataloader.dataset.metainfo = {}
    path = save_random_weights(config, tmp_path / "x.pth")
    with pytest.raises(UsageError, match="names the classes: set test_dataloader"):
        Predictor(config, str(path), "cpu")


def test_classes_that_only_the_data_set_knows():
    pytest.importorskip("mmseg")
    config = load_config(str(ROOT / "configs" / "segmentation" / "fpn_lf-tiny_80k_ade20k-512x512.py"))
    meta = dataset_meta(config, {}, "a checkpoint")
    assert len(meta["classes"]) == len(meta["palette"]) == 150
