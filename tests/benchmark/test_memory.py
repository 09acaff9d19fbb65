"""Peak memory, counted for allocations that are known."""

import pytest
import torch

from lf_dense.benchmark.memory import peak_memory

MIB = 2**20


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_peak_memory_of_known_allocations(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")

    def allocate(count):
        return torch.empty(count * MIB, dtype=torch.uint8, device=device)

    def call():
        first = allocate(4)
        second = allocate(8)
        del first
        third = allocate(2)
        del second
        return third, allocate(3)

    torch_device = torch.device(device)
    assert peak_memory(call, torch_device) == 12 * MIB
    assert peak_memory(lambda: None, torch_device) == 0
    earlier = [allocate(16)]
    assert peak_memory(lambda: (earlier.clear(), allocate(1)), torch_device) in (0, MIB)


def test_the_profiler_says_nothing(capfd):
    peak_memory(lambda: torch.empty(MIB), torch.device("cpu"))
    assert capfd.readouterr() == ("", "")
