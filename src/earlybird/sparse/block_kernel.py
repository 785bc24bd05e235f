"""What a weight made of dense blocks computes: each block a small matrix product, by a compiled kernel or by PyTorch.

    Y[p, rows of b] = U(X)[p, columns of b]  W_b^T        for each block b

with p positions of the output and U(X) what each of them sees. Nothing outside the blocks is touched.

- On a CPU, ``block_kernel.cpp`` is compiled at its first use (`earlybird.kernels.compiled`). It reads the image where
  it lies, so that no column is gathered or unfolded. There is no gradient through it.
- Otherwise PyTorch does it: the image is unfolded, the columns of a block are gathered, and one product a block is
  written to its rows. So it is where gradients are wanted, on GPUs, and, with a warning, on CPUs without a compiler.

Sums of bfloat16 are in float32 either way.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from earlybird.kernels import compiled
from earlybird.kernels.convolution import unfolded
from earlybird.kernels.window import Window

__all__ = ["POINT", "Block", "Packed", "available", "multiply", "multiply_by_pytorch", "pack"]

SOURCE = Path(__file__).with_suffix(".cpp")
POINT = Window((1, 1), (1, 1), (0, 0), (1, 1))
"""The window of a linear layer."""

_MOST_VECTORS = 4


class Block(NamedTuple):
    """Outputs that have all columns in common, and no others.

    Attributes:
        rows: Outputs, int64 (R,), ascending.
        columns: Of the weight as ``(O, kh * kw * I)``, inputs last: int64 (C,), ascending.
    """

    rows: Tensor
    columns: Tensor


class Packed(NamedTuple):
    """Blocks as the kernel reads them; see ``block_kernel.cpp``.

    Attributes:
        weights: Of all panels, float32 or bfloat16.
        columns: Channel of each column, int32.
        ends: For each panel and tap, where its columns end, int64.
        rows: The output of each row of a panel, int64.
        panels: Six numbers a panel, int64 (panels, 6).
        outputs: Of the layer, those outside of all blocks included.
        covered: Whether each output is in a block.
    """

    weights: Tensor
    columns: Tensor
    ends: Tensor
    rows: Tensor
    panels: Tensor
    outputs: int
    covered: bool


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Tell whether there is a kernel for this type; the first call compiles it, if this machine has not done so yet."""
    kernel = _kernel()
    return kernel is not None and (dtype == torch.float32 or (dtype == torch.bfloat16 and kernel.has_bfloat16))


