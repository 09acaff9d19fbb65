"""From an image to a network's input, to the bit as the frameworks' test pipelines make it, without torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from ..errors import UsageError

Pixels = npt.NDArray[np.uint8]
CV2_INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
}
PILLOW_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
# Pillow's fixed point for pixels of 8 bits.
_PILLOW_BITS = 22


@dataclass(frozen=True)
class Resize:
    """How an image is resized.

    Attributes:
        scale: (width, height); None with ``short_edge``.
        keep_ratio: ``scale`` bounds the long and the short side, and the ratio stays.
        short_edge: the shorter side's length; None with ``scale``.
        interpolation: one of ``CV2_INTERPOLATIONS``, or of ``PILLOW_INTERPOLATIONS``.
        backend: ``"cv2"``, or ``"pillow"`` for the pixels that Pillow would make.
    """

    scale: tuple[int, int] | None
    keep_ratio: bool = False
    short_edge: int | None = None
    interpolation: str = "bilinear"
    backend: str = "cv2"

    def target(self, width: int, height: int, bounds: tuple[int, int] | None) -> tuple[int, int]:
        """The (width, height) that an image gets; a kept ratio lets it shrink to ``bounds``, (height, width).

        The roundings are those of mmcv's ``imrescale`` and of mmpretrain's ``ResizeEdge``.
        """
        if self.short_edge is not None:
            if width < height:
                return self.short_edge, max(1, int(self.short_edge * height / width))
            return max(1, int(self.short_edge * width / height)), self.short_edge
        assert self.scale is not None
        if not self.keep_ratio:
            return self.scale
        factor = min(max(self.scale) / max(height, width), min(self.scale) / min(height, width))
        if bounds:
            # An upright photograph in a model of a wide input.
            factor = min(factor, (bounds[1] + 0.49) / width, (bounds[0] + 0.49) / height)
        return max(1, int(width * float(factor) + 0.5)), max(1, int(height * float(factor) + 0.5))

    def __call__(self, pixels: Pixels, bounds: tuple[int, int] | None = None) -> Pixels:
        """Resize ``(H, W, 3)`` uint8 pixels."""
        size = self.target(pixels.shape[1], pixels.shape[0], bounds)
        if self.backend == "pillow":
            return resize_like_pillow(pixels, size, self.interpolation)
        return cv2.resize(pixels, size, interpolation=CV2_INTERPOLATIONS[self.interpolation])


@dataclass(frozen=True)
class Prepared:
    """A network's input, and how it came from the image.

    Attributes:
        batch: ``(1, 3, H, W)`` float32.
        original: the image's (height, width).
        shape: (height, width) within ``batch`` that is no padding.
        scale_factor: (x, y), from the image's pixels to the input's.
    """

    batch: npt.NDArray[np.float32]
    original: tuple[int, int]
    shape: tuple[int, int]
    scale_factor: tuple[float, float]

    @property
    def padded(self) -> tuple[int, int]:
        """The batch's (height, width)."""
        return self.batch.shape[2], self.batch.shape[3]


@dataclass(frozen=True)
class Preparation:
    """A test pipeline with its data preprocessor.

    Attributes:
        resize: None leaves the size as it is.
        center_crop: (height, width), taken after resizing; None takes everything.
        to_rgb: ``mean`` and ``std`` count R, G, B, and so does the network.
        mean: subtracted from the channels, which are 0 to 255.
        std: what they are divided by then.
        pad_divisor: both sides become multiples of it, by padding right and at the bottom.
        pad_value: what the normalised image is padded with.
        fixed_size: the (height, width) of a network that takes no other; smaller images are padded to it.
    """

    resize: Resize | None
    center_crop: tuple[int, int] | None
    to_rgb: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad_divisor: int = 1
    pad_value: float = 0.0
    fixed_size: tuple[int, int] | None = None

    def __call__(self, pixels: Pixels) -> Prepared:
        """Prepare ``(H, W, 3)`` uint8 BGR pixels.

        Raises:
            UsageError: the resized image is larger than the network's fixed size.
        """
        original = pixels.shape[0], pixels.shape[1]
        if self.resize:
            pixels = self.resize(pixels, self.fixed_size)
        scale_factor = pixels.shape[1] / original[1], pixels.shape[0] / original[0]
        if self.center_crop:
            pixels = _crop(pixels, self.center_crop)
        height, width = shape = pixels.shape[0], pixels.shape[1]
        if self.fixed_size:
            size = self.fixed_size
            if height > size[0] or width > size[1]:
                raise UsageError(
                    f"the image is {width} x {height} pixels when it is prepared, and the model takes "
                    f"{size[1]} x {size[0]} alone: give a smaller image, or export the model with dynamic "
                    "sizes."
                )
        else:
            size = _multiple(height, self.pad_divisor), _multiple(width, self.pad_divisor)
        batch = np.empty((1, 3, *size), np.float32)
        batch[..., height:, :] = self.pad_value
        batch[..., :height, width:] = self.pad_value
        for channel in range(3):
            plane = batch[0, channel, :height, :width]
            source = pixels[..., 2 - channel if self.to_rgb else channel]
            np.subtract(source, np.float32(self.mean[channel]), out=plane, dtype=np.float32)
            plane /= np.float32(self.std[channel])
        return Prepared(batch, original, shape, scale_factor)


