"""Question: would a real int8 forward pass of a convolution be faster here than the one in bf16?

PyTorch 2.13 has three kinds of int8 kernels on a CPU: oneDNN's convolution (``onednn::qconv2d_pointwise``, bf16 out),
FBGEMM's (``quantized::conv2d``, 8 bits out) and a matrix product (``aten::_int_mm``, 32 bits out). With AVX-512 VNNI an
instruction multiplies twice as many int8 as bf16 numbers. Around them, numbers have to become codes: those of the input
at each pass, those of the weight at each step of training, since it has moved. 3x3 convolutions, batch 128,
channels_last, inputs as after a ReLU; each way is timed in turn with bf16 on the same operands, and must give the same
numbers:

- ``simulated``: operands rounded to 8 bits, multiplied in bf16: what `earlybird.precision` does;
- ``oneDNN``, ``FBGEMM``, ``product``: int8 alone, codes and packed weights at hand (the product unfolds its input);
- ``oneDNN, evaluation``: codes of the input by a range that is known, the weight packed before;
- ``oneDNN, training``: range and codes of the input, codes of the weight, packed anew: the whole forward pass of
  `earlybird.precision.int8`.

Then whole training steps in bf16, and with the forward pass of wide convolutions in int8 (``--forward-ladder int8``).

    python benchmarks/int8_forward.py                  # some three minutes
    python benchmarks/int8_forward.py --quick          # a few shapes, one network; nothing is recorded
    python benchmarks/int8_forward.py --table          # the tables of the newest rows
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from alternatives import WINDOW, forward
from common import interleaved, machine, read_rounds
from records import record, time_or_show
from roofline import BATCH, LEAST_S
from step_times import stepper
from tables import session_tables
from torch import Tensor, nn

from earlybird.kernels.convolution import unfolded
from earlybird.models import build
from earlybird.precision.int8 import convolve
from earlybird.precision.progressive import ProgressivePrecision
from earlybird.precision.quantize import quantise, range_of

NAME = "int8_forward"
SHAPES = ((32, 16, 16), (32, 64, 64), (16, 32, 32), (16, 128, 128), (8, 64, 64), (8, 256, 256), (4, 512, 512))
"""Side, input and output channels: of ResNet-20, and of VGG-16."""
WAYS = ("simulated", "oneDNN", "FBGEMM", "product", "oneDNN, evaluation", "oneDNN, training")
NETWORKS = (("vgg16", 0.5), ("vgg16", 1.0), ("resnet18", 1.0))
"""Name and width factor."""
NETWORK_HEAD = "| network | width | bf16, ms a step | bf16 / int8 |\n| --- | --- | --- | --- |"
_GEOMETRY: tuple[Any, ...] = ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups


class Way(NamedTuple):
    """What computes a convolution, and what makes numbers ``(N, O, H, W)`` of what it returns."""

    action: Callable[[], Tensor]
    numbers: Callable[[Tensor], Tensor] = Tensor.float


def input_codes(x: Tensor, largest: float) -> Tensor:
    """Return the codes 0 .. 255 of numbers from 0 to ``largest``; bf16 has all of these whole numbers."""
    return x.mul(255 / largest).round_().to(torch.uint8)


def weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes -127 .. 127 of a weight, and the step of each output channel, ``(O,)``."""
    steps = weight.float().abs().amax((1, 2, 3), keepdim=True) / 127
    return (weight.float() / steps).round_().to(torch.int8), steps.flatten()


def pack(codes: Tensor, steps: Tensor, x: Tensor, x_step: float) -> Tensor:
    """Return the codes of a weight in the layout that oneDNN's convolution wants for inputs like ``x``."""
    packed: Tensor = torch.ops.onednn.qconv_prepack(codes, steps, x_step, 0, *_GEOMETRY, x.shape)
    return packed


def onednn(codes: Tensor, x_step: float, packed: Tensor, steps: Tensor) -> Tensor:
    """Convolve codes with a packed weight; bf16 comes out."""
    zeros = torch.zeros(len(steps), dtype=torch.int32)
    output: Tensor = torch.ops.onednn.qconv2d_pointwise(
        codes, x_step, 0, packed, steps, zeros, None, *_GEOMETRY, 1.0, 0, torch.bfloat16, "none", [], ""
    )
    return output


