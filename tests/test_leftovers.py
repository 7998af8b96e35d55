"""What a killed process leaves beside its output is gone when the same output is written again, and nothing else is."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qbl_trl import leftovers
from qbl_trl.errors import ConfigError
from qbl_trl.folders import check_free, new_folder

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(leftovers.fcntl is None, reason="no locks of this kind on this system")


def writing(output: Path, code: str = "print('writing', flush=True); time.sleep(600)") -> subprocess.Popen:
    """A process that is in the middle of writing `output`."""
    program = f"""
        import sys, time
        from pathlib import Path
        sys.argv = ["qbl-trl"]  # as the command, without torch
        from qbl_trl import folders
        with folders.new_folder({str(output)!r}, overwrite=True) as draft:
            (draft / "file").write_text("half")
            {code}
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "writing\n"
    return process


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_what_a_killed_process_left_is_removed_with_the_next_write_and_not_while_it_lives(tmp_path):
    process = writing(tmp_path / "out")
    try:
        held = names(tmp_path)
        assert len(held) == 1
        with new_folder(tmp_path / "out") as draft:
            (draft / "file").write_text("whole")
        assert names(tmp_path) == sorted([*held, "out"])
        assert (tmp_path / held[0] / "new" / "file").read_text() == "half"
    finally:
        kill(process)
    assert names(tmp_path) == sorted([*held, "out"])
    check_free(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "whole"


def test_only_leftovers_of_the_same_output_and_the_same_host_are_removed(tmp_path, monkeypatch):
    for output in ("out.old", "out_2"):
        kill(writing(tmp_path / output))
    (tmp_path / ".out.abcdefgh").mkdir()  # somebody else's
    (tmp_path / ".out.abcdefgh" / "lock").touch()
    before = names(tmp_path)
    check_free(tmp_path / "out")
    assert names(tmp_path) == before
    kill(writing(tmp_path / "out"))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(leftovers, "_MARK", "qbl_trl writes here, on another host\n")
        check_free(tmp_path / "out")
    assert len(names(tmp_path)) == len(before) + 1
    check_free(tmp_path / "out")
    assert names(tmp_path) == before


def test_a_folder_that_was_about_to_be_replaced_comes_back(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    stop = """rename = Path.rename
            def stopped(path, target):
                if path.name == "new":
                    print("writing", flush=True)
                    time.sleep(600)
                return rename(path, target)
            Path.rename = stopped"""
    kill(writing(tmp_path / "out", stop))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="is not empty"):
        check_free(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_a_leftover_inside_a_folder_that_stays_does_not_fill_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kill(writing(Path(".")))
    assert len(names(tmp_path)) == 1
    with new_folder(".") as draft:
        (draft / "file").touch()
    assert names(tmp_path) == ["file"]


def test_where_locks_do_not_work_nothing_is_removed_and_everything_is_written(tmp_path, monkeypatch):
    def refused(file, operation):
        raise OSError("no locks available")

    monkeypatch.setattr(leftovers.fcntl, "flock", refused)
    with new_folder(tmp_path / "out") as draft:
        assert names(draft.parent) == ["new"]
    kill(writing(tmp_path / "later"))
    before = names(tmp_path)
    check_free(tmp_path / "later")
    assert names(tmp_path) == before


def test_ctrl_c_while_the_replaced_folder_is_removed_leaves_what_the_next_write_removes(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")

    remove = leftovers.shutil.rmtree

    def stopped(path, **how):
        if Path(path).name == "removed":
            raise KeyboardInterrupt
        remove(path, **how)

    def replace_and_stop(patched):
        with new_folder(out, overwrite=True) as draft:
            (draft / "file").write_text("new")
            patched.setattr(leftovers.shutil, "rmtree", stopped)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        replace_and_stop(patched)
    assert (out / "file").read_text() == "new"
    assert len(names(tmp_path)) == 2
    (out / "file").unlink()
    out.rmdir()  # parts of a folder are never given back
    check_free(out)
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root removes whatever it likes")
def test_a_leftover_that_cannot_be_removed_yet_is_removed_later(tmp_path):
    process = writing(tmp_path / "out", "(draft / 'kept').mkdir(); (draft / 'kept' / 'file').touch(); "
                      "(draft / 'kept').chmod(0o555); print('writing', flush=True); time.sleep(600)")  # fmt: skip
    kill(process)
    (holder,) = tmp_path.iterdir()
    check_free(tmp_path / "out")
    assert (holder / "lock").exists()
    (holder / "new" / "kept").chmod(0o755)
    check_free(tmp_path / "out")
    assert names(tmp_path) == []
