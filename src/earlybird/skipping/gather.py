"""Run a block on some samples of a batch only: gather them, run the block, and put its outputs in their places.

    out[i] = block(x)[i]  for the samples that run        out[i] = x[i]  for all others

so that time falls with the samples that are left out, forward and backward. What it costs is copying: of N samples of
which n run, some 2N + 4n are read or written in either pass.

Batch norms see the samples that run and no others. With fewer than `FEW` of them the statistics of the batch would be
noise (of one sample on one pixel, there are none): then the block's batch norms use their running statistics, as in
evaluation, and leave them as they are. A block that no sample runs is not called; its parameters get gradients of zero,
not none, so that momentum and weight decay go on as they do where outputs are multiplied by zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from earlybird.blocks import Block
from earlybird.calls import processes
from earlybird.errors import InputError
from earlybird.tickets.layers import BatchNorm

__all__ = ["FEW", "check_norms", "run_on"]

FEW = 4
"""Samples, below which the batch norms of a block that leaves others out use their running statistics."""


def run_on(
    block: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor, chance: Tensor | None = None
) -> Tensor:
    """Return what ``forward`` makes of some samples, and the others as they are.

    Where the samples were chosen with probabilities ``chance``, p, these get the gradient

        dL/dp_i = <dL/dout_i, block(x)_i - x_i> / p_i  for the samples that run        0  for all others

    Its mean over the choice is the inner product itself, for each sample: what it is worth to run it, to first order,
    as seen from the output with it. Through p = sigmoid(s) it becomes (1 - p_i) times the inner product, so that the
    division makes nothing large.

    Args:
        block: Maps a tensor to one of the same shape.
        forward: What runs it.
        x: ``(N, ...)``.
        rows: Indices of the samples that run, ascending, shape (n,), 0 <= n <= N.
        chance: Shape (N,), float32.

    Returns:
        ``(N, ...)``, in the type and memory format of ``x`` where some samples do not run.
    """
    if not len(rows):
        parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
        untouched: Tensor = _Untouched.apply(x, chance, *parameters)
        return untouched
    if len(rows) == len(x):
        outputs = forward(x)
        return outputs if chance is None else _Credit.apply(outputs, x.detach(), chance)  # type: ignore[no-any-return]
    rest, inputs = _Gather.apply(x, rows)
    with _running_statistics(block) if len(rows) < FEW else contextlib.nullcontext():
        outputs = forward(inputs).to(x.dtype)
    merged: Tensor = _Merge.apply(rest, outputs, inputs.detach(), rows, chance)
    return merged


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


def _put(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Return a copy of ``x`` with ``values`` in some of its rows."""
    copy = x.clone()
    ordered = _by_memory(copy)
    ordered.index_copy_(0, rows, values if ordered is copy else values.permute(0, 2, 3, 1))
    return copy


def _worth(gradient: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """Return the inner product of gradient and difference for each sample, float32, shape (n,)."""
    product = (outputs - inputs).mul_(gradient)
    return product.sum(tuple(range(1, product.ndim)), dtype=torch.float32)


class _Gather(torch.autograd.Function):
    """Rows of a batch, and the batch, whose gradient `_Merge` leaves to be completed here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return x.view_as(x), _taken(x, rows)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, rest: Tensor, taken: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return _put(rest, rows, taken.to(rest.dtype)), None


class _Merge(torch.autograd.Function):
    """A batch with other values in some rows; the gradient of these rows is that of the values alone."""

    @staticmethod
    def forward(ctx: Any, rest: Tensor, outputs: Tensor, inputs: Tensor, rows: Tensor, chance: Tensor | None) -> Tensor:
        ctx.save_for_backward(outputs, inputs, rows, chance)
        return _put(rest, rows, outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        outputs, inputs, rows, chance = ctx.saved_tensors
        taken = _taken(gradient, rows)
        credit = None
        if ctx.needs_input_grad[4]:
            worth = _worth(taken, outputs, inputs) / chance[rows]
            credit = torch.zeros_like(chance).index_copy_(0, rows, worth)
        # the rows that ran are overwritten in _Gather: nobody else gets this gradient
        return gradient, taken, None, None, credit


class _Credit(torch.autograd.Function):
    """Outputs of samples that all ran; the chances that they had get what it was worth."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, inputs: Tensor, chance: Tensor) -> Tensor:
        ctx.save_for_backward(outputs, inputs, chance)
        return outputs.view_as(outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        outputs, inputs, chance = ctx.saved_tensors
        credit = _worth(gradient, outputs, inputs) / chance if ctx.needs_input_grad[2] else None
        return gradient, None, credit


class _Untouched(torch.autograd.Function):
    """A copy of the batch; what did not take part gets gradients of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chance: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.idle = (chance, *parameters)
        return x.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
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
