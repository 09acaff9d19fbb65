"""Made-up samples for the models of the three frameworks, and a model that runs on one."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from ..frameworks import type_name
from .settings import class_of, image_channels, nested, without_pretrained

# Pixels, small first: some models select hundreds of tokens or pool with large windows, and need more.
SIZES = (128, 320)
# Settings of training and prediction whose high values cost time and show nothing on a small image.
_MOST = {"nms_pre": 200, "max_per_img": 100}
_BRANCHES = ("sup", "unsup_teacher", "unsup_student")
# What a runner keeps, and some heads ask for.
_PROGRESS = {"iter": 0, "epoch": 0, "max_iters": 10, "max_epochs": 1}
_REID_SIZE = (256, 128)
_CLASSIFICATION_SIZE = (64, 64)
# Views of an image after the first group of them are this much smaller.
_SMALLER = 2
# What a retriever compares an image with.
_GALLERY = 4
# What detectors by text look for.
_WORDS = ("car", "cat", "dog", "person")

Batch = dict[str, Any]


def build_model(config: Config) -> Any:
    """A config's model on the CPU; no weights are fetched."""
    init_default_scope(config.get("default_scope"))
    settings = without_pretrained(copy.deepcopy(config.model))
    if config.get("data_preprocessor") and "data_preprocessor" not in settings:
        settings["data_preprocessor"] = copy.deepcopy(config.data_preprocessor)
    # Small images stay small: recipes pad to their crop, or resize batches.
    if config.default_scope == "mmseg":
        settings["data_preprocessor"].update(size=None, size_divisor=1, test_cfg=None)
    elif settings.get("data_preprocessor"):
        settings["data_preprocessor"].pop("batch_augments", None)
    if "prototype" in settings and settings.get("head"):
        # The recipe's gallery is a set of images, which need not be here.
        settings["prototype"] = torch.rand(_GALLERY, settings["head"]["in_channels"])
    for part in nested([settings.get("train_cfg"), settings.get("test_cfg")]):
        for key, most in _MOST.items():
            if isinstance(part.get(key), int):
                part[key] = min(part[key], most)
    return revert_sync_batchnorm(MODELS.build(settings))


def try_sizes(model: Any, config: Config, mode: str) -> Exception | None:
    """Run a model on made-up samples until it takes one; None then, otherwise the last error.

    Small images come before large ones, and samples with masks before those without.
    """
    error = None
    for size, masks in itertools.product(SIZES, (True, False)):
        try:
            run_model(model, config, mode, size, masks)
        except Exception as problem:
            error = problem
        else:
            return None
    return error


def run_model(model: Any, config: Config, mode: str, size: int, masks: bool) -> None:
    """Run a model on one made-up sample.

    Args:
        model: what ``build_model`` returned.
        config: the config that it comes from.
        mode: ``loss`` (a backward pass follows) or ``predict``. Self-supervised models, which predict
            nothing, return their features then.
        size: width and height of the image in pixels.
        masks: whether instances have masks.

    Raises:
        ValueError: the loss is not finite, or no gradient reaches the backbone.
    """
    torch.manual_seed(0)
    MessageHub.get_current_instance().update_info_dict(dict(_PROGRESS))
    training = mode == "loss"
    model.train(training)
    model.zero_grad()
    data = model.data_preprocessor(made_up_data(config, training, size, masks), training)
    if mode == "predict" and _learns_from_views(config):
        mode = "tensor"
    with torch.set_grad_enabled(training):
        result = model(**data, mode=mode)
    if training:
        total, _ = model.parse_losses(result)
        _check_loss(model, total)


def _check_loss(model: Any, total: Tensor) -> None:
    if not torch.isfinite(total):
        raise ValueError(f"the loss is {total.item()}")
    total.backward()
    gradients = (parameter.grad for parameter in _backbone(model).parameters())
    if not any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients):
        raise ValueError("no gradient reaches the backbone")


