"""The runtime on small models: what it predicts, which files it refuses, and that it needs no torch."""

import copy
import json
import subprocess
import sys
import types

import numpy as np
import pytest

pytest.importorskip("cv2")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper

from lf_dense.errors import UsageError
from lf_dense.export import Runtime
from lf_dense.export.runtime import _openvino_core, read_metadata
from support import ROOT

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
# Square anchors of 24 and 48 pixels, in cells of 16 and 32.
STRIDES = [[16, 16], [32, 32]]
ANCHORS = [[[-12, -12, 12, 12], [-24, -12, 24, 12]], [[-24, -24, 24, 24], [-48, -24, 48, 24]]]
POSTPROCESS = {
    "dense_anchors": {
        "kind": "dense_anchors",
        "num_classes": 3,
        "activation": "sigmoid",
        "base_anchors": ANCHORS,
        "strides": STRIDES,
        "means": [0.0, 0.0, 0.0, 0.0],
        "stds": [1.0, 1.0, 1.0, 1.0],
        "wh_ratio_clip": 0.016,
        "add_ctr_clamp": False,
        "ctr_clamp": 32,
        "nms_pre": 1000,
        "score_thr": 0.05,
        "iou_threshold": 0.5,
        "class_agnostic": False,
        "max_per_img": 100,
        "min_bbox_size": 0,
    },
    "segmentation logits": {"kind": "logits", "align_corners": False},
}
TASKS = {
    "dense_anchors": "detection",
    "boxes": "detection",
    "segmentation logits": "segmentation",
    "labels": "segmentation",
    "scores": "classification",
    "classification logits": "classification",
    "maps": "backbone",
}


def weights(seed, *shape):
    return (np.random.default_rng(seed).normal(0, 1, shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


class Graph:
    """An ONNX graph in the making."""

    def __init__(self, size):
        self.input = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, *size])
        self.nodes, self.constants, self.outputs = [], [], []

    def add(self, operation, inputs, output, **attributes):
        names = []
        for place, value in enumerate(inputs):
            if isinstance(value, np.ndarray):
                self.constants.append(numpy_helper.from_array(value, f"{output}.{place}"))
                value = f"{output}.{place}"
            names.append(value)
        self.nodes.append(helper.make_node(operation, names, [output], **attributes))
        return output

    def convolution(self, output, channels, stride, seed):
        kernel = weights(seed, channels, 3, stride, stride)
        return self.add("Conv", ["image", kernel], output, strides=[stride, stride])

    def gives(self, name, rank, kind=TensorProto.FLOAT):
        self.outputs.append(helper.make_tensor_value_info(name, kind, [None] * rank))

    def save(self, path):
        graph = helper.make_graph(self.nodes, "tiny", [self.input], self.outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model)
        onnx.save(model, path)


