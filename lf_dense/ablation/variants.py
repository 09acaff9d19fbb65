"""What is compared: the variants of the attention, and the one model and recipe around all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..attention import LaplacianAttention
from ..blocks import Block, PatchEmbed, Stage, init_weights
from .attentions import (
    ExactLaplacianAttention,
    GaussianAttention,
    SoftmaxAttention,
    SpatialReductionAttention,
)

BASELINE = "laplacian"
HEAD_DIMS = 64
REDUCTIONS = (2, 1)


class Recipe(NamedTuple):
    """How every variant is trained; two stages at strides 4 and 8."""

    image_size: int
    embed_dims: tuple[int, int]
    depths: tuple[int, int]
    mlp_ratio: int
    epochs: int
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.15
    label_smoothing: float = 0.1
    smallest_crop: float = 0.5
    train_images: int | None = None
    val_images: int | None = None


FORMS = {
    "cpu": Recipe(image_size=56, embed_dims=(64, 128), depths=(1, 1), mlp_ratio=2, epochs=4),
    "gpu": Recipe(image_size=96, embed_dims=(64, 128), depths=(2, 2), mlp_ratio=4, epochs=12, batch_size=128),
}


class Variant(NamedTuple):
    """One attention: its title in the table, and what makes it for a width and the index of a stage."""

    title: str
    make: Callable[[int, int], nn.Module]


def _variant(
    title: str, attention: type[LaplacianAttention] = LaplacianAttention, **settings: Any
) -> Variant:
    return Variant(title, lambda dims, stage: attention(dims, dims // HEAD_DIMS, **settings))


def _spatial_reduction(dims: int, stage: int) -> SpatialReductionAttention:
    return SpatialReductionAttention(dims, dims // HEAD_DIMS, REDUCTIONS[stage])


VARIANTS = {
    BASELINE: _variant("Laplacian, Nystroem, `mass`, tau 1e-2, 7 x 7 landmarks, rotary (the default)"),
    "whiten_keys": _variant("normalization `whiten_keys`", normalization="whiten_keys"),
    "whiten_landmarks": _variant("normalization `whiten_landmarks`", normalization="whiten_landmarks"),
    "tau_1e-3": _variant("tau 1e-3", tau=1e-3),
    "tau_1e-1": _variant("tau 1e-1", tau=1e-1),
    "grid_4": _variant("4 x 4 landmarks", landmark_grid=(4, 4)),
    "grid_14": _variant("14 x 14 landmarks", landmark_grid=(14, 14)),
    "no_rotary": _variant("no rotary embedding", rotary=False),
    "learned_scale": _variant("a learned kernel scale per head", learn_kernel_scale=True),
    "exact": _variant("exact N x N Laplacian smoother", ExactLaplacianAttention),
    "gaussian": _variant("Gaussian kernel (SOFT's), the same Nystroem form", GaussianAttention),
    "gaussian_learned_scale": _variant(
        "Gaussian kernel, a learned scale per head", GaussianAttention, learn_kernel_scale=True
    ),
    "softmax": _variant("full softmax", SoftmaxAttention),
    "spatial_reduction": Variant("PVTv2's spatial-reduction softmax", _spatial_reduction),
}


def build_model(variant: Variant, recipe: Recipe, num_classes: int) -> nn.Module:
    """The pyramid with one variant's attention: images ``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
    stages, channels = [], 3
    for index, (dims, depth) in enumerate(zip(recipe.embed_dims, recipe.depths)):
        blocks = [Block(dims, recipe.mlp_ratio, variant.make(dims, index)) for _ in range(depth)]
        patch_embed = PatchEmbed(channels, dims, kernel_size=3 if index else 7, stride=2 if index else 4)
        stages.append(Stage(patch_embed, blocks, dims))
        channels = dims
    model = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    init_weights(model)
    return model
