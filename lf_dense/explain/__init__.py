"""Where the attention goes: pictures of what a query attends to, of receptive fields and of feature maps."""

from .capture import capture
from .features import feature_maps
from .figures import draw_attention, draw_features, draw_heads, draw_receptive_fields
from .pictures import explain_image
from .placing import Subject, load_subject, place_image
from .receptive import receptive_fields
from .rows import attention_rows

__all__ = [
    "Subject",
    "attention_rows",
    "capture",
    "draw_attention",
    "draw_features",
    "draw_heads",
    "draw_receptive_fields",
    "explain_image",
    "feature_maps",
    "load_subject",
    "place_image",
    "receptive_fields",
]