def _backbone(model: Any) -> Any:
    if hasattr(model, "backbone"):
        return model.backbone
    if hasattr(model, "image_encoder"):
        return model.image_encoder[0]
    return (model.detector if hasattr(model, "detector") else model.student).backbone


def made_up_data(config: Config, training: bool, size: int, masks: bool) -> Batch:
    """A batch of the form that the model of a config takes.

    Args:
        config: a config with a model.
        training: two images for training, or one for prediction; trackers and classifiers always get two,
            and re-identification gets four.
        size: width and height in pixels. Classifiers and re-identification have sizes of their own.
        masks: whether instances have masks.
    """
    if config.default_scope == "mmseg":
        return _segmentation_data(config.model, 2 if training else 1, size)
    if config.default_scope == "mmpretrain":
        if training and _learns_from_views(config):
            return _views(config.model)
        return _classification_data(config)
    preprocessor = type_name(config.model.get("data_preprocessor"))
    if preprocessor == "ReIDDataPreprocessor" or type_name(config.model) == "BaseReID":
        return _reid_data()
    if preprocessor == "TrackDataPreprocessor":
        return _tracking_data(config.model, size, masks)
    data = _detection_data(config.model, 2 if training else 1, size, masks)
    if preprocessor == "MultiBranchDataPreprocessor" and training:
        return _multi_branch_data(data)
    return data


def _image(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def count_classes(settings: Any) -> int:
    """The smallest number of classes that any head states, so that every label fits each."""
    stated = (part.get(key) for part in nested(settings) for key in ("num_classes", "num_things_classes"))
    return min((count for count in stated if isinstance(count, int) and count > 0), default=1)


def _segmentation_data(model: dict[str, Any], count: int, size: int) -> Batch:
    from mmseg.structures import SegDataSample

    heads = model["decode_head"]
    classes = max(2, count_classes(heads[-1] if isinstance(heads, (list, tuple)) else heads))
    mean = (model.get("data_preprocessor") or {}).get("mean")
    channels = len(mean) if mean else model["backbone"].get("in_channels", 3)
    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), (size, size))
    inputs, samples = [], []
    for _ in range(count):
        inputs.append(_image(channels, size, size))
        sample = SegDataSample(metainfo={**shapes, "scale_factor": 1.0, "flip": False})
        sample.gt_sem_seg = PixelData(data=torch.randint(0, classes, (1, size, size)))
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def _classification_data(config: Config) -> Batch:
    from mmpretrain.structures import DataSample

    model = config.model
    classes = count_classes(model.get("head"))
    preprocessor = model.get("data_preprocessor") or config.get("data_preprocessor")
    images = [_image(image_channels(model, preprocessor), *_CLASSIFICATION_SIZE) for _ in range(2)]
    samples = [DataSample().set_gt_label(int(torch.randint(0, classes, ()))) for _ in range(2)]
    # Self-supervised models take a list for views of one batch.
    return {"inputs": torch.stack(images) if _learns_from_views(config) else images, "data_samples": samples}


def _learns_from_views(config: Config) -> bool:
    """Whether a model is self-supervised, and learns from several views of each image."""
    if config.default_scope != "mmpretrain":
        return False
    from mmpretrain.models import BaseSelfSupervisor

    kind = class_of(config.model, "mmpretrain")
    return kind is not None and issubclass(kind, BaseSelfSupervisor)


