"""The benchmark of the operators: its shapes, its measuring, its table and its JSON."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from torch.nn import functional as F

from lf_dense import LaplacianAttention
from support import ROOT
from support.driving import load_tool

TOOL = ROOT / "tools" / "bench_ops.py"
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
KERNEL_ALONE = [
    "--device",
    "cpu",
    "--quick",
    "--ops",
    "laplacian_kernel",
    "--passes",
    "forward",
    "--stages",
    "1",
]


@pytest.fixture(scope="module")
def bench():
    return load_tool("bench_ops")


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "found.json"
    command = [sys.executable, str(TOOL), "--device", "cpu", "--quick", "--threads", "1", "--json", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text()), time.perf_counter() - started


def cases_of(bench, *argv):
    return list(bench.build_cases(bench.parse_args(["--device", "cpu", *argv])))


def problem_of(bench, *argv):
    (case,) = cases_of(bench, *argv)
    return bench.build_problem(case, torch.float32, torch.device("cpu"))


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


def test_shapes_are_the_backbones(bench):
    found = {
        (case.size, case.stage): case
        for case in cases_of(
            bench, "--ops", "laplacian_attention", "--passes", "forward", "--landmarks", "49"
        )
    }
    tokens = {
        size: [found[size, stage].tokens for stage in range(1, 5)]
        for size in [(224, 224), (800, 1333), (2048, 2048)]
    }
    assert tokens[224, 224] == [3136, 784, 196, 49]
    assert tokens[800, 1333] == [66800, 16700, 4200, 1050]
    assert tokens[2048, 2048] == [262144, 65536, 16384, 4096]
    assert [found[(224, 224), stage].heads for stage in range(1, 5)] == [1, 2, 5, 8]
    assert {case.head_dims for case in found.values()} == {64}


def test_presets_agree_with_the_backbone(bench):
    pytest.importorskip("mmengine")
    from lf_dense.presets import ARCHS

    assert {(arch["embed_dims"], arch["num_heads"]) for arch in ARCHS.values()} == {
        (bench.WIDTHS, bench.HEADS)
    }


def test_a_case_comes_once(bench):
    kernels = cases_of(
        bench, "--ops", "laplacian_kernel", "--passes", "forward", "--sizes", "224x224", "--stages", "3", "4"
    )
    assert [(case.stage, case.landmarks) for case in kernels] == [(3, 49), (3, 196), (4, 49)]
    solvers = cases_of(bench, "--ops", "newton_schulz_inverse", "--passes", "forward", "--stages", "4")
    assert [(case.size, case.landmarks) for case in solvers] == [(None, 49), (None, 196)]


def test_tensors_lie_as_in_the_module(bench):
    argv = (
        "--ops",
        "laplacian_attention",
        "--passes",
        "forward+backward",
        "--sizes",
        "70x130",
        "--stages",
        "2",
        "--landmarks",
        "49",
    )
    problem = problem_of(bench, *argv)
    q, k, v, landmarks = problem.inputs
    assert q.shape == k.shape == v.shape == problem.grad.shape == (1, 2, 9 * 17, 64)
    assert all(
        x.transpose(1, 2).is_contiguous() and x.is_leaf and x.requires_grad for x in (q, k, v, landmarks)
    )
    pooled = LaplacianAttention(128, 2).pool_landmarks(q.detach().transpose(1, 2), (9, 17))
    torch.testing.assert_close(landmarks.detach(), pooled)


def test_reduced_attention_is_softmax_attention_to_pooled_tokens(bench):
    q, k, v = torch.randn(3, 1, 2, 6 * 9, 8).unbind()
    torch.testing.assert_close(
        bench.reduced_attention(q, k, v, (6, 9), ratio=1), F.scaled_dot_product_attention(q, k, v)
    )
    k3, v3 = (x.view(1, 2, 2, 3, 3, 3, 8).mean((3, 5)).flatten(2, 3) for x in (k, v))
    torch.testing.assert_close(
        bench.reduced_attention(q, k, v, (6, 9), ratio=3), F.scaled_dot_product_attention(q, k3, v3)
    )
    torch.testing.assert_close(
        bench.reduced_attention(q, k, v, (6, 9), grid=(2, 3)), F.scaled_dot_product_attention(q, k3, v3)
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_peak_memory_of_known_allocations(bench, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    mib = 2**20

    def allocate(count):
        return torch.empty(count * mib, dtype=torch.uint8, device=device)

    def call():
        first = allocate(4)
        second = allocate(8)
        del first
        third = allocate(2)
        del second
        return third, allocate(3)

    torch_device = torch.device(device)
    assert bench.peak_memory(call, torch_device) == 12 * mib
    assert bench.peak_memory(lambda: None, torch_device) == 0
    earlier = [allocate(16)]
    assert bench.peak_memory(lambda: (earlier.clear(), allocate(1)), torch_device) in (0, mib)


def test_peak_memory_of_the_reference_is_two_kernel_matrices(bench):
    problem = problem_of(bench, *KERNEL_ALONE[3:], "--sizes", "224x224", "--landmarks", "196")
    call = bench.bind(bench.operator(problem.case, "reference"), problem)
    matrix = 3136 * 196 * 4
    assert 2 * matrix <= bench.peak_memory(call, torch.device("cpu")) < 2.5 * matrix


def test_missing_native_operators_are_said_and_left_out(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.native, "obstacle", lambda *unused, **wide: "they were not built for cpu")
    assert bench.main(KERNEL_ALONE) == 0
    printed = capsys.readouterr().out
    assert "The native operators' columns are left out, since they were not built for cpu.\n" in printed
    assert "| pass | reference | error |" in printed
    assert " x" not in printed.splitlines()[-1].replace("64x96", "")


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_contender_is_not_timed_and_ends_with_an_error(bench, monkeypatch, capsys, tmp_path, factor):
    right = bench.operator
    monkeypatch.setattr(bench.native, "obstacle", lambda *unused, **wide: None)
    monkeypatch.setattr(bench, "has_floor", lambda *unused: False)

    def operator(case, name):
        return (
            (lambda x, y: factor * right(case, "reference")(x, y)) if name == "native" else right(case, name)
        )

    monkeypatch.setattr(bench, "operator", operator)
    path = tmp_path / "found.json"
    assert bench.main([*KERNEL_ALONE, "--json", str(path)]) == 1
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


def test_what_would_take_forever_is_skipped(bench, capsys):
    options = [
        "--device",
        "cpu",
        "--quick",
        "--ops",
        "laplacian_attention",
        "--passes",
        "forward",
        "--stages",
        "1",
        "--max-macs",
        "1e6",
    ]
    assert bench.main([*options, "--contenders", "reference", "sdpa", "linear-sra"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    # 384 tokens to 384 keys of 64 channels, twice.
    assert "| skipped: 1.9e+07 multiply-adds, above --max-macs 1e+06 |" in row
    assert row.count("skipped") == 2


def test_out_of_memory_is_an_entry(bench):
    contender = bench.Contender("sdpa", torch.device("cpu"))
    contender.attempt(lambda: torch.empty(2**60, dtype=torch.uint8))
    assert contender.obstacle == "out of memory"
    assert not contender.is_wrong


def test_a_failed_compilation_is_an_entry(bench, monkeypatch, capsys):
    def fail(*unused, **options):
        assert options == {"dynamic": False}
        raise RuntimeError(
            "backend='inductor' raised:\nno compiler | found\n\nSet TORCHDYNAMO_VERBOSE=1 for more"
        )

    monkeypatch.setattr(torch, "compile", fail)
    assert bench.main([*KERNEL_ALONE, "--contenders", "reference", "compile"]) == 0
    assert "| failed: backend='inductor' raised: no compiler / found |" in capsys.readouterr().out


def test_the_compiled_reference_is_compared_and_timed(bench, tmp_path):
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("torch.compile finds no C++ compiler")
    path = tmp_path / "found.json"
    assert bench.main([*KERNEL_ALONE, "--contenders", "reference", "compile", "--json", str(path)]) == 0
    _, compiled = json.loads(path.read_text())["results"]
    assert compiled["obstacle"] is None
    assert compiled["max_relative_error"] <= compiled["tolerance"]
    assert 0 < compiled["median_ms"] < compiled["compile_seconds"] * 1e3


def test_compilation_has_a_time_limit(bench):
    with pytest.raises(TimeoutError, match=r"longer than 0\.05 s"), bench.time_limit(0.05):
        time.sleep(5)
    with bench.time_limit(0.05):
        pass
    time.sleep(0.1)


def test_contenders_take_turns_and_slow_ones_few(bench, monkeypatch):
    turns = []
    monkeypatch.setattr(bench.Contender, "prepare", lambda self, *unused: setattr(self, "estimate", 1.0))
    monkeypatch.setattr(
        bench.Contender,
        "take_turn",
        lambda self: turns.append(self.name) or {"reference": 0.1, "sdpa": 30.0}[self.name],
    )
    args = bench.parse_args(["--device", "cpu", "--quick", "--repeats", "6", "--max-seconds", "10"])
    case, *_ = cases_of(bench, "--quick", "--ops", "laplacian_attention")
    bench.measure(case, ["reference", "sdpa"], args)
    assert turns == ["reference", "sdpa"] * 3 + ["reference"] * 3


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
def test_what_cannot_work_is_refused_with_a_sentence(bench, capsys, argv, sentence):
    try:
        code = bench.main(argv)
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert sentence in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
    assert captured.out == ""
