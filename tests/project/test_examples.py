"""The examples, compiled as their pages say and run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("onnxscript")

from lf_dense.backends import native
from lf_dense.export.exporting import export_model
from lf_dense.export.parts import choose_part
from lf_dense.frameworks import load_config
from lf_dense.training.prediction import build_model
from support import ROOT
from support.driving import run

CONFIG = ROOT / "configs" / "retinanet_lf_demo.py"
HEIGHT, WIDTH = 64, 96


def _command_of_the_page() -> str:
    """The command that docs/export.md gives for the program."""
    text = (ROOT / "docs" / "export.md").read_text()
    found = re.search(r"^    (g\+\+ (?:.*\\\n)*.*)$", text, re.M)
    assert found, "docs/export.md has no command that compiles examples/run_aoti.cpp"
    return found[1].replace("\\\n", " ")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """run_aoti, compiled."""
    if not shutil.which("g++"):
        pytest.skip("the page's command calls g++, which is not there")
    out = tmp_path_factory.mktemp("program") / "run_aoti"
    command = _command_of_the_page().replace("$T", shlex.quote(str(Path(torch.__file__).parent)))
    assert command.count(" -o run_aoti ") == 1
    done = run(["bash", "-c", command.replace(" -o run_aoti ", f" -o {shlex.quote(str(out))} ")])
    assert done.returncode == 0, done.stdout[-3000:]
    return out


@pytest.mark.skipif(bool(native.library_obstacle("cpu")), reason="no native operators")
def test_an_aotinductor_package_runs_in_cpp(program, tmp_path):
    config, package = load_config(str(CONFIG)), tmp_path / "model.pt2"
    torch.manual_seed(0)
    model, _ = build_model(config, None)
    checkpoint = tmp_path / "made_up.pth"
    torch.save({"state_dict": model.state_dict(), "meta": {}}, checkpoint)
    export_model(
        config,
        str(checkpoint),
        package,
        "aoti",
        "operator",
        "backbone",
        size=(HEIGHT, WIDTH),
        tell=lambda line: None,
    )
    library = next((ROOT / "lf_dense" / "backends").glob("_operators_cpu*.so"))
    done = run([str(program), str(package), str(HEIGHT), str(WIDTH), str(library)])
    assert done.returncode == 0, done.stdout
    with torch.no_grad():
        wanted = choose_part(model.eval(), "mmdet", "backbone").module(torch.ones(1, 3, HEIGHT, WIDTH))
    lines = done.stdout.splitlines()
    assert len(lines) == len(wanted) == 4
    for index, (line, maps) in enumerate(zip(lines, wanted)):
        pattern = (
            rf"output {index}: \[1, {maps.shape[1]}, {maps.shape[2]}, {maps.shape[3]}\] from (\S+) to (\S+)"
        )
        low, high = map(float, re.fullmatch(pattern, line).groups())
        assert low == pytest.approx(maps.min().item(), abs=1e-4 * maps.abs().max().item())
        assert high == pytest.approx(maps.max().item(), abs=1e-4 * maps.abs().max().item())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: "),
        (["none.pt2", "64", "wide"], "wide is no height or width in pixels."),
        (["none.pt2", "64", "96"], "error: "),
        (["none.pt2", "64", "96", "none.so"], "none.so"),
    ],
)
def test_what_the_program_refuses(arguments, said, program):
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
