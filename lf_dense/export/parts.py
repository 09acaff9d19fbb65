"""What is exported of a model: tensors in, tensors out, no data samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..frameworks import type_name

OUTPUTS = {
    "detection": ("maps", "boxes"),
    "segmentation": ("logits", "labels"),
    "classification": ("logits",),
    "backbone": ("maps",),
}


class Part(NamedTuple):
    """A module that is exported.

    Attributes:
        module: takes images ``(B, C, H, W)``, normalised; returns one tensor or a flat tuple of them.
        task: a key of ``OUTPUTS``.
        outputs: names of what the module returns, in order.
        postprocess: what ``lf_dense.export.Runtime`` does with them.
    """

    module: nn.Module
    task: str
    outputs: tuple[str, ...]
    postprocess: dict[str, Any]


class Backbone(nn.Module):
    """The maps of a model's backbone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = model.backbone

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(image))


class Classifier(nn.Module):
    """``(B, classes)`` before the softmax."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.head(self.model.extract_feat(image))


class Segmentor(nn.Module):
    """``(B, classes, h, w)`` at the head's own resolution, or labels ``(B, H, W)`` at the image's."""

    def __init__(self, model: nn.Module, labels: bool) -> None:
        super().__init__()
        self.model: Any = model
        self.labels = labels

    def forward(self, image: Tensor) -> Tensor:
        maps = self.model.extract_feat(image)
        heads = self.model.decode_head
        heads = list(heads) if isinstance(heads, nn.ModuleList) else [heads]
        logits = heads[0](maps)
        for head in heads[1:]:
            logits = head(maps, logits)
        if not self.labels:
            return logits
        logits = nn.functional.interpolate(
            logits, image.shape[2:], mode="bilinear", align_corners=self.model.align_corners
        )
        return logits.argmax(1)


class DenseDetector(nn.Module):
    """The maps of a dense head: class scores of all levels, then box offsets of all levels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        scores, offsets = self.model.bbox_head(self.model.extract_feat(image))
        return (*scores, *offsets)


