"""The build of the operators.

Every CUDA file compiles for every architecture that we name and needs only torch's stable interface. A build
that cannot succeed says why.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import ROOT

# What the CUDA operators may take from libtorch_cuda, which a CPU-only torch lacks.
FROM_CUDA_TORCH = {"aoti_torch_get_current_cuda_stream"}
ARCHITECTURES = {"sm_80", "sm_90"}
KERNELS_THAT_MATTER = (
    "stream_keys",
    "stream_queries",
    "query_gradients",
    "key_gradients",
    "matrix",
    "signs",
    "finish_keys",
    "invert_small",
    "multiply_by_inverse",
)


def build(folder, **environment):
    """Run ``setup.py build_ext`` into a folder of its own."""
    folders = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    command = [sys.executable, "setup.py", "build_ext", *folders]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def cuda_build(tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not there")
    folder = tmp_path_factory.mktemp("cuda")
    # No GPU is needed, and a GPU that is there must not decide what is built.
    done = build(folder, LF_DENSE_FORCE_CUDA="1", CUDA_VISIBLE_DEVICES="", TORCH_CUDA_ARCH_LIST="")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return folder


def resource_reports(folder):
    """(kernel, architecture, spilled bytes, registers) of every compiled kernel."""
    rows = []
    for report in (folder / "temp" / "ops").glob("*.report"):
        entries = re.split(r"Compiling entry function '", report.read_text())[1:]
        for entry in entries:
            name, architecture = re.match(r"(\S+)' for '(\S+)'", entry).groups()
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
            registers = re.search(r"Used (\d+) registers", entry)
            rows.append((name, architecture, int(spills[1]) + int(spills[2]), int(registers[1])))
    return rows


def test_every_cuda_file_compiles_for_every_architecture(cuda_build):
    files = {path.stem for path in (ROOT / "ops" / "cuda").glob("*.cu")}
    folder = cuda_build / "temp" / "ops"
    reports = list(folder.glob("*.report"))
    assert {path.name.removeprefix("cuda_").removesuffix(".o.report") for path in reports} == files
    for path in reports:
        assert set(re.findall(r"for '(sm_\d+)'", path.read_text())) == ARCHITECTURES
    assert "-gencode arch=compute_90,code=compute_90" in (folder / "build.ninja").read_text()
    assert (cuda_build / "lib" / "lf_dense" / "backends" / "_operators_cuda.so").stat().st_size > 100_000


def kernel_of(mangled):
    """The kernel that matters with this mangled name, or None; Id marks float64, for gradient checks."""
    for kernel in KERNELS_THAT_MATTER:
        if f"{len(kernel)}{kernel}I" in mangled and f"{kernel}Id" not in mangled:
            return kernel
    return None


def test_kernels_that_matter_do_not_spill(cuda_build):
    seen = set()
    for name, architecture, spilled, registers in resource_reports(cuda_build):
        kernel = kernel_of(name)
        if kernel:
            seen.add((kernel, architecture))
            assert spilled == 0, f"{name} on {architecture} spills {spilled} bytes with {registers} registers"
    assert len(seen) == len(ARCHITECTURES) * len(KERNELS_THAT_MATTER)


def dynamic_symbols(library, which):
    """The words of nm's list: names, and the letters of their kinds."""
    command = ["nm", "-D", which, library]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_libraries_need_torchs_stable_interface_alone(cuda_build):
    stable = re.compile(r"^(aoti_torch_|torch_)")
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    exported = dynamic_symbols(torch_cpu, "--defined-only")
    for name in ("cpu", "cuda"):
        library = cuda_build / "lib" / "lf_dense" / "backends" / f"_operators_{name}.so"
        needed = dynamic_symbols(library, "--undefined-only")
        from_torch = {symbol for symbol in needed if stable.match(symbol)}
        assert from_torch - exported <= (FROM_CUDA_TORCH if name == "cuda" else set())
        # ATen's and c10's C++ interface changes from one torch to the next.
        assert not {symbol for symbol in needed if re.search(r"(2at|3c10|5torch)", symbol)}


