"""Boxes are decoded as mmdet's heads do it, label maps made as mmseg's test step makes them."""

import time

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
import torch
from mmcv.ops import batched_nms
from mmdet.models import RetinaHead
from mmengine.config import ConfigDict
from mmseg.models import EncoderDecoder
from mmseg.models.utils import resize
from mmseg.structures import SegDataSample

from lf_dense.errors import UsageError
from lf_dense.export.decoding import (
    DenseAnchors,
    _back_to_image,
    _top_scores,
    check_shapes,
    detections_of_anchors,
    detections_of_boxes,
    label_map_of_labels,
    label_map_of_logits,
    softmax,
    suppress,
)

CLASSES = 7


def retina_head(softmax=False, clamp=False, stds=(1.0, 1.0, 1.0, 1.0), **test):
    loss = {"type": "mmdet.CrossEntropyLoss"} if softmax else {"type": "mmdet.FocalLoss", "use_sigmoid": True}
    coder = {"type": "mmdet.DeltaXYWHBBoxCoder", "target_means": (0.0, 0.1, 0.0, -0.1), "target_stds": stds}
    anchors = {
        "type": "mmdet.AnchorGenerator",
        "octave_base_scale": 4,
        "scales_per_octave": 3,
        "ratios": [0.5, 1.0, 2.0],
        "strides": [8, (16, 12), 32],
    }
    settings = {
        "nms_pre": 1000,
        "min_bbox_size": 0,
        "score_thr": 0.05,
        "nms": {"type": "nms", "iou_threshold": 0.5},
        "max_per_img": 100,
        **test,
    }
    head = RetinaHead(
        num_classes=CLASSES,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        anchor_generator=anchors,
        bbox_coder={**coder, "add_ctr_clamp": clamp, "ctr_clamp": 16},
        loss_cls=loss,
        test_cfg=ConfigDict(settings),
    )
    return head.eval()


def spec_of(head):
    coder, test = head.bbox_coder, head.test_cfg
    return DenseAnchors(
        num_classes=CLASSES,
        softmax=not head.use_sigmoid_cls,
        base_anchors=tuple(anchors.numpy() for anchors in head.prior_generator.base_anchors),
        strides=tuple(head.prior_generator.strides),
        means=tuple(coder.means),
        stds=tuple(coder.stds),
        wh_ratio_clip=16 / 1000,
        ctr_clamp=coder.ctr_clamp if coder.add_ctr_clamp else None,
        nms_pre=test.nms_pre,
        score_thr=test.score_thr,
        iou_threshold=test.nms.iou_threshold,
        class_agnostic=test.nms.get("class_agnostic", False),
        max_per_img=test.max_per_img,
        min_bbox_size=test.get("min_bbox_size", -1),
    )


