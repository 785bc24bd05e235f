"""Question: where images are few and epochs many, what does the early ticket save, and does it keep the accuracy?

A user with some thousand images of an own trains for dozens of epochs, and what limits accuracy is data, not the
network. VGG-16-BN on 5,000 images of CIFAR-10 (tested on all 10,000), 60 epochs. An epoch is 39 steps here, so the
ticket is drawn after a share of the run. Controls: dense for the time of the ticket by layer, and the widths of that
ticket from the start.

    EARLYBIRD_DATA=... python benchmarks/few_images.py                    # resumable
    python benchmarks/few_images.py --table
"""

from __future__ import annotations

from pathlib import Path

from contest import Contestant, Task, main
from tables import contest_section, contest_tables

NAME = "few_images"

_ALL = ("plain", "dense", "ticket", "ticket_layer", "ticket_layer-small", "dense-equal-time", "ticket-shuffled")
_FEW = {"train_images": 5000, "epochs": 60, "evaluate_every": "5ep"}

TASKS = {
    "half": Task(
        "VGG-16-BN, half width, 5,000 images of CIFAR-10, 60 epochs", "vgg16-cifar10", {**_FEW, "width": 0.5},
        contestants=(*_ALL, "narrow-quarter"),
    ),
    "full": Task(
        "VGG-16-BN, 5,000 images of CIFAR-10, 60 epochs", "vgg16-cifar10", {**_FEW, "width": 1}, seeds=1,
        contestants=(*_ALL, "narrow-half"),
    ),
    "quick": Task(
        "VGG-11-BN, 1/8 width, 1,000 images of CIFAR-10, 10 epochs (shows that it runs, proves nothing)",
        "vgg16-cifar10",
        {"model": "vgg11", "width": 0.125, "train_images": 1000, "epochs": 10, "evaluate_every": "5ep"},
        seeds=1, budget_s=300, contestants=("dense", "ticket", "ticket_layer"),
    ),
}  # fmt: skip

_EARLY = {"look_every": "1%", "skip": "5%", "deadline": "10%"}

CONTESTANTS = {
    "plain": Contestant("plain PyTorch (fp32, eager, DataLoader)", "dense", rival="plain"),
    "dense": Contestant("dense, tuned", "dense", {"dense": True}),
    "ticket": Contestant("**early ticket**", "ours", {"keep": 0.5, **_EARLY}),
    "ticket_layer": Contestant("**early ticket**, by layer", "ours", {"keep": 0.5, "scope": "layer", **_EARLY}),
    "ticket_layer-small": Contestant(
        "**early ticket**, by layer, keep 0.3", "ours", {"keep": 0.3, "scope": "layer", **_EARLY}
    ),
    "dense-equal-time": Contestant(
        "dense, fewer epochs: the time of the ticket by layer", "dense", {"dense": True},
        needs=("dense", "ticket_layer"), equal_time=True,
    ),
    "ticket-shuffled": Contestant(
        "random channels in the widths of the ticket by layer", "ours",
        {"keep": 0.5, "scope": "layer", "shuffle": True, **_EARLY},
    ),
    "narrow-half": Contestant(
        "half as wide from the start: the widths of the ticket by layer", "dense", {"dense": True, "width": 0.5}
    ),
    "narrow-quarter": Contestant(
        "half as wide from the start: the widths of the ticket by layer", "dense", {"dense": True, "width": 0.25}
    ),
}  # fmt: skip


def table() -> str:
    """Return the results as Markdown, one table a network."""
    return contest_tables(NAME, TASKS, CONTESTANTS)


def section(images: Path) -> str:
    """Return tables and plots for the page of all results."""
    return contest_section(NAME, TASKS, CONTESTANTS, images)


if __name__ == "__main__":
    main(NAME, __doc__, TASKS, CONTESTANTS, table, default=["half"])
