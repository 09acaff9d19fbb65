"""Loss and accuracy curves of a finished or running work dir."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..files import read_json_lines, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Summaries of a task, by the last part of the name that the frameworks give them.
_MAIN_METRIC = re.compile(r"(.*[/_])?(mAP|AP|mIoU|mDice|mFscore|PQ|AR@\d+|top1|accuracy|f1-score)")
# LoggerHook and the log add these to what evaluators yield.
_NO_METRICS = ("time", "data_time", "step")


def read_scalars(work_dir: str | Path, run: str | None = None) -> list[dict[str, Any]]:
    """Every logged record of every run in a work dir, oldest first.

    A line that an interruption cut off ends its file.

    Args:
        work_dir: of a training.
        run: the folder of the one run that counts; None for all.

    Raises:
        UsageError: nothing has been logged there.
    """
    records: list[dict[str, Any]] = []
    for path in sorted(Path(work_dir).glob(f"{run or '*'}/vis_data/scalars.json")):
        records += read_json_lines(path)
    if not records:
        raise UsageError(
            f"{work_dir} holds no log (*/vis_data/scalars.json): give the work dir of a training run."
        )
    return records


def read_curves(
    work_dir: str | Path, metric: str = "", run: str | None = None
) -> tuple[dict[int, float], dict[int, float]]:
    """The training loss, and a validation metric, by iteration.

    What a resumed run did again replaces what it had logged before the interruption.

    Args:
        work_dir: of a training.
        metric: as the log names it.
        run: the folder of the one run that counts; None for all.

    Raises:
        UsageError: no training has been logged there.
    """
    losses: dict[int, float] = {}
    scores: dict[int, float] = {}
    iteration = 0
    for record in read_scalars(work_dir, run):
        if "loss" in record:
            iteration = record["iter"]
            losses[iteration] = record["loss"]
        elif metric in record:
            scores[iteration] = record[metric]
    if not losses:
        raise UsageError(
            f"{work_dir} holds no training log: give the work dir of a training run, not of a test."
        )
    return dict(sorted(losses.items())), dict(sorted(scores.items()))


def main_metric(metrics: Mapping[str, object]) -> str | None:
    """The metric that stands for a model's quality: the first that looks like a summary, else the first.

    Args:
        metrics: what the evaluators yield, in their order; what is no number does not count.

    Returns:
        The name, or None where there is none.
    """
    names = [name for name, value in metrics.items() if isinstance(value, Real) and name not in _NO_METRICS]
    return next(filter(_MAIN_METRIC.fullmatch, names), names[0] if names else None)


def logged_metric(work_dir: str | Path, metric: str | None = None) -> str:
    """The metric of a work dir to draw: the one asked for, else the main one of what was logged, else "".

    Raises:
        UsageError: nothing has been logged there, or the metric asked for has not.
    """
    found: dict[str, Any] = {}
    for record in read_scalars(work_dir):
        if "loss" not in record:
            found = {**record, **found}
    if metric is not None and metric not in found:
        names = [name for name, value in found.items() if isinstance(value, Real) and name not in _NO_METRICS]
        wanted = f"it has {', '.join(names)}; name one of these" if names else "it has no validation yet"
        raise UsageError(f"the log of {work_dir} has no {metric}: {wanted}, or leave --metric out.")
    return main_metric(found) or "" if metric is None else metric


def save_figure(figure: Figure, out: str | Path) -> Path:
    """Write a picture whole or not at all, and the folder for it."""
    out = Path(out)
    form = out.suffix.lstrip(".") or "png"
    write_atomically(out, lambda stream: figure.savefig(stream, dpi=120, format=form))
    return out


def compare_losses(groups: Mapping[str, Sequence[str | Path]], out: str | Path) -> Path:
    """Draw the training losses of several runs: thin lines, and a thick one for the mean of a group.

    Args:
        groups: work dirs by the name of their group, the runs of several seeds for example.
        out: picture to write.

    Raises:
        UsageError: a work dir has no training log.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, work_dirs) in enumerate(groups.items()):
        runs = [read_curves(work_dir)[0] for work_dir in work_dirs]
        shared = sorted(set.intersection(*(set(run) for run in runs)))
        for run in runs:
            axes.plot(list(run), list(run.values()), color=f"C{index}", alpha=0.35, linewidth=0.9)
        label = f"{name} (mean of {len(runs)})" if len(runs) > 1 else name
        axes.plot(
            shared,
            [sum(run[step] for run in runs) / len(runs) for step in shared],
            color=f"C{index}",
            linewidth=2,
            label=label,
        )
    axes.set(xlabel="iteration", ylabel="training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return save_figure(figure, out)


def plot_curves(work_dir: str | Path, out: str | Path, metric: str, run: str | None = None) -> Path:
    """Draw the training loss over iterations, and one validation metric where it was measured.

    Args:
        work_dir: of a training.
        out: picture to write.
        metric: as the log names it.
        run: the folder of the one run that counts; None for all.

    Raises:
        UsageError: nothing has been logged there.
    """
    from matplotlib.figure import Figure

    losses, scores = read_curves(work_dir, metric, run)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*losses.items()), color="tab:blue", label="training loss")
    axes.set(xlabel="iteration", ylabel="training loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if scores:
        right = axes.twinx()
        right.plot(*zip(*scores.items()), color="tab:orange", marker="o", label=metric)
        # mmdet's metrics are shares, and those of mmseg and mmpretrain per cent.
        right.set(ylabel=metric, ylim=(0, 1 if max(scores.values()) <= 1 else 100))
        more_handles, more_labels = right.get_legend_handles_labels()
        handles, labels = handles + more_handles, labels + more_labels
    axes.legend(handles, labels, loc="center right")
    return save_figure(figure, out)
