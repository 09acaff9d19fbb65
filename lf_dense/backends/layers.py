"""A whole block as four nodes of an exported graph, for runtimes that load our operators.

The attention is that of ``node``. While a model is exported the operators ``torch.ops.lf_dense_export.*``
stand for the layers around it, and ``lf_dense.export`` translates them. Here they are plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .native import weights
from .node import laplacian_attention, laplacian_kernel, newton_schulz_inverse

__all__ = [
    "conv_ffn",
    "laplacian_attention",
    "laplacian_kernel",
    "merge_heads",
    "newton_schulz_inverse",
    "project_heads",
]


def _turned(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A map ``(B, H, W, C)`` by the axes of a ``RotaryTable``, or as it is where they are empty."""
    pairs = rows.shape[1]
    if pairs == 0:
        return x
    height, width = x.shape[1:3]
    over_rows = rows.mT[:, :, None].expand(2, height, width, pairs)
    over_columns = columns.mT[:, None].expand(2, height, width, pairs)
    cos, sin = torch.cat([over_rows, over_columns], -1).unsqueeze(3)
    first, second = x.unflatten(3, (-1, 4 * pairs)).chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.flatten(3)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A depthwise 3 x 3 convolution of maps ``(B, H, W, C)``."""
    maps = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=weight.shape[0])
    return maps.permute(0, 2, 3, 1)


@torch.library.custom_op("lf_dense_export::project_heads", mutates_args=())
def _project_heads(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    layers = ((q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias))
    q, k, v = (F.linear(x, *layer) for layer in layers)
    return _turned(q, rows, columns), _turned(k, rows, columns), v


@_project_heads.register_fake
def _(x: Tensor, *layers: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.new_empty(x.shape) for _ in range(3))
    return q, k, v


@torch.library.custom_op("lf_dense_export::merge_heads", mutates_args=())
def _merge_heads(
    x: Tensor,
    attended: Tensor,
    values: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
) -> Tensor:
    local = _convolved(values, conv_weight, conv_bias)
    return x + F.linear(local + attended, proj_weight, proj_bias)


@torch.library.custom_op("lf_dense_export::conv_ffn", mutates_args=())
def _conv_ffn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    hidden = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), fc1_weight, fc1_bias)
    return x + F.linear(F.gelu(_convolved(hidden, conv_weight, conv_bias)), fc2_weight, fc2_bias)


@_merge_heads.register_fake
@_conv_ffn.register_fake
def _(x: Tensor, *layers: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def project_heads(
    x: Tensor,
    norm: nn.LayerNorm,
    q: nn.Linear,
    k: nn.Linear,
    v: nn.Linear,
    turns: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``native.project_heads``; float32."""
    rows, columns = turns or [x.new_empty(2, 0, size) for size in x.shape[1:3]]
    layers = _all_weights(q, k, v)
    return torch.ops.lf_dense_export.project_heads(x, *_all_weights(norm), norm.eps, *layers, rows, columns)


def merge_heads(x: Tensor, attended: Tensor, values: Tensor, conv: nn.Conv2d, proj: nn.Linear) -> Tensor:
    """See ``native.merge_heads``; float32."""
    return torch.ops.lf_dense_export.merge_heads(x, attended, values, *_all_weights(conv, proj))


def conv_ffn(x: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, conv: nn.Conv2d, fc2: nn.Linear) -> Tensor:
    """See ``native.conv_ffn``; float32."""
    layers = _all_weights(fc1, conv, fc2)
    return torch.ops.lf_dense_export.conv_ffn(x, *_all_weights(norm), norm.eps, *layers)


def _all_weights(*layers: nn.Linear | nn.Conv2d | nn.LayerNorm) -> list[Tensor]:
    return [tensor for layer in layers for tensor in weights(layer, torch.float32)]
