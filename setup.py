"""Builds the native operators; the metadata is in pyproject.toml.

The operators use torch's stable ABI and are plain shared libraries that ``lf_dense.backends.native`` loads; a
pybind11 module beside them reports the build. A block's operators are built for onnxruntime and for OpenVINO
too, where their headers are, whether torch is there or not. Everything compiles through one ninja file. What
switches it is listed in docs/operators.md.
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
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
TORCH_SOURCES = ("schemas.cpp", "cpu/laplacian_kernel.cpp", "cpu/conv_gelu.cpp", "cpu/operators.cpp")
# These know nothing of torch.
SHARED_SOURCES = (
    "cpu/newton_schulz_inverse.cpp",
    "cpu/laplacian_attention.cpp",
    "cpu/projections.cpp",
    "cpu/conv_ffn.cpp",
    "cpu/narrow_layers.cpp",
    "cpu/instruction_set.cpp",
)
MIN_ONNXRUNTIME_API = 17  # of onnxruntime 1.17
RPATH_TO_OPENVINO = "-Wl,-rpath,'$$ORIGIN/../../openvino/libs'"  # ninja makes one $ of two
AVX512 = "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
X86_SETS = {
    "avx512bf16": (64, f"{AVX512} -mavx512bf16"),
    "avx512": (64, AVX512),
    "avx2": (32, "-mavx2 -mfma -mf16c"),
}
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")
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


def find_onnxruntime() -> tuple[str, str]:
    """Compiler and linker flags; onnxruntime's Python package has no headers."""
    name, variable = "onnxruntime_c_api.h", "LF_DENSE_ONNXRUNTIME_INCLUDE"
    named, package = os.environ.get(variable), find_spec("onnxruntime")
    folders = [Path(named or "")]
    if not named:
        # A package of onnxruntime that has it after all, conda's, a hand's and the distribution's.
        includes = (Path(sys.prefix, "include"), Path("/usr/local/include"), Path("/usr/include"))
        packages = [Path(package.origin).parent] if package and package.origin else []
        folders = [*packages, *(include / "onnxruntime" for include in includes)]
    header = next((found for folder in folders for found in sorted(folder.rglob(name))), None)
    if header is None and named:
        raise SystemExit(f"{variable} is {named}, and there is no {name} in it.")
    if header is None:
        raise CannotBuild(f"its header {name} was not found (name its folder in {variable})")
    version = re.search(r"#define ORT_API_VERSION (\d+)", header.read_text())
    if version is None or int(version[1]) < MIN_ONNXRUNTIME_API:
        raise CannotBuild(f"{header} is older than onnxruntime 1.{MIN_ONNXRUNTIME_API}")
    return f"-pthread -isystem {shlex.quote(str(header.parent))}", "-pthread"


def find_openvino(inplace: bool) -> tuple[str, str]:
    """Compiler and linker flags; an installed library looks for the package beside its own."""
    package = find_spec("openvino")
    if package is None or package.origin is None:
        raise CannotBuild("the package openvino is not there (pip install openvino)")
    folder = Path(package.origin).parent
    include, library = folder / "include", folder / "libs"
    # The package has no names without versions, which -l looks for.
    found = [sorted(library.glob(f"lib{name}.so*")) for name in ("openvino", "tbb")]
    headers = ("openvino/op/op.hpp", "openvino/frontend/onnx/extension/op.hpp", "tbb/parallel_for.h")
    if not all(found) or not all((include / name).exists() for name in headers):
        raise CannotBuild(f"the package openvino in {folder} comes without its C++ headers and libraries")
    link = [f"-L{shlex.quote(str(library))}", *(f"-l:{files[0].name}" for files in found)]
    link += [f"-Wl,-rpath,{shlex.quote(str(library))}" if inplace else RPATH_TO_OPENVINO]
    return f"-isystem {shlex.quote(str(include))}", " ".join(link)


def find_compiler() -> str:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise CannotBuild(
            f"there is no C++ compiler ({compiler} was not found: install g++, or name one in CXX)"
        )
    return compiler


