"""A whole block as four nodes of an exported graph, for runtimes that load our operators.

The attention is that of ``node``. While a model is exported the operators ``torch.ops.lf_dense_export.*``
stand for the layers around it, and ``lf_dense.export`` translates them. Here they are plain PyTorch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import native
from .node import laplacian_attention, laplacian_kernel, newton_schulz_inverse
from .reference import turned, whole_turns

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
    if rows.shape[1] == 0:
        return x
    heads = x.flatten(1, 2).unflatten(2, (-1, 4 * rows.shape[1]))
    return turned(heads, *whole_turns(rows, columns)).reshape(x.shape)


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


project_heads = functools.partial(native.project_heads, library="lf_dense_export")
merge_heads = functools.partial(native.merge_heads, library="lf_dense_export")
conv_ffn = functools.partial(native.conv_ffn, library="lf_dense_export")
