"""Checkpoints of models that have learnt nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope


def save_random_weights(config: Config, path: Path) -> Path:
    """Write a checkpoint of a config's model with its initial weights, and return its path."""
    init_default_scope(config.default_scope)
    settings = config.model.copy()
    settings.setdefault("data_preprocessor", config.get("data_preprocessor"))
    torch.save({"state_dict": MODELS.build(settings).state_dict()}, path)
    return path
