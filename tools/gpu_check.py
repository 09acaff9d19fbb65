"""Build the operators for this machine's GPU, test them on it, look for bad accesses and races, measure them.

Needs nvcc, a CUDA build of torch and pytest, and nothing else: no virtual environment, no network, none of
the mm packages. Every step has its share of the time; one that outruns it is ended, and the others still run.
Where nvdisasm is there, the attention's times stand beside what tools/read_kernels.py estimates. The exit
code is 0 where every step passed, 1 where one failed or ran out of time, and 2 where the machine cannot run
the check.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
MIN_TORCH = (2, 11)
MIN_CAPABILITY = (8, 0)
# Those that exist are run; they need torch and pytest alone.
TESTS = (
    "tests/backends/test_native.py",
    "tests/backends/test_mathematics.py",
    "tests/test_functional.py",
    "tests/test_attention.py",
)
GRACE_SECONDS = 3
# To start torch and ask it for its GPU; steps count the start of their own processes.
PROBE_SECONDS = 30
TAIL_LINES = 20
ESTIMATES = "estimates.json"
PASSED, FAILED, OUT_OF_TIME, LEFT_OUT = "passed", "FAILED", "OUT OF TIME", "left out"

PROBE = """
import json
found = {"setuptools": None, "torch": None, "pytest": None}
for name in found:
    try:
        found[name] = str(getattr(__import__(name), "__version__", "there"))
    except ImportError:
        pass
if found["torch"]:
    import torch
    found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found.update(gpu=torch.cuda.get_device_name(0), capability=torch.cuda.get_device_capability(0))
print(json.dumps(found))
"""
PROOF = """
import torch, lf_dense
from lf_dense import laplacian_attention, laplacian_kernel, newton_schulz_inverse
q = torch.randn(1, 2, 64, 32, device="cuda")
laplacian_attention(q, q, q, q[:, :, :16], backend="native")
newton_schulz_inverse(laplacian_kernel(q[:, :, :16], q[:, :, :16], backend="native"), backend="native")
torch.cuda.synchronize()
build = lf_dense.build_info()
print("PROVED", build["cuda"], "for", build["cuda_architectures"])
"""


class CannotCheck(Exception):
    """Why the check cannot run on this machine: a sentence."""


class Step(NamedTuple):
    """Commands that run one after the other, the seconds that they share, and a summary of their output."""

    title: str
    name: str
    commands: list[list[str]]
    seconds: float
    summarize: Callable[[str], str]
    environment: dict[str, str]
    # What runs beside them on the processor, and ends with them at the latest.
    beside: list[str] | None = None


class Outcome(NamedTuple):
    """A row of the table."""

    step: str
    result: str
    seconds: float
    detail: str


def probe() -> dict:
    """What this interpreter and the machine have.

    Raises:
        CannotCheck: something is missing.
    """
    nvcc = Path(os.environ.get("CUDA_HOME") or "/nowhere", "bin", "nvcc")
    if not nvcc.exists() and shutil.which("nvcc") is None:
        raise CannotCheck("gpu-check needs nvcc, and it was not found: put it on the PATH or set CUDA_HOME.")
    command = [PYTHON, "-W", "ignore", "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        raise CannotCheck(f"gpu-check got no answer from {PYTHON}'s torch in {PROBE_SECONDS} s.") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise CannotCheck(f"gpu-check could not ask {PYTHON} for its torch and GPU: {reason}")
    found = json.loads(done.stdout.splitlines()[-1])
    for package in ("torch", "pytest", "setuptools"):
        if not found[package]:
            raise CannotCheck(
                f"gpu-check needs {package}, and {PYTHON} cannot import it: name another interpreter in"
                " PYTHON."
            )
    if tuple(int(part) for part in re.findall(r"\d+", found["torch"])[:2]) < MIN_TORCH:
        raise CannotCheck(
            f"gpu-check needs torch {'.'.join(map(str, MIN_TORCH))} or newer, and {PYTHON} has"
            f" {found['torch']}."
        )
    if not found.get("gpu"):
        build = f"a build for CUDA {found['cuda']}" if found["cuda"] else "a CPU-only build"
        raise CannotCheck(f"gpu-check needs a GPU, and torch {found['torch']} ({build}) sees none.")
    if tuple(found["capability"]) < MIN_CAPABILITY:
        raise CannotCheck(
            f"gpu-check needs a GPU of compute capability {'.'.join(map(str, MIN_CAPABILITY))} or higher, "
            f"and this {found['gpu']} has {'.'.join(map(str, found['capability']))}."
        )
    return found


def pytest_detail(output: str) -> str:
    """``212 passed, 3 skipped`` of pytest's last line."""
    lines = re.findall(r"^=*\s*((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s", output, re.MULTILINE)
    counts = [count for count in lines[-1].split(", ") if "warning" not in count] if lines else []
    return ", ".join(counts) or "no summary"


