"""What PVTv2's pyramid is made of around its attention: patch embedding, feed-forward
network, residual block, stage, initialisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import map_to_tokens, rotary_table, tokens_to_map


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for whole samples, and scale up the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class PatchEmbed(nn.Module):
    """Overlapping patch embedding: a strided convolution to ceil(size / stride), and a LayerNorm."""

    def __init__(self, in_channels: int, embed_dims: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dims, kernel_size, stride, padding=kernel_size // 2)
        # PVTv2's has torch's usual 1e-5 here and 1e-6 everywhere else.
        self.norm = nn.LayerNorm(embed_dims)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x)
        return self.norm(map_to_tokens(x)), (x.shape[2], x.shape[3])


class ConvFFN(nn.Module):
    """PVTv2's feed-forward network: linear, 3 x 3 depthwise convolution, GELU, linear."""

    def __init__(self, embed_dims: int, hidden_dims: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.dwconv = nn.Conv2d(hidden_dims, hidden_dims, 3, padding=1, groups=hidden_dims)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        x = map_to_tokens(self.dwconv(tokens_to_map(self.fc1(x), hw_shape)))
        return self.drop(self.fc2(self.drop(self.act(x))))


class Block(nn.Module):
    """Pre-norm block: ``x + DropPath(attn(LN(x)))``, then ``x + DropPath(ConvFFN(LN(x)))``.

    ``attn`` takes tokens, the map's shape and the map's rotary table, and returns tokens.
    """

    def __init__(
        self,
        embed_dims: int,
        mlp_ratio: int,
        attn: nn.Module,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.ffn = ConvFFN(embed_dims, embed_dims * mlp_ratio, drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, hw_shape: tuple[int, int], table: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), hw_shape, table))
        return x + self.drop_path(self.ffn(self.norm2(x), hw_shape))


class Stage(nn.Module):
    """Patch embedding, blocks and output norm of one resolution; all its blocks share one rotary table."""

    def __init__(
        self, patch_embed: PatchEmbed, blocks: Sequence[Block], embed_dims: int, with_cp: bool = False
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dims, eps=1e-6)
        self.with_cp = with_cp
        attention: Any = blocks[0].attn
        self.head_dims: int = attention.head_dims

    def forward(self, x: Tensor) -> Tensor:
        x, hw_shape = self.patch_embed(x)
        table = rotary_table(hw_shape, self.head_dims, x.device)
        for block in self.blocks:
            if self.with_cp and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, hw_shape, table, use_reentrant=False)
            else:
                x = block(x, hw_shape, table)
        return tokens_to_map(self.norm(x), hw_shape)


def init_weights(model: nn.Module) -> None:
    """Initialise as PVTv2 does.

    Linear layers get a truncated normal of 0.02, convolutions a fan-out normal, biases zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
