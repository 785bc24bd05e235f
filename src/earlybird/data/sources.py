"""`load`: from a name or a path to a data set in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from earlybird.data.catalogue import CATALOGUE, CONTENT_SHA256, Found, cache_folder, data_folder, find, missing
from earlybird.data.dataset import DataSet, channel_statistics, resize, stratified_split
from earlybird.data.parts import select_classes, split, with_three_channels
from earlybird.errors import DataError, InputError, nearest

if TYPE_CHECKING:
    from earlybird.data.download import Progress


def load(
    spec: str,
    *,
    root: Path | None = None,
    image_size: int | None = None,
    download: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> DataSet:
    """Load a data set into memory.

    Args:
        spec: A name of the catalogue (``'digits'``, ``'mnist'``, ``'fashion-mnist'``, ``'cifar10'``), a folder of
            images with one folder a class, a folder with ``images`` and ``masks``, or a ``.npz`` file. A folder called
            like a data set is written ``./mnist``. Behind a colon, what of it is meant (`earlybird.data.parts`):
            ``'cifar10:0-4'``.
        root: Data folder to look in first for a name; by default ``$EARLYBIRD_DATA``.
        image_size: Height and width in pixels to scale to. By default data sets keep their size; for a folder it is
            the median of the shorter sides, but at most 224. Of a folder with masks, the side of the patches; with
            ``:boxes``, that of the canvases.
        download: Fetch what is found neither there nor in the user's cache.
        seed: For the split of a folder or file that has no test part (20 % of each class are kept for the test).
        progress: Called with (what is being done, how much of it is done, how much there is).

    Raises:
        DataError: The data are missing, damaged, or do not fit; says what and where.
        InputError: ``spec`` is neither a name nor a path, or ``image_size`` is out of range.
    """
    if image_size is not None and image_size < 1:
        raise InputError(f"image size {image_size}", needed="at least 1 pixel")
    base, parts = split(spec)
    if base != spec:
        size = None if parts.boxes else image_size
        data = load(base, root=root, image_size=size, download=download, seed=seed, progress=progress)
        if parts.classes:
            data = select_classes(data, parts.classes)
        if parts.boxes:
            from earlybird.data.boxes import on_canvases

            data = on_canvases(data, image_size)
        return replace(with_three_channels(data) if parts.rgb else data, name=spec)
    if spec in CATALOGUE:
        return _load_named(spec, root, image_size, download, progress)
    path = Path(spec).expanduser()
    if path.is_dir():
        from earlybird.data.masks import has_masks, load_masks

        if has_masks(path):
            return load_masks(path, image_size, seed)
        return _load_folder(path, image_size, seed, progress)
    if path.suffix == ".npz":
        return _load_npz(path, image_size, seed)
    if path.exists():
        raise InputError(f"data {spec!r} is neither a folder of images nor a .npz file")
    raise InputError(
        f"no data set and no folder or .npz file {spec!r}",
        needed=f"one of {', '.join(CATALOGUE)}, or a path",
        hint=nearest(spec.lower().replace("_", "-"), CATALOGUE, otherwise="check the path"),
    )


def _load_named(
    name: str, root: Path | None, image_size: int | None, download: bool, progress: Progress | None
) -> DataSet:
    info = CATALOGUE[name]
    found = find(name, root) or _obtain(name, root, download, progress)
    if found.layout.kind == "csv":
        from earlybird.data.digits import read_digits, split_digits

        images, labels = read_digits(found.paths[0])
        train, test = split_digits(labels)
        train_images, train_labels, test_images, test_labels = images[train], labels[train], images[test], labels[test]
    elif found.layout.kind == "idx":
        from earlybird.data.idx import read_idx

        sums = CONTENT_SHA256[name].values()
        train_images, train_labels, test_images, test_labels = (
            read_idx(path, dimensions=dimensions, sha256=sha256)
            for path, dimensions, sha256 in zip(found.paths, (3, 1, 3, 1), sums)
        )
        train_images, test_images = train_images[:, None], test_images[:, None]
    else:
        from earlybird.data.cifar10 import read_batches

        images, labels = read_batches(found.layout.kind, found.paths, CONTENT_SHA256[name])
        train_images, train_labels = images[: info.train_images], labels[: info.train_images]
        test_images, test_labels = images[info.train_images :], labels[info.train_images :]
    return _data_set(
        name,
        (train_images, train_labels),
        (test_images, test_labels),
        info.class_names,
        image_size,
        statistics=(info.mean, info.std) if info.mean else None,
    )


def _obtain(name: str, root: Path | None, download: bool, progress: Progress | None) -> Found:
    """Download a data set of which no complete copy was found, unless that would hide a mistake."""
    info, own, cached = CATALOGUE[name], data_folder(root), cache_folder()
    if not info.files:
        raise DataError(f"{name} was not found in the installed scikit-learn", hint="pip install scikit-learn")
    if own is not None:
        if not own.is_dir():
            raise DataError(f"data folder {own} does not exist", hint="correct or unset EARLYBIRD_DATA")
        absent = missing(name, own)
        if absent:
            raise DataError(
                f"{name} in {own} is not complete: {', '.join(str(path.relative_to(own)) for path in absent)} missing",
                hint="add the missing, or remove the rest to have it downloaded",
            )
    if not download:
        places = " and ".join(str(folder / name) for folder in (own, cached) if folder is not None)
        raise DataError(
            f"{name} was not found in {places}",
            needed=", ".join(file.name for file in info.files),
            hint=f"put the files there, or allow the download of {info.bytes / 1e6:.0f} MB",
        )
    from earlybird.data.download import download as fetch_all

    fetch_all(info, cached / name, progress=progress)
    found = find(name, root)
    assert found is not None, f"{name} is not complete right after its download"
    return found


def _load_folder(path: Path, image_size: int | None, seed: int, progress: Progress | None) -> DataSet:
    from earlybird.data.images import Listing, decode, default_size, list_folder

    classes, train, test = list_folder(path)
    size = image_size or default_size(train.paths)

    def pixels(part: Listing) -> np.ndarray:
        report = None if progress is None else lambda done, total: progress(f"decoding {part.root}", done, total)
        return decode(part.root, part.paths, size, report)

    if test is not None:
        return _data_set(str(path), (pixels(train), train.labels), (pixels(test), test.labels), classes, size)
    # the split comes first: it may fail, and decoding takes long
    fit, held_out = stratified_split(train.labels, classes, seed=seed, what=str(path))
    images, labels = pixels(train), train.labels
    return _data_set(str(path), (images[fit], labels[fit]), (images[held_out], labels[held_out]), classes, size)


def _load_npz(path: Path, image_size: int | None, seed: int) -> DataSet:
    from earlybird.data.npz import read_npz

    arrays = read_npz(path)
    train, test = (arrays.images, arrays.labels), arrays.test
    if test is None:
        fit, held_out = stratified_split(arrays.labels, arrays.classes, seed=seed, what=str(path))
        train = arrays.images[fit], arrays.labels[fit]
        test = arrays.images[held_out], arrays.labels[held_out]
    return _data_set(str(path), train, test, arrays.classes, image_size)


def _data_set(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: tuple[str, ...],
    image_size: int | None,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> DataSet:
    tensors = []
    for images, labels in (train, test):
        # read-only where a file was mapped onto an array
        pixels = torch.from_numpy(images if images.flags.writeable else images.copy())
        tensors.append(pixels if image_size is None else resize(pixels, image_size))
        tensors.append(torch.from_numpy(labels.astype(np.int64)))
    mean, std = statistics or channel_statistics(tensors[0])
    return DataSet(name, tensors[0], tensors[1], tensors[2], tensors[3], classes, mean, std)