def _dense_anchors(head: Any, test_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What ``lf_dense.export.decoding`` needs of an anchor head.

    Raises:
        UsageError: the head decodes its maps in another way.
    """
    from mmdet.models.dense_heads.anchor_head import AnchorHead
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder

    kind = type(head)
    plain = (
        isinstance(head, AnchorHead)
        and kind._predict_by_feat_single is BaseDenseHead._predict_by_feat_single
        and kind.predict_by_feat is BaseDenseHead.predict_by_feat
        and type(head.prior_generator) is AnchorGenerator
        and type(head.bbox_coder) is DeltaXYWHBBoxCoder
    )
    if not plain or kind.forward is not AnchorHead.forward:
        raise UsageError(
            f"the head {kind.__name__} decodes its maps in a way of its own, which is not exported: export "
            "its backbone (--part backbone), or a detector with an anchor head like RetinaNet's."
        )
    nms = dict(test_cfg.get("nms") or {})
    if nms.get("type", "nms") != "nms":
        raise UsageError(
            f"the detector's test_cfg.nms is {nms['type']}, and only the plain 'nms' is exported: set "
            "model.test_cfg.nms.type=nms."
        )
    coder, generator = head.bbox_coder, head.prior_generator
    return {
        "kind": "dense_anchors",
        "num_classes": head.num_classes,
        "activation": "sigmoid" if head.use_sigmoid_cls else "softmax",
        "base_anchors": [anchors.tolist() for anchors in generator.base_anchors],
        "strides": [list(stride) for stride in generator.strides],
        "means": list(map(float, coder.means)),
        "stds": list(map(float, coder.stds)),
        "wh_ratio_clip": 16 / 1000,
        "add_ctr_clamp": coder.add_ctr_clamp,
        "ctr_clamp": coder.ctr_clamp,
        "nms_pre": test_cfg.get("nms_pre", -1),
        "score_thr": float(test_cfg.get("score_thr", 0)),
        "iou_threshold": float(nms.get("iou_threshold", 0.5)),
        "class_agnostic": bool(nms.get("class_agnostic", False)),
        "max_per_img": test_cfg.get("max_per_img", 100),
        "min_bbox_size": test_cfg.get("min_bbox_size", -1),
    }


def _detector(model: Any, output: str) -> Part:
    head = getattr(model, "bbox_head", None)
    if head is None or getattr(model, "roi_head", None) is not None:
        raise UsageError(
            f"{type(model).__name__} is no detector with one dense head, as RetinaNet is, and only those are "
            "exported whole: export its backbone (--part backbone)."
        )
    postprocess = _dense_anchors(head, model.test_cfg)
    levels = len(postprocess["strides"])
    names = [f"{kind}_{level}" for kind in ("scores", "offsets") for level in range(levels)]
    if output == "maps":
        return Part(DenseDetector(model), "detection", tuple(names), postprocess)
    from .detecting import BoxDetector

    module = BoxDetector(DenseDetector(model), postprocess)
    return Part(module, "detection", ("boxes", "scores", "labels"), {"kind": "boxes"})


def _segmentor(model: Any, output: str) -> Part:
    if type(model).__name__ not in ("EncoderDecoder", "CascadeEncoderDecoder"):
        raise UsageError(
            f"{type(model).__name__} is neither an EncoderDecoder nor a cascade of them, and only these are "
            "exported whole: export its backbone (--part backbone)."
        )
    if model.test_cfg.get("mode", "whole") != "whole":
        raise UsageError(
            "the segmentor is tested in windows (model.test_cfg.mode=slide), which an exported one is not: "
            "set model.test_cfg.mode=whole."
        )
    heads = model.decode_head
    head: Any = heads[-1] if isinstance(heads, nn.ModuleList) else heads
    if output == "logits" and head.out_channels != head.num_classes:
        threshold = {"threshold": float(head.threshold)}
    else:
        threshold = {}
    postprocess = {"kind": output, "align_corners": bool(model.align_corners), **threshold}
    return Part(Segmentor(model, output == "labels"), "segmentation", (output,), postprocess)


def _classifier(model: Any, output: str) -> Part:
    if type(model).__name__ != "ImageClassifier":
        raise UsageError(
            f"{type(model).__name__} is no ImageClassifier, and only these are exported whole: export its "
            "backbone (--part backbone)."
        )
    return Part(Classifier(model), "classification", ("logits",), {"kind": "logits"})


_BUILDERS: dict[str, tuple[str, Callable[[Any, str], Part]]] = {
    "mmdet": ("detection", _detector),
    "mmseg": ("segmentation", _segmentor),
    "mmpretrain": ("classification", _classifier),
}


def choose_part(model: nn.Module, scope: str, part: str = "model", output: str | None = None) -> Part:
    """What is exported of a model.

    Args:
        model: of one of the three frameworks, with its weights, in eval mode.
        scope: the framework.
        part: ``"model"`` or ``"backbone"``.
        output: one of ``OUTPUTS`` of the task; None takes the first.

    Raises:
        UsageError: there is no such output, or a model of this kind is not exported whole.
    """
    task, build = ("backbone", _backbone) if part == "backbone" else _BUILDERS[scope]
    output = output or OUTPUTS[task][0]
    if output not in OUTPUTS[task]:
        raise UsageError(
            f"the output {output!r} does not exist for {task}: use one of {', '.join(OUTPUTS[task])}."
        )
    chosen = build(model, output)
    chosen.module.eval()
    return chosen


def _backbone(model: Any, output: str) -> Part:
    module = Backbone(model)
    if type_name({"type": type(module.backbone).__name__}) != "LaplacianFormer":
        raise UsageError(
            f"the backbone is a {type(module.backbone).__name__}, and a LaplacianFormer is exported alone: "
            "add --backbone, or export the whole model."
        )
    count = len(module.backbone.out_indices)
    names = tuple(f"map_{index}" for index in range(count))
    return Part(module, "backbone", names, {"kind": "maps"})


@torch.no_grad()
def reference_outputs(module: nn.Module, image: Tensor) -> list[Tensor]:
    """What the module returns in PyTorch, as a flat list."""
    result = module(image)
    return [result] if isinstance(result, Tensor) else list(result)
