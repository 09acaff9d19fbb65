"""What is taken from a forward pass, and what the pass leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from lf_dense.errors import UsageError
from lf_dense.explain import capture
from lf_dense.explain.capture import find_backbone


def test_the_backbone_is_found_wherever_it_is(small, backbone):
    holder = nn.Module()
    holder.inner = nn.Sequential(nn.Identity(), backbone)
    assert find_backbone(backbone) is backbone
    assert find_backbone(holder) is backbone
    holder.backbone = small()
    assert find_backbone(holder) is holder.backbone


def test_a_model_without_a_laplacianformer():
    with pytest.raises(UsageError, match="the model Linear holds no LaplacianFormer"):
        capture(nn.Linear(3, 3), torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("stage", [0, 5, -1])
def test_a_stage_that_is_not_there(stage, backbone, image):
    with pytest.raises(
        UsageError, match=rf"stage {stage} is not there: this backbone runs the stages 1 to 4"
    ):
        capture(backbone, image, [stage])


def test_a_stage_that_the_backbone_does_not_run(small, image):
    backbone = small(out_indices=(0, 1))
    with pytest.raises(UsageError, match="runs the stages 1 to 2"):
        capture(backbone, image, [3])
    assert [inputs.stage for inputs in capture(backbone, image)] == [1, 2]


@pytest.mark.parametrize("block", [0, 2])
def test_a_block_that_is_not_there(block, backbone, image):
    with pytest.raises(UsageError, match=f"block {block} is not there: stage 1 has the blocks 1 to 1"):
        capture(backbone, image, [1], block)


def test_blocks_differ(backbone, image):
    first, last = (capture(backbone, image, [2], block)[0] for block in (1, None))
    assert (first.block, last.block) == (1, 2)
    assert last.layer is backbone.stages[1].blocks[1].attn
    assert not torch.equal(first.q, last.q)


def test_the_model_stays_as_it_was(backbone, image):
    backbone.train()
    capture(backbone, image)
    assert backbone.training
    layers = [block.attn for stage in backbone.stages for block in stage.blocks]
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_dropout_is_off(small, image):
    backbone = small(drop_rate=0.5, drop_path_rate=0.5).train()
    first, second = (capture(backbone, image, [4])[0].q for _ in range(2))
    assert torch.equal(first, second)


def test_an_image_without_a_batch_is_one_image(backbone, image):
    alone, batch = (capture(backbone, x, [1])[0].k for x in (image[0], image))
    assert torch.equal(alone, batch)
