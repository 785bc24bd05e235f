"""Question: do the Early-Bird paper's figures come out alike on small networks and a short schedule, on one machine?

You et al., Drawing Early-Bird Tickets, ICLR 2020, https://arxiv.org/abs/1909.11957. What is drawn, each from the rows
of runs that `earlybird train` did in processes of their own:

- ``draw_epoch``: accuracy after retraining against the epoch at which the ticket was drawn by force, for keep 0.7, 0.5
  and 0.3 (the paper's pruning ratios 30, 50 and 70 %), with weights that continue or are drawn anew;
- ``distances``: mask distance of every look to every look, high and low learning rate, search in fp32 and in bf16;
- ``precision``: distance of the bf16 search's mask to the fp32 search's of the same seed, epoch by epoch;
- ``controls``: the detector's ticket against random channels in the ticket's widths and against weights drawn anew;
- ``costs``: accuracy, modelled energy and counted FLOPs of whole trainings, in the form of the paper's tables 2 and 3.

SGD as in the paper: 0.1, momentum 0.9, weight decay 1e-4, a tenth after a half and three quarters of the epochs.
Deviations: batch 128 instead of 256 and some ten epochs instead of 160; a low-precision search is bf16, not 8-bit block
floating point; re-initialised tickets train for what is left of the schedule instead of all of it anew, so that all
contestants have equal epochs; PreActResNet has no selection layers. ``--preset default`` is the library's method,
``--preset published`` the paper's (ranks the batch-norm scales, with an L1 term).

    EARLYBIRD_DATA=... python benchmarks/paper_figures.py --plan                  # what there is to do, and how long
    EARLYBIRD_DATA=... python benchmarks/paper_figures.py --work runs/paper --budget 60
    EARLYBIRD_DATA=... python benchmarks/paper_figures.py --work runs/paper --networks resnet20 --data fashion-mnist
    EARLYBIRD_DATA=... python benchmarks/paper_figures.py --work runs/paper --quick   # one epoch, one run of each kind,
                                                                                    # always anew; nothing is recorded
    python benchmarks/paper_figures.py --table
    python benchmarks/paper_figures.py --draw docs/images

A run whose row is in `results/paper_figures.jsonl` is not run again; one that was cut off is resumed from its folder.
One that fails leaves a row that says so, and the others go on; ``--retry`` runs it anew, its folder set aside.
``--budget`` (minutes) stops before a run that is not likely to fit, so that a long plan can be done in slices; seeds
are the outer loop, so that every slice leaves whole figures of few seeds rather than parts of figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import environment, machine, rows, spread
from figures import COLOURS, Axis, Series, chart, heat_maps
from records import SESSION, record
from slots import Children, cores_of_slots, in_slots

NAME = "paper_figures"
WIDTHS = {"vgg11": 0.25, "resnet20": 0.5, "preact_resnet29": 0.5}  # factors on the channels: minutes a run
DATA = ("cifar10", "fashion-mnist")
KEEPS = (0.7, 0.5, 0.3)
DRAWS = ("0.25ep", "0.5ep", "1ep", "2ep", "4ep", "7ep")
RATES = (0.1, 0.01)
TRAINING_IMAGES = {"cifar10": 50_000, "fashion-mnist": 60_000}
TEST_IMAGES = 10_000
BATCH = 128
START_S = 8.0  # of a process: imports, data, first steps
LIMIT_S = 6 * 3600.0  # a run that takes longer hangs


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of `earlybird train`.

    Attributes:
        network: Of `WIDTHS`.
        data: Of `DATA`.
        epochs: Of the whole schedule.
        seed: Of weights, order and augmentation.
        preset: Of the method.
        kind: ``'dense'``; ``'watch'``: looks and never draws; ``'forced'``: draws at ``draw``; ``'early'``: draws when
            the detector says so.
        keep: Share of the channels that stay; of a ``'watch'``, all of `KEEPS` are looked at.
        draw: When a forced draw is done.
        weights: ``'continue'`` or ``'reinitialise'``.
        shuffle: Random channels in the ticket's widths.
        lr: Learning rate.
        precision: ``'bf16'`` or ``'fp32'``.
    """

    network: str
    data: str
    epochs: int
    seed: int
    preset: str
    kind: str
    keep: float | None = None
    draw: str | None = None
    weights: str = "continue"
    shuffle: bool = False
    lr: float = 0.1
    precision: str = "bf16"

    @property
    def name(self) -> str:
        """A name for the run's folder, another one for every training."""
        words = [self.network, self.data, f"{self.epochs}ep", self.preset, self.kind]
        words += [] if self.keep is None else [f"keep{self.keep:g}"]
        words += [] if self.draw is None else [f"at{self.draw}"]
        words += [self.weights, *(["shuffled"] if self.shuffle else []), f"lr{self.lr:g}", self.precision]
        return "-".join([*words, f"seed{self.seed}"])

    def flags(self) -> list[str]:
        """Return what follows ``earlybird train``."""
        words = {
            "model": self.network, "width": WIDTHS[self.network], "data": self.data, "epochs": self.epochs,
            "seed": self.seed, "batch-size": BATCH, "lr": self.lr, "weight-decay": 1e-4, "schedule": "step",
            "milestones": f"{0.5 * self.epochs:g}ep,{0.75 * self.epochs:g}ep", "lr-warmup": "0it",
            "label-smoothing": 0.0, "precision": self.precision, "channels-last": "true", "compile": "false",
        }  # fmt: skip
        if self.kind != "dense":
            words |= {"preset": self.preset, "weights": self.weights}
        if self.kind == "watch":  # a window that is never full never agrees
            words |= {"keep": "0.5,0.7,0.3", "look-every": "0.5ep", "skip": "0.5ep", "window": 10_000,
                      "deadline": "none", "checkpoint-every": "1ep"}  # fmt: skip
        elif self.kind == "forced":
            words |= {"keep": self.keep, "look-every": self.draw, "skip": self.draw, "deadline": self.draw}
        elif self.kind == "early":
            words |= {"keep": self.keep}
        listed = [word for key, value in words.items() for word in (f"--{key}", str(value))]
        switches = ["--no-nesterov", "--no-tune", *(["--dense"] if self.kind == "dense" else [])]
        return [*listed, *switches, *(["--shuffle"] if self.shuffle else [])]


