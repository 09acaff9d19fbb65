"""Boxes at the end of a graph: decoding and suppression against mmdet's."""

from __future__ import annotations

import pytest
import torch

from lf_dense.export.detecting import nms

pytest.importorskip("mmdet")

from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

from lf_dense.export.parts import choose_part
from lf_dense.frameworks import load_config
from support import ROOT


@pytest.fixture(scope="module")
def detector():
    config = load_config(str(ROOT / "configs" / "retinanet_lf_demo.py"))
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(config.model).eval()
    # Scores as a trained head has them, some high and most low.
    for parameter in (model.bbox_head.retina_cls.weight, model.bbox_head.retina_reg.weight):
        torch.nn.init.normal_(parameter, std=0.05)
    torch.nn.init.constant_(model.bbox_head.retina_cls.bias, -3.0)
    return model


@pytest.mark.parametrize("size", [(96, 96), (192, 160), (97, 131)])
def test_boxes_are_mmdets(detector, size):
    image = torch.randn(1, 3, *size)
    part = choose_part(detector, "mmdet", output="boxes")
    with torch.no_grad():
        boxes, scores, labels = part.module(image)
        meta = {"img_shape": size, "scale_factor": (1.0, 1.0)}
        (wanted,) = detector.bbox_head.predict_by_feat(
            *detector.bbox_head(detector.extract_feat(image)), batch_img_metas=[meta], rescale=False
        )
    assert isinstance(wanted, InstanceData)
    assert len(scores) == len(wanted) > 10
    torch.testing.assert_close(scores, wanted.scores)
    assert torch.equal(labels, wanted.labels)
    torch.testing.assert_close(boxes, wanted.bboxes, rtol=1e-4, atol=1e-3)


def test_suppression_keeps_the_best_of_each_heap():
    boxes = torch.tensor([[0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30], [0, 0, 10, 10.5]])
    scores = torch.tensor([0.5, 0.9, 0.2, 0.01])
    assert nms(boxes, scores, 0.5, 0.05).tolist() == [1, 2]
    assert nms(boxes, scores, 0.99, 0.05).tolist() == [1, 0, 2]
    assert nms(boxes, scores, 0.5, 0.95).tolist() == []
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5, 0.0).tolist() == []
