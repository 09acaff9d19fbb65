"""The benchmark of models: its command from candidates to plots, what it leaves out, and how it goes on."""

from __future__ import annotations

import csv
import json
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("mmengine")

import lf_dense
from lf_dense.benchmark import model_report, rounds
from lf_dense.benchmark.candidates import BACKBONES, PRESETS, Settings, label_of
from lf_dense.benchmark.rounds import Group, Limits, Run
from lf_dense.benchmark.worker import Failure, First, Sample
from support import driving

KEPT = Settings("forward", "float32", False, "kept")
LIMITS = Limits(3, 60.0, 1e9, 4.0, 1)


class FakeWorker:
    """A candidate that takes 1 second for 1,000 pixels, in the place of a process; notes every call."""

    log: ClassVar[list[tuple]] = []
    failures: ClassVar[dict[tuple[str, tuple[int, int]], str]] = {}

    def __init__(self, name, settings, device, threads, limit_gib):
        self.name, self.params = name, 7
        self.log.append(("start", name))

    def first(self, batch, size, limit):
        self.log.append(("first", self.name, size))
        if (self.name, size) in self.failures:
            raise Failure(self.failures[self.name, size])
        self.pixels = batch * size[0] * size[1]
        return First(self.pixels * 8, self.pixels * 2)

    def turn(self, limit):
        self.log.append(("turn", self.name))
        return Sample(self.pixels / 1e3, 0.5, 3)

    def rest(self):
        pass

    def stop(self):
        self.log.append(("stop", self.name))


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.setattr(rounds, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "log", [])
    monkeypatch.setattr(FakeWorker, "failures", {})
    return FakeWorker


def groups(*sizes):
    return [Group(size, 1, KEPT) for size in sizes]


def measured(path, names=("lf-tiny", "swin-t"), sizes=((10, 20), (20, 20)), limits=LIMITS):
    run = Run(path, "cpu", limits, lambda text: None)
    run.measure(names, groups(*sizes))
    return run.rows


def test_candidates_take_turns_and_rows_have_their_figures(workers, tmp_path):
    rows = measured(tmp_path / "results.jsonl")
    turns = [entry[1] for entry in workers.log if entry[0] == "turn"]
    assert turns == ["lf-tiny", "swin-t"] * 6
    assert workers.log[-2:] == [("stop", "lf-tiny"), ("stop", "swin-t")]
    row = rows[rounds.key_of({"candidate": "swin-t", **groups((20, 20))[0].columns})]
    assert (row["seconds"], row["seconds_quartiles"], row["samples"]) == (0.4, [0.4, 0.4], 3)
    assert (row["system_seconds"], row["page_faults"], row["peak_bytes"]) == (0.5, 3, 3200)
    assert (row["params"], row["macs"], row["images_per_second"]) == (7, 800, 2.5)
    assert rounds.read_rows(tmp_path / "results.jsonl") == rows


def test_a_run_goes_on_where_it_stopped(workers, tmp_path):
    path = tmp_path / "results.jsonl"
    before = measured(path, sizes=[(10, 20)])
    with path.open("a") as stream:
        stream.write('{"candidate": "lf-t')
    workers.log.clear()
    after = measured(path)
    assert {entry[2] for entry in workers.log if entry[0] == "first"} == {(20, 20)}
    assert {key: after[key] for key in before} == before
    assert len(after) == 4
    workers.log.clear()
    assert measured(path) == after
    assert workers.log == []


