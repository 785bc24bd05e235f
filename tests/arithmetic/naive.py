"""What add layers compute, written out: tensors of (N, outputs, numbers of a patch, positions)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from earlybird.kernels.window import Window


def patches(x: Tensor, window: Window) -> Tensor:
    kernel, stride, padding, dilation = window
    return functional.unfold(x, kernel, dilation, padding, stride)[:, None]  # (N, 1, K, P)


def distances(x: Tensor, filters: Tensor, window: Window) -> Tensor:
    differences = patches(x, window) - filters.flatten(1)[None, :, :, None]
    return -differences.abs().sum(2).unflatten(2, window.map_of(tuple(x.shape[2:])))


def gradients(x: Tensor, filters: Tensor, gradient: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    kernel, stride, padding, dilation = window
    differences = patches(x, window) - filters.flatten(1)[None, :, :, None]
    weights = gradient.flatten(2)[:, :, None]  # (N, O, 1, P)
    of_filters = (differences * weights).sum((0, 3)).view(filters.shape)
    of_patches = ((-differences).clamp(-1, 1) * weights).sum(1)
    return functional.fold(of_patches, x.shape[2:], kernel, dilation, padding, stride), of_filters
