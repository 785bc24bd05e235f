"""Question: what do looking for the ticket, hooks, shrinking, data, checkpoints and start-up cost?

Each figure has a limit, and its row in `results/overheads.jsonl` says whether it was kept. ``detector``, ``hooks``,
``data`` and ``checkpoint`` are shares of the seconds of one process, so that a busy machine slows both sides alike.
``shrink`` and ``startup`` are seconds, which a busy machine makes longer. Beside the seconds of ``earlybird --help``,
``startup`` has what importing the library adds to ``import torch``, as medians of ratios within a round; its commands
take turns.

    EARLYBIRD_DATA=... python benchmarks/overheads.py            # all, some five minutes
    EARLYBIRD_DATA=... python benchmarks/overheads.py detector shrink
    EARLYBIRD_DATA=... python benchmarks/overheads.py --quick    # the three that take a minute; nothing is recorded
    python benchmarks/overheads.py --table                       # the table of the newest rows
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import check_known, environment, interleaved, machine, rows
from records import by_machine, newest, record
from step_times import batches, stepper
from tables import origin
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import earlybird as eb
from earlybird.allocator import give_back, keep_freed
from earlybird.calls import Hook
from earlybird.cost.meters import PeakMemory
from earlybird.models import build

NAME = "overheads"


@dataclass
class Spent:
    """Seconds in calls, and how many there were."""

    seconds: float = 0.0
    calls: int = 0


def time_hooks(search: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> Spent:
    """Time every call of the search's hooks on model and optimizer from now on."""
    spent = Spent()

    def timed(inner, *args):
        start = time.perf_counter()
        inner(*args)
        spent.seconds += time.perf_counter() - start
        spent.calls += 1

    hooks = [*model._forward_pre_hooks.values(), *optimizer._optimizer_step_pre_hooks.values()]
    for hook in [*hooks, *optimizer._optimizer_step_post_hooks.values()]:
        if isinstance(hook, Hook) and hook.owner is search:
            hook.call = partial(timed, hook.call)
    return spent


def detector(steps: int = 100) -> dict[str, Any]:
    """Share of the search phase that the detector's hooks take: scores every step, a look every eighth of an epoch."""
    model = build("vgg16", classes=10, width=0.5).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    search = eb.EarlyBird(skip="49it", look_every="49it", deadline=None, tolerance=0.0).attach(
        model, optimizer, example_inputs=torch.randn(1, 3, 32, 32), steps_per_epoch=390
    )
    spent = time_hooks(search, model, optimizer)
    start, loaded = 0.0, batches().epoch(0)
    for step in range(steps + 2):
        if step == 2:
            start, spent.seconds = time.perf_counter(), 0.0
        stepper(model, optimizer, *next(loaded), True)()
    total = time.perf_counter() - start
    if spent.calls < 3 * steps or len(search.history) < 2:
        raise RuntimeError(f"the detector was timed {spent.calls} times in {steps} steps")
    return {
        "share": spent.seconds / total,
        "limit": 0.005,
        "detail": f"{1e3 * spent.seconds / steps:.2f} of {1e3 * total / steps:.0f} ms a step",
    }


