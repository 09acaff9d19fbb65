"""The one reader of checkpoints: plain data come out of a file, and no code in it runs.

Every tool reads through ``read_checkpoint``. ``guard_mmengine`` puts it behind mmengine's own loading too, so
that ``--resume``, ``load_from`` and ``init_cfg`` read alike.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.fileio import get_local_path
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner.checkpoint import (
    CheckpointLoader,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from torch import Tensor

from ..errors import UsageError, one_line

# torch.hub's convention: what follows the last dash of a published file's name starts its SHA-256.
HASHED_NAME = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|safetensors)$")
_CONTAINERS = ("state_dict", "model", "state_dict_ema")
# Numbers of which a tensor may claim more than its file holds: views that repeat a value are small.
_REPEATED_BYTES = 64 * 2**20
_ZIP_MAGIC = b"PK\x03\x04"
_NAMED_TYPE = re.compile(r"GLOBAL ([\w.]+)")
# mmengine's short names of public files; the address alone is taken from it.
_MODEL_LISTS = {
    "torchvision": get_torchvision_models,
    "modelzoo": get_torchvision_models,
    "open-mmlab": get_external_models,
    "openmmlab": get_external_models,
    "mmcls": get_mmcls_models,
}
_trusted: set[str] = set()


def _history_method(owner: Any, name: str) -> Any:
    """Stands for ``getattr`` in a file: mmengine's logs name methods of their own class."""
    if owner is not HistoryBuffer:
        raise ValueError(f"it asks for the attribute {name!r} of {owner!r}")
    return getattr(owner, name)


def _plain_dtype(kind: Any, *options: Any) -> np.dtype:
    """Stands for ``numpy.dtype`` in a file: arrays of numbers, booleans and text, and none of objects."""
    dtype = np.dtype(kind, *options)
    if dtype.kind not in "biufcSU":
        raise ValueError(f"it has a numpy array of {dtype}, and numbers and text alone are read")
    return dtype


def _safe_classes(take_names: bool) -> list[Any]:
    """What mmengine keeps beside tensors and plain values: logs, configs, numpy's scalars and arrays.

    None of these can run code, whatever a file has them built from.

    Args:
        take_names: torch takes ``(object, name in the file)`` pairs, from 2.6 on. Older torch reads less.
    """
    classes: list[Any] = [HistoryBuffer, Config, ConfigDict, slice, np.ndarray]
    classes += {
        type(np.dtype(kind)) for kind in (*np.typecodes["AllInteger"], *np.typecodes["AllFloat"], *"?SU")
    }
    if take_names:
        reconstruct, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
        # numpy 2 has moved its modules, and files are older and newer than the move.
        for core in ("core", "_core"):
            classes += [
                (reconstruct, f"numpy.{core}.multiarray._reconstruct"),
                (scalar, f"numpy.{core}.multiarray.scalar"),
            ]
        classes += [(_history_method, "builtins.getattr"), (_plain_dtype, "numpy.dtype")]
    return classes


def _allow_safe_classes() -> contextlib.AbstractContextManager:
    if not hasattr(torch.serialization, "safe_globals"):
        return contextlib.nullcontext()
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return torch.serialization.safe_globals(_safe_classes(take_names=version >= (2, 6)))


def is_remote(checkpoint: str) -> bool:
    """Whether mmengine would fetch it: an address or one of its prefixes, like ``torchvision://``."""
    return "://" in checkpoint


def trust_checkpoint(source: str | Path) -> None:
    """Let ``read_checkpoint`` run the code in one file, in this process: ``--trust-checkpoint``."""
    _trusted.add(str(source))


