import hashlib
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from earlybird.data import cifar10
from earlybird.data.cifar10 import read_batches
from earlybird.errors import DataError

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


@pytest.fixture
def records(monkeypatch):
    """Six batches of four records, in place of ten thousand."""
    monkeypatch.setattr(cifar10, "_RECORDS", 4)
    monkeypatch.setattr(cifar10, "_TILES", 2)
    generator = np.random.default_rng(0)
    return {
        name: np.concatenate(
            [
                generator.integers(0, 10, (4, 1), dtype=np.uint8),
                generator.integers(0, 256, (4, 3072), dtype=np.uint8),
            ],
            axis=1,
        )
        for name in BATCHES
    }


def sums(records):
    return {name: hashlib.sha256(rows.tobytes()).hexdigest() for name, rows in records.items()}


def write_binary(folder, records):
    for name, rows in records.items():
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    return tuple(folder / f"{name}.bin" for name in BATCHES)


def write_archive(folder, records):
    path = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, raw in [("readme.html", b"hello"), *((f"{n}.bin", r.tobytes()) for n, r in records.items())]:
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return (path,)


def write_mosaic(folder, records):
    for name, rows in records.items():
        grid = np.zeros((64, 64, 3), np.uint8)
        for i, row in enumerate(rows):
            y, x = 32 * (i // 2), 32 * (i % 2)
            grid[y : y + 32, x : x + 32] = row[1:].reshape(3, 32, 32).transpose(1, 2, 0)
        Image.fromarray(grid).save(folder / f"{name}.webp", lossless=True)
    (folder / "train_labels.u8").write_bytes(b"".join(records[name][:, 0].tobytes() for name in BATCHES[:5]))
    (folder / "test_labels.u8").write_bytes(records["test_batch"][:, 0].tobytes())
    return (*(folder / f"{name}.webp" for name in BATCHES), folder / "train_labels.u8", folder / "test_labels.u8")


WRITE = {"binary": write_binary, "archive": write_archive, "mosaic": write_mosaic}


@pytest.mark.parametrize("kind", WRITE)
def test_all_layouts_give_the_same_images(tmp_path, records, kind):
    images, labels = read_batches(kind, WRITE[kind](tmp_path, records), sums(records))
    rows = np.concatenate([records[name] for name in BATCHES])
    assert np.array_equal(labels, rows[:, 0])
    assert labels.dtype == np.int64
    assert np.array_equal(images, rows[:, 1:].reshape(-1, 3, 32, 32))


@pytest.mark.parametrize("kind", WRITE)
def test_a_changed_pixel_is_noticed(tmp_path, records, kind):
    expected = sums(records)
    records["data_batch_3"][2, 100] ^= 1
    with pytest.raises(DataError, match="differs from the published data_batch_3"):
        read_batches(kind, WRITE[kind](tmp_path, records), expected)


def test_a_short_batch_says_how_short(tmp_path, records):
    paths = write_binary(tmp_path, records)
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_2.bin holds 12,291 bytes a batch; 12,292"):
        read_batches("binary", paths, sums(records))


def test_a_damaged_or_partial_archive(tmp_path, records):
    (path,) = write_archive(tmp_path, records)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match="damaged"):
        read_batches("archive", (path,), sums(records))
    path.write_bytes(b"no archive at all")
    with pytest.raises(DataError, match="damaged"):
        read_batches("archive", (path,), sums(records))
    expected = sums(records)
    del records["data_batch_4"], records["test_batch"]
    with pytest.raises(DataError, match="has no data_batch_4, test_batch"):
        read_batches("archive", write_archive(tmp_path, records), expected)


def test_wrong_mosaics(tmp_path, records):
    paths = write_mosaic(tmp_path, records)
    whole = paths[0].read_bytes()
    paths[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"data_batch_1.webp does not decode"):
        read_batches("mosaic", paths, sums(records))
    Image.new("RGB", (64, 32)).save(paths[0], lossless=True)
    with pytest.raises(DataError, match="image of 32x64x3; 64x64x3"):
        read_batches("mosaic", paths, sums(records))
    paths[0].write_bytes(whole)
    paths[-2].write_bytes(b"123")
    with pytest.raises(DataError, match=r"train_labels.u8 holds 3 labels; 20"):
        read_batches("mosaic", paths, sums(records))
