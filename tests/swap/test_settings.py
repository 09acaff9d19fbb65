"""The settings of a model: where its backbone is, what class it has, and the channels of its images."""

import pytest
from torch import nn

pytest.importorskip("mmengine")
from mmengine.config import Config

from lf_dense.swap.settings import adopt_scope, backbone_of, class_of, image_channels


def test_where_a_backbone_is():
    backbone = {"type": "ResNet"}
    assert backbone_of({"backbone": backbone}) == backbone
    assert backbone_of({"detector": {"backbone": backbone}}) == backbone
    assert backbone_of({"image_encoder": [backbone, {"type": "GlobalAveragePooling"}]}) == backbone
    assert backbone_of({"image_encoder": backbone}) is None
    assert backbone_of({}) is None


def test_a_scope_is_adopted_where_there_is_none():
    config = Config({"model": {}})
    adopt_scope(config, "lf_dense")
    assert config.get("default_scope") is None
    adopt_scope(config, "mmpretrain")
    adopt_scope(config, "mmdet")
    assert config.default_scope == "mmpretrain"


def test_classes_of_components(mmdet):
    assert class_of({"type": "RetinaNet"}, "mmdet").__name__ == "RetinaNet"
    assert class_of({"type": "mmdet.RetinaNet"}, "mmdet").__name__ == "RetinaNet"
    assert class_of({"type": nn.Conv2d}, "mmdet") is nn.Conv2d
    assert class_of({"type": "lf_dense_nobody"}, "mmdet") is None
    assert class_of({}, "mmdet") is None


@pytest.mark.parametrize(
    ("backbone", "preprocessor", "channels"),
    [
        ({}, None, 3),
        ({}, {"mean": [1.0, 2.0, 3.0]}, 3),
        ({}, {"mean": [1.0]}, 1),
        ({"in_channels": 6}, {"mean": [1.0]}, 6),
    ],
)
def test_channels_of_images(backbone, preprocessor, channels):
    assert image_channels({"backbone": backbone}, preprocessor) == channels
