"""Question: how much of what this machine can do does a training step of the shrunk VGG-16 reach, and what is lost?

VGG-16-BN on 32x32 images, batch 128, bf16 + channels_last, at full and half width: dense, and tickets at keep 0.5 drawn
after a few real steps on CIFAR-10, ranked over the network and layer by layer. Every operation of a step is timed by
itself (convolutions forward, backward to the input and backward to the weight; batch norm, ReLU, pooling forward and
backward; the optimizer), and so are whole steps. All of it, and what the machine can do, is timed in turn within one
process; medians count.

    attainable seconds of an operation = max(FLOPs / peak, bytes / bandwidth)      (Williams et al., CACM 2009)

Peak is the fastest bf16 matrix product found in a sweep of sizes, bandwidth that of a copy with the operation's working
set. Bytes are counted once for each tensor that is read or written (batch norm in training reads its input twice, and
so does its backward pass). FLOPs are twice the MACs that do not meet padding, since a kernel can leave those out: on
2x2 maps 44 % of what `earlybird.cost.count` has, on 4x4 maps 69 %, on 32x32 maps 96 %. An operation that is timed by
itself finds its operands in the cache if they fit, as the one before it in a step would often leave them.

    EARLYBIRD_DATA=... python benchmarks/roofline.py             # all parts, some six minutes
    EARLYBIRD_DATA=... python benchmarks/roofline.py layers rounding --width 0.5
    python benchmarks/roofline.py channels --quick               # a look of about a minute; nothing is recorded
    python benchmarks/roofline.py --draw docs/images             # the figures, from the rows

- ``layers``: the table a layer, and the sums of whole steps;
- ``channels``: efficiency of a 3x3 convolution against its channels, also those that are no multiple of 16;
- ``rounding``: whole steps of one ticket with its widths rounded up to multiples of 1, 8, 16 and 32.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from common import check_known, interleaved, machine, rows
from figures import COLOURS, Axis, Series, chart
from records import by_machine, newest, record
from step_times import batches, early_ticket, network, stepper
from tables import origin
from torch import Tensor, nn

import earlybird as eb
from earlybird.allocator import keep_freed
from earlybird.cost.count import count

NAME = "roofline"
BATCH = 128
SHAPE: tuple[Any, ...] = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)  # of a convolution: stride, padding, ..., groups
LEAST_S = 4e-3  # shorter operations are repeated within a round
GEMMS = (512, 1024, 1536, 2048, 3072)
COPIES = (2**19, 2**22, 2**24, 2**28)  # bytes read and written: two that fit level 2 or 3 of the cache, two that do not
CHANNELS = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 144, 160, 168, 176, 192, 200,
            208, 224, 250, 256, 300, 304, 320, 384, 440, 448, 512)  # fmt: skip
SIDES = {32: 128, 8: 512}  # image side to the most channels that are tried there
ROUNDINGS = (1, 8, 16, 32)
PHASES = ("forward", "input", "weight")  # of a convolution
PARTS_OF_A_STEP = (
    *(f"convolution {phase}" for phase in PHASES),
    *(f"{kind} {phase}" for kind in ("norm", "relu", "pool") for phase in ("forward", "backward")),
    "optimizer",
)


@dataclass(frozen=True)
class Operation:
    """One operation of a training step, on a batch of `BATCH` bf16 images in channels_last.

    Attributes:
        kind: ``'convolution'`` (3x3, padding 1), ``'norm'``, ``'relu'`` or ``'pool'`` (2x2).
        phase: ``'forward'``, ``'input'`` or ``'weight'`` (the two gradients of a convolution), ``'backward'``.
        side: Height and width of the input, pixels.
        inputs: Channels that are read.
        outputs: Channels that are written.
    """

    kind: str
    phase: str
    side: int
    inputs: int
    outputs: int

    @property
    def counted_macs(self) -> int:
        """Multiply-accumulates of the whole batch with padding; those of element by element work are not counted."""
        return BATCH * self.side**2 * 9 * self.inputs * self.outputs if self.kind == "convolution" else 0

    @property
    def flops(self) -> int:
        """Floating-point operations of the whole batch that cannot be left out: without padding."""
        # of the three taps in a direction, one falls beside the image at either end
        return 2 * self.counted_macs * (3 * self.side - 2) ** 2 // (9 * self.side**2)

    @property
    def moved(self) -> int:
        """Bytes that have to be read and written."""
        positions = BATCH * self.side**2
        if self.kind == "convolution":
            return 2 * (positions * (self.inputs + self.outputs) + 9 * self.inputs * self.outputs)
        image = 2 * positions * self.inputs
        if self.kind == "pool":  # a quarter of the positions stays, with a 64-bit index each
            return image + image // 4 + 8 * positions * self.inputs // 4
        return image * {("norm", "forward"): 3, ("norm", "backward"): 5, ("relu", "forward"): 2}.get(
            (self.kind, self.phase), 3
        )

    def make(self) -> Callable[[], object]:
        """Return what does it once, on operands of its own."""
        x, y = _image(self.inputs, self.side), _image(self.outputs, self.side)
        if self.kind == "convolution":
            weight = torch.randn(self.outputs, self.inputs, 3, 3).bfloat16().to(memory_format=torch.channels_last)
            if self.phase == "forward":
                return lambda: torch.ops.aten.convolution(x, weight, None, *SHAPE)
            wanted = (self.phase == "input", self.phase == "weight", False)
            return lambda: torch.ops.aten.convolution_backward(y, x, weight, None, *SHAPE, wanted)
        if self.kind == "norm":
            scale, shift, mean, variance = (torch.ones(self.inputs) for _ in range(4))
            if self.phase == "forward":
                return lambda: torch.native_batch_norm(x, scale, shift, mean, variance, True, 0.1, 1e-5)
            _, own_mean, deviation = torch.native_batch_norm(x, scale, shift, mean, variance, True, 0.1, 1e-5)
            return lambda: torch.ops.aten.native_batch_norm_backward(
                y, x, scale, mean, variance, own_mean, deviation, True, 1e-5, (True, True, True)
            )
        if self.kind == "relu":
            if self.phase == "forward":
                return lambda: torch.relu_(x)
            return lambda: torch.ops.aten.threshold_backward(y, x, 0)
        pooled, where = torch.ops.aten.max_pool2d_with_indices(x, (2, 2), (2, 2))
        if self.phase == "forward":
            return lambda: torch.ops.aten.max_pool2d_with_indices(x, (2, 2), (2, 2))
        return lambda: torch.ops.aten.max_pool2d_with_indices_backward(
            pooled, x, (2, 2), (2, 2), (0, 0), (1, 1), False, where
        )


def _image(channels: int, side: int) -> Tensor:
    return torch.randn(BATCH, channels, side, side).bfloat16().to(memory_format=torch.channels_last)


def operations(model: nn.Module, images: Tensor) -> dict[str, list[Operation]]:
    """Return layer name to the operations of a training step in it, for convolutions, norms, ReLUs and poolings."""
    found: dict[str, list[Operation]] = {}

    def note(name: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        _, inputs, side, _ = arguments[0].shape
        kind = {nn.Conv2d: "convolution", nn.BatchNorm2d: "norm", nn.ReLU: "relu", nn.MaxPool2d: "pool"}[type(module)]
        phases = ["forward", "backward"]
        if kind == "convolution":  # nobody asks for the gradient of the images
            phases = ["forward", "input", "weight"] if found else ["forward", "weight"]
        found[name] = [Operation(kind, phase, side, inputs, output.shape[1]) for phase in phases]

    handles = [
        module.register_forward_hook(lambda module, arguments, output, name=name: note(name, module, arguments, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.ReLU | nn.MaxPool2d)
    ]
    with torch.no_grad():
        model(images[:1])
    for handle in handles:
        handle.remove()
    return found


@dataclass(frozen=True)
class Machine:
    """What the machine can do, measured.

    Attributes:
        peak: FLOP/s of the fastest matrix product.
        copies: Bytes of working set to bytes/s, smallest first.
    """

    peak: float
    copies: dict[int, float]

    def bandwidth(self, moved: int) -> float:
        """Return the bytes/s of a copy whose working set is the next larger one that was measured."""
        return next((speed for size, speed in self.copies.items() if moved <= size), list(self.copies.values())[-1])

    def attainable(self, flops: int, moved: int) -> float:
        """Return the least seconds for ``flops`` that move ``moved`` bytes."""
        return max(flops / self.peak, moved / self.bandwidth(moved))


def product(size: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    """Return what multiplies two square matrices."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    return lambda: torch.matmul(left, right)


