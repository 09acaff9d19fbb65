"""int8: what is quantised and what is not, by the images' own ranges, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("mmdet")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
from onnx import numpy_helper

from lf_dense.errors import UsageError
from lf_dense.export import exporting, quantizing
from lf_dense.export.graphs import DOMAIN, onnx_graph
from lf_dense.export.libraries import operator_library
from lf_dense.export.parts import choose_part
from lf_dense.export.preparing import Preparation, read_image, write_png
from lf_dense.export.runtime import Runtime
from lf_dense.export.tracing import traceable
from lf_dense.frameworks import load_config
from support import ROOT
from support.driving import call, refused

CONFIG = ROOT / "configs" / "retinanet_lf_demo.py"
PREPARATION = Preparation(
    resize=None,
    center_crop=None,
    to_rgb=True,
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    pad_divisor=32,
    pad_value=0.0,
    fixed_size=None,
)


@pytest.fixture(scope="module")
def graphs(made_up_detector, shapes):
    """The backbone's graph in float and in int8, and the images that it was calibrated with."""
    part = choose_part(made_up_detector, "mmdet", "backbone")
    images = quantizing.calibration_images(shapes / "train", 3)
    graph = onnx_graph(traceable(part.module), "standard", 3, (96, 96), part.outputs)
    return graph, quantizing.quantize(graph, "standard", images, PREPARATION), images


DEQUANTIZE = "DequantizeLinear"


def _values(graph):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


