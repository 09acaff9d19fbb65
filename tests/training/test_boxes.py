"""Boxes of detections are clipped to their image, and drawn within it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData

from lf_dense.training.boxes import clip_boxes, drawable

OUTSIDE = torch.tensor([[-1.0, -2.0, 51.0, 41.0], [48.5, 38.5, 50.0, 40.0], [10.0, 10.0, 20.0, 20.0]])


def found(bboxes):
    """A sample of an image of 40 x 50 pixels."""
    count = len(bboxes)
    instances = InstanceData(
        bboxes=bboxes.clone(), scores=torch.ones(count), labels=torch.zeros(count, dtype=torch.long)
    )
    return DetDataSample(pred_instances=instances, metainfo={"ori_shape": (40, 50)})


def test_boxes_are_clipped_to_the_image():
    sample = found(OUTSIDE)
    clip_boxes(sample)
    assert sample.pred_instances.bboxes.tolist() == [[0, 0, 50, 40], [48.5, 38.5, 50, 40], [10, 10, 20, 20]]
    clip_boxes(DetDataSample(metainfo={"ori_shape": (40, 50)}))  # not every sample has boxes


def draw(sample):
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = {"classes": ("cat",), "palette": None}
    visualizer.add_datasample("x", np.zeros((40, 50, 3), np.uint8), sample, draw_gt=False)


def test_the_visualizer_does_not_complain_of_drawable_boxes():
    sample = found(OUTSIDE)
    clip_boxes(sample)
    with pytest.warns(UserWarning, match="out of bounds"):
        draw(sample)
    before = sample.pred_instances.bboxes.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        shown = drawable(sample, line_width=3)
        draw(shown)
    assert torch.equal(sample.pred_instances.bboxes, before)
    assert shown.pred_instances.bboxes[2].tolist() == before[2].tolist()
