"""Kernels of add layers for GPUs, in Triton: what `earlybird.arithmetic.add_kernel` computes, on CUDA tensors.

    Y[p, o]  = -sum over taps and channels of |X[p, tap, c] - F[o, tap, c]|
    dX[q, c] =  sum over taps and outputs of clip(F[o, tap, c] - X[q, c], -1, 1) G[p(q, tap), o]

Each program keeps one tile of the result, positions by outputs or by channels, in registers, and adds one outer
difference after the other to it: a column of pixels and a row of filters are all that is loaded, and no patch is
unfolded. Every number is written by one program, which adds in a fixed order: results are the same each time. Images
are read in whatever order they lie in memory.

Importing this needs ``triton``, which comes with the CUDA builds of PyTorch. Its interpreter (``TRITON_INTERPRET=1``)
runs the kernels on CPU tensors, slowly: so they are tested where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlybird.arithmetic.add_kernel import layout
from earlybird.kernels.window import Window

__all__ = ["distances", "input_gradient"]

_ROWS = 64  # positions of a tile
_COLUMNS = 64  # outputs or channels of a tile, at most
_LEAST_COLUMNS = 16


@triton.jit
def _distances(
    x, filters, y, positions, channels, outputs, height, width, map_height, map_width,
    x_image, x_channel, x_line, x_pixel, y_image, y_output, y_line, y_pixel,
    down, right, top, left, far, wide, kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * rows + tl.arange(0, rows)
    output = tl.program_id(1) * columns + tl.arange(0, columns)
    image = (position // (map_height * map_width)).to(tl.int64)
    line = position // map_width % map_height
    pixel = position % map_width
    total = tl.zeros((rows, columns), y.dtype.element_ty)
    for tap in range(kernel_height * kernel_width):
        h = line * down - top + tap // kernel_width * far
        w = pixel * right - left + tap % kernel_width * wide
        inside = (position < positions) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        pixels = x + image * x_image + h * x_line + w * x_pixel
        weights = filters + tap * channels * outputs + output
        for channel in range(channels):
            value = tl.load(pixels + channel * x_channel, mask=inside, other=0.0)
            weight = tl.load(weights + channel * outputs, mask=output < outputs, other=0.0)
            total += tl.abs(value[:, None] - weight[None, :])
    place = y + (image * y_image + line * y_line + pixel * y_pixel)[:, None] + (output * y_output)[None, :]
    tl.store(place, -total, mask=(position < positions)[:, None] & (output < outputs)[None, :])


@triton.jit
def _input_gradient(
    x, filters, gradient, result, pixels, channels, outputs, height, width, map_height, map_width,
    x_image, x_channel, x_line, x_pixel, g_image, g_output, g_line, g_pixel,
    down, right, top, left, far, wide, kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.program_id(1) * columns + tl.arange(0, columns)
    image = (number // (height * width)).to(tl.int64)
    line = number // width % height
    pixel = number % width
    place = (image * x_image + line * x_line + pixel * x_pixel)[:, None] + (channel * x_channel)[None, :]
    there = (number < pixels)[:, None] & (channel < channels)[None, :]
    value = tl.load(x + place, mask=there, other=0.0)
    total = tl.zeros((rows, columns), result.dtype.element_ty)
    for tap in range(kernel_height * kernel_width):
        # the position whose filter has this tap on the pixel, if there is one
        h = line + top - tap // kernel_width * far
        w = pixel + left - tap % kernel_width * wide
        seen = (number < pixels) & (h >= 0) & (w >= 0) & (h % down == 0) & (w % right == 0)
        h = h // down
        w = w // right
        seen = seen & (h < map_height) & (w < map_width)
        upstream = gradient + image * g_image + h * g_line + w * g_pixel
        weights = filters + tap * outputs * channels + channel
        for output in range(outputs):
            factor = tl.load(upstream + output * g_output, mask=seen, other=0.0)
            weight = tl.load(weights + output * channels, mask=channel < channels, other=0.0)
            difference = weight[None, :] - value
            # not tl.clamp, which has no float64 on some GPUs; a difference that is not a number stays none
            clipped = tl.where(difference > 1.0, 1.0, tl.where(difference < -1.0, -1.0, difference))
            total += clipped * factor[:, None]
    tl.store(result + place, total, mask=there)


def distances(x: Tensor, filters: Tensor, window: Window) -> Tensor:
    """`earlybird.arithmetic.add_kernel.distances` on a GPU."""
    size = (len(x), len(filters), *window.map_of((x.shape[2], x.shape[3])))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout(x))
    packed = filters.permute(2, 3, 1, 0).contiguous()  # taps, channels, outputs
    columns = _columns(len(filters))
    positions = len(x) * size[2] * size[3]
    if y.numel():
        with torch.cuda.device_of(x):
            _distances[triton.cdiv(positions, _ROWS), triton.cdiv(len(filters), columns)](
                x, packed, y, positions, x.shape[1], len(filters), *x.shape[2:], *size[2:], *x.stride(), *y.stride(),
                *_moves(window), *window.kernel, _ROWS, columns,
            )  # fmt: skip
    return y


def input_gradient(x: Tensor, filters: Tensor, gradient: Tensor, window: Window) -> Tensor:
    """`earlybird.arithmetic.add_kernel.input_gradient` on a GPU."""
    x = x.contiguous(memory_format=layout(x))
    result = torch.empty_like(x)  # with the strides of x
    packed = filters.permute(2, 3, 0, 1).contiguous()  # taps, outputs, channels
    columns = _columns(x.shape[1])
    pixels = len(x) * x.shape[2] * x.shape[3]
    if x.numel():
        with torch.cuda.device_of(x):
            _input_gradient[triton.cdiv(pixels, _ROWS), triton.cdiv(x.shape[1], columns)](
                x, packed, gradient, result, pixels, x.shape[1], len(filters), *x.shape[2:], *gradient.shape[2:],
                *x.stride(), *gradient.stride(), *_moves(window), *window.kernel, _ROWS, columns,
            )  # fmt: skip
    return result


def _columns(count: int) -> int:
    return int(min(max(triton.next_power_of_2(count), _LEAST_COLUMNS), _COLUMNS))


def _moves(window: Window) -> tuple[Any, ...]:
    return (*window.stride, *window.padding, *window.dilation)
