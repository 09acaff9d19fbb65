"""The training of one variant from one seed."""

from __future__ import annotations

import math
import platform
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .images import Images, augment, normalise
from .variants import VARIANTS, Recipe, build_model


@torch.inference_mode()
def accuracy(model: nn.Module, images: Images, batch_size: int = 256) -> float:
    """Top-1 in percent."""
    model.eval()
    right = 0
    for pixels, labels in zip(images.pixels.split(batch_size), images.labels.split(batch_size)):
        right += int((model(normalise(pixels)).argmax(1) == labels).sum())
    model.train()
    return 100 * right / len(images.labels)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and convolutions, none for biases and norms."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def lr_factor(step: int, warm: int, total: int) -> float:
    """A linear warm-up of ``warm`` steps, then a half cosine to zero at ``total``."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


class Trainer:
    """One model with what trains it; the seed decides weights, order of images and augmentation."""

    def __init__(self, name: str, seed: int, recipe: Recipe, train_set: Images) -> None:
        self.recipe, self.train_set = recipe, train_set
        self.device = train_set.labels.device
        torch.manual_seed(seed)
        model = build_model(VARIANTS[name], recipe, int(train_set.labels.max()) + 1)
        self.model = model.to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = parameter_groups(self.model, recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
        self.steps_per_epoch = len(train_set.labels) // recipe.batch_size
        total = self.steps_per_epoch * recipe.epochs
        factor = partial(lr_factor, warm=max(1, int(recipe.warmup * total)), total=total)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.generator = torch.Generator().manual_seed(seed)

    def train_epoch(self) -> float:
        """Every image once, without the last incomplete batch; the mean loss."""
        order = torch.randperm(len(self.train_set.labels), generator=self.generator).to(self.device)
        whole_batches = order[: self.steps_per_epoch * self.recipe.batch_size]
        losses = [self.train_step(batch) for batch in whole_batches.split(self.recipe.batch_size)]
        return torch.stack(losses).mean().item()

    def train_step(self, batch: Tensor) -> Tensor:
        """One step of the optimizer on the images with these indices; the loss."""
        pixels, labels = self.train_set.pixels[batch], self.train_set.labels[batch]
        images = augment(normalise(pixels), self.recipe.smallest_crop, self.generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()


def train(
    name: str, seed: int, recipe: Recipe, splits: dict[str, Images], device: torch.device
) -> dict[str, Any]:
    """Train one variant from one seed, and return its result.

    Raises:
        RuntimeError: the loss is not finite any more.
    """
    started = time.perf_counter()
    train_set, val_set = (Images(*(x.to(device) for x in splits[split])) for split in ("train", "val"))
    trainer = Trainer(name, seed, recipe, train_set)
    curve = []
    for epoch in range(1, recipe.epochs + 1):
        loss = trainer.train_epoch()
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of {name}, seed {seed}, is {loss} in epoch {epoch}.")
        # Every fourth image is enough for a curve; the figure that counts is of all.
        shown = val_set if epoch == recipe.epochs else Images(*(x[::4] for x in val_set))
        curve.append({"epoch": epoch, "loss": loss, "top1": accuracy(trainer.model, shown)})
    return {
        "variant": name,
        "seed": seed,
        "recipe": recipe._asdict(),
        "params": sum(p.numel() for p in trainer.model.parameters()),
        "curve": curve,
        "top1": curve[-1]["top1"],
        "seconds": time.perf_counter() - started,
        "device": device_name(device),
        "torch": torch.__version__,
    }


def device_name(device: torch.device) -> str:
    """What the result calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, 1 thread"
