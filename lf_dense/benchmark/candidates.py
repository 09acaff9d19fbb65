"""What the benchmark of models measures: backbones by name, and whole models by their configs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UsageError
from ..presets import ARCHS
from .step import random_batch

# A config's backbone gives way to ours of this arch: CONFIG@tiny.
SWAP = "@"


class Settings(NamedTuple):
    """One way to run a candidate; what differs in it makes another row.

    Attributes:
        direction: ``"forward"`` or ``"training"`` (forward and backward pass).
        dtype: ``"float32"``, or the dtype of autocast.
        compiled: by torch.compile, a whole model's backbone alone.
        memory: ``"kept"`` between passes, or ``"as it comes"``.
    """

    direction: str
    dtype: str
    compiled: bool
    memory: str


def _mmdet(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from mmdet.models import backbones

        return getattr(backbones, name)(**options)

    return build


def _pvtv2_b2_linear() -> nn.Module:
    """PVTv2-B2-Li: every stage attends to its map averaged over 7 x 7 cells (PVTv2, section 3.2)."""
    backbone = _mmdet("PyramidVisionTransformerV2", embed_dims=64, num_layers=[3, 4, 6, 3])()
    for module in backbone.modules():
        if type(module).__name__ == "SpatialReductionAttention":
            attention: Any = module
            dims = attention.embed_dims
            attention.sr_ratio = 2  # any above 1: it says that keys are reduced
            attention.sr = nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Conv2d(dims, dims, 1))
            attention.norm = nn.Sequential(nn.LayerNorm(dims), nn.GELU())
    return backbone


def _mit_b1() -> nn.Module:
    from mmseg.models.backbones import MixVisionTransformer

    return MixVisionTransformer(embed_dims=64, num_layers=[2, 2, 2, 2], num_heads=[1, 2, 5, 8])


def _convnext() -> nn.Module:
    from mmpretrain.models.backbones import ConvNeXt

    return ConvNeXt("tiny", out_indices=(0, 1, 2, 3), gap_before_final_norm=False)


def _ours(arch: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from ..laplacianformer import LaplacianFormer

        return LaplacianFormer(arch)

    return build


class Backbone(NamedTuple):
    """A backbone by name: how it is called in plots, the package that it needs, and what builds it."""

    label: str
    package: str
    build: Callable[[], nn.Module]


BACKBONES = {
    **{f"lf-{arch}": Backbone(f"LaplacianFormer-{arch.title()}", "mmengine", _ours(arch)) for arch in ARCHS},
    "pvtv2-b1": Backbone(
        "PVTv2-B1",
        "mmdet",
        _mmdet("PyramidVisionTransformerV2", embed_dims=64, num_layers=[2, 2, 2, 2]),
    ),
    "pvtv2-b2": Backbone(
        "PVTv2-B2",
        "mmdet",
        _mmdet("PyramidVisionTransformerV2", embed_dims=64, num_layers=[3, 4, 6, 3]),
    ),
    "pvtv2-b2-li": Backbone("PVTv2-B2-Li", "mmdet", _pvtv2_b2_linear),
    "swin-t": Backbone("Swin-T", "mmdet", _mmdet("SwinTransformer")),
    "resnet-50": Backbone("ResNet-50", "mmdet", _mmdet("ResNet", depth=50)),
    "convnext-t": Backbone("ConvNeXt-T", "mmpretrain", _convnext),
    "mit-b1": Backbone("MiT-B1", "mmseg", _mit_b1),
}
_RETINANET = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
_MASK_RCNN = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
_FPN = "mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py"
_UPERNET = "mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py"
_HIGH = "224x224 512x512 800x1333 1024x2048 2048x2048 2160x3840 4320x7680"
_OTHERS = ["pvtv2-b1", "pvtv2-b2", "pvtv2-b2-li", "swin-t", "resnet-50", "convnext-t", "mit-b1"]
PRESETS: dict[str, tuple[list[str], list[str]]] = {
    "high-resolution": (["lf-tiny", "lf-small", *_OTHERS], _HIGH.split()),
    "models": (
        [f"{config}{swap}" for config in (_RETINANET, _MASK_RCNN, _FPN, _UPERNET) for swap in ("", "@tiny")],
        ["512x512", "800x1333"],
    ),
}


def label_of(name: str) -> str:
    """A candidate's name in plots and tables."""
    if name in BACKBONES:
        return BACKBONES[name].label
    config, _, arch = name.partition(SWAP)
    stem = config.replace("\\", "/").split("/")[-1].removesuffix(".py").split("_")
    return f"{stem[0]}, {f'LaplacianFormer-{arch.title()}' if arch else stem[1] if len(stem) > 1 else ''}"


