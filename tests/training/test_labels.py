"""Classes and labels: what fits is numbered right, and what does not fit is refused in one sentence."""

import json

import numpy as np
import pytest

from support.driving import COCO_OPTIONS, ROOT, call, refusal
from support.random_weights import save_random_weights

pytest.importorskip("mmengine")
from PIL import Image

from lf_dense.errors import UsageError
from lf_dense.frameworks import load_config
from lf_dense.training.labels import check_coco_classes

DEMO = str(ROOT / "configs" / "retinanet_lf_demo.py")
RETINANET = str(ROOT / "configs" / "retinanet_lf.py")


@pytest.fixture
def mmdet():
    return pytest.importorskip("mmdet")


def demo_config(shapes, classes=None):
    config = load_config(DEMO, {"data_root": str(shapes)})
    for loader in (config.train_dataloader, config.val_dataloader):
        if classes is None:
            loader.dataset.pop("metainfo")
        else:
            loader.dataset.metainfo = {"classes": classes}
    return config


def test_classes_of_a_custom_set(mmdet, shapes):
    check_coco_classes(demo_config(shapes, ("disk", "rectangle", "triangle", "ring")), ("train", "val"))
    said = r"instances_train.json .* has no category torus, .*; it has disk, rectangle, triangle, ring"
    with pytest.raises(UsageError, match=said):
        check_coco_classes(demo_config(shapes, ("disk", "torus")), ("train",))
    with pytest.raises(UsageError, match=r"has no category person, bicycle.*and 72 more"):
        check_coco_classes(demo_config(shapes), ("train",))
    said = r"lists its classes as ring, disk, and mmdet numbers them as .*, disk, ring"
    with pytest.raises(UsageError, match=said):
        check_coco_classes(demo_config(shapes, ("ring", "disk")), ("train",))
    # A user may take a part of the categories.
    check_coco_classes(demo_config(shapes, ("disk", "ring")), ("train",))


def test_a_head_with_another_number_of_classes(mmdet, shapes, tmp_path):
    loader = ("train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False")
    changes = (f"data_root={shapes}", *loader, "model.bbox_head.num_classes=7")
    line = refusal("train.py", DEMO, "--work-dir", tmp_path, "--cfg-options", *changes)
    assert "the RetinaHead bbox_head has num_classes=7, and the data has 4 classes" in line
    assert "4 classes (disk, rectangle, triangle, ring)" in line


def test_coco_s_91_ids_are_80_classes_and_come_back(mmdet, shared_data, tmp_path):
    from mmdet.datasets import CocoDataset

    coco = shared_data / "coco_mini"
    annotations = coco / "annotations" / "instances_val2017.json"
    images = {"img": str(coco / "val2017")}
    dataset = CocoDataset(ann_file=str(annotations), data_prefix=images, pipeline=[], test_mode=True)
    dataset.full_init()
    categories = json.loads(annotations.read_text())["categories"]
    assert len(categories) == 80
    assert max(category["id"] for category in categories) == 90
    for category in categories:
        assert dataset.metainfo["classes"][dataset.cat2label[category["id"]]] == category["name"]

    config = load_config(RETINANET)
    config.model.backbone.init_cfg = None
    checkpoint = save_random_weights(config, tmp_path / "random.pth")
    written = tmp_path / "results"
    changes = (f"data_root={coco}", *COCO_OPTIONS, f"test_evaluator.outfile_prefix={written}")
    call("test.py", RETINANET, checkpoint, "--work-dir", tmp_path, "--cfg-options", *changes)
    results = json.loads((tmp_path / "results.bbox.json").read_text())
    assert results
    assert {result["category_id"] for result in results} <= {category["id"] for category in categories}