def write_model(folder, kind, size=("height", "width"), changes=None):
    """A model with random weights and its metadata; ``changes`` replaces fields, by dotted names."""
    folder.mkdir(parents=True, exist_ok=True)
    graph = Graph(size)
    if kind == "dense_anchors":
        for level, (stride, _) in enumerate(STRIDES):
            graph.convolution(f"cls{level}", 6, stride, level)
            graph.gives(f"cls{level}", 4)
        for level, (stride, _) in enumerate(STRIDES):
            graph.convolution(f"box{level}", 8, stride, 10 + level)
            graph.gives(f"box{level}", 4)
    elif kind == "boxes":
        boxes = np.array([[4, 8, 20, 30], [0, 0, 300, 300], [0, 0, 0, 0]], np.float32)
        nothing = graph.add("ReduceMax", ["image"], "largest", keepdims=0)
        zero = graph.add("Mul", [nothing, np.zeros((), np.float32)], "zero")
        graph.add("Add", [boxes, zero], "boxes")
        graph.add("Add", [np.array([0.9, 0.6, 0], np.float32), zero], "scores")
        graph.add("Identity", [np.array([2, 0, -1], np.int64)], "labels")
        graph.gives("boxes", 2)
        graph.gives("scores", 1)
        graph.gives("labels", 1, TensorProto.INT64)
    elif TASKS[kind] == "segmentation":
        graph.convolution("logits", 3, 4, 5)
        if kind == "labels":
            graph.add("ArgMax", ["logits"], "labels", axis=1, keepdims=0)
            graph.gives("labels", 3, TensorProto.INT64)
        else:
            graph.gives("logits", 4)
    elif TASKS[kind] == "classification":
        graph.add("ReduceMean", [graph.convolution("maps", 7, 8, 6), np.array([2, 3])], "logits", keepdims=0)
        if kind == "scores":
            graph.add("Softmax", ["logits"], "scores", axis=1)
        graph.gives("scores" if kind == "scores" else "logits", 2)
    else:
        for level, stride in enumerate((4, 8)):
            graph.convolution(f"map{level}", 5, stride, level)
            graph.gives(f"map{level}", 4)
    graph.save(folder / "model.onnx")
    fixed = isinstance(size[0], int)
    metadata = {
        "lf_dense": 1,
        "task": TASKS[kind],
        "attention": "standard",
        "classes": [f"class {number}" for number in range(7 if TASKS[kind] == "classification" else 3)],
        "palette": None,
        "preprocess": {
            "resize": {"scale": [160, 96], "keep_ratio": True, "interpolation": "bilinear"},
            "center_crop": None,
            "to_rgb": True,
            "mean": MEAN,
            "std": STD,
            "pad_divisor": 32,
            "pad_value": 0,
        },
        "input": {"name": "image", "dynamic": not fixed, "fixed_size": list(size) if fixed else None},
        "outputs": [output.name for output in graph.outputs],
        "postprocess": POSTPROCESS.get(kind, {"kind": kind.split()[-1]}),
    }
    if TASKS[kind] == "classification":
        metadata["preprocess"]["resize"] = {"short_edge": 72, "interpolation": "bilinear"}
        metadata["preprocess"]["center_crop"] = [64, 64]
    write_metadata(folder / "model.json", metadata, changes or {})
    return folder / "model.onnx"


def write_metadata(path, metadata, changes):
    metadata = copy.deepcopy(metadata)
    for name, value in changes.items():
        place = metadata
        *within, last = name.split(".")
        for part in within:
            place = place[part]
        if value is KeyError:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(metadata))


def picture(height=100, width=140):
    """Smooth noise, uint8 BGR."""
    import cv2

    rough = np.random.default_rng(height).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return cv2.resize(rough, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def detector(tmp_path):
    return write_model(tmp_path, "dense_anchors")


def in_torch(path, outputs, batch):
    """The convolutions' outputs by torch."""
    torch = pytest.importorskip("torch")
    named = {entry.name: numpy_helper.to_array(entry) for entry in onnx.load(path).graph.initializer}
    kernels = [torch.tensor(named[f"{name}.1"]) for name in outputs]
    return [torch.nn.functional.conv2d(torch.tensor(batch), k, stride=k.shape[-1]) for k in kernels]


def head_of(settings):
    """mmdet's head with the settings of the metadata."""
    pytest.importorskip("mmdet")
    from mmdet.models import RetinaHead
    from mmengine.config import ConfigDict

    test = {key: settings[key] for key in ("nms_pre", "score_thr", "max_per_img", "min_bbox_size")}
    test["nms"] = {"type": "nms", "iou_threshold": settings["iou_threshold"]}
    anchors = {
        "type": "mmdet.AnchorGenerator",
        "scales": [1],
        "ratios": [1, 0.5],
        "strides": [16, 32],
        "base_sizes": [24, 48],
    }
    head = RetinaHead(3, 4, 1, anchor_generator=anchors, test_cfg=ConfigDict(test))
    import torch

    head.prior_generator.base_anchors = [torch.tensor(level, dtype=torch.float32) for level in ANCHORS]
    return head


def test_a_detector_predicts_what_mmdet_makes_of_its_maps(detector):
    runtime = Runtime(detector, threads=1)
    assert runtime.task == "detection"
    assert runtime.classes == ("class 0", "class 1", "class 2")
    result = runtime.predict(picture(), score_thr=0.0)
    assert (result["height"], result["width"]) == (100, 140)
    # 140 x 100 becomes 134 x 96, and that is padded to 160 x 96.
    prepared = runtime._metadata.preparation(picture())
    assert prepared.shape == (96, 134)
    assert prepared.padded == (96, 160)
    maps = in_torch(detector, ["cls0", "cls1", "box0", "box1"], prepared.batch)
    meta = {"img_shape": (96, 134), "scale_factor": (134 / 140, 96 / 100)}
    head = head_of(POSTPROCESS["dense_anchors"])
    (theirs,) = head.predict_by_feat(maps[:2], maps[2:], batch_img_metas=[meta], rescale=True)
    found = result["predictions"]
    assert len(found) > 20
    assert [runtime.classes.index(entry["class"]) for entry in found] == theirs.labels.tolist()
    np.testing.assert_allclose([entry["score"] for entry in found], theirs.scores.numpy(), atol=1e-5)
    np.testing.assert_allclose([entry["bbox"] for entry in found], theirs.bboxes.numpy(), atol=0.0051)
    json.dumps(result)
    best = runtime.predict(picture(), score_thr=found[3]["score"])["predictions"]
    assert best == found[:4]


def test_a_file_and_its_pixels_are_one(detector, tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / "a.png"), picture())
    runtime = Runtime(detector)
    assert runtime.predict(tmp_path / "a.png") == runtime.predict(str(tmp_path / "a.png"))
    assert runtime.predict(tmp_path / "a.png") == runtime.predict(picture())
    assert runtime.draw(tmp_path / "a.png").shape == (100, 140, 3)