def open_safetensors(path: str | Path) -> Any:
    """A safetensors file, opened for reading tensors; a context manager.

    Raises:
        UsageError: safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UsageError(f"the checkpoint {path} needs safetensors: pip install safetensors.") from error
    return safe_open(str(path), "pt")


def _unpickle(path: Path) -> Any:
    with _allow_safe_classes():
        content = torch.load(path, map_location="cpu", weights_only=True)
    _check_tensors(content, path.stat().st_size)
    return content


def _refusal(source: str | Path, error: Exception) -> UsageError:
    """The sentence for a file that could not be unpickled."""
    # torch's advice stands before its own reason, and ends after it.
    reason = one_line(error).rpartition("WeightsUnpickler error: ")[2].partition(" Check the doc")[0]
    found = _NAMED_TYPE.search(reason)
    if found:
        return UsageError(
            f"the checkpoint {source} holds {found[1]}, which could run code when it is read: ask for a file "
            "with weights alone, or give --trust-checkpoint if you trust whoever made it."
        )
    return UsageError(
        f"the checkpoint {source} cannot be read as weights alone ({type(error).__name__}: {reason[:300]}): "
        "use another."
    )


def _is_archive(path: Path) -> bool:
    """Whether torch reads a file as a zip archive; files from before torch 1.6 are bare pickles."""
    with path.open("rb") as stream:
        return stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def _check_archive(path: Path) -> None:
    """Read an archive's entries through, checksums included.

    Raises:
        UsageError: it is a program, or unpacks to more than it is.
        ValueError: it is damaged.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise UsageError(f"the checkpoint {path} is a TorchScript program: give a file of weights.")
        declared = sum(entry.file_size for entry in archive.infolist())
        if declared > size:
            raise UsageError(
                f"the checkpoint {path} has {size} bytes and would unpack to {declared}: PyTorch does not "
                "compress, so it did not write this file; use another."
            )
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} does not have its checksum")


def _check_file(path: Path, unpickle: bool) -> Any:
    """Check a file; returns the content of a bare pickle, which has to be read for that, and else None."""
    if path.is_dir():
        raise UsageError(f"the checkpoint {path} is a folder: give a file in it, like epoch_12.pth.")
    if not path.is_file():
        raise UsageError(f"the checkpoint {path} is not there.")
    size = path.stat().st_size
    if size == 0:
        raise UsageError(f"the checkpoint {path} is empty (0 bytes): use another.")
    try:
        if path.suffix == ".safetensors":
            with open_safetensors(path):
                return None
        if _is_archive(path):
            _check_archive(path)
        elif tarfile.is_tarfile(path):
            # torch before 2.6 runs code from these even where it is told to read weights alone.
            raise UsageError(f"the checkpoint {path} has PyTorch's first format, a tar archive: use another.")
        elif unpickle:
            return _unpickle(path)
    except UsageError:
        raise
    except Exception as error:  # the readers fail on damaged bytes in every way there is
        if _NAMED_TYPE.search(str(error)):
            raise _refusal(path, error) from error
        raise UsageError(
            f"the checkpoint {path} ({size} bytes) is truncated or not a PyTorch checkpoint: use another."
        ) from error
    return None


def check_checkpoint(path: str | Path) -> None:
    """Look whether a local checkpoint file is whole, checksums included; no code in it is run.

    Raises:
        UsageError: it is not there, a folder, empty, truncated, damaged, or not a PyTorch checkpoint.
    """
    # A bare pickle has no checksum to ask: reading it is the check.
    _check_file(Path(path), unpickle=str(path) not in _trusted)


def _address_of(source: str) -> str:
    """What one of mmengine's short names stands for; anything else is itself."""
    prefix, separator, name = source.partition("://")
    if not separator or prefix not in _MODEL_LISTS:
        return source
    known = _MODEL_LISTS[prefix]()
    if name not in known:
        raise UsageError(f"the checkpoint {source} is none of those that mmengine knows under {prefix}://.")
    return known[name]