def check(names: list[str]) -> None:
    """Make sure that each candidate can be built.

    Raises:
        UsageError: a name is no backbone's and no config's, or the package that it needs is not there.
    """
    for name in names:
        if name in BACKBONES:
            if find_spec(BACKBONES[name].package) is None:
                raise UsageError(f"{name} needs {BACKBONES[name].package}, which is not installed.")
        elif not name.partition(SWAP)[0].endswith(".py"):
            raise UsageError(
                f"{name!r} is neither a config (NAME.py, or NAME.py{SWAP}tiny with our backbone in it) nor "
                f"one of the backbones {', '.join(BACKBONES)}."
            )
        else:
            _config(name)


def _config(name: str) -> Any:
    from ..frameworks import load_config
    from ..swap.backbone import swap_backbone

    path, _, arch = name.partition(SWAP)
    config = load_config(path)
    return swap_backbone(config, arch=arch) if arch else config


Pass = Callable[[int, tuple[int, int]], Callable[[], object]]


def build(name: str, settings: Settings, device: torch.device) -> tuple[nn.Module, Pass]:
    """Build a candidate with random weights.

    Returns:
        The model, and a function that takes a batch size and an image size and returns one pass over made-up
        images, which needs no arguments.
    """
    torch.manual_seed(0)
    training = settings.direction == "training"
    model, make = (_backbone if name in BACKBONES else _whole_model)(name, settings, device)

    def make_pass(batch: int, size: tuple[int, int]) -> Callable[[], object]:
        call, narrow = make(batch, size), settings.dtype != "float32"

        def run_pass() -> object:
            with torch.autocast(device.type, getattr(torch, settings.dtype), enabled=narrow):
                if not training:
                    with torch.no_grad():
                        return call()
                loss: Any = call()
            loss.backward()
            model.zero_grad()
            return None

        return run_pass

    return model, make_pass


def _backbone(name: str, settings: Settings, device: torch.device) -> tuple[nn.Module, Pass]:
    model, training = BACKBONES[name].build().to(device), settings.direction == "training"
    # Some of mmdet's backbones return nothing from train().
    model.train(training)
    run: Any = torch.compile(model) if settings.compiled else model

    def make(batch: int, size: tuple[int, int]) -> Callable[[], object]:
        images = torch.randn(batch, 3, *size, device=device)
        return lambda: sum(maps.float().mean() for maps in run(images)) if training else run(images)

    return model, make


def _whole_model(name: str, settings: Settings, device: torch.device) -> tuple[nn.Module, Pass]:
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    from ..frameworks import framework_of
    from ..swap.settings import without_pretrained

    config, training = _config(name), settings.direction == "training"
    init_default_scope(config.default_scope)
    parts = without_pretrained(copy.deepcopy(config.model))
    if config.default_scope == "mmseg":
        # The recipe crops or pads every image to one size.
        parts["data_preprocessor"].update(size=None, size_divisor=32)
    model: Any = revert_sync_batchnorm(MODELS.build(parts)).to(device).train(training)
    if settings.compiled:
        model.backbone = torch.compile(model.backbone)
    make_batch = {"mmdet": _detection_batch, "mmseg": _segmentation_batch}.get(framework_of(config).scope)
    if make_batch is None:
        raise UsageError(f"{name} is neither a detector nor a segmentor: give one, or a backbone.")

    def make(batch: int, size: tuple[int, int]) -> Callable[[], object]:
        made = model.data_preprocessor(make_batch(config, batch, size), training)
        if not training:
            return lambda: model(**made, mode="predict")
        return lambda: model.parse_losses(model(**made, mode="loss"))[0]

    return model, make


def _detection_batch(config: Any, batch: int, size: tuple[int, int]) -> dict[str, Any]:
    masks = "mask" in str(config.model.get("roi_head", {}).get("mask_head", ""))
    return random_batch(batch, size, with_mask=masks)


def _segmentation_batch(config: Any, batch: int, size: tuple[int, int]) -> dict[str, Any]:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    classes = config.model.decode_head.num_classes
    meta = {
        "img_shape": size,
        "ori_shape": size,
        "pad_shape": size,
        "scale_factor": (1.0, 1.0),
        "flip": False,
    }
    samples = []
    for _ in range(batch):
        sample = SegDataSample(metainfo=meta)
        sample.gt_sem_seg = PixelData(data=torch.randint(0, classes, (1, *size)))
        samples.append(sample)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in range(batch)]
    return {"inputs": images, "data_samples": samples}
