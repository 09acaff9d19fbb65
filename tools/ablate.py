"""Which part of the attention is worth what: one pyramid and one recipe, the attention the only difference.

    python tools/ablate.py --data imagenette2_128.tar.gz --form cpu --out work_dirs/ablation

Trains every variant with every seed, a file for each run, and writes a table and curves. Interrupted, the
same command goes on with what is missing. Needs torch, Pillow and, for the picture, matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lf_dense.ablation.experiment import Options, run_experiment
from lf_dense.ablation.variants import FORMS, VARIANTS
from lf_dense.errors import run_tool, tool_parser


def parse_options() -> Options:
    parser = tool_parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="tar of train/<class>/* and val/<class>/* images"
    )
    parser.add_argument(
        "--form", choices=FORMS, help="cpu (default): an hour on 2 cores; gpu: 25 minutes on one GPU"
    )
    parser.add_argument("--out", type=Path, help="folder of results (default: work_dirs/ablation)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument(
        "--workers", type=int, help="processes at once (default: the cores of a CPU, 1 on a GPU)"
    )
    parser.add_argument("--epochs", type=int, help="another length than the form's")
    parser.add_argument("--train-images", type=int, help="use so many training images")
    parser.add_argument("--val-images", type=int, help="use so many validation images")
    parser.set_defaults(**Options._field_defaults)
    args = parser.parse_args()
    return Options(**{name: getattr(args, name) for name in Options._fields})


def main() -> None:
    run_experiment(parse_options())


if __name__ == "__main__":
    run_tool(main)
