"""The levels of a backbone: how they are measured, and which of our stages stand for them."""

import pytest
from torch import nn

pytest.importorskip("mmengine")
from mmengine.registry import MODELS

from lf_dense.swap.errors import SwapError
from lf_dense.swap.levels import Levels, choose_stages, measure_levels


@pytest.mark.parametrize(
    ("strides", "stages"),
    [
        ((4, 8, 16, 32), (0, 1, 2, 3)),
        ((8, 16, 32), (1, 2, 3)),
        ((16,), (2,)),
        ((8, 32), (1, 3)),
        # Dilated, all of one stride, or with a stride that we do not have: in order, the last one our last.
        ((4, 8, 8, 8), (0, 1, 2, 3)),
        ((16, 16, 16, 16), (0, 1, 2, 3)),
        ((8, 16, 32, 64), (0, 1, 2, 3)),
        ((2, 4, 8), (1, 2, 3)),
        ((8,), (1,)),
        ((64,), (3,)),
    ],
)
def test_stages_for_levels(strides, stages):
    assert choose_stages(Levels((8,) * len(strides), strides)) == stages


def test_decoders_and_five_levels_have_no_stages():
    with pytest.raises(SwapError, match="decoder"):
        choose_stages(Levels((8, 8), (16, 8)))
    with pytest.raises(SwapError, match="5 maps"):
        choose_stages(Levels((8,) * 5, (2, 4, 8, 16, 32)))


def test_levels_are_measured(mmdet):
    resnet = {
        "type": "ResNet",
        "depth": 18,
        "init_cfg": {"type": "Pretrained", "checkpoint": "https://nowhere.invalid/x.pth"},
    }
    assert measure_levels(resnet, "mmdet") == Levels((64, 128, 256, 512), (4, 8, 16, 32))
    assert measure_levels({**resnet, "out_indices": (2,), "strides": (1, 2, 1, 1)}, "mmdet") == Levels(
        (256,), (8,)
    )


@MODELS.register_module(name="lf_dense_test_backbone")
class Custom(nn.Module):
    """A user's own backbone, which returns a list of maps, one map, or no maps at all."""

    def __init__(self, channels=(8, 16), strides=(4, 8), kind="maps", init_cfg=None):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, c, s, s) for c, s in zip(channels, strides))
        self.kind = kind

    def forward(self, x):
        maps = [conv(x) for conv in self.convs]
        if self.kind == "tokens":
            return [m.flatten(2) for m in maps]
        if self.kind == "broken":
            raise RuntimeError("needs a text")
        return maps[0] if self.kind == "one" else maps


def test_any_registered_backbone_is_measured():
    custom = {"type": "lf_dense_test_backbone"}
    assert measure_levels(custom, "mmengine") == Levels((8, 16), (4, 8))
    assert measure_levels({**custom, "kind": "one"}, "mmengine") == Levels((8,), (4,))
    with pytest.raises(SwapError, match="other than maps"):
        measure_levels({**custom, "kind": "tokens"}, "mmengine")
    with pytest.raises(SwapError, match=r"does not run here.*needs a text"):
        measure_levels({**custom, "kind": "broken"}, "mmengine")
