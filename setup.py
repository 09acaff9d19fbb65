"""Builds the native operators; the metadata is in pyproject.toml.

The operators use torch's stable ABI and are plain shared libraries that ``lf_dense.backends.native`` loads; a
pybind11 module beside them reports the build. Everything compiles through one ninja file. What switches it is
listed in docs/operators.md.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPS = ROOT / "ops"
MIN_TORCH = (2, 11)
ABI_TARGET = "0x020b000000000000"
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"
CPU_SOURCES = [
    "schemas.cpp",
    *(f"cpu/{name}.cpp" for name in ("laplacian_kernel", "newton_schulz_inverse", "laplacian_attention")),
]
X86_SETS = {
    "avx512": (64, "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c -mprefer-vector-width=512"),
    "avx2": (32, "-mavx2 -mfma -mf16c"),
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


class CannotBuild(Exception):
    """Why there will be no native operators, as a clause."""


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no")


def find_torch() -> tuple[Path, str, str | None]:
    """Torch's folder, version and CUDA version."""
    if find_spec("torch") is None:
        raise CannotBuild(
            "torch cannot be imported while building (install torch first, then lf_dense with "
            "--no-build-isolation)"
        )
    import torch

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < MIN_TORCH:
        wanted = ".".join(map(str, MIN_TORCH))
        raise CannotBuild(f"torch is {torch.__version__}, and the operators need {wanted} or newer")
    return Path(torch.__file__).parent, torch.__version__, torch.version.cuda


def find_compiler() -> str:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise CannotBuild(
            f"there is no C++ compiler ({compiler} was not found: install g++, or name one in CXX)"
        )
    return compiler


def find_ninja() -> str:
    beside_python = Path(sys.executable).with_name("ninja")
    ninja = str(beside_python) if beside_python.exists() else shutil.which("ninja")
    if ninja is None:
        raise CannotBuild("ninja was not found (pip install ninja)")
    return ninja


def find_nvcc() -> str | None:
    in_home = Path(os.environ["CUDA_HOME"], "bin", "nvcc") if os.environ.get("CUDA_HOME") else None
    return str(in_home) if in_home and in_home.exists() else shutil.which("nvcc")


def architectures(requested: str) -> list[str]:
    """``-gencode`` options of a list like ``8.0;9.0+PTX``."""
    options = []
    for entry in re.split(r"[;,\s]+", requested.strip()):
        found = re.fullmatch(r"(\d+)\.(\d[a-z]?)(\+PTX)?", entry)
        if not found:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST is {requested!r}: write numbers like '8.0;9.0+PTX' ({entry!r} is not "
                "one)."
            )
        number = found[1] + found[2]
        options.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if found[3]:
            options.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return options


