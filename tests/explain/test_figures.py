"""Figures: what is in which panel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")
pytest.importorskip("matplotlib")

from lf_dense.explain import (
    attention_rows,
    draw_attention,
    draw_features,
    draw_heads,
    draw_receptive_fields,
    feature_maps,
)
from lf_dense.explain.placing import Placement

PIXELS = np.zeros((75, 109, 3), np.uint8)


def texts(figure):
    return " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def shown(axes):
    """The map in a panel, above the faded image."""
    return np.asarray(axes.images[-1].get_array())


def test_a_panel_for_each_stage_and_column(backbone, image):
    rows = attention_rows(backbone, image, (50, 40))
    figure = draw_attention(rows, PIXELS, (50, 40), title="photo.png")
    panels = np.array(figure.axes[2:] if len(figure.axes) % 5 == 0 else figure.axes[:20]).reshape(4, 5)
    for line, row in zip(panels, rows):
        tokens = row.nystroem[0].numel()
        for axes, maps, factor in (
            (line[1], row.nystroem, tokens),
            (line[2], row.landmarks, 1),
            (line[3], row.exact, tokens),
            (line[4], row.softmax, tokens),
        ):
            assert np.allclose(shown(axes), maps.mean(0).numpy() * factor)
        # The layer's and the exact weights can be compared by colour.
        assert line[1].images[-1].get_clim() == line[3].images[-1].get_clim()
        low, high = line[2].images[-1].get_clim()
        assert low == -high
    said = texts(figure)
    assert "photo.png" in said
    assert "stage 4, block 1" in said
    assert f"r {rows[0].agreement():.3f}" in said
    assert "the layer's normalisation" in said


def test_the_title_says_how_the_exact_row_is_normalised(small, image):
    rows = attention_rows(small(normalization="whiten_keys"), image, (50, 40))
    assert "divided by its sum" in texts(draw_attention(rows, PIXELS, (50, 40)))


def test_a_map_covers_the_tokens_area_of_the_image(backbone, image):
    rows = attention_rows(backbone, image, (50, 40), [4])
    figure = draw_attention(rows, PIXELS, (50, 40), Placement((2.0, 2.0), (10.0, 0.0)))
    left, right, bottom, top = figure.axes[1].images[-1].get_extent()
    assert (left, right, top, bottom) == (-5.0, -5.0 + 4 * 32 / 2, 0.0, 3 * 32 / 2)
    assert figure.axes[1].get_xlim() == (0, 109)


def test_a_line_for_each_head(backbone, image):
    (row,) = attention_rows(backbone, image, (50, 40), [3])
    figure = draw_heads(row, PIXELS, (50, 40))
    assert all(f"head {head}" in texts(figure) for head in (1, 2, 3))
    assert np.allclose(shown(figure.axes[4]), row.nystroem[1].numpy() * row.nystroem[1].numel())


def test_a_map_of_one_token_can_be_drawn(backbone):
    image = torch.randn(1, 3, 32, 32)
    figure = draw_attention(attention_rows(backbone, image, (3, 3)), PIXELS[:32, :32], (3, 3))
    figure.canvas.draw()
    assert "1 x 1 tokens" in texts(figure)
    assert "nan" not in texts(figure)


def test_receptive_fields_have_log_scaled_colours():
    fields = [torch.rand(32, 32) * 10**-stage for stage in range(4)]
    figure = draw_receptive_fields(fields, [1, 2, 3, 4])
    panels = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(panels) == 4
    assert all(panel.norm(1e-2) == pytest.approx(0.5) for panel in panels)
    assert all(panel.get_array().max() == pytest.approx(1) for panel in panels)


def test_features_have_a_column_for_each_map(backbone, image):
    maps = feature_maps(backbone, image)
    figure = draw_features(maps, PIXELS)
    assert np.allclose(shown(figure.axes[2]), maps[1].components)
    assert np.allclose(shown(figure.axes[7]), maps[1].activation)
