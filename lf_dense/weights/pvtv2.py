"""PVTv2's weights under LaplacianFormer's names: the pyramids differ in the middle of the attention alone.

Three public forms are known by their keys: the authors' (whai362/PVT), timm's and mmdetection's. Needs torch
alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor


class Form(NamedTuple):
    """One way of naming PVTv2's weights: keys that only it has together, and rules from its names to ours."""

    title: str
    markers: tuple[str, ...]
    rules: tuple[tuple[str, str | Callable[[re.Match], str]], ...]


class Converted(NamedTuple):
    """What became of a state dict.

    ``tensors`` have the backbone's names; ``changed`` says of those that were split or reshaped where they
    are from; ``unused`` are the file's tensors that have no place here, and ``notes`` what a user should
    know.
    """

    tensors: dict[str, Tensor]
    changed: dict[str, str]
    unused: tuple[str, ...]
    notes: tuple[str, ...]


def _stage(template: str) -> Callable[[re.Match], str]:
    """A replacement whose ``{}`` is the first group less one: the authors count stages from one."""
    return lambda match: template.format(int(match[1]) - 1)


FORMS = {
    "pvtv2": Form(
        "PVTv2 of whai362/PVT",
        ("patch_embed1.proj.weight", "block1.0.attn.kv.weight", "block1.0.mlp.dwconv.dwconv.weight"),
        (
            (r"^patch_embed(\d)\.", _stage("stages.{}.patch_embed.")),
            (r"^block(\d)\.", _stage("stages.{}.blocks.")),
            (r"^norm(\d)\.", _stage("stages.{}.norm.")),
            (r"\.mlp\.(dwconv\.(?=dwconv))?", ".ffn."),
        ),
    ),
    "timm": Form(
        "timm's pvt_v2",
        ("patch_embed.proj.weight", "stages.0.blocks.0.attn.kv.weight", "stages.0.blocks.0.mlp.fc1.weight"),
        (
            (r"^patch_embed\.", "stages.0.patch_embed."),
            (r"^(stages\.\d)\.downsample\.", r"\1.patch_embed."),
            (r"\.mlp\.(dwconv\.(?=dwconv))?", ".ffn."),
        ),
    ),
    "mmdet": Form(
        "mmdetection's PyramidVisionTransformerV2",
        (
            "layers.0.0.projection.weight",
            "layers.0.1.0.attn.attn.in_proj_weight",
            "layers.0.1.0.ffn.layers.4.weight",
        ),
        (
            (r"^layers\.(\d)\.0\.projection\.", r"stages.\1.patch_embed.proj."),
            (r"^layers\.(\d)\.0\.norm\.", r"stages.\1.patch_embed.norm."),
            (r"^layers\.(\d)\.1\.", r"stages.\1.blocks."),
            (r"^layers\.(\d)\.2\.", r"stages.\1.norm."),
            (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
            (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
            (r"\.ffn\.layers\.0\.", ".ffn.fc1."),
            (r"\.ffn\.layers\.1\.", ".ffn.dwconv."),
            (r"\.ffn\.layers\.4\.", ".ffn.fc2."),
        ),
    ),
}

_PLACE = re.compile(
    r"stages\.[0-3]\.(patch_embed\.(proj|norm)|norm"
    r"|blocks\.\d+\.(norm[12]|attn\.(q|k|v|kv|qkv|proj)|ffn\.(fc1|dwconv|fc2)))\.(weight|bias)"
)


def convert_pvtv2(state_dict: Mapping[str, Tensor], form: Form) -> Converted:
    """Rename a PVTv2 state dict, split its joint projections, and drop its spatial reduction and classifier.

    Values are those of the file, bit for bit.

    Args:
        state_dict: the backbone's tensors by the form's own names, without a prefix.
        form: one of ``FORMS``.
    """
    tensors, changed, unused = {}, {}, []
    for key, value in state_dict.items():
        name = key
        for pattern, replacement in form.rules:
            name = re.sub(pattern, replacement, name)
        if not _PLACE.fullmatch(name):
            unused.append(key)
            continue
        joint = re.search(r"\.(kv|qkv)\.", name)
        if joint:
            for part, piece in zip(joint[1], value.chunk(len(joint[1]))):
                target = name.replace(joint[0], f".{part}.")
                tensors[target] = piece
                changed[target] = f"{part} of {key}"
        elif re.search(r"\.fc[12]\.weight$", name) and value.ndim == 4:
            tensors[name] = value.flatten(1)
            changed[name] = f"{key} as a matrix"
        else:
            tensors[name] = value
    notes = []
    if any(re.search(r"stages\.3\.|block4\.", key) and ".attn.sr." in key for key in unused):
        notes.append(
            "a linear PVTv2 (b2_li) has a ReLU between fc1 and the depthwise convolution, and this backbone "
            "has none"
        )
    return Converted(tensors, changed, tuple(unused), tuple(notes))
