"""Our own configs.

Each builds, is listed, and decays no norm and no bias. One of each family trains, evaluates and resumes as a
user would run it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from support.driving import ROOT, call, unpack_imagenette

pytest.importorskip("mmengine")
from mmengine.config import Config
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, init_default_scope

from lf_dense import LaplacianFormer
from lf_dense.frameworks import load_config
from lf_dense.presets import ARCHS
from lf_dense.swap.settings import nested, without_pretrained

FOLDERS = ("detection", "segmentation", "imagenet")
NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)
PATHS = [path for folder in FOLDERS for path in sorted((ROOT / "configs" / folder).glob("*.py"))]
CONFIGS = [f"{path.parent.name}/{path.name}" for path in PATHS]


def load(name: str) -> Config:
    config = load_config(str(ROOT / "configs" / name))
    pytest.importorskip(config.default_scope)
    return config


def build(config: Config) -> nn.Module:
    init_default_scope(config.default_scope)
    settings = without_pretrained(config.model)
    settings.setdefault("data_preprocessor", config.get("data_preprocessor"))
    return MODELS.build(settings)


def metafile(folder: str) -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "configs" / folder / "metafile.yml").read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name):
    """The backbone has the size in the config's name, and the metafile counts its parameters right.

    No norm and no bias of the model decays.
    """
    config = load(name)
    model = build(config)
    assert isinstance(model.backbone, LaplacianFormer)
    (arch,) = re.findall(r"lf-([a-z]+)", name)
    assert model.backbone.depths == ARCHS[arch]["depths"]
    models = metafile(name.split("/")[0])["Models"]
    (listed,) = [entry for entry in models if entry["Config"] == f"configs/{name}"]
    count = sum(parameter.numel() for parameter in model.parameters())
    if "dino" in name and model.decoder.ref_point_head.layers[0].in_features == 512:
        count += 131_072  # mmdet 3.3.0's layer takes half of what the fork's takes
    assert listed["Metadata"]["Parameters"] == count

    wrapper = config.optim_wrapper.to_dict()
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        {
            "type": "DefaultOptimWrapperConstructor",
            "paramwise_cfg": wrapper.pop("paramwise_cfg"),
            "optim_wrapper_cfg": {**wrapper, "type": "OptimWrapper"},
        }
    )
    optimizer = constructor(model).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    norm_layers = [module for module in model.modules() if isinstance(module, NORMS)]
    norms = {id(p) for module in norm_layers for p in module.parameters(recurse=False)}
    for key, parameter in model.named_parameters():
        if id(parameter) in norms or key.endswith("bias"):
            assert groups[id(parameter)]["weight_decay"] == 0, key
    slow = "dino" in name or "mask2former" in name
    for key, parameter in model.backbone.named_parameters():
        group = groups[id(parameter)]
        assert (group["weight_decay"] == 0) == (id(parameter) in norms or key.endswith(".bias")), key
        assert group["lr"] == pytest.approx(config.optim_wrapper.optimizer.lr * (0.1 if slow else 1)), key


@pytest.mark.parametrize("folder", FOLDERS)
def test_metafiles_list_every_config(folder):
    content = metafile(folder)
    collections = {collection["Name"] for collection in content["Collections"]}
    listed = []
    for model in content["Models"]:
        assert model["In Collection"] in collections
        assert Path(model["Config"]).stem == model["Name"]
        listed.append(Path(model["Config"]).relative_to("configs").as_posix())
        for result in model["Results"]:
            assert result["Source"] in ("published", "ours")
            # Nobody has trained one of the full recipes to its end yet.
            unknown = result["Source"] == "ours" and "imagenette" not in model["Name"]
            assert all((value is None) == unknown for value in result["Metrics"].values())
    assert sorted(listed) == [name for name in CONFIGS if name.startswith(folder)]


def set_classes(config: Config, count: int) -> None:
    """Every head for that many classes."""
    for settings in nested(config.model):
        if "num_classes" in settings:
            settings["num_classes"] = count
        if "num_things_classes" in settings:
            settings["num_things_classes"] = count
        if isinstance(settings.get("loss_cls"), dict) and "class_weight" in settings["loss_cls"]:
            settings["loss_cls"]["class_weight"] = [1.0] * count + [0.1]


def on_detection_data(config: Config, shapes: Path, data: Path | None) -> None:
    """Four small images, of COCO where it is there."""
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        {"type": "Resize", "scale": (160, 128), "keep_ratio": True},
        {"type": "PackDetInputs"},
    ]
    root, split = (data / "coco_mini", "2017") if data else (shapes, "")
    annotations = root / "annotations" / f"instances_train{split}.json"
    dataset = {
        "type": "CocoDataset",
        "data_root": str(root),
        "ann_file": str(annotations),
        "data_prefix": {"img": f"train{split}/"},
        "filter_cfg": {"filter_empty_gt": True, "min_size": 0},
        "pipeline": pipeline,
        "indices": 4,
    }
    if not data:
        dataset["metainfo"] = {"classes": ("disk", "rectangle", "triangle", "ring")}
        set_classes(config, 4)
    meta = {
        "type": "PackDetInputs",
        "meta_keys": ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    }
    load, annotate, resize, _ = pipeline
    testing = {"test_mode": True, "pipeline": [load, resize, annotate, meta]}
    set_loaders(config, dataset, {**dataset, **testing})
    for evaluator in (config.val_evaluator, config.test_evaluator):
        evaluator.ann_file = str(annotations)


def on_segmentation_data(config: Config, shapes: Path, data: Path | None) -> None:
    """Four small street scenes where they are there."""
    if data:
        root, suffix, reduce, count = data / "camvid", ".jpg", True, 11
        prefix = ("images/training", "annotations/training")
    else:
        root, suffix, reduce, count = shapes, ".png", False, 5
        prefix = ("train", "semantic/train")
    load = {"type": "LoadImageFromFile"}
    resize = {"type": "Resize", "scale": (160, 128), "keep_ratio": True}
    annotate = {"type": "LoadAnnotations", "reduce_zero_label": reduce}
    crop = {"type": "RandomCrop", "crop_size": (96, 96)}
    pack = {"type": "PackSegInputs"}
    dataset = {
        "type": "BaseSegDataset",
        "data_root": str(root),
        "img_suffix": suffix,
        "seg_map_suffix": ".png",
        "reduce_zero_label": reduce,
        "data_prefix": {"img_path": prefix[0], "seg_map_path": prefix[1]},
        "metainfo": {
            "classes": tuple(map(str, range(count))),
            "palette": [[9 * i, 90, 200 - 9 * i] for i in range(count)],
        },
        "indices": 4,
    }
    set_classes(config, count)
    # The annotations of an image are resized with it in training alone.
    training = {**dataset, "pipeline": [load, annotate, resize, crop, pack]}
    set_loaders(config, training, {**dataset, "pipeline": [load, resize, annotate, pack]})
    config.model.data_preprocessor.size = (96, 96)


def on_classification_data(config: Config, shapes: Path, data: Path | None, folder: Path) -> None:
    """Four images of two classes, of ImageNet where it is there."""
    folder = folder / "images"
    if data:
        unpack_imagenette(data, folder, "train", 2)
    else:
        for index, image in enumerate(sorted((shapes / "train").glob("*.png"))[:4]):
            (folder / f"class{index % 2}").mkdir(parents=True, exist_ok=True)
            (folder / f"class{index % 2}" / image.name).write_bytes(image.read_bytes())
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "Resize", "scale": (64, 64)}, {"type": "PackInputs"}]
    dataset = {"type": "CustomDataset", "data_root": str(folder), "pipeline": pipeline, "indices": 4}
    set_loaders(config, dataset, dataset)


def set_loaders(config: Config, train: dict, val: dict) -> None:
    for loader, dataset in (
        (config.train_dataloader, train),
        (config.val_dataloader, val),
        (config.test_dataloader, val),
    ):
        for key in ("dataset", "batch_sampler", "collate_fn"):
            loader.pop(key, None)
        loader.update(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)


@pytest.mark.parametrize(
    "name", ["mask-rcnn_lf-tiny_fpn_1x_coco.py", "cascade-mask-rcnn_lf-tiny_fpn_1x_coco.py"]
)
@torch.no_grad()
def test_roi_features_are_of_their_boxes(name):
    """mmcv's RoIAlign takes the usual memory layout for granted, so the maps have to come in it."""
    model = build(load(f"detection/{name}")).eval()
    maps = model.extract_feat(torch.randn(1, 3, 96, 128))
    # Each channel is constant, so any box of it has that constant.
    channels = torch.arange(256.0).view(1, 256, 1, 1)
    marked = [feature.zero_() + channels for feature in maps]
    extractor = model.roi_head.bbox_roi_extractor
    extractor = extractor if hasattr(extractor, "num_inputs") else extractor[0]
    boxes = torch.tensor([[0.0, 10.0, 12.0, 60.0, 70.0], [0.0, 20.0, 10.0, 120.0, 90.0]])
    found = extractor(marked[: extractor.num_inputs], boxes)
    torch.testing.assert_close(found, channels.expand_as(found))


