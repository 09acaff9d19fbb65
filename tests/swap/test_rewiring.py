"""Necks and heads that read another backbone: what is rewired, and what is refused."""

import pytest

pytest.importorskip("mmengine")
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from lf_dense import swap_backbone
from lf_dense.frameworks import load_config
from lf_dense.swap import SwapError

WIDTHS = [64, 128, 320, 512]


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
        ("mmpretrain::mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py", "MAEViT masks patches"),
        ("mmpretrain::simmim/simmim_swin-base-w6_8xb256-amp-coslr-100e_in1k-192px.py", "masks patches"),
        ("mmpretrain::milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py", "MILANViT masks patches"),
        ("mmpretrain::spark/spark_sparse-resnet50_8xb512-amp-coslr-800e_in1k.py", "masks patches"),
    ],
)
def test_refusals_say_why(name, reason):
    pytest.importorskip(name.partition("::")[0])
    with pytest.raises(SwapError, match=reason):
        swap_backbone(name)


def test_a_neck_of_self_supervision_is_rewired_and_its_predictor_is_not():
    pytest.importorskip("mmpretrain")
    config = swap_backbone("mmpretrain::byol/byol_resnet50_16xb256-coslr-200e_in1k.py")
    assert config.model.backbone.out_indices == (3,)
    assert config.model.neck.in_channels == 512
    assert config.model.head.predictor.in_channels == 256


def test_a_neck_on_the_class_token_pools_the_map():
    pytest.importorskip("mmpretrain")
    name = "mmpretrain::mocov3/mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k.py"
    before = load_config(name).model
    model = swap_backbone(name).model
    assert before.neck.with_avg_pool is False
    assert model.neck == {**before.neck, "in_channels": 512, "with_avg_pool": True}
    assert model.head == before.head


def test_a_user_s_backbone_that_takes_a_mask_is_refused(mmdet):
    @MODELS.register_module(name="lf_dense_test_masking", force=True)
    class Masking(nn.Module):
        def forward(self, x, mask=None):
            return (x,)

    config = load_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py")
    config.model.backbone = {"type": "lf_dense_test_masking"}
    with pytest.raises(SwapError, match="lf_dense_test_masking masks patches of its input"):
        swap_backbone(config)