def _inside(graph):
    """The kinds of nodes of every inner graph."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from (inner.op_type for inner in attribute.g.node)
                yield from _inside(attribute.g)


def test_every_layer_with_weights_is_quantised_and_no_other_node(graphs):
    graph, quantised, _ = graphs
    weights = _values(graph)
    originals = {node.name: node for node in graph.graph.node}
    makers = {name: node for node in quantised.graph.node for name in node.output}
    layers = 0
    for node in quantised.graph.node:
        if node.name not in originals:
            assert node.op_type in ("QuantizeLinear", "DequantizeLinear")
            continue
        pairs = [
            makers[name] for name in node.input if getattr(makers.get(name), "op_type", "") == DEQUANTIZE
        ]
        if node.op_type in quantizing.LAYERS and originals[node.name].input[1] in weights:
            assert [pair.output[0] for pair in pairs[:2]] == list(node.input[:2]), node.name
            layers += 1
        else:
            # What a convolution has computed in 8 bits, and nothing else.
            assert all(makers[makers[pair.input[0]].input[0]].op_type == "Conv" for pair in pairs), node.name
    # Each block has q, k, v or one of them, an output, two layers and convolutions.
    assert layers >= 40
    assert "Exp" in set(_inside(quantised.graph)), "the kernel is in the scans"
    assert list(_inside(quantised.graph)) == list(_inside(graph.graph))


def test_weights_are_within_half_a_step(graphs):
    graph, quantised, _ = graphs
    plain, packed = _values(graph), _values(quantised)
    compared = 0
    for name, weight in plain.items():
        if f"{name}_quantized" not in packed or packed[f"{name}_quantized"].dtype != np.int8:
            continue
        scale = packed[f"{name}_scale"]
        axis = next(
            i for i, side in enumerate(weight.shape) if side == scale.size and (weight.ndim == 4 or i)
        )
        steps = scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        assert (np.abs(packed[f"{name}_quantized"] * steps - weight) <= steps * 0.5001 + 1e-7).all(), name
        compared += 1
    assert compared >= 40


def test_the_inputs_range_is_that_of_the_images(graphs):
    _, quantised, images = graphs
    pixels = [PREPARATION(read_image(path)).batch for path in images]
    low, high = min(batch.min() for batch in pixels), max(batch.max() for batch in pixels)
    packed = _values(quantised)
    scale, zero = float(packed["image_scale"]), int(packed["image_zero_point"])
    assert scale == pytest.approx((max(high, 0) - min(low, 0)) / 255, rel=1e-5)
    assert zero == pytest.approx(-low / scale, abs=0.6)


def test_images_are_taken_evenly(tmp_path):
    for index in range(10):
        write_png(tmp_path / f"{index}.png", np.zeros((4, 4, 3), np.uint8))
    assert [path.stem for path in quantizing.calibration_images(tmp_path, 4)] == ["0", "3", "6", "9"]
    assert len(quantizing.calibration_images(tmp_path, 64)) == 10


@pytest.mark.parametrize("format_", ["onnx", "openvino"])
def test_an_int8_detector_from_the_command_line(format_, checkpoint, shapes, tmp_path):
    if format_ == "openvino":
        pytest.importorskip("openvino")
    out = tmp_path / f"model{exporting.FORMATS[format_]}"
    arguments = [CONFIG, checkpoint, "--format", format_, "--out", out, "--size", 96, 128]
    said = call("export.py", *arguments, "--int8", shapes / "train")
    lines = [line for line in said.splitlines() if "int8, relative RMS error" in line]
    # 8 bits leave a trace, and no more than a trace.
    errors = [float(line.split()[-1]) for line in lines]
    assert len(errors) == exporting.INT8_CHECKED
    assert all(1e-4 < error < exporting.INT8_TOLERANCE for error in errors)
    assert json.loads(out.with_suffix(".json").read_text())["precision"] == "int8"
    # An OpenVINO model's weights are in a file of their own.
    weights = out.with_suffix(".bin") if format_ == "openvino" else out
    # A graph for one size has cosines and sines of half a head's channels for each token as constants.
    tables = 2 * 4 * 32 * sum((96 // stride) * (128 // stride) for stride in (4, 8, 16, 32))
    assert weights.stat().st_size < 0.45 * checkpoint.stat().st_size + tables
    assert len(Runtime(out).run(np.zeros((1, 3, 96, 128), np.float32))) == 8


def test_the_operators_form(checkpoint, shapes, tmp_path):
    try:
        operator_library("onnxruntime")
    except UsageError as error:
        pytest.skip(str(error))
    out = tmp_path / "model.onnx"
    checks = exporting.export_model(
        load_config(str(CONFIG)),
        str(checkpoint),
        out,
        form="operator",
        part="backbone",
        size=(96, 128),
        int8=shapes / "train",
        tell=lambda line: None,
    )
    assert max(row.error for row in checks) < exporting.INT8_TOLERANCE
    ours = {node.op_type for node in onnx.load(out).graph.node if node.domain == DOMAIN}
    assert ours == {"LaplacianAttention"}


def test_a_spoilt_model_is_not_written(checkpoint, shapes, tmp_path, monkeypatch):
    """Activations that are cut to a thousandth of their range are found by running the file."""
    whole = exporting.quantize

    def spoil(graph, *arguments):
        quantised = whole(graph, *arguments)
        for tensor in quantised.graph.initializer:
            if tensor.name == "image_scale":
                tensor.CopyFrom(numpy_helper.from_array(np.float32(1e-5), tensor.name))
        return quantised

    monkeypatch.setattr(exporting, "quantize", spoil)
    with pytest.raises(UsageError, match=r"is off by .*int8.* allowed, so nothing is written: give images"):
        exporting.export_model(
            load_config(str(CONFIG)),
            str(checkpoint),
            tmp_path / "new" / "model.onnx",
            part="backbone",
            size=(96, 128),
            int8=shapes / "train",
            tell=lambda line: None,
        )
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--out", "model.pt2", "--format", "aoti"],
            "int8 is not there for aoti: use one of onnx, openvino.",
        ),
        (
            ["--out", "model.onnx", "--output", "boxes"],
            "int8 is not for a detector whose graph ends in boxes",
        ),
    ],
)
def test_refusals(arguments, said, checkpoint, shapes, tmp_path, monkeypatch, capsys):
    arguments = [str(tmp_path / part) if part.startswith("model.") else part for part in arguments]
    options = ["--int8", shapes / "train"]
    assert said in refused(monkeypatch, capsys, "export.py", CONFIG, checkpoint, *arguments, *options)


def test_an_image_that_is_none_is_named(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no picture")
    options = ["--size", "64", "64", "--part", "backbone", "--int8", tmp_path / "images"]
    out = tmp_path / "out" / "model.onnx"
    said = refused(monkeypatch, capsys, "export.py", CONFIG, checkpoint, "--out", out, *options)
    assert "broken.jpg is no image that can be read" in said
    assert not out.parent.exists()
