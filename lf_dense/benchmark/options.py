"""What the options of the benchmark's commands may be."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from importlib.util import find_spec
from pathlib import Path

import torch

from ..errors import UsageError
from ..presets import STRIDES

# A smaller image leaves nothing of itself in the last stage.
MIN_SIDE = STRIDES[-1]


def image_size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or min(int(found[1]), int(found[2])) < MIN_SIDE:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an image size of at least {MIN_SIDE} x {MIN_SIDE}, like 800x1333"
        )
    return int(found[1]), int(found[2])


def square(text: str) -> int:
    if not text.isdecimal() or int(text) < 1 or math.isqrt(int(text)) ** 2 != int(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the number of landmarks of a square grid, like 49 or 196"
        )
    return int(text)


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least 1")
    return int(text)


def positive_float(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) > 0 and math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def find_device(name: str) -> torch.device:
    """Return the device of ``--device``.

    Raises:
        UsageError: no device has this name, or torch does not see it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name} is no device: use cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {device} is not there, since torch sees {torch.cuda.device_count()} CUDA devices: "
            "use cpu."
        )
    return device


def check_folder(option: str, path: Path) -> None:
    """Check that a file can be written where an option says.

    Raises:
        UsageError: the folder does not exist.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the folder of {option} {path} does not exist: make it first.")


def require_mmengine(command: str) -> None:
    """Check that mmengine can be imported.

    Raises:
        UsageError: it is not installed.
    """
    if find_spec("mmengine") is None:
        raise UsageError(
            f"the command {command!r} needs mmengine, which is not installed: pip install onedl-mmengine "
            "(or mmengine)."
        )
