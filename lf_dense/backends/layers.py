"""A whole block as four nodes of an exported graph, for runtimes that load our operators.

The attention is that of ``node``. While a model is exported the operators ``torch.ops.lf_dense_export.*``
stand for the layers around it, and ``lf_dense.export`` translates them. Here they are plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .native import _weights
from .node import laplacian_attention, laplacian_kernel, newton_schulz_inverse

__all__ = [
    "conv_ffn",
    "laplacian_attention",
    "laplacian_kernel",
    "merge_heads",
    "newton_schulz_inverse",
    "project_heads",
]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads ``(B, N, heads, d)`` by ``lf_dense.attention.rotary_table``, or as they are by an empty one."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin) if cos.shape[0] else x


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
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    layers = ((q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias))
    q, k, v = (F.linear(x, *layer).unflatten(2, (-1, cos.shape[2])) for layer in layers)
    return _turned(q, cos, sin), _turned(k, cos, sin), v


@_project_heads.register_fake
def _(x: Tensor, *layers: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, channels = x.shape
    head_dims = layers[-1].shape[2]
    q, k, v = (x.new_empty(batch, tokens, channels // head_dims, head_dims) for _ in range(3))
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
    local = _convolved(values.reshape(x.shape), conv_weight, conv_bias)
    return x + F.linear(local + attended.reshape(x.shape), proj_weight, proj_bias)


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
    table: tuple[Tensor, Tensor] | None,
    head_dims: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(B, N, heads, head_dims)`` of ``norm(x)``, of tokens ``(B, N, C)``; float32.

    Queries and keys are turned by ``lf_dense.attention.rotary_table``, or not, where ``table`` is None.
    """
    cos, sin = [x.new_empty(0, 1, head_dims)] * 2 if table is None else table
    layers = [tensor for layer in (q, k, v) for tensor in _weights(layer)]
    return torch.ops.lf_dense_export.project_heads(x, *_weights(norm), norm.eps, *layers, cos, sin)


def merge_heads(x: Tensor, attended: Tensor, values: Tensor, conv: nn.Conv2d, proj: nn.Linear) -> Tensor:
    """``x + proj(attended + conv(values))`` of a map ``(B, H, W, C)`` and heads ``(B, H * W, heads, d)``."""
    return torch.ops.lf_dense_export.merge_heads(x, attended, values, *_weights(conv), *_weights(proj))


def conv_ffn(x: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, conv: nn.Conv2d, fc2: nn.Linear) -> Tensor:
    """``x + fc2(GELU(conv(fc1(norm(x)))))`` of a map ``(B, H, W, C)``; float32."""
    layers = [tensor for layer in (fc1, conv, fc2) for tensor in _weights(layer)]
    return torch.ops.lf_dense_export.conv_ffn(x, *_weights(norm), norm.eps, *layers)
