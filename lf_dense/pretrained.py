"""Pretrained weights of a LaplacianFormer: reading them safely, finding the backbone among them, and saying what arrived."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.fileio import get_local_path
from mmengine.logging import HistoryBuffer, print_log
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from .checkpoints import check_checkpoint, is_remote
from .errors import UsageError

# Below this share of the backbone's numbers a load is taken for a mistake.
MIN_SHARE = 0.9
_FIRST_KEY = "stages.0.patch_embed.proj.weight"
_CONTAINERS = ("state_dict", "model", "state_dict_ema")


def _history_method(owner: Any, name: str) -> Any:
    """Stands for ``getattr`` while a file is read: mmengine's logs name methods of their own class, and nothing else may."""
    if owner is not HistoryBuffer:
        raise ValueError(f"it asks for the attribute {name!r} of {owner!r}")
    return getattr(owner, name)


# What mmengine keeps beside the weights: logs of numbers.
_SAFE_CLASSES = [
    HistoryBuffer,
    (_history_method, "builtins.getattr"),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")},
    # numpy 2 has moved its modules, and files are older and newer than the move.
    *((np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


class LoadReport(NamedTuple):
    """What a load did, by names of the backbone's tensors (``taken``, ``left``) and of the file's (``unused``).

    ``left`` gives for each tensor that keeps its initial values why it does.
    """

    source: str
    taken: tuple[str, ...]
    left: dict[str, str]
    unused: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        text = f"{len(self.taken)} tensors ({self.share:.1%} of the backbone's numbers) taken from {self.source}"
        if self.left:
            first = ", ".join(f"{name} ({reason})" for name, reason in list(self.left.items())[:3])
            text += f"; {len(self.left)} left at initialisation: {first}{', ...' if len(self.left) > 3 else ''}"
        if self.unused:
            text += f"; {len(self.unused)} of the file's not used: {', '.join(self.unused[:3])}{', ...' if len(self.unused) > 3 else ''}"
        return text


def read_checkpoint(source: str) -> dict[str, Any]:
    """Read a checkpoint as plain data: no code in it is run.

    Args:
        source: a path, an address, or one of mmengine's prefixes.

    Raises:
        UsageError: it is not there, damaged, or holds objects beyond tensors and plain values.
    """
    if not is_remote(source):
        check_checkpoint(source)
    allowed = torch.serialization.safe_globals(_SAFE_CLASSES) if hasattr(torch.serialization, "safe_globals") else nullcontext()
    try:
        with allowed:
            if source.startswith(("http://", "https://")):
                return torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
            if is_remote(source) and source.partition("://")[0] in ("torchvision", "modelzoo", "open-mmlab", "openmmlab", "mmcls"):
                return CheckpointLoader.load_checkpoint(source, map_location="cpu")
            with get_local_path(source) as path:
                return torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"the checkpoint {source} cannot be read as weights alone ({type(error).__name__}: {reason}).") from error


def find_backbone(checkpoint: Any, source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a LaplacianFormer in a checkpoint, by the backbone's own names, and the names of all others.

    A bare backbone, a classifier, a detector and a segmentor are told apart by where the first patch embedding is.

    Raises:
        UsageError: there is none.
    """
    for container in _CONTAINERS:
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(container), dict):
            checkpoint = checkpoint[container]
    tensors = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)} if isinstance(checkpoint, dict) else {}
    prefixes = sorted({name[: -len(_FIRST_KEY)] for name in tensors if name.endswith(_FIRST_KEY)}, key=lambda p: (p != "backbone.", len(p)))
    if not prefixes:
        seen = ", ".join(list(tensors)[:3]) or "no tensors at all"
        raise UsageError(f"the checkpoint {source} has no LaplacianFormer in it (no ...{_FIRST_KEY}); it has {seen}.")
    prefix = prefixes[0]
    own = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    return own, tuple(name for name in tensors if not name.startswith(prefix))


def load_pretrained(backbone: nn.Module, source: str | Path, strict: bool = True) -> LoadReport:
    """Load a backbone's weights from a checkpoint of it, or of any model with it.

    Blocks that the file lacks, or has in another shape, keep their initial values and are named in the report.

    Args:
        backbone: a ``LaplacianFormer``.
        source: a path, an address, or one of mmengine's prefixes.
        strict: refuse a file that covers less than nine tenths of the backbone's numbers.

    Returns:
        What was taken and what was not; it is logged as well.

    Raises:
        UsageError: the file cannot be read, has no LaplacianFormer, or (``strict``) too little of this one; the backbone is unchanged.
    """
    source = str(source)
    found, others = find_backbone(read_checkpoint(source), source)
    wanted = backbone.state_dict()
    left = {name: "not in the file" for name in wanted if name not in found}
    left.update(
        {
            name: f"shape {tuple(found[name].shape)} in the file, {tuple(value.shape)} here"
            for name, value in wanted.items()
            if name in found and found[name].shape != value.shape
        }
    )
    taken = tuple(name for name in wanted if name not in left)
    share = sum(wanted[name].numel() for name in taken) / sum(value.numel() for value in wanted.values())
    report = LoadReport(source, taken, left, (*others, *(name for name in found if name not in wanted)), share)
    if strict and share < MIN_SHARE:
        raise UsageError(
            f"only {share:.1%} of the backbone is in {source}, and {MIN_SHARE:.0%} is the least that is loaded: "
            f"{', '.join(f'{name} ({reason})' for name, reason in list(left.items())[:3])}; use the arch that it was trained with."
        )
    backbone.load_state_dict({name: found[name] for name in taken}, strict=False)
    print_log(f"{report}.", logger="current", level=logging.WARNING if left else logging.INFO)
    return report


@WEIGHT_INITIALIZERS.register_module()
class LaplacianPretrained:
    """``init_cfg=dict(type="LaplacianPretrained", checkpoint=...)``: ``load_pretrained`` as mmengine's initialisation.

    Args:
        checkpoint: as ``load_pretrained``'s ``source``.
        strict: as ``load_pretrained``'s.
    """

    def __init__(self, checkpoint: str, strict: bool = True) -> None:
        self.checkpoint = checkpoint
        self.strict = strict

    def __call__(self, module: nn.Module) -> None:
        load_pretrained(module, self.checkpoint, self.strict)
