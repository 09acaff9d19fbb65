"""What an attention layer attends with: its queries, keys, values and landmarks for one image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention import LaplacianAttention, RotaryTable
from ..errors import UsageError
from ..laplacianformer import LaplacianFormer
from ..presets import STRIDES


@dataclass(frozen=True)
class LayerInputs:
    """What one layer attends with, for one image.

    Attributes:
        stage: 1 to 4.
        block: 1 to the stage's depth.
        layer: the layer itself, for its settings.
        q, k: rotated queries and keys ``(heads, N, d)``, float64 on the CPU.
        v: values ``(heads, N, d)``, float64 on the CPU.
        landmarks: ``(heads, m, d)``, float64 on the CPU.
        hw_shape: rows and columns of the tokens; their product is N.
        grid: rows and columns of the landmarks; their product is m.
    """

    stage: int
    block: int
    layer: LaplacianAttention
    q: Tensor
    k: Tensor
    v: Tensor
    landmarks: Tensor
    hw_shape: tuple[int, int]
    grid: tuple[int, int]

    @property
    def stride(self) -> int:
        """Pixels of the network's input per token."""
        return STRIDES[self.stage - 1]


def find_backbone(model: nn.Module) -> LaplacianFormer:
    """The LaplacianFormer of a model: the model itself, its ``backbone``, or the first one inside.

    Raises:
        UsageError: there is none.
    """
    for module in (model, getattr(model, "backbone", None), *model.modules()):
        if isinstance(module, LaplacianFormer):
            return module
    raise UsageError(
        f"the model {type(model).__name__} holds no LaplacianFormer, whose attention could be shown: take a "
        "config with one, or put one into this config with --backbone."
    )


def choose_stages(backbone: LaplacianFormer, stages: Sequence[int] | None = None) -> list[int]:
    """Check stages, counted from 1; None stands for all that the backbone runs.

    Raises:
        UsageError: a stage does not exist, or the backbone does not run it.
    """
    last = backbone.out_indices[-1] + 1
    for stage in stages or ():
        if stage not in range(1, last + 1):
            raise UsageError(f"the stage {stage} is not there: this backbone runs the stages 1 to {last}.")
    return sorted(set(stages or range(1, last + 1)))


def choose_block(backbone: LaplacianFormer, stage: int, block: int | None = None) -> int:
    """Check a block of a stage, counted from 1; None stands for the last.

    Raises:
        UsageError: the stage has no such block.
    """
    depth = backbone.depths[stage - 1]
    if block is not None and block not in range(1, depth + 1):
        raise UsageError(f"the block {block} is not there: stage {stage} has the blocks 1 to {depth}.")
    return block or depth


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for a block, and back afterwards."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _layer_inputs(
    stage: int, block: int, layer: LaplacianAttention, x: Tensor, hw_shape: tuple[int, int]
) -> LayerInputs:
    """Repeat what the layer does before it attends, for the first image of ``(B, N, C)``."""
    x = x[:1]
    table = RotaryTable(hw_shape, layer.head_dims, x.device)
    q, k = (layer.split_and_rotate(project(x), table) for project in (layer.q, layer.k))
    landmarks = layer.pool_landmarks(q, hw_shape)[0].cpu().double()
    q, k, v = (tensor[0].transpose(0, 1).cpu().double() for tensor in (q, k, layer.split(layer.v(x))))
    rows, columns = (min(cells, size) for cells, size in zip(layer.landmark_grid, hw_shape))
    return LayerInputs(stage, block, layer, q, k, v, landmarks, hw_shape, (rows, columns))


@torch.no_grad()
def capture(
    model: nn.Module, image: Tensor, stages: Sequence[int] | None = None, block: int | None = None
) -> list[LayerInputs]:
    """Run the backbone on one image, and take what one layer of each stage attends with.

    The backbone runs in eval mode. Memory is linear in the number of tokens.

    Args:
        model: a LaplacianFormer, or a model with one inside.
        image: normalised image ``(1, C, H, W)`` or ``(C, H, W)`` on the model's device.
        stages: stages to take, 1 to 4; None takes all.
        block: block of each stage, from 1 on; None takes the last.

    Returns:
        One entry per stage, in order.

    Raises:
        UsageError: the model has no LaplacianFormer, or a stage or block does not exist.
    """
    backbone = find_backbone(model)
    chosen = [(stage, choose_block(backbone, stage, block)) for stage in choose_stages(backbone, stages)]
    taken: dict[int, LayerInputs] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(backbone))
        for stage, number in chosen:

            def take(
                layer: LaplacianAttention, inputs: tuple, stage: int = stage, number: int = number
            ) -> None:
                taken[stage] = _layer_inputs(stage, number, layer, inputs[0], inputs[1])

            attention = backbone.get_submodule(f"stages.{stage - 1}.blocks.{number - 1}.attn")
            stack.callback(attention.register_forward_pre_hook(take).remove)
        backbone(image if image.ndim == 4 else image[None])
    return [taken[stage] for stage, _ in chosen]
