"""Any config with our backbone: what is rewired, what is kept, what is refused, and a sample of all packaged configs run."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from support import ROOT

pytest.importorskip("mmengine")
from mmengine.config import Config
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, init_default_scope

from lf_dense import LaplacianFormer, swap_backbone
from lf_dense.swap.backbone import MEAN, STD
from lf_dense.swap.rewiring import Levels, SwapError, choose_stages, measure_levels, without_pretrained

# One of each kind of neck and head, and of each way to read a backbone.
SAMPLE = (
    "centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py",
    "conditional_detr/conditional-detr_r50_8xb2-50e_coco.py",
    "dino/dino-4scale_r50_8xb2-12e_coco.py",
    "faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py",
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py",
    "reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py",
    "rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py",
    "soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py",
    "solov2/solov2-light_r18_fpn_ms-3x_coco.py",
    "sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py",
    "ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py",
    "yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py",
    "yolox/yolox_nano_8xb8-300e_coco.py",
    "fastfcn/fastfcn_r50-d32_jpu_enc_4xb2-80k_cityscapes-512x1024.py",
    "knet/knet-s3_swin-t_upernet_8xb2-adamw-80k_ade20k-512x512.py",
    "mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py",
    "ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024.py",
    "ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py",
    "point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py",
    "segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py",
    "segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py",
    "segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py",
    "sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024.py",
)
RETINANET = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
WIDTHS = [64, 128, 320, 512]


def build(config):
    init_default_scope(config.default_scope)
    return MODELS.build(without_pretrained(config.model))


@pytest.fixture
def mmdet():
    return pytest.importorskip("mmdet")


@pytest.fixture
def mmseg():
    return pytest.importorskip("mmseg")


# Levels


@pytest.mark.parametrize(
    ("strides", "stages"),
    [
        ((4, 8, 16, 32), (0, 1, 2, 3)),
        ((8, 16, 32), (1, 2, 3)),
        ((16,), (2,)),
        ((8, 32), (1, 3)),
        # Dilated, all of one stride, or with a stride that we do not have: in order, the last one our last.
        ((4, 8, 8, 8), (0, 1, 2, 3)),
        ((16, 16, 16, 16), (0, 1, 2, 3)),
        ((8, 16, 32, 64), (0, 1, 2, 3)),
        ((2, 4, 8), (1, 2, 3)),
        ((8,), (1,)),
        ((64,), (3,)),
    ],
)
def test_stages_for_levels(strides, stages):
    assert choose_stages(Levels((8,) * len(strides), strides)) == stages


def test_decoders_and_five_levels_have_no_stages():
    with pytest.raises(SwapError, match="decoder"):
        choose_stages(Levels((8, 8), (16, 8)))
    with pytest.raises(SwapError, match="5 maps"):
        choose_stages(Levels((8,) * 5, (2, 4, 8, 16, 32)))


def test_levels_are_measured(mmdet):
    resnet = {
        "type": "ResNet",
        "depth": 18,
        "init_cfg": {"type": "Pretrained", "checkpoint": "https://nowhere.invalid/x.pth"},
    }
    assert measure_levels(resnet, "mmdet") == Levels((64, 128, 256, 512), (4, 8, 16, 32))
    assert measure_levels({**resnet, "out_indices": (2,), "strides": (1, 2, 1, 1)}, "mmdet") == Levels(
        (256,), (8,)
    )


@MODELS.register_module(name="lf_dense_test_backbone")
class Custom(nn.Module):
    """A user's own backbone: channels and strides as told, outputs in a list or as one tensor, or no maps at all."""

    def __init__(self, channels=(8, 16), strides=(4, 8), kind="maps", init_cfg=None):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, c, s, s) for c, s in zip(channels, strides))
        self.kind = kind

    def forward(self, x):
        maps = [conv(x) for conv in self.convs]
        if self.kind == "tokens":
            return [m.flatten(2) for m in maps]
        if self.kind == "broken":
            raise RuntimeError("needs a text")
        return maps[0] if self.kind == "one" else maps


