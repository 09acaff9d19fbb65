"""The documentation site: its table of models, and that it builds, with its notebooks run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("sphinx", reason="sphinx is not installed: pip install -r requirements/docs.txt")
for package in ("furo", "myst_nb", "mmdet", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

from support import ROOT

DOCS = ROOT / "docs"
NOTEBOOKS = ("first_steps", "own_data")


@pytest.fixture
def model_zoo(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    import model_zoo

    return model_zoo


@pytest.fixture
def root_pages(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    import root_pages

    return root_pages


def build(source: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sphinx", "-q", "-T", "-W", "--keep-going", str(source), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The whole site, its notebooks run."""
    out = tmp_path_factory.mktemp("site") / "html"
    done = build(DOCS, out)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def test_every_config_of_a_metafile_is_a_row(model_zoo):
    named = []
    for path in sorted((ROOT / "configs").rglob("metafile.yml")):
        named += [model["Config"] for model in yaml.safe_load(path.read_text())["Models"]]
    lines = model_zoo.table(list(model_zoo.rows()))[2:]
    assert len(lines) == len(named) > 30
    for config in named:
        assert sum(f"](../{config})" in line for line in lines) == 1, config


def test_a_row_has_the_figures_of_both_sources_and_the_links(model_zoo):
    model = {
        "Name": "one",
        "Config": "configs/one.py",
        "Metadata": {"Parameters": 12_158_632, "FLOPs": 2_125_202_176, "Training Data": "COCO"},
        "Results": [
            {"Source": "published", "Metrics": {"box AP": 43.2}},
            {"Source": "published", "Metrics": {"mask AP": 40.3}},
            {"Source": "ours", "Metrics": {"box AP": None}},
        ],
        "Weights": "https://example.org/one.pth",
    }
    row = model_zoo.row(model)
    assert row.parameters == "12.2 M"
    assert row.flops == "2.13 G"
    assert row.published == "43.2 box AP, 40.3 mask AP"
    assert row.ours == ""
    assert row.files == "[weights](https://example.org/one.pth)"
    assert "files" in model_zoo.table([row])[0]
    assert "ours" not in model_zoo.table([row])[0]


@pytest.mark.parametrize(
    ("link", "wanted"),
    [
        ("[a](docs/use.md#security)", "[a](use.md#security)"),
        ("[a](CHANGELOG.md)", "[a](changelog.md)"),
        ("[a](LICENSE)", "[a](../LICENSE)"),
        ("[a](https://example.org/x)", "[a](https://example.org/x)"),
        ("[a](#set-up)", "[a](#set-up)"),
    ],
)
def test_links_of_the_root_files_lead_on_from_the_site(root_pages, link, wanted):
    assert root_pages.LINK.sub(root_pages.page_link, link) == wanted


@pytest.mark.parametrize(
    ("link", "wanted"),
    [
        ("[a](../CONTRIBUTING.md#how-to-add)", "[a](contributing.md#how-to-add)"),
        ("[a](../CHANGELOG.md)", "[a](changelog.md)"),
        ("[a](../README.md)", "[a](../README.md)"),
        ("[a](use.md#security)", "[a](use.md#security)"),
    ],
)
def test_links_to_the_root_files_stay_in_the_site(root_pages, link, wanted):
    assert root_pages.TO_ROOT.sub(root_pages.root_link, link) == wanted


def test_every_page_is_there(site):
    pages = [path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")]
    assert len(pages) > 25
    assert [page for page in pages if not (site / page).is_file()] == []
    assert "mask-rcnn_lf-tiny_fpn_1x_coco" in (site / "zoo.html").read_text()
    assert 'id="lf_dense.swap_backbone"' in (site / "api" / "swap.html").read_text()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_show_what_they_ran(site, name):
    page = (site / "tutorials" / f"{name}.html").read_text()
    assert page.count("<img") >= 2
    assert "Traceback" not in page
    # Each picture is a link to its file.
    assert page.count("image-reference") == page.count("<img")


def test_a_broken_link_and_a_failing_cell_are_errors(tmp_path):
    source = tmp_path / "docs"
    (source / "_static").mkdir(parents=True)
    shutil.copytree(DOCS / "_ext", source / "_ext", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(DOCS / "conf.py", source)
    (source / "index.md").write_text("# Home\n\n[gone](../gone.cpp)\n")
    done = build(source, tmp_path / "links")
    assert done.returncode
    assert "gone.cpp" in done.stderr
    head = "---\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n# Home\n\n"
    (source / "index.md").write_text(head + "```{code-cell}\n1 / 0\n```\n")
    done = build(source, tmp_path / "cells")
    assert done.returncode
    assert "ZeroDivisionError" in done.stderr
