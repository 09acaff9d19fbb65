"""Fixtures of the room: the frameworks whose configs a test needs."""

import pytest


@pytest.fixture
def mmdet():
    return pytest.importorskip("mmdet")


@pytest.fixture
def mmseg():
    return pytest.importorskip("mmseg")
