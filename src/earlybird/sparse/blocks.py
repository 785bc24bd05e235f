"""Layers whose weight is a union of dense blocks, and how a model gets them where they are faster.

Rows and columns of the mask that regrouping leaves (`earlybird.tickets.structure`; Chen et al., Coarsening the
Granularity, ICML 2022, https://arxiv.org/abs/2202.04736) are read back as blocks: outputs whose masks are the same.
A layer of blocks b computes

    y[rows of b] = W_b x[columns of b]        for each b,

one small dense product each (`earlybird.sparse.block_kernel`), where a masked layer multiplies with zeros.

What it saves: measured seconds of inference on CPUs, in proportion to what is left of the weight, minus a constant that
narrow layers feel; and bytes of the stored network. It does *not* pay where many weights are left or outputs hardly
share columns; `to_blocks` times each layer as it is called and leaves what is not faster dense. Training through these
layers works, by PyTorch's operators, and is slower than dense.

3x3 convolutions of 128 to 512 channels were faster from 30 to 50 % of zeros on, of 64 channels from 30 to 70 %; at 80 %
VGG-16 and ResNet-18 were 2.9 to 3.7 times as fast as dense (one core of a busy CPU with AVX-512, PyTorch 2.13,
2026-12-01; ``benchmarks/block_kernel.py``).

    ticket = regroup(iterative_ticket)
    ...                                                  # train what it leaves, see earlybird.tickets.fixed
    fast, gains = to_blocks(model, ticket, images)
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlybird.calls import as_call, unwrapped
from earlybird.errors import InputError
from earlybird.kernels.eager import is_eager
from earlybird.kernels.fold import fold_batch_norms
from earlybird.kernels.window import Window
from earlybird.sparse.block_kernel import POINT, Block, Packed, available, multiply, multiply_by_pytorch, pack
from earlybird.sparse.masks import check_fits
from earlybird.tickets.ticket import Ticket

__all__ = ["BlockConv2d", "BlockLinear", "Gain", "find_blocks", "from_matrix", "to_blocks", "to_matrix"]

MARGIN = 0.05
"""Share by which blocks must be faster: less is within what timings of single layers differ by."""

LEAST_ROWS = 8
"""Outputs that blocks of a layer must have on average to be tried: fewer do not fill a vector."""

_ROUNDS = 5


def to_matrix(weight: Tensor) -> Tensor:
    """Return a weight or mask ``(O, I, kh, kw)`` as ``(O, kh * kw * I)``, inputs last; ``(O, I)`` as it is."""
    return weight.movedim(1, -1).flatten(1)


def from_matrix(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Return ``(O, kh * kw * I)`` as a weight or mask of ``shape``: what `to_matrix` was given."""
    outputs, inputs, *kernel = shape
    return matrix.reshape(outputs, *kernel, inputs).movedim(-1, 1).contiguous()


def find_blocks(mask: Tensor) -> list[Block]:
    """Return the dense blocks of a mask: outputs that keep the same columns make one; those that keep none, none.

    Args:
        mask: Boolean, ``(O, I)`` or ``(O, I, kh, kw)``.
    """
    patterns, which = torch.unique(to_matrix(mask), dim=0, return_inverse=True)
    found = [
        Block((which == number).nonzero().flatten(), pattern.nonzero().flatten())
        for number, pattern in enumerate(patterns)
        if bool(pattern.any())
    ]
    return sorted(found, key=lambda block: int(block.rows[0]))


