"""The waiting of OpenMP's threads, in processes of their own: libgomp itself says what it has read."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from lf_dense.threads import SPIN_COUNT
from support import ROOT

TOOLS = sorted(
    path.name for path in (ROOT / "tools").glob("*.py") if "from lf_dense.errors import" in path.read_text()
)


def spin_count(*arguments, **environment):
    """The counts that libgomp has read in a Python process; without libgomp the test is skipped."""
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_", "LF_"))
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT,
        env={**variables, "OMP_DISPLAY_ENV": "VERBOSE", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    counts = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not counts:
        pytest.skip("torch's threads are not libgomp's here")
    return {int(count) for count in counts}


def test_most_tools_are_tested():
    assert len(TOOLS) > 12


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_lets_idle_threads_sleep_soon(tool):
    assert spin_count(f"tools/{tool}", "--help") == {SPIN_COUNT}


@pytest.mark.parametrize(
    "arguments", [["-m", "lf_dense", "flops", "--help"], ["-mlf_dense.info"]], ids=" ".join
)
def test_so_does_the_package_as_a_program(arguments):
    assert spin_count(*arguments) == {SPIN_COUNT}


def test_so_does_the_command(tmp_path):
    command = tmp_path / "lf-dense"
    command.write_text("from lf_dense.__main__ import main\nmain()\n")
    assert spin_count(str(command), "swap", "--help") == {SPIN_COUNT}


@pytest.mark.parametrize("variable", [{"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "PASSIVE"}], ids=str)
def test_what_the_user_has_set_stays(variable):
    counts = spin_count("tools/get_flops.py", "--help", **variable)
    assert counts == spin_count("-c", "import torch", **variable)


def test_another_program_keeps_its_own(tmp_path):
    own = spin_count("-c", "import torch")
    script = tmp_path / "train.py"
    script.write_text("import lf_dense")
    package = tmp_path / "other" / "__init__.py"
    package.parent.mkdir()
    package.write_text("import lf_dense")
    package.with_name("__main__.py").touch()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    assert spin_count(str(script), PYTHONPATH=path) == own
    assert spin_count("-m", "other", PYTHONPATH=path) == own


def test_children_of_a_tool_have_it_too():
    code = (
        "import sys, subprocess; sys.argv[0] = 'tools/train.py'; import lf_dense;"
        "subprocess.run([sys.executable, '-c', 'import torch'], check=True)"
    )
    assert spin_count("-c", code) == {SPIN_COUNT}
