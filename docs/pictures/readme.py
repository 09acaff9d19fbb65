"""Draws readme.png from what `make demo` left: a prediction beside where its attention goes.

.venv/bin/python docs/pictures/readme.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from lf_dense.explain import load_subject, place_image
from lf_dense.explain.pictures import query_rows
from lf_dense.frameworks import load_config

DEMO = Path("work_dirs/demo")
NAME, QUERY = "000001.png", (112, 76)


def main() -> None:
    config, image = load_config("configs/retinanet_lf_demo.py"), DEMO / "data" / "val" / NAME
    subject = load_subject(config, str(DEMO / "train" / "epoch_16.pth"), "cpu")
    placed = place_image(subject, image)
    (rows,) = query_rows(subject, placed, [QUERY])
    found = json.loads((DEMO / "predictions" / "predictions.json").read_text())["images"][NAME]["predictions"]
    pixels = np.asarray(Image.open(image).convert("RGB"))
    side = pixels.shape[0]
    figure = Figure(figsize=(9, 2.45), layout="constrained")
    panels = figure.subplots(1, 4)
    panels[0].imshow(pixels)
    panels[0].set_title("predictions", fontsize=10)
    for one in (box for box in found if box["score"] >= 0.5):
        left, top, right, bottom = one["bbox"]
        panels[0].add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", linewidth=1.5)
        )
        panels[0].text(left + 2, max(top, 8), one["class"], color="white", fontsize=7, va="bottom")
    for panel, row, stage in zip(panels[1:], rows, (1, 2, 3)):
        panel.imshow(pixels, extent=(0, side, side, 0))
        weights = row.nystroem.mean(0)
        panel.imshow(weights, cmap="inferno", alpha=0.8, extent=(0, side, side, 0))
        panel.plot(*QUERY, marker="+", color="cyan", markersize=12, markeredgewidth=2.5)
        panel.set_title(f"attention, stage {stage}", fontsize=10)
    for panel in panels:
        panel.set(xticks=[], yticks=[], xlim=(0, side), ylim=(side, 0))
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
