"""Write a config with a LaplacianFormer in place of its backbone.

The new config is one self-contained file that any mm tool reads.
"""

from __future__ import annotations

from pathlib import Path

from lf_dense.errors import UsageError, run_tool, tool_parser
from lf_dense.files import write_atomically
from lf_dense.presets import ARCHS
from lf_dense.swap.backbone import swap_backbone
from lf_dense.training.cli import add_settings, add_trust_option, trust_named


def main() -> None:
    parser = tool_parser(description=__doc__)
    parser.add_argument("config", help="path or packaged name of the config")
    parser.add_argument("out", type=Path, metavar="OUT.py", help="file to write")
    parser.add_argument(
        "--backbone", choices=ARCHS, default="tiny", help="size of the LaplacianFormer (default: %(default)s)"
    )
    parser.add_argument("--pretrained", metavar="CKPT", help="start the LaplacianFormer from this checkpoint")
    add_trust_option(parser)
    add_settings(parser, "--backbone-options", "its other arguments")
    args = parser.parse_args()
    if args.out.suffix != ".py":
        raise UsageError(f"{args.out}: a config is a Python file, so the name has to end in .py.")
    trust_named(args)
    try:
        config = swap_backbone(args.config, args.backbone, args.pretrained, **(args.backbone_options or {}))
    except (TypeError, ValueError) as error:
        raise UsageError(f"--backbone-options do not fit: {error}") from error
    write_atomically(args.out, config.pretty_text.encode())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_tool(main)
