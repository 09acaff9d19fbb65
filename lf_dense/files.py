"""Files that survive interruption."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# OpenMMLab's place for configs and tools within an installed package.
PACKAGED = Path(__file__).resolve().parent / ".mim"


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader, or a power cut, finds either the old content or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
