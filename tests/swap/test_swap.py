"""Any config with our backbone: what changes, what stays, and what is refused."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from support.driving import call, refusal

pytest.importorskip("mmengine")
from mmengine.config import Config
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, init_default_scope

from lf_dense import LaplacianFormer, swap_backbone
from lf_dense.swap import SwapError
from lf_dense.swap.backbone import MEAN, STD
from lf_dense.swap.settings import without_pretrained

RETINANET = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
WIDTHS = [64, 128, 320, 512]


def build(config):
    init_default_scope(config.default_scope)
    return MODELS.build(without_pretrained(config.model))


def test_retinanet(mmdet):
    config = swap_backbone(RETINANET, drop_path_rate=0.2)
    assert config.model.backbone.type == "LaplacianFormer"
    assert config.model.backbone.drop_path_rate == 0.2
    assert config.model.neck.in_channels == WIDTHS
    assert config.model.bbox_head == Config.fromfile(config.filename).model.bbox_head
    assert "lf_dense" in config.custom_imports["imports"]
    model = build(config)
    assert isinstance(model.backbone, LaplacianFormer)
    assert next(tuple(m.shape[1:]) for m in model.extract_feat(torch.zeros(1, 3, 64, 64))) == (256, 8, 8)


def test_the_given_config_is_not_changed(mmdet):
    config = Config.fromfile(swap_backbone(RETINANET).filename)
    before = config.dump()
    swap_backbone(config)
    assert config.dump() == before


def test_a_tracker_s_detector_is_changed_alone(mmdet):
    config = swap_backbone(
        "mmdet::deepsort/deepsort_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval.py"
    )
    assert config.model.detector.backbone.type == "LaplacianFormer"
    assert config.model.detector.neck.in_channels == WIDTHS
    assert config.model.reid.backbone.type == "mmpretrain.ResNet"
    assert not config.model.detector.get("init_cfg")


def test_classifiers():
    pytest.importorskip("mmpretrain")
    resnet = swap_backbone("mmpretrain::resnet/resnet50_8xb32_in1k.py")
    assert resnet.model.backbone.out_indices == (3,)
    assert resnet.model.head.in_channels == 512
    vit = swap_backbone("mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k.py")
    assert vit.model.head.type == "LinearClsHead"
    assert vit.model.head.loss == Config.fromfile(vit.filename).model.head.loss
    for config in (resnet, vit):
        config.model.data_preprocessor = config.data_preprocessor
        assert build(config)(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)


def test_preprocessing(mmdet):
    caffe = swap_backbone("mmdet::retinanet/retinanet_r50-caffe_fpn_1x_coco.py").model.data_preprocessor
    assert (caffe.mean, caffe.std, caffe.bgr_to_rgb, caffe.pad_size_divisor) == (MEAN, STD, True, 32)
    nested = swap_backbone(
        "mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py"
    ).model
    assert nested.data_preprocessor.data_preprocessor.std == nested.detector.data_preprocessor.std == STD


def test_weights_of_the_old_backbone_are_dropped(mmdet, caplog):
    config = Config.fromfile(swap_backbone(RETINANET).filename)
    config.load_from = "https://nowhere.invalid/retinanet.pth"
    config.model.init_cfg = [{"type": "Pretrained", "checkpoint": "x"}, {"type": "Normal", "layer": "Conv2d"}]
    swapped = swap_backbone(config)
    assert swapped.load_from is None
    assert swapped.model.backbone.init_cfg is None
    assert [init.type for init in swapped.model.init_cfg] == ["Normal"]


def optimizer_groups(config):
    """Every parameter's name, learning rate and weight decay, by the config's own optimizer wrapper."""
    model = build(config)
    wrapper = config.optim_wrapper.to_dict()
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        {
            "type": wrapper.pop("constructor", "DefaultOptimWrapperConstructor"),
            "paramwise_cfg": wrapper.pop("paramwise_cfg", None),
            "optim_wrapper_cfg": {**wrapper, "type": "OptimWrapper"},
        }
    )
    optimizer = constructor(model).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    owners = dict(model.named_modules())
    return {
        name: (
            owners[name.rpartition(".")[0]],
            groups[id(parameter)]["lr"],
            groups[id(parameter)]["weight_decay"],
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def test_sgd_becomes_adamw_without_decay_on_norms_and_biases(mmdet):
    config = swap_backbone("mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py")
    for name, (_, lr, decay) in optimizer_groups(config).items():
        assert lr == 1e-4, name
        undecayed = name.endswith(".bias") or "norm" in name or ".gn." in name
        assert decay == (0.0 if undecayed else 1e-4), name


def test_a_recipe_with_a_slower_backbone_keeps_it(mmdet):
    config = swap_backbone("mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py")
    for name, (owner, lr, decay) in optimizer_groups(config).items():
        if name.startswith("backbone."):
            assert lr == pytest.approx(2e-5), name
            assert decay == (0.0 if name.endswith(".bias") or isinstance(owner, nn.LayerNorm) else 1e-4), name
        elif "sampling_offsets" not in name and "reference_points" not in name:
            assert lr == pytest.approx(2e-4), name


def test_names_of_the_old_backbone_leave_the_optimizer(mmdet):
    config = swap_backbone("mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py")
    keys = config.optim_wrapper.paramwise_cfg.custom_keys
    names = [f"backbone.{name}" for name, _ in LaplacianFormer("tiny").named_parameters()]
    assert all(any(key in name for name in names) for key in keys if key.startswith("backbone"))
    assert keys["backbone"].lr_mult == 0.1
    assert {"query_embed", "level_embed"} <= set(keys)


def test_a_constructor_for_the_old_layers_is_dropped(mmdet):
    config = swap_backbone("mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py")
    assert "constructor" not in config.optim_wrapper
    assert "decay_rate" not in config.optim_wrapper.paramwise_cfg
    assert config.optim_wrapper.type == "AmpOptimWrapper"


def test_learning_rates_of_the_schedule_follow(mmseg):
    before = Config.fromfile(
        swap_backbone("mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py").filename
    )
    after = swap_backbone(before)
    for old, new in zip(before.param_scheduler, after.param_scheduler):
        assert new.eta_min / after.optim_wrapper.optimizer.lr == pytest.approx(
            old.eta_min / before.optim_wrapper.optimizer.lr
        )
        assert {**new, "eta_min": 0} == {**old, "eta_min": 0}


def test_the_new_config_is_self_contained(mmdet, tmp_path):
    config = swap_backbone(RETINANET, "small")
    path = tmp_path / "new.py"
    config.dump(path)
    assert "_base_ =" not in path.read_text()
    code = (
        "from mmengine.config import Config; from mmengine.registry import MODELS, init_default_scope;"
        f"c = Config.fromfile({str(path)!r}); init_default_scope('mmdet'); m = MODELS.build(c.model);"
        "print(type(m.backbone).__name__, sum(m.backbone.depths))"
    )
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.split()[-2:] == ["LaplacianFormer", "19"]


def test_more_refusals(mmdet):
    config = Config.fromfile(swap_backbone(RETINANET).filename)
    with pytest.raises(SwapError, match="LaplacianFormer already"):
        swap_backbone(swap_backbone(config))
    config.model.neck.in_channels = [1, 2, 3, 4]
    with pytest.raises(SwapError, match=r"neck FPN states in_channels=\[1, 2, 3, 4\]"):
        swap_backbone(config)
    config.model.pop("neck")
    with pytest.raises(SwapError, match="nothing in the config states its channels"):
        swap_backbone(config)
    config.pop("model")
    with pytest.raises(SwapError, match="no model"):
        swap_backbone(config)
    with pytest.raises(TypeError, match="drop_path"):
        swap_backbone(RETINANET, drop_path=0.1)
    with pytest.raises(ValueError, match="arch"):
        swap_backbone(RETINANET, "enormous")


def test_command_lines_say_what_is_wrong(mmdet, tmp_path):
    hourglass = "mmdet::cornernet/cornernet_hourglass104_10xb5-crop511-210e-mstest_coco.py"
    line = refusal("train.py", hourglass, "--backbone", "tiny")
    assert line.startswith("error: the backbone cannot be replaced: HourglassNet")
    missing = tmp_path / "x.pth"
    assert "add --backbone" in refusal("train.py", RETINANET, "--pretrained", "x.pth")
    line = refusal("train.py", RETINANET, "--backbone", "tiny", "--pretrained", missing)
    assert f"{missing} is not there" in line
    out = tmp_path / "new.py"
    call("swap_config.py", RETINANET, out, "--backbone", "small", "--backbone-options", "drop_path_rate=0.3")
    assert Config.fromfile(out).model.backbone.drop_path_rate == 0.3


def test_rules_of_the_old_backbone_alone_leave_none(mmdet):
    config = Config.fromfile(swap_backbone(RETINANET).filename)
    config.optim_wrapper.paramwise_cfg = {"custom_keys": {"backbone.layer1": {"lr_mult": 0.1}}}
    assert "custom_keys" not in swap_backbone(config).optim_wrapper.paramwise_cfg
    config.optim_wrapper.paramwise_cfg.custom_keys.neck = {"lr_mult": 0.5}
    assert swap_backbone(config).optim_wrapper.paramwise_cfg.custom_keys == {"neck": {"lr_mult": 0.5}}
