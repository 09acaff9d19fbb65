"""The words and numbers of a report, and a case's record and row."""

import json
import math

import pytest
import torch

from lf_dense.backends import native
from lf_dense.benchmark import operator_report, report
from lf_dense.benchmark.accuracy import Yardstick
from lf_dense.benchmark.contest import Contender

CPU = torch.device("cpu")


@pytest.fixture
def case(cases_of):
    options = ("--ops", "laplacian_kernel", "--passes", "forward", "--sizes", "64x96", "--stages", "1")
    (case,) = cases_of(*options, "--landmarks", "49")
    return case


def contender(name, *samples, **attributes):
    made = Contender(name, CPU)
    made.sampler.samples = list(samples)
    made.peak_bytes = 2**20
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.012345, "0.0123"), (0.999, "0.999"), (1, "1.00"), (12.345, "12.3"), (12345, "12345")],
)
def test_numbers_have_three_digits(value, text):
    assert report.three_digits(value) == text


def test_the_machine_is_described(monkeypatch):
    monkeypatch.setattr(native, "obstacle", lambda device: "they were not built")
    about = report.describe_machine(CPU)
    assert (about["device"], about["torch"]) == ("cpu", torch.__version__)
    assert about["threads"] == torch.get_num_threads()
    assert about["device_name"]
    assert (about["native"]["used"], about["native"]["obstacle"]) == (False, "they were not built")


def test_the_heading_says_what_is_missing():
    about = {"date": "today", "device": "cpu", "device_name": "a processor", "threads": 2, "torch": "2.11"}
    about |= {"dtype": "float32", "batch_size": 1, "native": {"used": True, "instruction_set": "avx2"}}
    first, second, *_ = operator_report.heading(about, on_cuda=False, wants_native=True).splitlines()
    assert first == "today, cpu (a processor), 2 CPU threads, torch 2.11, float32, batch size 1"
    assert second == "Native operators with avx2 instructions."
    lines = operator_report.heading({**about, "threads": 1}, on_cuda=True, wants_native=False).splitlines()
    assert ", 1 CPU thread, " in lines[0]
    assert lines[1] == "The native operators were not asked for."
    assert lines[-1].startswith("Timing: CUDA events ")


def test_a_record_has_ratios_of_medians(case):
    found = {
        "native": contender("native", 2e-3, 1e-3, 9e-3, error=1e-7),
        "floor": contender("floor", 1e-3),
        "reference": contender("reference", 8e-3, error=math.inf),
        "compile": contender("compile", 5e-3, obstacle="failed: no"),
    }
    rows = operator_report.records(case, found, Yardstick([], 1e-5, "float64"))
    by_name = {row["contender"]: row for row in rows}
    fast, floor, reference, failed = (by_name[name] for name in found)
    assert (fast["min_ms"], fast["median_ms"], fast["max_ms"], fast["samples"]) == (1, 2, 9, 3)
    assert (fast["ratio_to_native"], fast["ratio_to_floor"]) == (1, 2)
    assert (reference["ratio_to_native"], reference["ratio_to_floor"]) == (4, None)
    assert reference["max_relative_error"] is None
    assert (fast["tolerance"], fast["checked_against"]) == (1e-5, "float64")
    assert floor["tolerance"] is floor["checked_against"] is None
    assert failed["median_ms"] is failed["ratio_to_native"] is None


def test_a_row_says_times_obstacles_and_errors(case):
    found = {
        "native": contender("native", 2e-3, error=1e-7),
        "reference": contender("reference", 8e-3, error=2e-7),
        "compile": contender("compile", obstacle="out of memory"),
    }
    found["native"].sampler.method = "CUDA graph"
    rows = operator_report.records(case, found, Yardstick([], 1e-3, "float32"))
    columns = ["native", "floor", "reference", "compile"]
    assert operator_report.table_row(case, rows, columns, on_cuda=True) == (
        "| 64x96 | 1 | 384 | 49 | forward | 2.00 ms, 1.00 x, 1.00 MiB | - | 8.00 ms, 4.00 x, 1.00 MiB"
        " | out of memory | native 1.0e-07, reference 2.0e-07 (to float32)"
        " | CUDA graph: native; calls: reference |"
    )
    head, rule = operator_report.table_head(columns, on_cuda=True).splitlines()
    assert head.endswith("| native | floor | reference | compile | error | timing |")
    assert head.count("|") == rule.count("|")


def test_json_replaces_the_file_whole(tmp_path):
    path = tmp_path / "found.json"
    for results in ([], [{"median_ms": None}]):
        report.write_json(path, {"device": "cpu"}, results)
        assert json.loads(path.read_text()) == {"device": "cpu", "results": results}
    with pytest.raises(ValueError, match="JSON"):
        report.write_json(path, {}, [{"median_ms": math.inf}])
    assert json.loads(path.read_text())["device"] == "cpu"
    assert list(tmp_path.iterdir()) == [path]
