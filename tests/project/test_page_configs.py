"""The configs that pages show: they are read, and their models are built."""

from __future__ import annotations

import re
import shlex
import textwrap

import pytest

pytest.importorskip("mmdet")
from mmengine.registry import MODELS, init_default_scope

from lf_dense.frameworks import load_config, override_config
from lf_dense.swap.settings import nested
from support import ROOT

PAGE = (ROOT / "docs" / "detection.md").read_text()
FASTER = '_base_ = ["mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"]\n'


def configs_of_the_page():
    blocks = re.findall(r"(?:^    .*\n)+", PAGE, re.M)
    return [textwrap.dedent(block) for block in blocks if block.lstrip().startswith("_base_")]


def class_counts(path):
    config = load_config(str(path))
    init_default_scope("mmdet")
    MODELS.build(config.model)
    return [part["num_classes"] for part in nested(config.model) if "num_classes" in part], config


def write(path, text):
    path.write_text(text.replace("/path/to/lf_dense", str(ROOT)))
    return path


def test_one_stage_and_two_stage_detectors_with_classes_of_ones_own(tmp_path):
    one_stage, two_stage = configs_of_the_page()
    counts, config = class_counts(write(tmp_path / "one.py", one_stage))
    assert counts == [2]
    assert config.train_dataloader.dataset.metainfo.classes == ("cat", "dog")
    assert config.test_dataloader.dataset.ann_file == "val.json"
    # Only the first and the last line differ, as the page says.
    base, head = two_stage.splitlines()
    whole = "\n".join([base, *one_stage.splitlines()[1:-1], head])
    counts, config = class_counts(write(tmp_path / "two.py", whole))
    assert counts == [2, 2]
    assert config.val_dataloader.dataset.data_root == "data/pets/"
    without_masks = head.replace(", mask_head=dict(num_classes=2)", "")
    assert without_masks != head
    counts, _ = class_counts(write(tmp_path / "faster.py", FASTER + without_masks))
    assert counts == [2]


def test_the_options_of_the_page_set_every_head_of_a_cascade():
    (command,) = re.findall(r"my_cascade\.py --cfg-options ((?:.*\\\n)*.*)", PAGE)
    pairs = [word.split("=") for word in shlex.split(command.replace("\\\n", " "))]
    config = load_config("lf_dense::detection/cascade-mask-rcnn_lf-tiny_fpn_1x_coco.py")
    override_config(config, {key: int(value) for key, value in pairs})
    counts = [part["num_classes"] for part in nested(config.model) if "num_classes" in part]
    assert counts == [2, 2, 2, 2]
