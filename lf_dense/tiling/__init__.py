"""Images larger than memory: predicted tile by tile, and put together again."""

from .comparing import Agreement
from .predicting import Report, TileOptions, predict_tiled, tile_options, what_predicts
from .scaling import at_own_scale

__all__ = [
    "Agreement",
    "Report",
    "TileOptions",
    "at_own_scale",
    "predict_tiled",
    "tile_options",
    "what_predicts",
]
