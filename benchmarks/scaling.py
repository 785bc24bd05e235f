"""Question: how do step time, memory, shrink time and the detector's cost grow with width, depth, batch and threads?

For every point of a sweep: a training step (bf16, channels_last, SGD with momentum, noise images of 32x32), dense and
shrunk at keep 0.5; the peak memory of such steps above what the process held before; the time of shrinking model and
optimizer; the time the detector adds to a step of the search, its looks (eight an epoch of 50,000 images) spread over
the steps. Times of a sweep are taken in turn within one process, and medians count.

    quantity = factor * x ^ exponent          (least squares of the logarithms, standard error from their residuals)

The shrunk networks keep the channels with the largest filters, widths rounded up to multiples of 8; which channels
they are does not matter for the time of a step. Where a sweep has two points, the exponent has no standard error;
where it has one (threads, on one core), there is no exponent. A peak that cannot be told from what the process held
before is recorded as 0, and left out of the fit.

    python benchmarks/scaling.py                    # all sweeps, some five minutes
    python benchmarks/scaling.py width batch
    python benchmarks/scaling.py --quick            # a look of about a minute; nothing is recorded
    python benchmarks/scaling.py --table            # the tables of the newest rows
    python benchmarks/scaling.py --draw docs/images # the figures, from the newest rows

A sweep that `results/scaling.jsonl` has as a whole, of one session on this machine, is not run again; delete its rows
to repeat it.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import check_known, comparable, interleaved, machine, rows
from figures import COLOURS, Axis, Series, chart
from overheads import resident, time_hooks
from records import by_machine, newest, record
from step_times import stepper
from tables import origin
from torch import Tensor, nn

import earlybird as eb
from earlybird.allocator import give_back, keep_freed
from earlybird.cost.count import count
from earlybird.cost.meters import PeakMemory
from earlybird.models.resnet_cifar import CifarResNet
from earlybird.models.vgg import VGG

NAME = "scaling"
KEEP, ROUND_TO = 0.5, 8
IMAGES = 50_000  # of an epoch, over which the detector's eight looks are spread
FAMILIES: dict[str, Callable[..., nn.Module]] = {"vgg": VGG, "resnet": CifarResNet}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One network and how it is run.

    Attributes:
        family: Of `FAMILIES`.
        depth: Layers, as in the network's name.
        width: Factor on its channels.
        batch: Images in a step.
        threads: CPU threads.
    """

    family: str = "vgg"
    depth: int = 16
    width: float = 0.5
    batch: int = 128
    threads: int = 2

    def images(self) -> Tensor:
        """Return a batch of noise, ``(batch, 3, 32, 32)`` in channels_last."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)

    def build(self, *, shrunk: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the network, dense or cut to its ticket, and its optimizer."""
        model = FAMILIES[self.family](self.depth, width=self.width).to(memory_format=torch.channels_last)
        if shrunk:
            eb.shrink(model, ticket(model), example(), round_to=ROUND_TO)
        return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step(self, *, shrunk: bool) -> Callable[[], None]:
        """Return one training step."""
        labels = torch.arange(self.batch) % 10
        taken = stepper(*self.build(shrunk=shrunk), self.images(), labels, True)

        def step() -> None:
            with threads(self.threads):
                taken()

        return step


def sweeps(most: int) -> dict[str, list[Point]]:
    """Return the points of every sweep on a machine that uses ``most`` threads."""
    return {
        "width": [Point(width=width, threads=most) for width in (0.25, 0.375, 0.5, 0.75, 1.0)],
        "depth": [Point(depth=depth, threads=most) for depth in (11, 16, 19)],
        "resnet-depth": [Point(family="resnet", depth=depth, width=1.0, threads=most) for depth in (20, 32, 44, 56)],
        "batch": [Point(batch=batch, threads=most) for batch in (32, 64, 128, 256, 512)],
        "threads": [Point(threads=number) for number in sorted({1, most})],
    }


