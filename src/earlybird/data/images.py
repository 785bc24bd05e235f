"""A folder of images, one subfolder a class, decoded once into uint8.

    my_images/cat/*.jpg              my_images/train/cat/*.jpg   my_images/test/cat/*.jpg
    my_images/dog/*.jpg      or      my_images/train/dog/*.jpg   my_images/test/dog/*.jpg

``val`` (``valid``, ``validation``) does for ``test``. The classes are the folder names, sorted. Every image becomes
RGB, upright as its EXIF data say, its shorter side scaled to the image size and the middle cut out.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from earlybird.errors import DataError

_LARGEST_DEFAULT = 224  # usual for networks trained on photographs
_TEST_FOLDERS = ("test", "val", "valid", "validation")
_TRAIN_FOLDER = "train"


@dataclass(frozen=True)
class Listing:
    """The image files of one part (training or test).

    Attributes:
        root: Folder whose subfolders are the classes.
        paths: Sorted by class, then name.
        labels: int64 (N,), an index in the classes.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: np.ndarray


def list_folder(root: Path) -> tuple[tuple[str, ...], Listing, Listing | None]:
    """List an image folder.

    Returns:
        Names of the classes, the training part, and the test part if the folder has one.

    Raises:
        DataError: There are no class folders, only one, or empty ones (all are named); or the test part has other
            classes than the training part.
    """
    # a class may be called train, too: it then holds images, not class folders
    split = (root / _TRAIN_FOLDER).is_dir() and bool(_class_folders(root / _TRAIN_FOLDER))
    train_root = root / _TRAIN_FOLDER if split else root
    classes = _class_folders(train_root)
    if len(classes) < 2:
        raise DataError(
            f"{train_root} has {len(classes)} class folder(s)",
            needed="at least two folders, one a class, with the images in them",
        )
    train = _list_part(train_root, classes, classes)
    if train_root == root:
        return classes, train, None
    for name in _TEST_FOLDERS:
        if (root / name).is_dir():
            tested = _class_folders(root / name)
            unknown = sorted(set(tested) - set(classes))
            if unknown or not tested:
                raise DataError(
                    f"{root / name} has " + (f"the classes {', '.join(unknown)}" if unknown else "no class folders"),
                    needed=f"the classes of {train_root}: {', '.join(classes)}",
                )
            return classes, train, _list_part(root / name, classes, tested)
    return classes, train, None


def default_size(paths: tuple[Path, ...]) -> int:
    """Return the image size to use when none is asked for: the median of the shorter sides, but at most 224.

    Only the headers are read; images that cannot be opened are left to `decode` to name.
    """

    def shorter(path: Path) -> int | None:
        try:
            with Image.open(path) as image:
                return min(image.size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return None

    with ThreadPoolExecutor(_threads()) as pool:
        sides = [side for side in pool.map(shorter, paths) if side]
    return min(round(statistics.median(sides)), _LARGEST_DEFAULT) if sides else _LARGEST_DEFAULT


def decode(
    root: Path, paths: tuple[Path, ...], size: int, on_progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """Decode image files, in threads.

    Args:
        root: Folder to which the names in errors are relative.
        paths: The files.
        size: Height and width of the result.
        on_progress: Called with (images decoded, images in all).

    Returns:
        uint8 (N, 3, size, size).

    Raises:
        DataError: Images that do not decode (all are named), or more images than fit into memory.
    """
    needed_bytes, memory_bytes = len(paths) * 3 * size * size, _memory_bytes()
    if memory_bytes and needed_bytes > memory_bytes:
        fitting = max(int(size * (memory_bytes / needed_bytes / 2) ** 0.5), 8)
        raise DataError(
            f"{len(paths):,} images of {size}x{size} need {needed_bytes / 2**30:.1f} GiB, and this machine has "
            f"{memory_bytes / 2**30:.1f} GiB",
            hint=f"take smaller images, e.g. --image-size {fitting}",
        )
    images = np.empty((len(paths), 3, size, size), np.uint8)

    def one(number: int) -> str | None:
        try:
            images[number] = _pixels(paths[number], size).transpose(2, 0, 1)
        # Pillow's decoders fail with these on damaged files, depending on format and damage
        except (OSError, SyntaxError, ValueError, IndexError, EOFError, Image.DecompressionBombError) as error:
            return f"{paths[number].relative_to(root)} ({_short(error)})"
        return None

    broken = []
    with ThreadPoolExecutor(_threads()) as pool:
        for done, failure in enumerate(pool.map(one, range(len(paths))), 1):
            if failure:
                broken.append(failure)
            if on_progress is not None:
                on_progress(done, len(paths))
    if broken:
        raise DataError(
            f"{len(broken)} image(s) in {root} do not decode: {', '.join(broken)}",
            hint="repair or remove them",
        )
    return images


def _pixels(path: Path, size: int) -> np.ndarray:
    """Return one image as uint8 (size, size, 3)."""
    with Image.open(path) as opened:
        image: Image.Image = opened
        # JPEG only: decodes at half, a quarter or an eighth of the size where that is still at least twice too large
        image.draft("RGB", (2 * size, 2 * size))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip instead of scale
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        image = image.convert("RGB")
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
        return np.asarray(image)


def _class_folders(root: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _list_part(root: Path, classes: tuple[str, ...], present: tuple[str, ...]) -> Listing:
    suffixes = set(Image.registered_extensions())
    paths: list[Path] = []
    labels: list[int] = []
    empty = []
    for name in present:
        found = sorted(
            path
            for path in (root / name).rglob("*")
            if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
        )
        if not found:
            empty.append(name)
        paths += found
        labels += [classes.index(name)] * len(found)
    if empty:
        raise DataError(
            f"no images in the class folder(s) {', '.join(empty)} of {root}",
            needed="at least one image a class",
            hint="add images or remove the folder(s)",
        )
    return Listing(root, tuple(paths), np.array(labels, np.int64))


def _threads() -> int:
    return min(os.cpu_count() or 1, 16)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _short(error: BaseException) -> str:
    text = str(error)
    return "not an image" if "cannot identify image file" in text else text or type(error).__name__
