"""The decoded data set: images as uint8 in memory, split into training and test part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from earlybird.errors import DataError

_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True, eq=False)
class DataSet:
    """A whole data set in memory.

    Attributes:
        name: What it was loaded by.
        train_images: uint8 (N, C, H, W).
        train_labels: int64 (N,), from 0 to the number of classes less one.
        test_images: uint8 (M, C, H, W), same C, H and W.
        test_labels: int64 (M,).
        classes: Names of the classes, in the order of the labels.
        mean: Of the training pixels a channel, 0-1 scale.
        std: Standard deviation of the same.
        train_targets: What is to be found in the training images, beside a class; or None. Masks uint8 (N, H, W) of 0
            and 1, or boxes float32 (N, 4): left, top, right, bottom, as shares of the side.
        test_targets: The same of the test images.

    Raises:
        DataError: A part is empty, or type, shape or labels do not fit; names the part.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_targets: Tensor | None = None
    test_targets: Tensor | None = None

    def __post_init__(self) -> None:
        for part, images, labels in (
            ("training", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            check_images(images, labels, f"{self.name}, {part} part")
            if int(labels.max()) >= len(self.classes):
                raise DataError(
                    f"{self.name}, {part} part: label {int(labels.max())}",
                    needed=f"labels from 0 to {len(self.classes) - 1} for {len(self.classes)} classes",
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise DataError(
                f"{self.name}: training images are {_shape(self.train_images)}, test images {_shape(self.test_images)}",
                needed="one shape (channels x height x width) for both",
            )
        for images, targets in ((self.train_images, self.train_targets), (self.test_images, self.test_targets)):
            if targets is not None and len(targets) != len(images):
                raise DataError(f"{self.name}: {len(images)} images, but {len(targets)} targets", needed="as many")
        if not len(self.mean) == len(self.std) == self.train_images.shape[1]:
            raise DataError(
                f"{self.name}: {len(self.mean)} means and {len(self.std)} standard deviations",
                needed=f"one of each for the {self.train_images.shape[1]} channels",
            )

    def with_training_images(self, number: int) -> DataSet:
        """Return this data set with so many of its training images: a random choice, the same one each time.

        Classes keep their shares, as far as whole numbers can. Everything else stays, ``mean`` and ``std`` among it.

        Raises:
            DataError: There are fewer.
        """
        if number > len(self.train_images):
            raise DataError(
                f"{self.name} has {len(self.train_images)} training images, fewer than {number}",
                hint=f"ask for {len(self.train_images)} at most",
            )
        order = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(0))
        labels = self.train_labels[order]
        place = torch.empty(len(labels), dtype=torch.float64)  # of an image among those of its class, 0 to 1
        for label in labels.unique():
            own = labels == label
            place[own] = (torch.arange(int(own.sum()), dtype=torch.float64) + 0.5) / own.sum()
        chosen = order[place.argsort(stable=True)[:number]].sort().values
        targets = None if self.train_targets is None else self.train_targets[chosen]
        return replace(
            self,
            train_images=self.train_images[chosen],
            train_labels=self.train_labels[chosen],
            train_targets=targets,
        )

    @property
    def looked_for(self) -> str:
        """What is to be found in an image: its ``'class'``, a ``'mask'`` or a ``'box'``."""
        if self.train_targets is None:
            return "class"
        return "box" if self.train_targets.dim() == 2 else "mask"


def check_images(images: Tensor, labels: Tensor, what: str) -> None:
    """Check that ``images`` are uint8 (N, C, H, W) and ``labels`` int64 (N,) from 0 on, with N at least 1.

    Raises:
        DataError: They are not; the message begins with ``what``.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise DataError(
            f"{what}: images are {images.dtype} of shape {tuple(images.shape)}",
            needed="torch.uint8 of shape (images, channels, height, width)",
        )
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise DataError(
            f"{what}: labels are {labels.dtype} of shape {tuple(labels.shape)}", needed="torch.int64 of shape (images,)"
        )
    if len(images) != len(labels):
        raise DataError(f"{what}: {len(images)} images, but {len(labels)} labels", needed="one label an image")
    if images.numel() == 0:
        raise DataError(f"{what}: no images (shape {tuple(images.shape)})")
    if int(labels.min()) < 0:
        raise DataError(f"{what}: label {int(labels.min())}", needed="labels from 0 on")


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation a channel, 0-1 scale, exactly (from the histogram of the 256 values).

    A constant channel gets a standard deviation of one grey level, so that it can be divided by.

    Args:
        images: uint8 (N, C, H, W).
    """
    level = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.zeros(256, dtype=torch.float64)
        step = max(1, _CHUNK_BYTES // images[0, 0].numel())
        for low in range(0, len(images), step):
            counts += torch.bincount(images[low : low + step, channel].reshape(-1), minlength=256).double()
        share = counts / counts.sum()
        mean = (share * level).sum()
        variance = (share * (level - mean) ** 2).sum()
        means.append(float(mean))
        stds.append(max(float(variance.sqrt()), 1 / 255))
    return tuple(means), tuple(stds)


def resize(images: Tensor, size: int) -> Tensor:
    """Return the images scaled to ``size`` x ``size``, bilinear with anti-aliasing.

    Args:
        images: uint8 (N, C, H, W).
        size: New height and width.

    Returns:
        uint8 (N, C, size, size); the same tensor when it has that size already.
    """
    if images.shape[2:] == (size, size):
        return images
    resized = images.new_empty((len(images), images.shape[1], size, size))
    step = max(1, _CHUNK_BYTES // max(images[0].numel(), resized[0].numel()))
    for low in range(0, len(images), step):
        resized[low : low + step] = torch.nn.functional.interpolate(
            images[low : low + step], size=(size, size), mode="bilinear", antialias=True
        )
    return resized


def stratified_split(
    labels: np.ndarray, classes: Sequence[str], *, test_share: float = 0.2, seed: int = 0, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted indices of a training and a test part that have the same share of every class.

    Args:
        labels: (N,), from 0 on.
        classes: Names of the classes, for the error.
        test_share: Of each class; at least one image of each goes to either part.
        seed: The same seed gives the same split.
        what: Name of the data set, for the error.

    Raises:
        DataError: Classes with fewer than two images; all are named.
    """
    members = [np.flatnonzero(labels == label) for label in range(len(classes))]
    small = [f"{name} ({len(found)})" for name, found in zip(classes, members) if len(found) < 2]
    if small:
        raise DataError(
            f"{what}: classes with fewer than two images: {', '.join(small)}",
            needed="two images a class, one to train on and one to test on",
            hint="add images, or bring an own test part",
        )
    generator = np.random.default_rng(np.random.SeedSequence(seed))
    test: list[np.ndarray] = []
    for found in members:
        count = min(max(round(test_share * len(found)), 1), len(found) - 1)
        test.append(generator.permutation(found)[:count])
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[np.concatenate(test)] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _shape(images: Tensor) -> str:
    return "x".join(str(side) for side in images.shape[1:])
