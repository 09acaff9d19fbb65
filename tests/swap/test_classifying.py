"""Classifiers and retrievers: which head and pooling they have after a swap."""

import pytest

pytest.importorskip("mmpretrain")
from mmengine.config import Config

from lf_dense import swap_backbone
from lf_dense.frameworks import load_config
from lf_dense.swap import SwapError, set_pretrained
from lf_dense.swap.samples import build_model, run_model
from lf_dense.swap.settings import backbone_of

RESNET = "mmpretrain::resnet/resnet18_8xb16_cifar10.py"
RETRIEVER = "mmpretrain::arcface/resnet50-arcface_8xb32_inshop.py"


def runs(config):
    model = build_model(config)
    for mode in ("loss", "predict"):
        run_model(model, config, mode, 64, False)
    return True


def test_a_head_that_scores_places_gets_the_map():
    name = "mmpretrain::csra/resnet101-csra_1xb16_voc07-448px.py"
    config = swap_backbone(name)
    assert config.model.neck is None
    assert config.model.head == {**load_config(name).model.head, "in_channels": 512}
    assert runs(config)


def test_generalized_mean_pooling_stays():
    config = load_config(RESNET)
    config.model.neck = {"type": "GeneralizedMeanPooling", "p": 2.0}
    assert swap_backbone(config).model.neck == config.model.neck
    config.model.neck = [{"type": "HRFuseScales", "in_channels": (1, 2)}, {"type": "GlobalAveragePooling"}]
    assert swap_backbone(config).model.neck == {"type": "GlobalAveragePooling"}


@pytest.mark.parametrize(
    ("name", "head", "classes"),
    [
        ("mmpretrain::vgg/vgg11_8xb32_in1k.py", "LinearClsHead", 1000),
        ("mmpretrain::vgg/vgg16_8xb16_voc.py", "MultiLabelLinearClsHead", 20),
        ("mmpretrain::inception_v3/inception-v3_8xb32_in1k.py", "LinearClsHead", 1000),
    ],
)
def test_a_backbone_with_the_last_layer_leaves_it_to_the_head(name, head, classes):
    before = load_config(name).model.head
    after = swap_backbone(name).model.head
    assert after == {**before, "type": head, "in_channels": 512, "num_classes": classes}


def test_grey_images_stay_grey():
    name = "mmpretrain::lenet/lenet5_mnist.py"
    config = swap_backbone(name)
    assert config.model.backbone.in_channels == 1
    assert config.data_preprocessor == load_config(name).data_preprocessor
    assert runs(config)


def test_a_retriever_gets_a_backbone_and_keeps_its_pooling():
    config = swap_backbone(RETRIEVER)
    backbone, pooling = config.model.image_encoder
    assert (backbone.type, backbone.out_indices) == ("LaplacianFormer", (3,))
    assert pooling.type == "GlobalAveragePooling"
    assert config.model.head.in_channels == 512
    assert "backbone" not in config.model
    assert runs(config)
    set_pretrained(config, "https://nowhere.invalid/lf.pth")
    assert backbone_of(config.model).init_cfg.type == "LaplacianPretrained"
    with pytest.raises(SwapError, match="LaplacianFormer already"):
        swap_backbone(config)


def test_refusals_say_why():
    config = load_config(RETRIEVER)
    config.model.image_encoder = {"type": "ResNet", "depth": 18}
    with pytest.raises(SwapError, match="no list of a backbone and its pooling"):
        swap_backbone(config)
    config = load_config(RESNET)
    config.model.head = {"type": "ClsHead"}
    with pytest.raises(SwapError, match="ClsHead does not state in_channels"):
        swap_backbone(config)
    config.model.head = None
    with pytest.raises(SwapError, match="has no head"):
        swap_backbone(config)
    texts = Config({"default_scope": "mmpretrain", "model": {"type": "CLIPZeroShot", "vision_backbone": {}}})
    with pytest.raises(SwapError, match="text side of CLIPZeroShot"):
        swap_backbone(texts)


def test_a_packaged_config_without_a_scope_has_that_of_its_package():
    with pytest.raises(SwapError, match="has no head"):
        swap_backbone("mmpretrain::dinov2/vit-small-p14_dinov2-pre_headless.py")


def test_rules_for_lars_leave_the_optimizer():
    name = "mmpretrain::barlowtwins/barlowtwins_resnet50_8xb256-coslr-300e_in1k.py"
    assert "lars_exclude" in str(load_config(name).optim_wrapper)
    wrapper = swap_backbone(name).optim_wrapper
    assert wrapper.optimizer.type == "AdamW"
    assert "custom_keys" not in wrapper.paramwise_cfg
    assert wrapper.paramwise_cfg.norm_decay_mult == wrapper.paramwise_cfg.bias_decay_mult == 0
