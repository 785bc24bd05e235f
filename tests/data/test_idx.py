import gzip
import hashlib

import numpy as np
import pytest

from earlybird.data.idx import read_idx
from earlybird.errors import DataError


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    header = bytes((0, 0, kind, values.ndim))
    return header + b"".join(side.to_bytes(4, "big") for side in values.shape) + values.tobytes()


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("packed", [True, False])
def test_reads_images(tmp_path, packed):
    raw = idx(IMAGES)
    path = tmp_path / ("x.gz" if packed else "x")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    read = read_idx(path, dimensions=3, sha256=hashlib.sha256(raw).hexdigest())
    assert read.dtype == np.uint8
    assert np.array_equal(read, IMAGES)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no file .*labels"):
        read_idx(tmp_path / "labels", dimensions=1)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "nothing"),
        (idx(IMAGES)[:10], "begins with 00 00 08 03"),
        (idx(IMAGES)[:-1], "holds 23 values; 24, as its header says.*short"),
        (idx(IMAGES) + b"x", "too long"),
        (idx(IMAGES, kind=13), "begins with 00 00 0d 03"),
        (idx(IMAGES[0]), "3 dimension"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path, raw, message):
    path = tmp_path / "file"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read_idx(path, dimensions=3)


def test_damaged_and_short_gzip(tmp_path):
    packed = bytearray(gzip.compress(idx(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))))
    path = tmp_path / "x.gz"
    path.write_bytes(packed[:-500])
    with pytest.raises(DataError, match="damaged"):
        read_idx(path, dimensions=1)
    packed[2000] ^= 0xFF
    path.write_bytes(packed)
    with pytest.raises(DataError, match="damaged"):
        read_idx(path, dimensions=1)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="damaged"):
        read_idx(path, dimensions=1)


def test_a_flipped_bit_is_noticed_by_the_sum(tmp_path):
    raw = bytearray(idx(IMAGES))
    sha256 = hashlib.sha256(raw).hexdigest()
    raw[-1] ^= 1
    path = tmp_path / "x"
    path.write_bytes(raw)
    read_idx(path, dimensions=3)
    with pytest.raises(DataError, match="differs from the published"):
        read_idx(path, dimensions=3, sha256=sha256)
