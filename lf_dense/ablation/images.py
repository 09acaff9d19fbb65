"""The images of the experiment: read from an archive once, normalised, and augmented in batches."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import UsageError, one_line

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Images(NamedTuple):
    """One split: uint8 images ``(n, 3, S, S)`` and their classes ``(n,)``."""

    pixels: Tensor
    labels: Tensor


class ImageFile(NamedTuple):
    """One image of the archive, not decoded yet."""

    label: str
    name: str
    content: bytes


def read_images(
    archive: Path, size: int, limits: dict[str, int | None]
) -> tuple[dict[str, Images], list[str]]:
    """Read the train and val folders of an ImageFolder archive.

    Args:
        archive: tar of ``train/<class>/*`` and ``val/<class>/*``.
        size: height and width to which every image is resized.
        limits: how many images to take of each split; None takes all.

    Returns:
        The images of each split, and the names of the classes in the order of their labels.

    Raises:
        UsageError: the archive is missing, cannot be read, or lacks these folders.
    """
    if not archive.is_file():
        raise UsageError(
            f"the images {archive} are not there: "
            "give a tar of train/<class>/*.JPEG and val/<class>/*.JPEG with --data."
        )
    try:
        files = _read_files(archive, set(limits))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UsageError(f"the archive {archive} cannot be read ({one_line(error)}).") from error
    classes = sorted({file.label for file in files["train"]})
    if not classes or not files["val"]:
        raise UsageError(f"the archive {archive} has no train/<class>/* and val/<class>/* files.")
    unknown = {file.label for file in files["val"]}.difference(classes)
    if unknown:
        raise UsageError(f"the archive {archive} has val/{min(unknown)}, a class that train does not have.")
    splits = {}
    for split, found in files.items():
        taken = _evenly_spaced(found, limits[split])
        pixels = torch.empty(len(taken), 3, size, size, dtype=torch.uint8)
        for index, file in enumerate(taken):
            pixels[index] = _decode(file, size)
        splits[split] = Images(pixels, torch.tensor([classes.index(file.label) for file in taken]))
    return splits, classes


def _read_files(archive: Path, splits: set[str]) -> dict[str, list[ImageFile]]:
    """The files ``<split>/<class>/<name>`` of each split, sorted."""
    files: dict[str, list[ImageFile]] = {split: [] for split in splits}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if len(parts) < 3 or parts[-3] not in splits or not member.isfile():
                continue
            stream = tar.extractfile(member)
            assert stream is not None  # it is None only for links and folders
            files[parts[-3]].append(ImageFile(parts[-2], parts[-1], stream.read()))
    return {split: sorted(found, key=_path_and_content) for split, found in files.items()}


def _path_and_content(file: ImageFile) -> tuple[str, bytes]:
    return f"{file.label}/{file.name}", file.content


def _evenly_spaced(files: list[ImageFile], limit: int | None) -> list[ImageFile]:
    """At most ``limit`` files from all over a sorted list, so that every class is there."""
    count = min(limit or len(files), len(files))
    return [files[index * len(files) // count] for index in range(count)]


def _decode(file: ImageFile, size: int) -> Tensor:
    try:
        with Image.open(io.BytesIO(file.content)) as image:
            small = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except OSError as error:
        raise UsageError(
            f"{file.label}/{file.name} in the archive is no image that can be decoded."
        ) from error
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, 3).permute(2, 0, 1)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 to floats of ImageNet's mean and deviation, channels-last."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, smallest_crop: float, generator: torch.Generator) -> Tensor:
    """Crop each image at random, resize the crop back, and mirror half of them.

    A crop has at least ``smallest_crop`` of the image's area.
    """
    count = len(images)
    side = torch.empty(count).uniform_(smallest_crop, 1, generator=generator).sqrt()
    mirror = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = side * mirror, side
    theta[:, :, 2] = torch.empty(count, 2).uniform_(-1, 1, generator=generator) * (1 - side)[:, None]
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