class _Blocks(nn.Module):
    """What layers of blocks have in common.

    Attributes:
        values: The numbers of all blocks, each ``(R, C)``, one after the other.
        rows: Outputs of all blocks, int64.
        columns: Columns of all blocks, int64.
        sizes: Rows and columns of each block, int64 (blocks, 2).
        bias: ``(O,)``, or None.
    """

    rows: Tensor
    columns: Tensor
    sizes: Tensor

    def __init__(self, weight: Tensor, blocks: Sequence[Block], bias: Tensor | None, window: Window) -> None:
        super().__init__()
        if not blocks:
            raise InputError("a layer without any block", needed="at least one", hint="a layer of zeros is its bias")
        blocks = [Block(block.rows.sort().values, block.columns.sort().values) for block in blocks]
        rows = torch.cat([block.rows for block in blocks])
        matrix = to_matrix(weight.detach())
        most = max(int(block.columns.max()) for block in blocks)
        if len(rows.unique()) < len(rows) or int(rows.max()) >= len(matrix) or most >= matrix.shape[1]:
            raise InputError(
                f"blocks do not fit a weight of {matrix.shape[0]} outputs and {matrix.shape[1]} columns",
                needed="each output in one block at most",
            )
        parts = [matrix[block.rows][:, block.columns].flatten() for block in blocks]
        self.values = nn.Parameter(torch.cat(parts))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("rows", rows)
        self.register_buffer("columns", torch.cat([block.columns for block in blocks]))
        self.register_buffer("sizes", torch.tensor([[len(block.rows), len(block.columns)] for block in blocks]))
        self.outputs, self.inputs = weight.shape[:2]
        self.window = window
        self._packed: dict[torch.dtype, tuple[Any, Packed]] = {}

    @property
    def blocks(self) -> list[Block]:
        """Rows and columns of each block."""
        sizes = self.sizes.tolist()
        rows, columns = (part.split([size[at] for size in sizes]) for at, part in enumerate((self.rows, self.columns)))
        return [Block(*block) for block in zip(rows, columns)]

    @property
    def keep(self) -> float:
        """Share of the weight that is in blocks."""
        taps = self.window.kernel[0] * self.window.kernel[1]
        return self.values.numel() / (self.outputs * self.inputs * taps)

    def matrices(self) -> list[Tensor]:
        """Return the weight of each block, ``(R, C)``; gradients go through it."""
        sizes = self.sizes.tolist()
        parts = self.values.split([rows * columns for rows, columns in sizes])
        return [part.view(*size) for part, size in zip(parts, sizes)]

    def extra_repr(self) -> str:
        """Return what ``print`` shows of it."""
        return f"{self.inputs}, {self.outputs}, {len(self.sizes)} blocks, {self.keep:.1%} of the weight"

    def _multiply(self, x: Tensor) -> Tensor:
        """Return ``(N, O, H', W')`` of ``x``, ``(N, I, H, W)``."""
        learns = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        fits = x.dtype == self.values.dtype or torch.is_autocast_enabled(x.device.type)
        if not learns and fits and is_eager(x) and available(x.dtype):
            return multiply(x, self._pack(x.dtype), self.window, self.bias)
        return multiply_by_pytorch(x, self.matrices(), self.blocks, self.outputs, self.window, self.bias)

    def _pack(self, dtype: torch.dtype) -> Packed:
        """Return the blocks for the kernel, packed anew when the numbers have changed."""
        values = self.values
        now = (values.data_ptr(), None if values.is_inference() else values._version)
        if dtype not in self._packed or self._packed[dtype][0] != now:
            taps = self.window.kernel[0] * self.window.kernel[1]
            parts = [part.detach().to(dtype) for part in self.matrices()]
            self._packed[dtype] = now, pack(parts, self.blocks, self.outputs, self.inputs, taps)
        return self._packed[dtype][1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}}  # copies pack for themselves


