"""An image file as a model's input, and where each pixel of the file lies in it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import print_log
from mmengine.model import ImgDataPreprocessor
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..errors import UsageError, reason_of
from ..frameworks import type_name
from ..laplacianformer import MIN_SIZE, LaplacianFormer
from ..swap.settings import nested
from ..training.prediction import Predictor, read_image
from ..weights.pretrained import load_pretrained
from .capture import find_backbone

# ImageNet's, for a backbone whose config says nothing.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the network's input: ``input = image * scale + offset``.

    Places are (x, y) in pixels from the upper left corners.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def to_input(self, x: float, y: float) -> tuple[float, float]:
        """The place in the input of the centre of a pixel ``(x, y)`` of the image."""
        return (x + 0.5) * self.scale[0] + self.offset[0], (y + 0.5) * self.scale[1] + self.offset[1]

    def box_in_image(self, width: float, height: float) -> tuple[float, float, float, float]:
        """Left, right, top and bottom in the image of the input's first ``width`` x ``height`` pixels."""
        left, top = (-offset / scale for offset, scale in zip(self.offset, self.scale))
        return left, left + width / self.scale[0], top, top + height / self.scale[1]

    def resized(self, before: tuple[int, int], after: tuple[int, int]) -> Placement:
        """The placement after a resize from (height, width) to (height, width)."""
        factors = (after[1] / before[1], after[0] / before[0])
        return Placement(
            (self.scale[0] * factors[0], self.scale[1] * factors[1]),
            (self.offset[0] * factors[0], self.offset[1] * factors[1]),
        )

    def cropped(self, left: int, top: int) -> Placement:
        """The placement after a crop that takes columns and rows off the left and the top."""
        return Placement(self.scale, (self.offset[0] - left, self.offset[1] - top))


@dataclass(frozen=True)
class PlacedImage:
    """An image and what the network sees of it.

    Attributes:
        pixels: the image ``(H, W, 3)`` uint8 RGB.
        inputs: the network's input ``(1, 3, h, w)``, normalised and padded, on the model's device.
        placement: from the image to the input.
        seen: height and width of the input without its padding.
    """

    pixels: np.ndarray
    inputs: Tensor
    placement: Placement
    seen: tuple[int, int]


@dataclass(frozen=True)
class Subject:
    """A backbone to explain, and how images become its input.

    Attributes:
        backbone: the LaplacianFormer, with its weights, on its device.
        preprocessor: the model's data preprocessor: normalises and pads.
        steps: the transforms of the test pipeline, without annotations.
    """

    backbone: LaplacianFormer
    preprocessor: nn.Module
    steps: Sequence[Callable[[dict], Any]]

    @classmethod
    def of(cls, predictor: Predictor) -> Subject:
        """The subject in a predictor."""
        return cls(
            find_backbone(predictor.model), predictor.model.data_preprocessor, predictor.pipeline.transforms
        )


def load_subject(config: Config, checkpoint: str | None, device: str) -> Subject:
    """The backbone of a config with its weights.

    Args:
        config: of a detector, segmentor or classifier with a LaplacianFormer, or with one as its model.
        checkpoint: path or address; None keeps the initial weights, the same ones each time.
        device: torch device.

    Raises:
        UsageError: framework, model or checkpoint cannot work.
    """
    starts = (settings.get("init_cfg") for settings in nested(config.get("model")))
    if not checkpoint and not any(isinstance(start, dict) and start.get("checkpoint") for start in starts):
        print_log(
            "no checkpoint is given: the pictures show initial weights, which have learnt nothing.",
            logger="current",
            level=logging.WARNING,
        )
        torch.manual_seed(0)
    if type_name(config.get("model")) != "LaplacianFormer":
        return Subject.of(Predictor(config, checkpoint or "", device))
    backbone = MODELS.build(config.model)
    if checkpoint:
        load_pretrained(backbone, checkpoint)
    else:
        backbone.init_weights()
    settings = config.get("data_preprocessor") or {"mean": MEAN, "std": STD, "bgr_to_rgb": True}
    known = {name: settings[name] for name in ("mean", "std", "bgr_to_rgb") if name in settings}
    if settings.get("to_rgb"):
        known["bgr_to_rgb"] = True
    return Subject(backbone.to(device).eval(), ImgDataPreprocessor(**known).to(device), ())


