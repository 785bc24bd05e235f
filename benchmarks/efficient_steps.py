"""Question: what do methods that spend less on every step save and lose, against controls of equal cost?

Each task is one claim, its contestants the method, what it is measured against, and dense:

- ``dropping``: half of the batches against half of the epochs, which make as many steps;
- ``skipping``: gates against stochastic depth that runs the same share of the blocks, and a network of fewer blocks;
- ``skipping-time``: the same at full width, with gates that spare MACs, and with gates that spare seconds;
- ``ladder``: bits that rise at turning points against 8 bits throughout, against the ladder turned round, and against
  bits chosen by gates or by chance (FracTrain), all simulated: bit-MACs are what is saved, seconds are not;
- ``signs``: predicted signs against the signs of full gradients;
- ``e2``: batch dropping, layer skipping and predicted signs at once (E2-Train) against full precision;
- ``operations``: shift, add and both against convolutions;
- ``search``: a ticket searched for in 8-bit block floating point against one searched for in bf16;
- ``together``: methods on top of the early ticket.

    EARLYBIRD_DATA=... python benchmarks/efficient_steps.py --side-by-side 2         # hours, resumable
    EARLYBIRD_DATA=... python benchmarks/efficient_steps.py --tasks dropping --seeds 1
    python benchmarks/efficient_steps.py --table
"""

from __future__ import annotations

from pathlib import Path

from contest import Contestant, Task, distance, main
from tables import blocks, contest_section, contest_tables

NAME = "efficient_steps"

_FEW = {"train_images": 10_000, "evaluate_every": "5ep"}

TASKS = {
    "dropping": Task(
        "Batch dropping: VGG-11, quarter width, CIFAR-10, 12 epochs", "vgg16-cifar10",
        {"model": "vgg11", "width": 0.25, "epochs": 12},
        contestants=("dense", "half-the-epochs", "dropping", "dropping-bernoulli"),
    ),
    "skipping": Task(
        "Layer skipping: ResNet-38, half width, CIFAR-10, 6 epochs", "resnet20-cifar10",
        {"model": "resnet38", "width": 0.5, "epochs": 6},
        contestants=("dense", "skipping", "stochastic-depth", "shallower"),
    ),
    "skipping-time": Task(
        "Layer skipping: ResNet-38, 10,000 images of CIFAR-10, 8 epochs", "resnet20-cifar10",
        {"model": "resnet38", "epochs": 8, **_FEW},
        contestants=("dense", "skipping", "skipping-seconds", "stochastic-depth"),
    ),
    "ladder": Task(
        "Bits: ResNet-20, half width, 10,000 images of CIFAR-10, 10 epochs", "resnet20-cifar10",
        {"width": 0.5, "epochs": 10, **_FEW},
        contestants=(
            "dense", "eight", "six", "ladder", "ladder-points", "ladder-published", "reversed", "fractional",
            "random-bits",
        ),
        baseline="eight",
    ),
    "signs": Task(
        "Signs: ResNet-20, half width, 10,000 images of CIFAR-10, 10 epochs", "resnet20-cifar10",
        {"width": 0.5, "epochs": 10, "train_images": 10_000},
        contestants=("dense", "sign-sgd", "signs"), baseline="sign-sgd",
    ),
    "e2": Task(
        "E2-Train: ResNet-38, half width, 10,000 images of CIFAR-10, 8 epochs", "resnet20-cifar10",
        {"model": "resnet38", "width": 0.5, "epochs": 8, **_FEW},
        contestants=("full-precision", "e2", "e2-longer"), baseline="full-precision",
    ),
    "operations": Task(
        "Operations: small CNN, half width, Fashion-MNIST, 4 epochs", "digits",
        {"data": "fashion-mnist", "model": "small_cnn", "width": 0.5, "batch_size": 128, "epochs": 4},
        contestants=("dense", "shift", "add", "shift-add", "frozen-shift"),
    ),
    "search": Task(
        "Search in few bits: VGG-11, quarter width, CIFAR-10, 8 epochs", "vgg16-cifar10",
        {"model": "vgg11", "width": 0.25, "epochs": 8},
        contestants=("dense", "ticket", "ticket-8-bit"),
    ),
    "together": Task(
        "Together: ResNet-20, 5,000 images of CIFAR-10, 20 epochs", "resnet20-cifar10",
        {"epochs": 20, "train_images": 5_000, "evaluate_every": "10ep"},
        contestants=("wide-ticket", "wide-ticket-shorter", "wide-ticket-resized", "ticket-dropping", "all"),
        baseline="wide-ticket",
    ),
    "quick": Task(
        "Small CNN, digits, 2 epochs (shows that it runs, proves nothing)", "digits", {"epochs": 2, "width": 0.25},
        seeds=1, budget_s=300,
        contestants=("dense", "dropping", "ladder", "shift"),
    ),
}  # fmt: skip

