"""What the neck and heads of a model state about their backbone, brought in line with another one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from ..frameworks import type_name
from .errors import SwapError
from .levels import Levels
from .settings import as_list, class_of, heads_of, nested

_STRIDE_KEYS = ("strides", "featmap_strides", "feature_strides")
# These work on maps of any width and hand it on.
_PASS_THROUGH_NECKS = ("GlobalAveragePooling", "GeneralizedMeanPooling")
# These make a pyramid of maps that all have one resolution, and ours has one already.
_RESAMPLING_NECKS = ("MultiLevelNeck", "Feature2Pyramid")

_WHOLE_NETWORK = (
    "{} is a whole segmentation network with branches of its own, and its heads read those, not a pyramid"
)
_REFUSED_BACKBONES = {
    **dict.fromkeys(
        (
            "BiSeNetV1",
            "BiSeNetV2",
            "CGNet",
            "DDRNet",
            "ERFNet",
            "FastSCNN",
            "ICNet",
            "PIDNet",
            "STDCContextPathNet",
        ),
        _WHOLE_NETWORK,
    ),
    "UNet": "{} is an encoder and a decoder in one, and its heads read maps of the image's own resolution",
    "VPD": "{} is a diffusion model with its text encoder and decoder, and its heads read that",
    "HourglassNet": "{} stacks hourglasses at one resolution, and its head reads the output of each stack",
    "TridentResNet": (
        "{} runs each image in three branches, which the head of this detector takes apart again"
    ),
}
_REFUSED_NECKS = {
    "RFP": (
        "the neck RFP feeds its output back into a DetectoRS_ResNet, which a LaplacianFormer has no input for"
    ),
    "MLANeck": (
        "the neck MLANeck adds up maps of a plain ViT that all have one size, and a pyramid's have four"
    ),
}
_REFUSED_HEADS = {
    "DPTHead": "the head DPTHead reads the class token of a plain ViT, and a pyramid has none",
    "LRASPPHead": (
        "the head LRASPPHead pools with a window of 49 x 49, which is larger than the last map of a pyramid "
        "at its recipe's crop"
    ),
}
_MASKING = "{} masks patches of its input, for masked image modelling, which a LaplacianFormer does not do"
# Inputs besides the image, by which a backbone is told what to mask.
_MASK_INPUTS = ("mask", "importance")
# SparK masks the maps of its backbone from outside.
_MASKED_BACKBONES = ("SparseConvNeXt", "SparseResNet")


def check_replaceable(model: dict[str, Any], scope: str) -> None:
    """Refuse what is known to need its own backbone.

    Args:
        model: settings of a model with a ``backbone``.
        scope: registry scope that they belong to.

    Raises:
        SwapError: backbone, neck or a head is of such a kind.
    """
    reason = next(_reasons_against(model, scope), None)
    if reason is not None:
        raise SwapError(f"the backbone cannot be replaced: {reason}.")


def _reasons_against(model: dict[str, Any], scope: str) -> Iterator[str]:
    name = type_name(model["backbone"])
    if name in _REFUSED_BACKBONES:
        yield _REFUSED_BACKBONES[name].format(name)
    if _masks_patches(model["backbone"], scope):
        yield _MASKING.format(name)
    for neck in as_list(model.get("neck")):
        if type_name(neck) in _REFUSED_NECKS:
            yield _REFUSED_NECKS[type_name(neck)]
    for settings in nested(heads_of(model)):
        if type_name(settings) in _REFUSED_HEADS:
            yield _REFUSED_HEADS[type_name(settings)]
        if settings.get("shared_head"):
            stage = type_name(settings["shared_head"])
            yield (
                f"the RoI head runs the last stage of the old one over every region ({stage}), with its "
                "channels"
            )


def _masks_patches(backbone: dict[str, Any], scope: str) -> bool:
    """Whether a backbone works on the patches that a mask leaves."""
    if type_name(backbone) in _MASKED_BACKBONES:
        return True
    forward = getattr(class_of(backbone, scope), "forward", None)
    inputs = inspect.signature(forward).parameters if forward else ()
    return any(name in inputs for name in _MASK_INPUTS)


def _mapped(stated: Any, old: Sequence[int], new: Sequence[int]) -> Any:
    """The new channels in the form in which a component states the old ones; None for any other form.

    The forms: one number for the last level, the last few levels, or all from the last to the first.
    """
    if isinstance(stated, int):
        return new[-1] if stated == old[-1] else None
    wanted, count = tuple(stated), len(stated)
    if count and wanted == tuple(old[-count:]):
        return type(stated)(new[-count:])
    if wanted == tuple(reversed(old)):
        return type(stated)(reversed(new))
    return None


class Rewiring:
    """Rewrites one model's settings in place, from the levels ``old`` to ``new``, and counts what it rewrote.

    Args:
        model: settings of a model with a ``backbone``.
        old, new: the levels of both backbones, one for one.
        by_index: whether heads select levels by ``in_index``, as mmseg's do.
    """

    def __init__(self, model: dict[str, Any], old: Levels, new: Levels, by_index: bool) -> None:
        self.model = model
        self.old = old
        self.new = new
        self.by_index = by_index
        self.count = 0

    def run(self) -> None:
        """Rewire neck and heads.

        Raises:
            SwapError: a component states channels that the old backbone does not have, or none does.
        """
        self._align_cascade()
        seen = self._neck()
        if seen is not None:
            for head in heads_of(self.model):
                self._head(head, *seen, top=True)
        if self.count == 0 and self.old.channels != self.new.channels:
            raise SwapError(
                "the backbone cannot be replaced: nothing in the config states its channels "
                f"{self.old.channels}, so what reads them is unknown."
            )
        self._restate_strides([*as_list(self.model.get("neck")), *heads_of(self.model)])

    def _align_cascade(self) -> None:
        """Heads in a cascade that read levels of one size go on reading maps of one size: the last head's."""
        cascade = self.model.get("decode_head")
        if not isinstance(cascade, (list, tuple)) or not isinstance(cascade[-1].get("in_index"), int):
            return
        last = cascade[-1]["in_index"]
        for head in cascade[:-1]:
            level = head.get("in_index")
            if not isinstance(level, int):
                continue
            same_before = self.old.strides[level] == self.old.strides[last]
            if same_before and self.new.strides[level] != self.new.strides[last]:
                head.update(in_index=last, in_channels=self.old.channels[last])

    def _set(self, settings: dict[str, Any], key: str, value: Any) -> None:
        settings[key] = value
        self.count += 1

    def _neck(self) -> tuple[Sequence[int], Sequence[int]] | None:
        """Rewire the neck, and return the channels that heads read, before and after.

        None where the neck hides the backbone's channels from the heads.
        """
        old, new = self.old.channels, self.new.channels
        necks = as_list(self.model.get("neck"))
        if necks and type_name(necks[0]) in _RESAMPLING_NECKS:
            width: Any = necks[0].get("out_channels", necks[0].get("embed_dim"))
            self._set(self.model, "neck", None)
            return [width] * len(old), new
        necks = [neck for neck in necks if type_name(neck) not in _PASS_THROUGH_NECKS]
        if not necks:
            return old, new
        neck, name = necks[0], type_name(necks[0])
        stated = neck.get("in_channels")
        mapped = None if stated is None else _mapped(stated, old, new)
        if mapped is None:
            raise SwapError(
                f"the backbone cannot be replaced: the neck {name} states in_channels={stated}, and the "
                f"backbone has {old}."
            )
        self._set(neck, "in_channels", mapped)
        if name == "SSDNeck":
            outputs = tuple(neck["out_channels"])
            after = (*new, *outputs[len(new) :])
            self._set(neck, "out_channels", type(neck["out_channels"])(after))
            return outputs, after
        if name == "JPU":
            # All levels but the last reach the heads as they are; the last becomes a joint one.
            joint = neck.get("mid_channels", 512) * len(neck.get("dilations", (1, 2, 4, 8)))
            return (*old[:-1], joint), (*new[:-1], joint)
        return None

    def _head(self, head: dict[str, Any], old: Sequence[int], new: Sequence[int], top: bool = False) -> None:
        """Rewire a head and all components within; ``top`` marks a head of the model itself."""
        if head.get("in_channels") is not None:
            self._head_input(head, old, new, top)
        # DeepLabV3+ reads the first level besides the one that in_index names.
        if head.get("c1_in_channels"):
            self._set(head, "c1_in_channels", new[0])
        # An RoI extractor hands on the width of the map it reads.
        if len(old) == 1 and "roi_layer" in head and head.get("out_channels") == old[0]:
            self._set(head, "out_channels", new[0])
        for key, value in head.items():
            if key in ("in_channels", "c1_in_channels") or not isinstance(value, (dict, list, tuple)):
                continue
            for part in as_list(value):
                if isinstance(part, dict):
                    self._head(part, old, new)

    def _head_input(self, head: dict[str, Any], old: Sequence[int], new: Sequence[int], top: bool) -> None:
        stated = head["in_channels"]
        if "in_index" in head or (self.by_index and top and isinstance(stated, int)):
            self._head_by_index(head, old, new)
            return
        if not isinstance(stated, (list, tuple)) and len(old) != 1:
            return
        mapped = _mapped(stated, old, new)
        if mapped is not None:
            self._set(head, "in_channels", mapped)
        elif top and self.by_index:
            raise SwapError(
                f"the backbone cannot be replaced: the head {type_name(head)} states "
                f"in_channels={stated}, and gets {tuple(old)}."
            )

    def _head_by_index(self, head: dict[str, Any], old: Sequence[int], new: Sequence[int]) -> None:
        stated, index = head["in_channels"], head.get("in_index", -1)
        pairs = list(zip(index, stated)) if isinstance(index, (list, tuple)) else [(index, stated)]
        for level, channels in pairs:
            if not -len(old) <= level < len(old) or old[level] != channels:
                raise SwapError(
                    f"the backbone cannot be replaced: the head {type_name(head)} reads level {level} with "
                    f"{channels} channels, and the levels have {tuple(old)}."
                )
        mapped = [new[level] for level, _ in pairs]
        is_list = isinstance(stated, (list, tuple))
        self._set(head, "in_channels", type(stated)(mapped) if is_list else mapped[0])
        # With no convolution of its own the head hands its input on, and has to have its width.
        if head.get("num_convs") == 0 and head.get("channels") == stated:
            self._set(head, "channels", mapped[0])

    def _restate_strides(self, components: list[dict[str, Any]]) -> None:
        """Replace the strides that necks and heads state."""
        if self.old.strides == self.new.strides:
            return
        for settings in nested(components):
            for key in _STRIDE_KEYS:
                stated = settings.get(key)
                if isinstance(stated, (list, tuple)) and all(isinstance(stride, int) for stride in stated):
                    settings[key] = type(stated)(self._restated(stated))

    def _restated(self, stated: Sequence[int]) -> Sequence[int]:
        """New strides for stated ones; levels beyond the backbone's keep their distance to its last."""
        old, new = self.old.strides, self.new.strides
        if tuple(stated) == old:
            return new
        # Levels of one stride can be told apart by their place alone.
        table = dict(zip(old, new)) if len(set(old)) == len(old) else {}
        if any(stride in table for stride in stated):
            return [table.get(stride, max(1, stride * new[-1] // old[-1])) for stride in stated]
        return stated
