"""Checkpoints are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from ..files import write_atomically


class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, written atomically."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        write_atomically(filepath, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        write_atomically(filepath, obj.encode(encoding))


def write_checkpoints_atomically() -> None:
    """Make mmengine, and so its CheckpointHook, write local files through ``AtomicLocalBackend``."""
    register_backend("local", AtomicLocalBackend, prefixes="", force=True)


def remove_leftovers(work_dir: str | Path) -> None:
    """Delete what killed writes left of checkpoints. No other process may write to the folder meanwhile."""
    for path in Path(work_dir).glob(".*.pth.*"):
        path.unlink(missing_ok=True)
