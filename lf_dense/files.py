"""Files: written so that they survive interruption, and images found."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from .errors import UsageError

# OpenMMLab's place for configs and tools within an installed package.
PACKAGED = Path(__file__).resolve().parent / ".mim"
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def write_atomically(path: str | Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file so that a reader, or a power cut, finds either the old content or the new.

    Args:
        path: the file; folders are made.
        content: its bytes, or a function that writes them to a stream.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            content(stream) if callable(content) else stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; a line that an interruption cut off ends it."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def write_json_lines(path: str | Path, records: Iterable[object]) -> None:
    """Write a file of JSON lines, as ``write_atomically`` does; the next line to be added begins a line."""
    write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in records).encode())


def append_json_line(path: str | Path, record: object) -> None:
    """Add a record to a file of JSON lines; once this returns, a power cut leaves it whole."""
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(f"{json.dumps(record)}\n")
        stream.flush()
        os.fsync(stream.fileno())


def replace_all(source: Path, target: Path) -> None:
    """Move the files of a folder into another one of the same file system, each in one step."""
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(source.iterdir()):
        os.chmod(path, 0o666 & ~umask)
        os.replace(path, target / path.name)


def picture_names(images: Iterable[Path]) -> dict[Path, Path]:
    """The name of each image's PNG: its own where it is one, and else with ``.png`` behind it.

    ``a.jpg`` becomes ``a.jpg.png``, so ``a.jpg`` and ``a.png`` stay two. An image that is called
    ``a.jpg.png`` beside ``a.jpg`` gets a second ``.png``. No two names are the same.
    """
    images = set(images)
    return {
        image: image
        if image.suffix.lower() == ".png" and image.with_suffix("") not in images
        else image.with_name(f"{image.name}.png")
        for image in images
    }


def find_images(path: str | Path) -> list[Path]:
    """An image itself, or all images below a folder, sorted.

    Raises:
        UsageError: the path is not there, or the folder holds no image.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path} is not there: give an image or a folder of images.")
    images = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not images:
        raise UsageError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    return images
