"""Test-time augmentation: the logits of an image are the mean over several views of it.

The views are those of K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498, multi-crop
evaluation:

- ``none``: the image;
- ``mirror``: the image and its mirror image, one half each;
- ``mirror_shift``: both of the image itself, together one half, and both of the image shifted by one pixel up and to
  the left, and down and to the right (what comes in is reflected), together one quarter each: six views.

It costs as many forward passes as there are views, and the bill counts each. Rows of ``metrics.jsonl`` before the last
step (of a run in rounds, of each) are evaluated plainly, as published; each says which it is (``test_time``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional


def mean_logits(forward: Callable[[Tensor], Tensor], images: Tensor, test_time: str) -> Tensor:
    """Return the weighted mean of ``forward`` over the views of ``images``, float32 (N, classes)."""
    return torch.stack([weight * forward(view).float() for weight, view in views(images, test_time)]).sum(0)


def views(images: Tensor, test_time: str) -> Iterator[tuple[float, Tensor]]:
    """Yield weight and images of each view, of the same shape as ``images`` (N, C, H, W); the weights add up to 1."""
    shifted = [(1.0, images)]
    if test_time == "mirror_shift":
        height, width = images.shape[2:]
        padded = functional.pad(images, (1, 1, 1, 1), mode="reflect")
        shifted = [(0.5, images), (0.25, padded[:, :, :height, :width]), (0.25, padded[:, :, 2:, 2:])]
    for weight, view in shifted:
        if test_time == "none":
            yield weight, view
        else:
            yield weight / 2, view
            yield weight / 2, view.flip(3)
