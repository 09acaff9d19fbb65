"""Subsets of COCO annotation files."""

from __future__ import annotations

import json

import pytest

from lf_dense.errors import UsageError
from lf_dense.training.coco_subset import write_subset
from support.driving import call


@pytest.fixture
def annotations(tmp_path):
    """Four images: two objects, a small one, a crowd alone, nothing."""
    objects = [
        {"image_id": 1, "area": 100},
        {"image_id": 1, "area": 50},
        {"image_id": 2, "area": 5},
        {"image_id": 3, "area": 100, "iscrowd": 1},
    ]
    content = {
        "images": [{"id": index} for index in (1, 2, 3, 4)],
        "annotations": objects,
        "categories": ["kept"],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_the_first_images_with_objects(annotations, tmp_path):
    write_subset(annotations, tmp_path / "out.json", images=2)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [image["id"] for image in written["images"]] == [1, 2]
    assert [each["area"] for each in written["annotations"]] == [100, 50, 5]
    assert written["categories"] == ["kept"]


def test_images_with_small_objects_are_left_out(annotations, tmp_path):
    content = write_subset(annotations, tmp_path / "out.json", images=1, min_area=10)
    assert [image["id"] for image in content["images"]] == [1]
    with pytest.raises(UsageError, match="has 1 images that fit, and 2 were asked for"):
        write_subset(annotations, tmp_path / "out.json", images=2, min_area=10)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"images": []}'])
def test_what_is_no_annotation_file(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UsageError, match="no COCO annotation file"):
        write_subset(tmp_path / "x.json", tmp_path / "out.json")
    with pytest.raises(UsageError, match="is not there"):
        write_subset(tmp_path / "gone.json", tmp_path / "out.json")


def test_the_tool(annotations, tmp_path):
    said = call("subset_coco.py", annotations, tmp_path / "out.json", "--images", 2)
    assert "2 images, 3 annotations" in said
