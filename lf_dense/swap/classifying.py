"""Classifiers and retrievers, which read the last map of their backbone, brought in line with another one."""

from __future__ import annotations

from typing import Any

from mmengine.config import ConfigDict

from ..frameworks import type_name
from .errors import SwapError
from .settings import as_list

# Heads on tokens, which become a linear layer on the pooled map.
_TOKEN_HEADS = (
    "VisionTransformerClsHead",
    "DeiTClsHead",
    "ConformerHead",
    "LeViTClsHead",
    "EfficientFormerClsHead",
    "VigClsHead",
)
_HEAD_KEYS = ("num_classes", "loss", "topk", "cal_acc")
# Heads without a layer, for backbones that end in one, and the head that has it instead.
_LAYERLESS_HEADS = {"ClsHead": "LinearClsHead", "MultiLabelClsHead": "MultiLabelLinearClsHead"}
# Heads that score every place of the map, and pool the scores.
_MAP_HEADS = ("CSRAClsHead",)
# Pooling of a map that is worth keeping; any other neck becomes an average.
_POOLING = ("GeneralizedMeanPooling",)


def rewire_classifier(model: dict[str, Any], old: dict[str, Any], width: int) -> list[str]:
    """Let a classifier's head read the last map, pooled.

    Args:
        model: settings of an ``ImageClassifier``; changed in place.
        old: settings of its old backbone.
        width: channels of the last map.

    Returns:
        What its user should know.

    Raises:
        SwapError: the classifier has no head, or nothing says what its head reads.
    """
    head = model.get("head")
    if not head:
        raise SwapError(
            "the backbone cannot be replaced: this classifier has no head, and hands the old one's "
            "features on."
        )
    name = type_name(head)
    model["neck"] = None if name in _MAP_HEADS else _pooling(as_list(model.get("neck")))
    if name in _TOKEN_HEADS:
        kept = {key: head[key] for key in _HEAD_KEYS if key in head}
        model["head"] = ConfigDict(type="LinearClsHead", in_channels=width, **kept)
        return [f"the head {name} read tokens, and is a LinearClsHead now"]
    if name in _LAYERLESS_HEADS and "in_channels" not in head and old.get("num_classes", 0) > 0:
        layer = {"type": _LAYERLESS_HEADS[name], "in_channels": width, "num_classes": old["num_classes"]}
        model["head"] = ConfigDict({**head, **layer})
        return [f"{type_name(old)} had the last layer, and the head is a {layer['type']} now"]
    is_several = name == "MultiTaskHead"
    for part in (head.get("task_heads") or {}).values() if is_several else [head]:
        _set_width(part, width)
    return []


def rewire_retriever(model: dict[str, Any], backbone: dict[str, Any], width: int) -> None:
    """Put a backbone into a retriever's encoder, whose pooled map is what it compares.

    Args:
        model: settings of an ``ImageToImageRetriever`` whose encoder is a list; changed in place.
        backbone: settings of the new backbone.
        width: channels of its last map.

    Raises:
        SwapError: its head does not state what it reads.
    """
    model["image_encoder"] = [ConfigDict(backbone), _pooling(model["image_encoder"][1:])]
    if model.get("head"):
        _set_width(model["head"], width)


def _pooling(necks: list[dict[str, Any]]) -> ConfigDict:
    kept = (neck for neck in necks if type_name(neck) in _POOLING)
    return ConfigDict(next(kept, {"type": "GlobalAveragePooling"}))


def _set_width(head: dict[str, Any], width: int) -> None:
    if "in_channels" not in head:
        raise SwapError(
            f"the backbone cannot be replaced: the head {type_name(head)} does not state in_channels, so "
            "what it reads is unknown."
        )
    head["in_channels"] = width
