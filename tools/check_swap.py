"""Put a LaplacianFormer into every config that ships in the installed mm packages, build each, and run it.

For every config: does it build on its own? If so, swap the backbone, build that, and run a loss and a
prediction on a made-up sample. Configs that come to the same new model run it once. The outcome is swapped,
refused (with the reason) or failed, and any failure ends in exit code 1.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from lf_dense.errors import run_tool, tool_parser
from lf_dense.swap.report import DEFAULT_PACKAGES, check_report_path, summary, write_report
from lf_dense.swap.rows import FAILED
from lf_dense.swap.survey import PACKAGES, select_configs, survey


def main() -> int:
    parser = tool_parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--packages",
        nargs="+",
        choices=PACKAGES,
        default=list(DEFAULT_PACKAGES),
        help="whose configs (default: mmdet mmseg)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help="configs whose path matches a shell pattern, retinanet/* for example",
    )
    parser.add_argument(
        "--one-per-model",
        action="store_true",
        help="one config for every combination of model, neck and heads",
    )
    parser.add_argument("--arch", default="tiny", help="preset to put in (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="processes, one thread each (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-gib", type=float, default=16.0, help="address space of each process (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=int, default=300, help="seconds for one config (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.md",
        help="write a summary there, and all rows in FILE.csv beside it",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE.json",
        help="keep the results there; those in it already are not done again",
    )
    args = parser.parse_args()
    if args.out:
        check_report_path(args.out)
    names = select_configs(args.packages, args.only, args.one_per_model)
    tell = partial(print, flush=True)
    rows = survey(names, args.arch, args.workers, args.timeout, args.memory_gib, args.json, tell)
    if args.out:
        write_report(args.out, rows, args.arch)
    print(summary(rows))
    return int(any(row.outcome == FAILED for row in rows))


if __name__ == "__main__":
    run_tool(main)
