"""What a model's neck and heads state about their backbone, brought in line with another one.

A backbone is known by its levels: channels and strides of the maps it returns. They are measured by running
it once on a small image, so that any registered backbone can be replaced, and no table of them goes stale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from ..errors import UsageError
from ..frameworks import type_name
from ..presets import STRIDES

PROBE_SIZE = 128
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
        "the head LRASPPHead pools with a window of 49 x 49, which is larger than the last map of a pyramid"
        " at its recipe's crop"
    ),
}

# Building a large backbone takes seconds, and a session swaps many configs of a few backbones.
_measured: dict[str, Levels] = {}


class SwapError(UsageError):
    """The backbone of a config cannot be replaced by a four-level pyramid; the message says why."""


class Levels(NamedTuple):
    """The maps of a backbone from first to last: channels, and pixels of the image per pixel of the map."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]


def as_list(settings: Any) -> list[dict[str, Any]]:
    """One component or several of them in sequence, as a list."""
    if not settings:
        return []
    return list(settings) if isinstance(settings, (list, tuple)) else [settings]


def without_pretrained(settings: Any) -> Any:
    """A copy of a component's settings with nothing in it that would fetch weights; other initialisation stays."""
    if isinstance(settings, dict):
        kept = {key: value for key, value in settings.items() if key != "pretrained"}
        if isinstance(kept.get("init_cfg"), (dict, list, tuple)):
            kept["init_cfg"] = [
                i
                for i in as_list(kept["init_cfg"])
                if type_name(i) not in ("Pretrained", "LaplacianPretrained")
            ] or None
        return type(settings)({key: without_pretrained(value) for key, value in kept.items()})
    if isinstance(settings, (list, tuple)):
        return type(settings)(without_pretrained(value) for value in settings)
    return settings


def heads_of(model: dict[str, Any]) -> list[dict[str, Any]]:
    """All heads of a model: what its keys that end with ``head`` hold."""
    return [
        head
        for key, value in model.items()
        if key.endswith("head")
        for head in as_list(value)
        if isinstance(head, dict)
    ]


def nested(settings: Any) -> Iterator[dict[str, Any]]:
    """A component's settings and all that lie within."""
    if isinstance(settings, dict):
        yield settings
        for value in settings.values():
            yield from nested(value)
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            yield from nested(value)


def check_replaceable(model: dict[str, Any]) -> None:
    """Refuse what is known to need its own backbone.

    Raises:
        SwapError: backbone, neck or a head is of such a kind.
    """
    name = type_name(model["backbone"])
    reason = _REFUSED_BACKBONES.get(name, "").format(name)
    for neck in as_list(model.get("neck")):
        reason = reason or _REFUSED_NECKS.get(type_name(neck), "")
    for settings in nested(heads_of(model)):
        reason = reason or _REFUSED_HEADS.get(type_name(settings), "")
        if settings.get("shared_head"):
            stage = type_name(settings["shared_head"])
            reason = (
                reason
                or f"the RoI head runs the last stage of the old one over every region ({stage}), with its channels"
            )
    if reason:
        raise SwapError(f"the backbone cannot be replaced: {reason}.")


def _probe_size(backbone: dict[str, Any]) -> int:
    """A plain ViT with a table of relative positions runs at its own size only."""
    size = backbone.get("img_size", PROBE_SIZE) if type_name(backbone) in ("BEiT", "MAE") else PROBE_SIZE
    return size if isinstance(size, int) else size[0]


def measure_levels(backbone: dict[str, Any], scope: str) -> Levels:
    """Build a backbone without its weights and run it once.

    Args:
        backbone: its settings.
        scope: registry scope that they belong to.

    Raises:
        SwapError: it does not run, or returns anything but a sequence of ``(B, C, H, W)`` maps.
    """
    settings = without_pretrained(backbone)
    key = f"{scope} {settings}"
    if key not in _measured:
        _measured[key] = _measure(settings, scope)
    return _measured[key]


@torch.no_grad()
def _measure(backbone: dict[str, Any], scope: str) -> Levels:
    name = type_name(backbone)
    image = torch.zeros(1, backbone.get("in_channels", 3), _probe_size(backbone), _probe_size(backbone))
    try:
        with DefaultScope.overwrite_default_scope(scope):
            module = MODELS.build(backbone)
            module.eval()
            maps = module(image)
    except Exception as error:
        # Whatever a registered backbone may raise, it is why nothing is known about its levels.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise SwapError(
            f"the backbone {name} of the config does not run here, so its levels are not known ({reason})."
        ) from error
    maps = [maps] if isinstance(maps, Tensor) else maps
    if (
        not isinstance(maps, (tuple, list))
        or not maps
        or not all(isinstance(m, Tensor) and m.ndim == 4 for m in maps)
    ):
        raise SwapError(
            f"the backbone cannot be replaced: {name} returns something other than maps, and this model reads"
            " that."
        )
    strides = tuple(round(image.shape[-1] / m.shape[-1]) for m in maps)
    return Levels(tuple(m.shape[1] for m in maps), strides)


def choose_stages(old: Levels) -> tuple[int, ...]:
    """Our stages that stand for the levels of another backbone, one for each.

    A level becomes the stage of its stride. Where that is not possible (dilated stages, a plain ViT, strides
    we do not have) levels become stages in order, the last one our last.

    Raises:
        SwapError: there are more than four levels, or later levels are finer than earlier ones.
    """
    count = len(old.strides)
    if any(later < earlier for earlier, later in zip(old.strides, old.strides[1:])):
        raise SwapError(
            f"the backbone cannot be replaced: it is a decoder, whose maps get finer (strides {old.strides})."
        )
    if count > len(STRIDES):
        raise SwapError(
            f"the backbone cannot be replaced: it returns {count} maps, and a LaplacianFormer has four."
        )
    if len(set(old.strides)) == count and set(old.strides) <= set(STRIDES):
        return tuple(STRIDES.index(stride) for stride in old.strides)
    return tuple(range(len(STRIDES) - count, len(STRIDES)))


