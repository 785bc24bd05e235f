"""Strong augmentation for contrastive learning: random resized crop, flip, colour jitter and grey, on whole batches.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
https://arxiv.org/abs/2002.05709, appendix A and B.9 (CIFAR-10: no blur). Crop and flip are one bilinear lookup:

    x, y  ->  box of area A ~ U(least, 1) of the image and aspect ratio exp(U(log 3/4, log 4/3)), at random

and everything that is done to colours is one matrix and one offset for each image, with brightness b, contrast c,
saturation s ~ U(1 - k, 1 + k), k = 0.8 times the strength, a hue angle h ~ U(-1, 1) * 0.2 * strength of a turn, the
luminance weights l and the mean luminance L of the image,

    colours  ->  G * H(h) * (s + (1 - s) 1 l^T) * (c b * colours + (1 - c) b L)

with G = 1 l^T where the image is made grey. Images of one channel have brightness and contrast only.

Deviations: the order of the four changes is fixed, values are clipped to black and white once, at the end, and hue is a
rotation in YIQ, where torchvision shuffles the order, clips each time and rotates in HSV. A grid that shows the image
smaller than it was (which no box does, they are cut-outs) would alias; nothing is smoothed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from earlybird.errors import InputError

__all__ = ["StrongAugment", "StrongChoices", "colour_maps", "crop_grids"]

_RATIO = 4 / 3
_LUMINANCE = (0.299, 0.587, 0.114)
_TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


@dataclass(frozen=True)
class StrongChoices:
    """The random choices for one view of N images, float32 on the CPU.

    Attributes:
        boxes: (N, 4), left, top, right and bottom of what is shown, as shares of the image's sides.
        mirrored: bool (N,).
        colours: (N, 4), factors of brightness, contrast and saturation, and the hue's angle in radians.
        grey: bool (N,).
    """

    boxes: Tensor
    mirrored: Tensor
    colours: Tensor
    grey: Tensor

    def part(self, part: slice) -> StrongChoices:
        """Return the choices for a part of the batch."""
        return StrongChoices(*(getattr(self, field.name)[part] for field in fields(self)))


@dataclass(frozen=True)
class StrongAugment:
    """What is done to each view of an image; every coin is tossed for each view.

    Attributes:
        least: Smallest share of the image's area that a crop shows, in (0, 1].
        colour: Strength of the colour jitter, 0 for none; 0.5 is usual on small images, 1 on large ones.
        jitter: Probability with which colours are changed.
        grey: Probability with which an image is made grey.
        flip: Mirror with probability one half.
        count: Views of an image.
    """

    least: float = 0.08
    colour: float = 0.5
    jitter: float = 0.8
    grey: float = 0.2
    flip: bool = True
    count: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise InputError(f"smallest crop {self.least!r}", needed="a share of the image's area, in (0, 1]")
        if not 0 <= self.colour <= 1.25:
            raise InputError(f"strength of the colour jitter {self.colour!r}", needed="0 to 1.25")
        for name in ("jitter", "grey"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"probability {name} = {getattr(self, name)!r}", needed="0 to 1")
        if self.count < 1:
            raise InputError(f"{self.count} views of an image", needed="at least 1")

    def choose(self, count: int, height: int, width: int, generator: torch.Generator) -> StrongChoices:
        """Draw the random choices for one view of ``count`` images of ``height`` x ``width`` pixels."""

        def uniform(low: float, high: float, *more: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *more, generator=generator)

        area, ratio = uniform(self.least, 1.0), uniform(-math.log(_RATIO), math.log(_RATIO)).exp()
        # a box that would not fit is narrowed to the side of the image
        across = (area * ratio * height / width).sqrt().clamp(max=1.0)
        down = (area / ratio * width / height).sqrt().clamp(max=1.0)
        left, top = uniform(0, 1) * (1 - across), uniform(0, 1) * (1 - down)
        mirrored = uniform(0, 1) < (0.5 if self.flip else 0.0)
        strength = 0.8 * self.colour
        factors = uniform(1 - strength, 1 + strength, 3).clamp(min=0)
        hue = uniform(-1, 1, 1) * 0.2 * self.colour * 2 * math.pi
        plain = uniform(0, 1) >= self.jitter
        colours = torch.cat((factors, hue), 1)
        colours[plain] = torch.tensor([1.0, 1.0, 1.0, 0.0])
        grey = uniform(0, 1) < self.grey
        return StrongChoices(torch.stack((left, top, left + across, top + down), 1), mirrored, colours, grey)

    def apply(self, images: Tensor, choices: StrongChoices) -> Tensor:
        """Return what ``images`` look like by ``choices``.

        Args:
            images: uint8 (N, C, H, W).
            choices: For as many.

        Returns:
            uint8 (N, C, H, W), new.
        """
        count, channels, height, width = images.shape
        pixels = images.float()
        grid = crop_grids(choices, height, width).to(images.device)
        pixels = functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
        flat = pixels.flatten(2)  # (N, C, HW)
        weights = torch.tensor(_LUMINANCE if channels == 3 else (1 / channels,) * channels, device=images.device)
        mean = (weights @ flat).mean(1)  # (N,)
        matrix, offset = (tensor.to(images.device) for tensor in colour_maps(choices, channels))
        flat = torch.baddbmm(offset * mean[:, None, None], matrix, flat)
        return flat.round_().clamp_(0, 255).to(torch.uint8).view(count, channels, height, width)


def crop_grids(choices: StrongChoices, height: int, width: int) -> Tensor:
    """Return where each pixel of a view lies in its image, (N, H, W, 2) as x and y from -1 to 1."""
    left, top, right, bottom = (side.float() * 2 - 1 for side in choices.boxes.unbind(1))
    left, right = torch.where(choices.mirrored, right, left), torch.where(choices.mirrored, left, right)
    column, row = (torch.arange(size) + 0.5 for size in (width, height))  # centres of the pixels
    x = left[:, None] + (right - left)[:, None] * column / width  # (N, W)
    y = top[:, None] + (bottom - top)[:, None] * row / height  # (N, H)
    return torch.stack((x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), 3)


def colour_maps(choices: StrongChoices, channels: int) -> tuple[Tensor, Tensor]:
    """Return what changes the colours of each image: a matrix (N, C, C), and (N, C, 1), to be multiplied with its mean.

    Args:
        choices: Of N images.
        channels: Of an image; saturation, hue and grey are for three.
    """
    bright, contrast, saturation, hue = choices.colours.unbind(1)
    scale, lift = (contrast * bright)[:, None, None], ((1 - contrast) * bright)[:, None, None]
    if channels != 3:
        return scale * torch.eye(channels), lift.expand(-1, channels, 1)
    luminance = torch.tensor(_LUMINANCE).expand(3, 3)
    saturated = saturation[:, None, None] * torch.eye(3) + (1 - saturation)[:, None, None] * luminance
    to_yiq = torch.tensor(_TO_YIQ)
    turn = torch.eye(3).repeat(len(hue), 1, 1)
    turn[:, 1, 1] = turn[:, 2, 2] = hue.cos()
    turn[:, 2, 1] = hue.sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    mixed = torch.linalg.inv(to_yiq) @ turn @ to_yiq @ saturated
    mixed = torch.where(choices.grey[:, None, None], luminance @ mixed, mixed)
    return scale * mixed, lift * mixed.sum(2, keepdim=True)