class BlockConv2d(_Blocks):
    """A convolution made of dense blocks: images ``(N, I, H, W)`` to ``(N, O, H', W')`` in channels_last.

    Args:
        weight: ``(O, I, kh, kw)``; what is outside the blocks does not count.
        blocks: See `find_blocks`.
        window: How the kernel moves; outside of the image are zeros.
        bias: ``(O,)``, or None.

    Raises:
        InputError: There is no block, or an output is in two of them.
    """

    def __init__(self, weight: Tensor, blocks: Sequence[Block], window: Window, bias: Tensor | None = None) -> None:
        super().__init__(weight, blocks, bias, window)

    @classmethod
    def from_dense(cls, layer: nn.Conv2d, blocks: Sequence[Block]) -> BlockConv2d:
        """Return the blocks of a convolution.

        Raises:
            InputError: It is one in groups, or its surroundings are not zeros.
        """
        if not _is_plain(layer):
            raise InputError("a convolution in groups, or with padding by name or by reflection", needed="a plain one")
        window = Window(layer.kernel_size, layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]
        return cls(layer.weight, blocks, window, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x`` with the blocks."""
        if x.dim() != 4 or x.shape[1] != self.inputs:
            raise InputError(f"an input of shape {tuple(x.shape)}", needed=f"(N, {self.inputs}, H, W)")
        return self._multiply(x)


class BlockLinear(_Blocks):
    """A linear layer made of dense blocks: ``(..., I)`` to ``(..., O)``.

    Args:
        weight: ``(O, I)``; what is outside the blocks does not count.
        blocks: See `find_blocks`.
        bias: ``(O,)``, or None.

    Raises:
        InputError: There is no block, or an output is in two of them.
    """

    def __init__(self, weight: Tensor, blocks: Sequence[Block], bias: Tensor | None = None) -> None:
        super().__init__(weight, blocks, bias, POINT)

    @classmethod
    def from_dense(cls, layer: nn.Linear, blocks: Sequence[Block]) -> BlockLinear:
        """Return the blocks of a linear layer."""
        return cls(layer.weight, blocks, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of ``x`` with the blocks."""
        if x.dim() == 0 or x.shape[-1] != self.inputs:
            raise InputError(f"an input of shape {tuple(x.shape)}", needed=f"(..., {self.inputs})")
        y = self._multiply(x.reshape(-1, self.inputs, 1, 1))
        return y.reshape(*x.shape[:-1], self.outputs)


class Gain(NamedTuple):
    """What blocks came to in one layer.

    Attributes:
        name: Of the layer.
        keep: Share of its weights that the ticket keeps.
        blocks: How many its mask is made of.
        dense_s: Seconds of the dense layer, masked, on the example; None where it was not timed.
        blocks_s: Seconds of the blocks.
        replaced: Whether the layer is one of blocks now.
    """

    name: str
    keep: float
    blocks: int
    dense_s: float | None
    blocks_s: float | None
    replaced: bool


@torch.no_grad()
def to_blocks(
    model: nn.Module, ticket: Ticket, example_inputs: Any, *, dtype: torch.dtype = torch.float32, always: bool = False
) -> tuple[nn.Module, list[Gain]]:
    """Return a copy of a model for inference, masked, with layers of blocks where these are faster here.

    Batch norms that can be are part of the convolutions before them, see `earlybird.kernels.fold`.

    Args:
        model: On a CPU; left as it is.
        ticket: Over weights, such as `earlybird.tickets.structure.regroup` returns.
        example_inputs: A batch as it will be called with: its size and memory format decide which way is faster.
        dtype: In which layers compute: bfloat16 is that of autocast, under which the copy has to be called, too.
        always: Replace all layers that are made of blocks, whatever the time.

    Returns:
        The copy in eval mode, and what each layer of the ticket came to.

    Raises:
        InputError: The ticket is not this model's.
    """
    masked = copy.deepcopy(unwrapped(model))
    for name, weight in check_fits(ticket, masked).items():
        weight.mul_(ticket.masks[name].to(weight.device))
    fast = fold_batch_norms(masked, example_inputs)
    inputs = _inputs_of(fast, list(ticket.masks), example_inputs, dtype)
    gains = []
    for name, mask in ticket.masks.items():
        layer, blocks = fast.get_submodule(name), find_blocks(mask)
        gain = Gain(name, float(mask.float().mean()), len(blocks), None, None, replaced=False)
        kept_rows = sum(len(block.rows) for block in blocks)
        new: BlockConv2d | BlockLinear | None = None
        if name in inputs and kept_rows >= LEAST_ROWS * len(blocks) > 0:
            if isinstance(layer, nn.Conv2d) and _is_plain(layer):
                new = BlockConv2d.from_dense(layer, blocks)
            elif type(layer) is nn.Linear:
                new = BlockLinear.from_dense(layer, blocks)
        if new is not None:
            new.eval()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                dense_s, blocks_s = _timed((layer, new), inputs[name])
            better = always or (1 + MARGIN) * blocks_s < dense_s
            gain = gain._replace(dense_s=dense_s, blocks_s=blocks_s, replaced=better)
            if better:
                fast.set_submodule(name, new)
        gains.append(gain)
    return fast, gains


def _is_plain(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Conv2d
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def _inputs_of(model: nn.Module, names: Sequence[str], example_inputs: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what each layer is called with, the first time."""
    found: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
        found.setdefault(name, args[0].clone())

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(keep, name=name)) for name in names]
    args, kwargs = as_call(example_inputs)
    try:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _timed(layers: Sequence[nn.Module], x: Tensor) -> list[float]:
    """Return the seconds of each layer on ``x``, in turns; the fastest of some rounds counts."""
    times: list[list[float]] = [[] for _ in layers]
    for _ in range(1 + _ROUNDS):
        for layer, taken in zip(layers, times):
            start = time.perf_counter()
            layer(x)
            taken.append(time.perf_counter() - start)
    return [min(taken[1:]) for taken in times]  # the first round warms up
