"""Parameters and multiply-adds of a backbone: the papers' count, and the attention's own work beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..attention import LaplacianAttention
from ..backends.native import laplacian_attention_macs
from ..laplacianformer import LaplacianFormer
from .report import markdown_head, markdown_row

# Of the papers' classifier, which their counts include.
NUM_CLASSES = 1000

# A small patch embedding is a product with its patches.
_CONVOLUTIONS_AND_LINEAR = (
    torch.ops.aten.convolution,
    torch.ops.aten.addmm,
    torch.ops.aten.mm,
    torch.ops.aten.baddbmm,
)


class Complexity(NamedTuple):
    """Counts for one image.

    ``macs`` are the multiply-adds of convolutions and linear layers, what papers call FLOPs.
    ``attention_macs`` are the operations of the kernel attention that this leaves out, with a subtract /
    absolute-accumulate pair as one.
    """

    params: int
    macs: int
    attention_macs: int


def count(backbone: nn.Module, input_size: tuple[int, int] = (224, 224)) -> Complexity:
    """Count a backbone on one image of ``(height, width)``, in eval mode; the module is left as it was."""
    attention_macs = 0

    def add_attention(module: LaplacianAttention, inputs: tuple[Any, ...]) -> None:
        nonlocal attention_macs
        hw_shape = inputs[1]
        num_landmarks = min(module.landmark_grid[0], hw_shape[0]) * min(module.landmark_grid[1], hw_shape[1])
        attention_macs += laplacian_attention_macs(
            module.num_heads, hw_shape[0] * hw_shape[1], num_landmarks, module.head_dims, module.newton_iters
        )

    weight = next(backbone.parameters())
    in_channels: Any = backbone.in_channels
    image = torch.zeros(1, in_channels, *input_size, dtype=weight.dtype, device=weight.device)
    was_training = backbone.training
    backbone.eval()
    hooks = [
        m.register_forward_pre_hook(add_attention)
        for m in backbone.modules()
        if isinstance(m, LaplacianAttention)
    ]
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            backbone(image)
    finally:
        for hook in hooks:
            hook.remove()
        backbone.train(was_training)
    by_operator = counter.get_flop_counts()["Global"]
    # Torch counts a multiply-add as two.
    macs = sum(by_operator.get(operator, 0) for operator in _CONVOLUTIONS_AND_LINEAR) // 2
    return Complexity(sum(p.numel() for p in backbone.parameters()), macs, attention_macs)


def table(archs: Iterable[str], input_size: tuple[int, int] = (224, 224)) -> str:
    """Return a Markdown table of presets, each with the papers' 1000-way classifier."""
    conventional = "FLOPs (convolutions and linear layers)"
    lines = [markdown_head(["arch", "depths", "params", conventional, "with the attention's own work"])]
    for arch in archs:
        backbone = LaplacianFormer(arch)
        found = count(backbone, input_size)
        classifier = backbone.embed_dims[-1] * NUM_CLASSES
        params, macs = found.params + classifier + NUM_CLASSES, found.macs + classifier
        counts = [
            f"{params / 1e6:.2f} M",
            f"{macs / 1e9:.2f} G",
            f"{(macs + found.attention_macs) / 1e9:.2f} G",
        ]
        lines.append(markdown_row([arch, backbone.depths, *counts]))
    return "\n".join(lines)
