"""A framework's detections in the form that tiles are joined in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .cutting import Tile
from .joining import Detections
from .masks import PlacedMask

if TYPE_CHECKING:
    from mmengine.structures import BaseDataElement


def detections_of(sample: BaseDataElement, score_thr: float, tile: Tile | None = None) -> Detections:
    """The instances of an mmdet sample, from a score on.

    Args:
        sample: the prediction for a tile or an image, on the CPU.
        score_thr: instances below it are left out.
        tile: where the tile lies; None for a whole image.
    """
    instances = sample.pred_instances
    instances = instances[instances.scores >= score_thr]
    left, top = (tile.columns.start, tile.rows.start) if tile else (0, 0)
    boxes = np.asarray(instances.bboxes, dtype=np.float64).reshape(-1, 4)
    masks = None
    if "masks" in instances:
        masks = [PlacedMask.of(np.asarray(mask, dtype=bool), left, top) for mask in instances.masks]
    return Detections(
        boxes + np.array([left, top, left, top]),
        np.asarray(instances.scores, dtype=np.float64),
        np.asarray(instances.labels, dtype=np.int64),
        masks,
    )
