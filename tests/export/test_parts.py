"""What is exported of a model, and what is refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

from mmengine.model import revert_sync_batchnorm

from lf_dense.errors import UsageError
from lf_dense.export.parts import choose_part, reference_outputs
from lf_dense.frameworks import load_config
from lf_dense.swap.backbone import swap_backbone
from lf_dense.swap.samples import build_model
from support import ROOT

SMALL = {
    "embed_dims": (16, 32, 48, 64),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 2, 2),
}


def model_of(name):
    return revert_sync_batchnorm(build_model(swap_backbone(name, SMALL))).eval()


@pytest.fixture(scope="module")
def detector():
    return build_model(load_config(str(ROOT / "configs" / "retinanet_lf_demo.py"))).eval()


@pytest.fixture(scope="module")
def segmentor():
    return model_of("mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py")


def test_a_detectors_maps_are_its_heads(detector):
    part = choose_part(detector, "mmdet")
    image = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        scores, offsets = detector(image, mode="tensor")
    outputs = reference_outputs(part.module, image)
    assert len(outputs) == len(part.outputs) == 2 * len(part.postprocess["strides"])
    assert part.outputs[:2] == ("scores_0", "scores_1")
    assert all(torch.equal(out, wanted) for out, wanted in zip(outputs, (*scores, *offsets)))


def test_a_detectors_decoding_is_described(detector):
    settings = choose_part(detector, "mmdet").postprocess
    assert settings["kind"] == "dense_anchors"
    assert settings["num_classes"] == 4
    assert settings["nms_pre"] == 200
    assert settings["score_thr"] == 0.02
    assert settings["strides"] == [[8, 8], [16, 16], [32, 32], [64, 64]]
    wanted = [anchors.tolist() for anchors in detector.bbox_head.prior_generator.base_anchors]
    assert settings["base_anchors"] == wanted


def test_a_segmentors_logits(segmentor):
    part = choose_part(segmentor, "mmseg")
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(part.module(image), segmentor(image, mode="tensor"))
    assert part.postprocess["kind"] == "logits"


def test_a_segmentors_labels_have_the_images_size(segmentor):
    part = choose_part(segmentor, "mmseg", output="labels")
    image = torch.randn(1, 3, 67, 94)
    with torch.no_grad():
        labels = part.module(image)
        logits = segmentor.encode_decode(image, [{"img_shape": (67, 94), "ori_shape": (67, 94)}])
    assert labels.shape == (1, 67, 94)
    assert torch.equal(labels, logits.argmax(1))


def test_a_classifiers_logits():
    model = model_of("mmpretrain::resnet/resnet18_8xb32_in1k.py")
    image = torch.randn(2, 3, 64, 64)
    part = choose_part(model, "mmpretrain")
    with torch.no_grad():
        assert torch.equal(part.module(image), model(image, mode="tensor"))


def test_a_backbone_alone(detector):
    part = choose_part(detector, "mmdet", "backbone")
    image = torch.randn(1, 3, 64, 64)
    assert part.outputs == tuple(f"map_{index}" for index in range(len(detector.backbone.out_indices)))
    with torch.no_grad():
        wanted = detector.backbone(image)
    assert all(map(torch.equal, reference_outputs(part.module, image), wanted))


@pytest.mark.parametrize(
    ("name", "scope", "said"),
    [
        ("mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "mmdet", "is no detector with one dense head"),
        ("mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", "mmdet", "FCOSHead decodes its maps"),
        ("mmdet::atss/atss_r50_fpn_1x_coco.py", "mmdet", "ATSSHead decodes its maps"),
    ],
)
def test_what_is_not_exported_whole_is_refused(name, scope, said):
    model = model_of(name)
    with pytest.raises(UsageError, match=said):
        choose_part(model, scope)
    assert choose_part(model, scope, "backbone").task == "backbone"


def test_other_suppression_is_refused(detector):
    test_cfg = detector.test_cfg
    detector.test_cfg = {**test_cfg, "nms": {"type": "soft_nms", "iou_threshold": 0.5}}
    try:
        with pytest.raises(UsageError, match="nms is soft_nms"):
            choose_part(detector, "mmdet")
    finally:
        detector.test_cfg = test_cfg


def test_windows_are_refused(segmentor):
    test_cfg = segmentor.test_cfg
    segmentor.test_cfg = {**test_cfg, "mode": "slide"}
    try:
        with pytest.raises(UsageError, match="tested in windows"):
            choose_part(segmentor, "mmseg")
    finally:
        segmentor.test_cfg = test_cfg


def test_an_output_that_does_not_exist(detector):
    with pytest.raises(UsageError, match="'masks' does not exist for detection: use one of maps, boxes"):
        choose_part(detector, "mmdet", output="masks")
