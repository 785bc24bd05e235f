"""Images and labels from a ``.npz`` file of NumPy; pickled content is refused, never read.

Either with a test part (``train_images``, ``train_labels``, ``test_images``, ``test_labels``; also ``x_train``,
``y_train``, ``x_test``, ``y_test``), or without one (``images``, ``labels``; also ``x``, ``y``). ``classes`` may hold
the names of the classes.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from earlybird.errors import DataError

_NAMES = {
    "train_images": ("train_images", "x_train"),
    "train_labels": ("train_labels", "y_train"),
    "test_images": ("test_images", "x_test"),
    "test_labels": ("test_labels", "y_test"),
}
_WHOLE_NAMES = {"images": ("images", "x"), "labels": ("labels", "y")}
_CHANNELS = (1, 3)


@dataclass(frozen=True)
class Arrays:
    """Content of a file.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        test: Images and labels of the test part, or None when the file has none.
        classes: Names of the classes.
    """

    images: np.ndarray
    labels: np.ndarray
    test: tuple[np.ndarray, np.ndarray] | None
    classes: tuple[str, ...]


def read_npz(path: Path) -> Arrays:
    """Read a ``.npz`` file.

    Args:
        path: Images in it are uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3; labels are whole numbers
            (N,) or (N, 1).

    Raises:
        DataError: The file is missing or damaged, holds pickled objects, lacks an array, or one has the wrong type or
            shape; names the array.
    """
    try:
        # opened here, because NumPy leaves a file it cannot read open
        with open(path, "rb") as raw:
            file = np.load(raw, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is one array, not a .npz file", hint="write it with numpy.savez(...)")
            wanted = [name for names in (_NAMES | _WHOLE_NAMES).values() for name in names] + ["classes"]
            # each array is read, and so unpacked, once
            arrays = {name: _member(file, name, path) for name in wanted if name in file.files}
            present = file.files
    except FileNotFoundError as error:
        raise DataError(f"no file {path}", hint="check the path") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or is not a .npz file ({error})", hint="write it again") from error

    parts = _pick(arrays, _NAMES) or _pick(arrays, _WHOLE_NAMES)
    if parts is None:
        raise DataError(
            f"{path} holds {', '.join(present) or 'nothing'}",
            needed="train_images, train_labels, test_images and test_labels, or images and labels",
        )
    names = list(parts)
    images, labels = _images(parts[names[0]], names[0], path), _labels(parts[names[1]], names[1], path)
    test = None
    if len(names) == 4:
        test = _images(parts[names[2]], names[2], path), _labels(parts[names[3]], names[3], path)
    pairs = [(names[0], images, labels)] + ([(names[2], *test)] if test else [])
    for name, part, tags in pairs:
        if len(part) != len(tags) or not len(part):
            raise DataError(f"{path}: {name} has {len(part)} images, but {len(tags)} labels", needed="as many of both")
    return Arrays(images, labels, test, _class_names(arrays.get("classes"), labels, path))


def _member(file: np.lib.npyio.NpzFile, name: str, path: Path) -> np.ndarray:
    try:
        return np.asarray(file[name])
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise DataError(
            f"{path}: {name} holds pickled Python objects, which are never loaded",
            needed="plain arrays: uint8 images, whole-number labels",
        ) from error


def _pick(arrays: dict[str, np.ndarray], names: Mapping[str, tuple[str, ...]]) -> dict[str, np.ndarray] | None:
    """Return the arrays under the names used in the file, if all of one set of names are there."""
    for spelling in zip(*names.values()):
        if all(name in arrays for name in spelling):
            return {name: arrays[name] for name in spelling}
    return None


def _images(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    if array.dtype != np.uint8:
        scale = "(x * 255).round().astype('uint8')" if array.dtype.kind == "f" else "x.astype('uint8')"
        raise DataError(
            f"{path}: {name} is {array.dtype}", needed="uint8, from 0 to 255", hint=f"convert it before saving: {scale}"
        )
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim == 4 and array.shape[3] in _CHANNELS:
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    if array.ndim == 4 and array.shape[1] in _CHANNELS:
        return np.ascontiguousarray(array)
    raise DataError(
        f"{path}: {name} has shape {array.shape}",
        needed="(images, height, width), (images, height, width, channels) or (images, channels, height, width), "
        "with 1 or 3 channels",
    )


def _labels(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    if array.dtype.kind not in "iu" or array.size != len(array):
        raise DataError(
            f"{path}: {name} is {array.dtype} of shape {array.shape}", needed="whole numbers of shape (images,)"
        )
    if array.size and int(array.min()) < 0:
        raise DataError(f"{path}: {name} holds {int(array.min())}", needed="labels from 0 on")
    return array.reshape(-1).astype(np.int64)


def _class_names(names: np.ndarray | None, labels: np.ndarray, path: Path) -> tuple[str, ...]:
    if names is not None:
        if names.dtype.kind != "U" or names.ndim != 1:
            raise DataError(
                f"{path}: classes is {names.dtype} of shape {names.shape}", needed="text of shape (classes,)"
            )
        return tuple(str(name) for name in names)
    found = set(np.unique(labels).tolist())
    absent = [label for label in range(len(found)) if label not in found]
    if absent:
        raise DataError(
            f"{path}: labels run up to {max(found)}, but no training image has label {absent[0]}",
            needed="labels 0, 1, 2, ... without gaps",
            hint="number the classes anew, or add an array 'classes' with their names",
        )
    return tuple(str(label) for label in range(len(found)))
