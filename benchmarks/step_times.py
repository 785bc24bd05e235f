"""Claim: a step of the shrunk network takes a fraction of a dense step. Timed interleaved: noise hits all alike.

VGG-16-BN on 32x32 images, batch 128: plain PyTorch (eager, fp32), dense as `tune` sets it (bf16, channels_last), and
tickets at keep 0.5 drawn after a few steps on CIFAR-10, ranked over the network and layer by layer. Forward, backward
and optimizer step; no data loading, no evaluation. Every round times one step of each contestant; the median counts.

    EARLYBIRD_DATA=... python benchmarks/step_times.py --width 1 --rounds 9
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import append, machine
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--search-steps", type=int, default=20, help="dense steps before the tickets are drawn")
    options = parser.parse_args()
    data = load("cifar10")
    loader = Loader(
        data.train_images, data.train_labels, batch_size=128, mean=data.mean, std=data.std,
        augment=Augment(crop=4, flip=True), channels_last=True,
    )  # fmt: skip
    x, y = next(loader.epoch(0))
    plain, dense = network(options.width, tuned=False), network(options.width, tuned=True)
    steps = {"plain": stepper(*plain, x.contiguous(), y, False), "dense": stepper(*dense, x, y, True)}
    macs = {name: count(model, x).forward_macs for name, (model, _) in (("plain", plain), ("dense", dense))}
    for name, scope in (("ticket", "network"), ("ticket_layer", "layer")):
        model, optimizer = network(options.width, tuned=True)
        last = f"{options.search_steps}it"
        search = eb.EarlyBird(keep=0.5, scope=scope, look_every=last, skip=last, deadline=last).attach(
            model, optimizer, example_inputs=x[:1]
        )
        for images, labels in (batch for _, batch in zip(range(options.search_steps), loader.epoch(0))):
            stepper(model, optimizer, images, labels, True)()
        search.detach()
        steps[name], macs[name] = stepper(model, optimizer, x, y, True), count(model, x).forward_macs
    head = machine()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    print(f"{head['device']}, {head['threads']} threads, torch {head['torch']}, {head['date']}, {head['revision']}")
    print("| contestant | forward MACs | ms a step (median) | plain / this | dense / this |")
    print("| --- | --- | --- | --- | --- |")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        ratios = [statistics.median(a / b for a, b in zip(times[base], times[name])) for base in ("plain", "dense")]
        print(f"| {name} | {macs[name] / 1e6:.0f} M | {1e3 * median:.0f} | {ratios[0]:.2f}x | {ratios[1]:.2f}x |")
        row = {"contestant": name, "width": options.width, "step_seconds": median, "rounds": options.rounds}
        append(
            "step_times", {**row, "forward_macs": macs[name], "spread": [min(times[name]), max(times[name])], **head}
        )


if __name__ == "__main__":
    main()
