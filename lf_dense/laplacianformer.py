"""The LaplacianFormer pyramid and its presets, registered once in mmengine's root registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .attention import LaplacianAttention, landmark_grid_pair
from .blocks import Block, PatchEmbed, Stage, init_weights
from .presets import (
    KERNEL_SCALE,
    LANDMARK_GRID,
    NEWTON_ITERS,
    NORMALIZATION,
    NUM_STAGES,
    TAU,
    resolve_arch,
)

MIN_SIZE = 32


def _resolve_grids(landmark_grid: Sequence[Any]) -> list[tuple[int, int]]:
    per_stage = isinstance(landmark_grid, (tuple, list)) and len(landmark_grid) == NUM_STAGES
    return [
        landmark_grid_pair(grid) for grid in (landmark_grid if per_stage else [landmark_grid] * NUM_STAGES)
    ]


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}, and has to be in [0, 1).")


@MODELS.register_module()
class LaplacianFormer(BaseModule):
    """A four-stage pyramid (strides 4, 8, 16, 32) with Laplacian linear attention.

    "LaplacianFormer: Rethinking Linear Attention with Laplacian Kernel" (arXiv 2604.20368) in the PVTv2
    shape. Cost and memory are linear in the number of pixels. The type resolves by its bare name in mmdet,
    mmseg and mmpretrain configs.

    Args:
        arch: ``"tiny"``, ``"small"``, ``"medium"``, ``"large"``, ``"huge"``, or a dict with ``embed_dims``,
            ``depths``, ``num_heads`` and ``mlp_ratios``, four integers each. Depths above tiny are
            reconstructed from published counts.
        in_channels: channels of the image.
        out_indices: the stages whose maps are returned, each 0 to 3, increasing. Stages after the last are
            not run and take no gradient.
        frozen_stages: -1 freezes nothing, 0 the first patch embedding, k in 1..4 the stages 1..k whole (no
            gradient, eval mode).
        norm_eval: keep norm layers in eval mode. LayerNorm has no running statistics, so nothing changes in
            the outputs; the argument is there for configs that set it for whichever backbone they have.
        with_cp: recompute each block in the backward pass instead of keeping its activations.
        drop_rate: dropout after the attention's projection and in the feed-forward network.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        landmark_grid: rows and columns of landmarks, one pair or one pair per stage.
        kernel_scale: the Laplacian kernel's scale lambda.
        newton_iters: Newton-Schulz steps of the landmark inverse.
        normalization: ``"mass"``, ``"whiten_keys"`` or ``"whiten_landmarks"``; see
            ``lf_dense.functional.laplacian_attention``.
        tau: the kernel mass at which a query's row is half its own and half the mean, in ``"mass"``.
        rotary: turn queries and keys by their place in the map.
        learn_kernel_scale: let every head learn a factor to ``kernel_scale``, from 1 on.
        out_channels_last: return the maps as they lie in memory, channels-last, and save one copy of each.
            For necks and heads of torch's own operators alone: mmcv's RoIAlign reads such maps as if they had
            the usual layout, without an error.
        ffn_with_cp: like ``with_cp``, for the feed-forward networks alone: their hidden maps are most of what
            a block keeps.
        init_cfg: mmengine initialisation, ``dict(type="Pretrained", checkpoint=...)`` for example. None keeps
            the default: truncated normal of 0.02 for linear layers, fan-out normal for convolutions.

    Input: float images ``(B, in_channels, H, W)`` with H and W at least 32, odd sizes included.
    Output: a tuple of maps ``(B, embed_dims[i], ceil(H / stride), ceil(W / stride))``.

    Raises:
        ValueError: an argument is out of range; the message says which and what is possible.
    """

    _version = 1

    def __init__(
        self,
        arch: str | Mapping[str, Sequence[int]] = "tiny",
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        landmark_grid: Sequence[Any] = LANDMARK_GRID,
        kernel_scale: float = KERNEL_SCALE,
        newton_iters: int = NEWTON_ITERS,
        normalization: str = NORMALIZATION,
        tau: float = TAU,
        rotary: bool = True,
        learn_kernel_scale: bool = False,
        out_channels_last: bool = False,
        ffn_with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        settings = resolve_arch(arch)
        grids = _resolve_grids(landmark_grid)
        if (
            isinstance(out_indices, int)
            or not out_indices
            or sorted({*out_indices} & {*range(NUM_STAGES)}) != list(out_indices)
        ):
            raise ValueError(
                f"out_indices is {out_indices!r}, and has to be increasing stage numbers from 0 to "
                f"{NUM_STAGES - 1}."
            )
        if frozen_stages not in range(-1, NUM_STAGES + 1):
            raise ValueError(
                f"frozen_stages is {frozen_stages!r}, and has to be from -1 (nothing) to {NUM_STAGES} "
                "(everything)."
            )
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f"in_channels is {in_channels!r}, and has to be a positive integer.")
        _check_probability("drop_rate", drop_rate)
        _check_probability("drop_path_rate", drop_path_rate)

        self.embed_dims = settings["embed_dims"]
        self.depths = settings["depths"]
        self.in_channels = in_channels
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.out_channels_last = out_channels_last
        drop_path_rates = iter(torch.linspace(0, drop_path_rate, sum(self.depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        for index, dims in enumerate(self.embed_dims):
            blocks = [
                Block(
                    dims,
                    settings["mlp_ratios"][index],
                    LaplacianAttention(
                        dims,
                        settings["num_heads"][index],
                        landmark_grid=grids[index],
                        kernel_scale=kernel_scale,
                        newton_iters=newton_iters,
                        normalization=normalization,
                        tau=tau,
                        rotary=rotary,
                        learn_kernel_scale=learn_kernel_scale,
                        proj_drop=drop_rate,
                    ),
                    drop_rate,
                    next(drop_path_rates),
                    ffn_with_cp and not with_cp,
                )
                for _ in range(self.depths[index])
            ]
            first = index == 0
            patch_embed = PatchEmbed(
                in_channels if first else self.embed_dims[index - 1],
                dims,
                kernel_size=7 if first else 3,
                stride=4 if first else 2,
            )
            self.stages.append(Stage(patch_embed, blocks, dims, with_cp))
        # What no output depends on would stop a distributed run for want of gradients; it stays, so that
        # weights fit.
        self.stages[self.out_indices[-1] + 1 :].requires_grad_(False)
        # At construction, not in init_weights: what a checkpoint does not cover then starts sensibly too.
        init_weights(self)
        self._freeze_stages()

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.stages[0].patch_embed, *self.stages[: self.frozen_stages]]

    def _freeze_stages(self) -> None:
        for module in self._frozen_modules():
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> LaplacianFormer:
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, (nn.LayerNorm, _BatchNorm)):
                    module.eval()
        return self

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"the image batch has shape {tuple(x.shape)}, and has to be (B, {self.in_channels}, H, W)."
            )
        if not x.is_floating_point():
            raise TypeError(
                f"the image batch is {x.dtype}: normalise it to floating point first (a data_preprocessor "
                "does that)."
            )
        if x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
            raise ValueError(
                f"the images are {x.shape[2]} x {x.shape[3]}, and have to be at least {MIN_SIZE} x "
                f"{MIN_SIZE}: pad or enlarge them."
            )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self._check_input(x)
        if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # half as much to lay out anew
        x = x.contiguous(memory_format=torch.channels_last)
        outs: list[Tensor] = []
        for index, stage in enumerate(self.stages[: self.out_indices[-1] + 1]):
            returned = index in self.out_indices
            x = stage(x, outs if returned and not self.out_channels_last else None)
            if returned and self.out_channels_last:
                outs.append(x)
        return tuple(outs)

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Layer of a parameter for layer-wise learning-rate decay, in mmpretrain's convention.

        Args:
            param_name: name of a parameter, as ``named_parameters`` of the whole model gives it.
            prefix: what stands before this backbone's own names, ``"backbone."`` usually.

        Returns:
            ``(layer_depth, num_layers)``: 0 for the first patch embedding, i + 1 for block i of the network,
            together with the patch embedding before it and the norm after it, and ``num_layers - 1`` for
            whatever is not in the backbone.

        Raises:
            ValueError: the name has the prefix and is no parameter of this backbone.
        """
        num_layers = sum(self.depths) + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        name = param_name[len(prefix) :]
        if name not in dict(self.named_parameters()):
            raise ValueError(
                f"{param_name!r} is not a parameter of this LaplacianFormer under the prefix {prefix!r}."
            )
        parts = name.split(".")
        stage = int(parts[1])
        first_layer = sum(self.depths[:stage]) + 1
        if parts[2] == "patch_embed":
            return (0 if stage == 0 else first_layer), num_layers
        if parts[2] == "norm":
            return first_layer + self.depths[stage] - 1, num_layers
        return first_layer + int(parts[3]), num_layers
