"""Evaluate a checkpoint with the metrics of its config, whichever framework the config belongs to."""

from __future__ import annotations

from lf_dense.errors import run_tool, tool_parser
from lf_dense.training.cli import (
    add_backbone_options,
    add_config_options,
    add_launcher,
    read_config,
    set_local_rank,
)
from lf_dense.training.explaining import explained
from lf_dense.training.runs import build_testing_runner


def main() -> None:
    parser = tool_parser(description=__doc__)
    parser.add_argument("config", help="path or packaged name of the config")
    parser.add_argument("checkpoint", help="checkpoint to evaluate")
    parser.add_argument("--work-dir", help="folder for logs and metrics (default: work_dirs/CONFIG'S NAME)")
    parser.add_argument("--out", metavar="FILE.pkl", help="also save the raw predictions")
    parser.add_argument(
        "--show-dir", help="also draw every image with its ground truth and prediction into this folder"
    )
    add_backbone_options(parser)
    add_config_options(parser)
    add_launcher(parser)
    args = parser.parse_args()
    set_local_rank(args.local_rank)
    runner = build_testing_runner(
        read_config(args),
        args.checkpoint,
        work_dir=args.work_dir,
        show_dir=args.show_dir,
        out=args.out,
        launcher=args.launcher,
    )
    with explained():
        runner.test()


if __name__ == "__main__":
    run_tool(main)