def _multiple(length: int, divisor: int) -> int:
    return math.ceil(length / divisor) * divisor


def _crop(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """The middle, rounded as mmcv's ``CenterCrop`` does; a side that is shorter than the crop stays."""
    height, width = min(size[0], pixels.shape[0]), min(size[1], pixels.shape[1])
    top, left = round((pixels.shape[0] - height) / 2), round((pixels.shape[1] - width) / 2)
    return pixels[top : top + height, left : left + width]


def readable(path: str | Path, mend: str) -> Pixels:
    """An image file's pixels, as ``read_image`` gives them.

    Raises:
        UsageError: it is no image; ``mend`` says what to do.
    """
    pixels = read_image(path)
    if pixels is None:
        raise UsageError(f"{path} is no image that can be read: {mend}.")
    return pixels


def read_image(path: str | Path) -> Pixels | None:
    """An image file's pixels, ``(H, W, 3)`` uint8 BGR, turned as its EXIF says.

    Returns None for a file that is no image.

    Raises:
        UsageError: the file cannot be opened.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): give an image file.") from None
    if not content:
        return None
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        # OpenCV refuses pictures of more pixels than it decodes.
        return None


def write_png(path: Path, pixels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> None:
    """Write ``(H, W, 3)`` BGR pixels, or a ``(H, W)`` map, as a PNG; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())


def _triangle(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x, a = np.abs(x), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _lanczos(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where((x >= -3) & (x < 3), np.sinc(x) * np.sinc(x / 3), 0)


_KERNELS: dict[str, tuple[float, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]]] = {
    "bilinear": (1, _triangle),
    "bicubic": (2, _cubic),
    "lanczos": (3, _lanczos),
}


def _resample_rows(pixels: Pixels, length: int, kernel: str) -> Pixels:
    """Pillow's pass along the first axis: a kernel as wide as the scale asks for, in fixed point."""
    given = pixels.shape[0]
    scale = given / length
    stretch = max(scale, 1.0)
    reach, weigh = _KERNELS[kernel]
    support = reach * stretch
    center = (np.arange(length) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    end = np.minimum((center + support + 0.5).astype(np.int64), given)
    taps = first[:, None] + np.arange(int((end - first).max()))
    inside = taps < end[:, None]
    weights = np.where(inside, weigh((taps - center[:, None] + 0.5) * (1 / stretch)), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    fixed = (weights * (1 << _PILLOW_BITS) + np.copysign(0.5, weights)).astype(np.int32)
    taps = np.minimum(taps, given - 1)
    total = np.full((length, *pixels.shape[1:]), 1 << (_PILLOW_BITS - 1), np.int32)
    for tap in range(taps.shape[1]):
        total += pixels[taps[:, tap]] * fixed[:, tap].reshape(-1, *[1] * (pixels.ndim - 1))
    return np.clip(total >> _PILLOW_BITS, 0, 255).astype(np.uint8)


def _nearest_like_pillow(given: int, length: int) -> npt.NDArray[np.int64]:
    # Pillow adds the step up, and its rounding errors decide where a sample lies between two pixels.
    steps = np.full(length, given / length)
    steps[0] /= 2
    return np.minimum(np.cumsum(steps).astype(np.int64), given - 1)


def resize_like_pillow(pixels: Pixels, size: tuple[int, int], interpolation: str) -> Pixels:
    """Resize ``(H, W, 3)`` uint8 pixels to (width, height) as Pillow does, which widens its kernels.

    Columns come before rows. Newer Pillows turn that round where the height shrinks much more than the width,
    and then a rounding differs.
    """
    width, height = size
    if interpolation == "nearest":
        return pixels[_nearest_like_pillow(pixels.shape[0], height)][
            :, _nearest_like_pillow(pixels.shape[1], width)
        ]
    if width != pixels.shape[1]:
        columns = np.ascontiguousarray(pixels.swapaxes(0, 1))
        pixels = np.ascontiguousarray(_resample_rows(columns, width, interpolation).swapaxes(0, 1))
    if height != pixels.shape[0]:
        pixels = _resample_rows(pixels, height, interpolation)
    return pixels
