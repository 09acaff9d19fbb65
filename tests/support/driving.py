"""Driving the tools as a user does: subprocesses, and what they say."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest

from lf_dense.errors import run_tool
from support import ROOT

COCO_OPTIONS = (
    "train_dataloader.dataset.indices=8",
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "train_dataloader.dataset.pipeline.2.scale=(160,128)",
    "val_dataloader.dataset.indices=4",
    "val_dataloader.num_workers=0",
    "val_dataloader.persistent_workers=False",
    "val_dataloader.dataset.pipeline.1.scale=(160,128)",
    "test_dataloader.dataset.indices=4",
    "test_dataloader.num_workers=0",
    "test_dataloader.persistent_workers=False",
    "test_dataloader.dataset.pipeline.1.scale=(160,128)",
    # A detector that has learnt nothing outputs nothing above the usual threshold, and then has no mAP.
    "model.test_cfg.score_thr=0.0",
    "default_hooks.logger.interval=1",
)


def command(tool: str, *arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore", str(ROOT / "tools" / tool), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(arguments: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run a command in the checkout; its output is one text."""
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env=env or environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def call(tool: str, *arguments: object, code: int = 0, env: dict[str, str] | None = None) -> str:
    """Run a tool to its end and return all that it printed."""
    done = run(command(tool, *arguments), env)
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


def refusal(tool: str, *arguments: object) -> str:
    """The one sentence with which a tool refuses."""
    printed = call(tool, *arguments, code=2)
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    return line


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tool: str, *arguments: object
) -> str:
    """The one sentence with which a tool refuses, run in this process: for many refusals in little time."""
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        run_tool(load_tool(tool.removesuffix(".py")).main)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def kill_after(tool_command: list[str], ready: Path) -> None:
    """Start a training, wait for a file, and SIGKILL it and all its workers."""
    process = subprocess.Popen(
        tool_command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 600
    while not ready.exists():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline, f"no {ready.name} after ten minutes"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def load_tool(name: str) -> ModuleType:
    """A tool as a module, for what its command line does not show."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unpack_imagenette(shared_data: Path, out: Path, split: str, per_class: int) -> Path:
    """The first few images of each class of one split of the real set, as ``out/<class>/*.JPEG``."""
    taken: Counter[str] = Counter()
    with tarfile.open(shared_data / "imagenette2_128.tar.gz") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if member.isfile() and path.parts[-3] == split and taken[path.parts[-2]] < per_class:
                taken[path.parts[-2]] += 1
                target = out / path.parts[-2] / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
    assert set(taken.values()) == {per_class}
    assert len(taken) == 10
    return out
