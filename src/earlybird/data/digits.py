"""The handwritten digits that come with scikit-learn: 1797 grey images of 8x8 pixels, 10 classes.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998, https://doi.org/10.24432/C50P49.

The table is read where scikit-learn keeps it, without importing scikit-learn, which takes about a second. Its values 0
to 16 are scaled to 0 to 255. The test part is every fifth image of each class: fixed, and the same on every machine.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from earlybird.errors import DataError

_IMAGES, _SIDE, _WHITE = 1797, 8, 16
_TEST_EVERY = 5


def read_digits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read scikit-learn's ``digits.csv.gz``.

    Returns:
        Images uint8 (1797, 1, 8, 8) and labels int64 (1797,).

    Raises:
        DataError: The file is not that table.
    """
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})", hint="install scikit-learn again") from error
    if table.shape != (_IMAGES, _SIDE * _SIDE + 1) or table[:, :-1].max() > _WHITE:
        raise DataError(
            f"{path} holds a table of shape {table.shape}",
            needed=f"{_IMAGES} digits of {_SIDE * _SIDE} values up to {_WHITE}, and a label",
            hint="install scikit-learn again",
        )
    images = np.rint(table[:, :-1] * (255 / _WHITE)).astype(np.uint8).reshape(-1, 1, _SIDE, _SIDE)
    return images, table[:, -1].astype(np.int64)


def split_digits(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted indices of the training and the test part: every fifth image of each class is for the test."""
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        test[np.flatnonzero(labels == label)[_TEST_EVERY - 1 :: _TEST_EVERY]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)
