"""The check on a GPU machine: its refusals, its time limits, and what it makes of the output of its steps."""

import json
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
import torch

from lf_dense.benchmark import operators
from lf_dense.errors import UsageError
from support import ROOT
from support.driving import load_tool

TOOLS = ROOT / "tools"


@pytest.fixture(scope="module")
def gpu_check():
    return load_tool("gpu_check")


@pytest.fixture
def nvcc_path(tmp_path):
    """A PATH whose nvcc does nothing."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    return str(nvcc.parent)


def refusal(python=sys.executable, **environment):
    """The one line of a check that cannot run."""
    command = [python, str(TOOLS / "gpu_check.py"), "--out", "/nowhere"]
    environment = {**os.environ, "CUDA_HOME": "", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_without_nvcc_it_says_so(tmp_path):
    expected = "error: gpu-check needs nvcc, and it was not found: put it on the PATH or set CUDA_HOME."
    assert refusal(PATH=str(tmp_path)) == expected


def test_without_a_gpu_it_says_so(nvcc_path):
    said = refusal(PATH=nvcc_path)
    assert re.fullmatch(
        rf"error: gpu-check needs a GPU, and torch {re.escape(torch.__version__)} \(.+\) sees none\.", said
    )


def test_without_torch_it_says_so(tmp_path, nvcc_path):
    venv.EnvBuilder(with_pip=False, symlinks=True).create(tmp_path / "env")
    python = str(tmp_path / "env" / "bin" / "python")
    expected = (
        f"error: gpu-check needs torch, and {python} cannot import it: name another interpreter in PYTHON."
    )
    assert refusal(python, PATH=nvcc_path) == expected


def step(gpu_check, name, code, seconds=30):
    return gpu_check.Step(
        name,
        name,
        [[sys.executable, "-c", code]],
        seconds,
        lambda output: output.strip().replace("\n", " "),
        {},
    )


def test_a_step_out_of_time_is_ended_with_what_it_started_and_the_others_run(
    gpu_check, tmp_path, capsys, monkeypatch
):
    child = "import time; time.sleep(60)"
    # The child ignores the interrupt, as a compiler that hangs might.
    hanging = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", {child!r}]).pid, flush=True)
time.sleep(60)
"""
    steps = [
        step(gpu_check, "build", "print('done')"),
        step(gpu_check, "hanging", hanging, seconds=2),
        step(gpu_check, "failing", "import sys; print('no'); sys.exit(3)"),
        step(gpu_check, "last", "print('still here')"),
        gpu_check.Step("tool", "tool", [["/nowhere/compute-sanitizer"]], 1, str, {}),
    ]
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.5)
    started = time.monotonic()
    outcomes = gpu_check.run_steps(steps, tmp_path)
    assert time.monotonic() - started < 30
    assert [outcome.result for outcome in outcomes] == [
        "passed",
        "OUT OF TIME",
        "FAILED",
        "passed",
        "left out",
    ]
    assert outcomes[1].detail.startswith("ended after 2 s; ")
    assert outcomes[3].detail == "still here"
    assert outcomes[4].detail == "/nowhere/compute-sanitizer is not installed"
    pid = (tmp_path / "hanging.log").read_text().strip()
    state = Path("/proc", pid, "status")
    assert not state.exists() or "zombie" in state.read_text()
    assert "no" in capsys.readouterr().out
    table = gpu_check.table(outcomes).splitlines()
    assert table[0] == "| step | result | seconds | detail |"
    assert len(table) == 2 + len(steps)


def test_without_a_build_nothing_else_runs(gpu_check, tmp_path):
    steps = [step(gpu_check, "build", "raise SystemExit(1)"), step(gpu_check, "tests", "print(1)")]
    assert [outcome.result for outcome in gpu_check.run_steps(steps, tmp_path)] == ["FAILED", "left out"]


