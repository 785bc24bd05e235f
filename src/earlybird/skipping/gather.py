"""Run a block on some samples of a batch only: gather them, run the block, and put its outputs in their places.

    out[i] = block(x)[i]  for the samples that run        out[i] = x[i]  for all others

so that time falls with the samples that are left out, forward and backward. What it costs is copying: of N samples of
which n run, 2N + 2n are read or written in either pass. A compiled kernel (`gather.cpp`, see
`earlybird.kernels.compiled`) does it on a CPU; where there is none, PyTorch, which reads and writes some of it twice.

Batch norms see the samples that run and no others. With fewer than `FEW` of them the statistics of the batch would be
noise (of one sample on one pixel, there are none): then the block's batch norms use their running statistics, as in
evaluation, and leave them as they are. A block that no sample runs is not called; its parameters get gradients of zero,
not none, so that momentum and weight decay go on as they do where outputs are multiplied by zero.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from earlybird.blocks import Block
from earlybird.calls import processes
from earlybird.errors import InputError
from earlybird.kernels import compiled
from earlybird.kernels.eager import is_eager
from earlybird.tickets.layers import BatchNorm

__all__ = ["FEW", "Choice", "check_norms", "run_on"]

SOURCE = Path(__file__).with_suffix(".cpp")

FEW = 4
"""Samples, below which the batch norms of a block that leaves others out use their running statistics."""


class Choice(NamedTuple):
    """By what chances the samples that run were chosen, so that the chances can learn.

    Attributes:
        chance: Of each sample to run, p, shape (N,), float32.
        probes: Indices of samples that do not run, and are run forward all the same to see what they miss, shape (k,).
        rate: Probability with which a sample that does not run becomes a probe; 0 for no probes.
    """

    chance: Tensor
    probes: Tensor
    rate: float


def run_on(
    block: nn.Module,
    forward: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    rows: Tensor,
    choice: Choice | None = None,
) -> Tensor:
    """Return what ``forward`` makes of some samples, and the others as they are.

    With a ``choice``, the chances p get an estimate of what running is worth, L(with) - L(without). With d = block(x) -
    x, the inner product <dL/dout, d> is that to first order, of a sample that runs as seen from the output with d, of
    one that does not as seen from the output without; the mean of both views is right to second order, too:

        dL/dp_i = <dL/dout_i, d_i> / (2 p_i)               for the samples that run
                  <dL/dout_i, d_i> / (2 (1 - p_i) rate)    for the probes, whose d is computed forward only
                  0                                        for all others

    Its mean over the choice is the mean of both views, for each sample; through p = sigmoid(s), no weight is larger
    than 1 / (2 rate). Without probes, ``rate = 0``, only the first view is there, with weight 1 / p.

    Args:
        block: Maps a tensor to one of the same shape.
        forward: What runs it, on the samples whose indices it is told, too.
        x: ``(N, ...)``.
        rows: Indices of the samples that run, ascending, shape (n,), 0 <= n <= N.
        choice: How they were chosen.

    Returns:
        ``(N, ...)``, in the type and memory format of ``x`` where some samples do not run.
    """
    share = 0.5 if choice is not None and choice.rate else 1.0
    if len(rows) == len(x):
        return _credited(forward(x, rows), x, choice, rows, share)
    if choice is not None and len(choice.probes):
        x = _probed(block, forward, x, choice)
    if not len(rows):
        parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
        untouched: Tensor = _Untouched.apply(x, None if choice is None else choice.chance, *parameters)
        return untouched
    rest, inputs = _Gather.apply(x, rows)
    with _running_statistics(block) if len(rows) < FEW else contextlib.nullcontext():
        outputs = forward(inputs, rows).to(x.dtype)
    merged: Tensor = _Merge.apply(rest, _credited(outputs, inputs, choice, rows, share), rows)
    return merged


def _credited(outputs: Tensor, inputs: Tensor, choice: Choice | None, rows: Tensor, share: float) -> Tensor:
    """Return ``outputs`` of the samples that ran; their chances get what it was worth."""
    if choice is None:
        return outputs
    chance = choice.chance[rows]
    return _Credit.apply(outputs, chance, None, outputs.detach(), inputs.detach(), share / chance.detach())  # type: ignore[no-any-return]


def _probed(block: nn.Module, forward: Callable[[Tensor, Tensor], Tensor], x: Tensor, choice: Choice) -> Tensor:
    """Return ``x``; the chances of the probes get what running them would have been worth."""
    inputs = _taken(x.detach(), choice.probes)
    with torch.no_grad(), _running_statistics(block):
        outputs = forward(inputs, choice.probes).to(x.dtype)
    chance = choice.chance[choice.probes]
    weight = 0.5 / ((1 - chance.detach()) * choice.rate)
    return _Credit.apply(x, chance, choice.probes, outputs, inputs, weight)  # type: ignore[no-any-return]


def check_norms(blocks: Iterable[Block]) -> None:
    """Raise an `InputError` for batch norms that wait for all processes, where one may leave a block out."""
    for block in blocks if processes() > 1 else ():
        if any(isinstance(module, nn.SyncBatchNorm) for module in block.module.modules()):
            raise InputError(
                f"block '{block.name}' has a SyncBatchNorm, and a process without samples for it would not join",
                hint="keep torch.nn.BatchNorm2d in blocks that are left out for some samples",
            )


# Rows of images in channels-last order lie in one piece once their dimensions are in the order of the memory.


def _by_memory(x: Tensor) -> Tensor:
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1) if last else x


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of ``x`` in its memory format."""
    ordered = _by_memory(x)
    taken = ordered.index_select(0, rows)
    return taken if ordered is x else taken.permute(0, 3, 1, 2)


