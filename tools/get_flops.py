"""Parameters and FLOPs of the presets, with the papers' 1000-way classifier: the table in docs/presets.md."""

from __future__ import annotations

import argparse

from lf_dense.benchmark.complexity import table
from lf_dense.errors import run_tool, tool_parser
from lf_dense.presets import ARCHS


def main() -> None:
    parser = tool_parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--arch", nargs="+", choices=list(ARCHS), default=list(ARCHS), help="presets to count"
    )
    parser.add_argument(
        "--shape", nargs=2, type=int, default=[224, 224], metavar=("H", "W"), help="input size"
    )
    args = parser.parse_args()
    print(table(args.arch, tuple(args.shape)))


if __name__ == "__main__":
    run_tool(main)
