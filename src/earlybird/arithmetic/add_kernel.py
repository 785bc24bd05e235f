"""What add layers compute: sums of distances and the gradient of their input, by a compiled kernel or by PyTorch alone.

    Y[p, o]  = -sum over k of |X[p, k] - F[o, k]|
    dX[p, k] =  sum over o of clip(F[o, k] - X[p, k], -1, 1) G[p, o]

with p positions, k the numbers of a patch and o outputs. As tensors of (positions, outputs, numbers of a patch) these
are thousands of times as large as the image; neither way below ever holds one:

- On a CPU, ``add_kernel.cpp`` is compiled at its first use (`earlybird.kernels.compiled`). It works on the image as
  it lies there; beside images laid out (N, H, W, C), it needs as much memory as one copy of the filters.
- On a GPU, the same is done in Triton (`earlybird.arithmetic.add_triton`), which comes with PyTorch's CUDA builds.
- Otherwise PyTorch does it: `torch.cdist` and a loop over outputs, on as many unfolded patches at a time as fit into
  `BUDGET_BYTES`. So it is, several times slower and with a warning, on CPUs without a compiler, and on GPUs without
  Triton.

Both compute in float32, or in float64 where that is asked for. Their sums differ in the order of additions only.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from earlybird.kernels import compiled
from earlybird.kernels.window import Window

__all__ = ["BUDGET_BYTES", "distances", "input_gradient"]

BUDGET_BYTES = 64 * 2**20
"""Working memory that PyTorch's own way may take, beside inputs and results."""

SOURCE = Path(__file__).with_suffix(".cpp")


def distances(x: Tensor, filters: Tensor, window: Window) -> Tensor:
    """Return the negative sums of distances between patches and filters.

    Args:
        x: (N, C, H, W), float32 or float64; what is padded is zeros.
        filters: (O, C, kh, kw) of the same type and device.
        window: How they move.

    Returns:
        (N, O, H', W') in the order of memory of ``x``.
    """
    gpu = _triton(x.device)
    if gpu is not None:
        return gpu.distances(x, filters, window)  # type: ignore[no-any-return]
    kernel = _kernel() if x.device.type == "cpu" else None
    if kernel is None:
        return distances_by_pytorch(x, filters, window)
    x, last = _channels_last(x)
    size = (len(x), len(filters), *window.map_of((x.shape[2], x.shape[3])))
    y = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
    packed = _in_lanes(filters.permute(0, 2, 3, 1).flatten(1, 2), kernel)  # (blocks, taps, C, lanes)
    kernel.run("distances", (x, packed, y), x, y, window)
    return y if last else y.contiguous()


def input_gradient(x: Tensor, filters: Tensor, gradient: Tensor, window: Window) -> Tensor:
    """Return the gradient of ``x``, each distance's clipped to -1 and 1.

    Args:
        x: As in `distances`.
        filters: As in `distances`.
        gradient: That of the output, (N, O, H', W').
        window: How filters move.

    Returns:
        (N, C, H, W) in the order of memory of ``x``.
    """
    gpu = _triton(x.device)
    if gpu is not None:
        return gpu.input_gradient(x, filters, gradient, window)  # type: ignore[no-any-return]
    kernel = _kernel() if x.device.type == "cpu" else None
    if kernel is None:
        return input_gradient_by_pytorch(x, filters, gradient, window)
    x, last = _channels_last(x)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    result = torch.empty_like(x)
    packed = _in_lanes(filters.permute(1, 2, 3, 0).flatten(1, 2), kernel)  # (blocks, taps, O, lanes)
    kernel.run("input_gradient", (x, packed, gradient, result), x, gradient, window)
    return result if last else result.contiguous()


def distances_by_pytorch(x: Tensor, filters: Tensor, window: Window) -> Tensor:
    """`distances` by PyTorch alone."""
    flat = filters.flatten(1)  # (O, K)
    size = (len(x), len(flat), *window.map_of((x.shape[2], x.shape[3])))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout(x))
    padded = _padded(x, window)
    for images, lines, band in _chunks(x, window, copies=2):
        patches = _patches(padded[images, :, band], window)
        found = torch.cdist(patches.flatten(0, 1), flat, p=1).neg_()  # (n * positions, O)
        part = y[images, :, lines]
        part.copy_(found.view(len(part), *part.shape[2:], -1).permute(0, 3, 1, 2))
    return y