def plan(options: argparse.Namespace) -> list[Training]:
    """Return all trainings of the figures that were asked for, each once, those of the first seed first."""
    found: dict[Training, None] = {}
    for seed in range(options.seeds):
        for network in options.networks:
            for data in options.data:
                base = Training(network=network, data=data, epochs=options.epochs, seed=seed, preset=options.preset,
                                kind="dense")  # fmt: skip
                for figure in options.figures:
                    found |= dict.fromkeys(FIGURES[figure](base, options.draws))
    return [training for training in found if training.keep is None or f"{training.keep:g}" in options.keeps]


def of_draw_epoch(base: Training, draws: Sequence[str]) -> Iterable[Training]:
    yield base
    for keep in KEEPS:
        for weights in ("continue", "reinitialise"):
            for draw in draws:
                yield replace(base, kind="forced", keep=keep, draw=draw, weights=weights)


def of_distances(base: Training, draws: Sequence[str]) -> Iterable[Training]:
    for lr in RATES:
        for precision in ("fp32", "bf16"):
            yield replace(base, kind="watch", lr=lr, precision=precision)


def of_controls(base: Training, draws: Sequence[str]) -> Iterable[Training]:
    yield base
    for keep in KEEPS:
        ticket = replace(base, kind="early", keep=keep)
        yield from (ticket, replace(ticket, shuffle=True), replace(ticket, weights="reinitialise"))


def of_costs(base: Training, draws: Sequence[str]) -> Iterable[Training]:
    yield base
    for keep in KEEPS:
        for weights in ("continue", "reinitialise"):
            yield replace(base, kind="early", keep=keep, weights=weights)


FIGURES: dict[str, Callable[[Training, Sequence[str]], Iterable[Training]]] = {
    "draw_epoch": of_draw_epoch, "distances": of_distances, "precision": of_distances, "controls": of_controls,
    "costs": of_costs,
}  # fmt: skip


