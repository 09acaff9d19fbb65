"""What a process holds, and what it may take."""

from __future__ import annotations

import pytest
import torch

from lf_dense.memory import MemoryMeter, PeakMeter, available_gib, is_out_of_memory, limited

MIB = 2**20


def test_the_peak_is_seen_after_the_block_is_gone():
    meter = MemoryMeter(torch.device("cpu"))
    before = meter.current()
    meter.reset()
    torch.ones(64 * MIB // 4).sum()
    peak = meter.peak() - before
    assert 50 * MIB < peak < 200 * MIB
    meter.reset()
    assert meter.peak() - before < 50 * MIB


def test_a_report_says_none_where_the_system_does_not_say(monkeypatch):
    def refuse(self):
        raise PermissionError

    monkeypatch.setattr(MemoryMeter, "reset", refuse)
    monkeypatch.setattr(MemoryMeter, "peak", refuse)
    assert PeakMeter(torch.device("cpu")).peak() is None


def test_a_limited_block_fails_with_an_error_and_the_limit_ends_with_it():
    assert available_gib() > 0.5
    with pytest.raises((RuntimeError, MemoryError)) as found, limited(0.1):
        torch.empty(256 * MIB)
    assert is_out_of_memory(found.value)
    assert torch.empty(256 * MIB).numel() == 256 * MIB


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(Exception("OpenCV: (-4:Insufficient memory) Failed to allocate"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
