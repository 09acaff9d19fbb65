"""Images are prepared to the bit as the frameworks' pipelines and data preprocessors do it."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2")
pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")
import mmcv
import mmdet.datasets.transforms as det
import mmpretrain.datasets.transforms as pretrain
import mmseg.datasets.transforms as seg
import torch
from mmcv.transforms import CenterCrop, LoadImageFromFile
from mmcv.transforms import Resize as McvResize
from mmdet.models import DetDataPreprocessor
from mmengine.dataset import Compose, pseudo_collate
from mmpretrain.models import ClsDataPreprocessor
from mmseg.models import SegDataPreProcessor

from lf_dense.errors import UsageError
from lf_dense.export.preparing import (
    CV2_INTERPOLATIONS,
    PILLOW_INTERPOLATIONS,
    Preparation,
    Resize,
    read_image,
    resize_like_pillow,
    write_png,
)

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# (height, width): odd, a line, upright, and larger than any scale below.
SIZES = [(37, 53), (1, 90), (333, 129), (64, 64), (701, 1403)]
SCALES = {"detection": (1333, 800), "segmentation": (2048, 512), "small": (97, 61)}


def picture(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=[f"{height}x{width}" for height, width in SIZES])
def synthetic(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / f"{request.param}.png"
    write_png(path, picture(*map(int, request.param.split("x"))))
    return path


def detection(scale, keep_ratio, divisor, **options):
    """Our preparation and mmdet's: each takes a path and gives the batch and its sizes."""
    resize = {"scale": scale, "keep_ratio": keep_ratio, **options}
    pipeline = Compose(
        [
            LoadImageFromFile(),
            det.Resize(**resize),
            det.PackDetInputs(meta_keys=("img_shape", "ori_shape", "scale_factor")),
        ]
    )
    preprocessor = DetDataPreprocessor(
        mean=MEAN, std=STD, bgr_to_rgb=True, pad_size_divisor=divisor, pad_value=7
    )
    return Preparation(Resize(**resize), None, True, MEAN, STD, divisor, 7), pipeline, preprocessor


def segmentation(scale, keep_ratio, divisor):
    pipeline = Compose(
        [
            LoadImageFromFile(),
            McvResize(scale=scale, keep_ratio=keep_ratio),
            seg.PackSegInputs(meta_keys=("img_shape", "ori_shape", "scale_factor")),
        ]
    )
    preprocessor = SegDataPreProcessor(
        mean=MEAN,
        std=STD,
        bgr_to_rgb=True,
        pad_val=3,
        test_cfg={"size_divisor": divisor},
        size_divisor=divisor,
    )
    return Preparation(Resize(scale, keep_ratio), None, True, MEAN, STD, divisor, 3), pipeline, preprocessor


def compare(path, ours, pipeline, preprocessor, rtol=0.0):
    prepared = ours(read_image(path))
    data = preprocessor(pseudo_collate([pipeline({"img_path": str(path), "img_id": 0})]))
    theirs = data["inputs"]
    theirs = theirs if isinstance(theirs, torch.Tensor) else torch.stack(theirs)
    np.testing.assert_array_equal(prepared.batch, theirs.numpy())
    sample = data["data_samples"][0]
    assert prepared.original == tuple(sample.ori_shape)
    assert prepared.shape == tuple(sample.img_shape)
    if "scale_factor" in sample:
        assert prepared.scale_factor == pytest.approx(sample.scale_factor, rel=1e-12)
    return prepared


@pytest.mark.parametrize("keep_ratio", [True, False])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_as_mmdet(synthetic, scale, keep_ratio):
    if synthetic.stem == "1x90" and scale == SCALES["small"] and keep_ratio:
        assert detection(scale, keep_ratio, 32)[0](read_image(synthetic)).shape == (1, 97)
    compare(synthetic, *detection(scale, keep_ratio, 32))


@pytest.mark.parametrize("interpolation", CV2_INTERPOLATIONS)
def test_as_mmdet_in_every_interpolation(synthetic, interpolation):
    compare(synthetic, *detection((97, 61), False, 16, interpolation=interpolation))


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_as_mmseg(synthetic, scale):
    prepared = compare(synthetic, *segmentation(scale, True, 32))
    assert prepared.padded[0] % 32 == prepared.padded[1] % 32 == 0


