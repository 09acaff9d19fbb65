"""The ablation: its attentions against formulas written out, its recipe the same for all, its tool from images to table."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from lf_dense import LaplacianAttention
from lf_dense.ablation.attentions import (
    ExactLaplacianAttention,
    GaussianAttention,
    SoftmaxAttention,
    SpatialReductionAttention,
)
from lf_dense.attention import rotary_table, rotate
from support.driving import ROOT, load_tool

TOOL = ROOT / "tools" / "ablate.py"
HW = (6, 5)


@pytest.fixture(scope="module")
def ablate():
    return load_tool("ablate")


def taken_apart(layer, x):
    """Rotated queries, keys, and values, each ``(B, heads, N, d)`` in float64."""
    table = rotary_table(HW, layer.head_dims, torch.device("cpu"))
    q, k = (rotate(project(x).unflatten(2, (layer.num_heads, -1)), table) for project in (layer.q, layer.k))
    return [y.transpose(1, 2).double() for y in (q, k, layer.v(x).unflatten(2, (layer.num_heads, -1)))]


def put_together(layer, attended, x):
    local = layer.dwconv(layer.v(x).mT.unflatten(2, HW)).flatten(2).mT
    return layer.proj(attended.transpose(1, 2).flatten(2).float() + local)


def weighed(kernel, v, tau=1e-2):
    """METHOD.md's "mass" for a kernel matrix that is there as a whole."""
    mass = kernel.mean(-1, keepdim=True)
    z = (kernel - mass) / (kernel.shape[-1] * (mass + tau)) + 1 / kernel.shape[-1]
    return z @ v


def test_exact_smoother():
    layer, x = ExactLaplacianAttention(16, 2), torch.randn(2, 30, 16)
    q, k, v = taken_apart(layer, x)
    kernel = torch.exp(-(q[..., :, None, :] - k[..., None, :, :]).abs().sum(-1) / 4)
    torch.testing.assert_close(layer(x, HW), put_together(layer, weighed(kernel, v), x))


def test_gaussian_nystroem():
    layer, x = GaussianAttention(16, 2, landmark_grid=(2, 5)), torch.randn(2, 30, 16)
    q, k, v = taken_apart(layer, x)
    landmarks = q.unflatten(2, HW).unflatten(2, (2, 3)).mean(3).flatten(2, 3)

    def gaussian(a, b):
        return torch.exp(-(a[..., :, None, :] - b[..., None, :, :]).square().sum(-1) / (2 * 8**0.5))

    inverse = torch.linalg.inv(gaussian(landmarks, landmarks) + 1e-2 * torch.eye(10, dtype=torch.float64))
    kernel = gaussian(q, landmarks) @ inverse @ gaussian(k, landmarks).mT
    assert (kernel.mean(-1) > 0).all()
    torch.testing.assert_close(layer(x, HW), put_together(layer, weighed(kernel, v), x))


def test_softmax_and_spatial_reduction():
    layer, x = SoftmaxAttention(16, 2), torch.randn(2, 30, 16)
    q, k, v = taken_apart(layer, x)
    wanted = put_together(layer, (q @ k.mT / 8**0.5).softmax(-1) @ v, x)
    torch.testing.assert_close(layer(x, HW), wanted)
    reduced = SpatialReductionAttention(16, 2, reduction=1)
    reduced.load_state_dict(layer.state_dict())
    torch.testing.assert_close(reduced(x, HW), wanted)


def test_spatial_reduction_attends_to_the_smaller_map():
    layer, x = SpatialReductionAttention(16, 2, reduction=2, rotary=False), torch.randn(2, 30, 16)
    smaller = layer.norm(layer.sr(x.mT.unflatten(2, HW)).flatten(2).mT)
    assert smaller.shape == (2, 6, 16)
    q, k, v = (
        y.unflatten(2, (2, 8)).transpose(1, 2) for y in (layer.q(x), layer.k(smaller), layer.v(smaller))
    )
    torch.testing.assert_close(layer(x, HW), put_together(layer, (q @ k.mT / 8**0.5).softmax(-1) @ v, x))


