"""Question: would another way to compute the worst convolutions of VGG-16 make its training step faster here?

A 3x3 convolution's weight gradient is the pass at which oneDNN (3.12, as in PyTorch 2.13) is worst on small maps. On a
CPU with AVX-512 but without AMX it has no matrix-product kernel for it: it takes an older one (``jit_bf16``) that
transposes each image apart, and lets its threads meet at a barrier for each. On one with AMX it has one
(``brgconv_bwd_w``), which is as slow. On maps of 2x2 positions this costs more than the arithmetic, and much more where
another process takes one of the processors. Every way below is timed against PyTorch's own on the same operands
(bf16, channels_last, batch 128), in turns, and must give the same numbers:

- ``contiguous``, ``fp32``: the same operator on another layout or format;
- ``forward kernel``: the gradient of the input as a forward convolution with the turned weight;
- ``products``: matrix products over batch and positions, as `earlybird.kernels.convolution` does it in the product;
- ``padded``: the first layer with its 3 channels filled up with zeros to 4, 8 and 16.

Then whole steps of networks, dense and shrunk layer by layer to half, with the kernels that timing chooses; and one
while another process keeps a processor busy.

    python benchmarks/alternatives.py                  # some four minutes
    python benchmarks/alternatives.py --quick          # a look of about a minute; nothing is recorded
    python benchmarks/alternatives.py --table          # the tables of the newest rows
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from common import interleaved, machine, read_rounds
from records import record, time_or_show
from roofline import BATCH, LEAST_S, SHAPE
from step_times import stepper
from tables import session_tables
from torch import Tensor
from torch.nn import functional

import earlybird as eb
from earlybird.kernels import convolution
from earlybird.kernels.install import Kernels, choose, install
from earlybird.kernels.window import Window
from earlybird.models import build

NAME = "alternatives"
SHAPES = (
    (32, 3, 32), (32, 32, 32), (16, 64, 64), (8, 96, 96), (8, 128, 128), (4, 112, 112), (4, 128, 128), (4, 256, 256),
    (2, 112, 112), (2, 128, 128), (2, 256, 256), (2, 512, 512),
)  # fmt: skip
WINDOW = Window((3, 3), (1, 1), (1, 1), (1, 1))
NETWORKS = (("vgg16", 0.5), ("vgg16", 1.0), ("resnet18", 0.5), ("resnet18", 1.0), ("resnet20", 1.0))
BUSY = ("vgg16", 0.25)
BUSY_ROUNDS = 3
HEADS = {
    "pass": "| side | channels | pass | PyTorch's own, ms | own / other way |\n| --- | --- | --- | --- | --- |",
    "network": "| network | ms a step | PyTorch's own / with products |\n| --- | --- | --- |",
}
"""Key that a kind of row has to the head of its table."""


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve ``x`` ``(N, I, H, W)`` with ``weight`` ``(O, I, 3, 3)``, padding 1: ``(N, O, H, W)``."""
    return torch.ops.aten.convolution(x, weight, None, *SHAPE)


