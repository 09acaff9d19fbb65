"""Run the operator tests on operators compiled with AddressSanitizer and UndefinedBehaviorSanitizer.

The emulated CUDA sources are included, and so is the library for ONNX Runtime, where it can be built.
Everything happens in a temporary copy of the sources, so the build in the checkout stays as it is. The exit
code is 0 if every test passed and the sanitizers reported nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "lf_dense", "ops", "tests")
# Those that exist are run.
TESTS = (
    *(f"tests/backends/test_{name}.py" for name in ("mathematics", "native", "layers")),
    "tests/export/test_libraries.py",
)
# Other tests cover the plain PyTorch reference. OpenVINO's threads come by a dlopen (RTLD_DEEPBIND) that
# AddressSanitizer refuses; ONNX Runtime's library is made of the same table and loops.
SELECTION = "not reference-cpu and not openvino"
CXXFLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
# They are loaded in this order. AddressSanitizer looks up the functions that it wraps in libstdc++.
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")


def copy_sources(folder: Path) -> None:
    """Copy what is built and tested, without what was compiled before."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy2(source, folder / name)


def build(folder: Path) -> Path:
    """Compile the operators in the copied checkout, and return the CPU library."""
    # The sanitizers do not cover a GPU's code: if CUDA is built all the same, one architecture is enough.
    environment = {
        **os.environ,
        "LF_DENSE_CXXFLAGS": CXXFLAGS,
        "LF_DENSE_NO_NATIVE": "",
        "TORCH_CUDA_ARCH_LIST": "8.0",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=environment, check=False)
    library = folder / "lf_dense" / "backends" / "_operators_cpu.so"
    if done.returncode or not library.exists():
        sys.exit("sanitize could not compile the operators; the reason is above.")
    return library


def find_runtimes(library: Path) -> list[str]:
    """The sanitizers' libraries as the compiled operators name them."""
    needed = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    found = {name: re.search(rf"{re.escape(name)}\S* => (\S+)", needed) for name in RUNTIMES}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        compiler = os.environ.get("CXX", "g++")
        sys.exit(
            "sanitize needs a compiler that links the sanitizers as shared libraries, "
            f"and {compiler} left out {', '.join(missing)}."
        )
    return [match[1] for match in found.values()]


def run_tests(folder: Path, runtimes: list[str], reports: Path, selection: str) -> int:
    """Run pytest in the copied checkout, with the sanitizers loaded before Python; return its exit code."""
    tests = [name for name in TESTS if (folder / name).exists()]
    if not tests:
        sys.exit(f"sanitize found none of its tests: {', '.join(TESTS)}.")
    # After an abort, unlike after an exit, pytest's fault handler says which test it was.
    common = f"abort_on_error=1:log_path={shlex.quote(str(reports / 'report'))}"
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        # Python keeps what it allocates until it ends, so leaks cannot be detected.
        "ASAN_OPTIONS": f"detect_leaks=0:{common}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:{common}",
        "LF_DENSE_CXXFLAGS": CXXFLAGS,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    # Beside the other, UndefinedBehaviorSanitizer writes to stderr alone: pytest must not capture that.
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys"]
    command = [*pytest, *tests, "-k", selection]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "-k",
        default=SELECTION,
        metavar="EXPRESSION",
        help="which tests, as pytest takes it (default: %(default)r)",
    )
    args = parser.parse_args()
    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"sanitize needs a C++ compiler, and {compiler} was not found: install g++, or name one in CXX."
        )
    with tempfile.TemporaryDirectory(prefix="lf_dense_sanitize_") as name:
        folder, reports = Path(name, "checkout"), Path(name, "reports")
        folder.mkdir()
        reports.mkdir()
        copy_sources(folder)
        print("compiling the operators with the sanitizers", flush=True)
        runtimes = find_runtimes(build(folder))
        code = run_tests(folder, runtimes, reports, args.k)
        found = [path.read_text(errors="replace") for path in sorted(reports.iterdir())]
    if found:
        print("\n".join(found), file=sys.stderr)
        reports_word = "reports" if len(found) > 1 else "report"
        sys.exit(f"sanitize failed: the sanitizers wrote {len(found)} {reports_word}, above.")
    if code:
        sys.exit(
            f"sanitize failed: pytest ended with exit code {code}; "
            "its output, and any report of the sanitizers, is above."
        )
    print("sanitize passed: no report from AddressSanitizer or UndefinedBehaviorSanitizer.")


if __name__ == "__main__":
    main()
