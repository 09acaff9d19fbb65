"""What a checkpoint is: its model, arch, size and metadata, and whether the hash in its name fits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UsageError
from ..laplacianformer import LaplacianFormer
from .pretrained import FoundBackbone, compare, find_backbone
from .publishing import arch_of
from .reading import HASHED_NAME, is_remote, meta_of, read_checkpoint, tensors_of


def _count(tensors: Mapping[str, Tensor]) -> str:
    return f"{sum(value.numel() for value in tensors.values()):,}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def describe_hash(path: Path) -> str:
    """The SHA-256 of a file, and whether it is the one in its name."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    named = HASHED_NAME.search(path.name)
    if not named:
        return digest
    if digest.startswith(named[1]):
        return f"{digest}, as its name says"
    return f"{digest}, NOT {named[1]} as its name says"


def _properties(source: str, checkpoint: dict[str, Any], backbone: str) -> Iterator[tuple[str, object]]:
    tensors = tensors_of(checkpoint)
    yield "backbone", backbone
    dtypes = Counter(map(_dtype, tensors.values()))
    yield "tensors", f"{len(tensors)}, {_count(tensors)} numbers: {dict(dtypes)}"
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    yield (
        "finite",
        f"no: {len(broken)} tensors with NaN or infinity, {broken[0]} the first" if broken else "yes",
    )
    others = [key for key in checkpoint if key not in ("state_dict", "meta") and key not in tensors]
    yield "beside them", ", ".join(others) or "nothing"
    for key, value in meta_of(checkpoint).items():
        yield key, value if key != "cfg" else f"a config of {len(str(value).splitlines())} lines"
    if not is_remote(source):
        yield "sha256", describe_hash(Path(source))


def inspect(source: str, arch: str | None = None, list_tensors: bool = False) -> list[str]:
    """What a checkpoint is, as lines of text.

    Args:
        source: path or address.
        arch: a preset; what a ``LaplacianFormer`` of this size would take from the file is listed.
        list_tensors: list every tensor.

    Raises:
        UsageError: the file cannot be read.
    """
    checkpoint = read_checkpoint(source)
    found: FoundBackbone | None = None
    try:
        found = find_backbone(checkpoint, source)
        backbone = f"{found.form}, {_count(found.tensors)} numbers, arch {arch_of(found.tensors)}"
    except UsageError as error:
        backbone = f"none: {error}"
    lines = [f"{name:<18}{value}" for name, value in _properties(source, checkpoint, backbone)]
    if list_tensors:
        tensors = tensors_of(checkpoint)
        lines += [f"  {name}  {tuple(value.shape)} {_dtype(value)}" for name, value in tensors.items()]
    if arch and found:
        lines += compare(LaplacianFormer(arch).state_dict(), found, source)[0].lines()
    return lines
