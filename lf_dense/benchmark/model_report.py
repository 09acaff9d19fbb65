"""What the benchmark of models writes: tables, CSV, plots, exponents, a comparison with an earlier run."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..files import write_atomically
from ..training.curves import save_figure
from .report import Record, markdown_head, markdown_row, three_digits
from .rounds import key_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    "candidate", "size", "batch", "direction", "dtype", "compiled", "memory", "outcome", "seconds", "low",
    "high", "samples", "images_per_second", "system_seconds", "page_faults", "peak_bytes", "params", "macs",
)  # fmt: skip
# Exponents are fitted from here on: below, calls cost more than pixels.
FITTED_FROM = 512 * 512
_SETTINGS = ("direction", "dtype", "compiled", "memory", "batch")
_OURS = "LaplacianFormer"
# Colours that stay apart for people who see few of them (Okabe and Ito).
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F", "#8C564B")


def pixels_of(row: Record) -> int:
    return row["batch"] * math.prod(map(int, row["size"].split("x")))


def by_settings(rows: Iterable[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """Rows that differ in candidate and size alone, together."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _SETTINGS), []).append(row)
    return groups


def title_of(settings: tuple[Any, ...]) -> str:
    direction, dtype, compiled, memory, batch = settings
    how = {"forward": "forward pass", "training": "forward and backward pass"}[direction]
    compiled_text = ", torch.compile" if compiled else ""
    return f"{how}, batch {batch}, {dtype}{compiled_text}, memory {memory}"


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def exponent(rows: Sequence[Record], column: str) -> float | None:
    """The slope of a column over pixels, both logarithmic, by least squares; None below three sizes."""
    points = [
        (math.log(pixels_of(row)), math.log(row[column]))
        for row in rows
        if row["outcome"] == "ok" and row[column] > 0 and pixels_of(row) / row["batch"] >= FITTED_FROM
    ]
    if len(points) < 3:
        return None
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def _cell(row: Record | None, show: Callable[[Record], str]) -> str:
    if row is None:
        return ""
    return show(row) if row["outcome"] == "ok" else row["outcome"]


def _milliseconds(row: Record) -> str:
    low, high = row["seconds_quartiles"]
    values = [three_digits(value * 1e3) for value in (row["seconds"], low, high)]
    return f"{values[0]} ({values[1]} to {values[2]})"


def tables(rows: Iterable[Record]) -> str:
    """Markdown: for each way to run, latency, memory, time in the kernel and multiply-adds over sizes."""
    parts = []
    for settings, same in by_settings(rows).items():
        sizes = unique(row["size"] for row in sorted(same, key=pixels_of))
        names = unique(row["candidate"] for row in same)
        found = {(row["candidate"], row["size"]): row for row in same}
        for what, show, column in (
            ("ms (quartiles)", _milliseconds, "seconds"),
            ("peak MiB above the loaded model", lambda row: f"{row['peak_bytes'] / 2**20:.0f}", "peak_bytes"),
            ("ms in the kernel, page faults", _kernel_cell, None),
        ):
            head = [what, *sizes, *(["exponent"] if column else [])]
            lines = [f"**{title_of(settings)}**", "", markdown_head(head)]
            for name in names:
                mine = [row for row in same if row["candidate"] == name]
                fitted = exponent(mine, column) if column else None
                cells = [_cell(found.get((name, size)), show) for size in sizes]
                slope = [] if column is None else ["" if fitted is None else f"{fitted:.2f}"]
                lines.append(markdown_row([mine[0]["label"], *cells, *slope]))
            parts.append("\n".join(lines))
        parts.append(_counts(same))
    return "\n\n".join(parts) + "\n"


def _kernel_cell(row: Record) -> str:
    return f"{row['system_seconds'] * 1e3:.0f}, {row['page_faults']:,}"


def _counts(rows: Sequence[Record]) -> str:
    sizes = unique(row["size"] for row in sorted(rows, key=pixels_of))
    lines = [markdown_head(["multiply-adds, G (attention counted)", "parameters, M", *sizes])]
    for name in unique(row["candidate"] for row in rows):
        mine = {row["size"]: row for row in rows if row["candidate"] == name and row["outcome"] == "ok"}
        if not mine:
            continue
        first = next(iter(mine.values()))
        counts = [
            three_digits(mine[size]["macs"] / 1e9) if size in mine and mine[size]["macs"] else ""
            for size in sizes
        ]
        lines.append(markdown_row([first["label"], f"{first['params'] / 1e6:.1f}", *counts]))
    return "\n".join(lines)