def test_own_boxes(tmp_path):
    runtime = Runtime(write_model(tmp_path, "boxes"))
    found = runtime.predict(picture(192, 320))["predictions"]
    assert [entry["class"] for entry in found] == ["class 2", "class 0"]
    assert found[0]["score"] == pytest.approx(0.9)
    # The input is half the image, and boxes end at its border.
    assert [entry["bbox"] for entry in found] == [[8, 16, 40, 60], [0, 0, 320, 192]]


@pytest.mark.parametrize("align_corners", [False, True])
def test_a_segmentation_predicts_what_mmseg_makes_of_its_logits(tmp_path, align_corners):
    torch = pytest.importorskip("torch")
    changes = {"postprocess.align_corners": align_corners}
    path = write_model(tmp_path, "segmentation logits", changes=changes)
    runtime = Runtime(path)
    result = runtime.predict(picture())
    (logits,) = in_torch(path, ["logits"], runtime._metadata.preparation(picture()).batch)
    options = {"mode": "bilinear", "align_corners": align_corners}
    whole = torch.nn.functional.interpolate(logits, (96, 160), **options)
    theirs = torch.nn.functional.interpolate(whole[..., :134], (100, 140), **options)[0].argmax(0).numpy()
    assert (result["labels"] != theirs).mean() < 1e-3
    assert sum(result["classes"].values()) == pytest.approx(1)
    for name, share in result["classes"].items():
        assert share == pytest.approx((result["labels"] == runtime.classes.index(name)).mean())
    assert runtime.draw(picture(), result).shape == (100, 140, 3)


def test_own_labels(tmp_path):
    result = Runtime(write_model(tmp_path, "labels")).predict(picture())
    fine = Runtime(write_model(tmp_path / "fine", "segmentation logits")).predict(picture())
    # Labels of cells of 4 x 4 pixels are those of the finer map but for the borders between classes.
    assert result["labels"].shape == (100, 140)
    assert (result["labels"] == fine["labels"]).mean() > 0.8


@pytest.mark.parametrize("kind", ["scores", "classification logits"])
def test_a_classifier_gives_the_five_best(tmp_path, kind):
    torch = pytest.importorskip("torch")
    path = write_model(tmp_path, kind)
    runtime = Runtime(path)
    found = runtime.predict(picture())["predictions"]
    batch = runtime._metadata.preparation(picture()).batch
    assert batch.shape == (1, 3, 64, 64)
    scores = in_torch(path, ["maps"], batch)[0].mean((2, 3)).softmax(1)[0]
    values, indices = torch.topk(scores, 5)
    assert [entry["class"] for entry in found] == [f"class {index}" for index in indices.tolist()]
    np.testing.assert_allclose([entry["score"] for entry in found], values.numpy(), rtol=1e-4)


def test_a_backbone_gives_its_maps(tmp_path):
    runtime = Runtime(write_model(tmp_path, "maps", changes={"classes": []}))
    maps = runtime.predict(picture())["maps"]
    assert [level.shape for level in maps] == [(1, 5, 24, 40), (1, 5, 12, 20)]
    assert np.array_equal(runtime.draw(picture()), picture())