def test_the_attention_is_the_only_difference(ablate):
    recipe = ablate.FORMS["cpu"]
    models = {}
    for name in ablate.VARIANTS:
        torch.manual_seed(0)
        models[name] = ablate.build_model(ablate.VARIANTS[name], recipe, 10)
    base = models[ablate.BASELINE].state_dict()
    extra = {name: set(model.state_dict()) - set(base) for name, model in models.items()}
    assert {name for name, keys in extra.items() if keys} == {
        "learned_scale",
        "gaussian_learned_scale",
        "spatial_reduction",
    }
    assert all(set(base) <= set(model.state_dict()) for model in models.values())
    for name, model in models.items():
        if name != "spatial_reduction":
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in base.items()), name
        out = model(torch.randn(2, 3, 56, 56))
        assert out.shape == (2, 10)
        out.sum().backward()
        # The bias of keys cannot change a softmax, but everything has to be in the graph.
        assert all(parameter.grad is not None for parameter in model.parameters()), name
    attentions = [
        module for module in models[ablate.BASELINE].modules() if isinstance(module, LaplacianAttention)
    ]
    assert {type(module) for module in attentions} == {LaplacianAttention}
    assert len(attentions) == sum(recipe.depths)


def test_augmentation_keeps_images_images(ablate):
    generator = torch.Generator().manual_seed(0)
    flat = torch.full((8, 3, 16, 16), 0.7)
    torch.testing.assert_close(ablate.augment(flat, 0.5, generator), flat)
    x = torch.rand(8, 3, 16, 16)
    same_or_mirrored = ablate.augment(x, 1.0, generator)
    mirrored = [torch.allclose(out, image.flip(2), atol=1e-5) for out, image in zip(same_or_mirrored, x)]
    kept = [torch.allclose(out, image, atol=1e-5) for out, image in zip(same_or_mirrored, x)]
    assert all(a != b for a, b in zip(mirrored, kept))
    assert any(mirrored)
    assert any(kept)


def write_archive(path, per_class=40):
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w:gz") as tar:
        for split, count in (("train", per_class), ("val", 6)):
            for label, colour in enumerate(((200, 40, 40), (40, 200, 40), (40, 40, 200))):
                for index in range(count):
                    pixels = np.clip(rng.normal(colour, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
                    buffer = io.BytesIO()
                    Image.fromarray(pixels).save(buffer, "JPEG")
                    info = tarfile.TarInfo(f"./{split}/n0{label}/{index}.JPEG")
                    info.size = buffer.tell()
                    buffer.seek(0)
                    tar.addfile(info, buffer)
    return path


def run(*arguments):
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')));"
    )
    code = (
        f"{blocked} import runpy; sys.argv = {['ablate.py', *map(str, arguments)]!r};"
        f" runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )


def test_the_tool_from_images_to_table_without_mm_packages(tmp_path):
    data = write_archive(tmp_path / "images.tar.gz")
    out = tmp_path / "out"
    arguments = ["--data", data, "--out", out, "--epochs", 2, "--seeds", 0, 1, "--workers", 1]
    done = run(*arguments, "--only", "laplacian", "softmax")
    assert done.returncode == 0, done.stderr
    runs = {path.stem: json.loads(path.read_text()) for path in (out / "runs").iterdir()}
    assert set(runs) == {"laplacian_seed0", "laplacian_seed1", "softmax_seed0", "softmax_seed1"}
    for found in runs.values():
        assert [point["epoch"] for point in found["curve"]] == [1, 2]
        assert found["top1"] > 60  # three plain colours
    assert runs["laplacian_seed0"]["curve"] != runs["laplacian_seed1"]["curve"]
    table = (out / "table.md").read_text()
    assert table.count("\n") == 4
    assert "full softmax" in table
    assert (out / "curves.png").stat().st_size > 5000
    # What is there is not trained again, and what was lost is.
    kept = (out / "runs" / "softmax_seed1.json").stat().st_mtime_ns
    (out / "runs" / "laplacian_seed1.json").unlink()
    done = run(*arguments, "--only", "laplacian", "softmax")
    assert done.returncode == 0, done.stderr
    assert "laplacian, seed 1" in done.stdout
    assert "softmax, seed" not in done.stdout
    assert (out / "runs" / "softmax_seed1.json").stat().st_mtime_ns == kept
    again = json.loads((out / "runs" / "laplacian_seed1.json").read_text())
    assert again["curve"] == runs["laplacian_seed1"]["curve"]
    done = run("--data", data, "--out", out, "--epochs", 1)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "another recipe" in done.stderr


def test_what_the_tool_refuses(ablate, tmp_path, capsys):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    for arguments, words in (
        (["--data", "gone.tar"], "gone.tar are not there"),
        (["--data", str(tmp_path / "empty.tar")], "has no train/"),
        (["--data", str(tmp_path / "broken.tar")], "cannot be read"),
        (["--data", "x", "--epochs", "0"], "at least 1"),
        (["--data", "x", "--train-images", "8"], "less than one batch"),
    ):
        assert ablate.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr().err
        assert words in printed
        assert printed.count("\n") == 1
