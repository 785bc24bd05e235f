import errno
import os

import pytest
from safetensors import SafetensorError

from earlybird.errors import EarlybirdError
from earlybird.files import is_disk_full, write_text


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