def input_gradient_by_pytorch(x: Tensor, filters: Tensor, gradient: Tensor, window: Window) -> Tensor:
    """`input_gradient` by PyTorch alone."""
    padded = _padded(x, window)
    result = torch.zeros_like(padded)
    for images, lines, band in _chunks(x, window, copies=4):
        part = padded[images, :, band]
        patches = _patches(part, window)  # (n, positions, K)
        weights = gradient[images, :, lines].flatten(2).unsqueeze(-1)  # (n, O, positions, 1)
        total, clipped = torch.zeros_like(patches), torch.empty_like(patches)
        for output, row in enumerate(filters.flatten(1)):
            torch.sub(row, patches, out=clipped).clamp_(-1, 1)
            total.addcmul_(clipped, weights[:, output])
        size = (part.shape[2], part.shape[3])
        result[images, :, band] += functional.fold(
            total.transpose(1, 2), size, window.kernel, window.dilation, 0, window.stride
        )
    top, left = window.padding
    inside = result[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return inside.contiguous(memory_format=layout(x))


def _padded(x: Tensor, window: Window) -> Tensor:
    (top, left) = window.padding
    return functional.pad(x, (left, left, top, top))


def _patches(band: Tensor, window: Window) -> Tensor:
    """Return the patches of a part of a padded image: (n, positions, K)."""
    unfolded = functional.unfold(band, window.kernel, window.dilation, 0, window.stride)
    return unfolded.transpose(1, 2).contiguous()


def _chunks(x: Tensor, window: Window, *, copies: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield images, lines of the output and lines of the padded image, so that ``copies`` of patches fit the budget."""
    height, width = window.map_of((x.shape[2], x.shape[3]))
    a_line = copies * x.shape[1] * math.prod(window.kernel) * width * x.element_size()
    lines = min(max(BUDGET_BYTES // a_line, 1), height)
    images = max(BUDGET_BYTES // (a_line * height), 1)
    stride, reach = window.stride[0], window.dilation[0] * (window.kernel[0] - 1) + 1
    for image in range(0, len(x), images):
        for line in range(0, height, lines):
            end = min(line + lines, height)
            band = slice(line * stride, (end - 1) * stride + reach)
            yield slice(image, image + images), slice(line, end), band


def layout(x: Tensor) -> torch.memory_format:
    """Return the order of memory of ``x``; an image of one channel or one pixel is both, and taken as contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _channels_last(x: Tensor) -> tuple[Tensor, bool]:
    return x.contiguous(memory_format=torch.channels_last), layout(x) == torch.channels_last


def _in_lanes(rows: Tensor, kernel: _Kernel) -> Tensor:
    """Turn (R, taps, columns) into (blocks, taps, columns, lanes): blocks of as many rows as a vector has lanes."""
    lanes = kernel.lanes[rows.dtype]
    padded = functional.pad(rows, (0, 0, 0, 0, 0, -len(rows) % lanes))
    return padded.view(-1, lanes, *rows.shape[1:]).permute(0, 2, 3, 1).contiguous()


class _Kernel:
    """The compiled library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        lanes = library.earlybird_lanes
        lanes.restype = ctypes.c_int64
        self.lanes = {torch.float32: int(lanes(0)), torch.float64: int(lanes(1))}

    def run(self, name: str, operands: tuple[Tensor, ...], x: Tensor, y: Tensor, window: Window) -> None:
        sizes = (len(x), x.shape[1], y.shape[1], *x.shape[2:], *y.shape[2:], *(n for pair in window for n in pair))
        getattr(self._library, f"earlybird_{name}")(
            *(ctypes.c_void_p(operand.data_ptr()) for operand in operands),
            (ctypes.c_int64 * len(sizes))(*sizes),
            ctypes.c_int(x.dtype == torch.float64),
            ctypes.c_int(torch.get_num_threads()),
        )


def _triton(device: torch.device) -> Any:
    """Return the module of the kernels for a GPU, or None: it is another device, or there is no Triton."""
    return _triton_kernels() if device.type == "cuda" else None


@functools.cache
def _triton_kernels() -> Any:
    if importlib.util.find_spec("triton") is None:
        warnings.warn("add layers are slow on this GPU without Triton: pip install triton", stacklevel=4)
        return None
    return importlib.import_module("earlybird.arithmetic.add_triton")


@functools.cache
def _kernel() -> _Kernel | None:
    library = compiled.load(SOURCE, "add layers")
    return None if library is None else _Kernel(library)
