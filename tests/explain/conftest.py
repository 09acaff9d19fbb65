"""A small backbone, and an image of an odd size."""

import pytest

pytest.importorskip("mmengine")
import torch

from lf_dense import LaplacianFormer

ARCH = {
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2,) * 4,
}


def make(**settings):
    """A backbone whose queries and keys lie far enough apart for its rows to differ."""
    backbone = LaplacianFormer(ARCH, **settings).eval()
    with torch.no_grad():
        for stage in backbone.stages:
            for block in stage.blocks:
                for layer in (block.attn.q, block.attn.k):
                    layer.weight.mul_(40)
    return backbone


@pytest.fixture
def small():
    """Makes small backbones with the settings that it is given."""
    return make


@pytest.fixture
def backbone():
    return make()


@pytest.fixture
def arch():
    return ARCH


@pytest.fixture
def image():
    return torch.randn(1, 3, 75, 109)


@pytest.fixture
def photo(tmp_path):
    """An image file of 90 x 60 pixels."""
    import numpy as np
    from PIL import Image

    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)).save(path)
    return path
