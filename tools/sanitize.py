"""Run the operator tests on operators compiled with AddressSanitizer and UndefinedBehaviorSanitizer, the emulated CUDA sources included.

Everything happens in a temporary copy of the sources; the checkout's own build stays as it is. The exit code
is 0 where every test passed and the sanitizers reported nothing.
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
# Those that exist are run. What the plain PyTorch reference computes is the other tests' business.
TESTS = ("tests/backends/test_mathematics.py", "tests/backends/test_native.py")
SELECTION = "not reference-cpu"
CXXFLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
# In the order in which they have to be loaded; libstdc++, so that AddressSanitizer finds the functions that
# it stands before.
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")


def copy_sources(folder: Path) -> None:
    """What is built and tested, without what was compiled before."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy2(source, folder / name)


def build(folder: Path) -> Path:
    """Compile the operators in the copied checkout; returns the CPU library."""
    # A GPU's code is not sanitized by this; where CUDA is built all the same, one architecture is enough.
    environment = {
        **os.environ,
        "LF_DENSE_CXXFLAGS": CXXFLAGS,
        "LF_DENSE_NO_NATIVE": "",
        "TORCH_CUDA_ARCH_LIST": "8.0",
    }
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, env=environment, check=False
    )
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
            f"sanitize needs a compiler that links the sanitizers as shared libraries, and {compiler} left"
            f" out {', '.join(missing)}."
        )
    return [match[1] for match in found.values()]


def run_tests(folder: Path, runtimes: list[str], reports: Path, selection: str) -> int:
    """pytest in the copied checkout, with the sanitizers loaded before Python; returns its exit code."""
    tests = [name for name in TESTS if (folder / name).exists()]
    if not tests:
        sys.exit(f"sanitize found none of its tests: {', '.join(TESTS)}.")
    # An abort, unlike an exit, lets pytest's fault handler say which test it was.
    common = f"abort_on_error=1:log_path={shlex.quote(str(reports / 'report'))}"
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        # Python keeps what it allocates until it ends, so that leaks cannot be told.
        "ASAN_OPTIONS": f"detect_leaks=0:{common}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:{common}",
        "LF_DENSE_CXXFLAGS": CXXFLAGS,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    # UndefinedBehaviorSanitizer, loaded beside the other, writes to stderr alone: pytest may not take that
    # away.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
        *tests,
        "-k",
        selection,
    ]
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
        sys.exit(
            f"sanitize failed: the sanitizers wrote {len(found)} report{'s' if len(found) > 1 else ''},"
            " above."
        )
    if code:
        sys.exit(
            f"sanitize failed: pytest ended with exit code {code}; its output, and any report of the"
            " sanitizers, is above."
        )
    print("sanitize passed: no report from AddressSanitizer or UndefinedBehaviorSanitizer.")


if __name__ == "__main__":
    main()
