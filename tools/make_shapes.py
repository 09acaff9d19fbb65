"""Make the embedded data set: textured shapes that occlude each other.

Boxes and instance masks are in COCO's format; label maps are beside them.
"""

from __future__ import annotations

import argparse

from lf_dense import errors
from lf_dense.errors import run_tool, tool_parser
from lf_dense.training.toy_shapes import CLASSES, make_shapes


def main() -> None:
    parser = tool_parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="data/shapes", help="folder to write to")
    parser.add_argument("--train", type=int, default=400, help="training images")
    parser.add_argument("--val", type=int, default=80, help="held-out images")
    parser.add_argument("--size", type=int, default=192, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a set in this folder that other arguments made"
    )
    args = parser.parse_args()
    out = make_shapes(args.out, args.train, args.val, args.size, args.seed, args.overwrite)
    installed = "lf-dense train lf_dense::retinanet_lf_demo.py"
    command = installed if errors.program else "python tools/train.py configs/retinanet_lf_demo.py"
    print(
        f"{out} has {args.train} training and {args.val} held-out images of {args.size} pixels a side:\n"
        "  train/, val/    images\n"
        "  annotations/    instances_train.json, instances_val.json: boxes and masks in COCO's format\n"
        "  semantic/       label maps\n"
        f"classes: {', '.join(CLASSES)}\n"
        "train a small detector on it with:\n"
        f"  {command} --cfg-options data_root={out}"
    )


if __name__ == "__main__":
    run_tool(main)
