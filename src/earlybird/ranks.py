"""Ranks: what processes that train together tell each other, so that they stay alike, or stop together and say why.

Everything here but `leave_group` is collective: all ranks call it, at the same point. With one process it does nothing.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from earlybird.calls import processes, unwrapped
from earlybird.errors import InputError, ShrinkError
from earlybird.tickets.ticket import packed

Facts = Sequence[tuple[str, str]]
"""Names and what they are, in an order that all ranks share."""


def _device() -> torch.device:
    """Return where the default process group wants its tensors."""
    if "cpu:" in str(torch.distributed.get_backend_config()):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def all_texts(text: str) -> list[str]:
    """Return what every rank says, in the order of the ranks."""
    if processes() == 1:
        return [text]
    raw = text.encode()
    size = torch.tensor([len(raw)], device=_device())
    sizes = [torch.zeros_like(size) for _ in range(processes())]
    torch.distributed.all_gather(sizes, size)
    longest = max(int(one) for one in sizes)
    if not longest:
        return [""] * len(sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
    padded = padded.to(size.device)
    told = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(told, padded)
    return [bytes(one[: int(count)].tolist()).decode() for one, count in zip(told, sizes)]


def check_alike(facts: Facts, hint: str) -> None:
    """Raise an `InputError` on every rank, with the first difference, unless all ranks state the same ``facts``."""
    if processes() == 1:
        return
    own = json.dumps([list(fact) for fact in facts])
    if len(set(all_texts(hashlib.sha256(own.encode()).hexdigest()))) == 1:
        return
    first, *others = (json.loads(text) for text in all_texts(own))
    rank, other = next((rank, other) for rank, other in enumerate(others, 1) if other != first)
    ours, theirs = next((a, b) for a, b in zip_longest(first, other) if a != b)
    raise InputError(
        f"rank 0 has {_told(ours)}, rank {rank} has {_told(theirs)}", needed="the same on all ranks", hint=hint
    )


def _told(fact: Sequence[str] | None) -> str:
    return "nothing in its place" if fact is None else " ".join(fact)


def of_model(model: nn.Module) -> list[tuple[str, str]]:
    """Return the type, the parameters and the buffers of ``model`` as facts; their values are left out."""
    model = unwrapped(model)
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return [("the model", type(model).__name__)] + [
        (f"'{name}'", f"of shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}")
        for name, tensor in tensors
    ]


def of_settings(settings: Any, **more: Any) -> list[tuple[str, str]]:
    """Return the fields of a method, and ``more`` values by name, as facts."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return [(name, f"= {value}") for name, value in {**values, **more}.items()]


def of_masks(masks: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Return how many units of each layer stay, and which, as facts."""
    return [
        (
            f"a ticket that keeps {int(mask.sum())} of {mask.numel()} units of '{name}'",
            f"(digest {hashlib.sha256(packed(mask).numpy().tobytes()).hexdigest()[:8]})",
        )
        for name, mask in masks.items()
    ]


def mean(values: Tensor) -> Tensor:
    """Return the mean of ``values`` over all ranks, the same to the last bit on each."""
    if processes() == 1:
        return values
    total = values.clone()
    torch.distributed.all_reduce(total)
    total /= processes()
    torch.distributed.broadcast(total, 0)  # not every backend promises that all ranks get the same bits
    return total


@contextmanager
def all_or_none(together: bool = True) -> Iterator[None]:
    """Let a block that fails on one rank fail on every rank.

    Args:
        together: Whether the other ranks run the block, too; otherwise nothing is exchanged.

    Raises:
        ShrinkError: It failed elsewhere; the message says where and why. Where it failed, its own error is raised.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    if together and processes() > 1:
        told = all_texts("" if failed is None else f"{failed or type(failed).__name__}")
        if failed is None and any(told):
            rank = next(rank for rank, text in enumerate(told) if text)
            raise ShrinkError(f"rank {rank} failed: {told[rank]}", hint="all ranks stop with it")
    if failed is not None:
        raise failed


class _Rows(torch.autograd.Function):
    """Rows of all ranks; each rank's own ones get the gradients of all."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        found = [torch.empty_like(own) for _ in range(processes())]
        torch.distributed.all_gather(found, own.contiguous())
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        torch.distributed.all_reduce(total)
        return total.chunk(processes())[torch.distributed.get_rank()]


def all_rows(own: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all ranks, in their order, and where this one's begin; gradients come back from all ranks.

    Args:
        own: (N, ...), as many rows on each rank.
    """
    if processes() == 1:
        return own, 0
    return _Rows.apply(own), torch.distributed.get_rank() * len(own)


def share(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `mean` of several tensors, name by name, in fp32; they travel as one."""
    if processes() == 1:
        return dict(values)
    flat = mean(torch.cat([value.float().flatten() for value in values.values()]))
    parts = flat.split([value.numel() for value in values.values()])
    return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts)}


def leave_group() -> None:
    """Leave the process group, if there is one, each rank for itself: its threads end while the interpreter is whole.

    Gloo's release the tensors of the last collectives, for which they need the interpreter's lock. One that asks for it
    while the interpreter is being torn down aborts the process, after all its work.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # a model in DDP that is in a cycle holds the group, and with it its threads
        torch.distributed.destroy_process_group()


def of_the_first(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the boolean masks that rank 0 has, name by name; they travel as one."""
    if processes() == 1:
        return dict(masks)
    flat = torch.cat([mask.flatten() for mask in masks.values()]).to(torch.uint8).to(_device())
    torch.distributed.broadcast(flat, 0)
    parts = flat.split([mask.numel() for mask in masks.values()])
    return {name: part.view(mask.shape).to(mask) for (name, mask), part in zip(masks.items(), parts)}
