"""The command ``ops``, from its options to its tables, its JSON and its exit code."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from lf_dense.backends import native
from lf_dense.benchmark import contenders, operators, options
from lf_dense.errors import UsageError, run_tool
from support import ROOT
from support.driving import command

FIELDS = {
    "op",
    "pass",
    "size",
    "stage",
    "batch_size",
    "heads",
    "head_dims",
    "tokens",
    "landmarks",
    "contender",
    "obstacle",
    "median_ms",
    "min_ms",
    "max_ms",
    "samples",
    "calls_per_sample",
    "timing",
    "ratio_to_native",
    "ratio_to_floor",
    "peak_bytes",
    "max_relative_error",
    "tolerance",
    "checked_against",
    "compile_seconds",
}
OPS_ON_CPU = ("ops", "--device", "cpu", "--quick")
KERNEL_ALONE = (*OPS_ON_CPU, "--ops", "laplacian_kernel", "--passes", "forward", "--stages", "1")


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "found.json"
    arguments = command("benchmark.py", *OPS_ON_CPU, "--threads", "1", "--json", path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text()), time.perf_counter() - started


def test_quick_is_quick(quick_run):
    assert quick_run[2] < 30


def test_json_has_what_was_measured(quick_run):
    _, found, _ = quick_run
    assert set(found) == {
        "date",
        "device",
        "device_name",
        "threads",
        "torch",
        "dtype",
        "batch_size",
        "native",
        "results",
    }
    assert (found["device"], found["threads"], found["torch"], found["dtype"]) == (
        "cpu",
        1,
        torch.__version__,
        "float32",
    )
    assert found["native"]["used"] is (found["native"]["obstacle"] is None)
    assert all(set(record) == FIELDS for record in found["results"])
    assert {record["op"] for record in found["results"]} == {
        "laplacian_kernel",
        "newton_schulz_inverse",
        "laplacian_attention",
    }
    assert {record["pass"] for record in found["results"]} == {"forward", "forward+backward"}
    attentions = {record["contender"] for record in found["results"] if record["op"] == "laplacian_attention"}
    assert attentions == {"reference", "sdpa", "sra", "linear-sra"} | (
        {"native"} if found["native"]["used"] else set()
    )
    for record in found["results"]:
        assert record["obstacle"] is None
        assert 0 < record["min_ms"] <= record["median_ms"] <= record["max_ms"]
        assert record["samples"] >= 3
        assert record["peak_bytes"] >= 0
        if record["contender"] in ("native", "reference"):
            assert record["peak_bytes"] > 0
            assert record["max_relative_error"] <= record["tolerance"]
            assert record["checked_against"] == "float64"
        assert (record["ratio_to_native"] is None) is not found["native"]["used"]


def test_table_has_a_row_for_every_case(quick_run):
    printed, found, _ = quick_run
    assert found["device_name"] in printed.splitlines()[0]
    for op in ("laplacian_kernel", "newton_schulz_inverse", "laplacian_attention"):
        heading, rule, *rows = printed.split(f"### {op}\n\n")[1].split("\n\n")[0].splitlines()
        cases = {(record["stage"], record["pass"]) for record in found["results"] if record["op"] == op}
        assert len(rows) == len(cases)
        assert {line.count("|") for line in (heading, rule, *rows)} == {heading.count("|")}
        assert all(" ms, " in row and " MiB" in row and "reference " in row for row in rows)


def test_torch_alone_is_needed():
    code = """
import sys
class NoFrameworks:
    def find_spec(self, name, *unused):
        if name.split(".")[0] in ("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain"):
            raise ModuleNotFoundError(f"{name} was asked for")
