"""Memory kept between steps, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lf_dense import allocator
from support import ROOT

IS_GLIBC = sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION") is not None
pytestmark = pytest.mark.skipif(not IS_GLIBC, reason="glibc alone gives memory back in this way")
# Steps of 64 MiB: how many page faults the best of the last ones takes. A busy system takes pages on its own.
STEPS = """
import resource
from lf_dense import allocator
kept = allocator.keep_memory() if {keep} else None
import torch
faults = []
for step in range(7):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    (torch.ones(4, 2**22) + 1).sum().item()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
allocator.give_back() if {give_back} else None
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
print(kept, min(faults[3:]), resident)
"""


def steps(keep=True, give_back=False, **environment):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", STEPS.format(keep=keep, give_back=give_back)],
        cwd=ROOT,
        env={**variables, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults, resident = done.stdout.split()
    return kept, int(faults), int(resident)


def test_kept_memory_needs_no_page_faults():
    _, as_it_comes, _ = steps(keep=False)
    kept, faults, resident = steps()
    assert kept == "True"
    # 128 MiB are 32,768 pages of 4 KiB, or some hundred huge ones.
    assert as_it_comes > 60
    assert faults < as_it_comes / 10
    _, _, after = steps(give_back=True)
    assert after < resident - 100 * 2**20


@pytest.mark.parametrize(
    "variable",
    [{"MALLOC_TRIM_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=65536"}],
    ids=str,
)
def test_what_the_user_has_set_up_stays(variable):
    kept, faults, _ = steps(**variable)
    assert kept == "False"
    assert faults > 60


def test_without_glibc_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert allocator.keep_memory() is False
    allocator.give_back()
