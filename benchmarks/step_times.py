"""Question: what fraction of a dense training step does a step of the shrunk network take?

VGG-16-BN on 32x32 images, batch 128: plain PyTorch (eager, fp32); dense in bf16 and channels_last by PyTorch's kernels;
dense as `tune` sets it, with kernels of our own where they gain; and with these the tickets at keep 0.5 drawn after a
few steps on CIFAR-10, ranked over the network and layer by layer. Forward, backward and optimizer step; no data
loading, no evaluation. Every round times one step of each contestant, so that noise hits all alike; medians count: of
the seconds, and of the ratios within a round. All run in one process, whose malloc keeps what is freed as
`earlybird train` sets it; plain PyTorch gets that for nothing.

    EARLYBIRD_DATA=... python benchmarks/step_times.py --width 1 --rounds 9
    EARLYBIRD_DATA=... python benchmarks/step_times.py --quick       # a look at half width; nothing is recorded
    python benchmarks/step_times.py --table                          # the table of the newest rows
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from common import interleaved, machine, rows
from records import by_machine, newest, record
from tables import origin
from torch import nn
from torch.nn import functional

import earlybird as eb
from earlybird.allocator import keep_freed
from earlybird.cost.count import count
from earlybird.data import Augment, Loader, load
from earlybird.kernels.install import Kernels, choose, install
from earlybird.models import build

NAME = "step_times"
BASES = ("plain", "dense")  # what the others are set against


def network(width: float, tuned: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build("vgg16", classes=10, width=width)
    if tuned:
        model.to(memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, x, y, bf16: bool) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(x)
        functional.cross_entropy(logits.float(), y, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def batches() -> Loader:
    """Return augmented batches of 128 CIFAR-10 images, in the layout that `tune` chooses here."""
    data = load("cifar10")
    return Loader(
        data.train_images, data.train_labels, batch_size=128, mean=data.mean, std=data.std,
        augment=Augment(crop=4, flip=True), channels_last=True,
    )  # fmt: skip


def early_ticket(
    width: float, loader: Loader, steps: int, **settings: Any
) -> tuple[nn.Module, torch.optim.Optimizer, eb.Ticket]:
    """Train the dense network for some ``steps``, draw its ticket at keep 0.5, and return what is left of it."""
    model, optimizer = network(width, tuned=True)
    last = f"{steps}it"
    search = eb.EarlyBird(keep=0.5, look_every=last, skip=last, deadline=last, **settings).attach(
        model, optimizer, example_inputs=next(loader.epoch(0))[0][:1]
    )
    for images, labels in (batch for _, batch in zip(range(steps), loader.epoch(0))):
        stepper(model, optimizer, images, labels, True)()
    search.detach()
    return model, optimizer, search.ticket


def measure(width: float, rounds: int, search_steps: int) -> list[dict[str, Any]]:
    """Time the steps of all contestants of one width; return a row each."""
    loader = batches()
    x, y = next(loader.epoch(0))
    plain, dense = network(width, tuned=False), network(width, tuned=True)
    kernels, _ = choose(dense[0], x, torch.bfloat16)
    theirs = network(width, tuned=True)
    steps = {
        "plain": stepper(*plain, x.contiguous(), y, False), "dense_pytorch": stepper(*theirs, x, y, True),
        "dense": stepper(*dense, x, y, True),
    }  # fmt: skip
    macs = dict.fromkeys(steps, count(plain[0], x).forward_macs)
    install(dense[0], kernels, x)
    for name, scope in (("ticket", "network"), ("ticket_layer", "layer")):
        model, optimizer, _ = early_ticket(width, loader, search_steps, scope=scope)
        install(model, kernels, x)
        steps[name], macs[name] = stepper(model, optimizer, x, y, True), count(model, x).forward_macs
    head = machine()
    times, others = interleaved(steps, rounds)
    return [
        {
            "contestant": name, "width": width, "step_seconds": statistics.median(taken), "rounds": rounds,
            "others": others, "forward_macs": macs[name], "spread": [min(taken), max(taken)],
            "kernels": asdict(Kernels() if name in ("plain", "dense_pytorch") else kernels),
            "ratios": {
                base: statistics.median(a / b for a, b in zip(times[base], taken)) for base in BASES if base != name
            },
            **head,
        }
        for name, taken in times.items()
    ]  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the newest session of each width and machine as Markdown, widest first.

    Ratios are those that the row was recorded with; a row without them, from before, has none.
    """
    parts = []
    for _, own in by_machine(found):
        for width in sorted({row["width"] for row in own}, reverse=True):
            mine = [row for row in newest(own, "width") if row["width"] == width]
            lines = [
                f"Width {width:g}: {origin(mine)}", "",
                "| network | forward MACs | ms a step (median) | plain / this | dense / this |",
                "| --- | --- | --- | --- | --- |",
            ]  # fmt: skip
            for row in mine:
                ratios = row.get("ratios", {})
                cells = [f"{ratios[base]:.2f}x" if base in ratios else "" for base in BASES]
                macs, ms = f"{row['forward_macs'] / 1e6:.0f} M", f"{1e3 * row['step_seconds']:.0f}"
                lines.append("| " + " | ".join([row["contestant"], macs, ms, *cells]) + " |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--search-steps", type=int, default=20, help="dense steps before the tickets are drawn")
    parser.add_argument("--quick", action="store_true", help="a look at half width, few rounds; nothing is recorded")
    parser.add_argument("--table", action="store_true", help="print the table of the newest rows and stop")
    options = parser.parse_args(words)
    if options.quick:
        options.width, options.rounds, options.search_steps = 0.5, 3, 10
    return options


def main() -> None:
    options = read()
    if options.table:
        print(table(rows(NAME)))
        return
    keep_freed()  # as `earlybird train` does
    found = measure(options.width, options.rounds, options.search_steps)
    for row in found:
        record(NAME, row, quick=options.quick)
    print(table(found))


if __name__ == "__main__":
    main()