def _mapped(stated: Any, old: Sequence[int], new: Sequence[int]) -> Any:
    """Channels as a component states them: one number for the last level, the last few levels, or all from the last to the first."""
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
        before, after = self._neck()
        if before is not None:
            for head in heads_of(self.model):
                self._head(head, before, after, top=True)
        if self.count == 0 and self.old.channels != self.new.channels:
            raise SwapError(
                "the backbone cannot be replaced: nothing in the config states its channels"
                f" {self.old.channels}, so what reads them is unknown."
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
            if (
                isinstance(level, int)
                and self.old.strides[level] == self.old.strides[last]
                and self.new.strides[level] != self.new.strides[last]
            ):
                head.update(in_index=last, in_channels=self.old.channels[last])

    def _set(self, settings: dict[str, Any], key: str, value: Any) -> None:
        settings[key] = value
        self.count += 1

    def _neck(self) -> tuple[Sequence[int] | None, Sequence[int] | None]:
        """Rewire the neck; the channels, before and after, that heads see change, or None where they see no change."""
        old, new = self.old.channels, self.new.channels
        necks = as_list(self.model.get("neck"))
        if necks and type_name(necks[0]) in _RESAMPLING_NECKS:
            before = [necks[0].get("out_channels", necks[0].get("embed_dim"))] * len(old)
            self._set(self.model, "neck", None)
            return before, new
        necks = [neck for neck in necks if type_name(neck) not in _PASS_THROUGH_NECKS]
        if not necks:
            return old, new
        neck, name = necks[0], type_name(necks[0])
        stated = neck.get("in_channels")
        mapped = None if stated is None else _mapped(stated, old, new)
        if mapped is None:
            raise SwapError(
                f"the backbone cannot be replaced: the neck {name} states in_channels={stated}, and the"
                f" backbone has {old}."
            )
        self._set(neck, "in_channels", mapped)
        if name == "SSDNeck":
            before = tuple(neck["out_channels"])
            after = (*new, *before[len(new) :])
            self._set(neck, "out_channels", type(neck["out_channels"])(after))
            return before, after
        if name == "JPU":
            # All levels but the last reach the heads as they are; the last becomes a joint one of its own
            # width.
            joint = neck.get("mid_channels", 512) * len(neck.get("dilations", (1, 2, 4, 8)))
            return (*old[:-1], joint), (*new[:-1], joint)
        return None, None

    def _head(self, head: dict[str, Any], old: Sequence[int], new: Sequence[int], top: bool = False) -> None:
        stated = head.get("in_channels")
        if stated is not None:
            if "in_index" in head or (self.by_index and top and isinstance(stated, int)):
                self._head_by_index(head, old, new)
            elif isinstance(stated, (list, tuple)) or len(old) == 1:
                mapped = _mapped(stated, old, new)
                if mapped is not None:
                    self._set(head, "in_channels", mapped)
                elif top and self.by_index:
                    raise SwapError(
                        f"the backbone cannot be replaced: the head {type_name(head)} states"
                        f" in_channels={stated}, and gets {tuple(old)}."
                    )
        # DeepLabV3+ reads the first level besides the one that in_index names.
        if head.get("c1_in_channels"):
            self._set(head, "c1_in_channels", new[0])
        # An RoI extractor hands on the width of the map it reads.
        if len(old) == 1 and "roi_layer" in head and head.get("out_channels") == old[0]:
            self._set(head, "out_channels", new[0])
        for key, value in head.items():
            if key not in ("in_channels", "c1_in_channels"):
                for part in as_list(value) if isinstance(value, (dict, list, tuple)) else []:
                    if isinstance(part, dict):
                        self._head(part, old, new)

    def _head_by_index(self, head: dict[str, Any], old: Sequence[int], new: Sequence[int]) -> None:
        stated, index = head["in_channels"], head.get("in_index", -1)
        pairs = list(zip(index, stated)) if isinstance(index, (list, tuple)) else [(index, stated)]
        for level, channels in pairs:
            if not -len(old) <= level < len(old) or old[level] != channels:
                raise SwapError(
                    f"the backbone cannot be replaced: the head {type_name(head)} reads level {level} with"
                    f" {channels} channels, and the levels have {tuple(old)}."
                )
        mapped = [new[level] for level, _ in pairs]
        self._set(
            head, "in_channels", type(stated)(mapped) if isinstance(stated, (list, tuple)) else mapped[0]
        )
        # With no convolution of its own the head hands its input on, and has to have its width.
        if head.get("num_convs") == 0 and head.get("channels") == stated:
            self._set(head, "channels", mapped[0])

    def _restate_strides(self, components: list[dict[str, Any]]) -> None:
        """Strides that necks and heads state; levels beyond the backbone's keep their distance to its last."""
        old, new = self.old.strides, self.new.strides
        if old == new:
            return
        # Levels of one stride can be told apart by their place alone.
        table = dict(zip(old, new)) if len(set(old)) == len(old) else {}

        def restated(stated: Sequence[int]) -> Sequence[int]:
            if tuple(stated) == old:
                return new
            if any(stride in table for stride in stated):
                return [table.get(stride, max(1, stride * new[-1] // old[-1])) for stride in stated]
            return stated

        for component in components:
            for settings in nested(component):
                for key in _STRIDE_KEYS:
                    stated = settings.get(key)
                    if isinstance(stated, (list, tuple)) and all(
                        isinstance(stride, int) for stride in stated
                    ):
                        settings[key] = type(stated)(restated(stated))