def input_gradient(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient ``(N, I, H, W)`` of the input, where that of the output is ``y`` ``(N, O, H, W)``."""
    return torch.ops.aten.convolution_backward(y, x, weight, None, *SHAPE, (True, False, False))[0]


def weight_gradient(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient ``(O, I, 3, 3)`` of the weight, where that of the output is ``y`` ``(N, O, H, W)``."""
    return torch.ops.aten.convolution_backward(y, x, weight, None, *SHAPE, (False, True, False))[1]


def input_gradient_by_forward(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """`input_gradient` as a forward convolution of ``y`` with the turned weight."""
    return forward(y, weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last))


def ways(side: int, inputs: int, outputs: int) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """Return pass and way to what does it; the way ``''`` is PyTorch's own."""
    image, layout = partial(torch.randn, BATCH), torch.channels_last
    x = image(inputs, side, side).bfloat16().to(memory_format=layout)
    y = image(outputs, side, side).bfloat16().to(memory_format=layout)
    weight = (0.1 * torch.randn(outputs, inputs, 3, 3)).bfloat16().to(memory_format=layout)
    plain = [tensor.contiguous() for tensor in (x, y, weight)]
    wide = [tensor.float() for tensor in (x, y, weight)]
    found: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for way, (x_, y_, weight_) in (("", (x, y, weight)), ("contiguous", plain), ("fp32", wide)):
        found["forward", way] = partial(forward, x_, weight_)
        found["input", way] = partial(input_gradient, x_, y_, weight_)
        found["weight", way] = partial(weight_gradient, x_, y_, weight_)
    found["forward", "products"] = partial(convolution.output, x, weight, WINDOW)
    found["input", "forward kernel"] = partial(input_gradient_by_forward, x, y, weight)
    found["input", "products"] = partial(convolution.input_gradient, x, weight, y, WINDOW)
    found["weight", "products"] = partial(convolution.weight_gradient, x, y, WINDOW)
    if inputs == 3:
        for channels in (4, 8, 16):
            filled = functional.pad(x, (0, 0, 0, 0, 0, channels - 3)).contiguous(memory_format=layout)
            kernel = functional.pad(weight, (0, 0, 0, 0, 0, channels - 3)).contiguous(memory_format=layout)
            found["forward", f"padded to {channels}"] = partial(forward, filled, kernel)
            found["weight", f"padded to {channels}"] = partial(weight_gradient, filled, y, kernel)
    return found


def check(found: dict[tuple[str, str], Callable[[], Tensor]]) -> None:
    """Raise unless all ways of a pass give the same numbers, as far as bf16 can tell."""
    for (step, way), action in found.items():
        own, other = found[step, ""]().float(), action().float()
        other = other[:, : own.shape[1]]  # of padded channels, those that are there
        error = float((own - other).abs().max() / own.abs().max())
        if error > 0.03:
            raise RuntimeError(f"{way} computes another {step}: off by {error:.1%}")


def convolutions(options: argparse.Namespace) -> None:
    """Print and record the ratios of every way, shape by shape."""
    print(HEADS["pass"])
    for side, inputs, outputs in SHAPES[:: 4 if options.quick else 1]:
        found = ways(side, inputs, outputs)
        check(found)
        head = machine()
        times, others = interleaved(found, options.rounds, LEAST_S)
        for step in ("forward", "input", "weight"):
            own = times[step, ""]
            ratios = {
                way: statistics.median(a / b for a, b in zip(own, taken))
                for (other, way), taken in times.items()
                if other == step and way
            }
            row = {"side": side, "inputs": inputs, "outputs": outputs, "pass": step, "ratios": ratios}
            row |= {"own_seconds": statistics.median(own), "rounds": options.rounds, "others": others, **head}
            print(line(row), flush=True)
            record(NAME, row, quick=options.quick)


def contestants(name: str, width: float, x: Tensor, shrunk: bool) -> tuple[dict[str, Callable[[], None]], Kernels]:
    """Return a training step by PyTorch's kernels and one by those that timing chooses; and which these are."""
    actions: dict[str, Callable[[], None]] = {}
    chosen = Kernels()
    for way in ("own", "products"):
        model = build(name, classes=10, width=width).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        if way == "products":  # chosen as a run does it, for the dense network
            chosen, _ = choose(model, x, torch.bfloat16)
            install(model, chosen, x)
        if shrunk:
            eb.shrink(model, eb.draw(model, 0.5, scope="layer"), x[:1], optimizer=optimizer)
        actions[way] = stepper(model, optimizer, x, torch.arange(len(x)) % 10, True)
    return actions, chosen


def steps(options: argparse.Namespace) -> None:
    """Print and record whole steps with the kernels that timing chooses, alone and beside a busy process."""
    x = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    print(f"\n{HEADS['network']}")
    for name, width in NETWORKS[:1] if options.quick else NETWORKS:
        for shrunk in (False, True):
            actions, chosen = contestants(name, width, x, shrunk)
            about = {"network": name, "width": width, "shrunk": shrunk, "chosen": asdict(chosen)}
            record_steps(about, actions, options.rounds, quick=options.quick)
    name, width = BUSY
    actions, chosen = contestants(name, width, x, False)
    with neighbour():
        about = {"network": name, "width": width, "shrunk": False, "busy": True, "chosen": asdict(chosen)}
        record_steps(about, actions, BUSY_ROUNDS, quick=options.quick)


def record_steps(about: dict[str, Any], actions: dict[str, Callable[[], None]], rounds: int, *, quick: bool) -> None:
    """Time two kinds of step in turns; print and record what they took."""
    head = machine()
    # a process that is busy on purpose is no disturbance
    times, others = interleaved(actions, rounds, others=(lambda: 0.0) if about.get("busy") else None)
    row = {
        **about, "step_seconds": statistics.median(times["own"]), "rounds": rounds, "others": others,
        "ratio": statistics.median(a / b for a, b in zip(times["own"], times["products"])), **head,
    }  # fmt: skip
    print(line(row), flush=True)
    record(NAME, row, quick=quick)


@contextmanager
def neighbour() -> Iterator[None]:
    """Let another process keep one processor busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def line(row: dict[str, Any]) -> str:
    """Return one row as a line of its table."""
    if "pass" in row:
        ratios = ", ".join(f"{way} {ratio:.2f}x" for way, ratio in row["ratios"].items())
        cells = [f"{row['side']}", f"{row['inputs']} to {row['outputs']}", row["pass"]]
        return "| " + " | ".join([*cells, f"{1e3 * row['own_seconds']:.3f}", ratios]) + " |"
    if "ratio" not in row:  # of a version that knew weight gradients on maps of up to 2x2 and 4x4 alone
        name, ratio = f"vgg16 x {row['width']:g}, {row['network']}", row["ratios"]["up to 4"]
    else:
        name, ratio = f"{row['network']} x {row['width']:g}{', shrunk by layer' * row['shrunk']}", row["ratio"]
        name += ", beside a busy process" * row.get("busy", False)
    return f"| {name} | {1e3 * row['step_seconds']:.1f} | {ratio:.2f}x |"


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Return the newest session of each machine as Markdown: convolutions, then whole steps."""
    return session_tables(found, HEADS, line)


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    return read_rounds(__doc__, words)


def main() -> None:
    time_or_show(read(), NAME, tables, convolutions, steps)


if __name__ == "__main__":
    main()
