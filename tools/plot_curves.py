"""Draw the loss and metric curves of a work dir, or the losses of several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from lf_dense.errors import UsageError, run_tool, tool_parser
from lf_dense.training.curves import compare_losses, logged_metric, plot_curves


def parse_group(text: str) -> tuple[str, list[str]]:
    name, _, work_dirs = text.partition("=")
    if not name or not work_dirs:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR or NAME=DIR,DIR,...")
    return name, work_dirs.split(",")


def main() -> None:
    parser = tool_parser(description=__doc__)
    parser.add_argument("work_dir", nargs="?", help="work dir of a training run")
    parser.add_argument("--out", help="picture to write (default: WORK_DIR/curves.png)")
    parser.add_argument(
        "--metric",
        help="validation metric, as the log names it (default: the main one, such as coco/bbox_mAP or mIoU)",
    )
    parser.add_argument(
        "--compare",
        type=parse_group,
        nargs="+",
        metavar="NAME=DIR,...",
        help="training losses of groups of runs, with each group's mean",
    )
    args = parser.parse_args()
    if (args.work_dir is None) == (args.compare is None) or (args.compare and not args.out):
        raise UsageError("give either one work dir, or --compare NAME=DIR,... with --out.")
    if args.compare:
        path = compare_losses(dict(args.compare), args.out)
    else:
        metric = logged_metric(args.work_dir, args.metric)
        path = plot_curves(args.work_dir, args.out or Path(args.work_dir, "curves.png"), metric)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_tool(main)
