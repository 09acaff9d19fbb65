"""The configs of the comparison on CamVid differ in nothing but the backbone."""

from __future__ import annotations

import pytest

pytest.importorskip("mmseg")
pytest.importorskip("mmdet")
from mmengine.registry import MODELS, init_default_scope

from lf_dense import LaplacianFormer
from lf_dense.frameworks import load_config
from support import ROOT

FOLDER = ROOT / "configs" / "comparison"
BACKBONES = {
    "fpn_lf-tiny_500_camvid-256x256": "LaplacianFormer",
    "fpn_pvtv2-b1_500_camvid-256x256": "PyramidVisionTransformerV2",
    "fpn_r50_500_camvid-256x256": "ResNetV1c",
}


def test_every_config_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_config_builds_from_random_weights(name):
    config = load_config(str(FOLDER / f"{name}.py"))
    init_default_scope("mmseg")
    model = MODELS.build(config.model)
    assert type(model.backbone).__name__ == BACKBONES[name]
    assert model.backbone.init_cfg is None or "Pretrained" not in str(model.backbone.init_cfg)
    assert model.decode_head.num_classes == 11


@pytest.mark.parametrize("name", [name for name in BACKBONES if "lf-" not in name])
def test_recipes_are_the_same(name):
    ours = load_config(str(FOLDER / "fpn_lf-tiny_500_camvid-256x256.py")).to_dict()
    other = load_config(str(FOLDER / f"{name}.py")).to_dict()
    for config in (ours, other):
        for key in ("backbone", "neck"):
            del config["model"][key]
        del config["custom_imports"]
    assert ours == other


def test_ours_takes_another_grid_from_the_command_line():
    path = str(FOLDER / "fpn_lf-tiny_500_camvid-256x256.py")
    config = load_config(path, {"model.backbone.landmark_grid": [14, 14]})
    init_default_scope("mmseg")
    backbone = MODELS.build(config.model).backbone
    assert isinstance(backbone, LaplacianFormer)
    assert all(block.attn.landmark_grid == (14, 14) for stage in backbone.stages for block in stage.blocks)
