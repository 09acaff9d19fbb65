"""The settings of a model: its parts, and a copy that fetches no weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..frameworks import type_name

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
    """The settings of a model's backbone; a tracker's is its detector's."""
    backbone: dict[str, Any] | None = model.get("backbone") or (model.get("detector") or {}).get("backbone")
    return backbone


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
