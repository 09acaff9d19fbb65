"""Fixtures of every test."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch):
    monkeypatch.delenv("LF_DENSE_BACKEND", raising=False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images, which lies beside the checkout or where LF_DENSE_DATA says."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("LF_DENSE_DATA") or default)
    if not path.is_dir():
        pytest.skip("the shared data is not there: set LF_DENSE_DATA to its folder")
    return path
