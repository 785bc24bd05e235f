import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from earlybird.errors import EarlybirdError, InputError
from earlybird.files import is_disk_full, read_tensors, write_tensors, write_text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_leaves_the_old_file(number, tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")

    def full(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EarlybirdError, match="no space left"):
        write_text(tmp_path / "x", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]
    assert is_disk_full(SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})"))


def test_other_failures_are_not_a_full_disk():
    assert not is_disk_full(OSError(errno.EACCES, "denied"))
    assert not is_disk_full(SafetensorError("header too large"))


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        write_text(tmp_path / "file" / "below.txt", "y")
    assert (tmp_path / "file").read_text() == "x"


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    for mask, mode in ((0o077, 0o600), (0o022, 0o644)):
        before = os.umask(mask)
        try:
            path = write_text(tmp_path / f"{mask}", "x")
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == mode


def test_tensors_that_share_memory_are_written_one_by_one(tmp_path):
    whole = torch.arange(4.0)
    path = write_tensors(tmp_path / "x.safetensors", {"a": whole, "b": whole[2:], "none": torch.zeros(0)}, {})
    found, _ = read_tensors(path)
    assert found["a"].tolist() == [0, 1, 2, 3]
    assert found["b"].tolist() == [2, 3]
