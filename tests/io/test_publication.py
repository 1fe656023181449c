import os
from pathlib import Path

import pytest

from beam_pipelines.io.publication import published, put_in_place, remove_leftovers, scratch_path


def test_a_file_appears_when_the_block_ends(tmp_path):
    with published(tmp_path, "a/b.txt") as path:
        path.write_text("new")
        assert not (tmp_path / "a" / "b.txt").exists()
        assert path.suffix == ".tmp"
    assert (tmp_path / "a" / "b.txt").read_text() == "new"
    assert list((tmp_path / "_tmp").iterdir()) == []


def test_a_failure_keeps_what_was_there_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "b.txt").write_text("old")
    with pytest.raises(OSError, match="disk full"), published(tmp_path, "b.txt") as path:
        path.write_text("half")
        raise OSError("disk full")
    assert (tmp_path / "b.txt").read_text() == "old"
    assert list((tmp_path / "_tmp").iterdir()) == []


def test_leftovers_are_removed_and_published_files_stay(tmp_path):
    with published(tmp_path, "b.txt") as path:
        path.write_text("kept")
    scratch_path(tmp_path).write_text("crashed")
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


@pytest.fixture
def order(monkeypatch):
    """What is synced and renamed, in order: ("sync", path) and ("rename", path)."""
    order = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor):
        order.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def renamed(path, target):
        order.append(("rename", Path(target)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    return order


def test_a_file_is_synced_before_it_is_renamed_and_its_folders_after(tmp_path, order):
    lake = tmp_path / "lake"
    with published(lake, "event_date=2026-01-05/a") as path:
        path.write_text("new")
        assert order == []
    target = lake / "event_date=2026-01-05" / "a"
    assert order == [
        ("sync", path),
        ("rename", target),
        ("sync", target.parent),
        ("sync", lake),
        ("sync", tmp_path),
    ]


def test_a_file_beside_its_target_is_put_in_place(tmp_path, order):
    (tmp_path / "a.tmp").write_text("new")
    put_in_place(tmp_path / "a.tmp", tmp_path / "a", tmp_path)
    assert (tmp_path / "a").read_text() == "new"
    assert [what for what, _ in order] == ["sync", "rename", "sync", "sync"]


def test_what_can_not_be_synced_does_not_appear(tmp_path, monkeypatch):
    def broken(_):
        raise OSError("input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="input/output"), published(tmp_path, "b.txt") as path:
        path.write_text("new")
    assert not (tmp_path / "b.txt").exists()
