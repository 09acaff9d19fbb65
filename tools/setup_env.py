"""Create the pinned development environment in a virtual environment, step by step.

It needs nothing but the standard library. Each step that succeeds is recorded in ``<venv>/setup/``, under a
key of what this step and the steps before it install. So a second call does nothing, an interrupted call goes
on where it stopped, and a changed pin reruns its step and all that follow.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
BUILD_MMCV = ROOT / "tools" / "build_mmcv.py"
MIN_PYTHON = (3, 11)
# torchvision 0.16.2, the last to import beside a CPU-only torch of another version, has no wheel for newer.
CPU_TORCH_MAX_PYTHON = (3, 11)
HEARTBEAT_SECONDS = 30
STACKS = ("forks", "upstream")
EXPORT_PROOF = "import onnx, onnxscript, onnxruntime, openvino"
# What the end of a failed step's log says of the machine, in the order of asking.
DIAGNOSES = (
    (r"No space left on device|Disk quota exceeded", "the disk is full, so make room"),
    (
        r"NewConnectionError|ConnectTimeout|Read timed out|Name or service not known|name resolution"
        r"|Connection refused|Network is unreachable|Max retries exceeded",
        "the package index does not answer, so look at the network and at pip's index-url (pip config list)",
    ),
    (
        r"No matching distribution found for (\S+)",
        "the package index has no {0} for this Python and this machine, so look at pip's index-url",
    ),
    (
        r"Killed signal|signal terminated program|MemoryError|Cannot allocate memory",
        "memory ran out, so set MAX_JOBS=1",
    ),
)


class Step(NamedTuple):
    """One call of the environment's interpreter, and the Python statement that proves that it worked."""

    title: str
    arguments: list[str]
    proof: str
    environment: Mapping[str, str] = MappingProxyType({})


def requirements(name: str) -> str:
    return str(REQUIREMENTS / f"{name}.txt")


def pip(*arguments: str) -> list[str]:
    return ["-m", "pip", "install", *arguments]


def plan(torch_has_cuda: bool | None, stack: str = "forks") -> list[Step]:
    """The steps in order.

    Args:
        torch_has_cuda: None while torch is not installed yet.
        stack: the mm packages, ``"forks"`` or ``"upstream"``.
    """
    of_stack = "" if stack == "forks" else f"-{stack}"
    build_tools = pip("-U", "-r", requirements(f"build{of_stack}"))
    steps = [
        Step("pip and the build tools", build_tools, "import setuptools, wheel"),
        Step("PyTorch", pip("-r", requirements("torch")), "import torch, numpy"),
    ]
    if torch_has_cuda is None:
        return steps
    vision = "torchvision-cuda" if torch_has_cuda else "torchvision-cpu"
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    # mmcv builds for a GPU that is visible, and needs nvcc for that. Without nvcc it can build for the CPU.
    hidden_gpus = {} if shutil.which("nvcc") else {"CUDA_VISIBLE_DEVICES": ""}
    use_native = "lf_dense.newton_schulz_inverse(torch.ones(1, 1), backend='native')"
    return [
        *steps,
        Step("libraries", pip("-r", requirements("libs")), "import cv2, scipy, matplotlib, pycocotools"),
        Step("torchvision", pip("--no-deps", "-r", requirements(vision)), "import torchvision"),
        Step(
            "OpenMMLab packages",
            pip("--no-deps", "-r", requirements(f"frameworks{of_stack}")),
            "import mmengine",
        ),
        Step(
            "mmcv, compiling its operators (a minute on 2 cores; with CUDA many)",
            [str(BUILD_MMCV), requirements(f"mmcv{of_stack}")],
            "import mmcv.ops, mmdet.apis, mmseg.apis, mmpretrain.apis",
            {"MAX_JOBS": jobs, **hidden_gpus},
        ),
        Step("test and lint tools", pip("-r", requirements("dev")), "import pytest, hypothesis, safetensors"),
        Step(
            "models to compare with",
            pip("--no-deps", "-r", requirements("comparisons")),
            "import timm, efficientnet_lite_pytorch",
        ),
        Step("export formats and their runtimes", pip("-r", requirements("export")), EXPORT_PROOF),
        Step("the documentation site", pip("-r", requirements("docs")), "import sphinx, furo, myst_nb"),
        Step(
            "lf_dense itself, editable, compiling its operators (a minute; with CUDA some more)",
            pip("--no-deps", "--no-build-isolation", "-e", str(ROOT)),
            f"import lf_dense, torch; lf_dense.LaplacianFormer; {use_native}",
            {"MAX_JOBS": jobs},
        ),
    ]


def fingerprint(previous: str, step: Step) -> str:
    """Identify a step by its arguments, the files they name, and the fingerprint of the step before it."""
    content = f"{previous} {' '.join(step.arguments)}".encode()
    for arg in step.arguments:
        if arg.endswith((".txt", ".py")):
            content += Path(arg).read_bytes()
        elif arg == str(ROOT):
            sources = sorted(path for path in (ROOT / "ops").rglob("*") if path.is_file())
            for path in (ROOT / "pyproject.toml", ROOT / "setup.py", *sources):
                content += path.read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


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
            # What is started keeps the lock, should this process alone be killed.
            done = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, env=env, check=False, close_fds=False
            )
            return done.returncode
    finally:
        finished.set()
        thread.join()


