"""Export from the command line to predictions without PyTorch, and what is not written."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("mmdet")
pytest.importorskip("onnxscript")
pytest.importorskip("openvino")

from lf_dense.errors import UsageError
from lf_dense.export import exporting
from lf_dense.export.libraries import operator_library
from lf_dense.export.runtime import BATCHES_OF_A_SHAPE, Runtime
from lf_dense.frameworks import load_config
from support import ROOT
from support.driving import call, environment, refused

CONFIG = ROOT / "configs" / "retinanet_lf_demo.py"


@pytest.fixture(scope="module", params=["onnx", "xml"])
def exported(request, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / f"model.{request.param}"
    format_ = {"onnx": "onnx", "xml": "openvino"}[request.param]
    said = call("export.py", CONFIG, checkpoint, "--format", format_, "--out", out)
    return out, said


def test_the_errors_are_printed(exported):
    out, said = exported
    lines = [line for line in said.splitlines() if "relative error" in line]
    assert [line.split("relative")[0].strip() for line in lines] == [
        "1 x 224 x 224",
        "2 x 321 x 259",
        "1 x 64 x 96",
        "1 x 512 x 512",
        "1 x 800 x 1333",
        *(["2 x 321 x 259, repeated"] if out.suffix == ".xml" else []),
    ]
    assert all(float(line.split()[-1]) <= exporting.TOLERANCE for line in lines)
    beside = (
        {"model.onnx", "model.json"} if out.suffix == ".onnx" else {"model.xml", "model.bin", "model.json"}
    )
    assert {path.name for path in out.parent.iterdir()} == beside


def test_predictions_are_those_of_pytorch(exported, checkpoint, shapes, tmp_path):
    """The same boxes on real sizes, which no size of the export's own checks is."""
    out, _ = exported
    images = shapes / "val"
    threshold = ["--score-thr", 0.02]
    call("predict.py", CONFIG, checkpoint, images, "--out", tmp_path / "torch", *threshold)
    arguments = [out, images, "--out", tmp_path / "exported", *threshold]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lf_dense.export.run", *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wanted, found = (
        json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("torch", "exported")
    )
    assert found["classes"] == wanted["classes"]
    assert found["images"].keys() == wanted["images"].keys()
    for name, image in wanted["images"].items():
        assert len(image["predictions"]) > 5
        for box, expected in zip(found["images"][name]["predictions"], image["predictions"], strict=True):
            assert box["class"] == expected["class"]
            assert box["score"] == pytest.approx(expected["score"], abs=1e-4)
            assert box["bbox"] == pytest.approx(expected["bbox"], abs=0.05)


@pytest.mark.parametrize("format_", ["onnx", "openvino"])
def test_the_operators_form(format_, checkpoint, tmp_path):
    runtime = {"onnx": "onnxruntime", "openvino": "openvino"}[format_]
    try:
        operator_library(runtime)
    except UsageError as error:
        pytest.skip(str(error))
    out = tmp_path / f"model{exporting.FORMATS[format_]}"
    checks = exporting.export_model(
        load_config(str(CONFIG)),
        str(checkpoint),
        out,
        format_,
        "operator",
        "backbone",
        tell=lambda line: None,
    )
    assert [row.what for row in checks][:2] == ["1 x 224 x 224", "2 x 321 x 259"]
    assert max(row.error for row in checks) <= 1e-5
    assert json.loads(out.with_suffix(".json").read_text())["attention"] == "operator"
    # Nodes have their names in both kinds of file.
    assert all(name in out.read_bytes() for name in (b"ProjectHeads", b"MergeHeads", b"ConvFFN"))
    exported, batch = Runtime(out), np.zeros((1, 3, 65, 99), np.float32)
    for _ in range(BATCHES_OF_A_SHAPE + 2):
        assert len(exported.run(batch)) == 4
    if format_ == "openvino":
        # A graph of the batch's shape would gain nothing.
        assert exported._engine.request.get_compiled_model().inputs[0].partial_shape.is_dynamic


@pytest.mark.parametrize("format_", ["torch_export", "aoti"])
def test_torchs_own_formats(format_, checkpoint, tmp_path):
    out = tmp_path / "model.pt2"
    config = load_config(str(CONFIG))
    checks = exporting.export_model(
        config, str(checkpoint), out, format_, "standard", "backbone", size=(64, 96), tell=lambda line: None
    )
    assert [row.what for row in checks] == ["1 x 64 x 96"]
    assert out.is_file()


def test_boxes_at_the_end_of_the_graph(checkpoint, tmp_path):
    out = tmp_path / "model.onnx"
    config = load_config(str(CONFIG))
    exporting.export_model(
        config, str(checkpoint), out, output="boxes", size=(96, 128), tell=lambda line: None
    )
    boxes, scores, labels = Runtime(out).run(np.zeros((1, 3, 96, 128), np.float32))
    assert boxes.shape[1] == 4
    assert len(boxes) == len(scores) == len(labels)


def test_a_wrong_export_is_not_written(checkpoint, tmp_path, monkeypatch):
    """A weight that is lost on the way is found by running the file."""
    write = exporting._write_onnx

    def spoil(model, target):
        weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        weight.raw_data = bytes(len(weight.raw_data))
        write(model, target)

    monkeypatch.setattr(exporting, "_write_onnx", spoil)
    with pytest.raises(UsageError, match=r"is off by .*, so nothing is written"):
        exporting.export_model(
            load_config(str(CONFIG)),
            str(checkpoint),
            tmp_path / "new" / "model.onnx",
            part="backbone",
            size=(64, 64),
            tell=lambda line: None,
        )
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "model.xml"], "model.xml does not end in .onnx"),
        (["--out", "model.onnx", "--output", "masks"], "'masks' does not exist for detection"),
        (["--out", "model.onnx", "--image", "nowhere.jpg"], "nowhere.jpg"),
    ],
)
def test_refusals(arguments, said, checkpoint, tmp_path, monkeypatch, capsys):
    arguments = [str(tmp_path / part) if part.startswith("model.") else part for part in arguments]
    sizes = ["--size", "64", "64", "--part", "backbone"] if "--image" in arguments else []
    assert said in refused(monkeypatch, capsys, "export.py", CONFIG, checkpoint, *arguments, *sizes)
    assert list(tmp_path.iterdir()) == []
