"""The wheel as a user builds and installs it.

It is built with a compiler, without one, and without operators because the user wants none.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from support import ROOT

SOURCES = ("setup.py", "pyproject.toml", "README.md", "lf_dense", "ops", "tests", "tools", "configs", "docs")
NO_OPERATORS = "lf_dense is installed without native operators, since "
NO_COMPILER = "there is no C++ compiler (/nowhere/g++ was not found: install g++, or name one in CXX)"

USE = """
import logging, sys, warnings
logging.basicConfig(format="LOG %(message)s", stream=sys.stdout)
import torch, lf_dense
from lf_dense import laplacian_attention, use_backend
print("FILE", lf_dense.__file__)

def run(backend):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, n, 32).requires_grad_() for n in (200, 200, 200, 49)]
    out = laplacian_attention(*inputs, backend=backend)
    return out, *torch.autograd.grad(out.square().sum(), inputs)

expected = run("reference")
try:
    got = run("native")
except RuntimeError as error:
    print("ERROR", error)
else:
    for mine, right in zip(got, expected):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4 * right.abs().max().item())
    print("NATIVE IS RIGHT")
for _ in range(2):
    got = run("auto")
print("AUTO IS REFERENCE", all(torch.equal(mine, right) for mine, right in zip(got, expected)))
print("BUILD", lf_dense.build_info())
"""


def build_wheel(folder, **environment):
    """Run in a copy of the sources what ``make wheel`` runs; return the wheel and what pip said."""
    pytest.importorskip("pip")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            # What is compiled in place is copied too: it must not end up in the wheel.
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, source / name)
    options = ["-v", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder / "dist"]
    command = [sys.executable, "-m", "pip", "wheel", ".", *options]
    dropped = {name for name in os.environ if name.startswith("LF_DENSE_")} | {"CXX", "PYTHONPATH"}
    environment = {
        **{name: value for name, value in os.environ.items() if name not in dropped},
        "MAX_JOBS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "TORCH_CUDA_ARCH_LIST": "8.0",
        **environment,
    }
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (wheel,) = (folder / "dist").iterdir()
    return wheel, done.stdout + done.stderr


def install(wheel, folder):
    """Install the wheel in a new virtual environment, and return its Python.

    Its torch is the one of this environment; the editable packages of this environment do not come along.
    """
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True, capture_output=True)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    asked = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    site = Path(asked.stdout.strip())
    # Lines of a .pth file join sys.path, but the .pth files in the folders that they name are not read.
    folders = {Path(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    folders.add(Path(torch.__file__).parents[1])
    (site / "torch_of_the_tests.pth").write_text("".join(f"{path}\n" for path in sorted(folders)))
    return python


def use(python, folder):
    """Run ``USE`` with the installed package, away from the checkout, and return its lines."""
    command = [python, "-I", "-W", "ignore", "-c", USE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    (file,) = (line for line in lines if line.startswith("FILE"))
    assert Path(file.removeprefix("FILE ")).is_relative_to(python.parents[1])
    return lines


def build_info_of(lines):
    (line,) = (line for line in lines if line.startswith("BUILD "))
    return ast.literal_eval(line.removeprefix("BUILD "))


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    return {name for name in names if not re.fullmatch(r"lf_dense-[\d.]+\.dist-info/.*", name)}


def python_files():
    files = (path.relative_to(ROOT) for path in (ROOT / "lf_dense").rglob("*.py"))
    return {path.as_posix() for path in files} | {"lf_dense/py.typed"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_wheel_with_operators(tmp_path):
    wheel, said = build_wheel(tmp_path)
    assert NO_OPERATORS not in said
    cuda = {"_operators_cuda.so"} if torch.version.cuda and shutil.which("nvcc") else set()
    compiled = {name for name in contents(wheel) if name.endswith(".so")}
    in_backends = {name.removeprefix("lf_dense/backends/") for name in compiled}
    # The name of an extension module has the version of Python in it.
    names = {re.sub(r"_build_info\..*\.so", "_build_info.so", name) for name in in_backends}
    assert names == {"_operators_cpu.so", "_build_info.so", *cuda}
    assert contents(wheel) - compiled == python_files()
    lines = use(install(wheel, tmp_path / "env"), tmp_path)
    assert "NATIVE IS RIGHT" in lines
    assert not [line for line in lines if line.startswith("LOG")]
    info = build_info_of(lines)
    assert info["built"]
    assert info["torch"] == torch.__version__
    assert info["instruction_set"] in info["instruction_sets_supported"]


def check_reference_alone(wheel, folder):
    """Check that the package works without operators and says why it is not native.

    With ``auto`` it says so once; with ``native`` it is an error.
    """
    assert contents(wheel) == python_files()
    lines = use(install(wheel, folder / "env"), folder)
    assert build_info_of(lines) == {"built": False, "instruction_set": None}
    assert "AUTO IS REFERENCE True" in lines
    reason = "they were not built for cpu"
    (error,) = (line for line in lines if line.startswith("ERROR"))
    assert error.startswith(f"ERROR the native operators cannot serve this call, since {reason}")
    (log,) = (line for line in lines if line.startswith("LOG"))
    instead = "lf_dense runs its plain PyTorch reference in place of the native operators"
    assert log.startswith(f"LOG {instead}, since {reason}")


def test_without_a_compiler_the_build_says_why_and_the_reference_serves(tmp_path):
    (tmp_path / "bin").mkdir()
    wheel, said = build_wheel(tmp_path, PATH=str(tmp_path / "bin"), CXX="/nowhere/g++", CUDA_HOME="")
    assert said.count(NO_OPERATORS + NO_COMPILER) == 1
    check_reference_alone(wheel, tmp_path)


def test_operators_that_are_not_wanted_are_not_built_and_not_warned_of(tmp_path):
    wheel, said = build_wheel(tmp_path, LF_DENSE_NO_NATIVE="1")
    assert "UserWarning" not in said
    assert said.count("LF_DENSE_NO_NATIVE is set: lf_dense is installed without native operators.") == 1
    check_reference_alone(wheel, tmp_path)