def test_the_cuda_library_asks_for_libtorch_cuda(cuda_build):
    library = cuda_build / "lib" / "lf_dense" / "backends" / "_operators_cuda.so"
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cuda.so" in needed
    assert "libcudart" not in needed


def test_nvcc_compiles_with_the_compiler_of_cxx(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not there")
    compiler, log = tmp_path / "host-compiler", tmp_path / "calls"
    # It says what it is, and writes down what else it is asked for.
    compiler.write_text(f"""#!/bin/sh
case "$*" in *--version) exec g++ --version;; esac
echo "$@" >> {log}
case "$1" in -E) exec g++ "$@";; esac
exit 1
""")
    compiler.chmod(0o755)
    (tmp_path / "ccache").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "ccache").chmod(0o755)
    environment = {
        "CXX": f"{tmp_path / 'ccache'} {compiler} -m64",
        "LF_DENSE_FORCE_CUDA": "1",
        "MAX_JOBS": "1",
    }
    assert build(tmp_path, **environment).returncode != 0
    folder = tmp_path / "temp" / "ops"
    lines = (folder / "build.ninja").read_text().splitlines()
    assert next(line for line in lines if line.startswith("nvcc = ")).endswith(
        f"nvcc -ccbin {compiler} -Xcompiler -m64"
    )
    ninja = next(filter(None, map(shutil.which, (Path(sys.executable).with_name("ninja"), "ninja"))))
    log.write_text("")
    subprocess.run([ninja, "-C", folder, "cuda_probe.o"], capture_output=True, check=False)
    assert "probe.cu" in log.read_text()
    assert "-m64" in log.read_text()


def test_a_driver_that_does_not_serve_the_library_is_told_of(tmp_path):
    if shutil.which("nvcc") is None or torch.cuda.is_available():
        pytest.skip("this needs nvcc, and a machine where CUDA cannot run")
    library = tmp_path / "probe.so"
    command = ["nvcc", "-shared", "-Xcompiler", "-fPIC", "-o", library, ROOT / "ops" / "cuda" / "probe.cu"]
    subprocess.run(command, capture_output=True, check=True)
    probe = ctypes.CDLL(str(library)).lf_dense_launch_failure
    probe.restype = ctypes.c_char_p
    assert re.search(rb"(?i)driver|device", probe(0))


def test_unreadable_architectures_are_one_sentence(tmp_path):
    done = build(tmp_path, LF_DENSE_FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="Hopper")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not there")
    assert done.returncode != 0
    said = "TORCH_CUDA_ARCH_LIST is 'Hopper': write numbers like '8.0;9.0+PTX' ('Hopper' is not one)."
    assert done.stderr.strip().splitlines()[-1] == said


def test_cuda_asked_for_without_nvcc_is_an_error(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    for tool in ("g++", "ninja", "cc1plus", "ld", "as"):
        found = shutil.which(tool)
        if found:
            (empty / tool).symlink_to(found)
    done = build(tmp_path, LF_DENSE_FORCE_CUDA="1", PATH=str(empty), CUDA_HOME="")
    assert done.returncode != 0
    said = "LF_DENSE_FORCE_CUDA is set, but nvcc was not found (put it on the PATH or set CUDA_HOME)."
    assert done.stderr.strip().splitlines()[-1] == said


def test_a_folder_without_onnxruntimes_header_is_one_sentence(tmp_path):
    done = build(tmp_path, LF_DENSE_ONNXRUNTIME_INCLUDE=str(tmp_path))
    assert done.returncode != 0
    said = f"LF_DENSE_ONNXRUNTIME_INCLUDE is {tmp_path}, and there is no onnxruntime_c_api.h in it."
    assert done.stderr.strip().splitlines()[-1] == said
