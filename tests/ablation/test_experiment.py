"""The experiment from images to table, and its tool."""

import json
import subprocess
import sys
import tarfile

import pytest
import torch

from lf_dense.ablation.experiment import Options, run_experiment
from lf_dense.ablation.variants import FORMS
from lf_dense.errors import UsageError, run_tool
from support.driving import ROOT, load_tool
from support.image_archive import noisy_colours

TOOL = ROOT / "tools" / "ablate.py"
MM_PACKAGES = ("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain")


def run(*arguments):
    """Run the tool in a process that cannot import any mm package."""
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({MM_PACKAGES!r})); "
        f"sys.argv = {['ablate.py', *map(str, arguments)]!r}; "
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_tool_from_images_to_table_without_mm_packages(tmp_path):
    data = noisy_colours(tmp_path / "images.tar.gz")
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


def test_what_the_tool_refuses(tmp_path, capsys, monkeypatch):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    tool = load_tool("ablate")
    for arguments, words in (
        (["--data", "gone.tar"], "gone.tar are not there"),
        (["--data", str(tmp_path / "empty.tar")], "has no train/"),
        (["--data", str(tmp_path / "broken.tar")], "cannot be read"),
        (["--data", "x", "--epochs", "0"], "at least 1"),
        (["--data", "x", "--train-images", "8"], "less than one batch"),
    ):
        monkeypatch.setattr(sys, "argv", ["ablate.py", *arguments, "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as end:
            run_tool(tool.main)
        assert end.value.code == 2
        printed = capsys.readouterr().err
        assert words in printed
        assert printed.count("\n") == 1


def test_the_tools_options_are_the_experiments(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--data", str(tmp_path)])
    assert load_tool("ablate").parse_options() == Options(tmp_path)
    more = ["--form", "gpu", "--seeds", "4", "5", "--only", "exact", "--val-images", "9"]
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--data", str(tmp_path), *more])
    wanted = Options(tmp_path, form="gpu", seeds=[4, 5], only=["exact"], val_images=9)
    assert load_tool("ablate").parse_options() == wanted


def test_options_change_the_recipe(tmp_path):
    options = Options(tmp_path, epochs=2, train_images=64, val_images=3)
    assert options.recipe() == FORMS["cpu"]._replace(epochs=2, train_images=64, val_images=3)


@pytest.mark.parametrize("number", ["epochs", "train_images", "val_images", "workers"])
def test_numbers_below_one_are_refused(tmp_path, number):
    with pytest.raises(UsageError, match="at least 1"):
        run_experiment(Options(tmp_path, **{number: 0}))


def test_the_gpu_form_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="needs a GPU"):
        run_experiment(Options(tmp_path, form="gpu"))
