"""The attention in operators that every runtime has, for models that leave PyTorch: no L1 distance operator,
no library of ours.

Tokens go through in blocks of ``BLOCK``, by a scan whose number of steps is the graph's to choose, so that
nothing of size N x m x d, nor even N x m, is ever there. ``lf_dense.export`` chooses it; ``functional`` calls
it. Gradients are not its business.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

from .reference import compute_dtype

# Tokens of a step: its differences to 49 landmarks in 64 channels are 3.2 MB. Half as many take 1.1 to 1.2
# times as long in both runtimes, and twice as many gain nothing.
BLOCK = 256


def _kernel(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """``(..., n, d)`` and ``(..., m, d)`` give ``(..., n, m)``, by way of ``(..., n, m, d)``."""
    return torch.exp((x.unsqueeze(-2) - y.unsqueeze(-3)).abs().sum(-1) / -scale)


def _blocks(x: Tensor) -> Tensor:
    """``(B, heads, N, d)`` as ``(blocks, B, heads, BLOCK, d)``, filled up with zeros."""
    count = (x.shape[2] + BLOCK - 1) // BLOCK
    x = torch.nn.functional.pad(x, (0, 0, 0, count * BLOCK - x.shape[2]))
    return x.unflatten(2, (count, BLOCK)).permute(2, 0, 1, 3, 4)


def _rows(blocks: Tensor, count: int) -> Tensor:
    """The reverse of ``_blocks``."""
    return blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :count]


def laplacian_kernel(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """See ``lf_dense.functional.laplacian_kernel``; ``(B, heads, N, d)`` alone."""
    dtype = compute_dtype(x.dtype)
    points, others = _blocks(x.to(dtype)), y.to(dtype)

    def step(carried: Any, block: Any) -> tuple[Any, Tensor]:
        points, others = block
        return carried.clone(), _kernel(points, others, scale)

    every = others.expand(points.shape[0], *others.shape)
    _, kernel = scan(step, others.new_zeros(()), (points, every), dim=0)
    return _rows(kernel, x.shape[2]).to(x.dtype)


def newton_schulz_inverse(w: Tensor, iters: int, eps: float) -> Tensor:
    """See ``lf_dense.functional.newton_schulz_inverse``."""
    dtype = compute_dtype(w.dtype)
    identity = torch.eye(w.shape[-1], dtype=dtype, device=w.device)
    matrix = w.to(dtype) + eps * identity
    bound = matrix.sum(-1).amax(-1)[..., None, None]
    # artanh by logarithms: runtimes differ in whether they have it.
    root = torch.sqrt(eps / bound)
    angle = torch.log((1 + root) / (1 - root))
    inverse = _gain(angle) / bound * identity
    for step in range(1, iters + 1):
        inverse = _gain(2.0**step * angle) * (inverse @ (2 * identity - matrix @ inverse))
    wide = inverse.double()
    return (wide @ (2 * identity.double() - matrix.double() @ wide)).to(w.dtype)


def _gain(angle: Tensor) -> Tensor:
    """``1 + 1 / cosh(angle)`` for angles of 0 or more, without overflow."""
    decay = torch.exp(-angle)
    return 1 + 2 * decay / (1 + decay * decay)


def laplacian_attention(
    q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, scale: float, iters: int, eps: float, tau: float
) -> Tensor:
    """See ``lf_dense.functional.laplacian_attention``; normalization ``"mass"``."""
    dtype, count = compute_dtype(q.dtype), q.shape[2]
    points, values = landmarks.to(dtype), v.to(dtype)
    solved = newton_schulz_inverse(_kernel(points, points, scale), iters, eps)
    mean_value = values.mean(-2, keepdim=True)
    # What fills the last block up is no key.
    is_key = _blocks(torch.ones_like(values[:1, :1, :, :1]))

    keys = _blocks(k.to(dtype))

    # Each step gets all that it reads as a slice of its own: what is carried from step to step goes wrong in
    # OpenVINO 2026.4 (NaN, or a crash) when a later image is larger.
    def each(x: Tensor) -> Tensor:
        return x.expand(keys.shape[0], *x.shape)

    def key_step(carried: Any, block: Any) -> tuple[Any, Any]:
        keys, values, is_key, points = block
        kernel = _kernel(keys, points, scale) * is_key
        return carried.clone(), (kernel.mT @ values, kernel.sum(-2))

    nothing = points.new_zeros(())
    blocks = (keys, _blocks(values - mean_value), is_key, each(points))
    _, (sums, mass) = scan(key_step, nothing, blocks, dim=0)
    pooled, column_mass = solved @ sums.sum(0) / count, solved @ mass.sum(0).unsqueeze(-1) / count

    def query_step(carried: Any, block: Any) -> tuple[Any, Tensor]:
        queries, points, pooled, column_mass = block
        kernel = _kernel(queries, points, scale)
        row = kernel @ pooled / ((kernel @ column_mass).clamp_min(0) + tau)
        return carried.clone(), row

    queries = (_blocks(q.to(dtype)), each(points), each(pooled), each(column_mass))
    _, rows = scan(query_step, nothing, queries, dim=0)
    return (_rows(rows, count) + mean_value).to(v.dtype)