def maps_of(head, height, width, level=-2.0, spread=1.5):
    """Random outputs of the head for an input of this size."""
    generator = torch.Generator().manual_seed(height * width)

    def draw(channels, stride):
        x, y = stride
        shape = (1, channels, -(-height // y), -(-width // x))
        return torch.randn(shape, generator=generator)

    strides = head.prior_generator.strides
    classes = [draw(9 * head.cls_out_channels, stride) * spread + level for stride in strides]
    return classes, [draw(36, stride) * 0.3 for stride in strides]


def compare(head, height, width, shape=None, scale_factor=(1.0, 1.0), **maps):
    classes, boxes = maps_of(head, height, width, **maps)
    shape = shape or (height, width)
    meta = {"img_shape": shape, "scale_factor": scale_factor}
    (theirs,) = head.predict_by_feat(classes, boxes, batch_img_metas=[meta], rescale=True)
    outputs = [level.numpy() for level in (*classes, *boxes)]
    ours = detections_of_anchors(spec_of(head), outputs, shape, scale_factor)
    assert ours.labels.tolist() == theirs.labels.tolist()
    np.testing.assert_allclose(ours.scores, theirs.scores.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.boxes, theirs.bboxes.numpy(), rtol=0, atol=1e-3)
    return ours


@pytest.mark.parametrize("size", [(64, 64), (95, 161), (320, 256), (800, 1344)])
def test_as_mmdet(size):
    assert len(compare(retina_head(), *size).boxes) == 100


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("clamp", [False, True])
def test_other_heads(softmax, clamp):
    head = retina_head(softmax, clamp, stds=(0.1, 0.1, 0.2, 0.2))
    assert len(compare(head, 160, 224, level=0.0).boxes)


@pytest.mark.parametrize(
    "test",
    [
        {"score_thr": 0.6},
        {"score_thr": 0.0},
        {"nms_pre": 30},
        {"nms_pre": 100000, "max_per_img": 3000},
        {"min_bbox_size": 25},
        {"min_bbox_size": -1},
        {"nms": {"type": "nms", "iou_threshold": 0.1}},
        {"nms": {"type": "nms", "iou_threshold": 0.3, "class_agnostic": True}},
        {"max_per_img": 7},
    ],
    ids=str,
)
def test_other_settings(test):
    assert len(compare(retina_head(**test), 96, 128).boxes)


def test_padding_and_scale():
    found = compare(retina_head(), 320, 448, shape=(301, 420), scale_factor=(0.66, 0.655))
    assert found.boxes[:, 2].max() == pytest.approx(420 / 0.66)
    assert found.boxes[:, 3].max() <= 301 / 0.655 + 1e-3


def test_the_first_of_equal_scores_win():
    # A logit of 30 or of 40 is a score of 1 in float32. mmdet leaves the order of equals to torch's sort.
    spec = spec_of(retina_head(nms_pre=50))
    maps = np.random.default_rng(0).uniform(30, 40, (9 * CLASSES, 8, 8)).astype(np.float32)
    scores, places = _top_scores(spec, maps)
    assert (scores == 1).all()
    assert places.tolist() == list(range(50))


def test_nothing_found():
    found = compare(retina_head(), 64, 64, level=-30.0)
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == found.labels.shape == (0,)


def boxes_of(count, seed=0):
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, 600, (count, 2)), rng.uniform(0, 200, (count, 2))
    boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
    return boxes, rng.random(count).astype(np.float32), rng.integers(0, 5, count)


@pytest.mark.parametrize("count", [0, 1, 2, 500, 3000, 12000])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_suppression_as_mmcv(count, class_agnostic):
    boxes, scores, labels = boxes_of(count)
    ours = suppress(boxes, scores, labels, 0.4, class_agnostic)
    if count == 0:
        assert ours.shape == (0,)
        return
    settings = {"type": "nms", "iou_threshold": 0.4, "class_agnostic": class_agnostic}
    _, theirs = batched_nms(torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels), settings)
    assert ours.tolist() == theirs.tolist()
    assert suppress(boxes, scores, labels, 0.4, class_agnostic, 9).tolist() == theirs.tolist()[:9]


def test_boxes_without_an_area_are_kept():
    boxes = np.zeros((3, 4), np.float32)
    assert suppress(boxes, np.ones(3, np.float32), np.zeros(3, np.int64), 0.5).tolist() == [0, 1, 2]


def test_suppression_takes_tens_of_milliseconds():
    boxes, scores, labels = boxes_of(5000)
    suppress(boxes, scores, labels, 0.5, limit=100)
    start = time.perf_counter()
    suppress(boxes, scores, labels, 0.5, limit=100)
    # About 10 ms alone; other work on the machine may take its part.
    assert time.perf_counter() - start < 0.5


def test_a_network_s_own_boxes():
    boxes = np.array([[-5, 10, 50, 200], [1, 2, 3, 4], [0, 0, 1, 1]], np.float32)
    outputs = boxes, np.array([0.9, 0.8, 0], np.float32), np.array([1, 0, -1])
    found = detections_of_boxes(outputs, 2, (100, 120), (0.5, 0.25))
    assert found.boxes.tolist() == [[0, 40, 100, 400], [2, 8, 6, 16]]
    assert found.labels.tolist() == [1, 0]
    with pytest.raises(UsageError, match="3 boxes, 2 scores and 3 labels"):
        detections_of_boxes((boxes, outputs[1][:2], outputs[2]), 2, (9, 9), (1, 1))
    with pytest.raises(UsageError, match="the label 1, and its metadata name 1 classes"):
        detections_of_boxes(outputs, 1, (9, 9), (1, 1))


def test_maps_of_different_sizes_are_refused():
    spec = spec_of(retina_head())
    classes, boxes = maps_of(retina_head(), 64, 64)
    outputs = [level.numpy() for level in (*classes, *boxes[:2], boxes[1])]
    with pytest.raises(UsageError, match="class map of level 2 has 2 x 2 cells and its box map 6 x 4"):
        detections_of_anchors(spec, outputs, (64, 64), (1, 1))


def test_shapes_are_compared():
    check_shapes(["a", "b"], [(1, 4), ()], [(None, 4), (3, 3)], "m.onnx")
    check_shapes(["a"], [(None, None)], [(None, 4)], "m.onnx")
    for shape in ((1, 5), (4,)):
        with pytest.raises(UsageError, match=r"m.onnx gives 'a' in the shape .* ask for \(\?, 4\)"):
            check_shapes(["a"], [shape], [(None, 4)], "m.onnx")


