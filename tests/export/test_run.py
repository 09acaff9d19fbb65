"""The command line of exported models: what it writes is what tools/predict.py writes, without torch."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import venv

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from test_runtime import picture, run_python, write_model

from lf_dense.errors import UsageError, run_tool
from lf_dense.export import Runtime
from lf_dense.export.run import find_images, main, predict_images
from support import ROOT


def write_images(folder):
    (folder / "deep").mkdir(parents=True)
    for name, size in {"b.png": (60, 80), "a.jpg": (100, 140), "deep/ä.bmp": (33, 57)}.items():
        (folder / name).write_bytes(cv2.imencode(folder.joinpath(name).suffix, picture(*size))[1].tobytes())
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


def run(*arguments, code=0):
    """Run the command line here; returns what it printed, or with another code its errors."""
    said, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(errors),
    ):
        patch.setattr(sys, "argv", ["run", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_tool(main)
    assert (ended.value.code or 0) == code, said.getvalue() + errors.getvalue()
    return said.getvalue() if code == 0 else errors.getvalue()


def test_a_detector_on_a_folder(tmp_path, images):
    model = write_model(tmp_path / "model", "dense_anchors")
    out = tmp_path / "out"
    said = run(model, images, "--out", out, "--score-thr", "0.52", "--threads", 1)
    assert said == f"wrote {out / 'predictions.json'} and the pictures beside it\n"
    written = json.loads((out / "predictions.json").read_text())
    assert list(written) == ["classes", "images"]
    assert written["classes"] == ["class 0", "class 1", "class 2"]
    assert list(written["images"]) == ["a.jpg", "b.png", "deep/ä.bmp"]
    record = written["images"]["b.png"]
    assert list(record) == ["height", "width", "predictions"]
    assert (record["height"], record["width"]) == (60, 80)
    assert record["predictions"]
    for entry in record["predictions"]:
        assert list(entry) == ["class", "score", "bbox"]
        assert entry["score"] >= 0.52
        assert entry["bbox"] == [round(side, 2) for side in entry["bbox"]]
    assert record == Runtime(model).predict(images / "b.png", 0.52)
    assert cv2.imread(str(out / "pictures" / "a.jpg.png")).shape == (100, 140, 3)
    assert (out / "pictures" / "deep" / "ä.bmp.png").is_file()
    assert not (out / "labels").exists()


def test_a_segmentation_writes_label_maps(tmp_path, images):
    runtime = Runtime(write_model(tmp_path / "model", "segmentation logits"))
    predict_images(runtime, images, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    labels = cv2.imread(str(tmp_path / "out" / "labels" / "b.png"), cv2.IMREAD_UNCHANGED)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, runtime.predict(images / "b.png")["labels"])
    record = written["images"]["b.png"]
    assert list(record) == ["height", "width", "classes"]
    assert record["classes"] == {
        f"class {number}": (labels == number).mean() for number in np.unique(labels).tolist()
    }


def test_a_classifier_on_one_image(tmp_path, images):
    runtime = Runtime(write_model(tmp_path / "model", "scores"))
    written = json.loads(predict_images(runtime, images / "b.png", tmp_path / "out").read_text())
    assert list(written["images"]) == ["b.png"]
    assert len(written["images"]["b.png"]["predictions"]) == 5
    assert (tmp_path / "out" / "pictures" / "b.png").is_file()


def test_a_backbone_predicts_nothing(tmp_path, images):
    runtime = Runtime(write_model(tmp_path, "maps"))
    with pytest.raises(UsageError, match="is a backbone, which predicts nothing: export a whole model"):
        predict_images(runtime, images, tmp_path / "out")


def test_results_below_the_source_are_no_input(tmp_path, images):
    runtime = Runtime(write_model(tmp_path / "model", "scores"))
    for _ in range(2):
        written = json.loads(predict_images(runtime, images, images / "out").read_text())
        assert len(written["images"]) == 3


def test_unreadable_images_are_named_at_the_end(tmp_path, images):
    (images / "broken.jpg").write_bytes(b"no picture")
    (images / "empty.png").touch()
    model = write_model(tmp_path / "model", "scores")
    said = run(model, images, "--out", tmp_path / "out", code=2)
    assert said.startswith("error: 2 of 5 files could not be read as images: ")
    assert "broken.jpg" in said
    assert len(said.splitlines()) == 1
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == 3


def test_what_cannot_work_is_said_in_one_sentence(tmp_path, images):
    model = write_model(tmp_path / "model", "scores")
    assert run(model, tmp_path / "gone", "--out", tmp_path, code=2).startswith(
        f"error: {tmp_path / 'gone'} is"
    )
    assert "is not there" in run(tmp_path / "no.onnx", images, "--out", tmp_path, code=2)
    model.with_suffix(".json").unlink()
    said = run(model, images, "--out", tmp_path, code=2)
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    command = [sys.executable, "-W", "ignore", "-m", "lf_dense.export.run", "--help"]
    helped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert helped.startswith("usage: python -m lf_dense.export.run [-h]")


def test_opencv_is_asked_for_in_one_sentence(tmp_path, images):
    model = write_model(tmp_path / "model", "scores")
    code = (
        "import sys, runpy\nsys.modules['cv2'] = None\n"
        f"sys.argv[1:] = [{str(model)!r}, {str(images)!r}, '--out', {str(tmp_path)!r}]\n"
        "runpy.run_module('lf_dense.export.run', run_name='__main__')"
    )
    # Without torch, since the frameworks would ask for OpenCV themselves.
    done = run_python("import sys\nsys.modules['mmengine'] = sys.modules['torch'] = None\n" + code)
    assert done.returncode == 2, done.stderr
    needs = "lf_dense.export.Runtime needs cv2: pip install 'lf_dense[runtime]'."
    assert done.stderr == f"error: {needs}\n"


def test_images_are_found_as_by_the_tool(images):
    prediction = pytest.importorskip("lf_dense.training.prediction")
    assert find_images(images) == prediction.find_images(images)
    assert find_images(images / "notes.txt") == [images / "notes.txt"]
    (images.parent / "bare").mkdir()
    for find in (find_images, prediction.find_images):
        with pytest.raises(UsageError, match="holds no image"):
            find(images.parent / "bare")


def test_records_are_the_tool_s(tmp_path, images):
    """What tools/predict.py makes of the same scores, boxes and labels."""
    prediction = pytest.importorskip("lf_dense.training.prediction")
    torch = pytest.importorskip("torch")
    structures = pytest.importorskip("mmengine.structures")
    predictor = prediction.Predictor.__new__(prediction.Predictor)

    def record(scope, runtime, **fields):
        predictor.scope, predictor.meta = scope, {"classes": list(runtime.classes)}
        sample = structures.BaseDataElement()
        for name, value in fields.items():
            sample.set_field(value, name)
        return json.loads(json.dumps(predictor.record(sample, 0.3)))

    def ours(runtime):
        path = predict_images(runtime, images / "b.png", tmp_path / "out")
        record = json.loads(path.read_text())["images"]["b.png"]
        assert (record.pop("height"), record.pop("width")) == (60, 80)
        return record

    runtime = Runtime(write_model(tmp_path / "a", "boxes"))
    boxes = torch.tensor([[4.0, 8, 20, 30], [0, 0, 300, 300]]) * (80 / 128)
    boxes = boxes.clamp(max=torch.tensor([80.0, 60, 80, 60]))
    instances = structures.InstanceData(
        bboxes=boxes, scores=torch.tensor([0.9, 0.6]), labels=torch.tensor([2, 0])
    )
    assert ours(runtime) == record("mmdet", runtime, pred_instances=instances)
    runtime = Runtime(write_model(tmp_path / "b", "labels"))
    labels = torch.tensor(runtime.predict(images / "b.png")["labels"][None])
    assert ours(runtime) == record("mmseg", runtime, pred_sem_seg=structures.PixelData(data=labels))
    runtime = Runtime(write_model(tmp_path / "c", "scores"))
    (scores,) = runtime.run(runtime._metadata.preparation(cv2.imread(str(images / "b.png"))).batch)
    assert ours(runtime) == record("mmpretrain", runtime, pred_score=torch.tensor(scores[0]))


SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "model-index.yml")
FOLDERS = ("lf_dense", "ops", "tools", "configs")
# A photograph's shapes without the photograph: the test runs where the shared data is absent, too.
USE = """
import importlib.util, sys
for name in ("torch", "mmengine", "mmcv", "mmdet"):
    assert importlib.util.find_spec(name) is None, name
