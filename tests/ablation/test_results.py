"""The results: files of runs, and the table and curves made of them."""

import pytest

from lf_dense.ablation.results import make_table, plot, read_runs, run_file, write_run
from lf_dense.ablation.variants import BASELINE, FORMS, VARIANTS
from lf_dense.errors import UsageError

RECIPE = FORMS["cpu"]


def a_run(name, seed, top1, recipe=RECIPE):
    curve = [{"epoch": 1, "loss": 1.5, "top1": top1 - 10}, {"epoch": 2, "loss": 1.0, "top1": top1}]
    return {
        "variant": name,
        "seed": seed,
        "recipe": recipe._asdict(),
        "params": 1234567,
        "curve": curve,
        "top1": top1,
    }


def some_runs(**top1):
    """Runs of seeds 0, 1, ... by variant."""
    return {
        name: {seed: a_run(name, seed, value) for seed, value in enumerate(values)}
        for name, values in top1.items()
    }


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_runs_come_back(tmp_path):
    written = a_run(BASELINE, 5, 50.0)
    write_run(tmp_path, written)
    write_run(tmp_path, a_run("exact", 5, 40.0))
    assert run_file(tmp_path, BASELINE, 5).is_file()
    runs = read_runs(tmp_path, [BASELINE, "softmax"], RECIPE)
    assert {name: list(seeds) for name, seeds in runs.items()} == {BASELINE: [5], "softmax": []}
    found = runs[BASELINE][5]
    assert (found["curve"], found["top1"]) == (written["curve"], 50.0)


def test_no_folder_means_no_runs(tmp_path):
    assert read_runs(tmp_path / "gone", [BASELINE], RECIPE) == {BASELINE: {}}


def test_runs_of_another_recipe_are_refused(tmp_path):
    write_run(tmp_path, a_run(BASELINE, 0, 50.0, RECIPE._replace(epochs=7)))
    with pytest.raises(UsageError, match="another recipe"):
        read_runs(tmp_path, ["exact"], RECIPE)


def test_table():
    runs = some_runs(**{BASELINE: [50.0, 52.0], "softmax": [49.0, 53.5], "exact": [60.0], "tau_1e-3": []})
    head, rule, *rows = make_table(runs).splitlines()
    assert len(cells(head)) == len(cells(rule)) == 5
    assert [cells(row) for row in rows] == [
        [VARIANTS["exact"].title, "60.0", "60.0", "+10.0 (+10.0 to +10.0)", "1,234,567"],
        [VARIANTS["softmax"].title, "51.2 ± 3.2", "49.0, 53.5", "+0.2 (-1.0 to +1.5)", "1,234,567"],
        [VARIANTS[BASELINE].title, "51.0 ± 1.4", "50.0, 52.0", "", "1,234,567"],
    ]


def test_table_compares_only_seeds_of_both():
    runs = some_runs(**{BASELINE: [50.0, 52.0], "exact": [51.0, 58.0]})
    del runs[BASELINE][0]
    first, second = (cells(row) for row in make_table(runs).splitlines()[2:])
    assert first[3] == "+6.0 (+6.0 to +6.0)"
    assert second[3] == ""
    alone = make_table(some_runs(exact=[51.0])).splitlines()[2]
    assert cells(alone)[3] == ""


@pytest.mark.parametrize("names", [[BASELINE], [BASELINE, "exact"], ["softmax"], list(VARIANTS)[:6]])
def test_plot(tmp_path, names):
    out = tmp_path / "folder" / "curves.png"
    plot(some_runs(**{name: [50.0, 52.0] for name in names}), out)
    assert out.read_bytes().startswith(b"\x89PNG")
