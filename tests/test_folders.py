import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qbl_trl.errors import ConfigError
from qbl_trl.folders import check_free, new_folder


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


@pytest.mark.parametrize("folder", [None, 3])
def test_what_is_no_path_is_refused(folder):
    with pytest.raises(ConfigError, match=f"{folder} is no path of a folder"), new_folder(folder):
        pass


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


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_pipe_or_a_device_stays_what_it_is(tmp_path, overwrite):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="is no folder; name a folder to write into"), new_folder(pipe, overwrite):
        pass
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_what_lies_behind_a_link_is_filled(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    (tmp_path / "later").symlink_to(tmp_path / "new")
    for name in ("out", "later"):
        with new_folder(tmp_path / name) as draft:
            (draft / "file").touch()
        assert (tmp_path / name).is_symlink()
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["file"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "later", "new", "out"]


def test_the_current_folder_is_filled_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="failed"), new_folder("."):
        raise OSError("failed")
    assert not list(tmp_path.iterdir())
    with new_folder(".") as draft:
        (draft / "file").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ConfigError, match="cannot be replaced"), new_folder(".", overwrite=True):
        pass


def test_an_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    rename = Path.rename

    def fail(path, target):
        if path.name == "new":
            raise OSError("no")
        return rename(path, target)

    with pytest.raises(OSError, match="no"), new_folder(tmp_path / "out", overwrite=True):
        monkeypatch.setattr(Path, "rename", fail)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stopped", ["old", "out"])
def test_ctrl_c_between_two_names_loses_neither_folder(tmp_path, monkeypatch, stopped):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    rename = Path.rename

    def interrupted(path, target):
        renamed = rename(path, target)
        if Path(target).name == stopped:
            monkeypatch.setattr(Path, "rename", rename)
            raise KeyboardInterrupt
        return renamed

    def replace():
        with new_folder(tmp_path / "out", overwrite=True) as draft:
            (draft / "new file").touch()
            monkeypatch.setattr(Path, "rename", interrupted)

    with pytest.raises(KeyboardInterrupt):
        replace()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file" if stopped == "old" else "new file"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_process_that_writes_in_the_same_moment_comes_before(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    others = iter(["first", "second"])

    def raced(path, target):
        name = next(others, None) if path.name == "new" else None
        if name is not None:
            out.mkdir()
            (out / name).touch()
        return rename(path, target)

    with new_folder(out, overwrite=True) as draft:
        (draft / "mine").touch()
        monkeypatch.setattr(Path, "rename", raced)
    assert [p.name for p in out.iterdir()] == ["mine"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_permissions_are_those_of_any_new_folder_and_a_full_disk_is_named(tmp_path):
    old = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    with pytest.raises(ConfigError, match="full: No space left"), new_folder(tmp_path / "full"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConfigError, match="full: No space left"), new_folder(tmp_path / "full"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="invalid"), new_folder(tmp_path / "full"):
        raise SafetensorError("Error while serializing: invalid header")


@pytest.mark.parametrize("here", [False, True])
def test_files_that_come_while_the_block_runs_stay(tmp_path, monkeypatch, here):
    out = tmp_path / "out"
    if here:
        out.mkdir()
        monkeypatch.chdir(out)

    def write():
        with new_folder(out) as draft:
            (draft / "ours").touch()
            out.mkdir(exist_ok=True)
            (out / "thesis").write_text("mine")

    with pytest.raises(ConfigError, match="out was filled meanwhile, and stays as it is"):
        write()
    assert [file.name for file in out.iterdir()] == ["thesis"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_tilde_is_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with new_folder("~/out") as draft:
        (draft / "file").write_text("")
    assert (tmp_path / "home" / "out" / "file").is_file()
    assert check_free("~/other") == tmp_path / "home" / "other"
    assert not (tmp_path / "~").exists()


def test_a_name_that_no_file_system_takes_is_named():
    with pytest.raises(ConfigError, match="cannot be a folder"):
        check_free("n" * 5000)


def test_a_folder_whose_parent_takes_nothing_is_filled_where_it_is(tmp_path, monkeypatch):
    out = tmp_path / "theirs" / "out"
    out.mkdir(parents=True)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **kw: Path(path) != out.parent and allowed(path, mode, **kw))
    _fill_from_inside(out)


def _fill_from_inside(out):
    node = out.stat().st_ino
    with new_folder(out) as draft:
        assert draft.is_relative_to(out)
        (draft / "file").write_text("1")
    assert out.stat().st_ino == node
    assert [path.name for path in out.iterdir()] == ["file"]
    with pytest.raises(ConfigError, match="cannot be replaced"):
        check_free(out, overwrite=True)


def test_ctrl_c_while_a_hidden_folder_is_marked_leaves_none(tmp_path, monkeypatch):
    def stopped(holder):
        raise KeyboardInterrupt

    monkeypatch.setattr("qbl_trl.folders.mark", stopped)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