def test_a_fixed_size(tmp_path):
    runtime = Runtime(write_model(tmp_path, "dense_anchors", (96, 160)))
    free = Runtime(write_model(tmp_path / "free", "dense_anchors"))
    assert runtime.predict(picture()) == free.predict(picture())
    # An upright image is shrunk until it fits.
    assert runtime.predict(picture(300, 200))["height"] == 300
    with pytest.raises(UsageError, match="does not run on a batch of 1 x 3 x 64 x 64"):
        runtime.run(np.zeros((1, 3, 64, 64), np.float32))


def test_running_the_network_alone(detector):
    runtime = Runtime(detector)
    outputs = runtime.run(np.ones((1, 3, 64, 96), np.float32))
    assert [output.shape for output in outputs] == [(1, 6, 4, 6), (1, 6, 2, 3), (1, 8, 4, 6), (1, 8, 2, 3)]
    for batch in (np.ones((3, 64, 96), np.float32), np.ones((1, 3, 64, 96)), [1]):
        with pytest.raises(UsageError, match=r"give a numpy array of float32, \(B, 3, H, W\)"):
            runtime.run(batch)
    with pytest.raises(UsageError, match="does not run on a batch of 1 x 4 x 64 x 96"):
        runtime.run(np.ones((1, 4, 64, 96), np.float32))
    with pytest.raises(UsageError, match="gives values in 'cls0' that are no numbers"):
        runtime.run(np.full((1, 3, 64, 96), np.nan, np.float32))


@pytest.fixture
def openvino():
    return pytest.importorskip("openvino")


def to_openvino(openvino, path):
    openvino.save_model(openvino.convert_model(path), path.with_suffix(".xml"), compress_to_fp16=False)
    return path.with_suffix(".xml")


@pytest.mark.parametrize("kind", TASKS)
def test_openvino_predicts_the_same(tmp_path, openvino, kind):
    path = write_model(tmp_path, kind)
    one = Runtime(path).predict(picture())
    runtime = Runtime(to_openvino(openvino, path), threads=1)
    other = runtime.predict(picture())
    assert set(one) == set(other)
    if "labels" in one:
        assert (one["labels"] != other["labels"]).mean() < 1e-3
    for mine, its in zip(one.get("maps", []), other.get("maps", [])):
        np.testing.assert_allclose(mine, its, atol=1e-5)
    for mine, its in zip(one.get("predictions", []), other.get("predictions", [])):
        assert mine["class"] == its["class"]
        assert mine["score"] == pytest.approx(its["score"], abs=1e-5)
        assert mine.get("bbox") == pytest.approx(its.get("bbox"), abs=0.02)


def test_openvino_runs_in_float32_unless_told_otherwise(detector, openvino):
    path = to_openvino(openvino, detector)

    def precision(**options):
        compiled = Runtime(path, **options)._engine._compiled
        return compiled.get_property("INFERENCE_PRECISION_HINT").to_string()

    assert precision() == "f32"
    # A processor without bfloat16 computes in float32 all the same.
    able = "BF16" in _openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert precision(precision="bf16") == ("bf16" if able else "f32")


def test_a_shape_that_comes_again_gets_a_graph_of_its_own(detector, openvino):
    runtime = Runtime(to_openvino(openvino, detector))
    engine = runtime._engine
    random = np.random.default_rng(0)
    small, large = (
        random.standard_normal(shape).astype(np.float32) for shape in ((1, 3, 64, 96), (1, 3, 96, 64))
    )

    def run(batch):
        """The outputs, and the shape that the graph is for."""
        outputs = [output.copy() for output in runtime.run(batch)]
        taken = engine.request.get_compiled_model().inputs[0].partial_shape
        return outputs, tuple(taken.to_shape()) if taken.is_static else None

    expected = {batch.shape: run(batch)[0] for batch in (small, large)}
    turns = [small] * 2 + [large] + [small] * 5 + [large] * 4 + [small]
    shapes = []
    for batch in turns:
        outputs, shape = run(batch)
        shapes.append(shape)
        for mine, right in zip(outputs, expected[batch.shape]):
            np.testing.assert_allclose(mine, right, atol=1e-5)
    assert shapes == [None] * 6 + [small.shape] * 2 + [None] * 3 + [large.shape, None]


