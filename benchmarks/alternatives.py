"""Question: would another way to compute the worst convolutions of VGG-16 make its training step faster here?

A 3x3 convolution's weight gradient is the one pass for which oneDNN (3.12, as in PyTorch 2.13) has no matrix-product
kernel on a CPU with AVX-512 but without AMX: it takes an older one (``jit_bf16``) that transposes each image apart, and
lets its threads meet at a barrier for each. On maps of 2x2 positions that costs more than the arithmetic, and much more
where another process takes one of the processors. Every way below is timed against PyTorch's own on the same operands
(bf16, channels_last, batch 128), in turns, and must give the same numbers:

- ``contiguous``, ``fp32``: the same operator on another layout or format;
- ``forward kernel``: the gradient of the input as a forward convolution with the turned weight;
- ``products``: unfold the image (forward, weight), and multiply matrices over batch and positions;
- ``one product``: on 2x2 maps every input meets every output, so that one product holds all taps;
- ``padded``: the first layer with its 3 channels filled up with zeros to 4, 8 and 16.

Then whole steps of VGG-16-BN at half and full width, dense and shrunk layer by layer to half, with the weight gradient
of small maps as products.

    python benchmarks/alternatives.py                  # some four minutes
    python benchmarks/alternatives.py --quick          # a look of about a minute; nothing is recorded
    python benchmarks/alternatives.py --table          # the tables of the newest rows
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import interleaved, machine, rows
from records import by_machine, newest, record
from roofline import BATCH, LEAST_S, SHAPE
from step_times import network, stepper
from tables import origin
from torch import Tensor, nn
from torch.nn import functional

import earlybird as eb
from earlybird.allocator import keep_freed

NAME = "alternatives"
SHAPES = (
    (32, 3, 32), (32, 32, 32), (16, 64, 64), (8, 96, 96), (8, 128, 128), (4, 112, 112), (4, 128, 128), (4, 256, 256),
    (2, 112, 112), (2, 128, 128), (2, 256, 256), (2, 512, 512),
)  # fmt: skip
HEADS = {
    "pass": "| side | channels | pass | PyTorch's own, ms | own / other way |\n| --- | --- | --- | --- | --- |",
    "network": "| width | network | ms a step | products on 2x2 | on 2x2 and 4x4 |\n| --- | --- | --- | --- | --- |",
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


def rows_of(x: Tensor) -> Tensor:
    """Return a channels_last ``x`` ``(N, C, H, W)`` as a matrix ``(N * H * W, C)``, without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def unfolded(x: Tensor) -> Tensor:
    """Return what each position of ``x`` ``(N, C, H, W)`` sees through a 3x3 window: ``(N * H * W, 9 * C)``."""
    batch, channels, height, width = x.shape
    padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (N, H + 2, W + 2, C)
    image, row, column, channel = padded.stride()
    windows = padded.as_strided(
        (batch, height, width, 3, 3, channels), (image, row, column, row, column, channel)
    )  # (N, H, W, 3, 3, C)
    return windows.reshape(-1, 9 * channels)


def forward_as_products(x: Tensor, weight: Tensor) -> Tensor:
    """`forward` as one product over batch and positions."""
    batch, _, height, width = x.shape
    product = unfolded(x) @ weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
    return product.view(batch, height, width, -1).permute(0, 3, 1, 2)


def input_gradient_by_forward(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """`input_gradient` as a forward convolution of ``y`` with the turned weight."""
    return forward(y, weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last))


def weight_gradient_as_products(x: Tensor, y: Tensor) -> Tensor:
    """`weight_gradient` as one product over batch and positions."""
    product = rows_of(y).t() @ unfolded(x)  # (O, 9 * I)
    return product.view(y.shape[1], 3, 3, x.shape[1]).permute(0, 3, 1, 2)


def weight_gradient_of_2x2(x: Tensor, y: Tensor) -> Tensor:
    """`weight_gradient` on maps of 2x2, from one product over the batch that pairs every input with every output."""
    batch, inputs, outputs = x.shape[0], x.shape[1], y.shape[1]
    flat = [tensor.permute(0, 2, 3, 1).reshape(batch, -1) for tensor in (y, x)]
    pairs = (flat[0].t() @ flat[1]).view(2, 2, outputs, 2, 2, inputs)  # (H, W, O, H, W, I)
    gradient = pairs.new_zeros(outputs, 3, 3, inputs)
    for row in range(2):
        for column in range(2):  # of the output; its window begins one before it
            gradient[:, 1 - row : 3 - row, 1 - column : 3 - column] += pairs[row, column]
    return gradient.permute(0, 3, 1, 2)


