"""Where a pixel of a file goes in the network's input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmcv")
from mmcv.transforms import CenterCrop, LoadImageFromFile, Pad, RandomFlip, Resize
from mmengine.config import Config
from mmengine.model import ImgDataPreprocessor

from lf_dense.errors import UsageError
from lf_dense.explain.placing import Placement, Subject, load_subject, place_image, place_query, read_pixels
from lf_dense.frameworks import load_config
from support import ROOT


class Pack:
    """The end of a pipeline."""

    def __call__(self, results):
        return {"inputs": torch.from_numpy(results["img"].transpose(2, 0, 1).copy())}


def subject(backbone, *steps):
    return Subject(backbone, ImgDataPreprocessor(pad_size_divisor=32), (LoadImageFromFile(), *steps, Pack()))


def spot(tmp_path, x, y, width=200, height=120):
    """A black image with one white square of 8 x 8 pixels around a point."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y - 4 : y + 4, x - 4 : x + 4] = 255
    path = tmp_path / "spot.png"
    Image.fromarray(pixels).save(path)
    return path


def centre_of_light(inputs):
    light = inputs[0].double().sum(0)
    rows, columns = (torch.arange(size).double() + 0.5 for size in light.shape)
    return (light.sum(0) @ columns / light.sum()).item(), (light.sum(1) @ rows / light.sum()).item()


@pytest.mark.parametrize(
    "steps",
    [
        (),
        (Resize(scale=(320, 320), keep_ratio=True),),
        (Resize(scale=(90, 150), keep_ratio=False),),
        (Resize(scale=(240, 150), keep_ratio=False), Pad(size=(300, 200))),
        (Resize(scale_factor=1.5), CenterCrop(140)),
        (CenterCrop(100), Resize(scale=(128, 128))),
    ],
    ids=["none", "keep ratio", "squeeze", "pad", "resize and crop", "crop and resize"],
)
def test_a_pixel_is_followed_through_the_pipeline(steps, backbone, tmp_path):
    image = place_image(subject(backbone, *steps), spot(tmp_path, 110, 62))
    # The square's centre is the corner between four pixels.
    assert place_query(image, (109.5, 61.5)) == pytest.approx(centre_of_light(image.inputs), abs=0.3)
    assert all(size % 32 == 0 for size in image.inputs.shape[-2:])


def test_the_input_s_area_in_the_image():
    placement = Placement((2.0, 0.5), (-10.0, 3.0))
    assert placement.box_in_image(40, 20) == (5.0, 25.0, -6.0, 34.0)
    x, y = placement.to_input(5.0 - 0.5, -6.0 - 0.5)
    assert (x, y) == (0.0, 0.0)


def test_a_query_that_is_cropped_away(backbone, tmp_path):
    image = place_image(subject(backbone, CenterCrop(100)), spot(tmp_path, 100, 60))
    with pytest.raises(
        UsageError, match="the query 20,60 lies in a part of the image that the test pipeline"
    ):
        place_query(image, (20, 60))


def test_steps_that_cannot_be_followed(backbone, photo):
    class Shrink:
        def __call__(self, results):
            return {**results, "img": results["img"][::2, ::2]}

    with pytest.raises(UsageError, match="Shrink changes the image's size"):
        place_image(subject(backbone, Shrink()), photo)
    with pytest.raises(UsageError, match="RandomFlip flips the image"):
        place_image(subject(backbone, RandomFlip(prob=1.0)), photo)


def test_images_that_cannot_be_taken(backbone, tmp_path):
    with pytest.raises(UsageError, match=r"gone\.png is not there: give the path of an image"):
        read_pixels(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UsageError, match=r"text\.png could not be read as an image"):
        place_image(subject(backbone), tmp_path / "text.png")
    Image.new("RGB", (20, 90)).save(tmp_path / "thin.png")
    thin = Subject(backbone, ImgDataPreprocessor(), ())
    with pytest.raises(UsageError, match="20 x 90 pixels at the network's input, and has to be at least 32"):
        place_image(thin, tmp_path / "thin.png")


@pytest.fixture
def config(arch):
    return Config({"model": {"type": "LaplacianFormer", "arch": arch}})


def test_a_config_of_a_backbone_alone(config, photo, tmp_path):
    subject = load_subject(config, None, "cpu")
    image = place_image(subject, photo)
    red = (image.pixels[..., 0].astype(float) - 123.675) / 58.395
    assert np.allclose(image.inputs[0, 0].numpy(), red, atol=1e-4)
    torch.save({"state_dict": subject.backbone.state_dict()}, tmp_path / "weights.pth")
    torch.manual_seed(5)
    config.data_preprocessor = {"mean": [0.0] * 3, "std": [1.0] * 3, "to_rgb": False}
    loaded = load_subject(config, str(tmp_path / "weights.pth"), "cpu")
    assert torch.equal(
        loaded.backbone.stages[3].blocks[0].attn.q.weight, subject.backbone.stages[3].blocks[0].attn.q.weight
    )
    blue = place_image(loaded, photo).inputs[0, 0].numpy()
    assert np.array_equal(blue, image.pixels[..., 2])


@pytest.mark.parametrize(
    ("package", "config"),
    [
        ("mmdet", "configs/retinanet_lf_demo.py"),
        ("mmseg", "configs/segmentation/fpn_lf-tiny_4k_camvid-360x360.py"),
        ("mmpretrain", "configs/imagenet/lf-tiny_300e_in1k.py"),
    ],
)
def test_detectors_segmentors_and_classifiers(package, config, tmp_path):
    pytest.importorskip(package)
    subject = load_subject(load_config(str(ROOT / config)), None, "cpu")
    image = place_image(subject, spot(tmp_path, 110, 62))
    found = image.inputs - image.inputs.amin((2, 3), keepdim=True)
    if package == "mmdet":  # beside the image its padding is brighter than its black
        found = found[..., : image.seen[0], : image.seen[1]]
    assert place_query(image, (109.5, 61.5)) == pytest.approx(centre_of_light(found), abs=0.5)


def test_initial_weights_are_warned_of_and_the_same_each_time(config, monkeypatch):
    from lf_dense.explain import placing

    said = []
    monkeypatch.setattr(placing, "print_log", lambda message, **_: said.append(message))
    first, second = (load_subject(config, None, "cpu").backbone for _ in range(2))
    assert (
        said == ["no checkpoint is given: the pictures show initial weights, which have learnt nothing."] * 2
    )
    assert torch.equal(first.stages[0].patch_embed.proj.weight, second.stages[0].patch_embed.proj.weight)