def test_openvino_s_files(detector, openvino, tmp_path):
    path = to_openvino(openvino, detector)
    with pytest.raises(UsageError, match="this openvino has no device 'npu9': use one of CPU"):
        Runtime(path, device="npu9")
    with pytest.raises(UsageError, match="OpenVINO has no providers"):
        Runtime(path, providers=["CPUExecutionProvider"])
    path.with_suffix(".bin").rename(tmp_path / "elsewhere.bin")
    with pytest.raises(UsageError, match=r"model.bin is not there, which holds the model's weights"):
        Runtime(path)
    (tmp_path / "elsewhere.bin").rename(path.with_suffix(".bin"))
    path.write_text("<net>")
    with pytest.raises(UsageError, match=r"openvino .* cannot load .*model.xml"):
        Runtime(path)


def test_an_installed_openvino_that_is_too_old(detector, openvino, monkeypatch):
    path = to_openvino(openvino, detector)
    monkeypatch.setattr(openvino, "__version__", "2023.1.0-12185-9e6b00e51cd-releases/2023/1")
    with pytest.raises(UsageError, match=r"openvino is 2023.1.0.*, and exported models need 2025.0 or newer"):
        Runtime(path)


def test_an_installed_onnxruntime_that_is_too_old(detector, monkeypatch):
    monkeypatch.setattr(ort, "__version__", "1.9.0")
    with pytest.raises(UsageError, match=r"need 1.19 or newer: pip install -U 'lf_dense\[runtime\]'"):
        Runtime(detector)


