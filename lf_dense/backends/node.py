"""The attention as one node of an exported graph, for runtimes that load our operator.

While a model is exported, ``torch.ops.lf_dense_export.laplacian_attention`` stands for the attention, whether
or not the native operators are built; ``lf_dense.export`` translates it. Only the default normalization is
there: the others have no operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .standard import laplacian_kernel, newton_schulz_inverse

__all__ = ["laplacian_attention", "laplacian_kernel", "newton_schulz_inverse"]


@torch.library.custom_op("lf_dense_export::laplacian_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, scale: float, iters: int, eps: float, tau: float
) -> Tensor:
    return reference.laplacian_attention(q, k, v, landmarks, scale, iters, eps, tau, 1.0, "mass")


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, scale: float, iters: int, eps: float, tau: float
) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def laplacian_attention(
    q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, scale: float, iters: int, eps: float, tau: float
) -> Tensor:
    """See ``lf_dense.functional.laplacian_attention``; normalization ``"mass"``."""
    return torch.ops.lf_dense_export.laplacian_attention(q, k, v, landmarks, scale, iters, eps, tau)
