"""Make a training checkpoint fit for others: only weights and metadata, and the file's hash in its name."""

from __future__ import annotations

import argparse
from pathlib import Path

from lf_dense.errors import UsageError, run_tool, tool_parser
from lf_dense.training.cli import add_trust_option, trust_named
from lf_dense.weights.publishing import publish


def parse_metric(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER, like coco/bbox_mAP=0.425") from None


def parse_args() -> argparse.Namespace:
    parser = tool_parser(description=__doc__)
    parser.add_argument("checkpoint", metavar="IN", help="checkpoint of a training run")
    parser.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="file to write, .pth or .safetensors; -HASH is put before the ending",
    )
    parser.add_argument(
        "--backbone-only",
        action="store_true",
        help="leave neck and heads out, and the backbone under its own names",
    )
    parser.add_argument("--dataset", help="what it was trained on")
    parser.add_argument("--recipe", help="the config's name, in the place of what the file says")
    add_trust_option(parser)
    parser.add_argument(
        "--metric",
        type=parse_metric,
        nargs="+",
        metavar="NAME=NUMBER",
        help="in the place of those that the file has",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    trust_named(args)
    if not args.out.parent.is_dir():
        raise UsageError(f"the folder {args.out.parent} is not there: make it first.")
    stated = {"dataset": args.dataset, "recipe": args.recipe, "metrics": dict(args.metric or [])}
    path, meta = publish(args.checkpoint, args.out, args.backbone_only, **stated)
    for key, value in meta.items():
        if key != "cfg":
            print(f"{key:<18}{value}")
    size, size_before = (file.stat().st_size / 2**20 for file in (path, Path(args.checkpoint)))
    print(f"{path} ({size:.1f} MiB; the training checkpoint has {size_before:.1f})")


if __name__ == "__main__":
    run_tool(main)
