"""A few images of a COCO annotation file: for overfitting runs and quick looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import write_atomically


def write_subset(annotations: Path, out: Path, images: int = 8, min_area: float = 0.0) -> dict[str, Any]:
    """Write a COCO file of the first few images of another.

    Args:
        annotations: the file to read, ``instances_*.json``.
        out: the file to write.
        images: how many images with at least one annotation that is no crowd.
        min_area: leave out images with an object of fewer pixels.

    Returns:
        The content that was written.

    Raises:
        UsageError: the file is not there, is none of COCO's, or has too few images that fit.
    """
    if not annotations.is_file():
        raise UsageError(f"{annotations} is not there.")
    try:
        content = json.loads(annotations.read_text())
        objects, listed = content["annotations"], content["images"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UsageError(f"{annotations} is no COCO annotation file (images, annotations).") from error
    annotated = {each["image_id"] for each in objects if not each.get("iscrowd")}
    annotated -= {each["image_id"] for each in objects if each["area"] < min_area}
    content["images"] = [image for image in listed if image["id"] in annotated][:images]
    kept = {image["id"] for image in content["images"]}
    if len(kept) < images:
        raise UsageError(f"{annotations} has {len(kept)} images that fit, and {images} were asked for.")
    content["annotations"] = [each for each in objects if each["image_id"] in kept]
    write_atomically(out, json.dumps(content).encode())
    return content
