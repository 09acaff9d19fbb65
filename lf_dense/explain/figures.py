"""Figures of attention rows, receptive fields and feature maps. They need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from .features import FeatureMap
from .placing import Placement
from .receptive import side_that_holds
from .rows import AttentionRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 11.0  # inches, 1320 pixels when saved: what is read at 900 has two thirds of the size
WEIGHTS, SIGNED, FIELD = "inferno", "RdBu_r", "magma"
DECADES = 4
MARK = "#00e5ff"


class Panel(NamedTuple):
    """One picture: a map ``(h, w)``, what its range is, how it is coloured, and the text below it."""

    values: np.ndarray
    low: float
    high: float
    colours: str
    note: str


def _range(values: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest value, apart from each other."""
    low, high = float(values.min()), float(values.max())
    return low, high if high > low else low + 1e-12


def _span(values: np.ndarray) -> str:
    """The range of values, with the digits that tell its ends apart."""
    low, high = float(values.min()), float(values.max())
    # Weights that are all nearly 1 are worth a look at how nearly.
    decimals = 2 if high == low else min(max(2, 1 - math.floor(math.log10(high - low))), 6)
    # Adding 0 takes the sign off a zero that was rounded.
    low, high = (round(end, decimals) + 0.0 for end in (low, high))
    return f"{low:.{decimals}f} to {high:.{decimals}f}"


def _panels(row: AttentionRow, head: int | None) -> list[Panel]:
    """The four panels of a row: one head's, or the mean of all. Weights are multiples of the mean weight."""
    nystroem, landmarks, exact, softmax = (
        (maps.mean(0) if head is None else maps[head]).numpy()
        for maps in (row.nystroem, row.landmarks, row.exact, row.softmax)
    )
    nystroem, exact, softmax = (weights * weights.size for weights in (nystroem, exact, softmax))
    shared = _range(np.stack([nystroem, exact]))
    bound = float(np.abs(landmarks).max()) or 1e-12
    alike = row.agreement(head) if nystroem.size > 1 else np.nan
    likeness = "" if np.isnan(alike) else f", r {alike:.3f}"
    low, high = _range(softmax)

    return [
        Panel(nystroem, *shared, WEIGHTS, _span(nystroem)),
        Panel(landmarks, -bound, bound, SIGNED, _span(landmarks)),
        Panel(exact, *shared, WEIGHTS, f"{_span(exact)}{likeness}"),
        Panel(softmax, low, high, WEIGHTS, _span(softmax)),
    ]


def _titles(normalization: str) -> list[str]:
    exact = "the layer's normalisation" if normalization == "mass" else "divided by its sum"
    return [
        "Nystroem: what the\nlayer gives",
        "landmarks in it\n(signed)",
        f"exact Laplacian,\n{exact}",
        "softmax of the\nsame q and k",
    ]


def _bare(axes: Axes, pixels: np.ndarray) -> None:
    """Show an image's area, in pixels, without ticks."""
    height, width = pixels.shape[:2]
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal")


def _show_image(axes: Axes, pixels: np.ndarray, faded: bool) -> None:
    height, width = pixels.shape[:2]
    shown: Any = pixels
    if faded:
        # Grey and pale, so that the colours on top are those of the map.
        grey = pixels.astype(float).mean(-1, keepdims=True).repeat(3, -1)
        shown = (255 - (255 - grey) * 0.9).astype(np.uint8)
    axes.imshow(shown, extent=(0, width, height, 0))
    _bare(axes, pixels)


def _show_panel(axes: Axes, panel: Panel, pixels: np.ndarray, box: tuple[float, float, float, float]) -> None:
    left, right, top, bottom = box
    _show_image(axes, pixels, faded=True)
    axes.imshow(
        panel.values,
        extent=(left, right, bottom, top),
        cmap=panel.colours,
        vmin=panel.low,
        vmax=panel.high,
        alpha=0.7,
        interpolation="nearest",
    )
    _bare(axes, pixels)
    axes.set_xlabel(panel.note, fontsize=10, labelpad=2)


