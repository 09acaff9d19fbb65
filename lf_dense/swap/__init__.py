"""LaplacianFormer in place of the backbone of any config of the three frameworks."""

from .backbone import set_pretrained, swap_backbone
from .errors import SwapError

__all__ = ["SwapError", "set_pretrained", "swap_backbone"]
