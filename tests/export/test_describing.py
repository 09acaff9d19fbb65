"""The description beside an exported model, read back by the runtime that uses it."""

from __future__ import annotations

import json

import pytest
from torch import nn

pytest.importorskip("mmengine")

from mmengine.config import Config

from lf_dense.errors import UsageError
from lf_dense.export.describing import describe
from lf_dense.export.metadata import read_metadata
from lf_dense.export.parts import Part

META = {"classes": ("cat", "dog"), "palette": [(1, 2, 3), (4, 5, 6)]}
PREPROCESSOR = {
    "type": "DetDataPreprocessor",
    "mean": [1.0, 2.0, 3.0],
    "std": [4.0, 5.0, 6.0],
    "bgr_to_rgb": True,
    "pad_size_divisor": 32,
}
LOAD, PACK = {"type": "LoadImageFromFile"}, {"type": "PackDetInputs"}


def config_of(*steps, **preprocessor):
    pipeline = [LOAD, *steps, PACK]
    return Config(
        {
            "model": {"data_preprocessor": {**PREPROCESSOR, **preprocessor}},
            "test_dataloader": {"dataset": {"type": "CocoDataset", "pipeline": pipeline}},
        }
    )


def part_of(task, kind, outputs):
    extra = {"align_corners": False} if task == "segmentation" else {}
    return Part(nn.Identity(), task, outputs, {"kind": kind, **extra})


CLASSIFIER = part_of("classification", "logits", ("logits",))


def described(config, part=CLASSIFIER, size=None):
    return describe(part, config, META, "standard", size)


def test_the_runtime_reads_what_is_written(tmp_path):
    config = config_of({"type": "Resize", "scale": (1333, 800), "keep_ratio": True})
    path = tmp_path / "model.json"
    path.write_text(json.dumps(described(config)))
    metadata = read_metadata(path)
    assert metadata.classes == ("cat", "dog")
    assert metadata.palette == ((1, 2, 3), (4, 5, 6))
    assert metadata.outputs == ("logits",)
    assert metadata.dynamic
    assert not metadata.own_operators
    preparation = metadata.preparation
    assert preparation.resize.scale == (1333, 800)
    assert preparation.resize.keep_ratio
    assert preparation.pad_divisor == 32
    assert preparation.to_rgb
    assert preparation.mean == (1.0, 2.0, 3.0)


def test_one_size(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(described(config_of(), size=(64, 96))))
    metadata = read_metadata(path)
    assert not metadata.dynamic
    assert metadata.preparation.fixed_size == (64, 96)


def test_resizing_an_edge_and_cropping():
    config = config_of(
        {
            "type": "ResizeEdge",
            "scale": 256,
            "edge": "short",
            "backend": "pillow",
            "interpolation": "bicubic",
        },
        {"type": "CenterCrop", "crop_size": (200, 224)},
    )
    found = described(config)["preprocess"]
    assert found["resize"] == {"short_edge": 256, "interpolation": "bicubic", "backend": "pillow"}
    assert found["center_crop"] == [224, 200]


def test_a_palette_of_another_length_is_left_out():
    found = describe(CLASSIFIER, config_of(), {**META, "palette": [(1, 2, 3)]}, "standard", None)
    assert found["palette"] is None


def test_a_backbone_is_described_without_a_pipeline():
    found = described(config_of({"type": "Mosaic"}), part_of("backbone", "maps", ("map_0",)))
    assert found["preprocess"]["resize"] is None


@pytest.mark.parametrize(
    ("steps", "preprocessor", "said"),
    [
        ([{"type": "TestTimeAug"}], {}, "has a step TestTimeAug"),
        ([{"type": "ResizeEdge", "scale": 256, "edge": "long"}], {}, "has a step ResizeEdge"),
        ([], {"rgb_to_bgr": True}, "has rgb_to_bgr"),
        ([], {"test_cfg": {"size": (64, 64)}}, "pads test images to a size"),
    ],
)
def test_what_the_runtime_has_not_is_refused(steps, preprocessor, said):
    with pytest.raises(UsageError, match=said):
        described(config_of(*steps, **preprocessor))
