"""Write a COCO annotation file of the first few images of another, for overfitting runs and quick looks."""

from __future__ import annotations

import json
from pathlib import Path

from lf_dense.errors import UsageError, run_tool, tool_parser
from lf_dense.files import write_atomically


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
    if not args.annotations.is_file():
        raise UsageError(f"{args.annotations} is not there.")
    content = json.loads(args.annotations.read_text())
    objects = content["annotations"]
    annotated = {each["image_id"] for each in objects if not each.get("iscrowd")}
    annotated -= {each["image_id"] for each in objects if each["area"] < args.min_area}
    content["images"] = [image for image in content["images"] if image["id"] in annotated][: args.images]
    kept = {image["id"] for image in content["images"]}
    if len(kept) < args.images:
        raise UsageError(
            f"{args.annotations} has {len(kept)} images that fit, and {args.images} were asked for."
        )
    content["annotations"] = [each for each in objects if each["image_id"] in kept]
    write_atomically(args.out, json.dumps(content).encode())
    print(f"wrote {args.out}: {len(kept)} images, {len(content['annotations'])} annotations")


if __name__ == "__main__":
    run_tool(main)
