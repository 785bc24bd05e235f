"""A part of a data set, or another form of it, said behind its name: ``cifar10:5-9``, ``fashion-mnist:rgb``.

    cifar10:0-4           the classes 0 to 4, numbered anew from 0
    cifar10:cat+dog       classes by name, or by number: 3+5
    fashion-mnist:rgb     grey images as three equal channels, for networks that began with colour
    mnist:boxes           each image at a random place of a larger canvas, to be found (`earlybird.data.boxes`)

Words are joined with ``+`` and taken in any order. Mean and standard deviation of the pixels stay those of the whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from earlybird.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from earlybird.data.dataset import DataSet

__all__ = ["Parts", "base_of", "select_classes", "split", "with_three_channels"]

_FORMS = ("rgb", "boxes")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Parts:
    """What is said behind the colon.

    Attributes:
        classes: Words that name classes; none: all of them.
        rgb: Whether grey images become three equal channels.
        boxes: Whether images are pasted on canvases.
    """

    classes: tuple[str, ...] = ()
    rgb: bool = False
    boxes: bool = False


def split(spec: str) -> tuple[str, Parts]:
    """Return the data set's own name or path, and what of it is meant.

    Raises:
        InputError: A word is empty.
    """
    base = base_of(spec)
    words = [word.strip() for word in spec[len(base) + 1 :].split("+")] if base != spec else []
    if not all(words):
        raise InputError(f"data {spec!r} has an empty word", needed="words joined with +, such as cifar10:0-4+7")
    classes = tuple(word for word in words if word not in _FORMS)
    return base, Parts(classes, "rgb" in words, "boxes" in words)


def base_of(spec: str) -> str:
    """Return the name or path in front of the last colon; all of ``spec`` where it has none, or is itself a path."""
    base, colon, _ = spec.rpartition(":")
    return base if colon and base and not Path(spec).expanduser().exists() else spec


def select_classes(data: DataSet, words: tuple[str, ...]) -> DataSet:
    """Return the images of some classes, numbered anew in the order of their numbers.

    Args:
        data: Of all classes.
        words: Numbers, ranges such as ``'0-4'``, or names.

    Raises:
        InputError: There is no such class, or fewer than two are left.
        DataError: A part would have no images.
    """
    chosen = sorted({number for word in words for number in _numbers(data, word)})
    if len(chosen) < 2:
        raise InputError(f"{data.name} with {len(chosen)} class", needed="at least two classes to tell apart")

    def of(images: Tensor, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        import torch

        new = torch.full((len(data.classes),), -1)
        new[torch.tensor(chosen)] = torch.arange(len(chosen))
        renumbered = new[labels]
        stay = renumbered >= 0
        return images[stay], renumbered[stay], None if targets is None else targets[stay]

    train = of(data.train_images, data.train_labels, data.train_targets)
    test = of(data.test_images, data.test_labels, data.test_targets)
    return replace(
        data,
        train_images=train[0], train_labels=train[1], train_targets=train[2],
        test_images=test[0], test_labels=test[1], test_targets=test[2],
        classes=tuple(data.classes[number] for number in chosen),
    )  # fmt: skip


def _numbers(data: DataSet, word: str) -> range:
    if word in data.classes and not word.isdigit():
        number = data.classes.index(word)
        return range(number, number + 1)
    found = _RANGE.fullmatch(word)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
    if not found or high < low or high >= len(data.classes):
        raise InputError(
            f"no classes {word!r} in {data.name}",
            needed=f"numbers from 0 to {len(data.classes) - 1}, such as 0-{min(4, len(data.classes) - 1)}, or names",
            hint=nearest(word, (*data.classes, *_FORMS)),
        )
    return range(low, high + 1)


def with_three_channels(data: DataSet) -> DataSet:
    """Return grey images as three equal channels; images of three channels stay.

    Raises:
        InputError: There are two channels, or more than three.
    """
    channels = data.train_images.shape[1]
    if channels == 3:
        return data
    if channels != 1:
        raise InputError(f"{data.name} has {channels} channels", needed="one, to make three of it")
    return replace(
        data,
        train_images=data.train_images.expand(-1, 3, -1, -1),
        test_images=data.test_images.expand(-1, 3, -1, -1),
        mean=data.mean * 3,
        std=data.std * 3,
    )