def sanitizer_detail(output: str) -> str:
    """pytest's counts and compute-sanitizer's own summary."""
    found = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", output, re.MULTILINE)
    summary = found[-1].split(": ", 1)[1] if found else "no summary of compute-sanitizer"
    return f"{pytest_detail(output)}; {summary}"


def bench_detail(measurements: Path, output: str) -> str:
    """How many cases were measured, how native compares with the reference, and which contenders failed."""
    results = json.loads(measurements.read_text())["results"] if measurements.exists() else []
    cases = {tuple(map(str, (row["op"], row["pass"], row["size"], row["stage"]))) for row in results}
    parts = [f"{len(cases)} case{'' if len(cases) == 1 else 's'}"]
    ratios = [
        row["ratio_to_native"]
        for row in results
        if row["contender"] == "reference" and row["ratio_to_native"]
    ]
    if ratios:
        parts.append(f"reference at {min(ratios):.1f} to {max(ratios):.1f} x native's time")
    failed = sorted(
        {row["contender"] for row in results if (row["obstacle"] or "").startswith(("failed", "wrong"))}
    )
    if failed:
        parts.append(f"failures of {', '.join(failed)}")
    parts += estimated(measurements, results)
    return "; ".join(parts)


def estimated(measurements: Path, results: list[dict]) -> list[str]:
    """The attention's times beside what was read from its machine code."""
    rows = [row for row in results if row["op"] == "laplacian_attention" and row.get("median_ms")]
    ours = {shape_of(row): row["median_ms"] for row in rows if row["contender"] == "native"}
    peers = {shape_of(row): row["median_ms"] for row in rows if row["contender"] == "peer"}
    try:
        read = json.loads((measurements.parent / ESTIMATES).read_text())["results"]
    except (OSError, ValueError):
        read = []
    thought = {shape_of(row): row["estimated_ms"] for row in read}
    parts = []
    for shape, measured in ours.items():
        part = f"stage {shape[2]} {shape[4]} {measured:.3f} ms"
        if shape in thought:
            part += f", estimated {thought[shape]:.3f}"
        if shape in peers:
            part += f", peer {peers[shape]:.3f}"
        parts.append(part)
    if ours and not thought:
        parts.append("no estimate")
    return parts


def shape_of(row: dict) -> tuple:
    return (*row["size"], row["stage"], row["landmarks"], row["pass"])


def build_detail(output: str) -> str:
    proved = re.search(r"^PROVED (.+)$", output, re.MULTILINE)
    return proved[1] if proved else "not proved"


ALL_BUT_COMPILE = "--contenders native reference sdpa sra linear-sra"
# Title, seconds, options of tools/benchmark.py ops.
BENCHMARKS = (
    (
        "224x224",
        25,
        f"--sizes 224x224 --ops laplacian_attention --passes forward --max-seconds 2 {ALL_BUT_COMPILE}",
    ),
    ("800x1333 stage 1", 115, "--sizes 800x1333 --stages 1 --max-seconds 4 --max-compile-seconds 20"),
    # The quadratic attention's backward pass alone would take the whole step.
    (
        "2048x2048 stage 1",
        25,
        (
            "--sizes 2048x2048 --stages 1 --ops laplacian_attention --max-seconds 3 --max-macs 1e13"
            f" {ALL_BUT_COMPILE}"
        ),
    ),
)


def plan(capability: str, out: Path, against: Path | None = None) -> list[Step]:
    """Every step in order; together they stay below ten minutes.

    Args:
        capability: of the GPU, like ``9.0``.
        out: where measurements go.
        against: a file with the function of a peer to time beside the operators.
    """
    architecture = f"sm_{capability.replace('.', '')}"
    tests = [name for name in TESTS if (ROOT / name).exists()]
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    build = {
        "LF_DENSE_FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": capability,
        "LF_DENSE_NO_NATIVE": "",
        "LF_DENSE_CXXFLAGS": "",
    }
    steps = [
        Step(
            "build",
            "build",
            [[PYTHON, "setup.py", "build_ext", "--inplace"], [PYTHON, "-c", PROOF]],
            100,
            build_detail,
            build,
        ),
        # Where there is a GPU, the emulation of the CUDA sources on the CPU has nothing to add, nor has the
        # reference there.
        Step(
            "operator tests",
            "tests",
            [[*pytest, *tests, "-k", "not emulated-cpu and not reference-cpu"]],
            140,
            pytest_detail,
            {},
            [PYTHON, "tools/read_kernels.py", "--arch", architecture, "--json", str(out / ESTIMATES)],
        ),
    ]
    # Kernels of the namespace lf alone. What torch asks of the driver and does not get is no error.
    sanitizer = [
        "compute-sanitizer",
        "--error-exitcode",
        "9",
        "--report-api-errors",
        "no",
        "--kernel-name",
        "kns=_ZN2lf",
    ]
    selection = [*pytest, "tests/backends/test_native.py", "-k", "sanitizer_selection and native-cuda"]
    for tool in ("memcheck", "racecheck"):
        # Each tensor an allocation of its own, or a read beyond one would end in another.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        commands = [[*sanitizer, "--tool", tool, *selection]]
        steps.append(Step(f"compute-sanitizer {tool}", tool, commands, 50, sanitizer_detail, environment))
    for title, seconds, options in BENCHMARKS:
        name = f"bench_{title.replace(' ', '_')}"
        measurements = out / f"{name}.json"
        command = [
            PYTHON,
            "tools/benchmark.py",
            "ops",
            "--device",
            "cuda",
            "--landmarks",
            "49",
            "--json",
            str(measurements),
            *options.split(),
            *(["--peer", str(against)] if against else []),
        ]
        steps.append(
            Step(
                f"benchmark {title}",
                name,
                [command],
                seconds,
                functools.partial(bench_detail, measurements),
                {},
            )
        )
    return steps