def test_details_are_read_from_the_output(gpu_check, tmp_path):
    tests = "....\n3 failed, 212 passed, 3 skipped, 40 deselected, 67 warnings in 101.52s (0:01:41)\n"
    assert gpu_check.pytest_detail(tests) == "3 failed, 212 passed, 3 skipped, 40 deselected"
    assert gpu_check.pytest_detail("!!! KeyboardInterrupt !!!\n") == "no summary"
    race = tests + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert gpu_check.sanitizer_detail(race).endswith("deselected; 0 hazards displayed (0 errors, 0 warnings)")
    assert (
        gpu_check.sanitizer_detail("1 passed in 2.00s\n========= ERROR SUMMARY: 2 errors\n")
        == "1 passed; 2 errors"
    )
    case = {"op": "laplacian_kernel", "pass": "forward", "size": [224, 224], "stage": 1, "obstacle": None}
    contenders = [("native", 1.0, None), ("reference", 4.25, None), ("compile", None, "failed: no")]
    results = [
        {**case, "contender": name, "ratio_to_native": ratio, "obstacle": obstacle}
        for name, ratio, obstacle in contenders
    ]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"results": results}))
    assert (
        gpu_check.bench_detail(path, "")
        == "1 case; reference at 4.2 to 4.2 x native's time; failures of compile"
    )
    assert gpu_check.bench_detail(tmp_path / "none.json", "") == "0 cases"


def test_times_stand_beside_estimates_and_a_peers(gpu_check, tmp_path):
    shape = {"size": [800, 1333], "stage": 1, "landmarks": 49, "pass": "forward"}
    times = {"native": 0.2, "peer": 0.3}
    rows = [
        {**shape, "op": "laplacian_attention", "contender": name, "median_ms": time}
        | {"ratio_to_native": time / 0.2, "obstacle": None}
        for name, time in times.items()
    ]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"results": rows}))
    assert gpu_check.bench_detail(path, "") == "1 case; stage 1 forward 0.200 ms, peer 0.300; no estimate"
    (tmp_path / gpu_check.ESTIMATES).write_text(json.dumps({"results": [{**shape, "estimated_ms": 0.19}]}))
    expected = "1 case; stage 1 forward 0.200 ms, estimated 0.190, peer 0.300"
    assert gpu_check.bench_detail(path, "") == expected


def test_what_runs_beside_a_step_ends_with_it(gpu_check, tmp_path):
    hanging = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    slow = step(gpu_check, "slow", "import time; time.sleep(2); print('done')")._replace(beside=hanging)
    started = time.monotonic()
    assert gpu_check.run_step(slow, tmp_path).result == "passed"
    assert time.monotonic() - started < 30
    pid = (tmp_path / "slow_beside.log").read_text().strip()
    state = Path("/proc", pid, "status")
    assert pid
    assert not state.exists() or "zombie" in state.read_text()


def test_a_peer_takes_part_in_the_benchmark(gpu_check, tmp_path, capsys):
    peer = tmp_path / "peer.py"
    peer.write_text("""
from lf_dense import laplacian_attention

def attention(q, k, v, landmarks, scale, iters, eps, tau):
    return laplacian_attention(q, k, v, landmarks, backend="reference")
""")
    (command,) = gpu_check.plan("9.0", tmp_path, peer)[4].commands
    words = ["cpu" if word == "cuda" else word for word in command[2:]]
    assert words[-2:] == ["--peer", str(peer)]
    options = "--device cpu --ops laplacian_attention --passes forward --quick --contenders native --stages 4"
    benchmark = load_tool("benchmark")
    assert benchmark.main(["ops", *options.split(), "--peer", str(peer)]) == 0
    assert "| peer |" in capsys.readouterr().out
    peer.write_text("attend = None\n")
    with pytest.raises(UsageError, match=r"^--peer .+ has no attention to call: .+\.$"):
        benchmark.main(["ops", *options.split(), "--peer", str(peer)])


def test_the_plan_fits_ten_minutes_and_the_benchmarks_options_exist(gpu_check, tmp_path):
    steps = gpu_check.plan("9.0", tmp_path)
    ours = sum(step.seconds + 2 * gpu_check.GRACE_SECONDS for step in steps)
    assert gpu_check.PROBE_SECONDS + ours < 600
    assert [step.name for step in steps][:4] == ["build", "tests", "memcheck", "racecheck"]
    assert len({step.name for step in steps}) == len(steps)
    benchmark = load_tool("benchmark")
    for step in steps[4:]:
        (command,) = step.commands
        words = ["cpu" if word == "cuda" else word for word in command[2:]]
        args = operators.settle(benchmark.parse_args(words))
        assert "compile" not in args.contenders or args.stages == [1]
        assert list(operators.chosen_cases(args))