def diagnose(lines: list[str]) -> str:
    """What the lines say of the machine, as a clause that says what to do; empty where they say nothing."""
    for pattern, clause in DIAGNOSES:
        found = re.search(pattern, "\n".join(lines))
        if found:
            return clause.format(*found.groups())
    return ""


def fail(step: Step, log: Path) -> None:
    tail = log.read_text(errors="replace").splitlines()[-25:]
    print("\n".join(tail), file=sys.stderr)
    cause = diagnose(tail)
    sys.exit(
        f"setup failed at: {step.title}" + (f": {cause}" if cause else "") + f". The lines above end the log "
        f"{log}; mend the cause and run the same command again."
    )


def torch_has_cuda(python: Path) -> bool | None:
    """Whether the environment's torch is a CUDA build; None where it has no torch."""
    code = "import torch; print(torch.version.cuda is not None)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return None if found.returncode else found.stdout.strip() == "True"


def run_steps(steps: list[Step], total: int, python: Path, setup_dir: Path) -> None:
    """Run in order the steps that have no stamp yet."""
    key = ""
    log = setup_dir / "setup.log"
    for number, step in enumerate(steps, 1):
        key = fingerprint(key, step)
        stamp = setup_dir / f"{key}.done"
        if stamp.exists():
            continue
        print(f"[{number}/{total}] {step.title}", flush=True)
        started = time.monotonic()
        if run_logged([str(python), *step.arguments], log, step.environment):
            fail(step, log)
        # -P: the checkout's own folders must not stand in for what is installed.
        if run_logged([str(python), "-P", "-W", "ignore", "-c", step.proof], log, {}):
            fail(step, log)
        stamp.touch()
        print(f"      done in {time.monotonic() - started:.0f} s", flush=True)


def check_machine() -> None:
    """End with one sentence if something is missing that the compile needs minutes later."""
    version = sys.version_info[:2]
    if version < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        sys.exit(
            f"setup needs Python {wanted} or newer, and this is {sys.version.split()[0]}: "
            f"call make with PYTHON=python{wanted}."
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        sys.exit(
            "setup compiles mmcv, which needs Python's headers, and Python.h is not there: "
            "install python3-dev (python3-devel)."
        )
    if not shutil.which(os.environ.get("CXX", "g++").split()[0]):
        sys.exit(
            "setup compiles mmcv, which needs a C++ compiler, and there is none: "
            "install g++, or name one in CXX."
        )


def has_pip(python: Path) -> bool:
    """Whether the interpreter is there and its pip works; an interrupted creation leaves one without."""
    if not python.exists():
        return False
    done = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False)
    return done.returncode == 0


def create_environment(folder: Path) -> Path:
    """The environment's interpreter; an environment without a working pip is made anew."""
    python = folder / "bin" / "python"
    if has_pip(python):
        return python
    print(f"creating {folder}", flush=True)
    try:
        venv.EnvBuilder(with_pip=True, clear=True).create(folder)
    except subprocess.CalledProcessError:
        sys.exit(
            f"setup could not create {folder}: Python's venv module lacks its part of pip; "
            "install python3-venv and run this again."
        )
    return python


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second set-up of the same environment out; the folder is made where it is missing.

    The lock is on the folder itself, which stays when its content is made anew. It ends with this process and
    those that it started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        sys.exit(f"setup is at work on {folder} already: wait for it, then run this again.")
    try:
        yield
    finally:
        os.close(descriptor)


def set_up(folder: Path, stack: str) -> None:
    """Bring an environment up to date."""
    python = create_environment(folder)
    setup_dir = folder / "setup"
    setup_dir.mkdir(exist_ok=True)
    total = len(plan(False))
    run_steps(plan(None, stack), total, python, setup_dir)
    has_cuda = torch_has_cuda(python)
    if not has_cuda and sys.version_info[:2] > CPU_TORCH_MAX_PYTHON:
        newest = ".".join(map(str, CPU_TORCH_MAX_PYTHON))
        sys.exit(
            f"setup found a CPU-only torch on Python {sys.version.split()[0]}, "
            "for which there is no torchvision that imports beside it: "
            f"call make with PYTHON=python{newest} after removing {folder}."
        )
    run_steps(plan(has_cuda, stack), total, python, setup_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", help="the virtual environment to create or complete"
    )
    parser.add_argument(
        "--stack",
        choices=STACKS,
        default="forks",
        help="the mm packages: the maintained onedl-* forks, or OpenMMLab's last releases (default: forks)",
    )
    args = parser.parse_args()
    started = time.monotonic()
    check_machine()
    with locked(args.venv):
        set_up(args.venv, args.stack)
    seconds = time.monotonic() - started
    print(f"environment ready: {args.venv}" + (f" ({seconds:.0f} s)" if seconds > 5 else ""))


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(
            f"setup could not write what it has to ({error}): make room, and run the same command again."
        )