_SHARE = 0.6
_EIGHT = {"method": "progressive_precision", "forward_ladder": "8", "gradient_ladder": "8"}
_FRACTIONAL = {"method": "fractional_precision", "fractional_target": "0.018,0.02,0.025"}
_SIGNS = {"method": "predictive_sign", "lr": 0.03}
_E2 = {
    "method": "batch_dropping,layer_skipping,predictive_sign", "drop": 0.5, "layer_share": _SHARE, "lr": _SIGNS["lr"],
    "ema": 0.99,  # the paper ends with an average of the weights
}  # fmt: skip

CONTESTANTS = {
    "dense": Contestant("dense, tuned", "dense", {"dense": True}),
    "half-the-epochs": Contestant("dense, half of the epochs", "dense", {"dense": True}, longer=0.5),
    "dropping": Contestant("**batch dropping**, half of the batches", "ours", {"method": "batch_dropping=0.5"}),
    "dropping-bernoulli": Contestant(
        "**batch dropping**, each batch by itself", "ours",
        {"method": "batch_dropping=0.5", "drop_rule": "bernoulli"},
    ),
    "skipping": Contestant(
        "**layer skipping**, 60 % of the blocks", "ours", {"method": "layer_skipping", "layer_share": _SHARE}
    ),
    "skipping-seconds": Contestant(
        "**layer skipping**, 60 % of the blocks' time", "ours",
        {"method": "layer_skipping", "layer_share": _SHARE, "layer_cost": "seconds"},
    ),
    "stochastic-depth": Contestant(
        "stochastic depth, 60 % of the blocks", "speed-up",
        {"method": "stochastic_depth", "depth_share": _SHARE, "depth_scale": "evaluation"},
    ),
    "shallower": Contestant("ResNet-20: fewer blocks", "dense", {"dense": True, "model": "resnet20"}),
    "eight": Contestant("8 bits throughout", "speed-up", _EIGHT),
    "six": Contestant(
        "6 bits throughout", "speed-up",
        {"method": "progressive_precision", "forward_ladder": "6", "gradient_ladder": "6"},
    ),
    "ladder": Contestant("**progressive precision**", "ours", {"method": "progressive_precision"}),
    "ladder-points": Contestant(
        "**progressive precision**, rungs at 15, 45 and 85 % of the run", "ours",
        {"method": "progressive_precision", "rungs_at": "15%,45%,85%"},
    ),
    "ladder-published": Contestant(
        "progressive precision as published, but with looks by shares of the run and a deadline", "ours",
        {
            "method": "progressive_precision", "ladder_ranges": "batch", "gradient_ladder": "6,6,8,8",
            "first_rung_until": "none", "last_rung_by": "75%",
        },
    ),
    "reversed": Contestant(
        "the ladder turned round", "speed-up",
        {
            "method": "progressive_precision", "forward_ladder": "8,6,4,3", "gradient_ladder": "8,6,6,6",
            "ladder_may_fall": True,
        },
    ),
    "fractional": Contestant("**fractional precision** (FracTrain)", "ours", _FRACTIONAL),
    "random-bits": Contestant(
        "random bits of the same mean", "speed-up", {**_FRACTIONAL, "fractional_choice": "random"}
    ),
    "sign-sgd": Contestant("SignSGD, full precision", "speed-up", {**_SIGNS, "sign_of": "full"}),
    "signs": Contestant("**predicted signs**", "ours", _SIGNS),
    "full-precision": Contestant("dense, fp32", "dense", {"dense": True, "precision": "fp32"}),
    "e2": Contestant("**E2-Train**: half of the batches, 60 % of the blocks, predicted signs", "ours", _E2),
    "e2-longer": Contestant("**E2-Train**, twice the epochs", "ours", _E2, longer=2),
    "shift": Contestant("shift layers", "speed-up", {"method": "shift_add", "operation": "shift"}),
    "add": Contestant("add layers", "speed-up", {"method": "shift_add", "operation": "add"}),
    "shift-add": Contestant("**shift and add layers**", "ours", {"method": "shift_add"}),
    "frozen-shift": Contestant(
        "**frozen shifts and add layers**", "ours", {"method": "shift_add", "shift_form": "frozen"}
    ),
    "ticket": Contestant("**early ticket**", "ours", {"keep": 0.5}),
    "ticket-8-bit": Contestant(
        "**early ticket**, searched for in 8-bit block floating point", "ours",
        {"keep": 0.5, "method": "early_bird,block_float"},
    ),
    "wide-ticket": Contestant("**early ticket**, 70 % of the channels", "ours", {"keep": 0.7}),
    "wide-ticket-shorter": Contestant(
        "**early ticket**, 60 % of the epochs", "ours", {"keep": 0.7}, longer=0.6
    ),
    "wide-ticket-resized": Contestant(
        "**early ticket, resizing**", "ours", {"keep": 0.7, "method": "early_bird,progressive_resizing"}
    ),
    "ticket-dropping": Contestant(
        "**early ticket, batch dropping**, a third of the batches", "ours",
        {"keep": 0.7, "method": "early_bird,batch_dropping", "drop": 0.33},
    ),
    "all": Contestant(
        "**early ticket, batch dropping, layer skipping, resizing**", "ours",
        {
            "keep": 0.7, "drop": 0.2, "layer_share": 0.8, "layer_cost": "seconds",
            "method": "early_bird,batch_dropping,layer_skipping,progressive_resizing",
        },
    ),
}  # fmt: skip


