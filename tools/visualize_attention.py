"""Draw what pixels of an image attend to, feature maps, and effective receptive fields."""

from __future__ import annotations

import argparse
from pathlib import Path

from lf_dense.errors import UsageError, run_tool, tool_parser
from lf_dense.explain.pictures import write_attention, write_features, write_receptive_fields
from lf_dense.explain.placing import load_subject
from lf_dense.training.cli import (
    add_backbone_options,
    add_config_options,
    add_device,
    parse_point,
    read_config,
)
from lf_dense.training.explaining import explained
from lf_dense.training.quietness import quiet


def parse_paths(args: argparse.Namespace) -> None:
    """Tell the checkpoint from the image: the image comes last, where one is needed."""
    paths = list(args.paths)
    needs_image = bool(args.query or args.features)
    if not (needs_image or args.receptive_field):
        raise UsageError("nothing is to be drawn: give --query X,Y, --features or --receptive-field FOLDER.")
    if args.heads and not args.query:
        raise UsageError("--heads needs a query: give --query X,Y.")
    if needs_image and not paths:
        raise UsageError("an image is missing: give its path after the config and the checkpoint.")
    args.image = Path(paths.pop()) if needs_image else None
    args.checkpoint = paths.pop(0) if paths else None
    if paths:
        raise UsageError(f"the argument {paths[0]} is too many: --receptive-field alone takes no image.")


def main() -> None:
    usage = "%(prog)s CONFIG [CHECKPOINT] [IMAGE] --out DIR [--query X,Y ...] [options]"
    parser = tool_parser(description=__doc__, usage=usage)
    parser.add_argument("config", help="path or packaged name of the config")
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="CHECKPOINT IMAGE",
        help="checkpoint (left out: initial weights), and the image for --query and --features",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument(
        "--query",
        action="append",
        default=[],
        metavar="X,Y",
        help="pixel of the image whose attention is drawn; may be repeated",
    )
    parser.add_argument(
        "--stage", type=int, action="append", help="stage to draw, 1 to 4; may be repeated (default: all)"
    )
    parser.add_argument("--block", type=int, help="block of each stage, from 1 on (default: the last)")
    parser.add_argument(
        "--heads", type=int, metavar="STAGE", help="draw each head of this stage as well, for each query"
    )
    parser.add_argument("--features", action="store_true", help="draw the feature maps of the image")
    parser.add_argument(
        "--receptive-field", metavar="FOLDER", help="measure the receptive fields over a folder of images"
    )
    parser.add_argument(
        "--size", type=int, default=224, help="side of the images for these, pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=int, default=16, help="the most images for these (default: %(default)s)"
    )
    add_device(parser)
    parser.add_argument("--verbose", action="store_true", help="show the messages of the frameworks too")
    add_backbone_options(parser)
    add_config_options(parser)
    args = parser.parse_intermixed_args()
    queries = [parse_point(text, "--query") for text in args.query]
    parse_paths(args)
    said = []
    with quiet(args.verbose):
        with explained():
            subject = load_subject(read_config(args), args.checkpoint, args.device)
        if queries:
            written = write_attention(
                subject, args.image, queries, args.out, args.stage, args.block, args.heads
            )
            for path, rows in written:
                found = ", ".join(f"stage {row.stage} {row.agreement():.3f}" for row in rows)
                said.append(f"wrote {path}; correlation of the layer's weights with the exact ones: {found}")
        if args.features:
            said.append(f"wrote {write_features(subject, args.image, args.out)}")
        if args.receptive_field:
            path, sides = write_receptive_fields(
                subject, args.receptive_field, args.out, args.size, args.images
            )
            found = ", ".join(f"stage {stage} {side}" for stage, side in sides.items())
            said.append(f"wrote {path}; side in pixels of the square that holds half of the field: {found}")
    print("\n".join(said))


if __name__ == "__main__":
    run_tool(main)