def test_ade20k_s_zero_is_nothing(shared_data):
    pytest.importorskip("mmseg")
    from mmengine.registry import init_default_scope
    from mmseg.datasets import ADE20KDataset

    init_default_scope("mmseg")
    root = shared_data / "ade20k_real_samples"
    config = load_config(str(ROOT / "configs" / "segmentation" / "upernet_lf-tiny_160k_ade20k-512x512.py"))
    kept = ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs")
    pipeline = [step for step in config.train_pipeline if step["type"] in kept]
    prefix = {"img_path": "images/training", "seg_map_path": "annotations/training"}
    dataset = ADE20KDataset(data_root=str(root), data_prefix=prefix, pipeline=pipeline)
    assert len(dataset) == 3
    seen = set()
    for index in range(len(dataset)):
        sample = dataset[index]["data_samples"]
        raw = np.array(Image.open(sample.seg_map_path)).astype(int)
        expected = np.where(raw == 0, 255, raw - 1)
        assert (sample.gt_sem_seg.data[0].numpy() == expected).all()
        seen |= set(np.unique(expected))
    assert 255 in seen
    assert max(seen - {255}) < config.model.decode_head.num_classes == 150


SEGMENTATION = """
_base_ = ["{root}/configs/segmentation/fpn_lf-tiny_4k_camvid-360x360.py"]
norm_cfg = dict(type="BN")
model = dict(decode_head=dict(num_classes={classes}))
annotate = dict(type="LoadAnnotations", reduce_zero_label={reduce})
dataset = dict(
    data_root="{data}",
    img_suffix=".png",
    reduce_zero_label={reduce},
    data_prefix=dict(img_path="train", seg_map_path="semantic/train"),
    indices={maps},
    pipeline=[dict(type="LoadImageFromFile"), annotate, dict(type="PackSegInputs")],
)
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dataset)
val_cfg = None
val_dataloader = None
val_evaluator = None
train_cfg = dict(max_iters=1, val_interval=10)
"""


def test_label_maps_with_more_classes_than_the_model(shapes, tmp_path):
    """The config takes two of the shapes' label maps, which have all classes from 0 to 4."""
    pytest.importorskip("mmseg")
    maps = [4, 9]
    paths = sorted((shapes / "semantic" / "train").iterdir())
    for index in maps:
        assert np.unique(Image.open(paths[index])).tolist() == [0, 1, 2, 3, 4]
    config = tmp_path / "config.py"
    config.write_text(SEGMENTATION.format(root=ROOT, data=shapes, maps=maps, classes=3, reduce=False))
    line = refusal("train.py", config, "--work-dir", tmp_path / "run")
    assert "semantic/train" in line
    assert "has the class 4, and the model has 3 classes, 0 to 2 (255 is ignored)" in line
    config.write_text(SEGMENTATION.format(root=ROOT, data=shapes, maps=maps, classes=4, reduce=True))
    call("train.py", config, "--work-dir", tmp_path / "run")


CLASSIFICATION = """
_base_ = ["mmpretrain::_base_/default_runtime.py"]
custom_imports = dict(imports=["lf_dense"])
data_preprocessor = dict(num_classes=2, mean=[127.5] * 3, std=[64.0] * 3, to_rgb=True)
model = dict(
    type="ImageClassifier",
    backbone=dict(type="LaplacianFormer", arch="tiny", out_indices=(3,)),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=2, in_channels=512),
)
pipeline = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
dataset = dict(type="CustomDataset", data_root="{data}", pipeline=pipeline)
in_order = dict(type="DefaultSampler", shuffle=False)
train_dataloader = dict(batch_size=12, num_workers=0, sampler=in_order, dataset=dataset)
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-4))
train_cfg = dict(by_epoch=True, max_epochs=1)
"""


def test_more_folders_than_classes(shapes, tmp_path):
    pytest.importorskip("mmpretrain")
    for index, image in enumerate(sorted((shapes / "train").glob("*.png"))):
        folder = tmp_path / "data" / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / image.name).write_bytes(image.read_bytes())
    config = tmp_path / "config.py"
    config.write_text(CLASSIFICATION.format(data=tmp_path / "data"))
    line = refusal("train.py", config, "--work-dir", tmp_path / "run")
    assert "has the class 2, and the model has 2 classes, 0 to 1" in line