def test_turns_before_an_interruption_count(workers, tmp_path, monkeypatch):
    path, turn = tmp_path / "results.jsonl", FakeWorker.turn
    lasting = iter([9.0, 2.0, 9.0])

    def interrupted(worker, limit):
        turn(worker, limit)
        seconds = next(lasting, None)
        if seconds is None:
            raise KeyboardInterrupt
        return Sample(seconds, 0.5, 3)

    monkeypatch.setattr(FakeWorker, "turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(path, sizes=[(10, 20)])
    with path.with_suffix(".turns.jsonl").open("a") as stream:
        stream.write('{"row": ')
    monkeypatch.setattr(FakeWorker, "turn", turn)
    workers.log.clear()
    rows = measured(path, sizes=[(10, 20)])
    # One round and a half were there.
    assert [entry[1] for entry in workers.log if entry[0] == "turn"] == ["swin-t", "lf-tiny", "swin-t"]
    assert {row["candidate"]: row["seconds"] for row in rows.values()} == {"lf-tiny": 9.0, "swin-t": 0.2}
    assert [row["samples"] for row in rows.values()] == [3, 3]
    measured(path, sizes=[(10, 20)])
    assert path.with_suffix(".turns.jsonl").read_text() == ""


def test_what_fails_is_a_row_and_is_not_tried_at_larger_sizes(workers, tmp_path):
    workers.failures["swin-t", (20, 20)] = "out of memory"
    rows = measured(tmp_path / "r.jsonl", sizes=[(10, 20), (20, 20), (30, 20)])
    outcomes = {(row["candidate"], row["size"]): row["outcome"] for row in rows.values()}
    assert outcomes["swin-t", "10x20"] == "ok"
    assert outcomes["swin-t", "20x20"] == "out of memory"
    assert outcomes["swin-t", "30x20"] == "left out: out of memory at 20x20"
    assert outcomes["lf-tiny", "30x20"] == "ok"


def test_the_budget_leaves_out_what_would_take_too_long_and_says_so(workers, tmp_path):
    limits = LIMITS._replace(budget_seconds=10.0)
    rows = measured(tmp_path / "r.jsonl", ["lf-tiny"], [(10, 20), (100, 100)], limits)
    outcomes = [row["outcome"] for row in rows.values()]
    expected = 0.2 * (10_000 / 200) ** rounds.GROWTH * 5
    assert outcomes == ["ok", f"left out: the budget (it would take about {expected:.0f} s)"]


def test_candidates_rest_where_memory_is_not_enough_for_all(workers, tmp_path, monkeypatch):
    rested = []
    monkeypatch.setattr(FakeWorker, "rest", lambda worker: rested.append(worker.name))
    measured(tmp_path / "a.jsonl", sizes=[(10, 20)])
    assert len(rested) == 2
    monkeypatch.setattr(rounds, "available_gib", lambda: 1e-6)
    measured(tmp_path / "b.jsonl", sizes=[(10, 20)])
    assert len(rested) == 4 + 2 * LIMITS.rounds


def row(candidate="lf-tiny", size="512x512", seconds=1.0, **others):
    found = {"label": label_of(candidate), "outcome": "ok", "seconds": seconds, "samples": 3}
    figures = {"seconds_quartiles": [seconds, seconds], "system_seconds": 0.1, "page_faults": 4}
    counts = {"peak_bytes": 2**20, "params": 10**6, "macs": 10**9, "images_per_second": 1 / seconds}
    settings = KEPT._asdict()
    return {
        "candidate": candidate,
        "size": size,
        "batch": 1,
        **settings,
        **found,
        **figures,
        **counts,
        **others,
    }


@pytest.mark.parametrize(
    ("seconds", "quartiles"), [([2.0], [2.0, 2.0]), ([3.0, 1.0], [1.5, 2.5]), ([1.0, 2.0, 9.0], [1.5, 5.5])]
)
def test_quartiles_lie_between_the_samples(seconds, quartiles):
    row = rounds.summary([Sample(each, 0.0, 0.0) for each in seconds], First(0, None), 1, 4)
    assert row["seconds"] == 2.0
    assert row["seconds_quartiles"] == quartiles
    assert row["images_per_second"] == 2.0


def test_exponents_are_the_slopes_of_the_large_sizes():
    sizes = ["224x224", "512x512", "1024x512", "1024x1024"]
    seconds = [9.0, 1.0, 2**1.5, 4**1.5]
    rows = [row(size=size, seconds=value) for size, value in zip(sizes, seconds)]
    assert model_report.exponent(rows, "seconds") == pytest.approx(1.5)
    assert model_report.exponent(rows[:3], "seconds") is None
    assert "| LaplacianFormer-Tiny |" in model_report.tables(rows)
    assert "| 1.50 |" in model_report.tables(rows)


@given(st.lists(st.floats(-50, 50), max_size=12), st.floats(0.1, 5))
def test_names_in_a_plot_keep_their_distance(places, gap):
    places = sorted(places)
    found = model_report.apart(places, gap)
    assert len(found) == len(places)
    assert all(after - before >= gap - 1e-9 for before, after in zip(found, found[1:]))
    assert sum(found) == pytest.approx(sum(places), abs=1e-6)
    far = [20 * gap * i for i in range(5)]
    assert model_report.apart(far, gap) == far


def test_comparison_says_what_became_slower():
    old = [row(), row("swin-t"), row(size="224x224")]
    table, regressed = model_report.compare([row(seconds=1.05), row("resnet-50", seconds=9)], old, 1.1)
    assert not regressed
    assert "| 1000 | 1050 | 1.05 | 1.00 |" in table
    assert "ResNet" not in table
    table, regressed = model_report.compare([row(seconds=1.2, peak_bytes=2**21)], old, 1.1)
    assert regressed
    assert "| 1.20 regression | 2.00 |" in table


def test_every_preset_names_candidates_that_there_are():
    for names, sizes in PRESETS.values():
        assert all(name in BACKBONES or name.partition("@")[0].endswith(".py") for name in names)
        assert sizes
    assert label_of("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py@tiny") == "retinanet, LaplacianFormer-Tiny"
    assert label_of("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py") == "retinanet, r50"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name backbones or configs, or a --preset (high-resolution, models)."),
        (["resnet-51"], "'resnet-51' is neither a config"),
        (["nowhere/none.py"], "none.py"),
        (["lf-tiny", "--compare", "gone.json"], "--compare gone.json cannot be read"),
        (["lf-tiny", "--device", "cuda:99"], "cuda:99"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(arguments, message, exit_code, capsys, tmp_path):
    assert exit_code("models", *arguments, "--out", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_figures_of_another_machine_do_not_mix(tmp_path):
    about = {"device": "cpu", "device_name": "one", "threads": 2, "torch": "2.13", "lf_dense": "0.1"}
    path = tmp_path / "results.jsonl"
    rounds.check_same(path, about)
    path.touch()
    rounds.check_same(path, about)
    with pytest.raises(ValueError, match="device_name one then, two now"):
        rounds.check_same(path, {**about, "device_name": "two"})


def test_from_the_command_line_to_tables_and_plots(tmp_path):
    """Two processes with real models; sizes of the plot are two."""
    pytest.importorskip("mmdet")
    out = tmp_path / "found"
    arguments = [
        "lf-tiny",
        "pvtv2-b2-li",
        "--sizes",
        "64x64",
        "64x96",
        "--rounds",
        2,
        "--threads",
        1,
        "--out",
        out,
    ]
    done = driving.run(driving.command("benchmark.py", "models", *arguments))
    assert done.returncode == 0, done.stdout
    results = json.loads((out / "results.json").read_text())
    rows = results["results"]
    assert [row["outcome"] for row in rows] == ["ok"] * 4
    assert results["threads"] == 1
    ours = [row for row in rows if row["candidate"] == "lf-tiny"]
    assert {row["params"] for row in ours} == {
        sum(w.numel() for w in lf_dense.LaplacianFormer().parameters())
    }
    for small, large in zip(rows[:2], rows[2:]):
        assert small["macs"] < large["macs"]
        assert small["peak_bytes"] > 0
    assert (out / "forward_float32_kept_b1.png").read_bytes().startswith(b"\x89PNG")
    with (out / "results.csv").open() as stream:
        assert [float(line["seconds"]) for line in csv.DictReader(stream)] == [row["seconds"] for row in rows]
    assert "**forward pass, batch 1, float32, memory kept**" in done.stdout
    again = driving.run(
        driving.command(
            "benchmark.py", "models", *arguments, "--compare", out / "results.json", "--allow", 1.0001
        )
    )
    assert again.returncode == 0, again.stdout
    assert "| 1.00 | 1.00 |" in again.stdout


@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("package", ["mmdet", "mmseg"])
def test_whole_models_with_our_backbone(package, direction, tmp_path):
    """Built and run in this process, as a worker does."""
    pytest.importorskip(package)
    import torch

    from lf_dense.benchmark import candidates

    config = {
        "mmdet": "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py@tiny",
        "mmseg": "mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py@tiny",
    }[package]
    candidates.check([config])
    model, make = candidates.build(config, KEPT._replace(direction=direction), torch.device("cpu"))
    assert type(model.backbone).__name__ == "LaplacianFormer"
    result = make(1, (64, 96))()
    assert (result is None) == (direction == "training")
