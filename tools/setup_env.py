"""Create the pinned development environment in a virtual environment, step by step.

Needs nothing but the standard library. Every step is recorded in ``<venv>/setup/`` once it has succeeded, keyed by what it
installs, so a second call does nothing, an interrupted one goes on where it stopped, and a changed pin reruns from there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
MIN_PYTHON = (3, 11)
HEARTBEAT_SECONDS = 30


class Step(NamedTuple):
    """One pip call, and the Python statement that proves that it worked."""

    title: str
    pip_args: list[str]
    proof: str
    environment: Mapping[str, str] = MappingProxyType({})


def requirement_args(name: str) -> list[str]:
    return ["-r", str(REQUIREMENTS / f"{name}.txt")]


def plan(torch_has_cuda: bool | None) -> list[Step]:
    """The steps in order; ``torch_has_cuda`` is None while torch is not installed yet."""
    steps = [
        Step("pip and the build tools", ["-U", *requirement_args("build")], "import setuptools, wheel"),
        Step("PyTorch", requirement_args("torch"), "import torch, numpy"),
    ]
    if torch_has_cuda is None:
        return steps
    vision = "torchvision-cuda" if torch_has_cuda else "torchvision-cpu"
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    return [
        *steps,
        Step("libraries", requirement_args("libs"), "import cv2, scipy, matplotlib, pycocotools"),
        Step("torchvision", ["--no-deps", *requirement_args(vision)], "import torchvision"),
        Step("OpenMMLab packages", ["--no-deps", *requirement_args("frameworks")], "import mmengine"),
        # A plain install would build without torch, yield a wheel with no operators, and cache it.
        Step(
            "mmcv, compiling its operators (about 6 minutes on 2 cores)",
            ["--no-cache-dir", "--no-deps", "--no-build-isolation", *requirement_args("mmcv")],
            "import mmcv.ops, mmdet.apis, mmseg.apis, mmpretrain.apis",
            {"MAX_JOBS": jobs, "CFLAGS": "-O1 -g0 -w"},
        ),
        Step("test and lint tools", requirement_args("dev"), "import pytest, hypothesis"),
        Step(
            "lf_dense itself, editable",
            ["--no-deps", "--no-build-isolation", "-e", str(ROOT)],
            "import lf_dense; lf_dense.LaplacianFormer",
        ),
    ]


def stamp_path(setup_dir: Path, step: Step) -> Path:
    """File whose presence says that this very step is done: its name covers the arguments and the pins they read."""
    content = " ".join(step.pip_args).encode()
    for arg in step.pip_args:
        if arg.endswith(".txt"):
            content += Path(arg).read_bytes()
        elif arg == str(ROOT):
            content += (ROOT / "pyproject.toml").read_bytes() + (ROOT / "setup.py").read_bytes()
    return setup_dir / f"{hashlib.sha256(content).hexdigest()[:16]}.done"


def run_logged(command: list[str], log: Path, environment: Mapping[str, str]) -> int:
    """Run a command with its output in ``log``, and print a sign of life every half minute."""
    started = time.monotonic()
    finished = threading.Event()

    def heartbeat() -> None:
        while not finished.wait(HEARTBEAT_SECONDS):
            print(f"      ... still working, {time.monotonic() - started:.0f} s", flush=True)

    thread = threading.Thread(target=heartbeat, daemon=True)
    thread.start()
    try:
        with log.open("ab") as stream:
            env = {**os.environ, **environment}
            return subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=env, check=False).returncode
    finally:
        finished.set()
        thread.join()


def fail(step: Step, log: Path) -> None:
    tail = log.read_text(errors="replace").splitlines()[-25:]
    print("\n".join(tail), file=sys.stderr)
    sys.exit(f"setup failed at: {step.title}. The lines above end the log {log}; mend the cause and run the same command again.")


def torch_has_cuda(python: Path) -> bool | None:
    """Whether the environment's torch is a CUDA build; None where it has no torch."""
    code = "import torch; print(torch.version.cuda is not None)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return None if found.returncode else found.stdout.strip() == "True"


def run_step(step: Step, label: str, python: Path, setup_dir: Path) -> None:
    stamp = stamp_path(setup_dir, step)
    if stamp.exists():
        return
    print(f"[{label}] {step.title}", flush=True)
    log = setup_dir / "setup.log"
    started = time.monotonic()
    if run_logged([str(python), "-m", "pip", "install", *step.pip_args], log, step.environment):
        fail(step, log)
    # -P: the checkout's own folders must not stand in for what is installed.
    if run_logged([str(python), "-P", "-W", "ignore", "-c", step.proof], log, {}):
        fail(step, log)
    stamp.touch()
    print(f"      done in {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the virtual environment to create or complete")
    args = parser.parse_args()
    if sys.version_info < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        sys.exit(f"setup needs Python {wanted} or newer, and this is {sys.version.split()[0]}: call make with PYTHON=python{wanted}.")

    python = args.venv / "bin" / "python"
    if not python.exists():
        print(f"creating {args.venv}", flush=True)
        venv.EnvBuilder(with_pip=True).create(args.venv)
    setup_dir = args.venv / "setup"
    setup_dir.mkdir(exist_ok=True)

    first = plan(None)
    total = len(plan(False))
    for number, step in enumerate(first, 1):
        run_step(step, f"{number}/{total}", python, setup_dir)
    for number, step in enumerate(plan(torch_has_cuda(python))[len(first) :], len(first) + 1):
        run_step(step, f"{number}/{total}", python, setup_dir)
    print(f"environment ready: {args.venv}")


if __name__ == "__main__":
    main()
