"""Images to find: each one at a random place and scale of a larger canvas, among noise and fragments of others.

    canvas = max(noise, fragments of other images, the image)

The pixels are those of real images, the arrangement is made: one object on each canvas, its box the smallest that holds
its pixels above `DARK`. It is meant for images on a dark ground (digits, clothes); of a photograph the whole square is
the object. Everything comes from a seed, so that the same name gives the same canvases.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from earlybird.data.dataset import channel_statistics
from earlybird.errors import InputError

if TYPE_CHECKING:
    from earlybird.data.dataset import DataSet

__all__ = ["CANVAS", "on_canvases", "paste"]

CANVAS = 64
"""Side of a canvas where no image size is asked for, pixels."""
DARK = 32
"""Pixels up to this value are ground."""
SCALES = (0.8, 1.4)
"""Between which an image is scaled."""
FRAGMENTS = 3
MOST_IMAGES = (5_000, 1_000)
"""Canvases of the training and of the test part, at most."""
_NOISE = 64
_AT_ONCE = 1000


def on_canvases(data: DataSet, side: int | None = None) -> DataSet:
    """Return a data set of canvases; its targets are boxes (N, 4): left, top, right, bottom, as shares of the side.

    Args:
        data: Images with classes.
        side: Of a canvas, pixels; default `CANVAS`.

    Raises:
        InputError: A canvas has no room for a scaled image.
    """
    side = side or CANVAS
    size = max(data.train_images.shape[2:])
    if side < size * SCALES[1]:
        raise InputError(
            f"canvases of {side} x {side} for images of {size} x {size}, scaled by up to {SCALES[1]:g}",
            needed=f"at least {round(size * SCALES[1] + 0.5)} pixels",
            hint="set image_size",
        )
    parts = []
    for seed, most, images, labels in (
        (0, MOST_IMAGES[0], data.train_images, data.train_labels),
        (1, MOST_IMAGES[1], data.test_images, data.test_labels),
    ):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(images), generator=generator)[:most]
        parts.append((*paste(images[chosen], side, generator), labels[chosen]))
    (train, train_boxes, train_labels), (test, test_boxes, test_labels) = parts
    mean, std = channel_statistics(train)
    return replace(
        data,
        train_images=train, train_labels=train_labels, train_targets=train_boxes,
        test_images=test, test_labels=test_labels, test_targets=test_boxes,
        mean=mean, std=std,
    )  # fmt: skip


def paste(images: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return canvases with one image on each, and the boxes around them.

    Args:
        images: uint8 (N, C, H, W).
        side: Of a canvas, pixels.
        generator: Of places, scales, fragments and noise.

    Returns:
        uint8 (N, C, side, side), and float32 (N, 4): left, top, right, bottom, as shares of the side.
    """
    canvases = images.new_empty((len(images), images.shape[1], side, side))
    boxes = torch.empty(len(images), 4)
    for low in range(0, len(images), _AT_ONCE):
        part = images[low : low + _AT_ONCE]
        canvas = torch.rand(len(part), images.shape[1], side, side, generator=generator) * _NOISE
        for _ in range(FRAGMENTS):
            others = images[torch.randint(len(images), (len(part),), generator=generator)]
            canvas = torch.maximum(canvas, _placed(_fragments(others, generator), side, generator))
        objects = _placed(part, side, generator)
        boxes[low : low + _AT_ONCE] = _boxes(objects)
        canvases[low : low + _AT_ONCE] = torch.maximum(canvas, objects).round().to(torch.uint8)
    return canvases, boxes


def _placed(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Return float images (B, C, side, side): each somewhere, in some scale, on black."""
    scale = torch.empty(len(images)).uniform_(*SCALES, generator=generator)
    share = scale[:, None] * torch.tensor(images.shape[:1:-1]) / side  # (B, 2), of the canvas: width, height
    centre = (2 * torch.rand(len(images), 2, generator=generator) - 1) * (1 - share)  # -1 to 1, image inside
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = 1 / share[:, 0], 1 / share[:, 1]
    theta[:, :, 2] = -centre / share
    grid = functional.affine_grid(theta, [len(images), images.shape[1], side, side], align_corners=False)
    return functional.grid_sample(images.float(), grid, align_corners=False)


def _fragments(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images with all but a window of a third of the side black: too little to be told by."""
    height, width = images.shape[2:]
    window = max(height // 3, 1), max(width // 3, 1)
    top = torch.randint(height - window[0] + 1, (len(images), 1), generator=generator)
    left = torch.randint(width - window[1] + 1, (len(images), 1), generator=generator)
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows = (rows >= top) & (rows < top + window[0])  # (B, H)
    inside_columns = (columns >= left) & (columns < left + window[1])  # (B, W)
    return images * (inside_rows[:, None, :, None] & inside_columns[:, None, None, :])


def _boxes(objects: Tensor) -> Tensor:
    """Return the smallest boxes (B, 4) around what is not ground; of an image without any, the whole canvas."""
    side = objects.shape[-1]
    bright = objects.amax(1) > DARK  # (B, side, side)
    bright |= ~bright.flatten(1).any(1)[:, None, None]
    edges = []
    for axis in (1, 2):  # columns, rows
        seen = bright.any(axis).float()
        edges.append((seen.argmax(1), side - seen.flip(1).argmax(1)))
    (left, right), (top, bottom) = edges
    return torch.stack((left, top, right, bottom), 1) / side
