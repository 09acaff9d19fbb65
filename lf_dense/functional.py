"""The one door to the attention's mathematics: check the arguments, choose a backend, call it.

Every function takes ``backend="auto" | "reference" | "native"``; left at None, the ``lf_dense.use_backend``
block around the call decides, then the environment variable ``LF_DENSE_BACKEND``, then ``"auto"``.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import torch
from torch import Tensor

from .backends import EXPORT_FORMS, choose_backend, native, reference
from .presets import DELTA, EPS, KERNEL_SCALE, NEWTON_ITERS, NORMALIZATION, TAU

__all__ = ["NORMALIZATIONS", "laplacian_attention", "laplacian_kernel", "newton_schulz_inverse"]

NORMALIZATIONS = ("mass", "whiten_keys", "whiten_landmarks")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_kernel_scale(scale: float) -> None:
    """Raise ValueError unless the kernel's scale is a positive finite number."""
    if not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
        raise ValueError(
            f"the kernel scale is {scale!r}, and has to be a positive finite number "
            f"(the paper's is {KERNEL_SCALE})."
        )


def check_solver(iters: int, eps: float) -> None:
    """Raise ValueError unless the solver has at least one step and a positive finite ridge."""
    if not isinstance(iters, int) or iters < 1:
        raise ValueError(
            f"the solver got {iters!r} iterations, and needs a whole number, at least 1 (10 converge for "
            "every input up to 196 landmarks)."
        )
    if not 0 < eps < math.inf:
        raise ValueError(
            f"the solver's eps is {eps}, and has to be a positive finite number: without it a blank image has"
            " no inverse."
        )


def check_normalization(normalization: str) -> None:
    """Raise ValueError unless the name is one of ``NORMALIZATIONS``."""
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"the normalization {normalization!r} does not exist: use one of {', '.join(NORMALIZATIONS)}."
        )


def check_tau(tau: float) -> None:
    """Raise ValueError unless the mass at which a row is half the mean is finite and not negative."""
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau is {tau}, and has to be a finite number, 0 or larger.")


def _checked_tensors(**tensors: Tensor) -> list[Tensor]:
    """The tensors, of one dtype and device; under autocast mixed dtypes meet in the widest."""
    (first_name, first), *others = tensors.items()
    if first.dtype not in DTYPES:
        raise TypeError(f"{first_name} is {first.dtype}, and has to be one of {', '.join(map(str, DTYPES))}.")
    device = first.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and all(tensor.dtype in DTYPES for tensor in tensors.values()):
        dtype = reference.common_dtype(*tensors.values())
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        (_, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device} and {first_name} is {first.dtype} on "
                f"{first.device}: convert them to one dtype and one device."
            )
    return list(tensors.values())


def _implementation(backend: str | None, device: torch.device) -> ModuleType:
    """The module that serves a call.

    Raises:
        RuntimeError: the call comes from torch's legacy ONNX exporter, or native cannot serve.
    """
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():  # type: ignore[attr-defined]
        raise RuntimeError(
            "torch's legacy ONNX exporter writes a wrong file for this model (it takes no absolute value in "
            "an L1 distance): use tools/export.py, or torch.onnx.export(dynamo=True) as docs/export.md says."
        )
    name = choose_backend(backend, device)
    if name in EXPORT_FORMS:
        return importlib.import_module(f"lf_dense.backends.{name}")
    return native if name == "native" else reference


def laplacian_kernel(
    x: Tensor, y: Tensor, scale: float = KERNEL_SCALE, *, backend: str | None = None
) -> Tensor:
    """The Laplacian kernel matrix ``exp(-|x_i - y_j|_1 / scale)`` (paper, section 3).

    Args:
        x: points ``(..., N, d)``: float64, float32, bfloat16 or float16; any strides.
        y: points ``(..., M, d)`` with the same leading dimensions, dtype and device.
        scale: the length over which the kernel falls by e, in units of L1 distance; 4 is the best of the
            paper's ablation.
        backend: see the module.

    Returns:
        ``(..., N, M)`` in the dtype of ``x``, entries in (0, 1]. Distances and exponentials are taken in
        float32 or wider. The gradient at ``x_i = y_j`` is 0. NaN in a point makes its row or column NaN.

    Raises:
        TypeError: dtypes or devices differ or are not supported.
        ValueError: shapes do not fit, or ``scale`` is not a positive finite number.
        RuntimeError: ``backend="native"`` cannot serve.
    """
    x, y = _checked_tensors(x=x, y=y)
    if x.ndim < 2 or x.ndim != y.ndim or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: they have to be (..., N, d) and (..., "
            "M, d)."
        )
    check_kernel_scale(scale)
    return _implementation(backend, x.device).laplacian_kernel(x, y, scale)


