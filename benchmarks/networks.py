"""Question: on other networks, too, does the early ticket cost less than tuned dense training, at its accuracy?

ResNet-20, ResNet-18, PreActResNet-29 and MobileNetV2 on CIFAR-10, dense and with an early ticket, and dense for the
ticket's time; at widths whose runs take minutes on two cores. Residual sums tie channels together, and compact networks
have few to give.

    EARLYBIRD_DATA=... python benchmarks/networks.py --budget 60      # resumable
    python benchmarks/networks.py --table
"""

from __future__ import annotations

from pathlib import Path

from contest import Contestant, Task, main
from tables import contest_section, contest_tables

NAME = "networks"

_SHORT = {"epochs": 5}

TASKS = {
    "resnet20": Task("ResNet-20, CIFAR-10, 5 epochs", "resnet20-cifar10", _SHORT),
    "resnet18": Task("ResNet-18, half width, CIFAR-10, 5 epochs", "resnet18-cifar10", {**_SHORT, "width": 0.5}),
    "preact_resnet29": Task(
        "PreActResNet-29, half width, CIFAR-10, 5 epochs", "resnet20-cifar10",
        {**_SHORT, "model": "preact_resnet29", "width": 0.5},
    ),
    "mobilenet_v2": Task(
        "MobileNetV2, quarter width, CIFAR-10, 5 epochs", "resnet20-cifar10",
        {**_SHORT, "model": "mobilenet_v2", "width": 0.25},
    ),
    "quick": Task(
        "ResNet-20, quarter width, CIFAR-10, 1 epoch (shows that it runs, proves nothing)", "resnet20-cifar10",
        {"width": 0.25, "epochs": 1}, seeds=1, budget_s=300,
    ),
}  # fmt: skip

CONTESTANTS = {
    "dense": Contestant("dense, tuned", "dense", {"dense": True}),
    "ticket": Contestant(
        "**early ticket**", "ours", {"keep": 0.5, "deadline": "20%"}
    ),  # of five epochs one, the default
    "dense-equal-time": Contestant(
        "dense, fewer epochs: the ticket's time", "dense", {"dense": True}, needs=("dense", "ticket"), equal_time=True
    ),
}


def table() -> str:
    """Return the results as Markdown, one table a network."""
    return contest_tables(NAME, TASKS, CONTESTANTS)


def section(images: Path) -> str:
    """Return tables and plots for the page of all results."""
    return contest_section(NAME, TASKS, CONTESTANTS, images)


if __name__ == "__main__":
    main(NAME, __doc__, TASKS, CONTESTANTS, table, default=[name for name in TASKS if name != "quick"])