ALONG = {"width": "width", "depth": "depth", "resnet-depth": "depth", "batch": "batch", "threads": "threads"}
QUANTITIES = {
    "dense_step_s": "step, dense", "shrunk_step_s": "step, shrunk", "dense_macs": "MACs of a step, dense",
    "shrunk_macs": "MACs of a step, shrunk", "dense_peak_bytes": "peak memory, dense",
    "shrunk_peak_bytes": "peak memory, shrunk", "shrink_s": "shrinking", "detector_s": "detector, a step",
}  # fmt: skip


def example() -> Tensor:
    return torch.zeros(1, 3, 32, 32)


def ticket(model: nn.Module) -> eb.Ticket:
    return eb.draw(model, KEEP, score="magnitude", example_inputs=example(), coupled="group")


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_bytes(point: Point, *, shrunk: bool) -> int:
    """Return the peak memory of two steps, network and optimizer included, above what the process held before."""
    gc.collect()
    give_back()
    before = resident()
    meter = PeakMemory("cpu")
    step = point.step(shrunk=shrunk)
    step()
    step()
    peak = meter.read()
    if peak is None:
        raise RuntimeError(f"the peak of these steps cannot be read here ({meter.name})")
    return max(peak - before, 0)


def shrink_seconds(point: Point, times: int) -> float:
    """Return the median seconds of shrinking a network with its momentum."""
    taken = []
    for _ in range(times):
        model, optimizer = point.build(shrunk=False)
        stepper(model, optimizer, point.images()[:8], torch.arange(8), True)()
        drawn = ticket(model)
        start = time.perf_counter()
        eb.shrink(model, drawn, example(), optimizer=optimizer, round_to=ROUND_TO)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def detector_seconds(point: Point, times: int) -> float:
    """Return what the search adds to a step: its hooks, and its looks spread over the steps between them."""
    model, optimizer = point.build(shrunk=False)
    steps_per_epoch = IMAGES // point.batch
    # a window that is never full: looks at unchanged scores would agree, and draw
    search = eb.EarlyBird(keep=KEEP, skip="1000000it", deadline=None, window=times + 2).attach(
        model, optimizer, example_inputs=example(), steps_per_epoch=steps_per_epoch
    )
    step = stepper(model, optimizer, point.images(), torch.arange(point.batch) % 10, True)
    step()
    spent = time_hooks(search, model, optimizer)
    for _ in range(times):
        step()
    scoring = spent.seconds / times
    looks = []
    for _ in range(times):
        start = time.perf_counter()
        search._look()
        looks.append(time.perf_counter() - start)
    search.detach()
    return scoring + statistics.median(looks) * 8 / steps_per_epoch


def measure(sweep: str, points: Sequence[Point], rounds: int) -> list[dict[str, Any]]:
    """Measure every point of a sweep; return a row each, which says of how many."""
    head = machine()
    found: list[dict[str, Any]] = [{"sweep": sweep, "point": asdict(point), "points": len(points)} for point in points]
    for row, point in zip(found, points):
        with threads(point.threads):
            row["dense_peak_bytes"] = peak_bytes(point, shrunk=False)
            row["shrunk_peak_bytes"] = peak_bytes(point, shrunk=True)
            row["shrink_s"] = shrink_seconds(point, 3)
            row["detector_s"] = detector_seconds(point, 5)
        for name in ("dense", "shrunk"):
            model = point.build(shrunk=name == "shrunk")[0]
            row[f"{name}_macs"] = point.batch * count(model, example()).training_macs
    steps = {
        (index, name): point.step(shrunk=name == "shrunk")
        for index, point in enumerate(points)
        for name in ("dense", "shrunk")
    }
    times, others = interleaved(steps, rounds)
    for (index, name), taken in times.items():
        found[index][f"{name}_step_s"] = statistics.median(taken)
        found[index][f"{name}_spread"] = [min(taken), max(taken)]
    return [{**row, "rounds": rounds, "others": others, **head} for row in found]


