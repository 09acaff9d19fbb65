"""Checkpoints are written whole or not at all."""

from __future__ import annotations

import pytest

pytest.importorskip("mmengine")
from mmengine.fileio import get_file_backend

from lf_dense import files
from lf_dense.files import write_atomically
from lf_dense.weights import saving


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "epoch_1.pth"
    write_atomically(path, b"old")

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", cut)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["epoch_1.pth"]


def test_mmengine_writes_through_the_atomic_backend(tmp_path, monkeypatch):
    written = []

    def record(path, content):
        written.append((str(path), content))

    monkeypatch.setattr(saving, "write_atomically", record)
    from mmengine.fileio.backends import registry_utils

    for table, key in ((registry_utils.backends, "local"), (registry_utils.prefix_to_backends, "")):
        monkeypatch.setitem(table, key, table[key])  # put back afterwards
    saving.write_checkpoints_atomically()
    path = str(tmp_path / "x.pth")
    get_file_backend(path).put(b"content", path)
    assert written == [(path, b"content")]


def test_what_killed_writes_left_is_removed(tmp_path):
    for name in (".epoch_2.pth.abcdefgh", "epoch_1.pth", ".hidden"):
        (tmp_path / name).touch()
    saving.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "epoch_1.pth"]
