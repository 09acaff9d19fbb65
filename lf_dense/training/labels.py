"""Labels that do not fit the model's classes are an error with a sentence, not a silent loss."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from ..errors import UsageError
from ..frameworks import datasets_of, type_name

# COCO's own file has 450 MB and the classes that its dataset has by default: it is not read twice.
_LARGE_FILE = 64 * 2**20


def _shown(names: Iterable[Any]) -> str:
    names = list(names)
    return ", ".join(map(str, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def check_coco_classes(config: Config, splits: tuple[str, ...]) -> None:
    """Compare the classes of a config's COCO sets with the categories of their annotation files.

    mmdet drops annotations of other categories without a word, and numbers classes in the file's order,
    whatever the config's is.

    Raises:
        UsageError: a class is not in the file, or they are in another order there.
    """
    for key, dataset in datasets_of(config, splits):
        path = Path(dataset.get("data_root") or "", dataset.get("ann_file") or "")
        if type_name(dataset) != "CocoDataset" or not path.is_file():
            continue
        classes = (dataset.get("metainfo") or {}).get("classes")
        if classes is None:
            if path.stat().st_size > _LARGE_FILE:
                continue
            from mmdet.datasets import CocoDataset

            classes = CocoDataset.METAINFO["classes"]
        classes = [classes] if isinstance(classes, str) else list(classes)
        names = [category["name"] for category in json.loads(path.read_bytes())["categories"]]
        missing = [name for name in classes if name not in names]
        if missing:
            raise UsageError(
                f"{path} ({key}) has no category {_shown(missing)}, which the config names; it has "
                f"{_shown(names)}: set *_dataloader.dataset.metainfo.classes to those that you want, and "
                "num_classes of the heads to their number."
            )
        in_file = [name for name in names if name in classes]
        if in_file != classes:
            raise UsageError(
                f"{key} lists its classes as {_shown(classes)}, and mmdet numbers them as {path} does, "
                f"{_shown(in_file)}: list them in that order, or every prediction has another's name."
            )
        ignored = [name for name in names if name not in classes]
        if ignored:
            print_log(
                f"categories of {path} that are not used: {_shown(ignored)}.",
                logger="current",
                level=logging.WARNING,
            )


def check_head_classes(model: nn.Module, classes: Sequence[str]) -> None:
    """Compare the number of classes of a detector's heads with its data's.

    Raises:
        UsageError: a head has another number.
    """
    for name, module in model.named_modules():
        count = getattr(module, "num_classes", None)
        if (
            not isinstance(count, int)
            or not type(module).__name__.endswith("Head")
            or "rpn" in name
            or "semantic" in name
        ):
            continue
        if count != len(classes):
            raise UsageError(
                f"the {type(module).__name__} {name} has num_classes={count}, and the data has {len(classes)}"
                f" classes ({_shown(classes)}): set num_classes to that."
            )


def unwrapped(model: Any) -> Any:
    """A model without its wrapper for distributed data."""
    return model.module if is_model_wrapper(model) else model


class LabelCheckHook(Hook):
    """Compares labels and heads: a detector's once, before training, and other models' labels batch by batch.

    Args:
        scope: the framework's registry scope.
    """

    priority = "VERY_HIGH"

    def __init__(self, scope: str) -> None:
        self.scope = scope

    def before_train(self, runner: Runner) -> None:
        classes = getattr(runner.train_dataloader.dataset, "metainfo", {}).get("classes")
        if self.scope == "mmdet" and classes:
            check_head_classes(unwrapped(runner.model), classes)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.scope == "mmdet" or not isinstance(data_batch, dict):
            return
        model = unwrapped(runner.model)
        for sample in data_batch.get("data_samples") or ():
            if self.scope == "mmseg" and "gt_sem_seg" in sample:
                self._check_map(model, sample)
            elif self.scope == "mmpretrain" and "gt_label" in sample:
                self._check_label(model, sample)

    @staticmethod
    def _check_map(model: Any, sample: Any) -> None:
        head: Any = (
            model.decode_head[-1] if isinstance(model.decode_head, nn.ModuleList) else model.decode_head
        )
        labels = sample.gt_sem_seg.data
        wrong = labels[(labels >= head.num_classes) & (labels != head.ignore_index)]
        if wrong.numel():
            path = sample.metainfo.get("seg_map_path", sample.metainfo.get("img_path"))
            raise UsageError(
                f"the label map {path} has the class {int(wrong.max())}, and the model has {head.num_classes}"
                f" classes, 0 to {head.num_classes - 1} ({head.ignore_index} is ignored): set num_classes of "
                "the heads, or reduce_zero_label where 0 stands for nothing and classes start at 1."
            )

    @staticmethod
    def _check_label(model: nn.Module, sample: Any) -> None:
        count = getattr(getattr(model, "head", None), "num_classes", None)
        label = torch.as_tensor(sample.gt_label)
        if isinstance(count, int) and label.numel() and int(label.max()) >= count:
            raise UsageError(
                f"the image {sample.metainfo.get('img_path')} has the class {int(label.max())}, and the model"
                f" has {count} classes, 0 to {count - 1}: set model.head.num_classes to the number of classes"
                " of the data."
            )
