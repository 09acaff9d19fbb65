"""mmcv from united files: which are united, what proves the result, and what happens where it fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.driving import load_tool


@pytest.fixture
def tool():
    return load_tool("build_mmcv")


def test_files_are_united_in_place(tool, tmp_path):
    folder = tmp_path / "cpu"
    folder.mkdir()
    for name in ("a.cpp", "b.cpp", "pybind.cpp", "notes.txt"):
        (folder / name).write_text(f"// {name}")
    assert tool.unite(folder, {"pybind.cpp"}) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "pybind.cpp", tool.UNITED]
    parts = tmp_path / "cpu_parts"
    assert (folder / tool.UNITED).read_text() == "".join(
        f'#include "{parts / name}"\n' for name in ("a.cpp", "b.cpp")
    )
    assert (parts / "a.cpp").read_text() == "// a.cpp"


def test_the_proof_holds_for_the_installed_mmcv(tool):
    pytest.importorskip("mmcv.ops")
    command = [sys.executable, "-W", "ignore", "-c", tool.PROOF]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mmcv's operators agree with torch's" in done.stdout


def test_the_proof_sees_an_operator_that_is_wrong(tool):
    pytest.importorskip("mmcv.ops")
    broken = "from mmcv import ops\nreal = ops.nms\nops.nms = lambda *args: (None, real(*args)[1].flip(0))\n"
    command = [sys.executable, "-W", "ignore", "-c", broken + tool.PROOF]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "mmcv.ops.nms is wrong by" in done.stderr


@pytest.fixture
def calls(tool, monkeypatch, tmp_path):
    """The tool with its commands recorded; the codes that they end with, in order, are to be filled in."""
    made, codes = [], []
    monkeypatch.setattr(tool, "run", lambda command, folder=None: made.append(command) or codes.pop(0))
    monkeypatch.setattr(tool, "has_cuda", lambda: False)
    sources = tmp_path / "sources"
    for part in (tool.SOURCES / "cpu", tool.SOURCES):
        (sources / part).mkdir(parents=True, exist_ok=True)
        (sources / part / "one.cpp").touch()
    monkeypatch.setattr(tool, "fetch", lambda requirement, folder: sources)
    monkeypatch.setattr(sys, "argv", ["build_mmcv.py", "mmcv.txt"])
    return made, codes


def test_a_united_build_that_is_right_is_all(tool, calls, capsys):
    made, codes = calls
    codes += [0, 0]  # the install, the proof
    assert tool.main() == 0
    assert len(made) == 2
    assert "file by file" not in capsys.readouterr().out


@pytest.mark.parametrize("failing", [[1], [0, 1]], ids=["compile", "proof"])
def test_otherwise_mmcv_is_built_as_it_comes(tool, calls, capsys, failing):
    made, codes = calls
    codes += [*failing, 0]
    assert tool.main() == 0
    assert made[-1][-2:] == ["-r", "mmcv.txt"]
    assert "--no-build-isolation" in made[-1]
    assert "mmcv is built file by file" in capsys.readouterr().out


def test_sources_of_another_shape_are_built_as_they_come(tool, calls, monkeypatch, capsys, tmp_path):
    _, codes = calls
    monkeypatch.setattr(tool, "fetch", lambda requirement, folder: tmp_path / "nothing")
    codes += [0]
    assert tool.main() == 0
    assert "could not be put together" in capsys.readouterr().out


def test_cuda_is_built_file_by_file(tool, calls, monkeypatch):
    made, codes = calls
    monkeypatch.setattr(tool, "has_cuda", lambda: True)
    codes += [0]
    assert tool.main() == 0
    assert len(made) == 1
