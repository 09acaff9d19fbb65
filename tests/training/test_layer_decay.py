"""Layer-wise learning-rate decay: the rate of every parameter of a detector, a segmentor and a classifier."""

import pytest
import torch

pytest.importorskip("mmengine")
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lf_dense import LaplacianFormer
from lf_dense.errors import UsageError
from lf_dense.frameworks import load_config
from lf_dense.training import layer_decay

RATE, LR, DECAY = 0.5, 1e-3, 0.05
CONFIGS = {
    "mmdet": "configs/retinanet_lf.py",
    "mmseg": "configs/segmentation/upernet_lf-tiny_160k_ade20k-512x512.py",
    "mmpretrain": "configs/imagenet/lf-tiny_300e_in1k.py",
}
# Tiny has 2, 2, 2, 2 blocks: layer 0 is the first patch embedding, 1 to 8 are the blocks, 9 is outside.
LAYERS = {
    "backbone.stages.0.patch_embed.": 0,
    "backbone.stages.0.blocks.0.": 1,
    "backbone.stages.0.blocks.1.": 2,
    "backbone.stages.0.norm.": 2,
    "backbone.stages.1.patch_embed.": 3,
    "backbone.stages.1.blocks.0.": 3,
    "backbone.stages.1.blocks.1.": 4,
    "backbone.stages.1.norm.": 4,
    "backbone.stages.2.patch_embed.": 5,
    "backbone.stages.2.blocks.0.": 5,
    "backbone.stages.2.blocks.1.": 6,
    "backbone.stages.2.norm.": 6,
    "backbone.stages.3.patch_embed.": 7,
    "backbone.stages.3.blocks.0.": 7,
    "backbone.stages.3.blocks.1.": 8,
    "backbone.stages.3.norm.": 8,
}


def wrapper(**paramwise):
    return {
        "constructor": "LayerDecayOptimizer",
        "optimizer": {"type": "AdamW", "lr": LR, "weight_decay": DECAY},
        "paramwise_cfg": paramwise,
    }


def groups_by_name(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter, name in zip(group["params"], group["param_names"]):
            assert names[id(parameter)] == name
            assert name not in found
            found[name] = group
    return found


@pytest.mark.parametrize("scope", CONFIGS)
def test_every_parameter_s_rate(scope):
    pytest.importorskip(scope)
    config = load_config(CONFIGS[scope])
    init_default_scope(scope)
    model = MODELS.build(config.model)
    settings = wrapper(layer_decay_rate=RATE, norm_decay_mult=0.0, bias_decay_mult=0.0)
    built = build_optim_wrapper(model, settings)
    groups = groups_by_name(model, built.optimizer)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(groups) == set(trained)
    kinds = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)
    norms = {f"{name}." for name, module in model.named_modules() if isinstance(module, kinds)}
    for name in trained:
        layer = next((layer for prefix, layer in LAYERS.items() if name.startswith(prefix)), 9)
        assert groups[name]["lr"] == pytest.approx(LR * RATE ** (9 - layer)), name
        free = name.endswith(".bias") or any(name.startswith(norm) for norm in norms)
        assert groups[name]["weight_decay"] == (0.0 if free else DECAY), name
    rates = [group["lr"] for group in built.optimizer.param_groups]
    assert rates == sorted(rates)
    assert len(rates) == 20


def test_factors_multiply_and_frozen_parameters_stay_out():
    model = nn.ModuleDict({"backbone": LaplacianFormer("tiny", frozen_stages=0), "head": nn.Linear(512, 3)})
    keys = {"head": {"lr_mult": 10.0}, "blocks.0.attn": {"lr_mult": 0.1, "decay_mult": 0.0}}
    built = build_optim_wrapper(model, wrapper(layer_decay_rate=RATE, custom_keys=keys))
    groups = groups_by_name(model, built.optimizer)
    assert groups["head.weight"]["lr"] == pytest.approx(10 * LR)
    assert groups["backbone.stages.3.blocks.0.attn.q.weight"]["lr"] == pytest.approx(0.1 * LR * RATE**2)
    assert groups["backbone.stages.3.blocks.0.attn.q.weight"]["weight_decay"] == 0
    assert groups["backbone.stages.3.blocks.0.ffn.fc1.weight"]["weight_decay"] == DECAY
    assert not any(name.startswith("backbone.stages.0.patch_embed.") for name in groups)


def test_training_and_resuming_with_it():
    torch.manual_seed(0)
    model = nn.ModuleDict({"backbone": LaplacianFormer("tiny"), "head": nn.Linear(512, 3)})
    built = build_optim_wrapper(model, wrapper(layer_decay_rate=RATE))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    out = model["backbone"](torch.randn(1, 3, 64, 64))
    loss = model["head"](out[-1].mean((2, 3))).square().sum() + sum(x.square().mean() for x in out)
    built.update_params(loss)
    # AdamW's first step is its learning rate, whatever the gradient.
    for name, layer in (
        ("backbone.stages.0.patch_embed.norm.weight", 0),
        ("backbone.stages.3.norm.weight", 8),
    ):
        rate = LR * RATE ** (9 - layer)
        decayed = before[name] * (1 - rate * DECAY)
        step = (dict(model.named_parameters())[name] - decayed).abs().max()
        assert step.item() == pytest.approx(rate, rel=0.02)
    again = build_optim_wrapper(model, wrapper(layer_decay_rate=RATE))
    again.load_state_dict(built.state_dict())
    rates, expected = ([group["lr"] for group in x.optimizer.param_groups] for x in (again, built))
    assert rates == expected


def test_it_prints_the_groups(monkeypatch):
    printed = []
    monkeypatch.setattr(layer_decay, "print_log", lambda text, logger: printed.append(text))
    model = nn.ModuleDict({"backbone": LaplacianFormer("tiny"), "head": nn.Linear(512, 3)})
    build_optim_wrapper(model, wrapper(layer_decay_rate=RATE))
    first = "backbone.stages.0.patch_embed.proj.weight"
    assert printed[0] == f"lr {LR * RATE**9:g}: 4 parameters, {first} the first"
    assert printed[-1] == f"lr {LR:g}: 2 parameters, head.weight the first"
    assert len(printed) == 10


@pytest.mark.parametrize("rate", [None, 0, -1, 1.5, "0.8"])
def test_a_rate_that_cannot_be(rate):
    with pytest.raises(UsageError, match="layer_decay_rate"):
        build_optim_wrapper(LaplacianFormer("tiny"), wrapper(layer_decay_rate=rate))


def test_a_model_without_the_backbone():
    with pytest.raises(UsageError, match="the model has none"):
        build_optim_wrapper(nn.Linear(2, 2), wrapper(layer_decay_rate=RATE))
