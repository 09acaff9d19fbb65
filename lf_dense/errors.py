"""The error for what a user can mend, and how a command line ends with it."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any

from .allocator import keep_memory

# What a command line calls itself in its help; None is the script's name.
program: str | None = None


class UsageError(ValueError):
    """A config, path or option that cannot work; one sentence says what, what was expected and what to do."""


def one_line(value: object) -> str:
    """A text, or an error's, on one line."""
    return " ".join(str(value).split())


def reason_of(error: BaseException) -> str:
    """An error's text on one line, without its final full stop."""
    # A KeyError's text is the repr of its message.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return one_line(text).rstrip(".") or f"a {type(error).__name__} without a message"


def tool_parser(description: str | None, **options: Any) -> argparse.ArgumentParser:
    """A tool's parser of arguments, with the option that every tool has: ``--traceback``."""
    parser = argparse.ArgumentParser(prog=program, description=description, **options)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a tool's ``main`` and exit with the code that it returns.

    Freed memory is kept for the next step (``lf_dense.keep_memory``). A ``UsageError`` prints its sentence
    and exits with 2. With ``--traceback`` it is shown whole.
    """
    keep_memory()
    # The set-up's torchvision is of another release than torch, and its decoders of files are not used.
    warnings.filterwarnings("ignore", "Failed to load image Python extension", module=r"torchvision\.io")
    try:
        sys.exit(main())
    except UsageError as error:
        if "--traceback" in sys.argv[1:]:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
