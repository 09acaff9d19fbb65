"""The house: what a room may import, how long lines and tools may be, and that docs list what there is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT, order

PACKAGE = ROOT / "lf_dense"
WIDTH = 110
LONGEST_TOOL = 120
# These run before the package can be imported, or drive its tools: they hold their own logic.
SCRIPTS = ("setup_env.py", "build_mmcv.py", "gpu_check.py", "sanitize.py", "demo.py")
# Imports run downwards: a module takes from its own floor and from those before it.
FLOORS = (
    ("allocator", "errors", "files", "memory", "presets", "threads"),
    ("backends",),
    ("fusing",),
    ("functional",),
    ("attention",),
    ("blocks",),
    ("laplacianformer",),
    ("frameworks",),
    ("weights",),
    ("swap",),
    ("training",),
    ("tiling",),
    ("export",),
    ("benchmark", "ablation", "explain"),
    ("distillation", "info", "__main__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FRAMEWORKS = {"mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain"}
TORCH_ALONE = (
    "errors",
    "files",
    "fusing",
    "allocator",
    "memory",
    "presets",
    "threads",
    "backends",
    "functional",
    "attention",
    "blocks",
    "info",
    "ablation",
)
# What runs exported models; it imports these, the standard library and no more, however late.
RUNTIME = tuple(
    f"export.{name}"
    for name in ("runtime", "metadata", "preparing", "decoding", "drawing", "run", "libraries")
)
RUNTIME_IMPORTS = (
    "cv2",
    "numpy",
    "onnxruntime",
    "openvino",
    *(f"lf_dense.{name}" for name in ("errors", "files", "export.Runtime", *RUNTIME)),
)
# The one module that is part of a framework; a config has to name it.
GLUE = {"mmpretrain": ("distillation", "training.distillation")}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imports_of(name: str, path: Path, top_alone: bool):
    """What a module imports, by absolute names; ``top_alone`` leaves out imports within functions."""
    tree = ast.parse(path.read_text())
    package = ["lf_dense", *name.split(".")]
    if path.name != "__init__.py":
        package.pop()
    for node in tree.body if top_alone else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    return name.split(".")[0]


def test_every_module_has_a_floor():
    assert {room_of(name) for name, _ in modules() if name} == set(FLOOR_OF)


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, path in modules() if name])
def test_imports_run_downwards(name, path):
    for imported in imports_of(name, path, top_alone=False):
        if imported.startswith("lf_dense.") and room_of(imported.removeprefix("lf_dense.")) in FLOOR_OF:
            room = room_of(imported.removeprefix("lf_dense."))
            assert FLOOR_OF[room] <= FLOOR_OF[room_of(name)], f"{name} imports {imported}"


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_frameworks_are_imported_where_they_belong(name, path):
    for imported in imports_of(name, path, top_alone=True):
        top = imported.split(".")[0]
        if top == "mmengine":
            assert room_of(name) not in TORCH_ALONE, f"{name} imports {imported}"
        elif top in FRAMEWORKS:
            assert name in GLUE.get(top, ()), f"{name} imports {imported} before anybody asked for it"


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, path in modules() if name in RUNTIME])
def test_the_runtime_of_exported_models_needs_no_torch(name, path):
    for imported in imports_of(name, path, top_alone=False):
        known = any(f"{imported}.".startswith(f"{allowed}.") for allowed in RUNTIME_IMPORTS)
        assert known or imported.split(".")[0] in sys.stdlib_module_names, f"{name} imports {imported}"
    for imported in imports_of(name, path, top_alone=True):
        assert imported not in ("onnxruntime", "openvino"), f"{name} imports {imported} before it is needed"


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_line_is_longer_than_110_characters():
    files = [path for path in tracked() if path.suffix not in (".png", ".csv")]
    assert len(files) > 100
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > WIDTH
    ]
    assert long == []


def test_tools_hold_no_logic():
    for path in tracked("tools/*.py"):
        if path.name in SCRIPTS:
            continue
        text = path.read_text()
        assert len(text.splitlines()) <= LONGEST_TOOL, path.name
        functions = [
            node for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        ]
        others = [node.name for node in functions if not node.name.startswith(("main", "parse_"))]
        assert others == [], f"{path.name} defines {others}"
        assert "run_tool(main)" in text, path.name


def test_the_documentation_lists_every_tool():
    page = (ROOT / "docs" / "use.md").read_text()
    missing = [path.name for path in tracked("tools/*.py", "tools/*.sh") if path.name not in page]
    assert missing == []


def test_relative_links_lead_somewhere():
    for path in tracked("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target and not target.startswith("mailto:"):
                assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links {target}"


def test_the_long_test_files_are_there():
    assert [name for name in order.LONG if not (ROOT / "tests" / name).is_file()] == []


def test_tests_mirror_the_rooms():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    folders = {path.parent.name for path in tracked("tests/*/test_*.py")}
    assert folders == rooms | {"project"}
