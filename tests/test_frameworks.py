"""Which framework a config belongs to, how it is loaded, and what is said when something is missing."""

from __future__ import annotations

import json

import pytest

from support import ROOT

pytest.importorskip("mmengine")
from mmengine.config import Config

from lf_dense import frameworks
from lf_dense.errors import UsageError
from lf_dense.frameworks import FRAMEWORKS, check_data, framework_of, load_config


def test_packaged_names_resolve_in_every_framework():
    for name in (
        "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
        "mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py",
        "mmpretrain::resnet/resnet50_8xb32_in1k.py",
    ):
        pytest.importorskip(name.partition("::")[0])
        assert load_config(name).model.backbone.type.startswith("ResNet")


def test_a_missing_framework_is_named_with_its_command(monkeypatch, tmp_path):
    real = frameworks.find_spec
    monkeypatch.setattr(frameworks, "find_spec", lambda name: None if name == "mmseg" else real(name))
    said = "needs mmseg, which is not installed: pip install onedl-mmsegmentation"
    with pytest.raises(UsageError, match=said):
        framework_of(Config({"default_scope": "mmseg"}))
    with pytest.raises(UsageError, match="pip install onedl-mmsegmentation"):
        load_config("mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py")


def test_a_missing_base_framework_is_named(monkeypatch, tmp_path):
    """If a config's base is of an absent framework, mmengine names a package, and we say what to type."""
    from mmengine.config import config as mmengine_config

    monkeypatch.setattr(mmengine_config, "is_installed", lambda package: False)
    monkeypatch.setattr(frameworks, "find_spec", lambda name: None)
    path = tmp_path / "config.py"
    path.write_text("_base_ = ['mmdet::_base_/default_runtime.py']")
    with pytest.raises(UsageError, match="pip install onedl-mmdetection"):
        load_config(str(path))


@pytest.mark.parametrize("scope", [None, "mmpose"])
def test_unknown_scope(scope):
    with pytest.raises(UsageError, match="default_scope"):
        framework_of(Config({"default_scope": scope}))


def test_the_table_covers_what_is_installed():
    for scope, framework in FRAMEWORKS.items():
        pytest.importorskip(scope)
        assert framework.installed
        assert framework_of(Config({"default_scope": scope})) is framework


def test_data_root_moves_every_path_below_it():
    pytest.importorskip("mmdet")
    changes = {"data_root": "/somewhere/coco", "train_dataloader.batch_size": 3}
    config = load_config(str(ROOT / "configs/retinanet_lf.py"), changes)
    assert config.train_dataloader.dataset.data_root == "/somewhere/coco/"
    assert config.test_dataloader.dataset.data_root == "/somewhere/coco/"
    assert config.val_evaluator.ann_file == "/somewhere/coco/annotations/instances_val2017.json"
    assert config.test_evaluator.ann_file == "/somewhere/coco/annotations/instances_val2017.json"
    assert config.train_dataloader.batch_size == 3
    assert config.model.backbone.type == "LaplacianFormer"


def _two_roots(roots):
    dataset = {"type": "Concat", "datasets": [{"data_root": root} for root in roots]}
    return Config({"train_dataloader": {"dataset": dataset}})


def test_data_root_of_several_datasets_is_refused():
    with pytest.raises(UsageError, match=r"\['a/', 'b/'\]"):
        frameworks.move_data_root(_two_roots(["a/", "b/"]), "c")
    with pytest.raises(UsageError, match="none"):
        frameworks.move_data_root(_two_roots([None]), "c")


def test_missing_data_is_named_by_its_key(tmp_path):
    dataset = {"data_root": str(tmp_path), "ann_file": "a.json", "data_prefix": {"img": "images"}}
    config = Config(
        {
            "train_dataloader": {"dataset": {"type": "RepeatDataset", "dataset": dataset}},
            "train_evaluator": {"ann_file": str(tmp_path / "b.json")},
        }
    )
    expected = [
        "train_dataloader.dataset.dataset.ann_file",
        "train_dataloader.dataset.dataset.data_prefix.img",
        "train_evaluator.ann_file",
    ]
    for key, missing in zip(expected, ("a.json", "images", "b.json")):
        with pytest.raises(UsageError, match=key):
            check_data(config, ("train",))
        (tmp_path / missing).write_text(json.dumps({}))
    check_data(config, ("train",))
    dataset["data_root"] = "s3://bucket/"
    check_data(Config({"train_dataloader": {"dataset": dataset}}), ("train",))


def test_a_set_that_fetches_itself_is_not_asked_for():
    pytest.importorskip("mmpretrain")
    config = load_config("mmpretrain::resnet/resnet18_8xb16_cifar10.py")
    check_data(config, ("train", "val"))


def test_a_packaged_config_without_a_scope_has_that_of_its_package():
    pytest.importorskip("mmpretrain")
    config = load_config("mmpretrain::dinov2/vit-small-p14_dinov2-pre_headless.py")
    assert config.default_scope == "mmpretrain"