@dataclass(frozen=True)
class Fit:
    """A power law through points.

    Attributes:
        exponent: Slope of the logarithms.
        standard_error: Of the exponent; None for two points.
        factor: The quantity at x = 1.
        points: How many it rests on.
    """

    exponent: float
    standard_error: float | None
    factor: float
    points: int

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.2f}"
        return f"{self.exponent:.2f}{error}"


def power_law(points: Sequence[tuple[float, float]]) -> Fit | None:
    """Fit ``y = factor * x ^ exponent`` by least squares of the logarithms to those ``points`` that have them.

    The standard error is ``sqrt(residual sum of squares / (n - 2) / sum of squares of log x about their mean)``.

    Returns:
        None if fewer than two different x are left of the points with positive numbers.
    """
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x, mean_y = (statistics.fmean(column) for column in zip(*logs))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in logs)
    error = math.sqrt(residual / (len(logs) - 2) / spread) if len(logs) > 2 else None
    return Fit(slope, error, math.exp(mean_y - slope * mean_x), len(logs))


def whole(found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return each sweep's rows of the newest session, on one machine, that has all of the sweep's points."""
    sittings = Counter((row["sweep"], row["session"]) for row in found)
    complete = [row for row in found if sittings[row["sweep"], row["session"]] == row["points"]]
    latest = newest(complete, "sweep")
    return {
        sweep: sorted((row for row in latest if row["sweep"] == sweep), key=lambda row: row["point"][along])
        for sweep, along in ALONG.items()
        if any(row["sweep"] == sweep for row in latest)
    }


def done(sweep: str, points: Sequence[Point], here: dict[str, Any]) -> bool:
    """Tell whether all ``points`` of a sweep have rows of one session on the machine ``here``."""
    mine = whole([row for row in rows(NAME) if comparable(row, here)]).get(sweep, [])
    return all(any(row["point"] == asdict(point) for row in mine) for point in points)


def curve(sweep: str, key: str, mine: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return a quantity of a sweep's rows against what the sweep goes along."""
    return [(row["point"][ALONG[sweep]], row[key]) for row in mine]


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Return exponents and points of each machine's newest whole sweeps as Markdown."""
    parts = []
    for _, own in by_machine(found):
        measured = whole(own)
        every = [row for mine in measured.values() for row in mine]
        if every:
            parts += [origin(every), exponents_table(measured), points_table(every)]
    return "\n\n".join(parts)


def exponents_table(measured: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Return the exponents of sweeps, with their standard errors, as Markdown."""
    lines = [
        "| exponent (± standard error) of | " + " | ".join(QUANTITIES.values()) + " |",
        "| --- |" + " --- |" * len(QUANTITIES),
    ]
    for sweep, mine in measured.items():
        cells = []
        for key in QUANTITIES:
            fit = power_law(curve(sweep, key, mine))
            left_out = f" ({fit.points} of {len(mine)} points)" if fit and fit.points < len(mine) else ""
            cells.append(f"{fit}{left_out}" if fit else "no fit")
        named = ", ".join(f"{row['point'][ALONG[sweep]]:g}" for row in mine)
        lines.append(f"| {sweep} ({named}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def points_table(found: Sequence[dict[str, Any]]) -> str:
    """Return what was measured as Markdown."""
    lines = [
        "| network | batch | threads | step dense, ms | shrunk, ms | dense / shrunk | MACs dense / shrunk | "
        "peak dense, MiB | shrunk, MiB | shrinking, ms | detector, ms a step |",
        "| --- |" + " --- |" * 10,
    ]
    for row in found:
        point = row["point"]
        cells = [
            f"{point['family']}{point['depth']} x {point['width']:g}", f"{point['batch']}", f"{point['threads']}",
            f"{1e3 * row['dense_step_s']:.1f}", f"{1e3 * row['shrunk_step_s']:.1f}",
            f"{row['dense_step_s'] / row['shrunk_step_s']:.2f}x", f"{row['dense_macs'] / row['shrunk_macs']:.2f}x",
            f"{row['dense_peak_bytes'] / 2**20:.0f}", f"{row['shrunk_peak_bytes'] / 2**20:.0f}",
            f"{1e3 * row['shrink_s']:.0f}", f"{1e3 * row['detector_s']:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(folder: Path) -> dict[str, str]:
    """Write a figure of each machine's newest whole sweeps into ``folder``; return file to what it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {}
    for suffix, own in by_machine(rows(NAME)):
        for sweep, mine in whole(own).items():
            if len(mine) > 1:
                file = f"scaling-{sweep}{suffix}.svg"
                (folder / file).write_text(figure(sweep, mine), encoding="utf-8")
                named[file] = f"Time of a training step, sweep {sweep}"
    return named


def figure(sweep: str, mine: Sequence[dict[str, Any]]) -> str:
    """Return the step times of a sweep on logarithmic axes, with the fitted power laws dashed.

    Args:
        sweep: Of `ALONG`.
        mine: Its rows on one machine, at least two, as `whole` has them.
    """
    along, series = ALONG[sweep], []
    for key, label, colour in (
        ("dense_step_s", "dense", COLOURS[5]),
        ("shrunk_step_s", "shrunk", COLOURS[0]),
        ("detector_s", "detector", COLOURS[1]),
    ):
        points = [(x, 1e3 * seconds) for x, seconds in curve(sweep, key, mine)]
        fit = power_law(points)
        if fit is not None:
            law = [(x, fit.factor * x**fit.exponent) for x, _ in (points[0], points[-1])]
            label = f"{label}, ^{fit.exponent:.2f}"
            series.append(Series(points=law, colour=colour, dots=False, dashed=True, label=label))
            series.append(Series(points=points, colour=colour, line=False))
    xs, ys = ([point[axis] for one in series for point in one.points] for axis in (0, 1))
    head = mine[-1]
    title = {"resnet-depth": "ResNets on 32x32 images"}.get(sweep, "VGG with batch norm on 32x32 images")
    return chart(
        series, Axis.around(xs, along, log=True), Axis.around(ys, "ms a step", log=True),
        title=f"{title}: time of a training step against {along}",
        note=f"{head['device']}, torch {head['torch']}, {head['date']}; bf16, channels_last",
    )  # fmt: skip


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="*", metavar="sweep", help=f"of {', '.join(ALONG)}; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the ends of each sweep, few rounds; nothing is recorded")
    parser.add_argument("--table", action="store_true", help="print the tables of the newest rows and stop")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="write the figures of the newest rows and stop")
    options = parser.parse_args(words)
    check_known(parser, "sweep", options.sweeps, ALONG)
    options.sweeps = options.sweeps or list(ALONG)
    if options.quick:
        options.rounds = 2
    return options


def main() -> None:
    options = read()
    if options.draw:
        draw(options.draw)
        return
    if options.table:
        print(tables(rows(NAME)))
        return
    keep_freed()  # as `earlybird train` does
    here, looked = machine(), list[dict[str, Any]]()
    for sweep in options.sweeps:
        points = sweeps(here["threads"])[sweep]
        if options.quick:
            points = points[:: max(len(points) - 1, 1)]
        if options.quick or not done(sweep, points, here):
            found = measure(sweep, points, options.rounds)
            looked += found
            for row in found:
                record(NAME, row, quick=options.quick)
    if options.quick:
        measured = {sweep: [row for row in looked if row["sweep"] == sweep] for sweep in options.sweeps}
        print(f"{points_table(looked)}\n\n{exponents_table(measured)}")
    else:
        print(tables(rows(NAME)))


if __name__ == "__main__":
    main()