import lf_dense
from lf_dense.errors import run_tool
from lf_dense.export.run import main
print("FILE", lf_dense.__file__)
run_tool(main)
"""


@pytest.fixture(scope="module")
def clean_environment(tmp_path_factory):
    """The Python of a new environment in which pip installed ``lf_dense[runtime]`` from the sources."""
    folder = tmp_path_factory.mktemp("clean")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copy2(ROOT / name, source / name)
    compiled = shutil.ignore_patterns("__pycache__", "*.so")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=compiled)
    venv.EnvBuilder(with_pip=True).create(folder / "env")
    python = folder / "env" / "bin" / "python"
    dropped = {name for name in os.environ if name.startswith("LF_DENSE_")} | {"PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    asked = subprocess.run(
        [*pip, "--dry-run", "onnxruntime"], env=environment, capture_output=True, text=True, check=False
    )
    if asked.returncode:
        pytest.skip("pip reaches no package index")
    done = subprocess.run(
        [*pip, f"{source}[runtime]"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return python


def test_a_clean_environment_without_torch_runs_a_detector(clean_environment, tmp_path, request):
    try:
        photographs = request.getfixturevalue("shared_data") / "hires" / "photos"
        (image, *_) = sorted(photographs.glob("*.jpg"))
    except (pytest.skip.Exception, ValueError):
        image = write_images(tmp_path / "images") / "a.jpg"
    model = write_model(tmp_path / "model", "dense_anchors")
    out = tmp_path / "out"
    arguments = [model, image, "--out", out, "--score-thr", "0.5"]
    command = [clean_environment, "-I", "-c", USE, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    installed, said = done.stdout.splitlines()
    assert str(clean_environment.parents[1]) in installed
    assert said.startswith("wrote ")
    (record,) = json.loads((out / "predictions.json").read_text())["images"].values()
    # The versions of the runtime, numpy and OpenCV are not this environment's.
    here = Runtime(model).predict(image, 0.5)
    assert abs(len(record["predictions"]) - len(here["predictions"])) <= 2
    assert record["predictions"]
    assert (record["height"], record["width"]) == (here["height"], here["width"])
    assert record["predictions"][0]["score"] == pytest.approx(here["predictions"][0]["score"], abs=0.01)
    assert len(list((out / "pictures").iterdir())) == 1