def use_few_regions(config: Config) -> None:
    """Take fewer regions: in a small image thousands of them take all the time."""
    for settings in nested([config.model.train_cfg, config.model.test_cfg]):
        for key, count in (("num", 32), ("max_per_img", 50), ("nms_pre", 100)):
            if key in settings:
                settings[key] = count


FAMILIES = {
    "detection/mask-rcnn_lf-tiny_fpn_1x_coco.py": r"coco/segm_mAP_50: [\d.]+",
    "detection/mask-rcnn_lf-tiny_fpn_ms-3x_coco.py": r"coco/segm_mAP_50: [\d.]+",
    "detection/cascade-mask-rcnn_lf-tiny_fpn_1x_coco.py": r"coco/segm_mAP_50: [\d.]+",
    "detection/dino-4scale_lf-tiny_8xb2-12e_coco.py": r"coco/bbox_mAP_50: [\d.]+",
    "segmentation/fpn_lf-tiny_80k_ade20k-512x512.py": r"mIoU: [\d.]+",
    "segmentation/upernet_lf-tiny_160k_ade20k-512x512.py": r"mIoU: [\d.]+",
    "segmentation/mask2former_lf-tiny_160k_ade20k-512x512.py": r"mIoU: [\d.]+",
    "imagenet/lf-tiny_300e_in1k.py": r"accuracy/top1: [\d.]+",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_evaluates_and_resumes(name, shapes, request, tmp_path):
    config = load(name)
    try:
        data = request.getfixturevalue("shared_data")
    except pytest.skip.Exception:
        data = None
    if name.startswith("detection"):
        on_detection_data(config, shapes, data)
        if "dino" in name:
            config.model.num_queries = 50
        else:
            # A detector that has learnt nothing outputs nothing above the usual threshold.
            config.model.test_cfg.rcnn.score_thr = 0.0
            use_few_regions(config)
    elif name.startswith("segmentation"):
        on_segmentation_data(config, shapes, data)
    else:
        on_classification_data(config, shapes, data, tmp_path)
        # Its warm-up alone takes more epochs than are run here.
        config.param_scheduler = [{"type": "ConstantLR", "factor": 0.1}]
    iterations = "max_iters" in config.train_cfg
    length = "max_iters" if iterations else "max_epochs"
    steps = 2 if iterations else 1
    config.train_cfg.val_interval = steps
    config.default_hooks.checkpoint.interval = steps
    config.default_hooks.logger.interval = 1
    path, work_dir = tmp_path / "config.py", tmp_path / "run"
    config.dump(path)

    first = call("train.py", path, "--work-dir", work_dir, "--cfg-options", f"train_cfg.{length}={steps}")
    assert re.search(FAMILIES[name], first), first[-3000:]
    options = ("--resume", "--cfg-options", f"train_cfg.{length}={2 * steps}")
    resumed = call("train.py", path, "--work-dir", work_dir, *options)
    assert re.search(rf"resumed epoch: \d+, iter: {2}\b", resumed)
    assert re.search(FAMILIES[name], resumed)
    losses = [float(loss) for loss in re.findall(r" loss: ([\d.]+|nan|inf)", first + resumed)]
    assert len(losses) == 4
    assert all(loss == loss and loss < 1e4 for loss in losses)
    unit = "iter" if iterations else "epoch"
    assert (work_dir / f"{unit}_{2 * steps}.pth").is_file()
