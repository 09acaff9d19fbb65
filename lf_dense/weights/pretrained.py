"""Pretrained weights of a LaplacianFormer: finding the backbone in a checkpoint, and saying what arrived."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.logging import print_log
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor, nn

from ..errors import UsageError
from .pvtv2 import FORMS, Form, convert_pvtv2
from .reading import read_checkpoint, tensors_of

# Below this share of the backbone's numbers a load is taken for a mistake.
MIN_SHARE = 0.9
_OWN = Form("LaplacianFormer", ("stages.0.patch_embed.proj.weight",), ())
_KNOWN = {"laplacianformer": _OWN, **FORMS}
FORM_NAMES = ("auto", *_KNOWN)


class LoadReport(NamedTuple):
    """What a load did, by names of the backbone's tensors; ``unused`` has the file's own.

    ``converted`` gives where a tensor was cut or reshaped from, ``left`` why one keeps its initial values,
    ``share`` the part of the backbone's numbers that arrived.
    """

    source: str
    form: str
    taken: tuple[str, ...]
    converted: dict[str, str]
    left: dict[str, str]
    unused: tuple[str, ...]
    notes: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        text = (
            f"{self.form} in {self.source}: {self.share:.1%} of the backbone's numbers, {len(self.taken)} "
            "tensors taken"
        )
        if self.converted:
            text += f", {len(self.converted)} converted"
        if self.left:
            text += (
                f"; {len(self.left)} left at initialisation: "
                f"{_first(f'{name} ({reason})' for name, reason in self.left.items())}"
            )
        if self.unused:
            text += f"; {len(self.unused)} of the file's not used: {_first(self.unused)}"
        return "; ".join((text, *self.notes))

    def lines(self) -> list[str]:
        """The whole report, a line for each tensor."""
        return [
            str(self),
            *(f"taken      {name}" for name in self.taken),
            *(f"converted  {name} ({origin})" for name, origin in self.converted.items()),
            *(f"left       {name} ({reason})" for name, reason in self.left.items()),
            *(f"unused     {name}" for name in self.unused),
        ]


class FoundBackbone(NamedTuple):
    """A backbone's tensors by its own names, what was converted, the file's other tensors, and remarks."""

    form: str
    tensors: dict[str, Tensor]
    converted: dict[str, str]
    unused: tuple[str, ...]
    notes: tuple[str, ...]


def _first(items: Iterable[str], count: int = 3) -> str:
    items = list(items)
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")


def find_backbone(checkpoint: Any, source: str, form: str = "auto") -> FoundBackbone:
    """A LaplacianFormer's or a PVTv2's tensors in a checkpoint, by LaplacianFormer's names.

    A bare backbone, a classifier, a detector and a segmentor are told apart by the prefix of a backbone's
    first keys.

    Args:
        checkpoint: as ``read_checkpoint`` gives it.
        source: what messages call it.
        form: one of ``FORM_NAMES``; ``"auto"`` tries each.

    Raises:
        UsageError: there is none.
        ValueError: an unknown form.
    """
    if form not in FORM_NAMES:
        raise ValueError(
            f"the form {form!r} of a checkpoint does not exist: use one of {', '.join(FORM_NAMES)}."
        )
    tensors = tensors_of(checkpoint)
    candidates = list(_KNOWN.values()) if form == "auto" else [_KNOWN[form]]
    for candidate in candidates:
        first, *others = candidate.markers
        prefixes = [key[: -len(first)] for key in tensors if key == first or key.endswith(f".{first}")]
        prefixes = [prefix for prefix in prefixes if all(prefix + other in tensors for other in others)]
        if not prefixes:
            continue
        prefix = min(prefixes, key=lambda prefix: (prefix != "backbone.", len(prefix)))
        own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        unused = tuple(key for key in tensors if not key.startswith(prefix))
        if candidate is _OWN:
            return FoundBackbone(_OWN.title, own, {}, unused, ())
        converted = convert_pvtv2(own, candidate)
        unused += tuple(prefix + key for key in converted.unused)
        return FoundBackbone(candidate.title, converted.tensors, converted.changed, unused, converted.notes)
    looked_for = ", ".join(candidate.title for candidate in candidates)
    seen = _first(tensors) or "no tensors at all"
    raise UsageError(
        f"the checkpoint {source} has no LaplacianFormer in it that could be told by its keys ({looked_for});"
        f" it has {seen}."
    )


def compare(
    wanted: Mapping[str, Tensor], found: FoundBackbone, source: str
) -> tuple[LoadReport, dict[str, Tensor]]:
    """What a backbone with the state dict ``wanted`` would take: the report, and the tensors."""
    left = {name: _why_missing(name, found) for name in wanted if name not in found.tensors}
    left.update(
        {
            name: f"shape {tuple(found.tensors[name].shape)} in the file, {tuple(value.shape)} here"
            for name, value in wanted.items()
            if name in found.tensors and found.tensors[name].shape != value.shape
        }
    )
    loaded = {name: found.tensors[name] for name in wanted if name not in left}
    share = sum(value.numel() for value in loaded.values()) / sum(value.numel() for value in wanted.values())
    converted = {name: origin for name, origin in found.converted.items() if name in loaded}
    taken = tuple(name for name in loaded if name not in converted)
    unused = (*found.unused, *(name for name in found.tensors if name not in wanted))
    return LoadReport(source, found.form, taken, converted, left, unused, found.notes, share), loaded


def load_pretrained(
    backbone: nn.Module, source: str | Path, strict: bool = True, form: str = "auto"
) -> LoadReport:
    """Load a backbone's weights from a checkpoint of it, of any model with it, or of a PVTv2.

    Block i takes what block i of the file has. What the file lacks, or has in another shape, keeps its
    initial values and is named in the report. Landmarks and image size are no weights: any checkpoint fits
    any of them.

    Args:
        backbone: a ``LaplacianFormer``.
        source: a path, an address, or one of mmengine's prefixes; ``.pth`` or ``.safetensors``.
        strict: refuse a file that covers less than nine tenths of the backbone's numbers.
        form: what is in the file, one of ``FORM_NAMES``: ``"laplacianformer"``, ``"pvtv2"`` (whai362/PVT),
            ``"timm"``, ``"mmdet"``; ``"auto"`` tells by the keys.

    Returns:
        What was taken and what was not; it is logged as well.

    Raises:
        UsageError: the file cannot be read, has no such backbone, NaN or infinite weights, or (``strict``)
            too little of this one; the backbone is unchanged.
    """
    source = str(source)
    found = find_backbone(read_checkpoint(source), source, form)
    report, loaded = compare(backbone.state_dict(), found, source)
    if report.share == 0 or (strict and report.share < MIN_SHARE):
        raise UsageError(
            f"only {report.share:.1%} of the backbone is in {source} ({found.form}), and {MIN_SHARE:.0%} is "
            "the least that is loaded: "
            f"{_first(f'{name} ({reason})' for name, reason in report.left.items())}; use the arch that it "
            "was trained with, or strict=False for a part."
        )
    broken = [name for name, value in loaded.items() if not value.isfinite().all()]
    if broken:
        raise UsageError(
            f"the checkpoint {source} has NaN or infinite weights: {_first(broken)}; use an earlier one of "
            "that run."
        )
    backbone.load_state_dict(loaded, strict=False)
    print_log(f"{report}.", logger="current", level=logging.WARNING if report.left else logging.INFO)
    return report


def _why_missing(name: str, found: FoundBackbone) -> str:
    if found.converted and ".attn.dwconv." in name:
        return "PVTv2 has no convolution of the values"
    block = re.match(r"(stages\.(\d)\.blocks\.)(\d+)\.", name)
    if block and not any(key.startswith(f"{block[1]}{block[3]}.") for key in found.tensors):
        depth = len({key.split(".")[3] for key in found.tensors if key.startswith(block[1])})
        return f"stage {block[2]} has {depth} blocks in the file"
    return "not in the file"


@WEIGHT_INITIALIZERS.register_module()
class LaplacianPretrained:
    """``load_pretrained`` as mmengine's initialisation: ``init_cfg=dict(type="LaplacianPretrained", ...)``.

    Args:
        checkpoint: as ``load_pretrained``'s ``source``.
        form: as ``load_pretrained``'s.
        strict: as ``load_pretrained``'s.
        source: the name that ``form`` had at first.
    """

    def __init__(
        self, checkpoint: str, form: str = "auto", strict: bool = True, source: str | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.form = form if source is None else source
        self.strict = strict

    def __call__(self, module: nn.Module) -> None:
        load_pretrained(module, self.checkpoint, self.strict, self.form)
