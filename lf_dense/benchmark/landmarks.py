"""What the landmarks cost: the attention's error against the same smoother without them, and its time.

A trained model runs on photographs, resized to each size. In the last block of each stage, the layer's output
for sampled queries, with several grids of landmarks, is compared with that of the exact smoother of the same
queries, keys and values. Beside it stands SOFT's Gaussian kernel. The weights were trained with one grid, and
do not depend on it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import write_atomically
from ..presets import LANDMARK_GRID
from .options import image_size, positive_int, require_mmengine
from .report import Record, describe_machine, markdown_head, markdown_row, three_digits, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = [(224, 224), (512, 512), (800, 1333), (1024, 1024), (2048, 2048)]
SIDES = [4, 7, 10, 14, 20]
STAGES = (1, 2, 3, 4)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", help="path or packaged name of the config")
    add("checkpoint", help="checkpoint with the weights")
    add("images", help="an image or a folder of images")
    add("--sizes", nargs="+", type=image_size, default=SIZES, metavar="HxW", help="sizes of the images")
    add("--grids", nargs="+", type=positive_int, default=SIDES, metavar="N", help="cells along a side")
    add("--queries", type=positive_int, default=48, help="sampled in each stage (default: %(default)s)")
    add("--images-at-most", type=positive_int, default=6, help="images that count (default: %(default)s)")
    add("--out", type=Path, default=Path("work_dirs/landmarks"), metavar="DIR", help="folder of the results")
    add("--trust-checkpoint", action="store_true", help="read the checkpoint even if it holds code")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, and write ``landmarks.json``, ``landmarks.md`` and ``landmarks.png``."""
    require_mmengine("landmarks")
    from ..explain.approximation import costs
    from ..explain.capture import capture
    from ..explain.placing import load_subject
    from ..explain.receptive import resized_input
    from ..files import find_images
    from ..frameworks import load_config
    from ..training.cli import trust_named
    from ..training.curves import save_figure
    from ..training.quietness import quiet

    trust_named(args)
    images = find_images(args.images)[: args.images_at_most]
    with quiet():
        subject = load_subject(load_config(args.config), args.checkpoint, "cpu")
    about = {**describe_machine(torch.device("cpu")), "images": len(images), "queries": args.queries}
    # The other places are compared with a grid that is measured.
    place_side = LANDMARK_GRID[0] if LANDMARK_GRID[0] in args.grids else args.grids[0]
    rows: list[Record] = []
    for size in args.sizes:
        for image in images:
            for inputs in capture(subject.backbone, resized_input(subject, image, size)):
                for cost in costs(inputs, args.grids, args.queries, place_side=place_side):
                    rows.append({"size": "x".join(map(str, size)), "image": image.name, **cost._asdict()})
            print(f"{size[0]} x {size[1]}: {image.name}", flush=True)
        write_json(args.out / "landmarks.json", about, rows)
    text = make_tables(rows)
    write_atomically(args.out / "landmarks.md", text.encode())
    picture = save_figure(plot(rows), args.out / "landmarks.png")
    print(f"\n{text}\nwritten: {args.out / 'landmarks.json'}, {args.out / 'landmarks.md'}, {picture}")
    return 0


def mean_of(rows: Iterable[Record], key: str, **wanted: Any) -> float | None:
    """The mean over the images of what rows with these values have; None where there are none."""
    values = [row[key] for row in rows if all(row[name] == value for name, value in wanted.items())]
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{three_digits(100 * value)}"


def make_tables(rows: Sequence[Record]) -> str:
    """Errors by grid, stage and size; places; times. Means over the images."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    sides = list(dict.fromkeys(row["side"] for row in rows if row["place"] == "grid"))
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    parts = []
    for kernel in kernels:
        for key, title in (
            ("output", "error of the output"),
            ("deviation", "error of what it adds to averaging"),
        ):
            parts.append(f"{kernel}, {title}, per cent\n")
            parts.append(markdown_head(["size", "stage", *[f"{side} x {side}" for side in sides]]))
            for size in sizes:
                for stage in STAGES:
                    same = {"size": size, "stage": stage, "kernel": kernel, "place": "grid"}
                    errors = [_percent(mean_of(rows, key, **same, side=side)) for side in sides]
                    parts.append(markdown_row([size, stage, *errors]))
            parts.append("")
    places = list(dict.fromkeys(row["place"] for row in rows))
    side = next(row["side"] for row in rows if row["place"] != "grid")
    parts.append(f"laplacian, places of about {side * side} landmarks, error of the deviation, per cent\n")
    parts.append(markdown_head(["size", "stage", *places]))
    for size in sizes:
        for stage in STAGES:
            same = {"size": size, "stage": stage, "kernel": "laplacian", "side": side}
            errors = [_percent(mean_of(rows, "deviation", **same, place=place)) for place in places]
            parts.append(markdown_row([size, stage, *errors]))
    parts.append("\nmean kernel mass\n")
    parts.append(markdown_head(["size", *[f"stage {stage}" for stage in STAGES]]))
    for size in sizes:
        masses = [mean_of(rows, "mass", size=size, stage=stage, kernel="laplacian") for stage in STAGES]
        parts.append(markdown_row([size, *["" if mass is None else f"{mass:.1e}" for mass in masses]]))
    parts.append("\nmilliseconds of the operator, all stages\n")
    parts.append(markdown_head(["size", *[f"{side} x {side}" for side in sides]]))
    for size in sizes:
        times = []
        for side in sides:
            same = {"size": size, "kernel": "laplacian", "place": "grid", "side": side}
            stages = [mean_of(rows, "seconds", **same, stage=stage) or 0.0 for stage in STAGES]
            times.append(three_digits(1000 * sum(stages)))
        parts.append(markdown_row([size, *times]))
    return "\n".join(parts) + "\n"


def plot(rows: Sequence[Record]) -> Figure:
    """Error of the deviation over the number of landmarks: a panel for each stage, a line for each size."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(STAGES), sharey=True)
    colours = colormaps["viridis"]
    for panel, stage in zip(panels, STAGES):
        for index, size in enumerate(sizes):
            same = {"size": size, "stage": stage, "kernel": "laplacian", "place": "grid"}
            counts = sorted(
                {row["landmarks"] for row in rows if row["stage"] == stage and row["size"] == size}
            )
            errors = [mean_of(rows, "deviation", **same, landmarks=count) for count in counts]
            points = [(count, 100 * e) for count, e in zip(counts, errors) if e is not None]
            colour = colours(0.9 * index / max(1, len(sizes) - 1))
            panel.plot(*zip(*points), "o-", color=colour, label=size.replace("x", " x "), markersize=4)
        panel.set_xscale("log")
        panel.set_xticks([16, 49, 100, 196, 400], ["16", "49", "100", "196", "400"])
        panel.minorticks_off()
        panel.set_title(f"stage {stage}", fontsize=12)
        panel.set_xlabel("landmarks", fontsize=11)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("error of what the attention\nadds to averaging, %", fontsize=11)
    panels[0].set_ylim(0, 1.05 * max(y for panel in panels for line in panel.lines for y in line.get_ydata()))
    panels[0].legend(fontsize=9, title="pixels", title_fontsize=9)
    return figure