sys.meta_path.insert(0, NoFrameworks())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "mmengine" else find_spec(name, *rest)
import runpy
sys.argv = ["benchmark.py", *sys.argv[1:]]
runpy.run_path("tools/benchmark.py", run_name="__main__")
"""
    arguments = [sys.executable, "-W", "ignore", "-c", code, *KERNEL_ALONE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "### laplacian_kernel" in done.stdout


@pytest.mark.parametrize("name", ["backbone", "step"])
def test_the_other_commands_say_that_they_need_mmengine(exit_code, monkeypatch, capsys, name):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    assert exit_code(name) == 2
    sentence = f"error: the command '{name}' needs mmengine, which is not installed: pip "
    assert capsys.readouterr().err.startswith(sentence)


def test_missing_native_operators_are_said_and_left_out(exit_code, monkeypatch, capsys):
    monkeypatch.setattr(native, "obstacle", lambda *unused, **wide: "they were not built for cpu")
    assert exit_code(*KERNEL_ALONE) == 0
    printed = capsys.readouterr().out
    assert "The native operators' columns are left out, since they were not built for cpu.\n" in printed
    assert "| pass | reference | error |" in printed
    assert " x" not in printed.splitlines()[-1].replace("64x96", "")


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_contender_is_not_timed_and_ends_with_an_error(
    exit_code, monkeypatch, capsys, tmp_path, factor
):
    right = contenders.implementation
    monkeypatch.setattr(native, "obstacle", lambda *unused, **wide: None)
    monkeypatch.setattr(contenders, "has_floor", lambda *unused: False)

    def implementation(case, name):
        if name == "native":
            return lambda x, y: factor * right(case, "reference")(x, y)
        return right(case, name)

    monkeypatch.setattr(contenders, "implementation", implementation)
    path = tmp_path / "found.json"
    assert exit_code(*KERNEL_ALONE, "--json", str(path)) == 1
    captured = capsys.readouterr()
    assert "| wrong: error " in captured.out
    assert captured.err.startswith(
        "error: native laplacian_kernel (forward) at 64x96, stage 1, 49 landmarks: wrong: error "
    )
    (wrong,) = [
        record for record in json.loads(path.read_text())["results"] if record["contender"] == "native"
    ]
    assert wrong["median_ms"] is wrong["ratio_to_native"] is None
    assert wrong["obstacle"].startswith("wrong: ")


def test_a_run_that_is_cut_short_leaves_its_finished_cases(exit_code, monkeypatch, tmp_path):
    measure, measured = operators.measure, []

    def interrupted(case, *rest):
        if measured:
            raise KeyboardInterrupt
        measured.append(case)
        return measure(case, *rest)

    monkeypatch.setattr(operators, "measure", interrupted)
    path = tmp_path / "found.json"
    with pytest.raises(KeyboardInterrupt):
        exit_code(*OPS_ON_CPU, "--contenders", "reference", "--json", str(path))
    (record,) = json.loads(path.read_text())["results"]
    assert (record["op"], record["pass"], record["size"]) == ("laplacian_kernel", "forward", [64, 96])
    assert list(tmp_path.iterdir()) == [path]


def test_what_would_take_forever_is_skipped(exit_code, capsys):
    one_case = ("--ops", "laplacian_attention", "--passes", "forward", "--stages", "1", "--max-macs", "1e6")
    assert exit_code(*OPS_ON_CPU, *one_case, "--contenders", "reference", "sdpa", "linear-sra") == 0
    row = capsys.readouterr().out.splitlines()[-1]
    # 384 tokens to 384 keys of 64 channels, twice.
    assert "| skipped: 1.9e+07 multiply-adds, above --max-macs 1e+06 |" in row
    assert row.count("skipped") == 2


def test_a_failed_compilation_is_an_entry(exit_code, monkeypatch, capsys):
    def fail(*unused, **how):
        assert how == {"dynamic": False}
        raise RuntimeError(
            "backend='inductor' raised:\nno compiler | found\n\nSet TORCHDYNAMO_VERBOSE=1 for more"
        )

    monkeypatch.setattr(torch, "compile", fail)
    assert exit_code(*KERNEL_ALONE, "--contenders", "reference", "compile") == 0
    assert "| failed: backend='inductor' raised: no compiler / found |" in capsys.readouterr().out


def test_the_compiled_reference_is_compared_and_timed(exit_code, tmp_path):
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("torch.compile finds no C++ compiler")
    path = tmp_path / "found.json"
    assert exit_code(*KERNEL_ALONE, "--contenders", "reference", "compile", "--json", str(path)) == 0
    _, compiled = json.loads(path.read_text())["results"]
    assert compiled["obstacle"] is None
    assert compiled["max_relative_error"] <= compiled["tolerance"]
    assert 0 < compiled["median_ms"] < compiled["compile_seconds"] * 1e3


def test_quick_changes_defaults_and_leaves_what_was_asked_for(ops_options):
    usual, quick = ops_options(), ops_options("--quick", "--repeats", "7")
    assert (usual.repeats, usual.max_seconds, usual.landmarks) == (50, 10.0, [49, 196])
    assert (quick.repeats, quick.max_seconds, quick.landmarks) == (7, 0.5, [49])
    assert "compile" in usual.contenders
    assert "compile" not in quick.contenders
    assert ops_options("--repeats", "7", "--quick") == quick
    assert (usual.max_macs, ops_options("--max-macs", "3").max_macs) == (1e12, 3.0)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--foo"], "unrecognized arguments: --foo"),
        (["--sizes", "12x12"], "'12x12' is not an image size of at least 32 x 32, like 800x1333"),
        (["--landmarks", "50"], "'50' is not the number of landmarks of a square grid, like 49 or 196"),
        (["--repeats", "0"], "'0' is not a whole number, at least 1"),
        (["--max-macs", "nan"], "'nan' is not a positive number"),
        (["--contenders", "magic"], "invalid choice: 'magic'"),
        (["--device", "nowhere"], "--device nowhere is no device: use cpu, cuda or cuda:N."),
        (["--device", "cuda:63"], "--device cuda:63 is not there"),
        (["--device", "meta"], "--device meta cannot be measured"),
        (["--json", "no/such/folder/x.json"], "does not exist: make it first."),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(exit_code, capsys, argv, sentence):
    assert exit_code("ops", *argv) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("argv", [["--traceback", "ops"], ["ops", "--traceback"]])
def test_a_traceback_is_shown_where_it_is_asked_for(benchmark_tool, monkeypatch, argv):
    argv = [*argv, "--device", "nowhere"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *argv])
    with pytest.raises(UsageError, match="--device nowhere is no device"):
        run_tool(lambda: benchmark_tool.main(argv))
