"""What the landmarks cost: the attention's output beside that of the same smoother without landmarks."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional
from ..ablation.attentions import gaussian_kernel
from ..attention import pool_over_grid
from ..benchmark.timing import timed
from .capture import LayerInputs
from .rows import Kernel, exact_rows, nystroem_rows

PASSES = 5


class Cost(NamedTuple):
    """What one choice of landmarks costs in one layer, for one image.

    Attributes:
        stage: 1 to 4.
        tokens: N.
        landmarks: m.
        kernel: ``laplacian`` or ``gaussian``.
        place: a key of ``PLACES``.
        side: cells along a side that were asked for.
        output: ``|Z V - E V| / |E V|`` over the sampled queries; Z is the layer's matrix, E the exact one.
        deviation: the same against ``|E V - mean V|``: what the attention adds to plain averaging.
        mass: the mean of the exact kernel over the sampled queries and all keys.
        seconds: of one forward pass of the operator in float32; None for another kernel than the layer's.
    """

    stage: int
    tokens: int
    landmarks: int
    kernel: str
    place: str
    side: int
    output: float
    deviation: float
    mass: float
    seconds: float | None


def pooled(inputs: LayerInputs, rows: int, columns: int) -> Tensor:
    """Queries averaged over a grid, as the layer does it: ``(heads, rows * columns, d)``."""
    return pool_over_grid(inputs.q.transpose(0, 1)[None], inputs.hw_shape, (rows, columns))[0]


def _shaped(inputs: LayerInputs, side: int) -> Tensor:
    """As many cells as a square grid has, or nearly, in the map's own proportions."""
    height, width = inputs.hw_shape
    rows = max(1, round(side * math.sqrt(height / width)))
    return pooled(inputs, rows, max(1, round(side * side / rows)))


def _centres(inputs: LayerInputs, side: int) -> Tensor:
    """The queries in the middle of the grid's cells, without an average."""
    height, width = inputs.hw_shape
    rows, columns = (
        ((torch.arange(min(side, size)) + 0.5) * size / min(side, size)).long() for size in (height, width)
    )
    return inputs.q[:, (rows[:, None] * width + columns).flatten()]


def _random(inputs: LayerInputs, side: int) -> Tensor:
    """Queries drawn at random, the same ones each time."""
    count = inputs.q.shape[1]
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: side * side]
    return inputs.q[:, chosen]


def _square(inputs: LayerInputs, side: int) -> Tensor:
    """Averages over a square grid, as the layer has them."""
    return pooled(inputs, side, side)


# Where landmarks come from: each gives (heads, m, d) for a layer and a number of cells along a side.
PLACES: dict[str, Callable[[LayerInputs, int], Tensor]] = {
    "grid": _square,
    "shaped": _shaped,
    "centres": _centres,
    "random": _random,
}


def gaussian(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """SOFT's kernel; the scale is ``2 sqrt(d)`` whatever is asked for."""
    return gaussian_kernel(x, y, 2 * math.sqrt(x.shape[-1]))


KERNELS: dict[str, Kernel] = {"laplacian": functional.laplacian_kernel, "gaussian": gaussian}


def sample_queries(inputs: LayerInputs, count: int) -> list[int]:
    """Queries spread at random over the map, the same ones for every choice of landmarks."""
    generator = torch.Generator().manual_seed(inputs.stage)
    return torch.randperm(inputs.q.shape[1], generator=generator)[:count].sort().values.tolist()


def costs(
    inputs: LayerInputs,
    sides: Sequence[int],
    queries: int,
    kernels: Sequence[str] = tuple(KERNELS),
    place_side: int = 7,
) -> Iterator[Cost]:
    """Measure a layer: every grid with every kernel, and the other places at one number of landmarks.

    Args:
        inputs: what the layer attends with.
        sides: cells along a side of the square grids.
        queries: how many are sampled.
        kernels: keys of ``KERNELS``.
        place_side: cells along a side for the places that are no square grid, with the layer's kernel alone.
    """
    tokens = sample_queries(inputs, queries)
    mean = inputs.v.mean(1, keepdim=True)
    for kernel in kernels:
        exact_weights = exact_rows(inputs, tokens, KERNELS[kernel])
        exact = exact_weights @ inputs.v
        mass = float(KERNELS[kernel](inputs.q[:, tokens], inputs.k, inputs.layer.kernel_scale).mean())
        choices = [("grid", side) for side in sides]
        if kernel == "laplacian":
            choices += [(place, place_side) for place in PLACES if place != "grid"]
        for place, side in choices:
            landmarks = PLACES[place](inputs, side)
            chosen = replace(inputs, landmarks=landmarks)
            weights, _ = nystroem_rows(chosen, tokens, KERNELS[kernel])
            error = torch.linalg.vector_norm(weights @ inputs.v - exact)
            yield Cost(
                inputs.stage,
                inputs.q.shape[1],
                landmarks.shape[1],
                kernel,
                place,
                side,
                float(error / torch.linalg.vector_norm(exact)),
                float(error / torch.linalg.vector_norm(exact - mean)),
                mass,
                _seconds(chosen) if kernel == "laplacian" else None,
            )


@torch.no_grad()
def _seconds(inputs: LayerInputs) -> float:
    """The median of several passes of the layer's operator, after one that does not count."""
    layer = inputs.layer
    q, k, v, landmarks = (x.float()[None] for x in (inputs.q, inputs.k, inputs.v, inputs.landmarks))
    attend = functools.partial(
        functional.laplacian_attention,
        q,
        k,
        v,
        landmarks,
        scale=layer.kernel_scale,
        iters=layer.newton_iters,
        tau=layer.tau,
        normalization=layer.normalization,
    )
    return statistics.median([timed(attend, q.device)[0] for _ in range(PASSES + 1)][1:])
