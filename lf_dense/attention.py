"""LaplacianAttention: the layer around ``lf_dense.functional.laplacian_attention``.

It adds projections, a rotary embedding, landmarks, and a depthwise convolution of the values.

Tokens ``(B, N, C)`` and maps ``(B, C, H, W)`` are two views of one channels-last memory, so nothing is copied
between them.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from . import functional
from .backends import native
from .backends.reference import turned, whole_turns
from .fusing import apply_linear, can_pool
from .presets import EPS, KERNEL_SCALE, LANDMARK_GRID, NEWTON_ITERS, NORMALIZATION, TAU

# The slowest rotation has 100 times the period of the fastest, which turns twice across the map.
ROTARY_PERIOD_RATIO = 100.0


def tokens_to_map(x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
    """View tokens ``(B, H * W, C)`` as a channels-last map ``(B, C, H, W)``."""
    return x.unflatten(1, hw_shape).permute(0, 3, 1, 2)


def map_to_tokens(x: Tensor) -> Tensor:
    """View a map ``(B, C, H, W)`` as tokens ``(B, H * W, C)``; a map that is not channels-last is copied."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def rotary_axis(size: int, pairs: int, device: torch.device) -> Tensor:
    """Cosines and sines of the pairs along an axis, ``(2, pairs, size)``."""
    exponents = torch.arange(pairs, device=device, dtype=torch.float32) / pairs
    frequencies = (2 * math.pi * ROTARY_PERIOD_RATIO**-exponents)[:, None]
    positions = (torch.arange(size, device=device, dtype=torch.float32) * 2 + 1) / size - 1
    angles = frequencies * positions
    return torch.stack([angles.cos(), angles.sin()])


@functools.lru_cache(maxsize=64)
def _cpu_axis(size: int, pairs: int) -> Tensor:
    # A tensor of inference mode could not serve a training afterwards.
    with torch.inference_mode(False):
        return rotary_axis(size, pairs, torch.device("cpu"))


def kept_axis(size: int, pairs: int, device: torch.device) -> Tensor:
    """``rotary_axis``; on a CPU it is kept, because its small calls take 1 % of a pass at 224 x 224.

    What compiles or traces, and a mode that watches or fakes tensors, gets one of its own.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if device.type != "cpu" or traced or torch._C._len_torch_dispatch_stack():
        return rotary_axis(size, pairs, device)
    return _cpu_axis(size, pairs)


class RotaryTable:
    """Cosines and sines of a 2-D axial rotary embedding of one map, float32.

    Coordinates run over [-1, 1] whatever the map's size, so that a larger image interpolates the positions
    seen in training. The fastest rotation turns twice across the map, about a radian and a half per landmark
    cell of the default 7 x 7 grid: anything faster would average out of the landmarks, which are pooled after
    the rotation. Pairs are channels ``c`` and ``c + head_dims / 2``; the first half of the pairs turns with
    the row, the second with the column.

    Attributes:
        axes: cosines and sines for the rows ``(2, head_dims / 4, H)`` and the columns
            ``(2, head_dims / 4, W)``.
    """

    def __init__(self, hw_shape: tuple[int, int], head_dims: int, device: torch.device) -> None:
        pairs = head_dims // 4
        rows, columns = (kept_axis(size, pairs, device) for size in hw_shape)
        self.axes = rows, columns
        self._whole: tuple[Tensor, Tensor] | None = None

    def whole(self) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of every token and channel, ``(H * W, 1, head_dims)`` each."""
        if self._whole is not None:
            return self._whole
        whole = whole_turns(*self.axes)
        # A graph that is compiled may not change what is outside a checkpoint; it merges equal tables itself.
        if not torch.compiler.is_dynamo_compiling():
            self._whole = whole
        return whole


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Turn ``(B, N, heads, head_dims)``."""
    return turned(x, *(part.to(x.dtype) for part in table.whole()))


def pooling_matrix(size: int, cells: int, like: Tensor) -> Tensor:
    """Adaptive average pooling as a matrix ``(cells, size)``.

    Cell i averages positions floor(i size / cells) to ceil((i + 1) size / cells).
    """
    cell = torch.arange(cells, device=like.device)
    first, end = cell * size // cells, ((cell + 1) * size + cells - 1) // cells
    position = torch.arange(size, device=like.device)
    inside = (position >= first[:, None]) & (position < end[:, None])
    return (inside / (end - first)[:, None]).to(like.dtype)


def landmark_grid_pair(grid: object) -> tuple[int, int]:
    """Check one landmark grid.

    Raises:
        ValueError: it is not two positive integers.
    """
    pair = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(n, int) and n >= 1 for n in pair):
        raise ValueError(
            f"the landmark grid {grid!r} is not two positive integers (rows, columns), like (7, 7)."
        )
    return pair


def pool_over_grid(q: Tensor, hw_shape: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Average queries ``(B, N, heads, head_dims)`` of a map over a grid: ``(B, heads, m, head_dims)``.

    A map smaller than the grid has as many cells as tokens.
    """
    (height, width), (batch, _, heads, head_dims) = hw_shape, q.shape
    if can_pool(q):
        pooled = native.pool_tokens(q.flatten(2).unflatten(1, hw_shape), grid)
        return pooled.unflatten(2, (heads, head_dims)).transpose(1, 2)
    rows, columns = (min(cells, size) for cells, size in zip(grid, hw_shape))
    # Two products in place of adaptive_avg_pool2d, whose gradient on a GPU differs from run to run.
    over_rows = pooling_matrix(height, rows, q).expand(batch, rows, height)
    over_columns = pooling_matrix(width, columns, q).expand(batch * rows, columns, width)
    pooled = over_rows @ q.reshape(batch, height, width * heads * head_dims)
    pooled = over_columns @ pooled.view(batch * rows, width, heads * head_dims)
    return pooled.view(batch, rows * columns, heads, head_dims).transpose(1, 2)


