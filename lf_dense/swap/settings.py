"""The settings of a model: its parts, and a copy that fetches no weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS

from ..frameworks import FRAMEWORKS, type_name

_FETCHING = ("Pretrained", "LaplacianPretrained")


def as_list(settings: Any) -> list[dict[str, Any]]:
    """One component or several of them in sequence, as a list."""
    if not settings:
        return []
    return list(settings) if isinstance(settings, (list, tuple)) else [settings]


def nested(settings: Any) -> Iterator[dict[str, Any]]:
    """A component's settings and all that lie within."""
    if isinstance(settings, dict):
        yield settings
        for value in settings.values():
            yield from nested(value)
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            yield from nested(value)


def heads_of(model: dict[str, Any]) -> list[dict[str, Any]]:
    """All heads of a model: what its keys that end with ``head`` hold."""
    heads = [head for key, value in model.items() if key.endswith("head") for head in as_list(value)]
    return [head for head in heads if isinstance(head, dict)]


def backbone_of(model: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of a model's backbone; a tracker's is its detector's, a retriever's begins its encoder."""
    backbone: dict[str, Any] | None = model.get("backbone") or (model.get("detector") or {}).get("backbone")
    encoder = model.get("image_encoder")
    if backbone is None and isinstance(encoder, (list, tuple)) and encoder:
        backbone = encoder[0]
    return backbone


def adopt_scope(config: Config, package: str) -> None:
    """Let a packaged config without a scope, as those of headless models are, have that of its package."""
    if package in FRAMEWORKS and config.get("default_scope") is None:
        config.default_scope = package


def class_of(settings: dict[str, Any], scope: str) -> type | None:
    """The class of a component; None where the registry does not know it.

    Args:
        settings: its settings.
        scope: registry scope that they belong to.
    """
    kind = settings.get("type")
    if not isinstance(kind, str):
        return kind
    with MODELS.switch_scope_and_registry(scope) as registry:
        found: type | None = registry.get(kind)
    return found


def image_channels(model: dict[str, Any], preprocessor: dict[str, Any] | None) -> int:
    """Channels of the images of a model: those of its backbone, or one where its mean has one value."""
    stated = (backbone_of(model) or {}).get("in_channels")
    if isinstance(stated, int):
        return stated
    mean = (preprocessor or {}).get("mean")
    return 1 if isinstance(mean, (list, tuple)) and len(mean) == 1 else 3


def without_pretrained(settings: Any) -> Any:
    """A copy of a component's settings without what would fetch weights; other initialisation stays."""
    if isinstance(settings, dict):
        kept = {key: value for key, value in settings.items() if key != "pretrained"}
        if isinstance(kept.get("init_cfg"), (dict, list, tuple)):
            initializers = [part for part in as_list(kept["init_cfg"]) if type_name(part) not in _FETCHING]
            kept["init_cfg"] = initializers or None
        return type(settings)({key: without_pretrained(value) for key, value in kept.items()})
    if isinstance(settings, (list, tuple)):
        return type(settings)(without_pretrained(value) for value in settings)
    return settings
