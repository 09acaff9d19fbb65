"""Checkpoints that survive interruption: written whole or not at all, looked at before they are trusted."""

from __future__ import annotations

import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from torch import nn

from .errors import UsageError
from .files import write_atomically

_NUMBERED = re.compile(r"(?:epoch|iter)_(\d+)\.pth")


class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, written atomically."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        write_atomically(filepath, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        write_atomically(filepath, obj.encode(encoding))


def write_checkpoints_atomically() -> None:
    """Make mmengine, and so its CheckpointHook, write local files through ``AtomicLocalBackend`` in this process."""
    register_backend("local", AtomicLocalBackend, prefixes="", force=True)


def is_remote(checkpoint: str) -> bool:
    """Whether mmengine would fetch it: an address or one of its prefixes, like ``torchvision://``."""
    return "://" in checkpoint


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


def check_checkpoint(path: str | Path) -> None:
    """Read a local checkpoint file through, checksums included.

    Raises:
        UsageError: it is not there, empty, truncated, damaged, or not a PyTorch checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"the checkpoint {path} is not there.")
    broken = UsageError(f"the checkpoint {path} ({path.stat().st_size} bytes) is truncated or not a PyTorch checkpoint: use another.")
    try:
        if path.suffix == ".safetensors":
            with open_safetensors(path):
                return
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise broken
        else:
            # Files from before torch 1.6 are pickles, with no checksum to ask.
            torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:  # the readers fail on damaged bytes in every way there is
        raise broken from error


def latest_good_checkpoint(work_dir: str | Path) -> str:
    """The newest checkpoint of a run that can be read, passing over (and naming) any that an interruption left damaged.

    Raises:
        UsageError: the work dir has no readable checkpoint.
    """
    work_dir = Path(work_dir)
    candidates = {path for path in work_dir.glob("*.pth") if _NUMBERED.fullmatch(path.name)}
    pointer = work_dir / "last_checkpoint"
    if pointer.is_file() and (target := Path(pointer.read_text().strip())).is_file():
        candidates.add(target)
    unique = {path.resolve(): path for path in candidates}
    for path in sorted(unique.values(), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            check_checkpoint(path)
        except UsageError as error:
            print_log(f"passed over: {error}", logger="current", level=logging.WARNING)
        else:
            return str(path)
    raise UsageError(f"there is nothing to resume in {work_dir}: no readable epoch_*.pth or iter_*.pth; start without --resume.")


def remove_leftovers(work_dir: str | Path) -> None:
    """Delete what writes that were killed midway left of checkpoints; call it where no other process writes there."""
    for path in Path(work_dir).glob(".*.pth.*"):
        path.unlink(missing_ok=True)


def load_weights(model: nn.Module, checkpoint: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Load a checkpoint that has to cover every parameter and buffer of a model.

    The model's own hooks for old or resized weights run first, and a wrapper for distributed data is looked through.

    Raises:
        UsageError: something is missing or has another shape; the first few are named.
    """
    if is_model_wrapper(model):
        model = model.module
    state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    try:
        problems = [f"{name} (missing)" for name in model.load_state_dict(state_dict, strict=False).missing_keys]
    except RuntimeError as error:
        # torch reports each tensor of another shape on a line of its own, below a first line about all of them.
        problems = [line.strip().rstrip(".") for line in str(error).splitlines()[1:]]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UsageError(
            f"the checkpoint {checkpoint} does not fit the config's model, {len(problems)} of {len(model.state_dict())} tensors: "
            f"{', '.join(problems[:3])}{more}; use the config that it was trained with."
        )
