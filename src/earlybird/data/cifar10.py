"""CIFAR-10 in three layouts: the binary batches, the archive they are published in, and WebP mosaics.

A. Krizhevsky, Learning multiple layers of features from tiny images, 2009, https://www.cs.toronto.edu/~kriz/cifar.html.

- ``binary``: ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, each 10,000 records of one label byte
  and 3,072 pixel bytes (channel, row, column).
- ``archive``: ``cifar-10-binary.tar.gz`` with these files; read without unpacking it to disk.
- ``mosaic``: each batch as a lossless WebP of 100 x 100 tiles of 32 x 32 pixels, image i in row i // 100 and column
  i % 100; labels as raw bytes in ``train_labels.u8`` and ``test_labels.u8``.

All three are brought to the records of the binary version, of which the SHA-256 is known.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from earlybird.errors import DataError

_RECORDS, _TILES, _SIDE = 10_000, 100, 32
_PIXELS = 3 * _SIDE * _SIDE
_RECORD_BYTES = 1 + _PIXELS
_TRAIN_BATCHES = 5
_BATCHES = (*(f"data_batch_{batch}" for batch in range(1, _TRAIN_BATCHES + 1)), "test_batch")
_THREADS = 4  # decoding a mosaic takes about 100 MB


def read_batches(kind: str, paths: tuple[Path, ...], sha256: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Read all six batches.

    Args:
        kind: ``'binary'``, ``'archive'`` or ``'mosaic'``.
        paths: Of the files of that layout, in the catalogue's order.
        sha256: Batch name -> SHA-256 of its records in the binary version.

    Returns:
        Images uint8 (60000, 3, 32, 32) and labels int64 (60000,); the last 10,000 are the test part.

    Raises:
        DataError: A file is missing, short, damaged or not CIFAR-10.
    """
    images = np.empty((len(_BATCHES) * _RECORDS, 3, _SIDE, _SIDE), np.uint8)
    labels = np.empty(len(images), np.int64)

    def take(batch: int, records: np.ndarray, path: Path) -> None:
        if hashlib.sha256(records.data).hexdigest() != sha256[_BATCHES[batch]]:
            raise DataError(
                f"{path} differs from the published {_BATCHES[batch]} (SHA-256 of its content)",
                hint="delete it and fetch it again",
            )
        rows = slice(batch * _RECORDS, (batch + 1) * _RECORDS)
        labels[rows] = records[:, 0]
        images[rows] = records[:, 1:].reshape(_RECORDS, 3, _SIDE, _SIDE)

    if kind == "archive":
        for batch, records in _archive(paths[0]):
            take(batch, records, paths[0])
        return images, labels

    if kind == "mosaic":
        given = _label_bytes(paths[-2], _TRAIN_BATCHES * _RECORDS), _label_bytes(paths[-1], _RECORDS)
        tags = np.concatenate(given).reshape(len(_BATCHES), _RECORDS)

    def read(batch: int) -> None:
        path = paths[batch]
        take(batch, _mosaic(path, tags[batch]) if kind == "mosaic" else _binary(path), path)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(read, range(len(_BATCHES))))
    return images, labels


def _binary(path: Path) -> np.ndarray:
    try:
        return _records(path.read_bytes(), path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", hint="check the data folder") from error


def _records(raw: bytes, path: Path) -> np.ndarray:
    if len(raw) != _RECORDS * _RECORD_BYTES:
        raise DataError(
            f"{path} holds {len(raw):,} bytes a batch",
            needed=f"{_RECORDS * _RECORD_BYTES:,} ({_RECORDS:,} records of {_RECORD_BYTES:,})",
            hint="delete it and fetch it again",
        )
    return np.frombuffer(raw, np.uint8).reshape(_RECORDS, _RECORD_BYTES)


def _archive(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    seen = set()
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                batch = Path(member.name).stem
                if member.isfile() and batch in _BATCHES and (file := archive.extractfile(member)) is not None:
                    seen.add(batch)
                    yield _BATCHES.index(batch), _records(file.read(), path)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error})", hint="delete it and fetch it again") from error
    if len(seen) != len(_BATCHES):
        raise DataError(
            f"{path} has no {', '.join(sorted(set(_BATCHES) - seen))}",
            needed="the published cifar-10-binary.tar.gz",
            hint="delete it and fetch it again",
        )


def _label_bytes(path: Path, count: int) -> np.ndarray:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", hint="check the data folder") from error
    if len(raw) != count:
        raise DataError(f"{path} holds {len(raw):,} labels", needed=f"{count:,}", hint="fetch it again")
    return np.frombuffer(raw, np.uint8)


def _mosaic(path: Path, labels: np.ndarray) -> np.ndarray:
    """Return the records of one batch, uint8 (10000, 3073)."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} does not decode ({error})", hint="delete it and fetch it again") from error
    if pixels.shape != (_TILES * _SIDE, _TILES * _SIDE, 3):
        raise DataError(
            f"{path} is an image of {'x'.join(map(str, pixels.shape))}",
            needed=f"{_TILES * _SIDE}x{_TILES * _SIDE}x3: {_TILES} x {_TILES} tiles of {_SIDE} pixels",
        )
    records = np.empty((_RECORDS, _RECORD_BYTES), np.uint8)
    records[:, 0] = labels
    tiles = pixels.reshape(_TILES, _SIDE, _TILES, _SIDE, 3)  # (row, y, column, x, channel)
    records[:, 1:] = tiles.transpose(0, 2, 4, 1, 3).reshape(_RECORDS, _PIXELS)
    return records