def host_compiler() -> str:
    """nvcc's option for the compiler that CXX names, without a launcher such as ccache before it.

    What CXX passes to the compiler is passed on. Where CXX is not set, nvcc finds a compiler itself.
    """
    words = shlex.split(os.environ.get("CXX", ""))
    if len(words) > 1 and Path(words[0]).name in LAUNCHERS:
        words = words[1:]
    if not words:
        return ""
    options = [f"-Xcompiler {shlex.quote(word)}" for word in words[1:]]
    return " ".join([f"-ccbin {shlex.quote(words[0])}", *options])


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

    def run(self, ninja: str, outputs: list[str]) -> bool:
        """Make these; whether that went well."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        return not subprocess.run([ninja, "-C", str(self.folder), *jobs, *outputs], check=False).returncode


class BuildOperators(build_ext):
    """``_operators_cpu.so``, ``_operators_cuda.so`` where CUDA is built, and the module that reports both.

    ``_operators_onnxruntime.so`` and ``_operators_openvino.so`` have the nodes of ``ops/runtimes``.
    """

    def run(self) -> None:
        target = Path(ROOT if self.inplace else self.build_lib) / "lf_dense" / "backends"
        built: list[Path] = []
        if flag("LF_DENSE_NO_NATIVE"):
            print("LF_DENSE_NO_NATIVE is set: lf_dense is installed without native operators.")
        else:
            built = self.compile(Path(self.build_temp).resolve() / "ops")
        target.mkdir(parents=True, exist_ok=True)
        for stale in [*target.glob("_operators_*.so"), *target.glob("_build_info.*")]:
            stale.unlink()
        self.outputs = [str(shutil.copy2(path, target)) for path in built]

    def get_outputs(self) -> list[str]:
        return getattr(self, "outputs", [])

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def compile(self, folder: Path) -> list[Path]:
        """Compile what can be compiled here; a warning or a line says what cannot, and why."""
        outputs: list[str] = []
        try:
            torch = find_torch()
        except CannotBuild as why:
            self.without_torch(why)
            torch = None
        try:
            compiler, ninja_command = find_compiler(), find_ninja()
        except CannotBuild as why:
            if torch is not None:
                self.without_torch(why)
            return []
        runtimes = self.find_runtimes()
        extra = os.environ.get("LF_DENSE_CXXFLAGS", "")
        base = f"-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra {extra}"
        ninja = Ninja(folder)
        ninja.variable("cxx", compiler)
        vector, shared = self.add_shared(ninja, base)
        if torch is not None:
            try:
                outputs = self.add_torch(ninja, compiler, base, *torch, vector, shared)
            except CannotBuild as why:
                self.without_torch(why)
        if outputs and not ninja.run(ninja_command, outputs):
            raise SystemExit(
                "lf_dense's native operators did not compile; the compiler's message is above. "
                "LF_DENSE_NO_NATIVE=1 installs without them, on the plain PyTorch reference."
            )
        for runtime, (flags, link) in runtimes.items():
            library = self.add_runtime(ninja, runtime, f"{base} {flags}", link, [*shared, *vector])
            if ninja.run(ninja_command, [library]):
                outputs.append(library)
            else:
                self.without_runtime(runtime, "it did not compile; the compiler's message is above")
        return [folder / output for output in outputs]

    def find_runtimes(self) -> dict[str, tuple[str, str]]:
        """Compiler and linker flags of the runtimes that are there."""
        found = {}
        finders = {"onnxruntime": find_onnxruntime, "openvino": lambda: find_openvino(bool(self.inplace))}
        for runtime, find in finders.items():
            try:
                found[runtime] = find()
            except CannotBuild as why:
                self.without_runtime(runtime, why)
        return found

    @staticmethod
    def without_runtime(runtime: str, why: CannotBuild | str) -> None:
        # Most have no use for it: this is no warning.
        print(f"lf_dense's operators for {runtime} are not built, since {why}.", flush=True)

    @staticmethod
    def without_torch(why: CannotBuild) -> None:
        if flag("LF_DENSE_FORCE_CUDA"):
            raise SystemExit(f"LF_DENSE_FORCE_CUDA is set, but {why}.") from None
        message = (
            f"lf_dense is installed without native operators, since {why}: it runs the plain PyTorch "
            "reference."
        )
        warnings.warn(message, stacklevel=1)

    @staticmethod
    def add_shared(ninja: Ninja, base: str) -> tuple[list[str], list[str]]:
        """The objects of the inner loops, and those around them that know nothing of torch."""
        vector = [
            ninja.build(
                "compile",
                f"vector_kernels_{name}.o",
                [OPS / "cpu/vector_kernels.cpp"],
                flags=f"{base} -ffp-contract=fast -DLF_ISA={name} -DLF_VECTOR_BYTES={size} {flags}",
            )
            for name, (size, flags) in {**(X86_SETS if IS_X86 else {}), "plain": (16, "")}.items()
        ]
        flags = f"{base} {'-DLF_HAS_X86' if IS_X86 else ''}"
        objects = {
            source: ninja.build("compile", source.replace("/", "_") + ".o", [OPS / source], flags=flags)
            for source in SHARED_SOURCES
        }
        vector.append(objects.pop("cpu/instruction_set.cpp"))
        return vector, list(objects.values())

    def add_torch(
        self,
        ninja: Ninja,
        compiler: str,
        base: str,
        torch_folder: Path,
        torch_version: str,
        torch_cuda: str | None,
        vector: list[str],
        shared: list[str],
    ) -> list[str]:
        nvcc, extra = find_nvcc(), os.environ.get("LF_DENSE_CXXFLAGS", "")
        include = f"-isystem {shlex.quote(str(torch_folder / 'include'))}"
        stable = f"{base} -DTORCH_TARGET_VERSION={ABI_TARGET} {include}"
        objects = [
            ninja.build("compile", source.replace("/", "_") + ".o", [OPS / source], flags=stable)
            for source in TORCH_SOURCES
        ]
        link = f"-L{shlex.quote(str(torch_folder / 'lib'))} -ltorch_cpu -lc10 {extra}"
        outputs = [ninja.build("link", "_operators_cpu.so", [*objects, *shared, *vector], flags=link)]

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
        return outputs

    @staticmethod
    def add_runtime(ninja: Ninja, runtime: str, flags: str, link: str, objects: list[str]) -> str:
        source = OPS / "runtimes" / f"{runtime}.cpp"
        shell = ninja.build("compile", f"runtimes_{runtime}.o", [source], flags=flags)
        # A runtime may unload a library before the last of its objects is gone.
        extra = f"-Wl,-z,nodelete {os.environ.get('LF_DENSE_CXXFLAGS', '')}"
        return ninja.build("link", f"_operators_{runtime}.so", [shell, *objects], flags=f"{link} {extra}")

    @staticmethod
    def add_cuda(ninja: Ninja, nvcc: str, torch_folder: Path, requested: str) -> str:
        # As a rule runs it: to compile and to link with the same compiler.
        ninja.variable("nvcc", f"{nvcc} {host_compiler()}".strip())
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
