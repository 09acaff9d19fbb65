"""The command ``lf-dense``, or ``python -m lf_dense``: the scripts of ``tools/``, from any folder."""

from __future__ import annotations

import ast
import runpy
import sys

from . import errors
from .files import PACKAGED

TOOLS = PACKAGED / "tools"
COMMANDS = {
    "train": "train",
    "test": "test",
    "predict": "predict",
    "swap": "swap_config",
    "check-swap": "check_swap",
    "convert": "convert_pvtv2",
    "inspect": "inspect_checkpoint",
    "publish": "publish",
    "curves": "plot_curves",
    "attention": "visualize_attention",
    "benchmark": "benchmark",
    "export": "export",
    "flops": "get_flops",
    "ablate": "ablate",
    "shapes": "make_shapes",
    "subset": "subset_coco",
    "demo": "demo",
}


def _summary(tool: str) -> str:
    """The first line of a script's docstring."""
    text = ast.get_docstring(ast.parse((TOOLS / f"{tool}.py").read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0] if text else ""


def usage() -> str:
    """What ``lf-dense --help`` prints."""
    lines = ["usage: lf-dense COMMAND [ARGUMENTS]; lf-dense COMMAND --help says more", ""]
    lines += [f"  {command:<12}{_summary(tool)}" for command, tool in COMMANDS.items()]
    return "\n".join([*lines, f"  {'info':<12}Say what is installed and which backend each function uses."])


def main() -> None:
    """Run the command line: the first argument names the script, the others are its own."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(usage())
        return
    if command == "info":
        runpy.run_module("lf_dense.info", run_name="__main__")
        return
    if command not in COMMANDS:
        names = ", ".join([*COMMANDS, "info"])
        print(f"error: lf-dense has no command {command!r}: use one of {names}.", file=sys.stderr)
        sys.exit(2)
    errors.program = f"lf-dense {command}"
    sys.argv[1:] = sys.argv[2:]
    runpy.run_path(str(TOOLS / f"{COMMANDS[command]}.py"), run_name="__main__")


if __name__ == "__main__":
    main()
