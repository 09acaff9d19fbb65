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
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from support import ROOT

SOURCES = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "model-index.yml",
    "lf_dense",
    "ops",
    "tests",
    "tools",
    "configs",
    "docs",
)
# Scripts for a checkout: they build the environment, mmcv or the operators.
OF_THE_CHECKOUT = ("setup_env.py", "build_mmcv.py", "gpu_check.py", "read_kernels.py", "sanitize.py")
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
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
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
    """What a wheel holds beside compiled files: the package, and configs and tools in OpenMMLab's place."""
    package = [path.relative_to(ROOT) for path in (ROOT / "lf_dense").rglob("*.py")]
    package += [Path("lf_dense", "py.typed"), Path("lf_dense", ".mim", "model-index.yml")]
    for folder, patterns in (("configs", ("*.py", "*.yml")), ("tools", ("*.py", "*.sh"))):
        files = [path.relative_to(ROOT) for pattern in patterns for path in (ROOT / folder).rglob(pattern)]
        package += [Path("lf_dense", ".mim", path) for path in files if path.name not in OF_THE_CHECKOUT]
    return {path.as_posix() for path in package}


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_wheel_with_operators(tmp_path):
    wheel, said = build_wheel(tmp_path)
    assert NO_OPERATORS not in said
    cuda = {"_operators_cuda.so"} if torch.version.cuda and shutil.which("nvcc") else set()
    compiled = {name for name in contents(wheel) if name.endswith(".so")}
    in_backends = {name.removeprefix("lf_dense/backends/") for name in compiled}
    # The name of an extension module has the version of Python in it.
    names = {re.sub(r"_build_info\..*\.so", "_build_info.so", name) for name in in_backends}
    # Those of other runtimes are there where their headers are.
    runtimes = {name for name in names if re.fullmatch(r"_operators_(openvino|onnxruntime)\.so", name)}
    assert names - runtimes == {"_operators_cpu.so", "_build_info.so", *cuda}
    assert ("_operators_openvino.so" in runtimes) == (find_spec("openvino") is not None)
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The bin folder of an environment with the wheel, and an empty folder to work in."""
    folder = tmp_path_factory.mktemp("installed")
    wheel, _ = build_wheel(folder, LF_DENSE_NO_NATIVE="1")
    return install(wheel, folder / "env").parent


def lf_dense(installed, folder, *arguments, code=0):
    """Run the console command away from the checkout; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONPATH", None)
    command = [installed / "lf-dense", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def test_the_installed_package_trains_and_predicts(installed, tmp_path):
    pytest.importorskip("mmdet")
    config = "lf_dense::retinanet_lf_demo.py"
    lf_dense(installed, tmp_path, "shapes", "--out", "data", "--train", 4, "--val", 2, "--size", 96)
    lengths = ("train_cfg.max_epochs=1", "train_cfg.val_interval=1", "train_dataloader.batch_size=2")
    intervals = ("default_hooks.checkpoint.interval=1", "default_hooks.logger.interval=1")
    options = ("data_root=data", *lengths, *intervals)
    said = lf_dense(installed, tmp_path, "train", config, "--work-dir", "run", "--cfg-options", *options)
    assert "Epoch(train) [1][2/2]" in said
    lf_dense(installed, tmp_path, "predict", config, "run/epoch_1.pth", "data/val", "--out", "out")
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2


def test_a_config_inherits_from_the_installed_ones(installed, tmp_path):
    pytest.importorskip("mmdet")
    base = "lf_dense::detection/mask-rcnn_lf-tiny_fpn_1x_coco.py"
    (tmp_path / "mine.py").write_text(f"_base_ = {base!r}\nmodel = dict(backbone=dict(with_cp=True))\n")
    code = "from lf_dense.frameworks import load_config; print(load_config('mine.py').model.backbone)"
    command = [installed / "python", "-I", "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'arch': 'tiny'" in done.stdout
    assert "'with_cp': True" in done.stdout


def test_the_console_command_is_the_scripts(installed, tmp_path):
    from lf_dense.__main__ import COMMANDS

    said = lf_dense(installed, tmp_path)
    assert all(command in said for command in [*COMMANDS, "info"])
    helped = lf_dense(installed, tmp_path, "inspect", "--help")
    script = [installed / "python", "-W", "ignore", ROOT / "tools" / "inspect_checkpoint.py", "--help"]
    same = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert helped.split("options:")[1] == same.split("options:")[1]
    assert helped.startswith("usage: lf-dense inspect")
    assert "lf_dense " in lf_dense(installed, tmp_path, "info")
    assert "no command 'fly'" in lf_dense(installed, tmp_path, "fly", code=2)
    assert "is not there" in lf_dense(installed, tmp_path, "inspect", "gone.pth", code=2)


def test_every_tool_for_users_is_a_command():
    from lf_dense.__main__ import COMMANDS

    tools = {path.stem for path in (ROOT / "tools").glob("*.py") if path.name not in OF_THE_CHECKOUT}
    assert set(COMMANDS.values()) == tools