def pack(values: Sequence[Tensor], blocks: Sequence[Block], outputs: int, inputs: int, taps: int) -> Packed:
    """Return blocks in the layout of the kernel.

    Args:
        values: The weight of each block, ``(R, C)``, float32 or bfloat16, all of one type.
        blocks: In no two of them is the same row.
        outputs: Of the layer.
        inputs: Of the layer.
        taps: Numbers of the kernel, ``kh * kw``.
    """
    kernel = _kernel()
    assert kernel is not None  # the caller has asked `available`
    step = 2 if values and values[0].dtype == torch.bfloat16 else 1
    weights, columns, ends, rows, panels = [], [], [], [], []
    places = [0, 0, 0, 0]
    for value, block in zip(values, blocks):
        channel, end, own = _padded(value.detach(), block.columns, inputs, taps, step)
        start = 0
        while start < len(block.rows):
            left = -(-(len(block.rows) - start) // kernel.lanes)  # vectors
            vectors = next(size for size in (_MOST_VECTORS, 2, 1) if size <= left)
            # three vectors are computed as four, unless that is half empty
            vectors = _MOST_VECTORS if left == _MOST_VECTORS - 1 else vectors
            chosen = slice(start, start + vectors * kernel.lanes)
            part = functional.pad(own[chosen], (0, 0, 0, vectors * kernel.lanes - len(own[chosen])))
            weights.append(part.view(len(part), -1, step).transpose(0, 1).flatten())
            rows.append(block.rows[chosen])
            panels.append((places[0], places[1], places[2], places[3], len(rows[-1]), vectors))
            places[0] += part.numel()
            places[3] += len(rows[-1])
            start += len(part)
        columns.append(channel)
        ends.append(end)
        places[1] += len(channel)
        places[2] += len(end)
    aligned = _aligned(torch.cat(weights))
    covered = sum(len(block.rows) for block in blocks) == outputs
    return Packed(
        aligned, torch.cat(columns).int(), torch.cat(ends), torch.cat(rows), torch.tensor(panels), outputs, covered
    )


def _padded(value: Tensor, columns: Tensor, inputs: int, taps: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return channel of each column, where those of each tap end, and the weight; as many a tap as ``step`` divides."""
    tap = columns // inputs
    counts = torch.bincount(tap, minlength=taps)
    odd = (counts % step).nonzero().flatten()  # these taps get their last column once more, with weights of 0
    order = torch.cat([tap, odd]).argsort(stable=True)
    channel = columns % inputs
    channel = torch.cat([channel, channel[counts.cumsum(0)[odd] - 1]])[order]
    own = functional.pad(value, (0, len(odd)))[:, order]
    return channel, (counts + counts % step).cumsum(0), own


def _aligned(weights: Tensor) -> Tensor:
    """Return a copy that begins where a cache line does."""
    line = 64 // weights.element_size()
    room = torch.empty(len(weights) + line, dtype=weights.dtype)
    start = -(room.data_ptr() // weights.element_size()) % line
    return room[start : start + len(weights)].copy_(weights)


def multiply(x: Tensor, packed: Packed, window: Window, bias: Tensor | None = None) -> Tensor:
    """Return the output of a layer of blocks, by the kernel; without gradients.

    Args:
        x: ``(N, I, H, W)`` on the CPU, of the type of the packed weights; fastest in channels_last.
        packed: From `pack`.
        window: How its kernel moves; outside of the image are zeros. `POINT` for linear layers.
        bias: ``(O,)``.

    Returns:
        ``(N, O, H', W')`` in channels_last, of the type of ``x``.
    """
    kernel = _kernel()
    assert kernel is not None  # packed for it
    x = x.contiguous(memory_format=torch.channels_last)
    size = (len(x), packed.outputs, *window.map_of((x.shape[2], x.shape[3])))
    y = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
    bias = None if bias is None else bias.detach().float().contiguous()
    if not packed.covered:
        y.zero_() if bias is None else y.copy_(bias.view(-1, 1, 1).expand_as(y))
    kernel.run(x, packed, y, bias, window)
    return y


def multiply_by_pytorch(
    x: Tensor,
    values: Sequence[Tensor],
    blocks: Sequence[Block],
    outputs: int,
    window: Window,
    bias: Tensor | None = None,
) -> Tensor:
    """Return what `multiply` does, by PyTorch alone; gradients go through it.

    Args:
        x: ``(N, I, H, W)``.
        values: The weight of each block, ``(R, C)``.
        blocks: In no two of them is the same row.
        outputs: Of the layer.
        window: How its kernel moves.
        bias: ``(O,)``.
    """
    seen = unfolded(x, window)  # (N * P, kh * kw * I)
    parts = [seen.index_select(1, block.columns) @ value.t() for value, block in zip(values, blocks)]
    rows = torch.cat([block.rows for block in blocks])
    y = seen.new_zeros(len(seen), outputs).index_copy(1, rows, torch.cat(parts, 1))
    y = y if bias is None else y + bias
    return y.view(len(x), *window.map_of((x.shape[2], x.shape[3])), outputs).permute(0, 3, 1, 2)


class _Kernel:
    """The compiled library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.lanes = int(library.earlybird_lanes())
        self.has_bfloat16 = bool(library.earlybird_has_bfloat16())

    def run(self, x: Tensor, packed: Packed, y: Tensor, bias: Tensor | None, window: Window) -> None:
        sizes = (len(x), x.shape[1], y.shape[1], *x.shape[2:], *y.shape[2:], *(n for pair in window for n in pair))
        operands = (x, packed.weights, packed.columns, packed.ends, packed.rows, bias, y, packed.panels)
        if math.prod(y.shape):
            self._library.earlybird_multiply(
                *(ctypes.c_void_p(None if operand is None else operand.data_ptr()) for operand in operands),
                ctypes.c_int64(len(packed.panels)),
                (ctypes.c_int64 * len(sizes))(*sizes),
                ctypes.c_int(x.dtype == torch.bfloat16),
                ctypes.c_int(torch.get_num_threads()),
            )


@functools.cache
def _kernel() -> _Kernel | None:
    library = compiled.load(SOURCE, "layers of blocks")
    return None if library is None else _Kernel(library)
