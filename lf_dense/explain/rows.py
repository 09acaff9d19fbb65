"""One row of an attention matrix: the weight that a layer gives to each token's value, for one query.

The layer never forms its N x N matrix, and neither does this module. A row takes time and memory in
proportion to N m, for N tokens and m landmarks. docs/method.md has the mathematics. Everything is float64, so
that a row differs from what the layer computes by the layer's own rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..functional import laplacian_kernel, newton_schulz_inverse
from ..presets import DELTA
from .capture import LayerInputs, capture

Kernel = Callable[[Tensor, Tensor, float], Tensor]
"""Points ``(..., N, d)`` and ``(..., M, d)`` and a scale to a matrix ``(..., N, M)``."""


@dataclass(frozen=True)
class AttentionRow:
    """What one query attends to in one layer. A weight is a number that a token's value is multiplied with.

    Attributes:
        stage, block: the layer, counted from 1.
        stride: pixels of the network's input per token.
        token: row and column of the query's token.
        normalization: the layer's; see ``lf_dense.functional.laplacian_attention``.
        nystroem: the layer's own weights ``(heads, H, W)``. Each head's sum is 1 under ``"mass"``.
        landmarks: what multiplies the landmarks' kernel with the keys, ``(heads, rows, columns)``: a row of
            ``C_q A`` under ``"mass"``, and of the centred (and scaled) ``C_q`` times ``A`` otherwise.
        exact: the weights without landmarks ``(heads, H, W)``. Under ``"mass"`` the kernel's row is
            normalised as the layer does it, otherwise it is divided by its sum.
        softmax: ``softmax(q k / sqrt(d))`` of the same queries and keys ``(heads, H, W)``.
        mass: mean of the kernel between the query and all keys ``(heads,)``. Where it is far below the
            layer's ``tau``, ``"mass"`` gives nearly the same weight to every token.
    """

    stage: int
    block: int
    stride: int
    token: tuple[int, int]
    normalization: str
    nystroem: Tensor
    landmarks: Tensor
    exact: Tensor
    softmax: Tensor
    mass: Tensor

    def agreement(self, head: int | None = None) -> float:
        """Correlation over the tokens of the layer's weights with the exact ones.

        Args:
            head: one head, from 0 on; None takes the means over the heads.

        Returns:
            From -1 to 1; NaN where the weights are all the same, as in a map of one token.
        """
        pair = [
            (rows.mean(0) if head is None else rows[head]).flatten() for rows in (self.nystroem, self.exact)
        ]
        return float(torch.corrcoef(torch.stack(pair))[0, 1])


def _smoothed(kernel: Tensor, tau: float) -> Tensor:
    """``"mass"`` applied to rows ``(..., N)`` of a kernel matrix."""
    mass = kernel.mean(-1, keepdim=True)
    num_tokens = kernel.shape[-1]
    return (kernel - mass) / (num_tokens * (mass.clamp_min(0) + tau)) + 1 / num_tokens


def nystroem_rows(
    inputs: LayerInputs, tokens: Sequence[int], kernel: Kernel = laplacian_kernel
) -> tuple[Tensor, Tensor]:
    """Rows of the matrix ``Z`` with ``Z V`` the layer's attention, before its convolution of the values.

    Args:
        inputs: what the layer attends with.
        tokens: T queries, as indices into the N tokens.
        kernel: another one for comparison, with the layer's scale.

    Returns:
        The rows ``(heads, T, N)``, and the landmarks' weights in them ``(heads, T, m)``.
    """
    layer, landmarks, num_tokens = inputs.layer, inputs.landmarks, inputs.q.shape[1]
    scale = layer.kernel_scale
    solved = newton_schulz_inverse(kernel(landmarks, landmarks, scale), layer.newton_iters)
    kernel_k = kernel(inputs.k, landmarks, scale)
    kernel_q = kernel(inputs.q[:, list(tokens)], landmarks, scale)
    if layer.normalization == "mass":
        weights = kernel_q @ solved
        return _smoothed(weights @ kernel_k.mT, layer.tau), weights
    of_all = kernel(inputs.q, landmarks, scale)
    mean = of_all.mean(1, keepdim=True)
    centred, of_all = kernel_q - mean, of_all - mean
    if layer.normalization == "whiten_keys":
        weights = centred @ solved
        spread = solved @ (of_all.mT @ of_all / num_tokens) @ solved
        variance = (kernel_k @ spread * kernel_k).sum(-1).clamp_min(0)
        deviations = weights @ kernel_k.mT * torch.rsqrt(variance + DELTA)[:, None]
    else:
        weights = centred * torch.rsqrt(of_all.square().mean(1, keepdim=True) + DELTA) @ solved
        deviations = weights @ kernel_k.mT
    return (deviations + 1) / num_tokens, weights


def exact_rows(inputs: LayerInputs, tokens: Sequence[int], kernel: Kernel = laplacian_kernel) -> Tensor:
    """Rows ``(heads, T, N)`` of the smoother without landmarks; the kernel as for ``nystroem_rows``.

    Under ``"mass"`` the normalisation is the layer's. The whitening forms would need all N rows for the
    variance of a column, so there a row is divided by its sum.
    """
    layer = inputs.layer
    values = kernel(inputs.q[:, list(tokens)], inputs.k, layer.kernel_scale)
    return _smoothed(values, layer.tau if layer.normalization == "mass" else 0.0)


def softmax_rows(inputs: LayerInputs, tokens: Sequence[int]) -> Tensor:
    """Rows ``(heads, T, N)`` of softmax attention with the same queries and keys."""
    q = inputs.q[:, list(tokens)]
    return torch.softmax(q @ inputs.k.mT / q.shape[-1] ** 0.5, -1)


def row_at(inputs: LayerInputs, token: tuple[int, int]) -> AttentionRow:
    """What the query at one token, by row and column, attends to in a layer."""
    index = [token[0] * inputs.hw_shape[1] + token[1]]
    nystroem, weights = nystroem_rows(inputs, index)
    return AttentionRow(
        inputs.stage,
        inputs.block,
        inputs.stride,
        token,
        inputs.layer.normalization,
        nystroem.unflatten(-1, inputs.hw_shape)[:, 0],
        weights.unflatten(-1, inputs.grid)[:, 0],
        exact_rows(inputs, index).unflatten(-1, inputs.hw_shape)[:, 0],
        softmax_rows(inputs, index).unflatten(-1, inputs.hw_shape)[:, 0],
        laplacian_kernel(inputs.q[:, index], inputs.k, inputs.layer.kernel_scale).mean((1, 2)),
    )


def token_at(inputs: LayerInputs, x: float, y: float) -> tuple[int, int]:
    """Row and column of the token whose ``stride`` x ``stride`` cell holds a point of the network's input.

    ``x`` and ``y`` count from the input's upper left corner, in pixels.
    """
    row, column = (int(place // inputs.stride) for place in (y, x))
    return min(row, inputs.hw_shape[0] - 1), min(column, inputs.hw_shape[1] - 1)


def attention_rows(
    model: nn.Module,
    image: Tensor,
    query: tuple[float, float],
    stages: Sequence[int] | None = None,
    block: int | None = None,
) -> list[AttentionRow]:
    """What one pixel of an image attends to in each stage.

    Args:
        model: a LaplacianFormer, or a model with one inside.
        image: normalised image ``(1, C, H, W)`` or ``(C, H, W)`` on the model's device.
        query: column and row of the pixel, ``(x, y)``.
        stages: stages to show, 1 to 4; None shows all.
        block: block of each stage, from 1 on; None is the last.

    Returns:
        One row per stage.

    Raises:
        UsageError: the query lies outside the image, the model has no LaplacianFormer, or a stage or block
            does not exist.
    """
    check_query(query, image.shape[-1], image.shape[-2])
    x, y = query
    return [
        row_at(inputs, token_at(inputs, x + 0.5, y + 0.5)) for inputs in capture(model, image, stages, block)
    ]


def check_query(query: tuple[float, float], width: int, height: int) -> None:
    """Make sure that a query is a pixel of an image.

    Raises:
        UsageError: it is not.
    """
    x, y = query
    if not (0 <= x < width and 0 <= y < height):
        raise UsageError(
            f"the query {x:g},{y:g} lies outside the image of {width} x {height} pixels: give X from 0 to "
            f"{width - 1} and Y from 0 to {height - 1}."
        )
