"""Write a COCO annotation file of the first few images of another, for overfitting runs and quick looks."""

from __future__ import annotations

from pathlib import Path

from lf_dense.errors import run_tool, tool_parser
from lf_dense.training.coco_subset import write_subset


def main() -> None:
    parser = tool_parser(description=__doc__)
    parser.add_argument("annotations", type=Path, help="COCO instances_*.json to read")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument(
        "--images",
        type=int,
        default=8,
        help="how many images with at least one annotation (default: %(default)s)",
    )
    parser.add_argument(
        "--min-area", type=float, default=0.0, help="only images whose every object covers as many pixels"
    )
    args = parser.parse_args()
    content = write_subset(args.annotations, args.out, args.images, args.min_area)
    print(f"wrote {args.out}: {len(content['images'])} images, {len(content['annotations'])} annotations")


if __name__ == "__main__":
    run_tool(main)