class SmallMap(torch.autograd.Function):
    """The 3x3 convolution, its weight gradient computed by matrix products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gradient: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient = gradient
        return forward(x, weight)

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return input_gradient(x, y, weight), ctx.gradient(x, y), None


def with_products(model: nn.Module, most: int) -> nn.Module:
    """Let 3x3 convolutions on maps of at most ``most`` x ``most`` use `SmallMap` under autocast; in place."""

    def convolve(old: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.shape[-1] > most or not torch.is_autocast_enabled("cpu"):
            return old(x, weight, bias)
        gradient = weight_gradient_of_2x2 if x.shape[-1] == 2 else weight_gradient_as_products
        return SmallMap.apply(x.bfloat16(), weight.bfloat16(), gradient)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module._conv_forward = partial(convolve, module._conv_forward)  # type: ignore[method-assign]
    return model


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
    found["forward", "products"] = partial(forward_as_products, x, weight)
    found["input", "forward kernel"] = partial(input_gradient_by_forward, x, y, weight)
    found["weight", "products"] = partial(weight_gradient_as_products, x, y)
    if side == 2:
        found["weight", "one product"] = partial(weight_gradient_of_2x2, x, y)
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


def steps(options: argparse.Namespace) -> None:
    """Print and record whole steps with the weight gradient of small maps as products."""
    x, y = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last), torch.arange(BATCH) % 10
    print(f"\n{HEADS['network']}")
    for width in (0.5,) if options.quick else (0.5, 1.0):
        for name in ("dense", "ticket_layer"):
            actions = {}
            for most in (0, 2, 4):
                model, optimizer = network(width, tuned=True)
                if name == "ticket_layer":
                    eb.shrink(model, eb.draw(model, 0.5, scope="layer"), x[:1], optimizer=optimizer)
                actions[most] = stepper(with_products(model, most), optimizer, x, y, True)
            head = machine()
            times, others = interleaved(actions, options.rounds)
            ratios = {
                f"up to {most}": statistics.median(a / b for a, b in zip(times[0], times[most])) for most in (2, 4)
            }
            row = {"width": width, "network": name, "step_seconds": statistics.median(times[0]), "ratios": ratios}
            row |= {"rounds": options.rounds, "others": others, **head}
            print(line(row), flush=True)
            record(NAME, row, quick=options.quick)


def line(row: dict[str, Any]) -> str:
    """Return one row as a line of its table."""
    if "pass" in row:
        ratios = ", ".join(f"{way} {ratio:.2f}x" for way, ratio in row["ratios"].items())
        cells = [f"{row['side']}", f"{row['inputs']} to {row['outputs']}", row["pass"]]
        return "| " + " | ".join([*cells, f"{1e3 * row['own_seconds']:.3f}", ratios]) + " |"
    ratios = " | ".join(f"{row['ratios'][most]:.3f}x" for most in ("up to 2", "up to 4"))
    return f"| {row['width']:g} | {row['network']} | {1e3 * row['step_seconds']:.1f} | {ratios} |"


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Return the newest session of each machine as Markdown: convolutions, then whole steps."""
    parts = []
    for _, own in by_machine(found):
        mine = newest(own)
        parts.append(origin(mine))
        for key, head in HEADS.items():
            lines = [line(row) for row in mine if key in row]
            parts += ["\n".join([head, *lines])] if lines else []
    return "\n\n".join(parts)


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds; nothing is recorded")
    parser.add_argument("--table", action="store_true", help="print the tables of the newest rows and stop")
    options = parser.parse_args(words)
    if options.quick:
        options.rounds = 3
    return options


def main() -> None:
    options = read()
    if options.table:
        print(tables(rows(NAME)))
        return
    keep_freed()  # as `earlybird train` does
    convolutions(options)
    steps(options)


if __name__ == "__main__":
    main()
