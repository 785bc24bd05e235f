"""IDX files, the format of MNIST and its relatives, gzipped or not.

Format: http://yann.lecun.com/exdb/mnist/. Two zero bytes, the type (8: unsigned byte), the number of dimensions, each
dimension as a big-endian 32-bit number, then the values in row-major order.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from earlybird.errors import DataError

_UNSIGNED_BYTE = 8


def read_idx(path: Path, *, dimensions: int, sha256: str | None = None) -> np.ndarray:
    """Read an IDX file of unsigned bytes.

    Args:
        path: Ends with ``.gz`` when it is gzipped.
        dimensions: How many it must have: 3 for images (N, H, W), 1 for labels (N,).
        sha256: Of the uncompressed file; checked if given.

    Returns:
        uint8, read-only.

    Raises:
        DataError: The file is missing, short, too long, damaged or of another type.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"no file {path}", hint="check the data folder") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error})", hint="delete it and fetch it again") from error
    header = 4 + 4 * dimensions
    if len(raw) < header or raw[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
        raise DataError(
            f"{path} begins with {raw[:4].hex(' ') or 'nothing'}",
            needed=f"an IDX file of unsigned bytes with {dimensions} dimension(s): 00 00 08 {dimensions:02x}",
        )
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    if len(raw) - header != math.prod(shape):
        raise DataError(
            f"{path} holds {len(raw) - header:,} values",
            needed=f"{math.prod(shape):,}, as its header says ({'x'.join(map(str, shape))})",
            hint="the file is "
            + ("short" if len(raw) - header < math.prod(shape) else "too long")
            + ": fetch it again",
        )
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise DataError(
            f"{path} differs from the published file (SHA-256 of its content)", hint="delete it and fetch it again"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)
