"""Checkpoints that try to run code when they are read. Each would make a canary file; none may."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


class SetsState:
    """Runs its command when its state is set."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __setstate__(self, state: dict) -> None:
        os.system(state["command"])


class _StorageWithCode(pickle.Pickler):
    """Writes every ``bytes`` as a tensor's storage whose type is a call."""

    def __init__(self, stream: io.BytesIO, call: Calls) -> None:
        super().__init__(stream, protocol=2)
        self.call = call

    def persistent_id(self, value: Any) -> Any:
        return ("storage", self.call, "0", "cpu", 4) if value is _StorageWithCode else None


def _save(path: Path, content: Any) -> None:
    torch.save(content, path)


def by_system(path: Path, state: dict, canary: Path) -> None:
    _save(path, {**state, "extra": Calls(os.system, f"touch {canary}")})


def by_exec(path: Path, state: dict, canary: Path) -> None:
    _save(path, {**state, "extra": Calls(exec, f"open({str(canary)!r}, 'w')")})


def by_setstate(path: Path, state: dict, canary: Path) -> None:
    _save(path, {**state, "extra": SetsState(f"touch {canary}")})


def in_the_optimizer(path: Path, state: dict, canary: Path) -> None:
    momentum = {"exp_avg": torch.zeros(2), "step": [Calls(os.system, f"touch {canary}")]}
    _save(path, {**state, "optimizer": {"state": {0: momentum}, "param_groups": []}})


def in_a_storage(path: Path, state: dict, canary: Path) -> None:
    """A call in the place of a storage's type; torch resolves that type while it reads."""
    stream = io.BytesIO()
    _StorageWithCode(stream, Calls(os.system, f"touch {canary}")).dump({"extra": _StorageWithCode})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", b"\0" * 16)


def as_a_bare_pickle(path: Path, state: dict, canary: Path) -> None:
    extra = Calls(os.system, f"touch {canary}")
    torch.save({**state, "extra": extra}, path, _use_new_zipfile_serialization=False)


KINDS = (by_system, by_exec, by_setstate, in_the_optimizer, in_a_storage, as_a_bare_pickle)