def _mark(axes: Axes, query: tuple[float, float], size: float) -> None:
    x, y = query[0] + 0.5, query[1] + 0.5
    axes.plot(x, y, "+", color="black", markersize=size + 2, markeredgewidth=3.5)
    axes.plot(x, y, "+", color=MARK, markersize=size, markeredgewidth=1.8)


def _show_cell(axes: Axes, row: AttentionRow, placement: Placement) -> None:
    """Outline the query's token."""
    from matplotlib.patches import Rectangle

    left, right, top, bottom = placement.box_in_image(row.stride, row.stride)
    width, height = right - left, bottom - top
    corner = (left + row.token[1] * width, top + row.token[0] * height)
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=MARK, linewidth=1.5))


def _new_figure(rows: int, columns: int, pixels: np.ndarray, bars: bool = True) -> tuple[Figure, np.ndarray]:
    """A figure of panels with an image's proportions, and the two colour bars below them where asked."""
    from matplotlib.figure import Figure

    height, width = pixels.shape[:2]
    panel = (WIDTH - 0.7) / columns * height / width
    figure = Figure(figsize=(WIDTH, rows * (panel + 0.3) + 1.1 + 0.4 * bars), layout="constrained")
    ratios = [1.0] * rows + [0.12 / panel] * bars
    grid = figure.add_gridspec(len(ratios), columns, height_ratios=ratios)
    axes = [[figure.add_subplot(grid[row, column]) for column in range(columns)] for row in range(rows)]
    if bars:
        _add_bar(figure.add_subplot(grid[-1, columns - 2 :]), WEIGHTS, "lowest", "highest of a panel's range")
        _add_bar(figure.add_subplot(grid[-1, columns - 4 : columns - 2]), SIGNED, "minus", "plus")
    return figure, np.array(axes)


def _add_bar(axes: Axes, colours: str, low: str, high: str) -> None:
    """A colour bar with words at its ends."""
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=colours, aspect="auto", extent=(0, 1, 0, 1))
    axes.set_xticks([0, 1], labels=[low, high], fontsize=10)
    axes.set_yticks([])
    first, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")


def draw_attention(
    rows: Sequence[AttentionRow],
    pixels: np.ndarray,
    query: tuple[float, float],
    placement: Placement | None = None,
    title: str = "",
) -> Figure:
    """Draw what one query attends to: a row of panels per stage, means over the heads.

    The columns are the image with the query and its token, the layer's weights, the landmarks' part in them,
    the exact Laplacian smoother's weights, and those of softmax. Weights are multiples of the mean weight
    1/N. The layer's and the exact weights of a stage share one range of colours. ``r`` is their correlation.
    The kernel's mass stands beside each stage, as a mean over the heads.

    Args:
        rows: what ``attention_rows`` returns.
        pixels: the image ``(H, W, 3)`` uint8 RGB.
        query: column and row of the query in it.
        placement: where the image lies in the network's input; None where it is the input.
        title: first line of the title.
    """
    placement = placement or Placement()
    figure, axes = _new_figure(len(rows), 5, pixels)
    for line, row in zip(axes, rows):
        height, width = row.nystroem.shape[1:]
        box = placement.box_in_image(width * row.stride, height * row.stride)
        _show_image(line[0], pixels, faded=False)
        _show_cell(line[0], row, placement)
        _mark(line[0], query, 9)
        name = f"stage {row.stage}, block {row.block}\n{height} x {width} tokens"
        line[0].set_ylabel(f"{name}\nkernel mass {float(row.mass.mean()):.1g}", fontsize=10)
        for panel_axes, panel in zip(line[1:], _panels(row, None)):
            _show_panel(panel_axes, panel, pixels, box)
            _mark(panel_axes, query, 6)
    for top, text in zip(axes[0], ["query and its token", *_titles(rows[0].normalization)]):
        top.set_title(text, fontsize=11)
    heading = (
        f"What {query[0]:g},{query[1]:g} attends to: weights as multiples of their mean, mean over heads"
    )
    figure.suptitle("\n".join(filter(None, [title, heading])), fontsize=12)
    return figure


