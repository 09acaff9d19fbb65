"""A dense detector whose graph ends in boxes: decoding and non-maximum suppression inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.library.custom_op("lf_dense_export::nms", mutates_args=())
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, score_thr: float) -> Tensor:
    """Non-maximum suppression, which is ONNX's NonMaxSuppression in an exported graph.

    Args:
        boxes: ``(K, 4)``, x1, y1, x2, y2.
        scores: ``(K,)``.
        iou_threshold: boxes that overlap a better one by more are dropped.
        score_thr: scores have to be above it.

    Returns:
        int64 indices ``(n,)`` of the boxes that stay, best first.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > score_thr]
    area = (boxes[:, 2] - boxes[:, 0]).clamp_min(0) * (boxes[:, 3] - boxes[:, 1]).clamp_min(0)
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[order, :2])
        high = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = (high - low).clamp_min(0).prod(-1)
        order = order[shared <= iou_threshold * (area[best] + area[order] - shared)]
    return torch.stack(kept) if kept else torch.zeros(0, dtype=torch.int64)


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, score_thr: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


class BoxDetector(nn.Module):
    """One image's final boxes, from the maps of a dense head.

    Boxes are clipped to the input, padding included: a graph does not know where the image ends.

    Args:
        dense: gives class scores of all levels, then box offsets of all levels.
        settings: as ``Part.postprocess`` of kind ``dense_anchors``.

    ``forward`` takes ``(1, 3, H, W)`` and returns boxes ``(n, 4)`` in pixels of the input, scores ``(n,)``,
    best first, and int64 labels ``(n,)``.
    """

    means: Tensor
    stds: Tensor

    def __init__(self, dense: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__()
        self.dense = dense
        self.settings = settings
        for level, anchors in enumerate(settings["base_anchors"]):
            self.register_buffer(f"anchors_{level}", torch.tensor(anchors), persistent=False)
        self.register_buffer("means", torch.tensor(settings["means"]), persistent=False)
        self.register_buffer("stds", torch.tensor(settings["stds"]), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        settings = self.settings
        maps = self.dense(image)
        levels = len(maps) // 2
        found = [self._level(level, maps[level], maps[levels + level], image) for level in range(levels)]
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*found))
        if settings["min_bbox_size"] >= 0:
            large = ((boxes[:, 2:] - boxes[:, :2]) > settings["min_bbox_size"]).all(1)
            scores = torch.where(large, scores, -torch.ones_like(scores))
        # Boxes of different classes never meet when each class has a plane of its own.
        plane = labels.to(boxes.dtype) * (boxes.max() + 1)
        spread = boxes if settings["class_agnostic"] else boxes + plane[:, None]
        kept = torch.ops.lf_dense_export.nms(spread, scores, settings["iou_threshold"], settings["score_thr"])
        kept = kept[: settings["max_per_img"]]
        return boxes[kept], scores[kept], labels[kept]

    def _level(self, level: int, scores: Tensor, offsets: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        """The best boxes of one level, decoded, with scores and labels."""
        settings = self.settings
        base, (step_x, step_y) = getattr(self, f"anchors_{level}"), settings["strides"][level]
        rows, columns = scores.shape[2:]
        shift_y = torch.arange(rows, device=image.device) * step_y
        shift_x = torch.arange(columns, device=image.device) * step_x
        zero = torch.zeros_like(shift_x + shift_y[:, None])
        shifts = torch.stack([zero + shift_x, zero + shift_y[:, None]] * 2, -1).to(base.dtype)
        anchors = (shifts.flatten(0, 1)[:, None] + base).flatten(0, 1)
        of_anchors = scores.permute(0, 2, 3, 1).reshape(anchors.shape[0], -1)
        if settings["activation"] == "sigmoid":
            of_anchors = of_anchors.sigmoid()
        else:
            of_anchors = of_anchors.softmax(-1)[:, :-1]
        flat, classes = of_anchors.flatten(), settings["num_classes"]
        best, index = flat.topk(torch.sym_min(settings["nms_pre"], flat.shape[0]))
        which = index // classes
        deltas = offsets.permute(0, 2, 3, 1).reshape(-1, 4)[which] * self.stds + self.means
        return self._decode(anchors[which], deltas, image), best, index % classes

    def _decode(self, anchors: Tensor, deltas: Tensor, image: Tensor) -> Tensor:
        """Faster R-CNN's box decoding (its section 3.1.2), with mmdet's clamps."""
        settings = self.settings
        size = anchors[:, 2:] - anchors[:, :2]
        move = deltas[:, :2] * size
        limit = abs(torch.log(torch.tensor(settings["wh_ratio_clip"])).item())
        if settings["add_ctr_clamp"]:
            move = move.clamp(-settings["ctr_clamp"], settings["ctr_clamp"])
            growth = deltas[:, 2:].clamp(max=limit)
        else:
            growth = deltas[:, 2:].clamp(-limit, limit)
        centre, half = (anchors[:, :2] + anchors[:, 2:]) / 2 + move, size * growth.exp() / 2
        corners = torch.stack([*(centre - half).unbind(1), *(centre + half).unbind(1)], 1).clamp_min(0)
        height, width = image.shape[2:]
        sides = torch.ones_like(corners) * torch.stack(
            [corners.new_ones(()) * side for side in (width, height, width, height)]
        )
        return torch.minimum(corners, sides)
