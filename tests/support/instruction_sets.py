"""Tests by another instruction set than the one in use."""

import os
import subprocess
import sys

import pytest

from lf_dense.backends import native
from support import ROOT

VARIABLE = "LF_DENSE_INSTRUCTION_SET"


def is_another():
    """Whether this process was asked to use one."""
    return VARIABLE in os.environ


def environment_of(name):
    """In which processes use it; skips where this processor or build has it not, or uses it anyway."""
    build = native.build_info()
    if name not in build["instruction_sets_supported"]:
        pytest.skip(f"this processor or build has no {name}")
    if name == build["instruction_set"]:
        pytest.skip(f"every other test runs {name} here")
    return {**os.environ, VARIABLE: name, "OMP_NUM_THREADS": "1"}


def assert_tests_pass(file, chosen, environment):
    """Run those of a file's tests that ``-k`` takes, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
