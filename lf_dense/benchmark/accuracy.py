"""Whether results are right: their error against the reference, and how large it may be."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import contenders
from .cases import Problem

# Above this the float64 comparison gives way to float32.
MAX_FLOAT64_BYTES = 4e9


class Yardstick(NamedTuple):
    """What results are compared with, and how far they may lie from it, relative to the largest entry."""

    results: list[Tensor]
    tolerance: float
    dtype: str


def relative_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest deviation of a tensor's entries over its largest entry, of the worst tensor.

    The error is infinite where NaN appears.
    """
    worst = 0.0
    for x, y in zip(found, wanted):
        scale = y.abs().max().double().item()
        error = (x.to(y.dtype) - y).abs().max().double().item() / (scale or 1.0)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def build_yardstick(problem: Problem) -> Yardstick | None:
    """Run the reference in float64, or in float32 where that is too large.

    The tolerance is twice the reference's own error, and rounding. Without a float64 comparison that error is
    unknown, and 1e-3 stands in for it.

    Returns:
        None where memory is too small for the reference.
    """
    case = problem.case
    dtype = problem.inputs[0].dtype
    reference = contenders.implementation(case, "reference")
    narrow = torch.finfo(dtype).eps
    kernel_bytes = 8.0 * case.batch * case.heads * case.tokens * case.landmarks
    if kernel_bytes * (8 if problem.backward else 4) <= MAX_FLOAT64_BYTES:
        with contextlib.suppress(torch.OutOfMemoryError):
            wanted = contenders.bind(reference, problem.to(torch.float64))()
            own = relative_error(contenders.bind(reference, problem)(), wanted)
            return Yardstick(wanted, 2 * own + narrow + 64 * torch.finfo(torch.float32).eps, "float64")
    with contextlib.suppress(torch.OutOfMemoryError):
        wide = contenders.bind(reference, problem.to(torch.float32))()
        return Yardstick(wide, 1e-3 + narrow, "float32")
    return None