def classification(edge, crop, **options):
    pipeline = Compose(
        [
            LoadImageFromFile(),
            pretrain.ResizeEdge(scale=edge, **options),
            CenterCrop(crop_size=crop[::-1]),
            pretrain.PackInputs(meta_keys=("img_shape", "ori_shape")),
        ]
    )
    ours = Preparation(Resize(None, short_edge=edge, **options), crop, False, MEAN, STD)
    return ours, pipeline, ClsDataPreprocessor(mean=MEAN, std=STD)


@pytest.mark.parametrize("crop", [(224, 224), (63, 50), (300, 300)])
@pytest.mark.parametrize("backend", ["cv2", "pillow"])
def test_as_mmpretrain(synthetic, crop, backend):
    if synthetic.stem == "1x90":
        pytest.skip("its short edge of 1 makes a picture of 23040 pixels in a row")
    compare(synthetic, *classification(256, crop, backend=backend, interpolation="bicubic"))


@pytest.mark.parametrize("interpolation", PILLOW_INTERPOLATIONS)
@pytest.mark.parametrize("size", [(20, 64), (100, 91), (53, 37), (1, 1), (53, 90), (40, 28), (341, 238)])
def test_pillow_s_pixels(interpolation, size):
    pixels = picture(37, 53)
    theirs = Image.fromarray(pixels).resize(size, Image.Resampling[interpolation.upper()])
    np.testing.assert_array_equal(resize_like_pillow(pixels, size, interpolation), np.array(theirs))


def test_real_images(shared_data):
    images = sorted(shared_data.glob("coco_mini/**/*.jpg"))[::40]
    assert images
    for path in images:
        compare(path, *detection((1333, 800), True, 32))
        compare(path, *segmentation((2048, 512), True, 32))
        compare(path, *classification(256, (224, 224), backend="pillow", interpolation="bicubic"))


def test_a_photograph(shared_data):
    path = min(shared_data.glob("hires/photos/*.*"), key=lambda path: path.stat().st_size)
    compare(path, *detection((1333, 800), True, 32))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_mmcv_turns_them(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    Image.fromarray(picture(20, 30)).save(path, exif=exif)
    pixels = read_image(path)
    assert pixels.shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))
    np.testing.assert_array_equal(pixels, mmcv.imread(str(path)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "1", "P"])
def test_other_kinds_of_pixels_are_read_as_mmcv_reads_them(tmp_path, mode):
    path = tmp_path / "image.png"
    gray = Image.fromarray(picture(20, 30)[..., 0])
    (
        Image.fromarray(picture(20, 30)[..., 0].astype(np.uint16)) if mode == "I;16" else gray.convert(mode)
    ).save(path)
    np.testing.assert_array_equal(read_image(path), mmcv.imread(str(path)))


def test_what_is_no_image_is_none(tmp_path):
    for name, content in {
        "empty.jpg": b"",
        "text.png": b"no picture",
        "cut.png": b"\x89PNG\r\n\x1a\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert read_image(tmp_path / name) is None
    with pytest.raises(UsageError, match=r"gone.png cannot be read \(No such file or directory\)"):
        read_image(tmp_path / "gone.png")


def test_a_fixed_size_is_filled_up():
    preparation = Preparation(None, None, False, (1, 2, 3), (2, 2, 2), 32, 9, fixed_size=(40, 50))
    prepared = preparation(picture(37, 30))
    assert prepared.padded == (40, 50)
    assert prepared.shape == (37, 30)
    assert (prepared.batch[..., 37:, :] == 9).all()
    assert (prepared.batch[..., 30:] == 9).all()
    np.testing.assert_array_equal(
        prepared.batch[0, :, :37, :30],
        (picture(37, 30).transpose(2, 0, 1) - np.c_[1, 2, 3].reshape(3, 1, 1)) / 2,
    )
    with pytest.raises(UsageError, match="60 x 37 pixels when it is prepared, and the model takes 50 x 40"):
        preparation(picture(37, 60))


@pytest.mark.parametrize(
    ("height", "width", "shape"),
    [(480, 640, (60, 80)), (640, 480, (64, 48)), (30, 300, (8, 80)), (9, 9, (64, 64))],
)
def test_an_image_that_keeps_its_ratio_shrinks_into_a_fixed_size(height, width, shape):
    preparation = Preparation(Resize((80, 64), True), None, False, MEAN, STD, 1, 0, fixed_size=(64, 80))
    prepared = preparation(picture(height, width))
    assert prepared.shape == shape
    assert prepared.padded == (64, 80)