def copying(moved: int) -> Callable[[], object]:
    """Return what copies, with ``moved`` bytes read and written."""
    source, target = (torch.zeros(moved // 8) for _ in range(2))  # four bytes a number, each read and written
    return lambda: target.copy_(source)


def peaks(options: argparse.Namespace) -> int:
    """Sweep matrix products on one and on all threads; print and return the size that is fastest on all."""
    everything = torch.get_num_threads()
    best: dict[int, tuple[float, int]] = {}
    for threads in sorted({1, everything}):
        torch.set_num_threads(threads)
        head = machine()
        for dtype in (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            products = {size: product(size, dtype) for size in options.gemms}
            times, others = interleaved(products, options.rounds, LEAST_S)
            speeds = {size: 2 * size**3 / statistics.median(taken) for size, taken in times.items()}
            fastest = max(speeds, key=lambda size: speeds[size])
            if dtype == torch.bfloat16:
                best[threads] = speeds[fastest], fastest
            print(f"matrix product, {name}, {threads} threads: {speeds[fastest] / 1e9:.0f} GFLOP/s at {fastest}")
            flops = {str(size): round(speed) for size, speed in speeds.items()}
            row = {"part": "peak", "dtype": name, "flops": flops, "others": others, **head}
            record(NAME, row, quick=options.quick)
    torch.set_num_threads(everything)
    return best[everything][1]


def able(options: argparse.Namespace, size: int) -> dict[Any, Callable[[], object]]:
    """Return what is timed among the operations to know what the machine can do at that moment."""
    return {("product", size): product(size), **{("copy", moved): copying(moved) for moved in options.copies}}


def as_machine(times: dict[Any, list[float]]) -> Machine:
    """Return what `able`'s times stand for."""
    median = {key: statistics.median(taken) for key, taken in times.items() if isinstance(key, tuple)}
    speeds = [2 * size**3 / seconds for (kind, size), seconds in median.items() if kind == "product"]
    copies = {moved: moved / seconds for (kind, moved), seconds in median.items() if kind == "copy"}
    return Machine(max(speeds), dict(sorted(copies.items())))


def layers(options: argparse.Namespace, size: int) -> None:
    """Time every operation of every network, and whole steps, of one width after the other."""
    loader = batches()
    x, y = next(loader.epoch(0))
    for width in options.widths:
        networks = {"dense": network(width, tuned=True)}
        for name, scope in (("ticket", "network"), ("ticket_layer", "layer")):
            networks[name] = early_ticket(width, loader, options.search_steps, scope=scope)[:2]
        found = {name: operations(model, x) for name, (model, _) in networks.items()}
        actions: dict[Any, Callable[[], object]] = able(options, size)
        actions |= {one: one.make() for of in found.values() for many in of.values() for one in many}
        for name, (model, optimizer) in networks.items():
            actions["step", name] = stepper(model, optimizer, x, y, True)
            actions["optimizer", name] = updater(model)
        head = machine()
        times, others = interleaved(actions, options.rounds, LEAST_S)
        able_to = as_machine(times)
        for name, (model, _) in networks.items():
            report(options, width, name, model, x, found[name], times, able_to, {**head, "others": others})


def updater(model: nn.Module) -> Callable[[], object]:
    """Return one step of SGD with Nesterov momentum on a copy of ``model`` whose gradients stay as they are."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, nesterov=True, weight_decay=5e-4).step


def report(
    options: argparse.Namespace,
    width: float,
    name: str,
    model: nn.Module,
    images: Tensor,
    found: dict[str, list[Operation]],
    times: dict[Any, list[float]],
    able_to: Machine,
    head: dict[str, Any],
) -> None:
    """Print the table and the sums of one network, and record them."""
    taken = {key: statistics.median(values) for key, values in times.items()}
    step, best = taken["step", name], min(times["step", name])
    copies = ", ".join(f"{speed / 1e9:.0f} GB/s ({moved / 2**20:g} MiB)" for moved, speed in able_to.copies.items())
    print(f"\n**{name}, width {width:g}**: peak {able_to.peak / 1e9:.0f} GFLOP/s, copies {copies}\n")
    print("| layer | channels | side | MACs counted | forward | input | weight | GFLOP/s | share of attainable |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for layer, many in found.items():
        if many[0].kind == "convolution":
            print(convolution_line(layer, many, taken, able_to))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    update = 20 * parameters  # bytes: weight, gradient and momentum are read, weight and momentum written
    parts: dict[str, list[tuple[float, float, int, int]]] = {part: [] for part in PARTS_OF_A_STEP}
    for one in (one for many in found.values() for one in many):
        parts[f"{one.kind} {one.phase}"].append(
            (taken[one], able_to.attainable(one.flops, one.moved), one.flops, one.moved)
        )
    parts["optimizer"].append((taken["optimizer", name], able_to.attainable(0, update), 0, update))
    print("\n| part of the step | ms | share of the step | share of attainable | GFLOP/s | GB/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    sums = {part: [sum(column) for column in zip(*values)] for part, values in parts.items()}
    for part, (seconds, least, flops, moved) in sums.items():
        speed = f"{flops / seconds / 1e9:.0f}" if flops else ""
        print(f"| {part} | {1e3 * seconds:.2f} | {seconds / step:.1%} | {least / seconds:.0%} | {speed} | "
              f"{moved / seconds / 1e9:.0f} |")  # fmt: skip
    rest = step - sum(own[0] for own in sums.values())
    print(f"| rest (casts, classifier, loss, Python, cache) | {1e3 * rest:.2f} | {rest / step:.1%} | | | |")
    flops, least = (sum(own[column] for own in sums.values()) for column in (2, 1))
    counted = BATCH * count(model, images).training_macs
    shares = {"of_peak": flops / step / able_to.peak, "of_roofline": least / step}
    print(
        f"\nstep {1e3 * step:.1f} ms (best {1e3 * best:.1f}), {counted / 1e9:.2f} GMAC counted. Without padding: "
        f"{flops / 1e9:.1f} GFLOP, {flops / step / 1e9:.0f} GFLOP/s, {shares['of_peak']:.0%} of the peak."
    )
    print(f"Its operations at the roofline would take {1e3 * least:.1f} ms: {shares['of_roofline']:.0%} attained.")
    row = {
        "part": "layers", "width": width, "network": name, "peak": able_to.peak, "copies": able_to.copies,
        "step_seconds": step, "step_best": best, "counted_macs": counted, "flops": flops, **shares,
        "rounds": options.rounds,
        "sums": {part: [round(own[0], 7), round(own[1], 7)] for part, own in sums.items()},
        "operations": [[layer, *astuple(one), round(taken[one], 8)] for layer, many in found.items() for one in many],
        **head,
    }  # fmt: skip
    record(NAME, row, quick=options.quick)


def convolution_line(layer: str, many: Sequence[Operation], taken: dict[Any, float], able_to: Machine) -> str:
    """Return one convolution as a line of the table."""
    by_phase = {one.phase: f"{1e3 * taken[one]:.2f} ms" for one in many}
    speeds = "/".join(f"{one.flops / taken[one] / 1e9:.0f}" for one in many)
    shares = "/".join(f"{able_to.attainable(one.flops, one.moved) / taken[one]:.0%}" for one in many)
    one = many[0]
    cells = [layer, f"{one.inputs} to {one.outputs}", str(one.side), f"{one.counted_macs / 1e6:,.0f} M"]
    cells += [by_phase.get(phase, "") for phase in PHASES]
    return "| " + " | ".join([*cells, speeds, shares]) + " |"


def channels(options: argparse.Namespace, size: int) -> None:
    """Time a square convolution against its channels."""
    able_at = able(options, size)
    for side, most in SIDES.items():
        widths = [width for width in options.channels if width <= most]
        every = {
            (width, phase): Operation("convolution", phase, side, width, width) for width in widths for phase in PHASES
        }
        head = machine()
        actions = {**able_at, **{one: one.make() for one in every.values()}}
        times, others = interleaved(actions, options.rounds, LEAST_S)
        able_to = as_machine(times)
        taken = {key: statistics.median(times[one]) for key, one in every.items()}
        together = {width: sum(taken[width, phase] for phase in PHASES) for width in widths}
        print(f"\nside {side}: convolution of n to n channels, share of the peak ({able_to.peak / 1e9:.0f} GFLOP/s)\n")
        print("| channels | forward | input | weight | all three, ms | rounded to 8 | to 16 | to 32 |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for width in widths:
            shares = [f"{every[width, phase].flops / taken[width, phase] / able_to.peak:.0%}" for phase in PHASES]
            rounded = [-(-width // multiple) * multiple for multiple in (8, 16, 32)]
            gains = [
                f"{together[width] / together[up]:.2f}x" if up != width and up in together else "" for up in rounded
            ]
            print(f"| {width} | {' | '.join(shares)} | {1e3 * together[width]:.2f} | {' | '.join(gains)} |")
        row = {
            "part": "channels", "side": side, "peak": able_to.peak, "rounds": options.rounds, "others": others,
            "seconds": {phase: {str(width): round(taken[width, phase], 8) for width in widths} for phase in PHASES},
            **head,
        }  # fmt: skip
        record(NAME, row, quick=options.quick)


def rounding(options: argparse.Namespace, _: int) -> None:
    """Time whole steps of one ticket, its widths rounded up to several multiples."""
    loader = batches()
    x, y = next(loader.epoch(0))
    for width in options.widths:
        ticket = early_ticket(width, loader, options.search_steps, round_to=1)[2]
        steps, costs = {}, {}
        for multiple in ROUNDINGS:
            model, optimizer = network(width, tuned=True)
            eb.shrink(model, ticket, x[:1], optimizer=optimizer, round_to=multiple)
            steps[multiple], costs[multiple] = stepper(model, optimizer, x, y, True), count(model, x)
        head = machine()
        times, others = interleaved(steps, options.rounds)
        print(f"\nwidth {width:g}, ticket over the network, keep 0.5, widths rounded up\n")
        print("| multiple of | parameters | forward MACs | ms a step | against 1 | GMAC/s |")
        print("| --- | --- | --- | --- | --- | --- |")
        for multiple in ROUNDINGS:
            seconds, cost = statistics.median(times[multiple]), costs[multiple]
            gain = statistics.median(a / b for a, b in zip(times[1], times[multiple]))
            speed = BATCH * cost.training_macs / seconds
            cells = [
                f"{multiple}", f"{cost.parameters / 1e6:.2f} M", f"{cost.forward_macs / 1e6:.1f} M",
                f"{1e3 * seconds:.1f}", f"{gain:.2f}x", f"{speed / 1e9:.0f}",
            ]  # fmt: skip
            print("| " + " | ".join(cells) + " |")
            row = {
                "part": "rounding", "width": width, "multiple": multiple, "step_seconds": seconds, "against_1": gain,
                "parameters": cost.parameters, "forward_macs": cost.forward_macs, "rounds": options.rounds,
                "others": others, **head,
            }  # fmt: skip
            record(NAME, row, quick=options.quick)


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Return what whole steps reach and what rounding brings, of the newest session of each, as Markdown."""
    parts = []
    for _, own in by_machine([row for row in found if row["part"] in ("layers", "rounding")]):
        mine = newest(own, "part", "width")
        steps = [row for row in mine if row["part"] == "layers"]
        rounded = [row for row in mine if row["part"] == "rounding"]
        lines = [origin(mine)]
        if steps:
            lines += [
                "",
                "| width | network | ms a step | GFLOP/s | share of the fastest matrix product | of the roofline |",
                "| --- | --- | --- | --- | --- | --- |",
            ]
        lines += [
            f"| {row['width']:g} | {row['network']} | {1e3 * row['step_seconds']:.1f} "
            f"| {row['flops'] / row['step_seconds'] / 1e9:.0f} | {row['of_peak']:.0%} | {row['of_roofline']:.0%} |"
            for row in steps
        ]
        if rounded:
            lines += [
                "", "Widths of one ticket, rounded up:", "",
                "| width | multiple of | weights | forward MACs | ms a step | 1 / this |",
                "| --- | --- | --- | --- | --- | --- |",
            ]  # fmt: skip
        lines += [
            f"| {row['width']:g} | {row['multiple']} | {row['parameters'] / 1e6:.2f} M "
            f"| {row['forward_macs'] / 1e6:.1f} M | {1e3 * row['step_seconds']:.1f} | {row['against_1']:.2f}x |"
            for row in rounded
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def draw(folder: Path) -> dict[str, str]:
    """Write the figures of the newest rows of each machine into ``folder``; return file to what it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {}
    for part, stem, text, figure in (
        ("layers", "roofline", "Speed against intensity", roofline_figure),
        ("channels", "channels", "Efficiency against channels", channels_figure),
    ):
        for suffix, own in by_machine([row for row in rows(NAME) if row["part"] == part]):
            file = f"{stem}{suffix}.svg"
            (folder / file).write_text(figure(newest(own)), encoding="utf-8")
            named[file] = text
    return named


def roofline_figure(found: Sequence[dict[str, Any]]) -> str:
    """Return GFLOP/s against FLOPs a byte: every convolution of the networks of one session, and the two roofs.

    The roofs are the fastest matrix product and the fastest copy of the largest working set, which no cache holds, in
    that session. An operation whose operands are in the cache can lie above the second.
    """
    groups: dict[str, list[tuple[float, float]]] = {"dense": [], "ticket": [], "ticket_layer": []}
    for row in found:
        for _, *fields, seconds in row["operations"]:
            one = Operation(*fields)
            if one.kind == "convolution":
                groups[row["network"]].append((one.flops / one.moved, one.flops / seconds / 1e9))
    peak = max(row["peak"] for row in found)
    slow = max(row["copies"][max(row["copies"], key=int)] for row in found)
    reach = [intensity for points in groups.values() for intensity, _ in points]
    low, ridge, high = min(*reach, peak / slow / 2), peak / slow, max(*reach, 2 * peak / slow)
    memory = [(intensity, intensity * slow / 1e9) for intensity in (low, ridge)]
    labels = {"dense": "dense", "ticket": "ticket", "ticket_layer": "ticket by layer"}
    roof = {"colour": COLOURS[5], "dots": False, "dashed": True}
    series = [
        Series(points=memory, label="roof from main memory", **roof),
        Series(points=[(ridge, peak / 1e9), (high, peak / 1e9)], label="fastest matrix product", **roof),
    ]
    series += [
        Series(points=points, colour=colour, line=False, label=labels[name])
        for (name, points), colour in zip(groups.items(), (COLOURS[5], *COLOURS))
    ]
    xs, ys = ([point[axis] for one in series for point in one.points] for axis in (0, 1))
    return chart(
        series, Axis.around(xs, "FLOPs a byte", log=True), Axis.around(ys, "GFLOP/s", log=True),
        title="Convolutions of VGG-16-BN, batch 128, bf16: speed against intensity", note=small_print(found[-1]),
    )  # fmt: skip


def channels_figure(found: Sequence[dict[str, Any]]) -> str:
    """Return the share of the peak against the channels of a convolution, of the sides of one session."""
    series = []
    for row, dashed in zip(found, (False, True)):
        side = row["side"]
        for (phase, seconds), colour in zip(row["seconds"].items(), COLOURS):
            points = []
            for text, taken in seconds.items():
                one = Operation("convolution", phase, side, int(text), int(text))
                points.append((float(text), 100 * one.flops / taken / row["peak"]))
            series.append(Series(points=points, colour=colour, dashed=dashed, label=f"{phase}, {side}x{side}"))
    xs, ys = ([point[axis] for one in series for point in one.points] for axis in (0, 1))
    return chart(
        series, Axis.around(xs, "channels read and written", log=True), Axis.around(ys, "% of peak", zero=True),
        title="3x3 convolution, batch 128, bf16: efficiency against channels", note=small_print(found[-1]),
    )  # fmt: skip


def small_print(row: dict[str, Any]) -> str:
    """Return where and when a row was measured."""
    return f"{row['device']}, {row['threads']} threads, torch {row['torch']}, {row['date']}"


PARTS = {"layers": layers, "channels": channels, "rounding": rounding}


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--width", type=float, help="one width; default: 1 and 0.5")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--search-steps", type=int, default=20, help="dense steps before the tickets are drawn")
    parser.add_argument("--quick", action="store_true", help="half width, few rounds; nothing is recorded")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="write the figures of the newest rows and stop")
    options = parser.parse_args(words)
    check_known(parser, "part", options.parts, PARTS)
    options.widths = (options.width,) if options.width else (1.0, 0.5)
    options.gemms, options.copies, options.channels = GEMMS, COPIES, CHANNELS
    if options.quick:
        options.rounds, options.search_steps, options.widths = 2, 3, (options.width or 0.5,)
        options.gemms, options.channels = GEMMS[1:4:2], CHANNELS[::3]
    return options


def main() -> None:
    options = read()
    if options.draw:
        if not draw(options.draw):
            sys.exit(f"no rows of layers or channels in results/{NAME}.jsonl; run the benchmark first")
        return
    keep_freed()  # as `earlybird train` does
    size = peaks(options)
    for name in options.parts or PARTS:
        PARTS[name](options, size)


if __name__ == "__main__":
    main()
