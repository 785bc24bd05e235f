"""A folder of photographs with a mask each, cut into patches: which pixels belong to what is looked for?

    my_cracks/images/001.jpg        my_cracks/masks/001.png

Files belong together by their names without the ending. Patches are squares that do not overlap, of the size asked for,
in the resolution of the photograph; what is left at the edges is shared out to both sides. A fifth of the photographs
is kept for the test, with all of their patches. The class of a patch says whether any of its pixels is marked.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from earlybird.data.dataset import DataSet, channel_statistics
from earlybird.errors import DataError, InputError

__all__ = ["PATCH", "has_masks", "load_masks", "patches"]

PATCH = 64
"""Side of a patch where no image size is asked for, pixels."""
CLASSES = ("unmarked", "marked")
_TEST_SHARE = 0.2


def has_masks(root: Path) -> bool:
    """Whether a folder holds photographs and masks."""
    return (root / "images").is_dir() and (root / "masks").is_dir()


def load_masks(root: Path, side: int | None = None, seed: int = 0) -> DataSet:
    """Load a folder of photographs and masks as patches; its targets are masks, uint8 (N, H, W) of 0 and 1.

    Args:
        root: Folder with ``images`` and ``masks``.
        side: Of a patch, pixels; default `PATCH`.
        seed: Chooses the photographs for the test.

    Raises:
        DataError: A photograph has no mask or the other way round, a mask has another size, a file does not decode, or
            there are fewer than two photographs.
        InputError: A patch is larger than a photograph, or nothing is marked in a part.
    """
    side = side or PATCH
    photographs, masks = (_by_stem(root / name) for name in ("images", "masks"))
    if alone := sorted(photographs.keys() ^ masks.keys()):
        raise DataError(
            f"{root}: {alone[0]} (and {len(alone) - 1} more) is in one of images and masks alone",
            needed="a mask of the same name for each image",
        )
    if len(photographs) < 2:
        raise DataError(f"{root} has {len(photographs)} images with a mask", needed="two, one of them to test on")
    order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(len(photographs))
    held_out = set(order[: max(round(_TEST_SHARE * len(photographs)), 1)].tolist())
    parts: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}
    for number, stem in enumerate(sorted(photographs)):
        parts[number in held_out].append(_read(photographs[stem], masks[stem], side))
    images, targets = ([torch.cat(column) for column in zip(*parts[test])] for test in (False, True))
    (train, train_targets), (test, test_targets) = images, targets
    for what, found in (("training", train_targets), ("test", test_targets)):
        if not found.any():
            raise InputError(f"{root}: nothing is marked in the masks of the {what} part", needed="white on black")
    mean, std = channel_statistics(train)
    labels = [found.flatten(1).any(1).long() for found in (train_targets, test_targets)]
    return DataSet(str(root), train, labels[0], test, labels[1], CLASSES, mean, std, train_targets, test_targets)


def _by_stem(folder: Path) -> dict[str, Path]:
    suffixes = set(Image.registered_extensions())
    return {
        path.stem: path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    }


def _read(photograph: Path, mask: Path, side: int) -> tuple[Tensor, Tensor]:
    pixels = []
    for path, mode in ((photograph, "RGB"), (mask, "L")):
        try:
            with Image.open(path) as opened:
                pixels.append(torch.from_numpy(np.array(opened.convert(mode))))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path} does not decode ({error})", hint="repair or remove it") from error
    image, marked = pixels[0].permute(2, 0, 1), (pixels[1] >= 128).to(torch.uint8)
    if image.shape[1:] != marked.shape:
        raise DataError(f"{mask} is {tuple(marked.shape)}", needed=f"the size of its image, {tuple(image.shape[1:])}")
    if min(marked.shape) < side:
        raise InputError(
            f"patches of {side} x {side} from {photograph.name}, {marked.shape[0]} x {marked.shape[1]}",
            hint=f"--image-size {min(marked.shape)} or less",
        )
    return patches(image, side), patches(marked[None], side)[:, 0]


def patches(image: Tensor, side: int) -> Tensor:
    """Return the patches (N, C, side, side) of an image (C, H, W), row by row, around its middle."""
    channels, height, width = image.shape
    rows, columns = height // side, width // side
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    middle = image[:, top : top + rows * side, left : left + columns * side]
    cut = middle.reshape(channels, rows, side, columns, side).permute(1, 3, 0, 2, 4)
    return cut.reshape(rows * columns, channels, side, side).contiguous()
