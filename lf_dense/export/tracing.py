"""Layers whose sizes torch.export would freeze, replaced by ones of the same function that it can follow."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import pooling_matrix


def _pair(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value, value)


class _Upsample(nn.Module):
    """mmseg's Upsample by a whole factor; its own computes sizes by ``int()``, which a graph takes for
    constants."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.factors = _pair(layer.scale_factor)
        self.mode, self.align_corners = layer.mode, layer.align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = [side * int(factor) for side, factor in zip(x.shape[2:], self.factors)]
        return F.interpolate(x, size, mode=self.mode, align_corners=self.align_corners)


class _AdaptiveAvgPool(nn.Module):
    """Adaptive average pooling as two products; ONNX has none for maps of any size."""

    def __init__(self, layer: nn.AdaptiveAvgPool2d) -> None:
        super().__init__()
        self.size = _pair(layer.output_size)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (
            pooling_matrix(side, cells or side, x) for side, cells in zip(x.shape[2:], self.size)
        )
        return rows @ x @ columns.mT


def _replacement(layer: nn.Module) -> nn.Module | None:
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return None if layer.output_size in (1, (1, 1)) else _AdaptiveAvgPool(layer)
    kind = type(layer)
    if kind.__name__ == "Upsample" and kind.__module__.startswith("mmseg."):
        upsample: Any = layer
        if upsample.size is None and all(float(f).is_integer() for f in _pair(upsample.scale_factor)):
            return _Upsample(layer)
    return None


def traceable(module: nn.Module) -> nn.Module:
    """A copy of a module that is the same function, for ``torch.export`` to follow at any size."""
    module = copy.deepcopy(module)
    for name, layer in list(module.named_modules()):
        replacement = _replacement(layer)
        if replacement is not None and name:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, replacement)
    return module.eval()
