"""Picture files, and the tool that writes them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmengine")
pytest.importorskip("mmcv")
pytest.importorskip("matplotlib")
from mmengine.model import ImgDataPreprocessor

from lf_dense.errors import UsageError
from lf_dense.explain import explain_image
from lf_dense.explain.pictures import write_attention, write_features, write_receptive_fields
from lf_dense.explain.placing import Subject
from lf_dense.frameworks import load_config
from support import ROOT
from support.driving import call, refused
from support.random_weights import save_random_weights

DEMO = "configs/retinanet_lf_demo.py"
TOOL = "visualize_attention.py"


@pytest.fixture
def subject(backbone):
    return Subject(backbone, ImgDataPreprocessor(), ())


def test_a_picture_for_each_query(subject, photo, tmp_path):
    written = write_attention(subject, photo, [(3, 5), (80.5, 59)], tmp_path / "out", stages=[2, 1], heads=3)
    assert [path.name for path, _ in written] == [
        "photo.png_attention_3_5.png",
        "photo.png_heads_3_5.png",
        "photo.png_attention_80.5_59.png",
        "photo.png_heads_80.5_59.png",
    ]
    assert [[row.stage for row in rows] for _, rows in written] == [[1, 2], [3], [1, 2], [3]]
    assert all(Image.open(path).width == 1320 for path, _ in written)


def test_nothing_is_written_where_a_query_is_wrong(subject, photo, tmp_path):
    with pytest.raises(UsageError, match="the query 90,5 lies outside the image of 90 x 60"):
        write_attention(subject, photo, [(3, 5), (90, 5)], tmp_path / "out")
    with pytest.raises(UsageError, match="stage 5 is not there"):
        write_attention(subject, photo, [(3, 5)], tmp_path / "out", heads=5)
    with pytest.raises(UsageError, match="block 2 is not there: stage 1 has"):
        write_attention(subject, photo, [(3, 5)], tmp_path / "out", block=2)
    assert not (tmp_path / "out").exists()


def test_features_and_receptive_fields(subject, photo, tmp_path):
    features = write_features(subject, photo, tmp_path)
    assert features == tmp_path / "photo.png_features.png"
    assert Image.open(features).width == 1320
    path, sides = write_receptive_fields(subject, photo.parent, tmp_path, size=64, limit=1)
    assert path.is_file()
    assert list(sides) == [1, 2, 3, 4]
    with pytest.raises(UsageError, match="the size 31 is too small"):
        write_receptive_fields(subject, photo.parent, tmp_path, size=31)
    with pytest.raises(UsageError, match="0 images"):
        write_receptive_fields(subject, photo.parent, tmp_path, limit=0)


@pytest.fixture(scope="module")
def demo_weights(tmp_path_factory):
    pytest.importorskip("mmdet")
    return save_random_weights(load_config(str(ROOT / DEMO)), tmp_path_factory.mktemp("weights") / "demo.pth")


def test_a_predictor_s_model_is_explained(demo_weights, photo, tmp_path):
    from lf_dense.training.prediction import Predictor

    predictor = Predictor(load_config(str(ROOT / DEMO)), str(demo_weights), "cpu")
    (path,) = explain_image(predictor, photo, [(45, 30)], tmp_path / "out")
    assert path == tmp_path / "out" / "photo.png_attention_45_30.png"
    pixels = np.asarray(Image.open(path))
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 100


def test_the_tool_on_a_detector(demo_weights, photo, tmp_path):
    options = ("--query", "45,30", "--heads", "2", "--features", "--receptive-field", photo.parent)
    said = call(TOOL, DEMO, demo_weights, photo, "--out", tmp_path / "out", *options, "--size", "64")
    assert "correlation of the layer's weights with the exact ones: stage 1 " in said
    assert "initial weights" not in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "photo.png_attention_45_30.png",
        "photo.png_features.png",
        "photo.png_heads_45_30.png",
        "receptive_field.png",
    ]


def test_the_tool_without_a_checkpoint_and_with_another_backbone(photo, tmp_path):
    pytest.importorskip("mmseg")
    config = "mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py"
    options = ("--backbone", "tiny", "--query", "45,30", "--stage", "4")
    said = call(TOOL, config, photo, "--out", tmp_path / "out", *options)
    assert "the pictures show initial weights" in said
    assert (tmp_path / "out" / "photo.png_attention_45_30.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "nothing is to be drawn: give --query X,Y"),
        (("--query", "1,2"), "an image is missing"),
        (("--heads", "2", "--features", "x.png"), "--heads needs a query"),
        (("a.pth", "x.png", "--receptive-field", "."), "the argument x.png is too many"),
        (("gone.png", "--query", "1,2"), "the image gone.png is not there"),
        (("README.md", "--query", "1,2"), "README.md could not be read as an image"),
        (("README.md", "--query", "1,2", "--stage", "7"), "the stage 7 is not there"),
        (("README.md", "--query", "1,2", "--block", "7"), "the block 7 is not there"),
    ],
)
def test_what_the_tool_refuses(arguments, reason, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mmdet")
    assert reason in refused(monkeypatch, capsys, TOOL, DEMO, "--out", tmp_path, *arguments)


def test_a_config_without_a_laplacianformer(photo, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mmdet")
    config = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
    options = ("--query", "1,2", "--out", tmp_path, "--cfg-options", "model.backbone.init_cfg=None")
    said = refused(monkeypatch, capsys, TOOL, config, photo, *options)
    assert "the model RetinaNet holds no LaplacianFormer" in said
    assert "--backbone" in said
