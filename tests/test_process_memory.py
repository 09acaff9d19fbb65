"""What a process holds, and what it may take."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lf_dense.memory import MemoryMeter, PeakMeter, available_gib, is_out_of_memory
from support import ROOT

MIB = 2**20


def measured(script):
    """What a script prints, as integers. A process of its own holds nothing that earlier tests have kept."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    return [int(word) for word in done.stdout.split()]


def test_the_peak_is_seen_after_the_block_is_gone():
    before, peak, again = measured(
        """
import torch
from lf_dense.memory import MemoryMeter
meter = MemoryMeter(torch.device("cpu"))
torch.ones(2).sum()
print(meter.current())
meter.reset()
torch.ones(2**24).sum()
print(meter.peak())
meter.reset()
print(meter.peak())
"""
    )
    assert 50 * MIB < peak - before < 200 * MIB
    assert again - before < 50 * MIB


def test_a_report_says_none_where_the_system_does_not_say(monkeypatch):
    def refuse(self):
        raise PermissionError

    monkeypatch.setattr(MemoryMeter, "reset", refuse)
    monkeypatch.setattr(MemoryMeter, "peak", refuse)
    assert PeakMeter(torch.device("cpu")).peak() is None


def test_a_limited_block_fails_with_an_error_and_the_limit_ends_with_it():
    assert available_gib() > 0.5
    failed, allocated = measured(
        """
import torch
from lf_dense.memory import is_out_of_memory, limited
try:
    with limited(0.1):
        torch.empty(2**28)
    print(0)
except (RuntimeError, MemoryError) as error:
    print(int(is_out_of_memory(error)))
print(torch.empty(2**28).numel())
"""
    )
    assert failed == 1
    assert allocated == 2**28


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(Exception("OpenCV: (-4:Insufficient memory) Failed to allocate"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
