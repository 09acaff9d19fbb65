"""What PVTv2's pyramid is made of around its attention: patch embedding, feed-forward
network, residual block, stage, initialisation."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention import LaplacianAttention, RotaryTable, map_to_tokens, tokens_to_map
from .backends import export_form, native
from .fusing import apply_linear, can_be_nodes, can_fuse, can_rewrite, can_train

LAYERS = (nn.Linear, nn.Conv2d, nn.GELU, nn.Dropout, nn.LayerNorm)

# Large enough that a strip's calls cost nothing, small beside what else maps of that size take.
STRIP_BYTES = {"cpu": 64 << 20}
STRIP_BYTES_ELSEWHERE = 512 << 20
# Of the hidden channels of a network 8 times as wide inside, in exported graphs: their memory is that of one.
EXPORTED_GROUPS = 4
# Tokens up to which a patch embedding is a product: at 49 it takes half of the convolution's time, at 196 as
# long.
SMALL_MAP = 100


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
        size, stride = self.proj.kernel_size[0], self.proj.stride[0]
        hw_shape = (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1
        if self.is_small(x, hw_shape):
            patches = F.unfold(x, size, padding=size // 2, stride=stride)
            weight, bias = self.proj.weight.flatten(1), self.proj.bias[:, None]  # type: ignore[index]
            tokens = torch.baddbmm(bias, weight.expand(x.shape[0], -1, -1), patches).transpose(1, 2)
        else:
            tokens = map_to_tokens(self.proj(x))
        # torch's takes two to three times as long in bfloat16, and less than the operator in float32.
        if tokens.dtype == torch.bfloat16 and can_fuse(tokens, self.norm, nn.LayerNorm):
            lines = tokens.contiguous().unflatten(1, hw_shape)
            return native.norm_to_map(lines, self.norm, with_map=False)[0].flatten(1, 2), hw_shape
        return self.norm(tokens), hw_shape

    def is_small(self, x: Tensor, hw_shape: tuple[int, int]) -> bool:
        """Whether the convolution takes longer than a product with the patches.

        On a CPU torch lays out a convolution's weights anew in every call, which at few tokens takes longer
        than the arithmetic.
        """
        # The sizes last: a graph that is being exported for any size must not be asked.
        return (
            x.device.type == "cpu"
            and can_rewrite(x, self, PatchEmbed, *LAYERS)
            and x.shape[0] * hw_shape[0] * hw_shape[1] <= SMALL_MAP
        )


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
        """Tokens ``(B, H * W, C)`` of a map ``hw_shape`` to tokens.

        Without a gradient a large map goes through in strips: the hidden one is never there as a whole.
        """
        if export_form():
            return self.in_groups(x, hw_shape)
        if can_rewrite(x, self, ConvFFN, *LAYERS):
            return self.in_strips(x, hw_shape)
        return self.whole(x, hw_shape)

    def whole(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """The layers, one after the other, or where a gradient follows two of them as one operator."""
        x = apply_linear(self.fc1, x)
        if can_train(x, self.dwconv, self.act):
            x = native.conv_gelu(x.unflatten(1, hw_shape), self.dwconv).flatten(1, 2)
        else:
            x = self.act(map_to_tokens(self.dwconv(tokens_to_map(x, hw_shape))))
        return self.drop(apply_linear(self.fc2, self.drop(x)))

    def in_groups(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """The same to rounding, group by group of hidden channels: for graphs, whose maps have any size."""
        groups = EXPORTED_GROUPS if self.fc1.out_features >= 8 * self.fc1.in_features else 1
        if groups == 1:
            return self.whole(x, hw_shape)
        by_rows: list[Any] = [self.fc1.weight, self.fc1.bias, self.dwconv.weight, self.dwconv.bias]
        parts = zip(*(tensor.chunk(groups) for tensor in by_rows), self.fc2.weight.chunk(groups, 1))
        out: Tensor = self.fc2.bias
        for weight, bias, taps, taps_bias, last in parts:
            hidden = tokens_to_map(F.linear(x, weight, bias), hw_shape)
            hidden = F.conv2d(hidden, taps, taps_bias, padding=1, groups=taps.shape[0])
            out = out + F.linear(self.act(map_to_tokens(hidden)), last)
        return out

    def in_strips(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """The same, bit for bit, in strips of rows whose hidden activations take ``STRIP_BYTES`` at most.

        A strip takes the rows above and below along, and drops what comes of them.
        """
        height, width = hw_shape
        row_bytes = x.shape[0] * width * self.fc1.out_features * x.element_size()
        rows = max(1, STRIP_BYTES.get(x.device.type, STRIP_BYTES_ELSEWHERE) // row_bytes)
        if rows >= height:
            return self.whole(x, hw_shape)
        lines, strips = x.unflatten(1, hw_shape), []
        for first in range(0, height, rows):
            begin, last = max(0, first - 1), min(height, first + rows)
            part = lines[:, begin : min(height, last + 1)]
            strip = self.whole(part.flatten(1, 2), (part.shape[1], width)).unflatten(1, part.shape[1:3])
            strips.append(strip[:, first - begin : last - begin])
        return torch.cat(strips, 1).flatten(1, 2)


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
        ffn_with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.ffn = ConvFFN(embed_dims, embed_dims * mlp_ratio, drop_rate)
        self.drop_path = DropPath(drop_path_rate)
        self.ffn_with_cp = ffn_with_cp

    def forward(self, x: Tensor, hw_shape: tuple[int, int], table: RotaryTable) -> Tensor:
        drops = self.training and self.drop_path.rate > 0
        operators = None if drops else self.operators(x)
        if operators is not None:
            return self.fused(x, hw_shape, table, operators)
        x = x + self.drop_path(self.attn(self.norm1(x), hw_shape, table))
        if self.ffn_with_cp and self.training and torch.is_grad_enabled():
            return x + self.drop_path(checkpoint(self.ffn, self.norm2(x), hw_shape, use_reentrant=False))
        return x + self.drop_path(self.ffn(self.norm2(x), hw_shape))

    def operators(self, x: Tensor) -> ModuleType | None:
        """Whose operators of whole layers serve the block: native ones, or the nodes of an exported graph."""
        kinds = (Block, LaplacianAttention, ConvFFN, DropPath, *LAYERS)
        if can_fuse(x, self, *kinds):
            return native
        if can_be_nodes(x, self, *kinds) and self.attn.normalization == "mass":
            return importlib.import_module("lf_dense.backends.layers")  # slow, and of no use elsewhere
        return None

    def fused(
        self, x: Tensor, hw_shape: tuple[int, int], table: RotaryTable, operators: ModuleType
    ) -> Tensor:
        """The same by one operator, or by one before the attention, one after it, and one for the network."""
        attn: Any = self.attn
        ffn = self.ffn
        turns = table.axes if attn.rotary else None
        x = x.contiguous().unflatten(1, hw_shape)
        whole = attn.normalization == "mass" and attn.log_scale is None and "attend" not in vars(attn)
        if whole and operators is native:
            return native.attention_block(x, self.norm1, attn, self.norm2, ffn, turns).flatten(1, 2)
        heads = operators.project_heads(x, self.norm1, attn.q, attn.k, attn.v, turns)
        q, k, v = (attn.split(part.flatten(1, 2)) for part in heads)
        attended = attn.attend(attn.scaled(q), attn.scaled(k), v, hw_shape)
        attended = attended.flatten(2).contiguous().unflatten(1, hw_shape)
        x = operators.merge_heads(x, attended, heads[2], attn.dwconv, attn.proj)
        return operators.conv_ffn(x, self.norm2, ffn.fc1, ffn.dwconv, ffn.fc2).flatten(1, 2)


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

    def forward(self, x: Tensor, outs: list[Tensor] | None = None) -> Tensor:
        """From the map of the stage before to this one's, channels-last.

        ``outs`` takes a contiguous copy, which costs less here than afterwards.
        """
        x, hw_shape = self.patch_embed(x)
        table = RotaryTable(hw_shape, self.head_dims, x.device)
        for block in self.blocks:
            if self.with_cp and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, hw_shape, table, use_reentrant=False)
            else:
                x = block(x, hw_shape, table)
        if can_fuse(x, self.norm, nn.LayerNorm):
            lines = x.contiguous().unflatten(1, hw_shape)
            tokens, copy = native.norm_to_map(lines, self.norm, with_map=outs is not None)
            x = tokens.permute(0, 3, 1, 2)
        else:
            x = tokens_to_map(self.norm(x), hw_shape)
            copy = x.contiguous() if outs is not None else x
        if outs is not None:
            outs.append(copy)
        return x


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
