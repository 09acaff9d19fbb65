"""The training of one variant: what a seed decides, and what is measured."""

import pytest
import torch
from torch import nn

from lf_dense.ablation import training
from lf_dense.ablation.images import Images
from lf_dense.ablation.training import accuracy, lr_factor, parameter_groups, train
from lf_dense.ablation.variants import BASELINE, Recipe

RECIPE = Recipe(image_size=16, embed_dims=(64, 64), depths=(1, 1), mlp_ratio=1, epochs=2, batch_size=4)


def some_images(count):
    pixels = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 2)


@pytest.fixture
def splits():
    return {"train": some_images(10), "val": some_images(8)}


def test_the_same_seed_gives_the_same_numbers(splits):
    first, second, other = (train(BASELINE, seed, RECIPE, splits, torch.device("cpu")) for seed in (3, 3, 4))
    assert first["curve"] == second["curve"]
    assert first["curve"] != other["curve"]
    assert [point["epoch"] for point in first["curve"]] == [1, 2]
    assert first["top1"] == first["curve"][-1]["top1"]
    assert (first["variant"], first["seed"], first["recipe"]) == (BASELINE, 3, RECIPE._asdict())


def test_a_loss_that_is_not_finite_ends_the_training(splits, monkeypatch):
    monkeypatch.setattr(training.F, "cross_entropy", lambda logits, *_, **__: logits.sum() * float("nan"))
    with pytest.raises(RuntimeError, match="seed 0, is nan in epoch 1"):
        train(BASELINE, 0, RECIPE, splits, torch.device("cpu"))


def test_accuracy_counts_every_image():
    class Label(nn.Module):
        """Reads the class from the first pixel."""

        def forward(self, x):
            assert not self.training
            return torch.stack((-x[:, 0, 0, 0], x[:, 0, 0, 0]), dim=1)

    labels = torch.tensor([0, 1, 1, 0, 1])
    pixels = (labels * 255).to(torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    model = Label()
    assert accuracy(model, Images(pixels, labels), batch_size=2) == 100
    labels[-1] = 0
    assert accuracy(model, Images(pixels, labels), batch_size=2) == 80
    assert model.training


def test_learning_rate_rises_and_falls():
    factors = [lr_factor(step, warm=3, total=10) for step in range(11)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors[3] == 1
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert factors[10] == pytest.approx(0)


def test_no_weight_decay_for_vectors():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    decayed, others = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert [p.ndim for p in others["params"]] == [1, 1, 1, 1]
