import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from earlybird.errors import EarlybirdError, InputError
from earlybird.train import folder as module
from earlybird.train.folder import RunFolder


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as first, pytest.raises(InputError, match="in use by another run"):
        RunFolder(first.path)
    RunFolder(tmp_path / "run").close()


def test_the_lock_of_a_killed_process_is_lifted(tmp_path: Path) -> None:
    code = "import sys, time; from earlybird.train.folder import RunFolder; from pathlib import Path\n"
    code += "folder = RunFolder(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(InputError, match="in use"):
            RunFolder(tmp_path)
        process.kill()
        process.wait()
    RunFolder(tmp_path).close()


def test_ranks_that_do_not_write_leave_no_trace(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", writer=False) as folder:
        folder.append_row({"step": 1})
        folder.write_json("x.json", 1)
        folder.beat(3.0)
        folder.cut_rows(0)
        folder.check_unused()
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.check_unused()
        (tmp_path / "photo.jpg").touch()
        with pytest.raises(InputError, match=r"not empty.*photo\.jpg"):
            folder.check_unused()
        (tmp_path / "recipe.toml").touch()
        with pytest.raises(InputError, match=r"unfinished run.*earlybird resume"):
            folder.check_unused()
        (tmp_path / "result.json").touch()
        with pytest.raises(InputError, match=r"a finished run.*choose another"):
            folder.check_unused()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to"):
        RunFolder(tmp_path / "file")


def test_leftovers_of_a_killed_write_are_removed_and_nothing_else(tmp_path: Path) -> None:
    ours = ("model.safetensors", "recipe.toml", "checkpoint-00000012.json", "checkpoint-00000012.safetensors")
    for name in ours:
        (tmp_path / f".{name}.a_c12xyz.tmp").touch()
    with RunFolder(tmp_path) as folder:  # killed at its very beginning: there is no recipe
        folder.check_unused()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    for name in (*ours, "recipe.toml"):
        (tmp_path / f".{name}.a_c12xyz.tmp").touch()
    for name in ("recipe.toml", ".theirs.tmp", ".letter.txt.abc.tmp"):
        (tmp_path / name).touch()
    with RunFolder(tmp_path) as folder:
        folder.accept()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".letter.txt.abc.tmp", ".theirs.tmp", "recipe.toml", "run.lock",
    ]  # fmt: skip


@pytest.mark.parametrize("names", [["photo.jpg", ".x.tmp"], [".x.tmp"], ["recipe.toml", ".model.safetensors.a.tmp"]])
def test_a_refused_folder_is_left_as_it_was(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text(name)
    with pytest.raises(InputError), RunFolder(tmp_path) as folder:
        folder.check_unused()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: name for name in names}


def test_a_new_run_does_not_take_over_a_heartbeat(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("12.000\n")
    with RunFolder(tmp_path) as folder:
        folder.check_unused()
        assert folder.last_beat() == 0


def test_rows_are_synced_on_demand(tmp_path: Path, monkeypatch: Any) -> None:
    synced: list[str] = []
    with RunFolder(tmp_path) as folder:
        folder.sync_rows()  # there are none yet
        folder.append_row({"step": 1})
        monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
        folder.sync_rows()
    assert [Path(name).name for name in synced] == ["metrics.jsonl"]


def test_rows_after_a_checkpoint_are_cut_off_and_a_torn_last_line_too(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        assert folder.rows() == []
        for step in (1, 2, 3):
            folder.append_row({"step": step, "loss": step / 3})
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 4, "lo')
        assert [row["step"] for row in folder.rows()] == [1, 2, 3]
        folder.cut_rows(2)
        folder.append_row({"step": 3})
        assert folder.rows() == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}, {"step": 3}]


def test_heartbeat_tells_how_long_the_run_was_alive(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_BEAT_EVERY_S", 0.0)
    with RunFolder(tmp_path) as folder:
        folder.accept()
        assert folder.last_beat() == 0
        for seconds in (1234567.125, 8.5):  # a shorter text over a longer one
            folder.beat(seconds)
            time.sleep(0.001)
    with RunFolder(tmp_path) as folder:
        assert folder.last_beat() == 8.5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_says_how_to_go_on(number: int, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with RunFolder(tmp_path) as folder:
        monkeypatch.setattr("builtins.open", full)
        with pytest.raises(EarlybirdError, match=r"no space left.*earlybird resume") as error:
            folder.append_row({"step": 1})
        assert error.value.exit_code == 2


def test_damaged_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "tune.json").write_text('{"choice"')
    with RunFolder(tmp_path) as folder:
        assert folder.read_json("none.json") is None
        with pytest.raises(InputError, match=r"tune\.json is damaged"):
            folder.read_json("tune.json")


def test_a_file_system_without_locks_is_named_as_that(tmp_path: Path, monkeypatch: Any) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(InputError, match=r"cannot be locked \(No locks available\)"):
        RunFolder(tmp_path / "run")
