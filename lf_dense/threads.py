"""How long the threads of OpenMP wait for work before they sleep."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Turns of libgomp's waiting loop, some tens of microseconds. The gaps between a model's parallel regions are
# shorter; its own count, 300,000 turns, holds a core for milliseconds that another process could use.
SPIN_COUNT = 2000
_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_PACKAGE = Path(__file__).resolve().parent
_TOOLS = (_PACKAGE.parent / "tools", (_PACKAGE / ".mim" / "tools").resolve())


def sleep_soon() -> None:
    """Let idle threads sleep soon, in this process and those that it starts, where it is one of our tools.

    libgomp reads its environment when it is loaded, and torch brings it: this comes before torch. A program
    that is not ours keeps its own; so does a user who has set ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY``.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _VARIABLES) and _is_tool():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def _is_tool() -> bool:
    """Whether this process runs a script of ``tools/``, ``lf-dense`` or a module of ours by ``python -m``."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # what Python puts there until it has found the module
        return any(word.removeprefix("-m").split(".")[0] == "lf_dense" for word in sys.orig_argv)
    path = Path(program)
    return path.stem == "lf-dense" or path.resolve().parent in _TOOLS