def _views(model: dict[str, Any]) -> Batch:
    """Two images in as many views as the head states, two otherwise; the first ones are the largest."""
    from mmpretrain.structures import DataSample

    stated = (part["num_crops"] for part in nested(model.get("head")) if "num_crops" in part)
    inputs = []
    for group, count in enumerate(next(stated, [2])):
        size = [side // _SMALLER**group for side in _CLASSIFICATION_SIZE]
        inputs += [_image(2, 3, *size) for _ in range(count)]
    return {"inputs": inputs, "data_samples": [DataSample() for _ in range(2)]}


def _reid_data() -> Batch:
    """Two images of each of two persons."""
    from mmdet.structures import ReIDDataSample

    samples = [ReIDDataSample().set_gt_label(index % 2) for index in range(4)]
    return {"inputs": [_image(3, *_REID_SIZE) for _ in range(4)], "data_samples": samples}


def _tracking_data(model: dict[str, Any], size: int, masks: bool) -> Batch:
    """One video of a key frame and a reference frame."""
    from mmdet.structures import TrackDataSample

    sample = TrackDataSample()
    sample.video_data_samples = [_detection_sample(model, size, masks, frame) for frame in range(2)]
    sample.set_metainfo({"key_frames_inds": [0], "ref_frames_inds": [1], "ori_video_length": 2})
    return {"inputs": [_image(2, 3, size, size)], "data_samples": [sample]}


def _detection_data(model: dict[str, Any], count: int, size: int, masks: bool) -> Batch:
    samples = [_detection_sample(model, size, masks, index) for index in range(count)]
    return {"inputs": [_image(3, size, size) for _ in range(count)], "data_samples": samples}


def _multi_branch_data(data: Batch) -> Batch:
    """One batch for every branch of a semi-supervised model."""
    return {
        "inputs": dict.fromkeys(_BRANCHES, data["inputs"]),
        "data_samples": {branch: copy.deepcopy(data["data_samples"]) for branch in _BRANCHES},
    }


def _without_others(model: dict[str, Any]) -> dict[str, Any]:
    """A model's settings without those of teachers and re-identification, whose classes are others."""
    return {key: value for key, value in model.items() if not key.startswith(("teacher", "reid"))}


def _boxes(count: int, size: int) -> Tensor:
    """Boxes inside an image, each 15 to 45 % of its width and height."""
    corner = torch.rand(count, 2) * size * 0.5
    return torch.cat([corner, corner + size * (0.15 + 0.3 * torch.rand(count, 2))], 1)


def _instances(classes: int, size: int, with_masks: bool) -> InstanceData:
    from mmdet.structures.mask import BitmapMasks

    boxes = _boxes(4, size)
    labels = torch.randint(0, classes, (len(boxes),))
    instances = InstanceData(bboxes=boxes, labels=labels, instances_ids=torch.arange(len(boxes)))
    if with_masks:
        masks = np.zeros((len(boxes), size, size), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
            mask[y1:y2, x1:x2] = 1
        instances.masks = BitmapMasks(masks, size, size)
    return instances


def _detection_meta(size: int, frame: int) -> dict[str, Any]:
    shape_keys = ("img_shape", "ori_shape", "pad_shape", "batch_input_shape")
    return {
        "img_id": frame,
        "img_path": "made_up.png",
        **dict.fromkeys(shape_keys, (size, size)),
        "scale_factor": (1.0, 1.0),
        "flip": False,
        "flip_direction": None,
        "border": [0, size, 0, size],
        "frame_id": frame,
        "ori_video_length": 2,
        "homography_matrix": np.eye(3, dtype=np.float32),
    }


def _detection_sample(model: dict[str, Any], size: int, with_masks: bool, frame: int) -> Any:
    from mmdet.structures import DetDataSample

    classes = count_classes(_without_others(model))
    sample = DetDataSample(metainfo=_detection_meta(size, frame))
    if model.get("language_model"):
        classes = min(classes, len(_WORDS))
        sample.set_metainfo({"text": " . ".join(_WORDS), "custom_entities": True})
    sample.gt_instances = _instances(classes, size, with_masks)
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    # HTC's semantic branch learns from maps of an eighth of the size, the panoptic heads from whole ones.
    scale = 8 if type_name(model) in ("HybridTaskCascade", "SCNet") else 1
    stuff = torch.randint(0, min(classes, 255), (1, size // scale, size // scale), dtype=torch.uint8)
    sample.gt_sem_seg = PixelData(sem_seg=stuff)
    if type_name(model) == "FastRCNN":
        sample.proposals = InstanceData(
            bboxes=_boxes(20, size), scores=torch.rand(20), labels=torch.zeros(20, dtype=torch.long)
        )
    return sample