def read_pixels(path: str | Path) -> np.ndarray:
    """An image file as ``(H, W, 3)`` uint8 RGB, turned as its EXIF data say.

    Raises:
        UsageError: it is not there, or is no image.
    """
    import mmcv

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"the image {path} is not there: give the path of an image file.")
    pixels = read_image(path)
    if pixels is None:
        raise UsageError(f"{path} could not be read as an image: give a file like a JPEG or a PNG.")
    return mmcv.bgr2rgb(pixels)


def _followed(placement: Placement, step: object, before: tuple[int, int], results: dict) -> Placement:
    """The placement after one step of a pipeline that began with an image of (height, width)."""
    after, name = results["img"].shape[:2], type(step).__name__
    if results.get("flip"):
        raise UsageError(f"the test pipeline's {name} flips the image, and a query cannot be followed there.")
    if after == before:
        return placement
    if "CenterCrop" in name:
        top, left = (max(0, round((old - new) / 2)) for old, new in zip(before, after))
        return placement.cropped(left, top)
    if "Resize" in name:
        return placement.resized(before, after)
    if "Pad" in name:  # below and on the right
        return placement
    raise UsageError(
        f"the test pipeline's {name} changes the image's size in a way that a query cannot be followed in: "
        "only resizing, padding and a crop of the centre can be."
    )


def place_image(subject: Subject, path: str | Path) -> PlacedImage:
    """Take an image through the test pipeline and the preprocessor, and note where its pixels go.

    Raises:
        UsageError: the file is no image, or the pipeline cannot be followed or cannot take it.
    """
    pixels = read_pixels(path)
    placement, seen = Placement(), pixels.shape[:2]
    results: dict[str, Any] = {"img_path": str(path), "img_id": 0}
    if not subject.steps:
        results["inputs"] = torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1].transpose(2, 0, 1)))
    for step in subject.steps:
        before = results["img"].shape[:2] if "img" in results else None
        results = step(results)
        if before and "img" in results:
            placement = _followed(placement, step, before, results)
            seen = seen if "Pad" in type(step).__name__ else results["img"].shape[:2]
    inputs = preprocess(subject, results)
    if min(inputs.shape[-2:]) < MIN_SIZE:
        raise UsageError(
            f"the image {path} is {inputs.shape[-1]} x {inputs.shape[-2]} pixels at the network's input, and "
            f"has to be at least {MIN_SIZE} x {MIN_SIZE}: take a larger one."
        )
    return PlacedImage(pixels, inputs, placement, (seen[0], seen[1]))


def preprocess(subject: Subject, packed: dict[str, Any]) -> Tensor:
    """What the preprocessor makes of one packed image: ``(1, 3, H, W)`` on the backbone's device.

    Raises:
        UsageError: it cannot take the image.
    """
    try:
        return subject.preprocessor(pseudo_collate([packed]), False)["inputs"]
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(
            f"the config's data_preprocessor does not take one image: {reason_of(error)}."
        ) from error


def place_query(image: PlacedImage, query: tuple[float, float]) -> tuple[float, float]:
    """The place in the network's input of a pixel ``(x, y)`` of the image.

    Raises:
        UsageError: the network does not see the pixel.
    """
    x, y = image.placement.to_input(*query)
    if not (0 <= x < image.seen[1] and 0 <= y < image.seen[0]):
        raise UsageError(
            f"the query {query[0]:g},{query[1]:g} lies in a part of the image that the test pipeline crops "
            "away: give a point nearer the centre."
        )
    return x, y