@pytest.mark.parametrize(
    ("suffix", "package", "extra"),
    [(".onnx", "onnxruntime", "runtime"), (".xml", "openvino", "runtime-openvino")],
)
def test_a_runtime_that_is_not_installed(detector, monkeypatch, suffix, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    for name in (".xml", ".bin"):
        detector.with_suffix(name).touch()
    message = rf"{package} is not installed, which runs model{suffix}: pip install 'lf_dense\[{extra}\]'"
    with pytest.raises(UsageError, match=message):
        Runtime(detector.with_suffix(suffix))


def test_models_that_are_none(detector, tmp_path):
    with pytest.raises(UsageError, match=r"weights.pth is no exported model: .* ends with .onnx or .xml"):
        Runtime(tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=r"gone.onnx is not there"):
        Runtime(tmp_path / "gone.onnx")
    whole = detector.read_bytes()
    for content in (b"", b"no model", whole[: len(whole) // 2]):
        detector.write_bytes(content)
        with pytest.raises(UsageError, match=r"onnxruntime .* cannot load .*model.onnx") as caught:
            Runtime(detector)
        assert "\n" not in str(caught.value)


def test_options_that_cannot_be(detector):
    for threads in (0, -1, 1.5, True):
        with pytest.raises(UsageError, match="give a whole number from 1"):
            Runtime(detector, threads=threads)
    with pytest.raises(UsageError, match="use f32, bf16 or f16"):
        Runtime(detector, precision="f8")
    with pytest.raises(UsageError, match="leave precision out"):
        Runtime(detector, precision="bf16")
    with pytest.raises(UsageError, match="this onnxruntime has no 'NoProvider': use device='cpu'"):
        Runtime(detector, providers=["NoProvider"])
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(UsageError, match="has no 'CUDAExecutionProvider'"):
            Runtime(detector, device="cuda")
    assert Runtime(detector, providers=[("CPUExecutionProvider", {})]).predict(picture())


def test_images_that_are_none(detector, tmp_path):
    runtime = Runtime(detector)
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(UsageError, match=r"text.jpg could not be read as an image"):
        runtime.predict(tmp_path / "text.jpg")
    with pytest.raises(UsageError, match=r"gone.jpg cannot be read"):
        runtime.predict(tmp_path / "gone.jpg")
    for pixels in (picture()[..., 0], picture().astype(np.float32), picture()[:0], picture()[..., :2]):
        with pytest.raises(UsageError, match=r"give uint8 pixels, \(H, W, 3\)"):
            runtime.predict(pixels)


def test_metadata_that_are_not_there_or_no_json(detector):
    path = detector.with_suffix(".json")
    for content in ("", "{", "\x80", "[" * 100000):
        path.write_text(content)
        with pytest.raises(UsageError, match=r"model.json cannot be read as JSON"):
            Runtime(detector)
    path.write_text("[]")
    with pytest.raises(UsageError, match="the whole is no object of names and values"):
        Runtime(detector)
    path.unlink()
    with pytest.raises(UsageError, match=r"model.json is not there, which says how images become"):
        Runtime(detector)


def test_metadata_of_another_version(tmp_path):
    path = write_model(tmp_path, "boxes", changes={"lf_dense": 2, "task": "telepathy"})
    with pytest.raises(UsageError, match="is of version 2, and this lf_dense reads version 1: install"):
        Runtime(path)


WRONG = {
    "lf_dense": [KeyError, "1", True],
    "task": [KeyError, 3, "telepathy"],
    "attention": [KeyError, "none", None],
    "classes": [KeyError, "abc", [1, 2, 3], []],
    "palette": ["red", [[1, 2, 3]], [[0, 0, 256]] * 3, [[0.5, 0, 0]] * 3],
    "preprocess": [KeyError, []],
    "preprocess.resize": [{}, 3, {"scale": [1, 2]}],
    "preprocess.resize.scale": [[0, 5], [5], "5", [1.5, 2], [1, 10**9]],
    "preprocess.resize.keep_ratio": [KeyError, 1],
    "preprocess.resize.interpolation": [KeyError, "cubist"],
    "preprocess.resize.backend": ["turbo"],
    "preprocess.center_crop": [[64, 64], 64],
    "preprocess.to_rgb": [KeyError, "yes"],
    "preprocess.mean": [KeyError, [1, 2], [1, 2, "3"], [1, 2, float("nan")], [1, 2, 10**400]],
    "preprocess.std": [KeyError, [1, 0, 1]],
    "preprocess.pad_divisor": [KeyError, 0, 1.5],
    "preprocess.pad_value": [KeyError, None, float("inf")],
    "input": [KeyError, "image"],
    "input.name": [KeyError, "", 5],
    "input.dynamic": [KeyError, False, "no"],
    "input.fixed_size": [KeyError, [64, 64], [0, 1]],
    "outputs": [KeyError, [], ["cls0"], [1, 2, 3, 4]],
    "postprocess": [KeyError, "boxes"],
    "postprocess.kind": [KeyError, "logits"],
    "postprocess.num_classes": [KeyError, 4, 0],
    "postprocess.activation": ["relu"],
    "postprocess.base_anchors": [KeyError, [], [[]], [[[1, 2, 3]]], [[1, 2, 3, 4]]],
    "postprocess.strides": [KeyError, [[1, 2]], [16, 32]],
    "postprocess.means": [KeyError, [0, 0, 0]],
    "postprocess.wh_ratio_clip": [0, 2],
    "postprocess.add_ctr_clamp": [KeyError, 0],
    "postprocess.nms_pre": [0, -1],
    "postprocess.score_thr": [-0.1, 1, "low"],
    "postprocess.iou_threshold": [KeyError, 2],
    "postprocess.class_agnostic": [KeyError, None],
    "postprocess.max_per_img": [0, 1e3],
    "postprocess.min_bbox_size": [KeyError, "small"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values], ids=str
)
def test_a_field_that_is_missing_or_wrong(tmp_path, name, value):
    write_model(tmp_path, "dense_anchors", changes={name: value})
    with pytest.raises(UsageError) as caught:
        read_metadata(tmp_path / "model.json")
    message = str(caught.value)
    assert "model.json does not describe a model, since " in message
    assert message.endswith(": export the model again with tools/export.py.")
    assert name.rpartition(".")[2] in message
    assert len(message) < 400
    assert "\n" not in message


def test_what_is_optional(tmp_path):
    changes = {
        "palette": [[255, 0, 0], [0, 255, 0], [0, 0, 255]],
        "preprocess.resize": None,
        "note": "other fields are left alone",
        "postprocess.add_ctr_clamp": True,
    }
    write_model(tmp_path, "dense_anchors", changes=changes)
    metadata = read_metadata(tmp_path / "model.json")
    assert metadata.palette == ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    assert metadata.preparation.resize is None
    assert metadata.anchors.ctr_clamp == 32
    write_model(tmp_path, "boxes", changes={"palette": KeyError})
    with pytest.raises(UsageError, match="'palette' is missing"):
        read_metadata(tmp_path / "model.json")


def test_models_that_do_not_fit_their_metadata(tmp_path):
    path = write_model(tmp_path / "a", "dense_anchors", changes={"input.name": "picture"})
    with pytest.raises(
        UsageError, match="takes 'image', and its metadata name 'picture': keep the two files"
    ):
        Runtime(path)
    path = write_model(tmp_path / "b", "dense_anchors", changes={"outputs": ["cls0", "cls1", "box0", "box9"]})
    with pytest.raises(UsageError, match="has no output 'box9', which its metadata name"):
        Runtime(path)
    fixed = {"input.dynamic": False, "input.fixed_size": [96, 96]}
    path = write_model(tmp_path / "c", "dense_anchors", (96, 160), changes=fixed)
    with pytest.raises(
        UsageError, match="an input of 1 x 3 x 96 x 160, and its metadata say images of 96 x 96"
    ):
        Runtime(path)
    free = {"input.dynamic": True, "input.fixed_size": None}
    path = write_model(tmp_path / "d", "dense_anchors", (96, 160), changes=free)
    with pytest.raises(UsageError, match="96 x 160, and its metadata say images of any x any"):
        Runtime(path)


def test_outputs_that_do_not_fit_their_metadata(tmp_path):
    # The order of the outputs is another: found at loading where the model says its shapes, else at running.
    swapped = {"outputs": ["box0", "box1", "cls0", "cls1"]}
    path = write_model(tmp_path / "a", "dense_anchors", changes=swapped)
    with pytest.raises(UsageError, match=r"gives 'box0' in the shape \(1, 8, .* ask for \(\?, 6, \?, \?\)"):
        Runtime(path).predict(picture())
    path = write_model(tmp_path / "b", "scores", changes={"classes": ["a", "b"]})
    with pytest.raises(UsageError, match=r"gives 'scores' in the shape \(1, 7\), .* ask for \(\?, 2\)"):
        Runtime(path).predict(picture())
    path = write_model(tmp_path / "c", "labels", changes={"classes": ["a"]})
    with pytest.raises(UsageError, match="labels from 0 to 2, and its metadata name 1 classes"):
        Runtime(path).predict(picture())


def test_one_logit_tells_two_classes_apart(tmp_path):
    graph = Graph(("height", "width"))
    graph.convolution("logits", 1, 4, 3)
    graph.gives("logits", 4)
    write_model(tmp_path, "segmentation logits", changes={"classes": ["ground", "crack"]})
    graph.save(tmp_path / "model.onnx")
    result = Runtime(tmp_path / "model.onnx").predict(picture())
    assert set(result["classes"]) == {"ground", "crack"}


def test_own_operators_come_from_their_library(tmp_path, monkeypatch):
    path = write_model(tmp_path, "scores", changes={"attention": "operator"})
    asked = []
    library = types.ModuleType("lf_dense.export.libraries")
    library.register_onnxruntime = asked.append
    library.register_openvino = asked.append
    monkeypatch.setitem(sys.modules, "lf_dense.export.libraries", library)
    assert Runtime(path).predict(picture())
    (options,) = asked
    assert isinstance(options, ort.SessionOptions)

    def nowhere(options):
        raise UsageError("the operators' library is not there.")

    library.register_onnxruntime = nowhere
    with pytest.raises(UsageError, match="library is not there"):
        Runtime(path)


WITHOUT_TORCH = """
import sys
FOREIGN = ("torch", "mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain")
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FOREIGN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nothing())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in FOREIGN else real(name, *rest)
import lf_dense
"""


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_torch_there_is_the_runtime_alone(detector):
    code = """
print(lf_dense.export.Runtime(sys.argv[1]).classes)
for name in ("laplacian_attention", "LaplacianFormer", "build_info"):
    try:
        getattr(lf_dense, name)
    except ImportError as error:
        print(error)
try:
    lf_dense.nothing
except AttributeError as error:
    print(error)
print(sorted(set(FOREIGN) & set(sys.modules)))
"""
    done = run_python(WITHOUT_TORCH + code, str(detector))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "('class 0', 'class 1', 'class 2')",
        "lf_dense.laplacian_attention needs torch: pip install torch.",
        "lf_dense.LaplacianFormer needs torch: pip install torch.",
        "lf_dense.build_info needs torch: pip install torch.",
        "module 'lf_dense' has no attribute 'nothing'",
        "[]",
    ]


@pytest.mark.parametrize("package", ["numpy", "cv2"])
def test_without_numpy_or_opencv_the_runtime_says_what_it_needs(package):
    code = f"sys.modules[{package!r}] = None\nlf_dense.export.Runtime"
    done = run_python(WITHOUT_TORCH + code)
    message = f"ImportError: lf_dense.export.Runtime needs {package}: pip install 'lf_dense[runtime]'."
    assert done.stderr.splitlines()[-1] == message