def test_any_registered_backbone_is_measured():
    custom = {"type": "lf_dense_test_backbone"}
    assert measure_levels(custom, "mmengine") == Levels((8, 16), (4, 8))
    assert measure_levels({**custom, "kind": "one"}, "mmengine") == Levels((8,), (4,))
    with pytest.raises(SwapError, match="other than maps"):
        measure_levels({**custom, "kind": "tokens"}, "mmengine")
    with pytest.raises(SwapError, match=r"does not run here.*needs a text"):
        measure_levels({**custom, "kind": "broken"}, "mmengine")


# Rewiring


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


def test_neck_channels_in_reverse_and_fewer_levels(mmdet):
    yolo = swap_backbone("mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py")
    assert yolo.model.backbone.out_indices == (1, 2, 3)
    assert yolo.model.neck.in_channels == [512, 320, 128]
    ssd = swap_backbone("mmdet::ssd/ssd300_coco.py")
    assert ssd.model.neck.in_channels == (128, 320)
    assert ssd.model.neck.out_channels == ssd.model.bbox_head.in_channels == (128, 320, 512, 256, 256, 256)


def test_strides_that_a_head_states_follow(mmdet):
    config = swap_backbone("mmdet::rtmdet/rtmdet_l_swin_b_p6_4xb16-100e_coco.py")
    assert config.model.neck.in_channels == WIDTHS
    assert config.model.bbox_head.anchor_generator.strides == [4, 8, 16, 32]
    assert list(config.model.test_cfg) == list(Config.fromfile(config.filename).model.test_cfg)


def test_a_single_dilated_level_without_neck(mmdet):
    model = swap_backbone("mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py").model
    assert model.backbone.out_indices == (2,)
    assert (
        model.rpn_head.in_channels
        == model.roi_head.bbox_head.in_channels
        == model.roi_head.bbox_roi_extractor.out_channels
        == 320
    )
    assert model.roi_head.bbox_roi_extractor.featmap_strides == [16]


def test_chosen_stages_win(mmdet):
    model = swap_backbone("mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py", out_indices=(3,)).model
    assert model.rpn_head.in_channels == 512
    assert (
        model.rpn_head.anchor_generator.strides == model.roi_head.bbox_roi_extractor.featmap_strides == [32]
    )
    with pytest.raises(SwapError, match="read 1 maps: give as many"):
        swap_backbone("mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py", out_indices=(2, 3))


def test_a_tracker_s_detector_is_changed_alone(mmdet):
    config = swap_backbone(
        "mmdet::deepsort/deepsort_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval.py"
    )
    assert config.model.detector.backbone.type == "LaplacianFormer"
    assert config.model.detector.neck.in_channels == WIDTHS
    assert config.model.reid.backbone.type == "mmpretrain.ResNet"
    assert not config.model.detector.get("init_cfg")


def test_segmentation_heads_by_index(mmseg):
    model = swap_backbone("mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py").model
    assert (
        model.decode_head.in_channels,
        model.decode_head.c1_in_channels,
        model.auxiliary_head.in_channels,
    ) == (512, 64, 320)
    assert "pretrained" not in model
    ocr = swap_backbone("mmseg::ocrnet/ocrnet_hr18_4xb2-160k_cityscapes-512x1024.py").model
    assert [head.in_channels for head in ocr.decode_head] == [WIDTHS, WIDTHS]
    # OCR's second head joins the first's output to its own map: both of one size, as both were at stride 8.
    dilated = swap_backbone("mmseg::ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py").model
    assert [(head.in_index, head.in_channels) for head in dilated.decode_head] == [(3, 512), (3, 512)]
    knet = swap_backbone("mmseg::knet/knet-s3_r50-d8_upernet_8xb2-adamw-80k_ade20k-512x512.py").model
    assert knet.decode_head.kernel_generate_head.in_channels == WIDTHS
    assert knet.decode_head.kernel_update_head[0].in_channels == 512