def draw_heads(
    row: AttentionRow,
    pixels: np.ndarray,
    query: tuple[float, float],
    placement: Placement | None = None,
    title: str = "",
) -> Figure:
    """Draw every head of one layer, with the columns of ``draw_attention`` after its first."""
    placement = placement or Placement()
    heads, height, width = row.nystroem.shape
    box = placement.box_in_image(width * row.stride, height * row.stride)
    figure, axes = _new_figure(heads, 4, pixels)
    for head, line in enumerate(axes):
        line[0].set_ylabel(f"head {head + 1}\nkernel mass {float(row.mass[head]):.1g}", fontsize=10)
        for panel_axes, panel in zip(line, _panels(row, head)):
            _show_panel(panel_axes, panel, pixels, box)
            _show_cell(panel_axes, row, placement)
            _mark(panel_axes, query, 6)
    for top, text in zip(axes[0], _titles(row.normalization)):
        top.set_title(text, fontsize=11)
    heading = (
        f"What {query[0]:g},{query[1]:g} attends to in stage {row.stage}, block {row.block}: "
        "weights as multiples of their mean"
    )
    figure.suptitle("\n".join(filter(None, [title, heading])), fontsize=12)
    return figure


def draw_receptive_fields(fields: Sequence[Tensor], stages: Sequence[int], title: str = "") -> Figure:
    """Draw receptive fields ``(H, W)``, one panel per stage, in four decades below each one's maximum."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, WIDTH / len(fields) + 1.55), layout="constrained")
    axes = figure.subplots(1, len(fields), squeeze=False)[0]
    for panel, field, stage in zip(axes, fields, stages):
        shown = (field / field.max().clamp_min(1e-300)).numpy().clip(10.0**-DECADES)
        picture = panel.imshow(shown, cmap=FIELD, norm=LogNorm(10.0**-DECADES, 1))
        panel.set(xticks=[], yticks=[])
        panel.set_title(f"stage {stage}", fontsize=12)
        side = side_that_holds(field)
        panel.set_xlabel(
            f"half of it within\n{side} x {side} of {field.shape[1]} x {field.shape[0]}", fontsize=11
        )
    bar = figure.colorbar(picture, ax=list(axes), location="bottom", aspect=60, pad=0.02)
    bar.set_label("mean absolute gradient of the centre token, as a share of the largest (log scale)")
    figure.suptitle(title or "Effective receptive fields", fontsize=12)
    return figure


def draw_features(
    maps: Sequence[FeatureMap], pixels: np.ndarray, placement: Placement | None = None, title: str = ""
) -> Figure:
    """Draw maps over the area of the image: three principal components as RGB, and the mean activation."""
    placement = placement or Placement()
    figure, axes = _new_figure(2, len(maps) + 1, pixels, bars=False)
    _show_image(axes[0, 0], pixels, faded=False)
    axes[0, 0].set_title("image", fontsize=11)
    axes[1, 0].set_axis_off()
    for column, found in zip(axes.T[1:], maps):
        height, width = found.activation.shape
        left, right, top, bottom = placement.box_in_image(width * found.stride, height * found.stride)
        extent = (left, right, bottom, top)
        column[0].imshow(found.components.numpy(), extent=extent, interpolation="nearest")
        column[1].imshow(found.activation.numpy(), extent=extent, cmap="viridis", interpolation="nearest")
        column[0].set_title(f"stage {found.stage}\n{height} x {width} tokens", fontsize=11)
        column[0].set_xlabel(f"{sum(found.explained):.0%} of variance", fontsize=10)
        column[1].set_xlabel(_span(found.activation.numpy()), fontsize=10)
        for panel in column:
            _bare(panel, pixels)
    axes[0, 1].set_ylabel("3 principal\ncomponents", fontsize=11)
    axes[1, 1].set_ylabel("mean absolute\nactivation", fontsize=11)
    figure.suptitle(title or "Feature maps", fontsize=12)
    return figure