class LaplacianAttention(nn.Module):
    """Multi-head Laplacian attention over the tokens of a map, with a 3 x 3 depthwise convolution.

    Landmarks are the rotated queries averaged over a fixed grid: at 224 x 224 the default 7 x 7 is the
    paper's own pooling in every stage, and at any other size their number, and so the cost per token, stays
    what it was.

    Args:
        embed_dims: channels C.
        num_heads: heads; each takes C / num_heads channels, a multiple of 4 (two axes, pairs).
        landmark_grid: rows and columns of the landmarks; a map smaller than that uses its own size.
        kernel_scale, newton_iters, normalization: see ``lf_dense.functional.laplacian_attention``.
        qkv_bias: bias of the three projections.
        proj_drop: dropout after the output projection.
        tau: see ``lf_dense.functional.laplacian_attention``.
        rotary: turn queries and keys by their place in the map.
        learn_kernel_scale: let every head learn a factor to ``kernel_scale``, whose logarithm starts at 0 and
            is the parameter ``log_scale``.

    Raises:
        ValueError: a value is out of range or the heads do not divide the channels.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        landmark_grid: tuple[int, int] = LANDMARK_GRID,
        kernel_scale: float = KERNEL_SCALE,
        newton_iters: int = NEWTON_ITERS,
        normalization: str = NORMALIZATION,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        tau: float = TAU,
        rotary: bool = True,
        learn_kernel_scale: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dims % num_heads or (embed_dims // num_heads) % 4:
            raise ValueError(
                f"{num_heads} heads of {embed_dims} channels: each head needs a whole number of channels, a "
                "multiple of 4 (the rotary embedding turns pairs along two axes)."
            )
        functional.check_kernel_scale(kernel_scale)
        functional.check_solver(newton_iters, eps=EPS)
        functional.check_normalization(normalization)
        functional.check_tau(tau)
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.head_dims = embed_dims // num_heads
        self.landmark_grid = landmark_grid_pair(landmark_grid)
        self.kernel_scale = kernel_scale
        self.newton_iters = newton_iters
        self.normalization = normalization
        self.tau = tau
        self.rotary = rotary
        self.q = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.k = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.v = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.dwconv = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop)
        self.log_scale = nn.Parameter(torch.zeros(num_heads)) if learn_kernel_scale else None

    def pool_landmarks(self, q: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Average queries ``(B, N, heads, head_dims)`` over the grid: ``(B, heads, m, head_dims)``."""
        return pool_over_grid(q, hw_shape, self.landmark_grid)

    def forward(self, x: Tensor, hw_shape: tuple[int, int], table: RotaryTable | None = None) -> Tensor:
        """Attend over one map.

        Args:
            x: tokens ``(B, H * W, C)`` in row-major order.
            hw_shape: ``(H, W)``.
            table: of this map, where the caller has it at hand for several blocks.

        Returns:
            ``(B, H * W, C)``.
        """
        if table is None:
            table = RotaryTable(hw_shape, self.head_dims, x.device)
        q, k, v = (apply_linear(layer, x) for layer in (self.q, self.k, self.v))
        attended = self.attend(
            self.split_and_rotate(q, table), self.split_and_rotate(k, table), self.split(v), hw_shape
        )
        return self.merge(attended, v, hw_shape)

    def split(self, x: Tensor) -> Tensor:
        """View ``(B, N, C)`` as ``(B, N, heads, head_dims)``."""
        return x.unflatten(2, (self.num_heads, self.head_dims))

    def split_and_rotate(self, x: Tensor, table: RotaryTable) -> Tensor:
        """Queries or keys ``(B, N, C)`` as heads ``(B, N, heads, head_dims)``, scaled and rotated."""
        x = self.scaled(self.split(x))
        return rotate(x, table) if self.rotary else x

    def scaled(self, x: Tensor) -> Tensor:
        """Heads ``(B, N, heads, head_dims)`` over what each has learnt of the kernel's scale."""
        if self.log_scale is None:
            return x
        # The kernel of points divided by a factor is the kernel whose scale has that factor.
        return x * torch.exp(-self.log_scale)[:, None].to(x.dtype)

    def merge(self, attended: Tensor, v: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Add the convolution of the values, and project.

        Args:
            attended: ``(B, N, heads, head_dims)``.
            v: values ``(B, N, C)``.
            hw_shape: ``(H, W)``.
        """
        local = self.split(map_to_tokens(self.dwconv(tokens_to_map(v, hw_shape))))
        # The sum takes the layout of its first operand, so the heads return to their place without a copy of
        # their own.
        return self.proj_drop(apply_linear(self.proj, (local + attended).flatten(2)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """The attention itself: tensors ``(B, N, heads, head_dims)`` in, one out."""
        return functional.laplacian_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            self.pool_landmarks(q, hw_shape),
            scale=self.kernel_scale,
            iters=self.newton_iters,
            tau=self.tau,
            normalization=self.normalization,
        ).transpose(1, 2)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, landmark_grid={self.landmark_grid}, "
            f"kernel_scale={self.kernel_scale}, newton_iters={self.newton_iters}, "
            f"normalization={self.normalization!r}, tau={self.tau}, rotary={self.rotary}, "
            f"learn_kernel_scale={self.log_scale is not None}"
        )
