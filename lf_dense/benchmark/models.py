"""Latency, memory and cost of backbones and whole models over resolutions, side by side.

Candidates are backbones by name (lf-tiny, pvtv2-b1, swin-t ...), or configs, by path or packaged name; a
config with @tiny has our backbone of that size in the place of its own. Each runs in a process of its own,
and they take turns in rounds. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch

from .. import __version__
from ..errors import UsageError
from ..files import write_atomically
from ..memory import available_gib
from . import candidates, model_report
from .candidates import PRESETS, Settings
from .options import find_device, image_size, positive_float, positive_int, require_mmengine
from .report import describe_machine, write_json
from .rounds import Group, Limits, Run, check_same, key_of

DIRECTIONS, DTYPES = ("forward", "training"), ("float32", "bfloat16", "float16")
MODES, MEMORY = ("eager", "compile"), ("kept", "as-it-comes")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("candidates", nargs="*", metavar="BACKBONE|CONFIG", help="what is measured (or --preset)")
    add(
        "--preset",
        choices=list(PRESETS),
        help="a list of candidates and sizes; what is given beside it counts",
    )
    add("--sizes", nargs="+", type=image_size, metavar="HxW", help="image sizes (default: 512x512 800x1333)")
    add("--batch-sizes", nargs="+", type=positive_int, default=[1], metavar="N", help="(default: 1)")
    add("--passes", nargs="+", choices=DIRECTIONS, default=["forward"], help="(default: forward)")
    add(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=["float32"],
        help="others by autocast (default: float32)",
    )
    add("--modes", nargs="+", choices=MODES, default=["eager"], help="(default: eager)")
    add(
        "--memory",
        nargs="+",
        choices=MEMORY,
        default=["kept"],
        help="on a CPU: whether freed memory is kept between passes, as our tools do (default: kept)",
    )
    add("--rounds", type=positive_int, default=5, help="turns of each; medians count (default: %(default)s)")
    add("--pass-limit", type=positive_float, default=120.0, metavar="SECONDS", help="(default: %(default)g)")
    add(
        "--budget",
        type=positive_float,
        default=math.inf,
        metavar="MINUTES",
        help="leave out what goes beyond",
    )
    add("--memory-gib", type=positive_float, help="of each process on a CPU (default: 90 %% of what is free)")
    add("--threads", type=positive_int, help="on a CPU (default: torch's)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--out", type=Path, default=Path("work_dirs/benchmark"), help="folder (default: %(default)s)")
    add("--compare", type=Path, metavar="OLD.json", help="an earlier results.json: print ratios to it")
    add("--allow", type=positive_float, default=1.1, help="ratio above which --compare fails (default: 1.1)")


def run(args: argparse.Namespace) -> int:
    """Measure, write tables and plots; returns 1 where ``--compare`` finds a regression.

    Raises:
        UsageError: an option cannot work.
    """
    require_mmengine("models")
    preset_names, preset_sizes = PRESETS.get(args.preset, ([], ["512x512", "800x1333"]))
    names = args.candidates or preset_names
    if not names:
        raise UsageError(f"name backbones or configs, or a --preset ({', '.join(PRESETS)}).")
    sizes = args.sizes or [image_size(text) for text in preset_sizes]
    device = find_device(args.device)
    before = model_report.read_results(args.compare) if args.compare else None
    candidates.check(names)
    memory = [name.replace("-", " ") for name in args.memory] if device.type == "cpu" else ["kept"]
    ways = itertools.product(args.passes, args.dtypes, args.modes, memory)
    settings = [Settings(direction, dtype, mode == "compile", kept) for direction, dtype, mode, kept in ways]
    groups = [Group(size, batch, way) for way in settings for batch in args.batch_sizes for size in sizes]
    limits = Limits(
        args.rounds,
        args.pass_limit,
        args.budget * 60,
        args.memory_gib or 0.9 * available_gib(),
        args.threads or torch.get_num_threads(),
    )
    about = {**describe_machine(device), "threads": limits.threads, "lf_dense": __version__}
    path = args.out / "results.jsonl"
    check_same(path, about)
    measuring = Run(path, str(device), limits, _progress())
    measuring.measure(names, groups)
    order = [
        measuring.rows[key_of(measuring.head(name, group))]
        for group in groups
        for name in names
        if key_of(measuring.head(name, group)) in measuring.rows
    ]
    return _report(args, order, about, before)


def _report(args: argparse.Namespace, rows: list[dict], about: dict, before: list[dict] | None) -> int:
    write_json(args.out / "results.json", about, rows)
    model_report.write_csv(args.out / "results.csv", rows)
    text = model_report.tables(rows)
    write_atomically(args.out / "results.md", text.encode())
    machine = f"{about['device_name']}, {about['threads']} threads, torch {about['torch']}"
    pictures = model_report.draw(args.out, rows, machine)
    print(f"\n{machine}, {about['date']}\n\n{text}")
    print(f"wrote {args.out}/results.json, .csv, .md", *(picture.name for picture in pictures), sep=", ")
    if before is None:
        return 0
    table, regressed = model_report.compare(rows, before, args.allow)
    print(f"\n{table}")
    return int(regressed)


def _progress() -> Callable[[str], None]:
    """A line that says what is measured now."""
    from rich.console import Console

    console = Console(stderr=True)
    status = console.status("")
    if console.is_terminal:
        status.start()

    def say(text: str) -> None:
        if console.is_terminal:
            status.update(text)

    return say
