"""Question: how much faster than PyTorch's are batch norm and ReLU by a kernel of our own?

Forward and backward in training mode, with the gradients of input, weight and bias, on bf16 images in channels_last and
a batch of 128, with 1 and 2 threads; in turns:

- ``kernel``: `earlybird.kernels.batch_norm`, the ReLU in it; ``alone``: without a ReLU;
- ``pytorch``: `torch.nn.functional.batch_norm` and a ReLU in place; ``pytorch alone``: without the ReLU.

That both compute the same is checked. Memory is what the kernel must move at least: forward two readings and a writing
of one image, backward four readings and a writing.

    python benchmarks/batch_norm.py                  # a minute
    python benchmarks/batch_norm.py --quick          # a look of some seconds; nothing is recorded
    python benchmarks/batch_norm.py --table          # the tables of the newest rows
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import interleaved, machine, read_rounds
from records import record, time_or_show
from tables import session_tables
from torch import Tensor
from torch.nn import functional

from earlybird.kernels.batch_norm import batch_norm, supports

NAME = "batch_norm"
BATCH = 128
LEAST_S = 4e-3  # shorter operations are repeated within a round
SHAPES = ((32, 16), (32, 32), (32, 21), (16, 64), (16, 45), (8, 128), (4, 256))
"""Side and channels; some of them as a cut leaves them."""
READINGS_AND_WRITINGS = 8
HEAD = (
    "| side | channels | kernel, ms | GB a second | PyTorch / kernel | forward alone | without ReLU |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def by_pytorch(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, relu: bool) -> Tensor:
    """PyTorch's batch norm, and ReLU where that is asked for."""
    y = functional.batch_norm(x, mean, variance, weight, bias, training=True)
    return functional.relu(y, inplace=True) if relu else y


def by_kernel(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, relu: bool) -> Tensor:
    """The same by the kernel."""
    return batch_norm(x, weight, bias, mean, variance, 0.1, 1e-5, relu)


def both_ways(function: Callable[..., Tensor], operands: tuple[Tensor, ...], gradient: Tensor, relu: bool) -> Any:
    """Return outputs, and gradients of input, weight and bias."""
    y = function(*operands, relu)
    return y, *torch.autograd.grad(y, operands[:3], gradient)


def ways(side: int, channels: int, batch: int = BATCH) -> dict[str, Callable[[], Any]]:
    """Return way to what computes outputs and gradients by it; ``... forward``: outputs alone."""
    size = (batch, channels, side, side)
    x, gradient = (torch.randn(size).bfloat16().contiguous(memory_format=torch.channels_last) for _ in range(2))
    learned = x.requires_grad_(), torch.rand(channels, requires_grad=True), torch.randn(channels, requires_grad=True)
    operands = (*learned, torch.zeros(channels), torch.ones(channels))
    if not supports(*operands):
        raise SystemExit("there is no kernel here")
    found: dict[str, Callable[[], Any]] = {}
    for way, function in (("kernel", by_kernel), ("pytorch", by_pytorch)):
        found[way] = partial(both_ways, function, operands, gradient, True)
        found[f"{way} alone"] = partial(both_ways, function, operands, gradient, False)
        found[f"{way} forward"] = partial(function, *operands, True)
    return found


def check(found: dict[str, Callable[[], Any]]) -> None:
    """Raise unless both ways compute the same, as far as bf16 can tell."""
    for way in ("", " alone"):
        parts = zip(("outputs", "input", "weight", "bias"), found[f"kernel{way}"](), found[f"pytorch{way}"]())
        for what, one, other in parts:
            one, other = one.detach().float(), other.detach().float()
            error = float((one - other).norm() / other.norm())
            if error > 0.02:
                raise RuntimeError(f"the kernel{way} computes other {what}: off by {error:.1%}")


def measure(side: int, channels: int, rounds: int, batch: int = BATCH) -> dict[str, Any]:
    """Return the row of one shape."""
    found = ways(side, channels, batch)
    check(found)
    head = machine()
    times, others = interleaved(found, rounds, LEAST_S)
    own = statistics.median(times["kernel"])
    moved = READINGS_AND_WRITINGS * batch * channels * side**2 * 2

    def ratio(way: str = "") -> float:
        return statistics.median(a / b for a, b in zip(times[f"pytorch{way}"], times[f"kernel{way}"]))

    return {
        "side": side, "channels": channels, "batch": batch, "own_seconds": own, "bytes_a_second": moved / own,
        "ratio": ratio(), "ratio_forward": ratio(" forward"), "ratio_alone": ratio(" alone"),
        "rounds": rounds, "others": others, **head,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """Return one row as a line of its table."""
    ratios = (f"{row[key]:.2f}x" for key in ("ratio", "ratio_forward", "ratio_alone"))
    cells = [f"{row['side']}", f"{row['channels']}", f"{1e3 * row['own_seconds']:.2f}"]
    return "| " + " | ".join([*cells, f"{row['bytes_a_second'] / 1e9:.1f}", *ratios]) + " |"


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Return the newest session of each machine and number of threads as Markdown."""
    return session_tables(found, {"side": HEAD}, line)


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    return read_rounds(__doc__, words)


def shapes(options: argparse.Namespace) -> None:
    for threads in range(1, min(2, os.cpu_count() or 1) + 1):
        torch.set_num_threads(threads)
        print(f"\n{threads} threads\n\n{HEAD}")
        for side, channels in SHAPES[1::3] if options.quick else SHAPES:
            row = measure(side, channels, options.rounds)
            print(line(row), flush=True)
            record(NAME, row, quick=options.quick)


def main() -> None:
    time_or_show(read(), NAME, tables, shapes)


if __name__ == "__main__":
    main()
