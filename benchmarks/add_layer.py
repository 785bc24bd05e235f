"""Question: what does an add layer cost here, against other ways to compute it and against a convolution?

Forward and backward, with the gradients of input and filters, of 3x3 layers in float32 on a batch of 32; in turns:

- ``kernel``: `earlybird.arithmetic.add`, compiled, on images in channels_last; ``contiguous``: in the other layout;
- ``fallback``: the same without a compiler;
- ``cdist``: patches unfolded, and ``torch.cdist(p=1)``, whose gradients are signs: other numbers, but what there is;
- ``broadcast``: patches unfolded and subtracted from every filter, as the definition is written: a tensor of
  (N, outputs, numbers of a patch, positions);
- ``convolution``: an ordinary one.

All but the last one compute the same outputs, and all of these but ``cdist`` the same gradients, which is
checked. Then training steps of ResNet-20 on 32x32 images, batch 128, converted by `earlybird.arithmetic.shift_add`.

    python benchmarks/add_layer.py                  # some five minutes
    python benchmarks/add_layer.py --quick          # a look of half a minute; nothing is recorded
    python benchmarks/add_layer.py --table          # the tables of the newest rows
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import interleaved, machine, read_rounds
from records import record, time_or_show
from step_times import stepper
from tables import session_tables
from torch import Tensor
from torch.nn import functional

from earlybird.arithmetic import add_kernel
from earlybird.arithmetic.add import add_conv2d
from earlybird.arithmetic.shift_add import ShiftAdd
from earlybird.kernels.window import Window
from earlybird.models import build

NAME = "add_layer"
BATCH, STEP_BATCH = 32, 128
LEAST_S = 4e-3  # shorter operations are repeated within a round
WINDOW = Window((3, 3), (1, 1), (1, 1), (1, 1))
SHAPES = ((32, 16, 16), (16, 32, 32), (8, 64, 64), (8, 128, 128), (4, 256, 256), (4, 20, 36))
OPERATIONS = ("conv", "shift", "add", "shift_add")
WAYS = ("contiguous", "fallback", "cdist", "broadcast", "convolution")
HEADS = {
    "side": "| side | channels | kernel, ms | billion distances a second, forward | "
    + " | ".join(f"{way} / kernel" for way in WAYS)
    + " | broadcast tensor |\n|" + " --- |" * (len(WAYS) + 5),
    "operation": "| ResNet-20 | ms a step | this / convolutions |\n| --- | --- | --- |",
}  # fmt: skip
"""Key that a kind of row has to the head of its table."""


class Broadcast(torch.autograd.Function):
    """The add layer as its definition is written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, filters: Tensor) -> Tensor:
        patches = functional.unfold(x, 3, padding=1)[:, None]  # (N, 1, K, P)
        ctx.save_for_backward(patches, filters)
        ctx.size = x.shape[2:]
        return (patches - filters.flatten(1)[None, :, :, None]).abs_().sum(2).neg_().unflatten(2, x.shape[2:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        patches, filters = ctx.saved_tensors
        differences = patches - filters.flatten(1)[None, :, :, None]
        weights = gradient.flatten(2)[:, :, None]  # (N, O, 1, P)
        of_filters = (differences * weights).sum((0, 3)).view(filters.shape)
        of_patches = differences.neg_().clamp_(-1, 1).mul_(weights).sum(1)
        return functional.fold(of_patches, ctx.size, 3, padding=1), of_filters


def by_cdist(x: Tensor, filters: Tensor) -> Tensor:
    """The add layer's outputs by PyTorch's distances."""
    patches = functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)  # (N * P, K)
    found = torch.cdist(patches, filters.flatten(1), p=1).neg()
    return found.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


def by_fallback(x: Tensor, filters: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and gradients without a compiler."""
    y = add_kernel.distances_by_pytorch(x, filters, WINDOW)
    of_x = add_kernel.input_gradient_by_pytorch(x, filters, gradient, WINDOW)
    shape = (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (False, True, False)
    of_filters = torch.ops.aten.convolution_backward(gradient, x, filters, None, *shape)[1]
    return y, of_x, of_filters - filters * gradient.sum((0, 2, 3)).view(-1, 1, 1, 1)


def both_ways(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, filters: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, and gradients of input and filters."""
    y = function(x, filters)
    return y, *torch.autograd.grad(y, (x, filters), gradient)


def ways(side: int, inputs: int, outputs: int, batch: int = BATCH) -> dict[str, Callable[[], Any]]:
    """Return way to what computes outputs and gradients by it; and, as ``forward``, the kernel's outputs alone."""
    layout = torch.channels_last
    x = torch.randn(batch, inputs, side, side).contiguous(memory_format=layout)
    gradient = torch.randn(batch, outputs, side, side).contiguous(memory_format=layout)
    filters = torch.randn(outputs, inputs, 3, 3)
    padded = partial(add_conv2d, padding=(1, 1))
    own = [x.requires_grad_(), filters.requires_grad_(), gradient]
    plain = [x.detach().contiguous().requires_grad_(), filters, gradient.contiguous()]
    last = filters.detach().contiguous(memory_format=layout).requires_grad_()
    return {
        "kernel": partial(both_ways, padded, *own),
        "contiguous": partial(both_ways, padded, *plain),
        "fallback": partial(by_fallback, x.detach(), filters.detach(), gradient),
        "cdist": partial(both_ways, by_cdist, *plain),
        "broadcast": partial(both_ways, Broadcast.apply, *plain),
        "convolution": partial(both_ways, partial(functional.conv2d, padding=1), x, last, gradient),
        "forward": partial(padded, x.detach(), filters.detach()),
    }


def check(found: dict[str, Callable[[], Any]]) -> None:
    """Raise unless all ways compute the same, as far as float32 can tell."""
    computed = {
        way: [part.detach() for part in found[way]()]
        for way in ("kernel", "contiguous", "fallback", "cdist", "broadcast")
    }
    own = computed.pop("kernel")
    for way, parts in computed.items():
        for what, one, other in zip(("outputs", "input gradient", "filter gradient"), own, parts):
            error = float((one - other).abs().max() / one.abs().max())
            if error > 1e-4 and (way, what[-8:]) != ("cdist", "gradient"):
                raise RuntimeError(f"{way} computes other {what}: off by {error:.1%}")


def layers(options: argparse.Namespace) -> None:
    """Print and record the ratios of every way, shape by shape."""
    print(HEADS["side"])
    for side, inputs, outputs in SHAPES[1::3] if options.quick else SHAPES:
        found = ways(side, inputs, outputs)
        check(found)
        head = machine()
        times, others = interleaved(found, options.rounds, LEAST_S)
        own, distances = times["kernel"], BATCH * side**2 * 9 * inputs * outputs
        row = {
            "side": side, "inputs": inputs, "outputs": outputs, "own_seconds": statistics.median(own),
            "distances_a_second": distances / statistics.median(times["forward"]),
            "ratios": {way: statistics.median(a / b for a, b in zip(times[way], own)) for way in WAYS},
            "broadcast_bytes": 4 * distances, "rounds": options.rounds, "others": others, **head,
        }  # fmt: skip
        print(line(row), flush=True)
        record(NAME, row, quick=options.quick)


def steps(options: argparse.Namespace) -> None:
    """Print and record training steps of converted networks."""
    batch = 16 if options.quick else STEP_BATCH
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.arange(batch) % 10
    actions = {}
    for operation in OPERATIONS:
        model = build("resnet20", classes=10).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        ShiftAdd(operation=operation).attach(model, optimizer, example_inputs=x)
        actions[operation] = stepper(model, optimizer, x, y, False)
    head = machine()
    times, others = interleaved(actions, options.rounds)
    print(f"\n{HEADS['operation']}")
    for operation, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, times["conv"]))
        row = {"operation": operation, "step_seconds": statistics.median(taken), "ratio": ratio, "batch": batch}
        row |= {"rounds": options.rounds, "others": others, **head}
        print(line(row), flush=True)
        record(NAME, row, quick=options.quick)


def line(row: dict[str, Any]) -> str:
    """Return one row as a line of its table."""
    if "side" in row:
        cells = [f"{row['side']}", f"{row['inputs']} to {row['outputs']}", f"{1e3 * row['own_seconds']:.2f}"]
        cells += [f"{row['distances_a_second'] / 1e9:.1f}", *(f"{row['ratios'][way]:.2f}x" for way in WAYS)]
        return "| " + " | ".join([*cells, f"{row['broadcast_bytes'] / 2**20:.0f} MiB"]) + " |"
    return f"| {row['operation']} | {1e3 * row['step_seconds']:.0f} | {row['ratio']:.2f}x |"


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Return the newest session of each machine as Markdown: layers, then whole steps."""
    return session_tables(found, HEADS, line)


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    return read_rounds(__doc__, words)


def main() -> None:
    time_or_show(read(), NAME, tables, layers, steps)


if __name__ == "__main__":
    main()
