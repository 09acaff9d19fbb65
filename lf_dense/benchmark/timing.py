"""Wall-clock time of a call on any device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def timed(call: Callable[[], Result], device: str) -> tuple[float, Result]:
    """Seconds that ``call`` takes, work that it has left on a GPU included and work from before it not, and what it returned."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = call()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result