def newton_schulz_inverse(
    w: Tensor, iters: int = NEWTON_ITERS, eps: float = EPS, *, backend: str | None = None
) -> Tensor:
    """``(w + eps I)^-1`` of kernel matrices by matrix products alone (paper, section 3.3).

    The start and the scaling are the project's (docs/method.md).

    Args:
        w: symmetric positive semi-definite matrices with non-negative entries ``(..., m, m)``: any supported
            dtype.
        iters: Newton-Schulz steps. 10 converge for every input up to m = 196, all landmarks equal included; a
            last step in float64 then takes off the rounding error.
        eps: the ridge added to the diagonal, and so the smallest eigenvalue.
        backend: see the module.

    Returns:
        ``(..., m, m)`` in the dtype of ``w``, computed in float32 or wider whatever autocast says. The
        gradient is that of the exact inverse, ``-X^T dX X^T``.

    Raises:
        TypeError: the dtype is not supported.
        ValueError: ``w`` is not square, or ``iters`` or ``eps`` is out of range.
        RuntimeError: ``backend="native"`` cannot serve.
    """
    (w,) = _checked_tensors(w=w)
    if w.ndim < 2 or w.shape[-1] != w.shape[-2] or w.shape[-1] == 0:
        raise ValueError(f"w has shape {tuple(w.shape)}, and has to be (..., m, m) with m at least 1.")
    check_solver(iters, eps)
    return _implementation(backend, w.device).newton_schulz_inverse(w, iters, eps)


def laplacian_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    scale: float = KERNEL_SCALE,
    iters: int = NEWTON_ITERS,
    eps: float = EPS,
    tau: float = TAU,
    delta: float = DELTA,
    normalization: str = NORMALIZATION,
    *,
    backend: str | None = None,
) -> Tensor:
    """Laplacian linear attention: averages of the values, weighted by a Nystroem kernel (paper, section 3.2).

    With ``G = C_q (W + eps I)^-1 C_k^T``, the kernel between queries and keys through the landmarks, the
    result is ``Z V``:

    - ``"mass"``: ``z_i = (g_i - mean g_i) / (N (max(mean g_i, 0) + tau)) + 1/N``. The default: the
      smallest rounding error of the three on tokens that lie close together. ``tau > 0`` keeps the map
      injective, because the kernel mass of a query then survives in its row. A query far from every key gets
      the mean of V.
    - ``"whiten_keys"``: the paper's diagonal estimate, column j centred and divided by ``sqrt(var_i g_ij +
      delta)``.
    - ``"whiten_landmarks"``: the same on the m columns of ``C_q``.

    All divide by N as their constant term 1/N does, so the output's scale does not depend on the image's
    size: repeating every token leaves every output unchanged. Statistics are those of one image and one head,
    never of the batch.

    Args:
        q, k, v: ``(B, heads, N, d)``, N at least 1: float64, float32, bfloat16 or float16; any strides.
        landmarks: ``(B, heads, m, d)``, m at least 1, usually pooled from ``q``.
        scale: the kernel's scale.
        iters: solver steps.
        eps: the solver's ridge; bounds the condition number at about m / eps.
        tau: the kernel mass at which a query's row is half its own and half the mean (``"mass"``).
        delta: added to variances (the whitening forms).
        normalization: one of ``NORMALIZATIONS``.
        backend: see the module.

    Returns:
        ``(B, heads, N, d)`` in the dtype of ``v``; kernels, solver and sums in float32 or wider. Memory is
        linear in N.

    Raises:
        TypeError: dtypes or devices differ or are not supported.
        ValueError: shapes do not fit or a constant is out of range.
        RuntimeError: ``backend="native"`` cannot serve.
    """
    q, k, v, landmarks = _checked_tensors(q=q, k=k, v=v, landmarks=landmarks)
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape or q.shape[2] == 0:
        raise ValueError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}: "
            "they have to be (B, heads, N, d), all three the same, with N at least 1."
        )
    if (
        landmarks.ndim != 4
        or landmarks.shape[:2] != q.shape[:2]
        or landmarks.shape[3] != q.shape[3]
        or landmarks.shape[2] == 0
    ):
        raise ValueError(
            f"landmarks have shape {tuple(landmarks.shape)} beside q of {tuple(q.shape)}: "
            "they have to be (B, heads, m, d) with the same B, heads and d, and m at least 1."
        )
    check_kernel_scale(scale)
    check_solver(iters, eps)
    check_normalization(normalization)
    check_tau(tau)
    if not 0 < delta < math.inf:
        raise ValueError(f"delta is {delta}, and has to be a positive finite number.")
    implementation = _implementation(backend, q.device)
    fused = implementation is not reference and normalization == "mass"
    # A branch of its own: torch.compile then guards on this question alone, not on the number of channels.
    if implementation is native and q.shape[-1] > native.fused_head_dims(q.device):
        fused = False
    if fused:
        return implementation.laplacian_attention(q, k, v, landmarks, scale, iters, eps, tau)
    # Whitening and wide heads compose the kernel, the solver and matrix products.
    return reference.laplacian_attention(
        q,
        k,
        v,
        landmarks,
        scale,
        iters,
        eps,
        tau,
        delta,
        normalization,
        implementation.laplacian_kernel,
        implementation.newton_schulz_inverse,
    )
