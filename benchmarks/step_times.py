"""Claim: a step of the shrunk network takes a fraction of a dense step. Timed interleaved: noise hits all alike.

VGG-16-BN on 32x32 images, batch 128: plain PyTorch (eager, fp32), dense as `tune` sets it (bf16, channels_last), and
tickets at keep 0.5 drawn after a few steps on CIFAR-10, ranked over the network and layer by layer. Forward, backward
and optimizer step; no data loading, no evaluation. Every round times one step of each contestant; the median counts.

    EARLYBIRD_DATA=... python benchmarks/step_times.py --width 1 --rounds 9
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import append, interleaved, machine
from torch import nn
from torch.nn import functional

import earlybird as eb
from earlybird.cost.count import count
from earlybird.data import Augment, Loader, load
from earlybird.models import build


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--search-steps", type=int, default=20, help="dense steps before the tickets are drawn")
    parser.add_argument("--quick", action="store_true", help="a look at half width, few rounds; nothing is recorded")
    options = parser.parse_args()
    if options.quick:
        options.width, options.rounds, options.search_steps = 0.5, 3, 10
    loader = batches()
    x, y = next(loader.epoch(0))
    plain, dense = network(options.width, tuned=False), network(options.width, tuned=True)
    steps = {"plain": stepper(*plain, x.contiguous(), y, False), "dense": stepper(*dense, x, y, True)}
    macs = {name: count(model, x).forward_macs for name, (model, _) in (("plain", plain), ("dense", dense))}
    for name, scope in (("ticket", "network"), ("ticket_layer", "layer")):
        model, optimizer, _ = early_ticket(options.width, loader, options.search_steps, scope=scope)
        steps[name], macs[name] = stepper(model, optimizer, x, y, True), count(model, x).forward_macs
    head = machine()
    times, others = interleaved(steps, options.rounds)
    print(f"{head['device']}, {head['threads']} threads, torch {head['torch']}, {head['date']}, {head['revision']}")
    print("| contestant | forward MACs | ms a step (median) | plain / this | dense / this |")
    print("| --- | --- | --- | --- | --- |")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        ratios = [statistics.median(a / b for a, b in zip(times[base], times[name])) for base in ("plain", "dense")]
        print(f"| {name} | {macs[name] / 1e6:.0f} M | {1e3 * median:.0f} | {ratios[0]:.2f}x | {ratios[1]:.2f}x |")
        row = {
            "contestant": name, "width": options.width, "step_seconds": median, "rounds": options.rounds,
            "others": others, "forward_macs": macs[name], "spread": [min(times[name]), max(times[name])],
        }  # fmt: skip
        if not options.quick:
            append("step_times", {**row, **head})


if __name__ == "__main__":
    main()
