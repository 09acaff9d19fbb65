"""The embedded data set: the same bytes from the same seed, and annotations that agree with the pictures."""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")
pytest.importorskip("mmengine")
coco_mask = pytest.importorskip("pycocotools.mask")

from lf_dense import errors
from lf_dense.errors import UsageError
from lf_dense.training.toy_shapes import CLASSES, draw_scene, make_shapes
from support.driving import load_tool


def digest(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), train=20, val=3, size=96, seed=5)


def test_same_seed_same_bytes(made, tmp_path):
    assert digest(make_shapes(tmp_path / "a", train=20, val=3, size=96, seed=5)) == digest(made)
    assert digest(make_shapes(tmp_path / "b", train=20, val=3, size=96, seed=6)) != digest(made)


def test_images_do_not_depend_on_how_many_there_are(made, tmp_path):
    fewer = make_shapes(tmp_path, train=2, val=1, size=96, seed=5)
    for name in ("train/000002.png", "semantic/train/000002.png", "val/000001.png"):
        assert (fewer / name).read_bytes() == (made / name).read_bytes()
    assert (made / "train/000001.png").read_bytes() != (made / "val/000001.png").read_bytes()


def test_an_interrupted_set_is_made_again(made, tmp_path):
    out = make_shapes(tmp_path, train=2, val=1, size=96, seed=5)
    before = digest(out)
    (out / "train/000001.png").unlink()
    mark = json.loads((out / "made_by.json").read_text())
    (out / "made_by.json").write_text(json.dumps({**mark, "finished": False}))
    assert digest(make_shapes(out, train=2, val=1, size=96, seed=5)) == before


def test_a_set_that_is_there_is_left_as_it_is(tmp_path):
    out = make_shapes(tmp_path / "set", train=2, val=1, size=96)
    (out / "train/000001.png").unlink()
    assert not (make_shapes(out, train=2, val=1, size=96) / "train/000001.png").exists()


def test_another_set_is_replaced_when_asked_for_alone(made, tmp_path):
    out = make_shapes(tmp_path / "set", train=3, val=2, size=96, seed=6)
    before = digest(out)
    with pytest.raises(UsageError, match=r"made by other arguments .*add --overwrite to replace it"):
        make_shapes(out, train=2, val=1, size=96, seed=5)
    assert digest(out) == before
    fewer = digest(make_shapes(out, train=2, val=1, size=96, seed=5, overwrite=True))
    assert fewer == digest(make_shapes(tmp_path / "new", train=2, val=1, size=96, seed=5))


@pytest.mark.parametrize(
    ("program", "command"),
    [
        (None, "python tools/train.py configs/retinanet_lf_demo.py"),
        ("lf-dense shapes", "lf-dense train lf_dense::retinanet_lf_demo.py"),
    ],
)
def test_the_tool_says_what_it_wrote_and_what_comes_next(program, command, tmp_path, monkeypatch, capsys):
    out = tmp_path / "set"
    arguments = ["--out", str(out), "--train", "2", "--val", "1", "--size", "64"]
    monkeypatch.setattr(sys, "argv", ["make_shapes.py", *arguments])
    monkeypatch.setattr(errors, "program", program)
    load_tool("make_shapes").main()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{out} has 2 training and 1 held-out images of 64 pixels a side:"
    assert all((out / name).exists() for name in ("train", "val", "annotations", "semantic"))
    assert said[-1].strip() == f"{command} --cfg-options data_root={out}"


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_files_of_others_are_left_alone(overwrite, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "000001.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"holds other files and no set of shapes \(made_by.json\)"):
        make_shapes(tmp_path, train=2, val=1, size=96, overwrite=overwrite)
    assert (tmp_path / "train" / "000001.png").read_bytes() == b"mine"
    with pytest.raises(UsageError, match="is a file: name a folder"):
        make_shapes(tmp_path / "train" / "000001.png", train=2, val=1, size=96)


def test_boxes_masks_and_label_maps_agree(made):
    content = json.loads((made / "annotations/instances_train.json").read_text())
    assert [c["name"] for c in content["categories"]] == list(CLASSES)
    assert len(content["images"]) == 20
    assert {a["category_id"] for a in content["annotations"]} == set(range(1, len(CLASSES) + 1))
    for image in content["images"]:
        labels = cv2.imread(str(made / "semantic/train" / image["file_name"]), cv2.IMREAD_UNCHANGED)
        painted = np.zeros_like(labels)
        for annotation in (a for a in content["annotations"] if a["image_id"] == image["id"]):
            encoded = coco_mask.frPyObjects(annotation["segmentation"], 96, 96)
            mask = coco_mask.decode(encoded).astype(bool)
            assert mask.sum() == annotation["area"]
            assert coco_mask.toBbox(encoded).tolist() == annotation["bbox"]
            assert not painted[mask].any(), "visible parts do not overlap"
            painted[mask] = annotation["category_id"]
        np.testing.assert_array_equal(painted, labels)


def test_scenes_have_occlusion_and_scale():
    scenes = [draw_scene(np.random.default_rng([1, i]), 192)[1] for i in range(60)]
    sides = [max(np.ptp(axis) + 1 for axis in np.nonzero(mask)) for shapes in scenes for _, mask in shapes]
    assert min(sides) < 24
    assert max(sides) > 80
    # A disk that is cut by another shape fills its box less than pi / 4 of it.
    disks = [mask for shapes in scenes for label, mask in shapes if CLASSES[label] == "disk"]
    boxes = [[np.ptp(axis) + 1 for axis in np.nonzero(mask)] for mask in disks]
    fills = [mask.sum() / (height * width) for mask, (height, width) in zip(disks, boxes)]
    assert min(fills) < 0.65