def test_necks_of_segmentation(mmseg):
    jpu = swap_backbone("mmseg::fastfcn/fastfcn_r50-d32_jpu_enc_4xb2-80k_cityscapes-512x1024.py").model
    assert jpu.neck.in_channels == (128, 320, 512)
    assert jpu.decode_head.in_channels == [128, 320, 2048]
    assert jpu.auxiliary_head.in_channels == 320
    vit = swap_backbone("mmseg::vit/vit_deit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py").model
    assert vit.neck is None
    assert (vit.decode_head.in_channels, vit.auxiliary_head.in_channels) == (WIDTHS, 512)


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


# What surrounds the model


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


# Refusals


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mmdet::cornernet/cornernet_hourglass104_10xb5-crop511-210e-mstest_coco.py", "stacks hourglasses"),
        ("mmdet::tridentnet/tridentnet_r50-caffe_1x_coco.py", "three branches"),
        ("mmdet::detectors/cascade-rcnn_r50-rfp_1x_coco.py", "feeds its output back"),
        (
            "mmdet::faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco.py",
            "last stage of the old one over every region",
        ),
        ("mmseg::unet/unet-s5-d16_fcn_4xb4-40k_chase-db1-128x128.py", "encoder and a decoder"),
        ("mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py", "whole segmentation network"),
        ("mmseg::dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py", "class token"),
        ("mmseg::setr/setr_vit-l-mla_8xb1-160k_ade20k-512x512.py", "plain ViT"),
        ("mmpretrain::mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py", "other than maps|does not run"),
    ],
)
def test_refusals_say_why(name, reason):
    pytest.importorskip(name.partition("::")[0])
    with pytest.raises(SwapError, match=reason):
        swap_backbone(name)


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


# Command lines


def run_tool(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_lines_say_what_is_wrong(mmdet, tmp_path):
    result = run_tool(
        "tools/train.py",
        "mmdet::cornernet/cornernet_hourglass104_10xb5-crop511-210e-mstest_coco.py",
        "--backbone",
        "tiny",
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: the backbone cannot be replaced: HourglassNet")
    result = run_tool("tools/train.py", RETINANET, "--pretrained", "x.pth")
    assert result.returncode == 2
    assert "add --backbone" in result.stderr
    result = run_tool("tools/train.py", RETINANET, "--backbone", "tiny", "--pretrained", tmp_path / "x.pth")
    assert result.returncode == 2
    assert f"{tmp_path / 'x.pth'} is not there" in result.stderr
    out = tmp_path / "new.py"
    result = run_tool(
        "tools/swap_config.py",
        RETINANET,
        out,
        "--backbone",
        "small",
        "--backbone-options",
        "drop_path_rate=0.3",
    )
    assert result.returncode == 0, result.stderr
    assert Config.fromfile(out).model.backbone.drop_path_rate == 0.3


def test_a_sample_of_all_packaged_configs(mmdet, mmseg, tmp_path):
    """docs/swapped_configs.md has all of them."""
    out = tmp_path / "results.json"
    result = run_tool("tools/check_swap.py", "--only", *SAMPLE, "--json", out)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    lines = json.loads(out.read_text())
    assert len(lines) == len(SAMPLE)
    assert {line["config"]: line["outcome"] for line in lines if line["outcome"] != "swapped"} == {}


def test_the_table_in_the_documentation_is_whole(mmdet, mmseg):
    from importlib.metadata import version

    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from check_swap import packaged_configs
    finally:
        sys.path.pop(0)
    text = (ROOT / "docs" / "swapped_configs.md").read_text()
    assert "## Failed" not in text
    for package, distribution in (("mmdet", "onedl-mmdetection"), ("mmseg", "onedl-mmsegmentation")):
        if f"{distribution} {version(distribution)}" not in text:
            pytest.skip(f"the table is of another version of {distribution}")
        for name in packaged_configs(package):
            assert f"{package}::{name} " in text
