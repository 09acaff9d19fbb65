"""Make the embedded data set: textured shapes that occlude each other.

Boxes and instance masks are in COCO's format; label maps are beside them.
"""

from __future__ import annotations

import argparse

from lf_dense.errors import run_tool, tool_parser
from lf_dense.training.toy_shapes import make_shapes


def main() -> None:
    parser = tool_parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="data/shapes", help="folder to write to")
    parser.add_argument("--train", type=int, default=400, help="training images")
    parser.add_argument("--val", type=int, default=80, help="held-out images")
    parser.add_argument("--size", type=int, default=192, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    args = parser.parse_args()
    print(f"wrote {make_shapes(args.out, args.train, args.val, args.size, args.seed)}")


if __name__ == "__main__":
    run_tool(main)
