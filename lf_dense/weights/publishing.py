"""Checkpoints for others: weights and metadata alone, with the hash of the file in its name."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

from ..errors import UsageError
from ..files import write_atomically
from ..frameworks import FRAMEWORKS
from ..presets import ARCHS
from .pretrained import FoundBackbone, find_backbone
from .reading import HASHED_NAME, meta_of, read_checkpoint, tensors_of

FORMATS = ("pth", "safetensors")
_KEPT_META = ("cfg", "dataset_meta", "epoch", "iter", "seed", "experiment_name", "mmengine_version")
_PACKAGES = (
    "lf_dense",
    "torch",
    "onedl-mmengine",
    "mmengine",
    *(name for known in FRAMEWORKS.values() for name in (known.fork, known.upstream)),
)


def arch_of(tensors: Mapping[str, Tensor]) -> str | dict[str, tuple[int, ...]]:
    """The preset of a backbone's tensors, read off their shapes, or a dict where they are no preset's.

    Shapes do not tell the number of heads, so the dict lacks it.

    Raises:
        UsageError: a stage is missing.
    """
    blocks = [
        {int(key.split(".")[3]) for key in tensors if key.startswith(f"stages.{stage}.blocks.")}
        for stage in range(4)
    ]
    if not all(blocks):
        raise UsageError("the weights are not a whole LaplacianFormer: a stage has no blocks.")
    dims = [tensors[f"stages.{stage}.norm.weight"].shape[0] for stage in range(4)]
    hidden = [tensors[f"stages.{stage}.blocks.0.ffn.fc1.weight"].shape[0] for stage in range(4)]
    found = {
        "embed_dims": tuple(dims),
        "depths": tuple(len(indices) for indices in blocks),
        "mlp_ratios": tuple(wide // narrow for wide, narrow in zip(hidden, dims)),
    }
    for name, settings in ARCHS.items():
        if all(settings[key] == value for key, value in found.items()):
            return name
    return found


def _metrics(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """The last validation figures in the logs that mmengine keeps in a checkpoint."""
    logged = (checkpoint.get("message_hub") or {}).get("log_scalars") or {}
    return {
        name.partition("/")[2]: float(values.current())
        for name, values in logged.items()
        if name.startswith("val/")
        and isinstance(values, HistoryBuffer)
        and not name.endswith(("/time", "/data_time"))
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe(checkpoint: Mapping[str, Any], found: FoundBackbone, **stated: Any) -> dict[str, Any]:
    """Metadata of a checkpoint: what the file says, and in its place what is stated.

    ``published_with`` are the versions of this environment, not of the one that trained.
    """
    meta = meta_of(checkpoint)
    described = {
        "arch": arch_of(found.tensors),
        **{key: meta[key] for key in _KEPT_META if meta.get(key) is not None},
    }
    described["recipe"] = meta.get("experiment_name")
    described["metrics"] = _metrics(checkpoint)
    # What an earlier publication said stays said.
    described.update(
        {key: meta[key] for key in ("recipe", "dataset", "metrics", "converted_from") if meta.get(key)}
    )
    described.update({key: value for key, value in stated.items() if value})
    described["published_with"] = _versions()
    return described


def _encode_pth(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": dict(tensors), "meta": dict(meta)}, buffer)
    return buffer.getvalue()


def _encode_safetensors(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UsageError("writing safetensors needs its package: pip install safetensors.") from error
    return save(
        dict(tensors),
        {"format": "pt", **{key: json.dumps(value, default=str) for key, value in meta.items()}},
    )


def write_checkpoint(
    path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], hashed: bool = False
) -> Path:
    """Write tensors and metadata, ``.safetensors`` or ``.pth`` by the path's ending, whole or not at all.

    Args:
        path: where to.
        tensors: by name; each is written with memory of its own.
        meta: plain values.
        hashed: put the first 8 digits of the content's SHA-256 into the name, as torch.hub checks them.

    Returns:
        The path written.

    Raises:
        UsageError: the ending is neither.
    """
    path = Path(path)
    if path.suffix[1:] not in FORMATS:
        raise UsageError(
            f"{path} ends in neither {' nor '.join(f'.{ending}' for ending in FORMATS)}: the ending decides "
            "the format."
        )
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    content = (_encode_safetensors if path.suffix == ".safetensors" else _encode_pth)(tensors, meta)
    if hashed:
        stem = path.stem if not HASHED_NAME.search(path.name) else path.stem.rpartition("-")[0]
        path = path.with_name(f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}{path.suffix}")
    write_atomically(path, content)
    return path


def publish(
    source: str | Path, out: str | Path, backbone_only: bool = False, **stated: Any
) -> tuple[Path, dict[str, Any]]:
    """Write a training checkpoint's weights and metadata alone.

    Where an exponential moving average was kept, mmengine's ``state_dict`` is the averaged one already, and
    that is what is published.

    Args:
        source: a checkpoint of a LaplacianFormer or a model with one.
        out: the file to write, ``.pth`` or ``.safetensors``; the hash is put into its name.
        backbone_only: the backbone's tensors by its own names, without a neck and heads.
        stated: metadata to add or to put in the place of the file's: ``dataset``, ``recipe``, ``metrics``,
            ...

    Returns:
        The path and the metadata.

    Raises:
        UsageError: the source cannot be read or has no LaplacianFormer, or ``out`` has another ending.
    """
    source = str(source)
    checkpoint = read_checkpoint(source)
    found = find_backbone(checkpoint, source)
    meta = describe(checkpoint, found, **stated)
    whole = {re.sub(r"^module\.", "", name): value for name, value in tensors_of(checkpoint).items()}
    return write_checkpoint(out, found.tensors if backbone_only else whole, meta, hashed=True), meta
