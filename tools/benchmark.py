"""Measure operators, models, the backbone, landmarks or a training step; COMMAND --help says more."""

from __future__ import annotations

import argparse

from lf_dense.benchmark import backbone, landmarks, models, operators, step
from lf_dense.errors import run_tool, tool_parser

COMMANDS = {
    "ops": (
        operators,
        "time, memory and errors of the operators, beside other attentions; needs torch",
    ),
    "models": (models, "latency, memory and cost of backbones and models over resolutions; needs mmengine"),
    "backbone": (backbone, "time of a forward pass and of the operators in it; needs mmengine"),
    "landmarks": (landmarks, "error and time of the attention over numbers of landmarks; needs a framework"),
    "step": (step, "time and losses of a detector's training step by each backend; needs mmdet"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = tool_parser(description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        shared = tool_parser(description=None, add_help=False)
        command = commands.add_parser(name, help=summary, description=module.__doc__, parents=[shared])
        module.add_options(command)
        command.set_defaults(run=module.run)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    run_tool(main)
