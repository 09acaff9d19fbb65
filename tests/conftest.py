"""Fixtures of every test."""

import os
import sys
from pathlib import Path

import pytest
import torch

from lf_dense import use_backend
from lf_dense.backends import native
from support import emulated, order
from support.driving import call


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: order.rank("/".join(item.path.parts[-2:])))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch):
    monkeypatch.delenv("LF_DENSE_BACKEND", raising=False)


@pytest.fixture(autouse=True, scope="module")
def _no_scope_from_another_module():
    """mmengine keeps the default scope for the process, and looks for every type in that framework first."""
    registry = sys.modules.get("mmengine.registry")
    if registry:
        registry.DefaultScope._instance_dict.clear()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images, which lies beside the checkout or where LF_DENSE_DATA says."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("LF_DENSE_DATA") or default)
    if not path.is_dir():
        pytest.skip("the shared data is not there: set LF_DENSE_DATA to its folder")
    return path


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """The embedded set, small."""
    out = tmp_path_factory.mktemp("shapes")
    call("make_shapes.py", "--out", out, "--train", 12, "--val", 4, "--size", 96)
    return out


BACKENDS = ["reference-cpu", "native-cpu", "emulated-cpu"]
if torch.cuda.is_available():
    BACKENDS += ["reference-cuda", "native-cuda"]


@pytest.fixture(params=BACKENDS)
def each_backend(request, monkeypatch):
    """Runs a test on every backend and device there is; new tensors are made on that device."""
    backend, device = request.param.split("-")
    if backend == "emulated":
        emulated.install(monkeypatch)
        backend = "native"
    elif backend == "native" and native.library_obstacle(device):
        pytest.skip(f"no native operators: {native.library_obstacle(device)}")
    previous = torch.get_default_device()
    torch.set_default_device(device)
    torch.manual_seed(0)
    with use_backend(backend):
        yield request.param
    torch.set_default_device(previous)
