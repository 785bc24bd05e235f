"""Claims: looking for the ticket, shrinking, data, checkpoints and start-up cost next to nothing.

Each figure is a share within one process, so a busy machine slows both sides alike. Prints a table and appends a row to
`results/overheads.jsonl`; the head of the row has device, threads, versions, date and revision.

    EARLYBIRD_DATA=... python benchmarks/overheads.py            # all, some five minutes
    EARLYBIRD_DATA=... python benchmarks/overheads.py detector shrink
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import append, machine
from torch import nn
from torch.nn import functional

import earlybird as eb
from earlybird.calls import Hook
from earlybird.cost.meters import PeakMemory
from earlybird.data import Augment, Loader, load
from earlybird.models import build


def _loader(channels_last: bool = True) -> Loader:
    data = load("cifar10")
    return Loader(
        data.train_images, data.train_labels, batch_size=128, mean=data.mean, std=data.std,
        augment=Augment(crop=4, flip=True), channels_last=channels_last,
    )  # fmt: skip


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional.cross_entropy(model(x).float(), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


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
    start, batches = 0.0, _loader().epoch(0)
    for step in range(steps + 2):
        if step == 2:
            start, spent.seconds = time.perf_counter(), 0.0
        _step(model, optimizer, *next(batches))
    total = time.perf_counter() - start
    if spent.calls < 3 * steps or len(search.history) < 2:
        raise RuntimeError(f"the detector was timed {spent.calls} times in {steps} steps")
    return {
        "share": spent.seconds / total,
        "floor": 0.005,
        "detail": f"{1e3 * spent.seconds / steps:.2f} of {1e3 * total / steps:.0f} ms a step",
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
        peak = PeakMemory("cpu")
        before = resident()
        peak.reset()
        start = time.perf_counter()
        eb.shrink(model, ticket, x, optimizer=optimizer)
        seconds.append(time.perf_counter() - start)
        extra.append(max((peak.read() or before) - before, 0))
    return {
        "seconds": statistics.median(seconds), "floor_seconds": 3.0, "extra_bytes": max(extra),
        "model_bytes": size,
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
    batches, spent, start = _loader().epoch(0), 0.0, 0.0
    for step in range(steps + 3):
        if step == 3:
            spent, start = 0.0, time.perf_counter()
        before = time.perf_counter()
        x, y = next(batches)
        spent += time.perf_counter() - before
        _step(model, optimizer, x, y)
    total = time.perf_counter() - start
    return {
        "share": spent / total,
        "floor": 0.05,
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
    return {"share": spent / result.seconds, "floor": 0.02, "detail": f"{spent:.2f} of {result.seconds:.0f} s"}


def startup(times: int = 5) -> dict[str, Any]:
    """Seconds of ``earlybird --help``, and of importing the library over ``import torch``."""

    def median(*words: str) -> float:
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    shown, plain = median("-m", "earlybird", "--help"), median("-c", "import torch")
    library = median("-c", "import torch, earlybird")
    everything = median("-c", "import torch, earlybird as eb; eb.EarlyBird, eb.draw, eb.shrink, eb.Ticket")
    return {
        "help_seconds": shown, "floor_seconds": 0.3, "import_over_torch": library / plain,
        "import_all_over_torch": everything / plain,
        "detail": f"--help {shown:.2f} s; import torch {plain:.2f} s, with earlybird {library / plain:.2f}x, "
        f"with all of its names used {everything / plain:.2f}x",
    }  # fmt: skip


FIGURES = {"detector": detector, "shrink": shrink, "data": data, "checkpoint": checkpoint, "startup": startup}


def main() -> None:
    chosen = sys.argv[1:] or list(FIGURES)
    unknown = set(chosen) - set(FIGURES)
    if unknown:
        sys.exit(f"unknown figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    for name in chosen:
        head = machine()
        found = FIGURES[name]()
        append("overheads", {"figure": name, **found, **head})
        share = f"{found['share']:.2%}   " if "share" in found else ""
        print(f"{name:<12}{share}{found['detail']}", flush=True)


if __name__ == "__main__":
    main()