def test_softmax():
    logits = np.array([[1.0, 2.0, 300.0], [-5.0, 0.0, 5.0]], np.float32)
    np.testing.assert_allclose(softmax(logits), torch.tensor(logits).softmax(-1).numpy(), atol=1e-6)


# (h, w) of the logits, (height, width) of the padded input, without padding, of the image.
GEOMETRIES = {
    "up": ((20, 30), (80, 120), (80, 120), (160, 240)),
    "padded": ((16, 20), (128, 160), (117, 131), (375, 500)),
    "down": ((100, 90), (200, 180), (199, 171), (50, 60)),
    "odd": ((7, 9), (61, 67), (61, 67), (61, 67)),
    "a cell": ((1, 1), (32, 32), (20, 30), (33, 47)),
    "large": ((90, 120), (360, 480), (360, 480), (720, 960)),
    "upright": ((40, 10), (160, 40), (150, 33), (601, 130)),
}


def mmseg_result(logits, padded, shape, original, align_corners, threshold=0.3):
    """What ``EncoderDecoder`` makes of its head's logits in a test step."""
    segmentor = EncoderDecoder.__new__(EncoderDecoder)
    torch.nn.Module.__init__(segmentor)
    segmentor.align_corners = align_corners
    segmentor.decode_head = torch.nn.Module()
    segmentor.decode_head.threshold = threshold
    # BaseDecodeHead.predict_by_feat resizes to the padded input.
    whole = resize(torch.tensor(logits)[None], size=padded, mode="bilinear", align_corners=align_corners)
    padding = [0, padded[1] - shape[1], 0, padded[0] - shape[0]]
    sample = SegDataSample(metainfo={"ori_shape": original, "img_padding_size": padding})
    (result,) = segmentor.postprocess_result(whole, [sample])
    return result.seg_logits.data.numpy(), result.pred_sem_seg.data[0].numpy()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sizes", GEOMETRIES.values(), ids=GEOMETRIES)
def test_label_maps_as_mmseg(sizes, align_corners):
    small, padded, shape, original = sizes
    logits = np.random.default_rng(0).normal(0, 4, (19, *small)).astype(np.float32)
    scores, theirs = mmseg_result(logits, padded, shape, original, align_corners)
    down = _back_to_image(small[0], padded[0], shape[0], original[0], align_corners)
    across = _back_to_image(small[1], padded[1], shape[1], original[1], align_corners)
    np.testing.assert_allclose(down @ logits @ across.T, scores, rtol=0, atol=1e-4)
    ours = label_map_of_logits(logits, padded, shape, original, align_corners)
    assert ours.dtype == np.uint8
    # A pixel may differ where two classes are equal but for rounding.
    for row, column in np.argwhere(ours != theirs):
        assert scores[theirs[row, column], row, column] - scores[ours[row, column], row, column] < 1e-4
    assert (ours != theirs).mean() < 1e-4


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_one_logit_is_compared_with_a_threshold(threshold):
    logits = np.random.default_rng(1).normal(0, 4, (1, 12, 14)).astype(np.float32)
    sizes = (48, 56), (40, 50), (90, 99)
    _, theirs = mmseg_result(logits, *sizes, False, threshold)
    ours = label_map_of_logits(logits, *sizes, False, threshold)
    assert (ours != theirs).mean() < 1e-3


def test_many_classes_need_wider_numbers():
    logits = np.zeros((300, 2, 2), np.float32)
    logits[299] = 1
    labels = label_map_of_logits(logits, (8, 8), (8, 8), (5, 5), False)
    assert labels.dtype == np.uint16
    assert (labels == 299).all()


def test_a_network_s_own_labels():
    labels = np.arange(12).reshape(3, 4)
    same = label_map_of_labels(labels, 12, (3, 4), (3, 4), (3, 4))
    assert same.tolist() == labels.tolist()
    twice = label_map_of_labels(labels, 12, (3, 4), (2, 4), (4, 8))
    assert twice.tolist() == labels[:2].repeat(2, 0).repeat(2, 1).tolist()
    # A map of a quarter of the input's sides.
    assert label_map_of_labels(labels, 12, (12, 16), (12, 16), (12, 16))[11, 15] == 11
    with pytest.raises(UsageError, match="labels from 0 to 11, and its metadata name 5 classes"):
        label_map_of_labels(labels, 5, (3, 4), (3, 4), (3, 4))
