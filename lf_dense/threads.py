"""How long torch's idle threads wait at work, in our tools: two programs on the same cores need them idle."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .files import PACKAGED

# Rounds of waiting before a thread sleeps. GNU's OpenMP takes some 300,000, milliseconds in which another
# program's threads stand still: two trainings on the same cores then take 12 times as long as one.
SPIN_COUNT = 10_000
_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_FOLDERS = (Path(__file__).resolve().parents[1] / "tools", PACKAGED / "tools")
_COMMAND = "lf-dense"


def runs_a_tool() -> bool:
    """Whether the program is a tool of ours: of ``tools/``, ``lf-dense`` or ``python -m lf_dense``."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None:
        return getattr(sys, "orig_argv", [])[1:3] == ["-m", "lf_dense"]
    path = Path(script).resolve()
    return path.parent in _FOLDERS or path.stem == _COMMAND


def settle() -> None:
    """Make idle threads sleep sooner, where a tool of ours runs and its user has not set it.

    The variable counts when torch is imported, and reaches the processes that the tool starts.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _VARIABLES) and runs_a_tool():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