def write_csv(path: Path, rows: Iterable[Record]) -> None:
    """Write one line for each row, units as in the JSON lines: seconds and bytes."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        low, high = row.get("seconds_quartiles", ("", ""))
        writer.writerow({**row, "low": low, "high": high})
    write_atomically(path, stream.getvalue().encode())


def draw(folder: Path, rows: Sequence[Record], machine: str) -> list[Path]:
    """Draw latency and memory over pixels for each way to run that has two sizes; return the files."""
    from matplotlib.figure import Figure

    written = []
    for settings, same in by_settings(rows).items():
        good = [row for row in same if row["outcome"] == "ok"]
        if len({row["size"] for row in good}) < 2:
            continue
        figure = Figure(figsize=(13, 5.2), layout="constrained")
        axes = figure.subplots(1, 2)
        draw_lines(axes[0], good, "seconds", 1e3, "milliseconds")
        draw_lines(axes[1], good, "peak_bytes", 2**-20, "MiB above the loaded model")
        figure.suptitle(f"{title_of(settings)}; {machine}", fontsize=11)
        direction, dtype, compiled, memory, batch = settings
        stem = f"{direction}_{dtype}{'_compiled' if compiled else ''}_{memory.replace(' ', '-')}_b{batch}"
        written.append(save_figure(figure, folder / f"{stem}.png"))
    return written


def draw_lines(axes: Axes, rows: Sequence[Record], column: str, factor: float, unit: str) -> None:
    """One line for each candidate over its pixels, both axes logarithmic, named at its right end."""
    ends = []
    names = unique(row["candidate"] for row in rows)
    for index, name in enumerate(names):
        mine = sorted((row for row in rows if row["candidate"] == name and row[column] > 0), key=pixels_of)
        if not mine:
            continue
        ours = mine[0]["label"].startswith(_OURS)
        colour = _COLOURS[index % len(_COLOURS)]
        places, values = [pixels_of(row) for row in mine], [row[column] * factor for row in mine]
        axes.plot(
            places,
            values,
            color=colour,
            linewidth=2.6 if ours else 1.3,
            marker="o",
            markersize=4 if ours else 3,
        )
        ends.append((math.log(values[-1]), places[-1], values[-1], mine[0]["label"], colour, ours))
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = {pixels_of(row): row["size"].replace("x", " x ") for row in rows}
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=35, ha="right", fontsize=8)
    axes.minorticks_off()
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(right=max(ticks) * 1.15)
    low, high = (math.log(limit) for limit in axes.get_ylim())
    ends.sort()
    labels = apart([end[0] for end in ends], (high - low) / 20)
    # A thin line leads from a name to what it names.
    for place, (_, x, y, label, colour, ours) in zip(labels, ends):
        axes.annotate(
            label,
            (x, y),
            xytext=(max(ticks) * 1.35, math.exp(place)),
            textcoords="data",
            color=colour,
            fontsize=9,
            fontweight="bold" if ours else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "alpha": 0.4,
                "linewidth": 0.7,
                "shrinkA": 0,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Sorted places moved so that neighbours keep a gap, each group about where it was."""
    groups: list[tuple[float, int]] = []  # middle and number of those that touch
    for place in places:
        middle, count = place, 1
        while groups and middle - (count - 1) / 2 * gap < groups[-1][0] + (groups[-1][1] + 1) / 2 * gap:
            below, fewer = groups.pop()
            middle, count = (middle * count + below * fewer) / (count + fewer), count + fewer
        groups.append((middle, count))
    return [middle + (i - (count - 1) / 2) * gap for middle, count in groups for i in range(count)]


def read_results(path: Path) -> list[Record]:
    """The rows of an earlier run's ``results.json``.

    Raises:
        UsageError: the file is not there, or is none of this benchmark's.
    """
    try:
        rows: list[Record] = json.loads(path.read_text())["results"]
        for row in rows:
            key_of(row)
    except OSError as error:
        raise UsageError(f"--compare {path} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--compare {path} is not the results.json of an earlier run.") from None
    return rows


def compare(rows: Iterable[Record], before: Iterable[Record], allowed: float) -> tuple[str, bool]:
    """A table of ratios to an earlier run, and whether one of latency is above ``allowed``."""
    old = {key_of(row): row for row in before if row["outcome"] == "ok"}
    columns = ["candidate", "size", "how", "ms before", "ms now", "ratio", "memory's ratio"]
    lines, regressed = [markdown_head(columns)], False
    for row in rows:
        then = old.get(key_of(row))
        if then is None or row["outcome"] != "ok":
            continue
        ratio, memory = row["seconds"] / then["seconds"], row["peak_bytes"] / max(1, then["peak_bytes"])
        regressed |= ratio > allowed
        how = title_of(tuple(row[name] for name in _SETTINGS))
        times = [three_digits(value["seconds"] * 1e3) for value in (then, row)]
        mark = f"{ratio:.2f}{' regression' if ratio > allowed else ''}"
        lines.append(markdown_row([row["label"], row["size"], how, *times, mark, f"{memory:.2f}"]))
    return "\n".join(lines), regressed
