"""The attention's mathematics in plain PyTorch: the definition of right for every other implementation.

Paper: "LaplacianFormer: Rethinking Linear Attention with Laplacian Kernel" (arXiv 2604.20368). Nothing here
forms an N x N matrix, and in float32 nothing of size N x m x d. Half-precision inputs are computed in float32
and rounded once, at the end; autocast does not reach inside, because the solver's condition number (about m /
eps) leaves half precision no correct digit. Arguments are not checked here: ``lf_dense.functional`` does
that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for anything narrower, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that holds every tensor's values."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _without_autocast(x: Tensor) -> AbstractContextManager:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def whole_turns(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """What an axial rotary embedding multiplies a map's tokens with.

    Cosines and sines of the rows' pairs ``(2, pairs, H)`` and of the columns' ``(2, pairs, W)`` give cosines
    and signed sines of every token and channel, ``(H * W, 1, 4 * pairs)`` each.
    """
    height, width = rows.shape[2], columns.shape[2]
    over_map = [
        rows.mT[:, :, None].expand(2, height, width, -1),
        columns.mT[:, None].expand(2, height, width, -1),
    ]
    cos, sin = torch.cat(over_map, -1).flatten(1, 2).unsqueeze(2)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def turned(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn ``(B, N, heads, head_dims)``: pairs are channels ``c`` and ``c + head_dims / 2``."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def laplacian_kernel(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """``exp(-|x_i - y_j|_1 / scale)`` in the inputs' dtype (paper, section 3).

    ``(..., N, d)`` and ``(..., M, d)`` give ``(..., N, M)``.
    """
    dtype = compute_dtype(x.dtype)
    with _without_autocast(x):
        return torch.exp(torch.cdist(x.to(dtype), y.to(dtype), p=1.0) / -scale).to(x.dtype)


def inverse_gradient(inverse: Tensor, grad: Tensor) -> Tensor:
    """``-A^T grad A^T``, the gradient through an inverse ``A``.

    The products are in float64: neither TF32, nor ``torch.set_float32_matmul_precision``, nor autocast
    shortens those.
    """
    transposed = inverse.mT.double()
    return -(transposed @ grad.double() @ transposed).to(inverse.dtype)


class _NewtonSchulzInverse(torch.autograd.Function):
    """The iteration, with the derivative of the exact inverse, which it has converged to."""

    @staticmethod
    def forward(w: Tensor, iters: int, eps: float) -> Tensor:
        identity = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
        w = w + eps * identity
        bound = w.sum(-1).amax(-1)[..., None, None]
        angle = 2 * torch.atanh(torch.sqrt(eps / bound))
        inverse = (1 + 1 / torch.cosh(angle)) / bound * identity
        for step in range(1, iters + 1):
            inverse = (1 + 1 / torch.cosh(2**step * angle)) * (inverse @ (2 * identity - w @ inverse))
        # One plain step in float64 takes off the rounding that the iteration gathered, which whitening would
        # amplify.
        wide, residual = inverse.double(), 2 * identity.double() - w.double() @ inverse.double()
        return (wide @ residual).to(w.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return inverse_gradient(inverse, grad), None, None


def newton_schulz_inverse(w: Tensor, iters: int, eps: float) -> Tensor:
    """``(w + eps I)^-1`` of matrices ``(..., m, m)`` by scaled Newton-Schulz steps (paper, section 3.3).

    The start and the scaling are the project's own. The spectrum of ``w + eps I`` over its largest row sum
    ``u`` lies in ``[eps / u, 1]``, and scaling each step keeps the spectrum of ``W X`` centred on 1, in ``1
    +- g`` say. A step and its scaling take ``1 / g`` to ``2 / g^2 - 1``, the doubling of a hyperbolic cosine,
    so ``g`` after k steps is ``1 / cosh(2^k a)`` with ``a = 2 artanh(sqrt(eps / u))``, and the factor of each
    step ``1 + g``. That bounds the residual for every input; the usual start ``1.8 W / u^2`` has not begun to
    converge on a blank image after 20 steps.
    """
    with _without_autocast(w):
        return _NewtonSchulzInverse.apply(w.to(compute_dtype(w.dtype)), iters, eps).to(w.dtype)


def laplacian_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    scale: float,
    iters: int,
    eps: float,
    tau: float,
    delta: float,
    normalization: str,
    kernel: Callable[[Tensor, Tensor, float], Tensor] = laplacian_kernel,
    inverse: Callable[[Tensor, int, float], Tensor] = newton_schulz_inverse,
) -> Tensor:
    """Attention over ``(B, heads, N, d)`` through ``(B, heads, m, d)`` landmarks: ``(B, heads, N, d)``.

    Every form is ``Z V`` with ``Z = scaled(G - mean G) + 1/N`` for the Nystroem matrix ``G = C_q A C_k^T``
    that is never formed (paper, section 3.2); ``lf_dense.functional.laplacian_attention`` documents the three
    scalings. ``kernel`` and ``inverse`` may be the native operators, so that the whitening forms are composed
    of them.
    """
    dtype = compute_dtype(q.dtype)
    with _without_autocast(q):
        landmarks, values = landmarks.to(dtype), v.to(dtype)
        solved = inverse(kernel(landmarks, landmarks, scale), iters, eps)
        kernel_q = kernel(q.to(dtype), landmarks, scale)
        kernel_k = kernel(k.to(dtype), landmarks, scale)
        mean_value = values.mean(-2, keepdim=True)
        num_tokens = q.shape[-2]
        if normalization == "mass":
            # The mean leaves the values before the sums, not after: on close tokens the difference would
            # cancel to nothing.
            pooled = solved @ (kernel_k.mT @ (values - mean_value)) / num_tokens
            mass = kernel_q @ (solved @ kernel_k.mean(-2).unsqueeze(-1))
            out = kernel_q @ pooled / (mass.clamp_min(0) + tau) + mean_value
        else:
            centred = kernel_q - kernel_q.mean(-2, keepdim=True)
            if normalization == "whiten_keys":
                spread = solved @ (centred.mT @ centred / num_tokens) @ solved
                # A variance, and positive; in float32 the product of two inverses can round below zero.
                variance = (kernel_k @ spread * kernel_k).sum(-1, keepdim=True).clamp_min(0)
                values = torch.rsqrt(variance + delta) * values
            else:
                centred = centred * torch.rsqrt(centred.square().mean(-2, keepdim=True) + delta)
            out = centred @ (solved @ (kernel_k.mT @ values)) / num_tokens + mean_value
        return out.to(v.dtype)
