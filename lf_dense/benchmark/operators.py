"""Time and peak memory of the operators at the backbone's shapes, against the reference and other attentions.

The contenders of a case take turns, so that a machine that slows down slows all of them, and medians count.
What computes the same function is first compared with the reference in float64. A contender that is wrong is
not timed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..presets import LANDMARK_GRID, NUM_STAGES
from . import contenders
from .cases import DTYPES, OPS, PASSES, Case, build_cases
from .contenders import CONTENDERS, FLOOR, OF_EVERY_OPERATOR, OTHER_ATTENTIONS, PEER
from .contest import Limits, measure
from .operator_report import heading, records, table_head, table_row
from .options import check_folder, find_device, image_size, positive_float, positive_int, square
from .report import Record, describe_machine, write_json
from .timing import MIN_SAMPLES

MAX_MACS = {"cpu": 1e12, "cuda": 5e13}
DEFAULTS: dict[str, Any] = {
    "sizes": [(224, 224), (800, 1333), (2048, 2048)],
    "stages": list(range(1, NUM_STAGES + 1)),
    "landmarks": [math.prod(LANDMARK_GRID), math.prod(2 * side for side in LANDMARK_GRID)],
    "contenders": list(CONTENDERS),
    "repeats": 50,
    "max_seconds": 10.0,
}
QUICK: dict[str, Any] = {
    "sizes": [(64, 96)],
    "stages": [1, NUM_STAGES],
    "landmarks": [math.prod(LANDMARK_GRID)],
    "contenders": ["native", "reference", *OTHER_ATTENTIONS],
    "repeats": 5,
    "max_seconds": 0.5,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options; those that ``--quick`` has other defaults for get theirs from ``settle``."""
    parser.usage = "%(prog)s [options]"
    sizes = " ".join(f"{height}x{width}" for height, width in DEFAULTS["sizes"])
    max_macs = ", ".join(f"{macs:.0e} on {device}" for device, macs in MAX_MACS.items())
    add = parser.add_argument
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N (default: %(default)s)",
    )
    add("--sizes", nargs="+", type=image_size, metavar="HxW", help=f"image sizes (default: {sizes})")
    add(
        "--stages",
        nargs="+",
        type=int,
        choices=DEFAULTS["stages"],
        help="of the pyramid (default: all)",
    )
    add(
        "--landmarks",
        nargs="+",
        type=square,
        metavar="M",
        help=f"landmarks, on a square grid (default: {' '.join(map(str, DEFAULTS['landmarks']))})",
    )
    add("--ops", nargs="+", choices=OPS, default=list(OPS), help="operators (default: all)")
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="what is timed (default: both)")
    add(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        help="implementations; the last three are other attentions, on the same q, k and v (default: all)",
    )
    add(
        "--peer",
        type=Path,
        metavar="FILE.py",
        help="its attention(q, k, v, landmarks, scale, iters, eps, tau) takes part beside the attention",
    )
    add("--dtype", choices=list(DTYPES), default="float32", help="of the inputs (default: %(default)s)")
    add("--batch-size", type=positive_int, default=1, metavar="N", help="images (default: %(default)s)")
    add(
        "--repeats",
        type=positive_int,
        metavar="N",
        help=f"turns of each contender (default: {DEFAULTS['repeats']})",
    )
    add(
        "--max-seconds",
        type=positive_float,
        metavar="S",
        help=(
            f"for the turns of one case, divided evenly; each contender has {MIN_SAMPLES} turns whatever they"
            f" take (default: {DEFAULTS['max_seconds']})"
        ),
    )
    add(
        "--max-macs",
        type=positive_float,
        metavar="N",
        help=f"multiply-adds above which a softmax attention is skipped (default: {max_macs})",
    )
    add(
        "--max-compile-seconds",
        type=positive_float,
        default=120.0,
        metavar="S",
        help="for compiling one case (default: %(default)s)",
    )
    add("--threads", type=positive_int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--json", type=Path, metavar="FILE", help="write the measurements there too, after every case")
    add(
        "--quick",
        action="store_true",
        help="other defaults, that take seconds: one small size, two stages, no compile",
    )


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on other options, and find the device.

    Raises:
        UsageError: the device is not there or cannot be measured, or the JSON's folder does not exist.
    """
    for name, default in (QUICK if args.quick else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.device = find_device(args.device)
    if args.device.type not in MAX_MACS:
        raise UsageError(f"--device {args.device} cannot be measured: use cpu, cuda or cuda:N.")
    if args.max_macs is None:
        args.max_macs = MAX_MACS[args.device.type]
    if args.json:
        check_folder("--json", args.json)
    if args.peer:
        contenders.peers[PEER] = contenders.load_peer(args.peer)
        args.contenders = [*args.contenders, PEER]
    return args


def chosen_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases that settled options ask for."""
    return build_cases(args.ops, args.sizes, args.stages, args.landmarks, args.passes, args.batch_size)


def run(args: argparse.Namespace) -> int:
    """Run every case, print the tables, write the JSON; returns 1 where a contender is wrong, else 0."""
    settle(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    wrong = list(_run_cases(args))
    for line in wrong:
        print(f"error: {line}.", file=sys.stderr)
    return 1 if wrong else 0


def _run_cases(args: argparse.Namespace) -> Iterator[str]:
    """Yield one line for each contender that is wrong."""
    about = {**describe_machine(args.device), "dtype": args.dtype, "batch_size": args.batch_size}
    on_cuda = args.device.type == "cuda"
    wants_native, has_native = "native" in args.contenders, about["native"]["used"]
    names = [name for name in args.contenders if name != "native" or has_native]
    with_floor = wants_native and has_native and contenders.has_floor(args.device)
    limits = Limits(args.repeats, args.max_seconds, args.max_macs, args.max_compile_seconds)
    print(heading(about, on_cuda, wants_native))
    results: list[Record] = []
    for op, cases in itertools.groupby(chosen_cases(args), key=lambda case: case.op):
        columns = [name for name in names if name in OF_EVERY_OPERATOR or op == "laplacian_attention"]
        if op == "laplacian_kernel" and with_floor:
            columns.insert(columns.index("native") + 1, FLOOR)
        print(f"\n### {op}\n\n{table_head(columns, on_cuda)}", flush=True)
        for case in cases:
            names_here = [name for name in columns if name != FLOOR or case.direction == "forward"]
            measured, yardstick = measure(case, names_here, DTYPES[args.dtype], args.device, limits)
            rows = records(case, measured, yardstick)
            results += rows
            print(table_row(case, rows, columns, on_cuda), flush=True)
            if args.json:
                write_json(args.json, about, results)
            yield from (f"{name} {case}: {c.obstacle}" for name, c in measured.items() if c.is_wrong)