def _download(address: str) -> Path:
    """The file of an address, in torch.hub's cache; a hash in its name is checked."""
    name = Path(urlparse(address).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        expected = HASHED_NAME.search(name)
        try:
            torch.hub.download_url_to_file(address, str(path), expected and expected[1], progress=False)
        except (OSError, RuntimeError) as error:  # no connection, no such page, another hash
            raise UsageError(f"the checkpoint {address} cannot be fetched ({error}).") from error
    return path


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read_safetensors(path: Path) -> dict[str, Any]:
    with open_safetensors(path) as file:
        meta = {key: _json_or_text(value) for key, value in (file.metadata() or {}).items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return {"state_dict": tensors, "meta": meta}


def _tensors_within(content: Any) -> Iterator[Tensor]:
    """Every tensor of some content, once; lists may hold one another many times over, or themselves."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value


def _check_tensors(content: Any, size: int) -> None:
    """Refuse tensors without data, and views that would grow far beyond the file once they are copied.

    Raises:
        ValueError: there is such a tensor.
    """
    claimed = 0
    for tensor in _tensors_within(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(
                f"it has a tensor of {tensor.layout} on {tensor.device}, and plain tensors alone are read"
            )
        claimed += tensor.numel() * tensor.element_size()
    if claimed > 16 * size + _REPEATED_BYTES:
        raise ValueError(f"its tensors would take {claimed} bytes, and the file has {size}")


def _read_local(path: Path, trusted: bool) -> Any:
    content = _check_file(path, unpickle=not trusted)
    if content is not None:
        return content
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return torch.load(path, map_location="cpu", weights_only=False) if trusted else _unpickle(path)


def read_checkpoint(source: str | Path) -> dict[str, Any]:
    """Read a checkpoint, ``.pth`` or ``.safetensors``, as plain data on the CPU: no code in it is run.

    Tensors, plain values, and what mmengine keeps beside them (its logs and configs, numpy's scalars and
    arrays of numbers) are read. A file with more is refused, unless ``trust_checkpoint`` was called for it.

    Args:
        source: a path, an address, or one of mmengine's prefixes.

    Raises:
        UsageError: it is not there, damaged, no dictionary, or holds other objects; the message names their
            type.
    """
    source = str(source)
    trusted = source in _trusted
    try:
        address = _address_of(source)
        if address.startswith(("http://", "https://")):
            content = _read_local(_download(address), trusted)
        elif not is_remote(address):
            content = _read_local(Path(address).expanduser(), trusted)
        else:
            with get_local_path(address) as path:
                content = _read_local(Path(path), trusted)
    except UsageError:
        raise
    except Exception as error:  # hostile and damaged files fail in every way there is
        raise _refusal(source, error) from error
    if not isinstance(content, dict):
        raise UsageError(
            f"the checkpoint {source} holds a {type(content).__name__}, and a dictionary of weights is "
            "expected."
        )
    return content


def tensors_of(checkpoint: Any) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint, whichever container they are in."""
    for container in _CONTAINERS:
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(container), dict):
            checkpoint = checkpoint[container]
    if not isinstance(checkpoint, dict):
        return {}
    return {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}


def meta_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that mmengine keeps in a checkpoint; empty where there is none."""
    meta = checkpoint.get("meta")
    return meta if isinstance(meta, dict) else {}


def _load_from_safe_reader(filename: str, map_location: Any = None, **unused: Any) -> dict[str, Any]:
    """``read_checkpoint`` as a loader of mmengine's; its caller moves tensors to their devices."""
    checkpoint = read_checkpoint(filename)
    meta = meta_of(checkpoint)
    if "config" in meta:
        # mmengine's resume runs this text as a Python config, to warn of another number of GPUs. Its own
        # files have none.
        del meta["config"]
        print_log(
            f"meta.config of {filename} is left out, since resuming would run it as Python.",
            logger="current",
            level=logging.WARNING,
        )
    return checkpoint


def guard_mmengine() -> None:
    """Make all of mmengine's loading in this process go through ``read_checkpoint``, whatever the address."""
    # The table is private, and the only way to miss no scheme that mmengine, or another package, has
    # registered.
    schemes = tuple(CheckpointLoader._schemes)
    CheckpointLoader.register_scheme(schemes, _load_from_safe_reader, force=True)