def run_command(command: list[str], log: Path, seconds: float, environment: dict[str, str]) -> int | None:
    """Run a command in a process group of its own and append its output to ``log``.

    Returns:
        The exit code, or None where the command was ended.
    """
    with launched(command, log, environment) as process:
        try:
            return process.wait(timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            # An interrupt first: pytest then still says what it has done.
            end_group(process, signal.SIGINT)
            return None


@contextlib.contextmanager
def launched(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """Start a command in a process group of its own, append its output to ``log``, and end it afterwards."""
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", **environment}
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            yield process
        finally:
            end_group(process, signal.SIGKILL)


def running(command: list[str] | None, log: Path) -> contextlib.AbstractContextManager:
    """Run a command that nobody waits for, where there is one, at the lowest priority."""
    if command is None:
        return contextlib.nullcontext()
    return launched(["nice", "-n", "19", *command], log, {"CUDA_VISIBLE_DEVICES": ""})


def end_group(process: subprocess.Popen, how: signal.Signals) -> None:
    """Send a signal to the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE_SECONDS)


def run_step(step: Step, out: Path) -> Outcome:
    """Run a step's commands until one fails or the time is up."""
    log = out / f"{step.name}.log"
    missing = next((command[0] for command in step.commands if shutil.which(command[0]) is None), None)
    if missing:
        return Outcome(step.title, LEFT_OUT, 0.0, f"{missing} is not installed")
    started = time.monotonic()
    result = PASSED
    with running(step.beside, out / f"{step.name}_beside.log"):
        for command in step.commands:
            code = run_command(command, log, step.seconds - (time.monotonic() - started), step.environment)
            if code != 0:
                result = OUT_OF_TIME if code is None else FAILED
                break
    output = log.read_text(errors="replace")
    seconds = time.monotonic() - started
    if "Device not supported" in output and step.commands[0][0] == "compute-sanitizer":
        return Outcome(step.title, LEFT_OUT, seconds, "compute-sanitizer does not support this device here")
    detail = step.summarize(output)
    if result == OUT_OF_TIME:
        detail = f"ended after {step.seconds:g} s; {detail}"
    if result != PASSED:
        print("\n".join(output.splitlines()[-TAIL_LINES:]))
        detail += f"; see {log}"
    return Outcome(step.title, result, seconds, detail)


def run_steps(steps: list[Step], out: Path) -> list[Outcome]:
    """Every step; where the first, the build, did not succeed, the others have nothing to check."""
    outcomes = []
    for number, step in enumerate(steps, 1):
        if outcomes and outcomes[0].result != PASSED:
            outcomes.append(Outcome(step.title, LEFT_OUT, 0.0, "the build did not succeed"))
            continue
        print(f"[{number}/{len(steps)}] {step.title}, at most {step.seconds:g} s", flush=True)
        outcomes.append(run_step(step, out))
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    lines = ["| step | result | seconds | detail |", "|---|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {row.step} | {row.result} | {row.seconds:.0f} | {row.detail} |" for row in outcomes)]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "work_dirs" / "gpu_check",
        help="for the logs, the measurements and the table",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE.py",
        help="a peer's attention(q, k, v, landmarks, scale, iters, eps, tau), timed in the same run",
    )
    args = parser.parse_args(argv)
    if args.against and not args.against.is_file():
        print(f"error: --against {args.against} is not there.", file=sys.stderr)
        return 2
    try:
        found = probe()
    except CannotCheck as why:
        print(f"error: {why}", file=sys.stderr)
        return 2
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    for stale in [*out.glob("*.log"), *out.glob("bench_*.json"), out / "table.md", out / ESTIMATES]:
        stale.unlink(missing_ok=True)
    capability = ".".join(map(str, found["capability"]))
    against = args.against.absolute() if args.against else None
    outcomes = run_steps(plan(capability, out, against), out)
    heading = f"{found['gpu']}, compute capability {capability}, torch {found['torch']}"
    report = f"{heading}\n\n{table(outcomes)}"
    (out / "table.md").write_text(report + "\n", encoding="utf-8")
    print(f"\n{report}")
    return 1 if any(outcome.result in (FAILED, OUT_OF_TIME) for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