def simulated(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve rounded operands in bf16."""
    return forward(quantise(x, 8, symmetric=True), quantise(weight, 8, range_of(weight, 0), symmetric=True))


def ways(x: Tensor, weight: Tensor) -> dict[str, Way]:
    """Return name to way; ``''`` is bf16.

    Args:
        x: Input ``(N, I, H, W)``, bf16, channels_last, not negative.
        weight: ``(O, I, 3, 3)``, the same.
    """
    batch, _, height, width = x.shape
    largest = float(x.amax())
    x_step, (codes, steps) = largest / 255, weight_codes(weight)
    x_codes, packed = input_codes(x, largest), pack(codes, steps, x, x_step)

    whole = forward(x, weight).float()
    y_step = float(whole.amax() - whole.amin()) / 255
    y_zero = round(-float(whole.amin()) / y_step)
    quantised = torch._make_per_tensor_quantized_tensor(x_codes, x_step, 0)
    kernel = torch._make_per_channel_quantized_tensor(codes, steps.double(), torch.zeros(len(steps)).long(), 0)
    held = torch.ops.quantized.conv2d_prepack(kernel, None, [1, 1], [1, 1], [1, 1], 1)

    layer = nn.Conv2d(x.shape[1], len(steps), 3, padding=1, bias=False)
    layer.weight.data = weight.float()

    halves = x_codes.bitwise_right_shift(1).to(torch.int8)  # the product takes operands with a sign only
    matrix = codes.permute(2, 3, 1, 0).reshape(-1, len(steps)).contiguous()
    return {
        "": Way(partial(forward, x, weight)),
        "simulated": Way(partial(simulated, x, weight)),
        "oneDNN": Way(partial(onednn, x_codes, x_step, packed, steps)),
        "FBGEMM": Way(lambda: torch.ops.quantized.conv2d(quantised, held, y_step, y_zero), torch.dequantize),
        "product": Way(
            lambda: torch._int_mm(unfolded(halves, WINDOW), matrix),
            lambda sums: (sums * (2 * x_step * steps)).view(batch, height, width, -1).permute(0, 3, 1, 2),
        ),
        "oneDNN, evaluation": Way(lambda: onednn(input_codes(x, largest), x_step, packed, steps)),
        "oneDNN, training": Way(partial(convolve, x, layer)),
    }


def check(found: dict[str, Way]) -> None:
    """Raise unless all ways give the same numbers, as far as 8 bits can tell."""
    own = found[""].action().float()
    for name, way in found.items():
        error = float((own - way.numbers(way.action())).abs().max() / own.abs().max())
        if error > 0.05:
            raise RuntimeError(f"{name} computes another convolution: off by {error:.1%}")


def convolutions(options: argparse.Namespace) -> None:
    """Print and record the ratios of every way, shape by shape."""
    print(head())
    for side, inputs, outputs in SHAPES[:: 3 if options.quick else 1]:
        x = torch.rand(BATCH, inputs, side, side).bfloat16().to(memory_format=torch.channels_last)
        weight = (0.1 * torch.randn(outputs, inputs, 3, 3)).bfloat16().to(memory_format=torch.channels_last)
        found = ways(x, weight)
        check(found)
        of = machine()
        times, others = interleaved({name: way.action for name, way in found.items()}, options.rounds, LEAST_S)
        ratios = {name: statistics.median(a / b for a, b in zip(times[""], times[name])) for name in WAYS}
        row = {"side": side, "inputs": inputs, "outputs": outputs, "own_seconds": statistics.median(times[""])}
        row |= {"ratios": ratios, "rounds": options.rounds, "others": others, **of}
        print(line(row), flush=True)
        record(NAME, row, quick=options.quick)


def steps_of_networks(options: argparse.Namespace) -> None:
    """Print and record whole training steps, in bf16 and with forward passes in int8."""
    images, labels = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last), torch.arange(BATCH) % 10
    print(f"\n{NETWORK_HEAD}")
    for name, width in NETWORKS[: 1 if options.quick else None]:
        actions = {}
        for ladder in ("bf16", "int8"):
            model = build(name, classes=10, image_size=32, width=width).to(memory_format=torch.channels_last)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)
            if ladder == "int8":
                ProgressivePrecision(forward_ladder="int8").attach(model, optimizer)
            actions[ladder] = stepper(model, optimizer, images, labels, True)
        of = machine()
        times, others = interleaved(actions, options.rounds)
        ratio = statistics.median(a / b for a, b in zip(times["bf16"], times["int8"]))
        row = {"network": name, "width": width, "step_seconds": statistics.median(times["bf16"]), "ratio": ratio}
        row |= {"rounds": options.rounds, "others": others, **of}
        print(line(row), flush=True)
        record(NAME, row, quick=options.quick)


def head() -> str:
    """Return the head of the table: ratios are bf16's time over that of the other way."""
    titles = ["side", "channels", "bf16, ms", *(f"bf16 / {way}" for way in WAYS)]
    return "| " + " | ".join(titles) + " |\n" + "| --- " * len(titles) + "|"


def line(row: dict[str, Any]) -> str:
    """Return one row as a line of its table."""
    if "network" in row:
        return f"| {row['network']} | {row['width']:g} | {1e3 * row['step_seconds']:.1f} | {row['ratio']:.3f}x |"
    cells = [f"{row['side']}", f"{row['inputs']} to {row['outputs']}", f"{1e3 * row['own_seconds']:.3f}"]
    return "| " + " | ".join([*cells, *(f"{row['ratios'][way]:.2f}x" for way in WAYS)]) + " |"


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Return the newest session of each machine as Markdown: convolutions, then whole steps."""
    return session_tables(found, {"side": head(), "network": NETWORK_HEAD}, line)


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    return read_rounds(__doc__, words)


def main() -> None:
    time_or_show(read(), NAME, tables, convolutions, steps_of_networks)


if __name__ == "__main__":
    main()