def of(training: Training, found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the newest row of a training, or None."""
    key = asdict(training)
    return next((row for row in reversed(found) if all(row[name] == value for name, value in key.items())), None)


def is_done(row: dict[str, Any]) -> bool:
    """Tell whether a row is of a run that reached its end; the first rows had no status, and none that had failed."""
    return row.get("status", "done") == "done"


def left_of(whole: Sequence[Training], found: Sequence[dict[str, Any]], retry: bool) -> list[Training]:
    """Return the trainings that are to be run: those without a row, and on ``retry`` those that failed."""
    newest = {training: of(training, found) for training in whole}
    return [training for training, row in newest.items() if row is None or (retry and not is_done(row))]


def work_off(
    trainings: Sequence[Training],
    estimate: Callable[[Training], float],
    run: Callable[[Training, int], None],
    children: Children,
    *,
    budget_s: float | None,
    side_by_side: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Training]:
    """Run the trainings in order, and stop before one that is not likely to fit the budget.

    Estimates are corrected by what the runs so far took over what they had been estimated to take.

    Args:
        trainings: What is to be done, in order.
        estimate: Seconds that a training should take.
        run: Does it, with so many threads, in a process of ``children``.
        children: Killed when this process is interrupted; nothing begins any more.
        budget_s: Seconds for all; None: as long as it takes.
        side_by_side: Runs at a time, each on cores of its own.
        clock: Seconds.

    Returns:
        What was done.
    """
    slots = cores_of_slots(side_by_side)
    start, expected, took = clock(), 0.0, 0.0
    waiting, done, lock = list(trainings), list[Training](), threading.Lock()

    def work(slot: int) -> None:
        nonlocal expected, took
        while True:
            with lock:
                if not waiting or children.killed:
                    return
                own = estimate(waiting[0])
                factor = took / expected if expected else 1.0
                if budget_s is not None and clock() - start + factor * own > budget_s:
                    waiting.clear()
                    return
                training, begun = waiting.pop(0), clock()
            run(training, len(slots[slot]))
            if children.killed:
                return
            with lock:
                expected, took = expected + own, took + clock() - begun
                done.append(training)

    in_slots(slots, work, children.kill)
    return done


class StepClock:
    """Estimates what a training takes from some timed steps of its network, dense and shrunk; each is timed once."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str, float, str], float] = {}

    def __call__(self, training: Training) -> float:
        """Return the seconds that ``training`` should take."""
        images, epochs = TRAINING_IMAGES[training.data], training.epochs
        dense = self._step(training, 1.0)
        small = dense if training.keep is None else self._step(training, training.keep)
        search = float((training.draw or "1ep").removesuffix("ep")) if training.keep is not None else epochs
        search = min(search, epochs)
        steps = images / BATCH * (search * dense + (epochs - search) * small)
        return START_S + steps + epochs * TEST_IMAGES / BATCH * small / 3  # evaluation is a forward pass

    def _step(self, training: Training, keep: float) -> float:
        key = (training.network, training.data, keep, training.precision)
        if key not in self._seconds:
            self._seconds[key] = step_seconds(training, keep)
        return self._seconds[key]


def step_seconds(training: Training, keep: float) -> float:
    """Return the seconds of a training step of the network cut to ``keep`` by the size of its filters."""
    import torch
    from common import interleaved
    from step_times import stepper

    import earlybird as eb
    from earlybird.models import build

    channels, side = (1, 28) if training.data == "fashion-mnist" else (3, 32)
    x = torch.randn(BATCH, channels, side, side).to(memory_format=torch.channels_last)
    model = build(
        training.network, classes=10, in_channels=channels, image_size=side, width=WIDTHS[training.network]
    ).to(memory_format=torch.channels_last)
    if keep < 1:
        ticket = eb.draw(model, keep, score="magnitude", example_inputs=x[:1], coupled="group")
        eb.shrink(model, ticket, x[:1], round_to=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    step = stepper(model, optimizer, x, torch.arange(BATCH) % 10, training.precision == "bf16")
    return statistics.median(interleaved({"step": step}, 3)[0]["step"])


def run(training: Training, work: Path, children: Children) -> dict[str, Any]:
    """Run a training in a process of its own, or resume it; return what it came to, whatever becomes of it.

    The folder of one that failed is set aside, so that no later start resumes what cannot end.
    """
    from earlybird.errors import EarlybirdError

    folder, begun = work / training.name, time.perf_counter()
    status = "done" if (folder / "result.json").exists() else train(training, folder, children)
    if status == "done":
        try:
            return {"status": status, **harvest(training, folder)}
        except (FileNotFoundError, EarlybirdError) as error:
            status = f"failed: {error}"
    if folder.exists() and not children.killed:
        folder.rename(folder.with_name(f"{folder.name}-failed-{SESSION.replace(':', '')}"))
    return {"status": status, "seconds": time.perf_counter() - begun}


def train(training: Training, folder: Path, children: Children) -> str:
    """Begin a training, or go on with it; return 'done' or what went wrong."""
    begun, log = (folder / "recipe.toml").exists(), folder.with_name(f"{folder.name}.log")
    words = ["resume", str(folder)] if begun else ["train", *training.flags(), "--out", str(folder)]
    with open(log, "w", encoding="utf-8") as said:
        try:
            code = children.run([sys.executable, "-m", "earlybird", *words, "--quiet"], said, environment(), LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"needed more than {LIMIT_S:.0f} s and was stopped"
    last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["no message"]
    return f"failed with exit code {code}: {last[0]}" if code else "done"


def harvest(training: Training, folder: Path) -> dict[str, Any]:
    """Return what a finished run's folder has for the figures."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    total = json.loads((folder / "bill.json").read_text(encoding="utf-8"))["total"]
    found = {key: result[key] for key in ("accuracy", "seconds", "parameters", "drawn_at", "resumed")}
    found["macs"] = total["macs"]["value"]
    found["modelled_joules"] = [total["modelled_joules"]["low"], total["modelled_joules"]["high"]]
    return {**found, **(masks(folder) if training.kind == "watch" else {})}


def masks(folder: Path) -> dict[str, Any]:
    """Return the looks of a run in epochs, and each look's mask over the ranked channels, as hexadecimal digits."""
    import torch

    from earlybird.train.checkpoint import load_newest
    from earlybird.train.recipe import Recipe

    loaded = load_newest(folder, Recipe.from_toml(folder / "recipe.toml").hash(), lambda text: print(text))
    if loaded is None:
        raise FileNotFoundError(f"no checkpoint in {folder.name}: its masks are lost")
    search, spe = loaded[1]["methods"]["early_bird"], loaded[1]["steps_per_epoch"]
    ranked = torch.tensor(search["ranked"])
    return {
        "looks": [round(step / spe, 3) for step in search["looked_at"]],
        "channels": len(ranked),
        "masks": {keep: [as_hex(mask[ranked].tolist()) for mask in looks] for keep, looks in search["masks"].items()},
    }


def as_hex(mask: Sequence[bool]) -> str:
    """Return a mask as hexadecimal digits, its first channel the highest bit."""
    return f"{int(''.join('1' if kept else '0' for kept in mask), 2):0{-(-len(mask) // 4)}x}"


def distance(one: str, other: str, channels: int) -> float:
    """Return the share of ``channels`` on which two masks of `as_hex` differ."""
    return (int(one, 16) ^ int(other, 16)).bit_count() / channels


def matrix(looks: Sequence[str], channels: int) -> list[list[float]]:
    """Return the distances of all looks to all looks, ``(n, n)``."""
    return [[distance(one, other, channels) for other in looks] for one in looks]


@dataclass(frozen=True)
class Group:
    """The rows of one network on one data set with one preset and number of epochs.

    Attributes:
        network, data, preset, epochs: As in `Training`.
        rows: Of runs that are done.
        failed: The newest rows of those that are not.
    """

    network: str
    data: str
    preset: str
    epochs: int
    rows: list[dict[str, Any]]
    failed: list[dict[str, Any]]

    @property
    def title(self) -> str:
        width = WIDTHS[self.network]
        return f"{self.network} x {width:g} on {self.data}, {self.epochs} epochs, preset {self.preset}"

    @property
    def note(self) -> str:
        every = self.rows or self.failed
        heads = {}  # to the date of the last row
        for row in every:
            beside = f", {row['side_by_side']} runs at a time" if row.get("side_by_side", 1) > 1 else ""
            heads[f"{row['device']}, torch {row['torch']}{beside}"] = row["date"]
        seeds = len({row["seed"] for row in every})
        where = "; ".join(f"{head}, {date}" for head, date in heads.items())
        return f"{where}; {seeds} seed{'s' if seeds > 1 else ''}"

    def values(self, key: str, **which: Any) -> list[Any]:
        """Return one entry of every row that has the values of ``which``."""
        return [row[key] for row in self.rows if all(row[name] == value for name, value in which.items())]

    def accuracies(self, **which: Any) -> list[float]:
        """Return accuracies in percent."""
        return [100 * value for value in self.values("accuracy", **which)]


def groups(found: Sequence[dict[str, Any]]) -> list[Group]:
    """Return the newest row of each training by network, data, preset and epochs, in the order of first appearance."""
    fields = [field.name for field in dataclasses.fields(Training)]
    newest = {tuple(row[name] for name in fields): row for row in found}
    sorted_out: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {}
    for row in newest.values():
        sorted_out.setdefault((row["network"], row["data"], row["preset"], row["epochs"]), []).append(row)
    return [
        Group(*key, list(filter(is_done, mine)), [row for row in mine if not is_done(row)])
        for key, mine in sorted_out.items()
    ]


def draw_epoch_figure(group: Group) -> str | None:
    """Return accuracy against the epoch of a forced draw; one dot a seed, lines through the means."""
    series, xs = [], []
    for keep, colour in zip(KEEPS, COLOURS):
        for weights, dashed in (("continue", False), ("reinitialise", True)):
            which = {"kind": "forced", "keep": keep, "weights": weights}
            epochs = sorted({float(draw.removesuffix("ep")) for draw in group.values("draw", **which)})
            by_epoch = {epoch: group.accuracies(**which, draw=f"{epoch:g}ep") for epoch in epochs}
            if not by_epoch:
                continue
            xs += epochs
            means = [(epoch, statistics.fmean(values)) for epoch, values in by_epoch.items()]
            dots = [(epoch, value) for epoch, values in by_epoch.items() for value in values]
            series.append(Series(points=dots, colour=colour, line=False))
            label = f"keep {keep:g}" if weights == "continue" else f"keep {keep:g}, anew"
            series.append(Series(points=means, colour=colour, dots=False, dashed=dashed, label=label))
    dense = group.accuracies(kind="dense")
    if not series:
        return None
    if dense:
        mean = statistics.fmean(dense)
        ends = [(min(xs), mean), (max(xs), mean)]
        series.append(Series(points=ends, colour=COLOURS[5], dots=False, label="dense"))
    ys = [point[1] for one in series for point in one.points]
    return chart(series, Axis.around(xs, "ticket drawn at epoch", log=True), Axis.around(ys, "test accuracy, %"),
                 title=group.title, note=group.note)  # fmt: skip


def distances_figure(group: Group) -> str | None:
    """Return the mask distances of all looks of the first seed's searches at keep 0.5."""
    maps = []
    for lr in RATES:
        for precision in ("fp32", "bf16"):
            which = {"kind": "watch", "seed": 0, "lr": lr, "precision": precision}
            for row in (row for row in group.rows if all(row[key] == value for key, value in which.items())):
                looks = row["masks"]["0.5"]
                maps.append((f"lr {lr:g}, {precision}", row["looks"], matrix(looks, row["channels"])))
    if not maps:
        return None
    return heat_maps(
        maps, title=f"{group.title}: mask distances by epoch, keep 0.5", key="mask distance", note=group.note
    )


def overlaps(group: Group, lr: float, keep: float) -> dict[float, list[float]]:
    """Return epoch to the distances, one a seed, of the bf16 search's mask to the fp32 search's of the same seed."""
    by_run = {(row["seed"], row["precision"]): row for row in group.rows if row["kind"] == "watch" and row["lr"] == lr}
    found: dict[float, list[float]] = {}
    for (seed, precision), low in by_run.items():
        high = by_run.get((seed, "fp32"))
        if precision == "fp32" or high is None:
            continue
        for epoch, one, other in zip(low["looks"], low["masks"][f"{keep:g}"], high["masks"][f"{keep:g}"]):
            found.setdefault(epoch, []).append(distance(one, other, low["channels"]))
    return found


def precision_figure(group: Group) -> str | None:
    """Return the distance of the bf16 search's mask to the fp32 search's against the epoch; dashed: by chance."""
    series = []
    for keep, colour in zip(KEEPS, COLOURS):
        for lr in RATES:
            points = [(epoch, statistics.fmean(values)) for epoch, values in overlaps(group, lr, keep).items()]
            if points:
                series.append(Series(points=points, colour=colour, dots=lr == RATES[0],
                                     label=f"keep {keep:g}, lr {lr:g}"))  # fmt: skip
    if not series:
        return None
    xs = [point[0] for one in series for point in one.points]
    chance = [(2 * keep * (1 - keep), colour) for keep, colour in zip(KEEPS, COLOURS)]
    series += [Series(points=[(min(xs), level), (max(xs), level)], colour=colour, dots=False, dashed=True)
               for level, colour in chance]  # fmt: skip
    ys = [point[1] for one in series for point in one.points]
    return chart(series, Axis.around(xs, "epoch"), Axis.around(ys, "mask distance, bf16 to fp32 search", zero=True),
                 title=group.title, note=group.note)  # fmt: skip


def controls_figure(group: Group) -> str | None:
    """Return the accuracy of the ticket and its controls against the pruning ratio."""
    series = []
    for (_, label, which), colour in zip(CONTESTANTS, COLOURS):
        means, dots = [], []
        for keep in KEEPS:
            values = group.accuracies(kind="early", keep=keep, **which)
            if values:
                means.append((100 * (1 - keep), statistics.fmean(values)))
                dots += [(100 * (1 - keep), value) for value in values]
        if means:
            series.append(Series(points=dots, colour=colour, line=False))
            series.append(Series(points=means, colour=colour, dots=False, label=label))
    dense = group.accuracies(kind="dense")
    if not series:
        return None
    if dense:
        mean = statistics.fmean(dense)
        series.append(Series(points=[(30, mean), (70, mean)], colour=COLOURS[5], dots=False, label="dense"))
    ys = [point[1] for one in series for point in one.points]
    return chart(series, Axis.around([30, 70], "channels pruned, %"), Axis.around(ys, "test accuracy, %"),
                 title=group.title, note=group.note)  # fmt: skip


CONTESTANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("ticket", "early bird", {"weights": "continue", "shuffle": False}),
    ("anew", "re-initialised", {"weights": "reinitialise", "shuffle": False}),
    ("shuffled", "random channels", {"weights": "continue", "shuffle": True}),
)
DRAWINGS: dict[str, Callable[[Group], str | None]] = {
    "draw_epoch": draw_epoch_figure, "distances": distances_figure, "precision": precision_figure,
    "controls": controls_figure,
}  # fmt: skip


def table(group: Group) -> str:
    """Return accuracy, modelled kJ and counted TFLOPs of a group by pruning ratio, as Markdown."""
    lines = [
        f"**{group.title}** ({group.note}; energy: {CITED}, low to high price of a DRAM access)",
        "",
        "| method | " + " | ".join(f"accuracy, {100 * (1 - keep):.0f} % pruned" for keep in KEEPS) + " | "
        + " | ".join(f"modelled kJ / counted TFLOPs, {100 * (1 - keep):.0f} %" for keep in KEEPS) + " |",
        "| --- |" + " --- |" * (2 * len(KEEPS)),
    ]  # fmt: skip
    named: list[tuple[str, Callable[[float], dict[str, Any]]]] = [("dense", lambda keep: {"kind": "dense"})]
    named += [
        (label, lambda keep, which=which: {"kind": "early", "keep": keep, **which}) for _, label, which in CONTESTANTS
    ]
    for label, which in named:
        accuracies, costs = [], []
        for keep in KEEPS:
            values = group.accuracies(**which(keep))
            drawn = group.values("drawn_at", **which(keep))
            late = "" if label == "dense" or None not in drawn else f" ({drawn.count(None)} never drawn)"
            accuracies.append(f"{spread(values)} ({len(values)}){late}" if values else "not run")
            joules = group.values("modelled_joules", **which(keep))
            low, high = (statistics.fmean(column) / 1e3 for column in zip(*joules)) if joules else (0.0, 0.0)
            macs = group.values("macs", **which(keep))
            costs.append(f"{low:.3g} to {high:.3g} / {2 * statistics.fmean(macs) / 1e12:.1f}" if joules else "not run")
        lines.append(f"| {label} | {' | '.join(accuracies)} | {' | '.join(costs)} |")
    lines += ["", "Accuracy: mean ± sample standard deviation over seeds, in percent (seeds)."]
    if group.failed:
        fields = [field.name for field in dataclasses.fields(Training)]
        lines += ["", "Not in these figures, since they came to no end:", ""]
        lines += [f"- {Training(**{name: row[name] for name in fields}).name}: {row['status']}" for row in group.failed]
    return "\n".join(lines)


def draw(folder: Path) -> dict[str, str]:
    """Write the figures of all rows into ``folder``; return file to what it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {}
    for group in groups(rows(NAME)):
        for name, drawing in DRAWINGS.items():
            svg = drawing(group)
            if svg is not None:
                file = f"paper-{name}-{group.network}-{group.data}-{group.preset}-{group.epochs}ep.svg"
                file = file.replace("_", "-")
                (folder / file).write_text(svg, encoding="utf-8")
                named[file] = f"{name.replace('_', ' ')}: {group.title}"
    return named


CITED = "modelled with the prices of Horowitz, ISSCC 2014, 45 nm"


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def some(known: Iterable[str]) -> Callable[[str], list[str]]:
        def take(text: str) -> list[str]:
            unknown = set(text.split(",")) - set(known)
            if unknown:
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; of {', '.join(known)}")
            return text.split(",")

        return take

    parser.add_argument("--networks", type=some(WIDTHS), default=["vgg11"], help=f"of {','.join(WIDTHS)}")
    parser.add_argument("--data", type=some(DATA), default=["cifar10"], help=f"of {','.join(DATA)}")
    parser.add_argument("--figures", type=some(FIGURES), default=list(FIGURES), help=f"of {','.join(FIGURES)}")
    shares = [f"{keep:g}" for keep in KEEPS]
    parser.add_argument("--keeps", type=some(shares), default=shares, help=f"of {','.join(shares)}")
    parser.add_argument("--preset", choices=("default", "published"), default="default")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the run folders")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="stop before a run that is not likely to fit")
    parser.add_argument("--side-by-side", type=int, default=1, help="runs at a time, each on its own cores")
    parser.add_argument(
        "--quick", action="store_true", help="one epoch of one network, one run of each kind, not recorded"
    )
    parser.add_argument("--retry", action="store_true", help="run again what failed or was stopped")
    parser.add_argument("--plan", action="store_true", help="print what is to be done and how long it takes, and stop")
    parser.add_argument("--table", action="store_true", help="print the tables of all rows and stop")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="write the figures of all rows and stop")
    options = parser.parse_args(words)
    options.draws = [draw for draw in DRAWS if float(draw.removesuffix("ep")) < options.epochs]
    if options.work is None and not (options.plan or options.table or options.draw):
        parser.error("--work FOLDER is needed: run folders go there")
    return options


def quick(options: argparse.Namespace) -> list[Training]:
    """Return one short training of each kind."""
    base = Training(network=options.networks[0], data=options.data[0], epochs=1, seed=0, preset=options.preset,
                    kind="dense")  # fmt: skip
    return [base, replace(base, kind="watch"), replace(base, kind="forced", keep=0.3, draw="0.25ep")]


def work_folder(options: argparse.Namespace) -> Path:
    """Return where run folders go; a quick look has a new place each time, so that it measures anew."""
    options.work.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="quick-", dir=options.work)) if options.quick else options.work


def main() -> None:
    options = read()
    if options.draw:
        draw(options.draw)
        return
    failed: list[str] = []
    if not options.table:
        whole = quick(options) if options.quick else plan(options)
        left = whole if options.quick else left_of(whole, rows(NAME), options.retry)
        estimate = StepClock()
        minutes = sum(map(estimate, left)) / 60
        print(
            f"{len(whole)} runs, {len(left)} to do: some {minutes:,.0f} minutes (estimated from timed steps)",
            flush=True,
        )
        if options.plan:
            return
        work, children = work_folder(options), Children()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children in sessions of their own go, too

        def do(training: Training, threads: int) -> None:
            head = machine(threads, options.side_by_side)
            row = {**asdict(training), **run(training, work, children), **head}
            if children.killed:
                return
            said = f"{row['accuracy']:.2%} in" if is_done(row) else f"{row['status']} after"
            print(f"{training.name}: {said} {row['seconds']:.0f} s", flush=True)
            record(NAME, row, quick=options.quick)
            if not is_done(row):
                failed.append(training.name)

        budget_s = None if options.budget is None else 60 * options.budget
        ended = work_off(left, estimate, do, children, budget_s=budget_s, side_by_side=options.side_by_side)
        print(f"{len(ended)} runs ended, {len(left) - len(ended)} left")
    for group in () if options.quick else groups(rows(NAME)):
        print(f"\n{table(group)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
