"""Idle threads of the tools: for which programs the variable is set, and when."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lf_dense import threads
from support import ROOT

SHOW = "import os, lf_dense; print(os.environ.get('GOMP_SPINCOUNT'))"


def spin_count(*command, **environment):
    variables = {name: value for name, value in os.environ.items() if name not in threads._VARIABLES}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**variables, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip().splitlines()[-1]


def test_importing_the_package_sets_nothing():
    assert spin_count("-c", SHOW) == "None"


@pytest.mark.parametrize("name", ["tool.py", "lf-dense"])
def test_a_tool_sets_it_before_torch_is_imported(name, tmp_path, monkeypatch):
    folder = ROOT / "tools" if name.endswith(".py") else tmp_path
    script = folder / name
    monkeypatch.setattr(threads.sys.modules["__main__"], "__file__", str(script), raising=False)
    assert threads.runs_a_tool()
    monkeypatch.setattr(threads.sys.modules["__main__"], "__file__", str(tmp_path / "mine.py"))
    assert not threads.runs_a_tool()
    code = f"import sys; sys.modules['__main__'].__file__ = {str(script)!r}; {SHOW}"
    assert spin_count("-c", code) == str(threads.SPIN_COUNT)
    assert spin_count("-c", f"import torch; {code}") == "None"


@pytest.mark.parametrize("variable", threads._VARIABLES)
def test_what_the_user_has_set_stays(variable):
    script = str(ROOT / "tools" / "train.py")
    code = f"import sys; sys.modules['__main__'].__file__ = {script!r}; {SHOW}"
    value = "7" if variable == "GOMP_SPINCOUNT" else "PASSIVE"
    assert spin_count("-c", code, **{variable: value}) == ("7" if variable == "GOMP_SPINCOUNT" else "None")


def test_the_module_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "lf_dense", "info"],
        cwd=ROOT,
        env={**os.environ, "PYTHONINSPECT": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
