"""The attentions that LaplacianAttention is compared with.

Each keeps its projections and its local convolution, and replaces what lies between them.
They need torch alone. They are for experiments (``tools/ablate.py``); ``LaplacianFormer`` uses none of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from ..attention import LaplacianAttention, RotaryTable, map_to_tokens, tokens_to_map
from ..backends import reference
from ..presets import DELTA, EPS


def gaussian_kernel(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """``exp(-|x_i - y_j|_2^2 / scale)`` of ``(..., N, d)`` and ``(..., M, d)``: ``(..., N, M)``."""
    squares = x.square().sum(-1, keepdim=True) + y.square().sum(-1, keepdim=True).mT - 2 * x @ y.mT
    return torch.exp(-squares.clamp_min(0) / scale)


class GaussianAttention(LaplacianAttention):
    """SOFT's kernel in the place of the Laplacian one; landmarks, solver and normalization stay.

    The scale is SOFT's, ``2 sqrt(head_dims)`` (Lu et al., "SOFT: Softmax-free Transformer with Linear
    Complexity").
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return reference.laplacian_attention(
            q,
            k,
            v,
            self.pool_landmarks(q.transpose(1, 2), hw_shape),
            2 * math.sqrt(self.head_dims),
            self.newton_iters,
            EPS,
            self.tau,
            DELTA,
            self.normalization,
            gaussian_kernel,
            functional.newton_schulz_inverse,
        ).transpose(1, 2)


class ExactLaplacianAttention(LaplacianAttention):
    """The whole N x N kernel matrix, without the Nystroem approximation; its cost is quadratic.

    The normalization is ``"mass"``.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        weights = functional.laplacian_kernel(q, k, self.kernel_scale)
        mean = v.mean(2, keepdim=True)
        attended = weights @ (v - mean) / q.shape[2] / (weights.mean(-1, keepdim=True) + self.tau) + mean
        return attended.transpose(1, 2)


class SoftmaxAttention(LaplacianAttention):
    """Softmax over all N x N products: quadratic."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class SpatialReductionAttention(SoftmaxAttention):
    """PVTv2's attention: softmax over the keys and values of a smaller map.

    A strided convolution makes the map ``reduction`` times smaller.

    Args:
        reduction: the convolution's size and stride; 1 is softmax over all keys.
        embed_dims, num_heads, settings: ``LaplacianAttention``'s.
    """

    def __init__(self, embed_dims: int, num_heads: int, reduction: int, **settings: Any) -> None:
        super().__init__(embed_dims, num_heads, **settings)
        self.reduction = reduction
        if reduction > 1:
            self.sr = nn.Conv2d(embed_dims, embed_dims, reduction, reduction)
            self.norm = nn.LayerNorm(embed_dims, eps=1e-6)

    def forward(self, x: Tensor, hw_shape: tuple[int, int], table: RotaryTable | None = None) -> Tensor:
        if self.reduction == 1:
            return super().forward(x, hw_shape, table)
        if table is None:
            table = RotaryTable(hw_shape, self.head_dims, x.device)
        smaller = self.sr(tokens_to_map(x, hw_shape))
        reduced = self.norm(map_to_tokens(smaller))
        reduced_table = RotaryTable(tuple(smaller.shape[2:]), self.head_dims, x.device)
        q, k = self.split_and_rotate(self.q(x), table), self.split_and_rotate(self.k(reduced), reduced_table)
        return self.merge(self.attend(q, k, self.split(self.v(reduced)), hw_shape), self.v(x), hw_shape)
