"""The results of the experiment: a file for each run, and a table and curves of all."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..files import write_atomically
from ..training.curves import save_figure
from .variants import BASELINE, VARIANTS, Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = dict[str, Any]
"""What ``training.train`` returns."""
Runs = dict[str, dict[int, Run]]
"""The runs by variant and seed."""


def run_file(out: Path, name: str, seed: int) -> Path:
    """Where the result of a run is."""
    return out / "runs" / f"{name}_seed{seed}.json"


def write_run(out: Path, run: Run) -> None:
    """Write the result of a run to its file."""
    write_atomically(run_file(out, run["variant"], run["seed"]), json.dumps(run, indent=1).encode())


def read_runs(out: Path, names: Sequence[str], recipe: Recipe) -> Runs:
    """Read the results of some variants; a variant without results has an empty dict.

    Raises:
        UsageError: the folder has runs of another recipe.
    """
    wanted = json.loads(json.dumps(recipe._asdict()))
    runs: Runs = {name: {} for name in names}
    for path in sorted((out / "runs").glob("*.json")):
        run = json.loads(path.read_text())
        if run["recipe"] != wanted:
            raise UsageError(f"{path} was trained with another recipe: give another folder with --out.")
        if run["variant"] in runs:
            runs[run["variant"]][run["seed"]] = run
    return runs


def make_table(runs: Runs) -> str:
    """Markdown: top-1 by variant, best first, with the difference to the baseline of the same seeds."""
    done = {name: seeds for name, seeds in runs.items() if seeds}
    lines = [
        "| attention | top-1 %, mean ± deviation | seeds | against the default, seed by seed | parameters |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(done, key=lambda name: -statistics.mean(_top1(done[name]))):
        top1 = _top1(done[name])
        each = ", ".join(f"{value:.1f}" for value in top1)
        gap = "" if name == BASELINE else _gap(done[name], done.get(BASELINE, {}))
        params = next(iter(done[name].values()))["params"]
        lines.append(f"| {VARIANTS[name].title} | {_spread(top1)} | {each} | {gap} | {params:,} |")
    return "\n".join(lines) + "\n"


def _top1(seeds: dict[int, Run]) -> list[float]:
    return [run["top1"] for run in seeds.values()]


def _spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _gap(seeds: dict[int, Run], baseline: dict[int, Run]) -> str:
    """The differences of the seeds that both have: mean, least and greatest."""
    gaps = [seeds[seed]["top1"] - baseline[seed]["top1"] for seed in sorted(seeds.keys() & baseline.keys())]
    if not gaps:
        return ""
    return f"{statistics.mean(gaps):+.1f} ({min(gaps):+.1f} to {max(gaps):+.1f})"


def plot(runs: Runs, out: Path) -> None:
    """Top-1 over epochs, a panel for each variant beside the baseline, every seed a line."""
    from matplotlib.figure import Figure

    done = {name: seeds for name, seeds in runs.items() if seeds}
    panels = [name for name in done if name != BASELINE] or [BASELINE]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for name, axis in zip(panels, axes):
        _draw(axis, done.get(BASELINE, {}).values(), "0.6")
        _draw(axis, done.get(name, {}).values(), "tab:blue")
        axis.set_title(name, fontsize=9)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel(f"epoch (grey: {BASELINE}, the default)", fontsize=9)
    figure.supylabel("top-1 %", fontsize=9)
    save_figure(figure, out)


def _draw(axis: Axes, runs: Collection[Run], color: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for run in runs:
        epochs = [point["epoch"] for point in run["curve"]]
        axis.plot(epochs, [point["top1"] for point in run["curve"]], color=color, linewidth=1.2)
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    # A panel with none below it shows the epochs itself.
    axis.xaxis.set_tick_params(labelbottom=True)
