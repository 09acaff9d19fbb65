"""How much memory this process has and may still take, on CPUs and GPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch


class MemoryMeter:
    """What this process holds now, and held at most since ``reset``.

    On CUDA it is the caching allocator's count, on a CPU the resident size that Linux gives.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"

    def current(self) -> int:
        """Bytes that are held now.

        Raises:
            OSError: the system does not say.
        """
        return torch.cuda.memory_allocated(self.device) if self._on_gpu else _status("VmRSS")

    def reset(self) -> None:
        """Begin to look for the highest again."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """The most bytes that were held since ``reset``.

        Raises:
            OSError: the system does not say.
        """
        return torch.cuda.max_memory_allocated(self.device) if self._on_gpu else _status("VmHWM")


class PeakMeter:
    """``MemoryMeter`` for reports: None where the system does not say."""

    def __init__(self, device: torch.device) -> None:
        self._meter = MemoryMeter(device)
        with contextlib.suppress(OSError):
            self._meter.reset()

    def peak(self) -> int | None:
        """The most bytes that were held since this was made."""
        with contextlib.suppress(OSError):
            return self._meter.peak()
        return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system does not say {key}")


def available_gib() -> float:
    """Memory that processes may still take."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@contextlib.contextmanager
def limited(gib: float) -> Iterator[None]:
    """Let a block fail with an error, in the place of being ended by the system, where it asks for more.

    Args:
        gib: what this process may take beyond what it has. Only Linux can be asked; elsewhere nothing is
            limited.
    """
    if not Path("/proc/self/status").exists():
        yield
        return
    import resource  # Windows has none

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _status("VmData") + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    text = str(error)
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "can't allocate memory" in text
        or "not enough memory" in text
        or "Insufficient memory" in text
    )
