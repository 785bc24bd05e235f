"""Question: does 94 % on CIFAR-10 come in less time with our methods on top of the fastest dense recipe there is?

The speed-run recipe (`recipes/speedrun-cifar10.toml`) alone, for fewer epochs, and with progressive resizing, an early
ticket, or both. The question is the time to 94 %, so a contestant that ends below it has lost, however fast it was.

    EARLYBIRD_DATA=... python benchmarks/speedrun_cifar10.py             # an hour and a half, resumable
    python benchmarks/speedrun_cifar10.py --table
"""

from __future__ import annotations

from pathlib import Path

from contest import Contestant, Task, main
from tables import contest_section, contest_tables

NAME = "speedrun_cifar10"

TASKS = {
    "speedrun": Task("Speed-run network, CIFAR-10, 8 epochs", "speedrun-cifar10", {"epochs": 8}),
    "quick": Task(
        "Speed-run network, 1/8 width, CIFAR-10, 1 epoch (shows that it runs, proves nothing)", "speedrun-cifar10",
        {"epochs": 1, "width": 0.125, "stem_until": "0.5ep"}, seeds=1, budget_s=300,
    ),
}  # fmt: skip

_TICKET = {"keep": 0.7, "skip": "20%", "look_every": "2%", "deadline": "25%"}
_RESIZING = {"initial_scale": 0.75, "grow_from": "40%", "whole_from": "70%"}

CONTESTANTS = {
    "dense": Contestant("the recipe, dense", "dense", {"dense": True}),
    "ticket": Contestant("**early ticket**", "ours", _TICKET),
    "resized": Contestant("**progressive resizing**", "ours", {"method": "progressive_resizing", **_RESIZING}),
    "resized-longer": Contestant(
        "**progressive resizing, 9 epochs**", "ours", {"method": "progressive_resizing", **_RESIZING}, longer=9 / 8
    ),
    "resized-ticket": Contestant(
        "**progressive resizing, early ticket**",
        "ours",
        {"method": "early_bird,progressive_resizing", **_RESIZING, **_TICKET},
    ),
    "dense-equal-time": Contestant(
        "dense, fewer epochs: the time of the resized 9",
        "dense",
        {"dense": True},
        needs=("dense", "resized-longer"),
        equal_time=True,
    ),
}


def table() -> str:
    """Return the results as Markdown."""
    return contest_tables(NAME, TASKS, CONTESTANTS)


def section(images: Path) -> str:
    """Return tables and plots for the page of all results."""
    return contest_section(NAME, TASKS, CONTESTANTS, images)


if __name__ == "__main__":
    main(NAME, __doc__, TASKS, CONTESTANTS, table, default=["speedrun"])
