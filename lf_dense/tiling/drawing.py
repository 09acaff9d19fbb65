"""Pictures of large predictions, small enough to look at, and label maps as files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from ..training.prediction import Predictor
from .joining import Detections

if TYPE_CHECKING:
    from mmengine.structures import BaseDataElement

# The longer side of a picture, in pixels.
LONGEST = 2048
AT_ONCE = 50
# More detections than so many hide the image: those with the highest scores are drawn.
SHOWN = 300


def _shrunk(pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """An image as a picture ``(h, w, 3)`` RGB, and how many times smaller it is."""
    step = max(1.0, max(pixels.shape[:2]) / LONGEST)
    if step > 1:
        height, width = (max(1, round(side / step)) for side in pixels.shape[:2])
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(pixels[..., ::-1]), step


def draw_detections(predictor: Predictor, name: str, pixels: np.ndarray, found: Detections) -> np.ndarray:
    """Draw detections over an image ``(H, W, 3)`` uint8 BGR: a picture of at most ``LONGEST`` pixels, RGB.

    Of more than ``SHOWN``, those with the highest scores are drawn.
    """
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    picture, step = _shrunk(pixels)
    # The lowest scores first, and few at a time: a visualizer wants each mask at the picture's size.
    order = np.argsort(found.scores, kind="stable")[-SHOWN:]
    for first in range(0, max(1, len(order)), AT_ONCE):
        part = found.take(order[first : first + AT_ONCE])
        instances = InstanceData(
            bboxes=torch.from_numpy(part.boxes / step).float(),
            scores=torch.from_numpy(part.scores).float(),
            labels=torch.from_numpy(part.labels),
        )
        if part.masks:
            small = [mask.shrunk(step, picture.shape[:2]) for mask in part.masks]
            instances.masks = torch.from_numpy(np.stack(small))
        sample: BaseDataElement = DetDataSample(metainfo={"ori_shape": picture.shape[:2]})
        sample.pred_instances = instances
        picture = predictor.picture(name, picture, sample, 0.0)
    return picture


def draw_labels(predictor: Predictor, name: str, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Draw a label map ``(H, W)`` over an image ``(H, W, 3)`` uint8 BGR, as ``draw_detections`` does."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    picture, step = _shrunk(pixels)
    # Rounding the picture's sides may put the last pixel's middle beyond the image.
    rows, columns = (
        ((np.arange(small) + 0.5) * step).astype(int).clip(max=whole - 1)
        for small, whole in zip(picture.shape[:2], labels.shape)
    )
    small = labels[rows][:, columns].astype(np.int64)
    sample: BaseDataElement = SegDataSample(metainfo={"ori_shape": picture.shape[:2]})
    sample.pred_sem_seg = PixelData(data=torch.from_numpy(small)[None])
    return predictor.picture(name, picture, sample, 0.0)
