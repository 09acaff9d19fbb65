"""A detector and a segmentor that are right by construction: what tiles do to them is all there is."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

CLASSES = ("red", "green", "blue")


class Oracle:
    """Stands where a Predictor does. Objects are what hangs together in one pure colour on black."""

    def __init__(self, scope, masks=False, fails_at=None):
        self.scope, self.masks, self.fails_at = scope, masks, fails_at
        self.meta = {"classes": list(CLASSES)}
        self.device = torch.device("cpu")
        head = SimpleNamespace(threshold=None)
        self.model = SimpleNamespace(decode_head=head, out_channels=3)
        self.seen = []

    def predict(self, pixels):
        if len(self.seen) == self.fails_at:
            raise KeyboardInterrupt
        self.seen.append(pixels.shape)
        return self.detect(pixels) if self.scope == "mmdet" else self.segment(pixels)

    def detect(self, pixels):
        boxes, labels, masks = [], [], []
        for label in range(3):
            # OpenCV's order is blue, green, red.
            count, map_, stats, _ = cv2.connectedComponentsWithStats(
                (pixels[..., 2 - label] > 0).astype("u1")
            )
            for index in range(1, count):
                x, y, w, h = stats[index][:4]
                boxes.append([x, y, x + w, y + h])
                labels.append(label)
                masks.append(map_ == index)
        instances = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor(labels, dtype=torch.int64),
            scores=torch.full((len(boxes),), 0.9),
        )
        if self.masks:
            instances.masks = torch.from_numpy(np.array(masks, bool).reshape(-1, *pixels.shape[:2]))
        return DetDataSample(pred_instances=instances, metainfo={"ori_shape": pixels.shape[:2]})

    def segment(self, pixels):
        logits = torch.from_numpy(pixels[..., ::-1].transpose(2, 0, 1).astype(np.float32))
        sample = SegDataSample(metainfo={"ori_shape": pixels.shape[:2]})
        sample.seg_logits = PixelData(data=logits)
        sample.pred_sem_seg = PixelData(data=logits.argmax(0, keepdim=True))
        return sample

    def picture(self, name, pixels, sample, score_thr):
        self.shown = sample
        return pixels


@pytest.fixture
def oracle():
    return Oracle


def scene(height, width, seed=0, sizes=(4, 90), count=60):
    """Rectangles of pure colours on black that do not touch: ``(H, W, 3)`` BGR, boxes and labels."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.uint8)
    taken = np.zeros((height, width), bool)
    found = []
    for _ in range(count):
        h, w = rng.integers(*sizes, 2)
        if h >= height - 4 or w >= width - 4:
            continue
        y, x = int(rng.integers(0, height - h)), int(rng.integers(0, width - w))
        if taken[max(0, y - 3) : y + h + 3, max(0, x - 3) : x + w + 3].any():
            continue
        label = int(rng.integers(3))
        taken[y : y + h, x : x + w] = True
        pixels[y : y + h, x : x + w, 2 - label] = 255
        found.append((label, x, y, x + int(w), y + int(h)))
    return pixels, sorted(found)


@pytest.fixture
def make_scene():
    return scene
