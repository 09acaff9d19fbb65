"""How any measurement is reported: what it was measured on, its JSON file, lines of a table."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..backends import native
from ..files import write_atomically

Record = dict[str, Any]


def device_name(device: torch.device) -> str:
    """Return the GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> Record:
    """Say what is measured on and with."""
    obstacle = native.obstacle(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": {
            "used": obstacle is None,
            "obstacle": obstacle,
            "instruction_set": native.build_info()["instruction_set"],
        },
    }


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def write_json(path: Path, about: Mapping[str, Any], results: Sequence[Record]) -> None:
    """Write all that is measured so far: a run that is cut short leaves its finished cases."""
    text = json.dumps({**about, "results": results}, indent=1, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def markdown_row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def markdown_head(columns: Sequence[str]) -> str:
    """Return a table's first two lines: the columns' names and the rule."""
    return f"{markdown_row(columns)}\n|{'---|' * len(columns)}"


def three_digits(value: float) -> str:
    """At least three significant digits and no exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"