def version_line(command: str) -> str:
    lines = subprocess.run(
        [*shlex.split(command), "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return next((line for line in lines if "release" in line), lines[0])


class Ninja:
    """A ninja file in the making."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = [
            "rule compile",
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = C++ $out",
            "rule cuda",
            # The compiler's resource report stays beside the object; it is shown where the compilation fails.
            (
                "  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out > $out.report 2>&1 || (cat "
                "$out.report && false)"
            ),
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = CUDA $out",
            "rule link",
            "  command = $cxx -shared $in -o $out $flags",
            "  description = link $out",
            # nvcc knows where its runtime library lies.
            "rule cuda_link",
            "  command = $nvcc -shared $in -o $out $flags",
            "  description = link $out",
            "rule nothing",
            "  command = $cxx -shared -x c /dev/null -o $out -Wl,-soname,$soname",
            "  description = stand-in $out",
        ]

    def variable(self, name: str, value: str) -> None:
        self.lines.append(f"{name} = {value}")

    def build(self, rule: str, output: str, inputs: list[str], after: str = "", **variables: str) -> str:
        escaped = [str(path).replace(" ", "$ ").replace(":", "$:") for path in inputs]
        self.lines.append(f"build {output}: {rule} {' '.join(escaped)}" + (f" | {after}" if after else ""))
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]
        return output

    def run(self, ninja: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([ninja, "-C", str(self.folder), *jobs], check=False).returncode:
            raise SystemExit(
                "lf_dense's native operators did not compile; the compiler's message is above. "
                "LF_DENSE_NO_NATIVE=1 installs without them, on the plain PyTorch reference."
            )


class BuildOperators(build_ext):
    """``_operators_cpu.so``, ``_operators_cuda.so`` where CUDA is built, and the module that reports both."""

    def run(self) -> None:
        target = Path(ROOT if self.inplace else self.build_lib) / "lf_dense" / "backends"
        built: list[Path] = []
        if flag("LF_DENSE_NO_NATIVE"):
            print("LF_DENSE_NO_NATIVE is set: lf_dense is installed without native operators.")
        else:
            try:
                built = self.compile(Path(self.build_temp).resolve() / "ops")
            except CannotBuild as why:
                if flag("LF_DENSE_FORCE_CUDA"):
                    raise SystemExit(f"LF_DENSE_FORCE_CUDA is set, but {why}.") from None
                message = (
                    f"lf_dense is installed without native operators, since {why}: it runs the plain PyTorch "
                    "reference."
                )
                warnings.warn(message, stacklevel=1)
        target.mkdir(parents=True, exist_ok=True)
        for stale in [*target.glob("_operators_*.so"), *target.glob("_build_info.*")]:
            stale.unlink()
        self.outputs = [str(shutil.copy2(path, target)) for path in built]

    def get_outputs(self) -> list[str]:
        return getattr(self, "outputs", [])

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def compile(self, folder: Path) -> list[Path]:
        torch_folder, torch_version, torch_cuda = find_torch()
        compiler, ninja_command, nvcc = find_compiler(), find_ninja(), find_nvcc()
        include = f"-isystem {shlex.quote(str(torch_folder / 'include'))}"
        extra = os.environ.get("LF_DENSE_CXXFLAGS", "")
        base = f"-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra {extra}"
        stable = f"{base} -DTORCH_TARGET_VERSION={ABI_TARGET} {'-DLF_HAS_X86' if IS_X86 else ''} {include}"
        ninja = Ninja(folder)
        ninja.variable("cxx", compiler)

        vector = [
            ninja.build(
                "compile",
                f"vector_kernels_{name}.o",
                [OPS / "cpu/vector_kernels.cpp"],
                flags=f"{base} -ffp-contract=fast -DLF_ISA={name} -DLF_VECTOR_BYTES={size} {flags}",
            )
            for name, (size, flags) in {**(X86_SETS if IS_X86 else {}), "plain": (16, "")}.items()
        ]
        vector.append(
            ninja.build("compile", "instruction_set.o", [OPS / "cpu/instruction_set.cpp"], flags=stable)
        )
        objects = [
            ninja.build("compile", source.replace("/", "_") + ".o", [OPS / source], flags=stable)
            for source in CPU_SOURCES
        ]
        link = f"-L{shlex.quote(str(torch_folder / 'lib'))} -ltorch_cpu -lc10 {extra}"
        outputs = [ninja.build("link", "_operators_cpu.so", [*objects, *vector], flags=link)]

        cuda_version = cuda_architectures = ""
        if flag("LF_DENSE_FORCE_CUDA") and not nvcc:
            raise CannotBuild("nvcc was not found (put it on the PATH or set CUDA_HOME)")
        if torch_cuda and not nvcc:
            message = (
                "lf_dense's CUDA operators are not built, since nvcc was not found: CUDA tensors run the "
                "reference."
            )
            warnings.warn(message, stacklevel=1)
        if nvcc and (torch_cuda or flag("LF_DENSE_FORCE_CUDA")):
            cuda_architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
            cuda_version = version_line(nvcc)
            outputs.append(self.add_cuda(ninja, nvcc, torch_folder, cuda_architectures))

        report = {
            "COMPILER": version_line(compiler),
            "TORCH": torch_version,
            "TORCH_TARGET": ".".join(map(str, MIN_TORCH)),
            "CUDA": cuda_version,
            "CUDA_ARCHITECTURES": cuda_architectures,
        }
        defines = " ".join(shlex.quote(f'-DLF_BUILD_{key}="{value}"') for key, value in report.items())
        python = f"-isystem {shlex.quote(sysconfig.get_path('include'))}"
        module = ninja.build(
            "compile", "build_info.o", [OPS / "build_info.cpp"], flags=f"{base} {include} {python} {defines}"
        )
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        outputs.append(ninja.build("link", f"_build_info{suffix}", [module, *vector], flags=extra))
        ninja.run(ninja_command)
        return [folder / output for output in outputs]

    @staticmethod
    def add_cuda(ninja: Ninja, nvcc: str, torch_folder: Path, requested: str) -> str:
        ninja.variable("nvcc", nvcc)
        flags = (
            f"-std=c++20 -O3 -DUSE_CUDA -DTORCH_TARGET_VERSION={ABI_TARGET} "
            f"{' '.join(architectures(requested))} -isystem {shlex.quote(str(torch_folder / 'include'))} "
            "-Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v --threads 1"
        )
        sources = sorted((OPS / "cuda").glob("*.cu"))
        objects = [ninja.build("cuda", f"cuda_{source.stem}.o", [source], flags=flags) for source in sources]
        # The stream and the device guard are in libtorch_cuda; where torch is CPU-only an empty stand-in of
        # its name is linked, and the real one is found when the operators are loaded beside a CUDA torch.
        library, after = torch_folder / "lib", ""
        if not (library / "libtorch_cuda.so").exists():
            after = ninja.build("nothing", "stand_in/libtorch_cuda.so", [], soname="libtorch_cuda.so")
            Path(ninja.folder, "stand_in").mkdir(parents=True, exist_ok=True)
        link = (
            f"-L{shlex.quote(str(library))} -Lstand_in -ltorch_cpu -lc10 -Xlinker --no-as-needed -ltorch_cuda"
            f" -cudart static {' '.join(architectures(requested))}"
        )
        return ninja.build("cuda_link", "_operators_cuda.so", objects, after=after, flags=link)


setup(ext_modules=[Extension("lf_dense.backends._build_info", [])], cmdclass={"build_ext": BuildOperators})