@functools.cache
def _kernel() -> ctypes.CDLL | None:
    library = compiled.load(SOURCE, "blocks that some samples skip", "a few percent slower")
    if library is not None:
        address, size = ctypes.c_void_p, ctypes.c_int64
        library.earlybird_merge.argtypes = (address, address, address, size, size, size, address, ctypes.c_int)
        library.earlybird_worth.argtypes = (
            address, address, address, address, size, size, ctypes.c_int, address, ctypes.c_int,
        )  # fmt: skip
        library.earlybird_merge.restype = library.earlybird_worth.restype = None
    return library


def _kernel_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """Return the kernel, if it takes these: on a CPU, of one type, their samples dense and in one order of memory."""
    if not all(is_eager(x) and x.dtype == tensors[0].dtype for x in tensors):
        return None
    ordered = [_by_memory(x) for x in tensors]
    alike = len({inside is x for inside, x in zip(ordered, tensors)}) == 1
    return _kernel() if alike and all(inside.is_contiguous() for inside in ordered) else None


def _put(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Return a copy of ``x`` with ``values`` in some of its rows."""
    kernel = _kernel_for(x, values)
    if kernel is not None:
        merged = torch.empty_like(x)
        kernel.earlybird_merge(
            x.data_ptr(), values.data_ptr(), rows.data_ptr(), len(x), len(rows),
            x[0].numel() * x.element_size(), merged.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return merged
    copy = x.clone()
    ordered = _by_memory(copy)
    ordered.index_copy_(0, rows, values if ordered is copy else values.permute(0, 2, 3, 1))
    return copy


def _worth(outputs: Tensor, inputs: Tensor, gradient: Tensor, rows: Tensor | None) -> Tensor:
    """Return <gradient, outputs - inputs> for each sample, float32 (n,); ``rows`` are its samples', None for all."""
    kernel = _kernel_for(outputs, inputs, gradient) if outputs.dtype in (torch.float32, torch.bfloat16) else None
    if kernel is not None:
        worth = torch.empty(len(outputs), dtype=torch.float32)
        kernel.earlybird_worth(
            outputs.data_ptr(), inputs.data_ptr(), gradient.data_ptr(), None if rows is None else rows.data_ptr(),
            len(outputs), inputs[0].numel(), outputs.dtype == torch.bfloat16, worth.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return worth
    product = (outputs - inputs).mul_(gradient if rows is None else _taken(gradient, rows))
    return product.sum(tuple(range(1, product.ndim)), dtype=torch.float32)


class _Gather(torch.autograd.Function):
    """Rows of a batch, and the batch, whose gradient `_Merge` leaves to be completed here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return x.view_as(x), _taken(x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rest: Tensor, taken: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return _put(rest, rows, taken.to(rest.dtype)), None


class _Merge(torch.autograd.Function):
    """A batch with other values in some rows; the gradient of these rows is that of the values alone."""

    @staticmethod
    def forward(ctx: Any, rest: Tensor, outputs: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return _put(rest, rows, outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        # the rows that ran are overwritten in _Gather: nobody else gets the first one
        return gradient, _taken(gradient, rows), None


class _Credit(torch.autograd.Function):
    """Values as they are; chances get the inner product of the values' gradient and what a block changed."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, chance: Tensor, rows: Tensor | None, outputs: Tensor, inputs: Tensor, weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, outputs, inputs, weight)
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, outputs, inputs, weight = ctx.saved_tensors
        return gradient, _worth(outputs, inputs, gradient, rows) * weight, None, None, None, None


class _Untouched(torch.autograd.Function):
    """A copy of the batch; what did not take part gets gradients of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chance: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.idle = (chance, *parameters)
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        return gradient, *(torch.zeros_like(idle) if need else None for idle, need in zip(ctx.idle, needed))


@contextlib.contextmanager
def _running_statistics(block: nn.Module) -> Iterator[None]:
    """Let the batch norms of ``block`` that train and have running statistics use them, and leave them alone."""
    norms = [m for m in block.modules() if isinstance(m, BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True
