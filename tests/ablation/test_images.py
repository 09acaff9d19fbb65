"""The images: what is read from an archive, what is refused, and what augmentation does."""

import tarfile

import numpy as np
import pytest
import torch

from lf_dense.ablation.images import MEAN, STD, augment, normalise, read_images
from lf_dense.errors import UsageError
from support.image_archive import encode, noisy_colours, pack

ALL = {"train": None, "val": None}


def plain(value, size=8):
    """A grey image, as a file without loss."""
    return encode(np.full((size, size, 3), value, np.uint8), "PNG")


def test_labels_and_pixels_of_an_archive(tmp_path):
    files = {
        "set/train/b/1.png": plain(20),
        "set/train/a/2.png": plain(10, size=5),
        "set/val/b/3.png": plain(30),
        "set/train/readme.txt": b"not in a class",
        "set/other/a/4.png": plain(40),
    }
    splits, classes = read_images(pack(tmp_path / "images.tar.gz", files), 4, ALL)
    assert classes == ["a", "b"]
    assert splits["train"].labels.tolist() == [0, 1]
    assert splits["val"].labels.tolist() == [1]
    wanted = torch.tensor([10, 20], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert torch.equal(splits["train"].pixels, wanted)
    assert torch.equal(splits["val"].pixels, torch.full((1, 3, 4, 4), 30, dtype=torch.uint8))


def test_channels_rows_and_columns_are_where_they_belong(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    files = {f"{split}/a/0.png": encode(pixels, "PNG") for split in ALL}
    splits, _ = read_images(pack(tmp_path / "images.tar.gz", files), 6, ALL)
    assert torch.equal(splits["train"].pixels[0], torch.from_numpy(pixels).permute(2, 0, 1))


def test_a_limit_leaves_images_of_every_class(tmp_path):
    archive = noisy_colours(tmp_path / "images.tar.gz", per_class=7)
    splits, _ = read_images(archive, 8, {"train": 6, "val": 1000})
    assert splits["train"].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(splits["val"].labels) == 18


def test_the_order_of_the_archive_does_not_matter(tmp_path):
    files = {
        f"{split}/{label}/{n}.png": plain(n) for split in ALL for label in ("a", "a-b") for n in range(3)
    }
    first, _ = read_images(pack(tmp_path / "one.tar.gz", files), 4, ALL)
    files = dict(reversed(files.items()))
    second, _ = read_images(pack(tmp_path / "two.tar.gz", files), 4, ALL)
    assert torch.equal(first["train"].pixels, second["train"].pixels)
    assert torch.equal(first["train"].labels, second["train"].labels)
    # Paths are sorted as text, and "-" comes before "/".
    assert first["train"].labels.tolist() == [1, 1, 1, 0, 0, 0]


def test_an_archive_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="are not there: give a tar"):
        read_images(tmp_path / "gone.tar", 4, ALL)


def test_an_archive_cut_off(tmp_path):
    whole = noisy_colours(tmp_path / "images.tar.gz", per_class=2).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"cut\.tar\.gz cannot be read \("):
        read_images(tmp_path / "cut.tar.gz", 4, ALL)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no train/"),
        ({"train/a/0.png": plain(1)}, "has no train/"),
        ({"val/a/0.png": plain(1)}, "has no train/"),
        ({"train/a/0.png": plain(1), "val/b/0.png": plain(1)}, "val/b, a class that train does not have"),
        ({"train/a/0.png": plain(1), "val/a/0.png": b"text"}, "a/0.png in the archive is no image"),
        ({"train/a/0.png": plain(1)[:-30], "val/a/0.png": plain(1)}, "a/0.png in the archive is no image"),
    ],
    ids=["empty", "no val", "no train", "class of val alone", "no image", "image cut off"],
)
def test_archives_that_lack_something(tmp_path, files, words):
    with pytest.raises(UsageError, match=words):
        read_images(pack(tmp_path / "images.tar.gz", files), 4, ALL)


def test_a_folder_in_the_place_of_an_image_is_passed_over(tmp_path):
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        for split in ALL:
            folder = tarfile.TarInfo(f"{split}/a/folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    with pytest.raises(UsageError, match="has no train/"):
        read_images(path, 4, ALL)


def test_normalise_is_imagenets():
    pixels = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    out = normalise(pixels)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(out * std + mean, pixels / 255)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_augmentation_keeps_images_images():
    generator = torch.Generator().manual_seed(0)
    flat = torch.full((8, 3, 16, 16), 0.7)
    torch.testing.assert_close(augment(flat, 0.5, generator), flat)
    x = torch.rand(8, 3, 16, 16)
    same_or_mirrored = augment(x, 1.0, generator)
    mirrored = [torch.allclose(out, image.flip(2), atol=1e-5) for out, image in zip(same_or_mirrored, x)]
    kept = [torch.allclose(out, image, atol=1e-5) for out, image in zip(same_or_mirrored, x)]
    assert all(a != b for a, b in zip(mirrored, kept))
    assert any(mirrored)
    assert any(kept)


def test_augmentation_crops_inside_the_image():
    """On a ramp from -1 to 1, the crop's place and size can be read from its values."""
    count, size, smallest = 256, 64, 0.25
    centres = (2 * torch.arange(size) + 1) / size - 1
    ramps = torch.stack(torch.meshgrid(centres, centres, indexing="ij")).expand(count, 2, size, size)
    out = augment(ramps, smallest, torch.Generator().manual_seed(0))
    rows, columns = out[:, 0], out[:, 1]
    height = (rows[:, -1, 0] - rows[:, 0, 0]) / (centres[-1] - centres[0])
    width = (columns[:, 0, -1] - columns[:, 0, 0]).abs() / (centres[-1] - centres[0])
    # The border of an image has half a pixel beyond its last centre, which the ramp cannot show.
    torch.testing.assert_close(height, width, atol=2 / size, rtol=0)
    assert height.min() >= smallest**0.5 - 2 / size
    assert height.max() <= 1 + 1e-5
    assert height.min() < 0.6
    assert height.max() > 0.9
    assert out.abs().max() <= 1


def test_augmentation_repeats_with_its_generator():
    x = torch.rand(8, 3, 16, 16)
    first, second = (augment(x, 0.5, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, augment(x, 0.5, torch.Generator().manual_seed(8)))
