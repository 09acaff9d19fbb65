"""Which operators are measured at which shapes, and on which tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional
from ..presets import ARCHS, STRIDES

# Every preset has these.
WIDTHS = ARCHS["tiny"]["embed_dims"]
HEADS = ARCHS["tiny"]["num_heads"]

OPS = ("laplacian_kernel", "newton_schulz_inverse", "laplacian_attention")
PASSES = ("forward", "forward+backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Case(NamedTuple):
    """One operator at one shape; ``size`` is None where the operator does not see the image."""

    op: str
    direction: str
    size: tuple[int, int] | None
    stage: int
    map_shape: tuple[int, int]
    grid: tuple[int, int]
    batch: int

    @property
    def tokens(self) -> int:
        return math.prod(self.map_shape)

    @property
    def landmarks(self) -> int:
        return math.prod(self.grid)

    @property
    def heads(self) -> int:
        return HEADS[self.stage - 1]

    @property
    def head_dims(self) -> int:
        return WIDTHS[self.stage - 1] // self.heads

    @property
    def pairs(self) -> int:
        """Subtract and absolute-accumulate pairs of one kernel matrix."""
        return self.batch * self.heads * self.tokens * self.landmarks * self.head_dims

    @property
    def size_text(self) -> str:
        return "x".join(map(str, self.size)) if self.size else "any"

    def __str__(self) -> str:
        where = self.size_text if self.size else "any size"
        return f"{self.op} ({self.direction}) at {where}, stage {self.stage}, {self.landmarks} landmarks"


class Problem(NamedTuple):
    """A case's tensors, and the gradient that flows back into its output."""

    inputs: tuple[Tensor, ...]
    grad: Tensor
    case: Case

    @property
    def backward(self) -> bool:
        return self.case.direction != "forward"

    def to(self, dtype: torch.dtype) -> Problem:
        inputs = tuple(x.detach().to(dtype).requires_grad_(self.backward) for x in self.inputs)
        return Problem(inputs, self.grad.to(dtype), self.case)


def build_cases(
    ops: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    stages: Sequence[int],
    landmarks: Sequence[int],
    passes: Sequence[str],
    batch: int = 1,
) -> Iterator[Case]:
    """Yield every combination once.

    A grid that does not fit its map is clipped as the backbone clips it, so two combinations may be one case.
    The solver sees nothing of the image but the grid.
    """
    seen = set()
    for op, size, stage, count, direction in itertools.product(ops, sizes, stages, landmarks, passes):
        stride, side = STRIDES[stage - 1], math.isqrt(count)
        height, width = (-(-pixels // stride) for pixels in size)
        grid = (min(side, height), min(side, width))
        shown = None if op == "newton_schulz_inverse" else size
        case = Case(op, direction, shown, stage, (height, width), grid, batch)
        key = (op, direction, shown, stage, grid)
        if key not in seen:
            seen.add(key)
            yield case


def build_problem(case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    """Build tensors as ``LaplacianAttention`` lays them out.

    Queries, keys and values are views of ``(B, N, heads, d)`` projections. Landmarks are pooled from queries.
    """
    random = torch.Generator().manual_seed(0)
    heads = (case.heads, case.head_dims)

    def projection() -> Tensor:
        return torch.randn(case.batch, case.tokens, *heads, generator=random).mul_(0.5).to(device, dtype)

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_(case.direction != "forward")

    q = projection()
    landmarks = pool_to_grid(q.float(), case.map_shape, case.grid).to(dtype)
    q, landmarks = q.transpose(1, 2), landmarks.transpose(1, 2)
    inputs: tuple[Tensor, ...]
    if case.op == "laplacian_kernel":
        inputs = (q, landmarks)
        grad = torch.randn(*q.shape[:3], case.landmarks, generator=random)
    elif case.op == "newton_schulz_inverse":
        inputs = (functional.laplacian_kernel(landmarks, landmarks, backend="reference"),)
        grad = torch.randn(inputs[0].shape, generator=random)
    else:
        inputs = (q, projection().transpose(1, 2), projection().transpose(1, 2), landmarks)
        grad = projection().transpose(1, 2)
    return Problem(tuple(leaf(x) for x in inputs), grad.to(device, dtype), case)


def pool_to_grid(x: Tensor, map_shape: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Average tokens ``(B, N, heads, d)`` over a fixed grid: ``(B, m, heads, d)``."""
    return _as_tokens(F.adaptive_avg_pool2d(_as_map(x, map_shape), grid), x)


def pool_by_ratio(x: Tensor, map_shape: tuple[int, int], ratio: int) -> Tensor:
    """Average tokens ``(B, N, heads, d)`` over cells of ``ratio`` by ``ratio``."""
    return _as_tokens(F.avg_pool2d(_as_map(x, map_shape), ratio), x)


def _as_map(x: Tensor, map_shape: tuple[int, int]) -> Tensor:
    return x.flatten(2).unflatten(1, map_shape).permute(0, 3, 1, 2)


def _as_tokens(pooled: Tensor, like: Tensor) -> Tensor:
    return pooled.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, like.shape[2:])
