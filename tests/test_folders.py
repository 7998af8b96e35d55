import pytest

from qbl_trl.errors import ConfigError
from qbl_trl.folders import new_folder


def test_a_folder_appears_only_when_the_block_ends(tmp_path):
    with new_folder(tmp_path / "a" / "out") as draft:
        (draft / "file").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "file").read_text() == "1"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]


def test_after_an_error_the_old_folder_is_as_it_was_and_nothing_else_is_left(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")

    def write_and_fail(draft):
        (draft / "file").write_text("new")
        raise RuntimeError

    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", overwrite=True) as draft:
        write_and_fail(draft)
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwriting_replaces_the_whole_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").touch()
    with new_folder(tmp_path / "out", overwrite=True) as draft:
        (draft / "file").touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not empty"), new_folder(tmp_path):
        pass
    with pytest.raises(ConfigError, match="is a file"), new_folder(tmp_path / "file", overwrite=True):
        pass
