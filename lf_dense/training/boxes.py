"""Boxes of detections: within their image, and as a visualizer draws them."""

from __future__ import annotations

import torch
from mmengine.structures import BaseDataElement


def clip_boxes(sample: BaseDataElement) -> None:
    """Clip a detection's boxes ``(K, 4)`` to its image, in place: not every head does."""
    instances = sample.get("pred_instances")
    if instances is not None and "bboxes" in instances:
        height, width = sample.ori_shape[:2]
        instances.bboxes[:, 0::2].clamp_(0, width)
        instances.bboxes[:, 1::2].clamp_(0, height)


def drawable(sample: BaseDataElement, line_width: float) -> BaseDataElement:
    """A detection with boxes that mmdet's visualizer draws within the image; other samples as they are.

    For the visualizer, a box that ends at the image's border is outside. It writes a box's name at the corner
    plus the line's width, which has to be inside too.

    Args:
        sample: with boxes within its image.
        line_width: in pixels.
    """
    instances = sample.get("pred_instances")
    if instances is None or "bboxes" not in instances:
        return sample
    height, width = sample.ori_shape[:2]
    last = instances.bboxes.new_tensor([width - 1, height - 1])
    corners = instances.bboxes[:, :2].minimum((last - line_width).clamp(min=0))
    bboxes = torch.cat([corners, instances.bboxes[:, 2:].minimum(last)], dim=1)
    shown = sample.new()
    # All but the boxes is shared: masks may be large.
    shown.pred_instances = instances.new()
    shown.pred_instances.bboxes = bboxes
    return shown
