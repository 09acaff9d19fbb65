"""Made-up samples fit their models, and a model that runs on one is judged by its loss and gradient."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")
from mmengine.config import Config

from lf_dense import swap_backbone
from lf_dense.frameworks import load_config
from lf_dense.swap.samples import (
    SIZES,
    build_model,
    count_classes,
    made_up_data,
    run_model,
    try_sizes,
)

SIZE = 64


def config_of(scope, model):
    return Config({"default_scope": scope, "model": model})


def detector(preprocessor="DetDataPreprocessor", kind="RetinaNet", classes=3):
    model = {
        "type": kind,
        "data_preprocessor": {"type": preprocessor},
        "bbox_head": {"type": "RetinaHead", "num_classes": classes},
    }
    return config_of("mmdet", model)


def assert_image(image, *shape):
    assert image.shape == shape
    assert image.dtype == torch.uint8


@pytest.mark.parametrize(("training", "count"), [(True, 2), (False, 1)])
def test_detection_samples(mmdet, training, count):
    data = made_up_data(detector(), training, SIZE, True)
    assert len(data["inputs"]) == len(data["data_samples"]) == count
    for image, sample in zip(data["inputs"], data["data_samples"]):
        assert_image(image, 3, SIZE, SIZE)
        instances = sample.gt_instances
        left, top, right, bottom = instances.bboxes.unbind(1)
        assert left.min() >= 0
        assert top.min() >= 0
        assert max(right.max(), bottom.max()) <= SIZE
        assert min((right - left).min(), (bottom - top).min()) >= 0.1 * SIZE
        assert 0 <= instances.labels.min() <= instances.labels.max() < 3
        assert instances.masks.masks.shape == (len(instances), SIZE, SIZE)
        assert instances.masks.masks.any(axis=(1, 2)).all()
        assert sample.gt_sem_seg.sem_seg.shape == (1, SIZE, SIZE)
        assert sample.gt_sem_seg.sem_seg.max() < 3


def test_detection_samples_without_masks(mmdet):
    (sample,) = made_up_data(detector(), False, SIZE, False)["data_samples"]
    assert "masks" not in sample.gt_instances


def test_what_single_detectors_ask_for(mmdet):
    (sample,) = made_up_data(detector(kind="HybridTaskCascade"), False, SIZE, False)["data_samples"]
    assert sample.gt_sem_seg.sem_seg.shape == (1, SIZE // 8, SIZE // 8)
    assert "proposals" not in sample
    (sample,) = made_up_data(detector(kind="FastRCNN"), False, SIZE, False)["data_samples"]
    assert sample.proposals.bboxes.shape == (20, 4)


def test_multi_branch_samples(mmdet):
    config = detector("MultiBranchDataPreprocessor", "SoftTeacher")
    data = made_up_data(config, True, SIZE, True)
    branches = {"sup", "unsup_teacher", "unsup_student"}
    assert set(data["inputs"]) == set(data["data_samples"]) == branches
    for branch in branches:
        assert len(data["inputs"][branch]) == len(data["data_samples"][branch]) == 2
    # Branches change their samples, so none shares them.
    assert data["data_samples"]["sup"][0] is not data["data_samples"]["unsup_student"][0]
    assert isinstance(made_up_data(config, False, SIZE, True)["inputs"], list)


def test_tracking_samples(mmdet):
    data = made_up_data(detector("TrackDataPreprocessor", "QDTrack"), True, SIZE, True)
    (video,) = data["inputs"]
    assert_image(video, 2, 3, SIZE, SIZE)
    (sample,) = data["data_samples"]
    assert [frame.frame_id for frame in sample.video_data_samples] == [0, 1]
    assert (sample.key_frames_inds, sample.ref_frames_inds) == ([0], [1])
    for frame in sample.video_data_samples:
        assert frame.gt_instances.instances_ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("preprocessor", "kind"), [("ReIDDataPreprocessor", "Other"), ("Other", "BaseReID")])
def test_reidentification_samples(mmdet, preprocessor, kind):
    data = made_up_data(detector(preprocessor, kind), True, SIZE, True)
    for image in data["inputs"]:
        assert_image(image, 3, 256, 128)
    # Two images of each person, since a triplet needs a pair.
    assert [int(sample.gt_label.label) for sample in data["data_samples"]] == [0, 1, 0, 1]


@pytest.mark.parametrize(("training", "count"), [(True, 2), (False, 1)])
def test_segmentation_samples(mmseg, training, count):
    model = {
        "backbone": {},
        "data_preprocessor": {"mean": [0.0] * 6},
        "decode_head": [{"num_classes": 19}, {"num_classes": 5}],
    }
    data = made_up_data(config_of("mmseg", model), training, SIZE, False)
    assert len(data["inputs"]) == len(data["data_samples"]) == count
    for image, sample in zip(data["inputs"], data["data_samples"]):
        assert_image(image, 6, SIZE, SIZE)
        labels = sample.gt_sem_seg.data
        assert labels.shape == (1, SIZE, SIZE)
        assert (int(labels.min()), int(labels.max())) == (0, 4)


def test_segmentation_samples_of_one_class_and_without_a_mean(mmseg):
    model = {"backbone": {"in_channels": 1}, "decode_head": {"num_classes": 1}}
    data = made_up_data(config_of("mmseg", model), False, SIZE, False)
    assert_image(data["inputs"][0], 1, SIZE, SIZE)
    assert data["data_samples"][0].gt_sem_seg.data.unique().tolist() == [0, 1]


def test_classification_samples():
    pytest.importorskip("mmpretrain")
    model = {"type": "ImageClassifier", "head": {"num_classes": 2}}
    data = made_up_data(config_of("mmpretrain", model), True, SIZE, False)
    assert len(data["inputs"]) == len(data["data_samples"]) == 2
    for image, sample in zip(data["inputs"], data["data_samples"]):
        assert_image(image, 3, 64, 64)
        assert 0 <= int(sample.gt_label) < 2


def test_grey_classification_samples():
    pytest.importorskip("mmpretrain")
    model = {"type": "ImageClassifier", "backbone": {"type": "LeNet5"}, "head": {"num_classes": 2}}
    config = config_of("mmpretrain", {**model, "data_preprocessor": {"mean": [33.0]}})
    assert_image(made_up_data(config, True, SIZE, False)["inputs"][0], 1, 64, 64)


def test_views_for_self_supervised_models():
    pytest.importorskip("mmpretrain")
    two = made_up_data(config_of("mmpretrain", {"type": "BYOL", "head": {}}), True, SIZE, False)
    assert [tuple(view.shape) for view in two["inputs"]] == [(2, 3, 64, 64)] * 2
    crops = {"type": "SwAV", "head": {"loss": {"num_crops": [2, 3]}}}
    several = made_up_data(config_of("mmpretrain", crops), True, SIZE, False)
    assert [view.shape[-1] for view in several["inputs"]] == [64, 64, 32, 32, 32]
    # A batch for features is no list, which would be views.
    assert_image(made_up_data(config_of("mmpretrain", crops), False, SIZE, False)["inputs"], 2, 3, 64, 64)


@pytest.mark.parametrize(
    "name",
    [
        "mmpretrain::simsiam/simsiam_resnet50_8xb32-coslr-100e_in1k.py",
        "mmpretrain::swav/swav_resnet50_8xb32-mcrop-coslr-200e_in1k-224px-96px.py",
        "mmpretrain::mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.py",
    ],
)
def test_self_supervised_models_run_as_they_are_and_swapped(name):
    pytest.importorskip("mmpretrain")
    for config in (load_config(name), swap_backbone(name)):
        model = build_model(config)
        assert try_sizes(model, config, "loss") is None
        assert try_sizes(model, config, "predict") is None


def test_detectors_by_text_get_words_that_fit_their_labels(mmdet):
    config = detector(kind="GLIP", classes=80)
    config.model.language_model = {"type": "BertModel"}
    samples = [made_up_data(config, False, SIZE, False)["data_samples"][0] for _ in range(10)]
    labels = torch.cat([sample.gt_instances.labels for sample in samples])
    assert labels.max() < len(samples[0].text.split(" . "))
    assert samples[0].custom_entities


def test_labels_fit_every_head(mmdet):
    assert (
        count_classes({"a": {"num_classes": 80}, "b": [{"num_things_classes": 8}, {"num_classes": 0}]}) == 8
    )
    assert count_classes({"type": "RPN"}) == 1
    # A teacher and a re-identification model have classes of their own.
    config = detector()
    config.model.teacher_config = {"num_classes": 1}
    config.model.reid = {"num_classes": 2}
    data = [made_up_data(config, True, SIZE, False) for _ in range(10)]
    labels = torch.cat([sample.gt_instances.labels for batch in data for sample in batch["data_samples"]])
    assert labels.unique().tolist() == [0, 1, 2]


def test_a_model_of_a_config_is_built_and_runs(mmdet):
    config = load_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py")
    before = copy.deepcopy(config.model)
    model = build_model(config)
    assert config.model == before
    assert config.model.test_cfg.nms_pre == 1000
    assert model.test_cfg.nms_pre == 200
    assert config.model.backbone.init_cfg.type == "Pretrained"
    assert "Pretrained" not in [part["type"] for part in model.backbone.init_cfg]
    run_model(model, config, "loss", SIZE, False)
    assert model.training
    run_model(model, config, "predict", SIZE, False)
    assert not model.training


class Model(nn.Module):
    """What ``run_model`` asks of a model; the loss is its weight times ``factor``."""

    def __init__(self, factor=1.0, takes=lambda data: True):
        super().__init__()
        self.backbone = nn.Linear(1, 1)
        self.factor = factor
        self.takes = takes

    def data_preprocessor(self, data, training):
        return data

    def forward(self, inputs, data_samples, mode):
        if not self.takes((inputs[0].shape[-1], "masks" in data_samples[0].gt_instances)):
            raise RuntimeError(f"not {inputs[0].shape[-1]}")
        return {"loss": self.backbone.weight.sum() * self.factor}

    def parse_losses(self, losses):
        return losses["loss"], {}


def test_a_loss_has_to_be_finite_and_to_reach_the_backbone(mmdet):
    config = detector()
    run_model(Model(), config, "loss", SIZE, False)
    with pytest.raises(ValueError, match="the loss is nan"):
        run_model(Model(float("nan")), config, "loss", SIZE, False)
    with pytest.raises(ValueError, match="no gradient"):
        run_model(Model(0.0), config, "loss", SIZE, False)
    # A prediction has no loss.
    run_model(Model(float("nan")), config, "predict", SIZE, False)


def test_the_backbone_of_a_tracker_or_a_student_is_looked_at(mmdet):
    for name in ("detector", "student"):
        model = Model()
        part = nn.Module()
        part.backbone = nn.Linear(1, 1)
        setattr(model, name, part)
        weight = model.backbone.weight
        del model.backbone
        model.forward = lambda inputs, data_samples, mode, weight=weight: {"loss": weight.sum()}
        with pytest.raises(ValueError, match="no gradient"):
            run_model(model, detector(), "loss", SIZE, False)


def test_larger_images_and_no_masks_are_tried(mmdet):
    tried = []
    small, large = SIZES

    def takes_the_last(kind):
        tried.append(kind)
        return kind == (large, False)

    assert try_sizes(Model(takes=takes_the_last), detector(), "predict") is None
    assert tried == [(small, True), (small, False), (large, True), (large, False)]
    error = try_sizes(Model(takes=lambda kind: False), detector(), "predict")
    assert str(error) == f"not {large}"
