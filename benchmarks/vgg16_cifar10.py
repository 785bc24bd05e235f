"""Question: what is the fastest way to an accuracy of VGG-16-BN on CIFAR-10, everything it takes included?

Side by side, seed by seed, each in a process of its own: plain PyTorch, tuned dense, early tickets, and what a user
would pick instead (`rivals/`): dense for the ticket's time, a narrower network, pruning after training, slimming,
tickets at initialisation, lottery tickets, and the usual speed-ups. `contest.py` says how.

    EARLYBIRD_DATA=... python benchmarks/vgg16_cifar10.py                        # all, resumable
    EARLYBIRD_DATA=... python benchmarks/vgg16_cifar10.py --contestants dense,ticket --budget 60
    EARLYBIRD_DATA=... python benchmarks/vgg16_cifar10.py --tasks quick          # minutes
    python benchmarks/vgg16_cifar10.py --table
"""

from __future__ import annotations

from pathlib import Path

from contest import Contestant, Task, main
from tables import contest_section, contest_tables

NAME = "vgg16_cifar10"

TASKS = {
    "half": Task("VGG-16-BN, half width, CIFAR-10, 10 epochs", "vgg16-cifar10", {"width": 0.5, "epochs": 10}),
    "full": Task("VGG-16-BN, CIFAR-10, 5 epochs", "vgg16-cifar10", {"width": 1, "epochs": 5}, seeds=1, budget_s=7200),
    "quarter": Task("VGG-16-BN, quarter width, CIFAR-10, 8 epochs", "vgg16-cifar10", {"width": 0.25, "epochs": 8}),
    "quick": Task(
        "VGG-11-BN, 1/8 width, CIFAR-10, 2 epochs (shows that it runs, proves nothing)", "vgg16-cifar10",
        {"model": "vgg11", "width": 0.125, "epochs": 2}, seeds=1, budget_s=300,
    ),
}  # fmt: skip

# in the order of the tables
CONTESTANTS = {
    "plain": Contestant("plain PyTorch (fp32, eager, DataLoader)", "dense", rival="plain"),
    "dense": Contestant("dense, tuned", "dense", {"dense": True}),
    "ticket": Contestant("**early ticket** (default)", "ours", {"keep": 0.5}),
    "ticket_layer": Contestant("**early ticket**, by layer", "ours", {"keep": 0.5, "scope": "layer"}),
    "resized": Contestant("**progressive resizing**", "ours", {"method": "progressive_resizing"}),
    "resized-ticket": Contestant(
        "**early ticket, progressive resizing**", "ours", {"keep": 0.5, "method": "early_bird,progressive_resizing"}
    ),
    "ticket-small-search": Contestant(
        "**early ticket**, searched on images of half the side (`--preset fast`)",
        "ours",
        {"keep": 0.5, "preset": "fast"},
    ),
    "ticket-stages": Contestant(
        "**early ticket**, in two stages (75 %, 50 %)", "ours", {"keep": 0.5, "stages": "0.75"}
    ),
    "ticket-longer": Contestant("**early ticket** (default), 1.4 times the epochs", "ours", {"keep": 0.5}, longer=1.4),
    "ticket_layer-longer": Contestant(
        "**early ticket**, by layer, twice the epochs", "ours", {"keep": 0.5, "scope": "layer"}, longer=2
    ),
    "resized-ticket-longer": Contestant(
        "**early ticket, progressive resizing**, 1.6 times the epochs",
        "ours",
        {"keep": 0.5, "method": "early_bird,progressive_resizing"},
        longer=1.6,
    ),
    "resized-ticket_layer-longer": Contestant(
        "**early ticket, by layer, progressive resizing**, 1.6 times the epochs",
        "ours",
        {"keep": 0.5, "scope": "layer", "method": "early_bird,progressive_resizing"},
        longer=1.6,
    ),
    "dense-equal-time": Contestant(
        "dense, fewer epochs: the ticket's time", "dense", {"dense": True}, needs=("dense", "ticket"), equal_time=True
    ),
    "small-dense": Contestant(
        "narrower from the start, the ticket's cost", "dense", rival="small-dense", needs=("dense", "ticket")
    ),
    "small-dense-longer": Contestant(
        "narrower from the start, the ticket's cost, 1.4 times the epochs",
        "dense",
        rival="small-dense",
        needs=("dense", "ticket"),
        longer=1.4,
    ),
    "random-ticket": Contestant(
        "random ticket at initialisation", "at initialisation", rival="random-ticket", needs=("dense", "ticket")
    ),
    "snip": Contestant("SNIP at initialisation", "at initialisation", rival="snip", needs=("dense", "ticket")),
    "grasp": Contestant("GraSP at initialisation", "at initialisation", rival="grasp", needs=("dense", "ticket")),
    "synflow": Contestant("SynFlow at initialisation", "at initialisation", rival="synflow", needs=("dense", "ticket")),
    "prune-finetune-magnitude": Contestant(
        "train, prune (magnitude), fine-tune",
        "after training",
        rival="prune-finetune-magnitude",
        needs=("dense", "ticket"),
        takes_over=True,
    ),
    "prune-finetune-taylor": Contestant(
        "train, prune (Taylor), fine-tune",
        "after training",
        rival="prune-finetune-taylor",
        needs=("dense", "ticket"),
        takes_over=True,
    ),
    "prune-finetune-bn_scale": Contestant(
        "train, prune (BN scale), fine-tune",
        "after training",
        rival="prune-finetune-bn_scale",
        needs=("dense", "ticket"),
        takes_over=True,
    ),
    "prune-finetune-gradual": Contestant(
        "train, prune gradually, fine-tune",
        "after training",
        rival="prune-finetune-gradual",
        needs=("dense", "ticket"),
        takes_over=True,
    ),
    "slimming": Contestant("network slimming", "after training", rival="slimming", needs=("dense", "ticket")),
    "slimming-strong": Contestant(
        "network slimming, 10 times the L1 term",
        "after training",
        {"sparsity": 1e-3},
        rival="slimming",
        needs=("dense", "ticket"),
    ),
    "soft-filter": Contestant("soft filter pruning", "after training", rival="soft-filter", needs=("dense", "ticket")),
    "lottery-one-shot": Contestant(
        "lottery ticket, one shot", "lottery", rival="lottery-one-shot", needs=("dense", "ticket"), takes_over=True
    ),
    "lottery-iterative": Contestant(
        "lottery ticket, iterative, rewound to the first epoch's end",
        "lottery",
        {"rewind_epochs": 1},
        rival="lottery-iterative",
        needs=("dense", "ticket"),
    ),
    "progressive-resizing": Contestant("progressive resizing", "speed-up", rival="progressive-resizing"),
    "layer-freezing": Contestant("layer freezing", "speed-up", rival="layer-freezing"),
    "selective-backprop": Contestant("selective backprop", "speed-up", rival="selective-backprop"),
}


def table() -> str:
    """Return the results as Markdown, one table a task."""
    return contest_tables(NAME, TASKS, CONTESTANTS)


def section(images: Path) -> str:
    """Return tables and plots for the page of all results."""
    return contest_section(NAME, TASKS, CONTESTANTS, images)


if __name__ == "__main__":
    main(NAME, __doc__, TASKS, CONTESTANTS, table, default=["half"])
