"""Convert a PVTv2 checkpoint (whai362/PVT's, timm's or mmdetection's) into one of a LaplacianFormer."""

from __future__ import annotations

import argparse

from lf_dense import LaplacianFormer, load_pretrained
from lf_dense.errors import run_tool, tool_parser
from lf_dense.presets import ARCHS
from lf_dense.training.cli import add_trust_option, trust_named
from lf_dense.weights.publishing import write_checkpoint
from lf_dense.weights.pvtv2 import FORMS


def parse_args() -> argparse.Namespace:
    parser = tool_parser(description=__doc__)
    parser.add_argument(
        "checkpoint", metavar="IN", help="path or address of the PVTv2 checkpoint, .pth or .safetensors"
    )
    parser.add_argument("out", metavar="OUT", help="file to write, .pth or .safetensors")
    parser.add_argument(
        "--arch", choices=ARCHS, default="tiny", help="pvt_v2_b1 has tiny's depths; block i goes to block i"
    )
    parser.add_argument(
        "--form",
        choices=("auto", *FORMS),
        default="auto",
        help="whose names the file uses (default: told by its keys)",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="convert even where less than nine tenths of the arch are covered",
    )
    add_trust_option(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    trust_named(args)
    backbone = LaplacianFormer(args.arch)
    report = load_pretrained(backbone, args.checkpoint, strict=not args.partial, form=args.form)
    state = backbone.state_dict()
    # The file leaves out what PVTv2 does not have, so that loading it says so again.
    tensors = {name: state[name] for name in state if name not in report.left}
    meta = {"arch": args.arch, "converted_from": f"{report.form}, {report.source}"}
    path = write_checkpoint(args.out, tensors, meta)
    print("\n".join([*report.lines(), f"written: {path}"]))


if __name__ == "__main__":
    run_tool(main)
