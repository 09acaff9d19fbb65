"""Loss and accuracy curves of a finished or running work dir."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import UsageError


def read_scalars(work_dir: str | Path) -> list[dict[str, Any]]:
    """Every logged record of every run in a work dir, oldest first; a line cut off by an interruption ends its file.

    Raises:
        UsageError: nothing has been logged there.
    """
    records = []
    for path in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    if not records:
        raise UsageError(f"{work_dir} holds no log (*/vis_data/scalars.json): give the work dir of a training run.")
    return records


def plot_curves(work_dir: str | Path, out: str | Path, metric: str) -> Path:
    """Draw the training loss over iterations, and one validation metric where it was measured, into a picture.

    Raises:
        UsageError: nothing has been logged there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_scalars(work_dir)
    # By iteration: what a resumed run did again replaces what it had logged before the interruption.
    losses: dict[int, float] = {}
    scores: dict[int, float] = {}
    iteration = 0
    for record in records:
        if "loss" in record:
            iteration = record["iter"]
            losses[iteration] = record["loss"]
        elif metric in record:
            scores[iteration] = record[metric]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if not losses:
        raise UsageError(f"{work_dir} holds no training log: give the work dir of a training run, not of a test.")
    axes.plot(*zip(*sorted(losses.items())), color="tab:blue", label="training loss")
    axes.set(xlabel="iteration", ylabel="training loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if scores:
        right = axes.twinx()
        right.plot(*zip(*sorted(scores.items())), color="tab:orange", marker="o", label=metric)
        right.set(ylabel=metric, ylim=(0, 1))
        more_handles, more_labels = right.get_legend_handles_labels()
        handles, labels = handles + more_handles, labels + more_labels
    axes.legend(handles, labels, loc="center right")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return out
