"""Small archives of images, as the ablation reads them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """Write a tar of these names and contents."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def encode(pixels: np.ndarray, form: str = "JPEG") -> bytes:
    """An image of uint8 ``(H, W, 3)`` as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def noisy_colours(path: Path, per_class: int = 40) -> Path:
    """Three classes that differ by their colour: easy to learn in seconds."""
    rng = np.random.default_rng(0)
    files = {}
    for split, count in (("train", per_class), ("val", 6)):
        for label, colour in enumerate(((200, 40, 40), (40, 200, 40), (40, 40, 200))):
            for index in range(count):
                pixels = np.clip(rng.normal(colour, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
                files[f"./{split}/n0{label}/{index}.JPEG"] = encode(pixels)
    return pack(path, files)
