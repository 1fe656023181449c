import pytest

from beam_pipelines.io.publication import published, remove_leftovers, scratch_path


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