def table() -> str:
    """Return the results as Markdown, one table a task."""
    return "\n".join([contest_tables(NAME, TASKS, CONTESTANTS), *overlaps()])


def section(images: Path) -> str:
    """Return tables and plots for the page of all results."""
    return "\n".join([contest_section(NAME, TASKS, CONTESTANTS, images), *overlaps()])


def overlaps() -> list[str]:
    """Say how far tickets that were searched for in 8 bits lie from those of the same seed that were not."""
    said = []
    for _, task, newest in blocks(NAME, {"search": TASKS["search"]}):
        pairs = [
            (seed, row, newest.get(("ticket-8-bit", seed))) for (who, seed), row in newest.items() if who == "ticket"
        ]
        found = {
            seed: distance(row["ticket"], other["ticket"])
            for seed, row, other in sorted(pairs, key=lambda pair: pair[0])
            if other and "ticket" in row and "ticket" in other
        }
        if found:
            listed = ", ".join(f"{value:.3f} (seed {seed})" for seed, value in found.items())
            said.append(f"{task.title}: distance of the ticket drawn in 8 bits to the one drawn in bf16, {listed}.\n")
    return said


if __name__ == "__main__":
    main(NAME, __doc__, TASKS, CONTESTANTS, table, default=[name for name in TASKS if name != "quick"])