@contextmanager
def hooks_timed() -> Iterator[Spent]:
    """Time every call of a hook of ours, on whatever model and optimizer, while in here."""
    spent, inner = Spent(), Hook.__call__

    def timed(hook: Hook, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return inner(hook, *args)
        finally:
            spent.seconds += time.perf_counter() - start
            spent.calls += 1

    Hook.__call__ = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Hook.__call__ = inner  # type: ignore[method-assign]


def in_lightning(model: nn.Module, methods: eb.EarlyBird, steps: int) -> tuple[float, float]:
    """Return seconds a step in hooks and in the callback, before the draw and after it, in Lightning's loop."""
    import lightning.pytorch as pl

    from earlybird.integrations.lightning import EarlyBirdCallback

    class Loop(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            images, labels = batch
            return functional.cross_entropy(self.net(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    callback = EarlyBirdCallback(methods)
    ours = Spent()

    def timed(inner: Any, *args: Any) -> None:
        start = time.perf_counter()
        inner(*args)
        ours.seconds += time.perf_counter() - start

    for name in ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step"):
        setattr(callback, name, partial(timed, getattr(callback, name)))
    found = []
    with hooks_timed() as spent:

        class Reader(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                if trainer.global_step in (2, steps - 1, steps + 2, 2 * steps):
                    found.append(spent.seconds + ours.seconds)

        trainer = pl.Trainer(
            max_steps=2 * steps, accelerator="cpu", callbacks=[callback, Reader()], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        x, y = next(batches().epoch(0))
        pairs = TensorDataset(x[:2].repeat(2 * steps, 1, 1, 1), y[:2].repeat(2 * steps))  # small: a step's own time
        trainer.fit(Loop(), DataLoader(pairs, batch_size=2))  # is measured elsewhere
    return (found[1] - found[0]) / (steps - 3), (found[3] - found[2]) / (steps - 2)


def hooks(rounds: int = 25, steps: int = 99) -> dict[str, Any]:
    """Share of a ResNet-20 step that hooks and callback take, before the draw and after it.

    Steps with and without a search take turns, dense and small; beside these ratios, which are noisy, the seconds in
    every hook are added up, over as many steps as the default makes from look to look.
    """
    batch = next(batches().epoch(0))

    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = build("resnet20", classes=10).to(memory_format=torch.channels_last)
        return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def method(deadline: str | None) -> eb.EarlyBird:
        return eb.EarlyBird(skip="49it", look_every="49it", deadline=deadline, tolerance=0.0, window=9)

    actions: dict[str, Any] = {}
    for name, deadline in (("plain", None), ("searching", None), ("small", "1it"), ("drawn", "1it")):
        model, optimizer = begin()
        actions[name] = stepper(model, optimizer, *batch, True)
        if name == "plain":
            continue
        search = method(deadline).attach(model, optimizer, steps_per_epoch=390)
        actions[name]()
        if name == "small":
            search.detach()
    times, _ = interleaved(actions, rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        one: statistics.median(mine / other for mine, other in zip(times[one], times[base]))
        for one, base in (("searching", "plain"), ("drawn", "small"))
    }
    seconds = {}
    for name in ("searching", "drawn"):
        with hooks_timed() as spent:
            for _ in range(49):
                actions[name]()
        seconds[name] = spent.seconds / 49
    before, after = in_lightning(begin()[0], method(f"{steps}it"), steps)
    shares = {"before": seconds["searching"] / medians["plain"], "after": seconds["drawn"] / medians["small"]}
    return {
        "share": shares["before"],
        "limit": 0.005,
        "share_after": shares["after"],
        "lightning_share": before / medians["plain"],
        "lightning_share_after": after / medians["small"],
        "interleaved": ratios,
        "detail": f"{1e3 * seconds['searching']:.3f} of {1e3 * medians['plain']:.0f} ms a step before the draw, "
        f"{1e3 * seconds['drawn']:.3f} of {1e3 * medians['small']:.0f} ms after it ({shares['after']:.3%}); with "
        f"Lightning's callback {1e3 * before:.3f} and {1e3 * after:.3f} ms; in turns with plain steps "
        f"{ratios['searching']:.3f} and {ratios['drawn']:.3f} times as long",
    }


def shrink() -> dict[str, Any]:
    """Seconds and extra memory of shrinking ResNet-50 (ImageNet) with SGD momentum, 5 times."""
    seconds, extra = [], []
    size = 0
    for seed in range(5):
        model = build("resnet50", classes=1000, image_size=224, seed=seed)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x = torch.randn(1, 3, 224, 224)
        model(x).sum().backward()
        optimizer.step()
        ticket = eb.draw(model, 0.5, example_inputs=x, coupled="group")
        gc.collect()
        give_back()  # else the copy would fit into what malloc keeps, and show in no peak
        peak = PeakMemory("cpu")
        before = resident()
        peak.reset()
        start = time.perf_counter()
        eb.shrink(model, ticket, x, optimizer=optimizer)
        seconds.append(time.perf_counter() - start)
        extra.append(max((peak.read() or before) - before, 0))
    return {
        "seconds": statistics.median(seconds), "limit": 3.0, "extra_bytes": max(extra), "model_bytes": size,
        "detail": f"median {statistics.median(seconds):.2f} s, at most +{max(extra) / 2**20:.0f} MiB "
        f"over a model of {size / 2**20:.0f} MiB",
    }  # fmt: skip


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


def data(steps: int = 60) -> dict[str, Any]:
    """Share of a ResNet-20 step that loading and augmenting the batch takes."""
    model = build("resnet20", classes=10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loaded, spent, start = batches().epoch(0), 0.0, 0.0
    for step in range(steps + 3):
        if step == 3:
            spent, start = 0.0, time.perf_counter()
        before = time.perf_counter()
        x, y = next(loaded)
        spent += time.perf_counter() - before
        stepper(model, optimizer, x, y, True)()
    total = time.perf_counter() - start
    return {
        "share": spent / total,
        "limit": 0.05,
        "detail": f"{1e3 * spent / steps:.2f} of {1e3 * total / steps:.0f} ms a step",
    }


def checkpoint() -> dict[str, Any]:
    """Share of a run that a checkpoint every epoch takes: ResNet-20 at half width on CIFAR-10, 2 epochs."""
    from earlybird.train import run as running
    from earlybird.train.recipe import Recipe

    spent, inner = 0.0, running.Run.save

    def timed(self: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        try:
            return inner(self)
        finally:
            spent += time.perf_counter() - start

    running.Run.save = timed  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            recipe = Recipe.from_values(
                {
                    "model": "resnet20",
                    "data": "cifar10",
                    "width": 0.5,
                    "epochs": 2,
                    "keep": 0.5,
                    "checkpoint_every": "1ep",
                }
            )
            result = running.train(recipe, Path(folder) / "run", quiet=True)
    finally:
        running.Run.save = inner  # type: ignore[method-assign]
    return {"share": spent / result.seconds, "limit": 0.02, "detail": f"{spent:.2f} of {result.seconds:.0f} s"}


COMMANDS = {
    "help": ("-m", "earlybird", "--help"),
    "torch": ("-c", "import torch"),
    "library": ("-c", "import torch, earlybird"),
    "everything": ("-c", "import torch, earlybird as eb; eb.EarlyBird, eb.draw, eb.shrink, eb.Ticket"),
}


def startup(rounds: int = 5) -> dict[str, Any]:
    """Seconds of ``earlybird --help``, and what importing the library adds to ``import torch``.

    One round comes first and is not counted. `common.interleaved` does not fit: to it, these processes are of others.
    """
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(1 + rounds):
        for name, words in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True, env=environment())
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    shown, plain = (statistics.median(seconds[name]) for name in ("help", "torch"))
    library, everything = (
        statistics.median(own / torch_s for own, torch_s in zip(seconds[name], seconds["torch"]))
        for name in ("library", "everything")
    )
    return {
        "seconds": shown, "limit": 0.3, "import_over_torch": library, "import_all_over_torch": everything,
        "detail": f"--help {shown:.2f} s; import torch {plain:.2f} s, with earlybird {library:.2f}x, "
        f"with all of its names used {everything:.2f}x",
    }  # fmt: skip


FIGURES = {
    "detector": detector, "hooks": hooks, "shrink": shrink, "data": data, "checkpoint": checkpoint, "startup": startup,
}  # fmt: skip
QUICK = ("detector", "shrink", "startup")


def measured(row: Mapping[str, Any]) -> str:
    """Return a row's share or seconds as text."""
    if "share" in row:
        return f"{row['share']:.2%}"
    return f"{row['seconds']:.2f} s" if "seconds" in row else ""


def verdict(row: Mapping[str, Any]) -> str:
    """Say whether a row's share or seconds are within its limit; nothing of a row that has none."""
    if "limit" not in row:
        return ""
    limit = f"{row['limit']:.2%}" if "share" in row else f"{row['limit']:.2f} s"
    kept = row.get("share", row.get("seconds")) <= row["limit"]
    return f"within {limit}" if kept else f"ABOVE {limit}"


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the newest row of each figure and machine as Markdown."""
    parts = []
    for _, own in by_machine(found):
        mine = newest(own, "figure")
        lines = [
            origin(mine),
            "",
            "| figure | share or seconds | limit | what was measured |",
            "| --- | --- | --- | --- |",
        ]
        lines += [f"| {row['figure']} | {measured(row)} | {verdict(row)} | {row['detail']} |" for row in mine]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", nargs="*", metavar="figure", help=f"of {', '.join(FIGURES)}; default: all")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}; nothing is recorded")
    parser.add_argument("--table", action="store_true", help="print the table of the newest rows and stop")
    options = parser.parse_args(words)
    check_known(parser, "figure", options.figures, FIGURES)
    options.figures = options.figures or list(QUICK if options.quick else FIGURES)
    return options


def main() -> None:
    options = read()
    if options.table:
        print(table(rows(NAME)))
        return
    keep_freed()  # as `earlybird train` does
    for name in options.figures:
        head = machine()
        row = {"figure": name, **FIGURES[name](), **head}
        record(NAME, row, quick=options.quick)
        print(f"{name:<12}{measured(row):<10}{verdict(row):<16}{row['detail']}", flush=True)


if __name__ == "__main__":
    main()
