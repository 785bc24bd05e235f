"""Question: do tickets over single weights win, what finds them for less, and which structure keeps them in real time?

Each task is one claim of the lottery-ticket family. Its runs start from each other's files, and each has its controls:

- ``imp-mnist``, ``imp-fashion``: iterative pruning of LeNet-300-100, against the same masks with new weights, shuffled
  masks, and tickets that are drawn before training;
- ``dynamic``: SET and RigL, which need no dense training, against a random mask that stays, and against pruning;
- ``kd``: one mask, trained from the beginning, rewound, on the soft labels of the dense network, and both;
- ``elastic``: a ticket stretched from ResNet-14 to ResNet-26, against the one that pruning finds there;
- ``structure``: tickets filled up to whole channels or grouped to dense blocks, with the time of inference;
- ``sanity``, ``sanity-plain``: learning rate, epochs, shortcuts, and the gap between a ticket and its mask with new
  weights.

Accuracy is that of complete runs. Seconds are of runs on one thread beside other work, and are no claim; those of
inference in ``structure`` are measured in turns.

    EARLYBIRD_DATA=... python benchmarks/tickets.py --tasks imp-mnist            # resumable
    EARLYBIRD_DATA=... python benchmarks/tickets.py --jobs 2 --budget 60
    python benchmarks/tickets.py --table
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import WORK, append, check_known, machine, rows, spread
from figures import COLOURS, Axis, Series, chart

from earlybird.errors import Interrupted
from earlybird.files import read_rows, write_tensors
from earlybird.start import read_start
from earlybird.tickets.ticket import Ticket
from earlybird.train.children import Task as Child
from earlybird.train.children import run_all
from earlybird.train.loop import StopSignal
from earlybird.train.recipe import Recipe
from earlybird.train.result import Result

NAME = "tickets"
Changes = dict[str, Any]
At = Callable[[str], Path]
"""The folder of a run of the same seed, by its name."""


@dataclass(frozen=True)
class Run:
    """One run of a task.

    Attributes:
        label: What it is, for the table.
        changes: Keys on top of the task's recipe, given the folders of others.
        needs: Names of those.
        after: Measures more, given the run's own folder and the others'; goes into the row.
    """

    label: str
    changes: Callable[[At], Changes]
    needs: tuple[str, ...] = ()
    after: Callable[[Path, At], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Task:
    """One claim: runs on the same recipe.

    Attributes:
        title: For the table.
        recipe: Keys that all have in common.
        runs: By name, none before those that it needs.
        seeds: How many.
    """

    title: str
    recipe: Changes
    runs: Mapping[str, Run]
    seeds: int = 3


def same(**changes: Any) -> Callable[[At], Changes]:
    return lambda at: changes


# ---- iterative pruning ----


def imp_task(data: str, rounds: Sequence[int], last: int, **recipe: Any) -> Task:
    """Return iterative pruning of LeNet-300-100, with controls of the tickets of some rounds."""
    runs = {
        "imp": Run(
            "**iterative pruning**",
            same(method="iterative", keep_weights=0.8**last, prune_scope="layer", head_share=0.1),
        )
    }
    for number in rounds:

        def ticket(at: At, number: int = number) -> Changes:
            return {"method": "fixed_ticket", "ticket": str(at("imp") / "tickets" / f"round-{number}.safetensors")}

        def keep(at: At, number: int = number) -> float:
            return Ticket.load(at("imp") / "tickets" / f"round-{number}.safetensors").keep

        runs[f"reinitialised-{number}"] = Run(
            "its masks, new weights", lambda at, t=ticket: {**t(at), "fixed_weights": "reinitialise"}, ("imp",)
        )
        runs[f"shuffled-{number}"] = Run(
            "its masks shuffled in each layer", lambda at, t=ticket: {**t(at), "control": "shuffled"}, ("imp",)
        )
        for score in ("snip", "random"):
            runs[f"{score}-{number}"] = Run(
                f"{score}, before training",
                lambda at, k=keep, score=score: {
                    "method": "at_init", "init_units": "weight", "init_score": score, "init_keep": k(at),
                    "init_budget": "uniform" if score == "random" else "network",
                },
                ("imp",),
            )  # fmt: skip
    base = {
        "model": "lenet300", "data": data, "optimizer": "adamw", "lr": 1.2e-3, "weight_decay": 0.0,
        "schedule": "constant", "batch_size": 60, "crop": 0, "flip": False, "epochs": 4, **recipe,
    }  # fmt: skip
    return Task(f"Iterative pruning: LeNet-300-100, {data}, {base['epochs']} epochs a round", base, runs)


# ---- dynamic sparse training ----


def dynamic_task(densities: Sequence[float]) -> Task:
    """Return training that is sparse from the first step: a mask that stays, SET and RigL, and pruned dense training.

    All share out the weights among layers by Erdos-Renyi, but for pruning, which ranks those of the whole network.
    """
    ways = {
        "static": ("a random mask that stays", {"drop_share": 0.0}),
        "set": ("**SET**", {"preset": "set"}),
        "rigl": ("**RigL**", {}),
    }
    runs = {"dense": Run("dense", same(dense=True))}
    for density in densities:
        for name, (label, how) in ways.items():
            runs[f"{name}-{density:g}"] = Run(label, same(method="dynamic_sparse", density=density, **how))
        runs[f"imp-{density:g}"] = Run(
            "iterative pruning in five rounds",
            same(method="iterative", keep_weights=density, prune_share=1 - density ** (1 / 5)),
        )
    base = {
        "model": "lenet300", "data": "fashion-mnist", "train_images": 30_000, "lr": 0.05, "batch_size": 128,
        "crop": 0, "flip": False, "label_smoothing": 0.0, "epochs": 8, "evaluate_every": "8ep",
    }  # fmt: skip
    return Task("Dynamic sparse training: LeNet-300-100, 30,000 images of Fashion-MNIST, 8 epochs", base, runs)


# ---- distillation ----

_CIFAR = {
    "data": "cifar10", "train_images": 5000, "batch_size": 32, "label_smoothing": 0.0, "evaluate_every": "100ep",
    "exact": False, "tune": False, "precision": "bf16", "channels_last": True, "compile": False, "kernels": False,
}  # fmt: skip


def kd_task(keeps: Sequence[float], **recipe: Any) -> Task:
    """Return the ways to train one mask: from the beginning, rewound, on soft labels, and both."""
    runs = {"dense": Run("dense (the teacher)", same(dense=True))}
    runs["dense-kd"] = Run("dense, soft labels", lambda at: _soft(at, "distillation"), ("dense",))
    for keep in keeps:
        name = f"{keep:g}"

        def mask(at: At, name: str = name) -> Changes:
            return {"method": "fixed_ticket", "ticket": str(at(f"rewound-{name}"))}

        def soft(at: At, mask: Callable[[At], Changes] = mask) -> Changes:
            return {**mask(at), **_soft(at, "fixed_ticket,distillation")}

        both = ("dense", f"rewound-{name}")
        runs[f"rewound-{name}"] = Run(
            "rewound to 18 %", same(method="iterative", keep_weights=keep, prune_share=1 - keep, rewind_to="18%")
        )
        runs[f"first-{name}"] = Run("from the first weights", mask, both[1:])
        runs[f"kd-{name}"] = Run("**KD ticket**: first weights, soft labels", soft, both)
        runs[f"kd-published-{name}"] = Run(
            "KD ticket with the published temperature 5 and share 0.9",
            lambda at, soft=soft: {**soft(at), "temperature": 5.0, "soft_share": 0.9}, both,
        )  # fmt: skip
        runs[f"kd-rewound-{name}"] = Run(
            "**KD ticket, rewound**",
            lambda at, soft=soft, own=both[1]: {**soft(at), "start": str(at(own)), "start_at": "18%"},
            both,
        )
        # those that go on from the rewound step have fewer steps than those from the first weights
        whole = {"rewound-whole": ("rewound, the whole schedule from there", mask)}
        whole["kd-rewound-whole"] = ("**KD ticket, rewound**, the whole schedule from there", soft)
        for kind, (label, how) in whole.items():
            runs[f"{kind}-{name}"] = Run(
                label, lambda at, how=how, own=both[1]: {**how(at), "start": str(at(own))}, both
            )
        runs[f"new-{name}"] = Run(
            "new weights", lambda at, mask=mask: {**mask(at), "fixed_weights": "reinitialise"}, both[1:]
        )
        runs[f"new-kd-{name}"] = Run(
            "new weights, soft labels", lambda at, soft=soft: {**soft(at), "fixed_weights": "reinitialise"}, both
        )
    base = {"model": "resnet20", "width": 0.5, **_CIFAR, "epochs": 15, **recipe}
    return Task("KD tickets: ResNet-20, half width, 5,000 images of CIFAR-10, 15 epochs, one-shot masks", base, runs)


def _soft(at: At, method: str) -> Changes:
    """Return soft labels that tell more of each image's own class than the published ones do."""
    return {"method": method, "teacher": str(at("dense")), "temperature": 2.0, "soft_share": 0.7}


# ---- elastic tickets ----


def elastic_task(source: str, target: str, keep: float, **recipe: Any) -> Task:
    """Return the ways to a ticket of a deeper network."""
    prune = {"method": "iterative", "keep_weights": keep, "prune_share": 0.36, "rewind_to": "10%"}

    def stretched(**more: Any) -> Callable[[At], Changes]:
        def changes(at: At) -> Changes:
            folder = stretch_to(target, at)
            own = {"method": "fixed_ticket", "ticket": str(folder / "ticket.safetensors")}
            if more.get("fixed_weights") != "reinitialise":
                own |= {"start": str(folder / "rewind.safetensors")}
            return {**own, **more}

        return changes

    def before(score: str) -> Callable[[At], Changes]:
        return lambda at: {
            "method": "at_init", "init_units": "weight", "init_score": score, "init_keep": _stretched_keep(at, target)
        }  # fmt: skip

    base = {"model": target, "width": 0.5, **_CIFAR, "epochs": 12, **recipe}
    return Task(
        f"Elastic tickets: {source} to {target}, half width, 5,000 images of CIFAR-10, 12 epochs a round", base,
        {
            "dense": Run("dense", same(dense=True)),
            "source": Run(f"pruning of {source}, the source", same(model=source, **prune)),
            "own": Run("**its own pruning**", same(**prune)),
            "stretched": Run("**stretched**, on from the source's step", stretched(start_at="10%"), ("source",)),
            "stretched-whole": Run("**stretched**, as many epochs as dense", stretched(), ("source",)),
            "stretched-longer": Run(
                "**stretched**, half as many epochs again", stretched(epochs=1.5 * base["epochs"]), ("source",)
            ),
            "shuffled": Run(
                "stretched, shuffled by layer", stretched(start_at="10%", control="shuffled"), ("source",)
            ),
            "new": Run("stretched, new weights", stretched(fixed_weights="reinitialise"), ("source",)),
            "snip": Run("SNIP", before("snip"), ("source",)),
            "grasp": Run("GraSP", before("grasp"), ("source",)),
            "rigl": Run(
                "RigL",
                lambda at: {"method": "dynamic_sparse", "density": _stretched_keep(at, target), "regrow_every": "80it"},
                ("source",),
            ),
        },
    )  # fmt: skip


def stretch_to(target: str, at: At) -> Path:
    """Stretch the ticket of the run 'source' to another network of its family; return the folder of both files."""
    from earlybird.models import build
    from earlybird.tickets.elastic import elastic

    source, folder = at("source"), at("made")
    if not (folder / "rewind.safetensors").exists():
        recipe = Recipe.from_toml(source / "recipe.toml")
        model = build(target, classes=10, in_channels=3, image_size=32, width=recipe.width, seed=recipe.seed)
        ticket, weights = elastic(Ticket.load(source / "ticket.safetensors"), read_start(source), model.state_dict())
        ticket.save(folder / "ticket.safetensors")
        write_tensors(folder / "rewind.safetensors", weights, {})
    return folder


def _stretched_keep(at: At, target: str) -> float:
    return Ticket.load(stretch_to(target, at) / "ticket.safetensors").keep


# ---- structural tickets ----

_STRUCTURES = {"refill": "**refilled**", "refill-plus": "**refilled**, a tenth more", "regroup": "**regrouped**"}


def structure_task(model: str, made: Mapping[int, Sequence[str]], **recipe: Any) -> Task:
    """Return tickets of some rounds, each filled up to channels or grouped to blocks, and what inference takes then."""
    last = max(made)
    runs = {
        "dense": Run("dense", same(dense=True), after=_inference),
        "imp": Run(
            "iterative pruning",
            same(method="iterative", keep_weights=0.8**last, rewind_to="10%", leave_dense="first,last"),
        ),
    }
    for number, kinds in made.items():
        for kind in kinds:
            runs[f"{kind}-{number}"] = Run(
                f"{_STRUCTURES[kind]}, round {number}",
                lambda at, kind=kind, number=number: _structured(at, kind, number), ("imp", "dense"), _inference,
            )  # fmt: skip
        if "refill" in kinds:
            runs[f"random-{number}"] = Run(
                f"random channels, as many as refilled, round {number}",
                lambda at, number=number: {**_structured(at, "refill", number), "control": "shuffled"},
                ("imp", "dense"), _inference,
            )  # fmt: skip
    base = {"model": model, "width": 0.5, **_CIFAR, "epochs": 8, **recipe}
    return Task(f"Structural tickets: {model}, half width, 5,000 images of CIFAR-10, 8 epochs a round", base, runs)


def _structured(at: At, kind: str, number: int) -> Changes:
    import torch

    from earlybird.models import build
    from earlybird.tickets.structure import refill, regroup

    path = at(f"made-{kind}-{number}") / "ticket.safetensors"
    if not path.exists():
        recipe = Recipe.from_toml(at("imp") / "recipe.toml")
        model = build(recipe.model, classes=10, in_channels=3, image_size=32, width=recipe.width, seed=recipe.seed)
        ticket = Ticket.load(at("imp") / "tickets" / f"round-{number}.safetensors")
        # trained weights of a round are not kept: those of the dense network rank as they did in the first round
        model.load_state_dict(read_start(at("dense")))
        if kind == "regroup":
            made = regroup(ticket, parts=4, least_rows=4)
        else:
            made = refill(
                ticket, model, torch.zeros(1, 3, 32, 32), criterion="magnitude",
                fill_back=0.1 if kind == "refill-plus" else 0.0,
            )  # fmt: skip
        made.save(path)
    return {"method": "fixed_ticket", "ticket": str(path), "start": str(at("imp")), "start_at": "10%"}


def _inference(folder: Path, at: At) -> dict[str, Any]:
    """Time inference of the run's network and of the dense one in turns, 64 images, one thread; median of 15."""
    import torch

    from earlybird import export
    from earlybird.inference import for_inference, time_in_turns

    torch.set_num_threads(1)
    images = torch.randn(64, 3, 32, 32)
    networks = {
        name: for_inference(export.load(path), images) for name, path in (("dense", at("dense")), ("own", folder))
    }
    medians = {name: statistics.median(seconds) for name, seconds in time_in_turns(networks, images).items()}
    return {
        "inference_ms": {name: round(1e3 * value, 3) for name, value in medians.items()},
        "inference_saved": round(1 - medians["own"] / medians["dense"], 4),
    }


# ---- sanity checks ----


def sanity_task(model: str, width: float, keeps: Sequence[float], **recipe: Any) -> Task:
    """Return one-shot tickets and their masks with new weights, at two learning rates and lengths."""
    runs: dict[str, Run] = {}
    for lr in (0.01, 0.1):
        for epochs in (3, 9):
            for keep in keeps:
                how = {"lr": lr, "epochs": epochs}
                name, label = f"lr{lr:g}-{epochs}ep-{keep:g}", f"lr {lr:g}, {epochs} epochs"
                runs[name] = Run(
                    f"{label}: one-shot ticket",
                    same(method="iterative", keep_weights=keep, prune_share=1 - keep, **how),
                )
                runs[f"{name}-new"] = Run(
                    f"{label}: its mask, new weights",
                    lambda at, name=name, how=how: {
                        "method": "fixed_ticket", "ticket": str(at(name)), "fixed_weights": "reinitialise", **how,
                    },
                    (name,),
                )  # fmt: skip
    base = {"model": model, "width": width, **_CIFAR, **recipe}
    return Task(f"Sanity checks: {model}, width {width:g}, 5,000 images of CIFAR-10, one-shot masks", base, runs)


TASKS = {
    "imp-mnist": imp_task("mnist", (5, 11, 15), 15),
    "imp-fashion": imp_task("fashion-mnist", (5, 11, 15), 15),
    "dynamic": dynamic_task((0.1, 0.02)),
    "kd": kd_task((0.03,)),
    "elastic": elastic_task("resnet14", "resnet26", 0.8**6),
    "structure": structure_task("vgg11", {5: tuple(_STRUCTURES), 8: ("regroup",), 10: ("regroup",)}),
    "sanity": sanity_task("resnet14", 0.5, (0.2,)),
    "sanity-plain": sanity_task("vgg11", 0.25, (0.2,)),
    "quick": imp_task("digits", (3,), 3, batch_size=64, epochs=6),
}


def record(name: str, task: Task, who: str, seed: int, folder: Path, at: At, side_by_side: int) -> None:
    """Append the rows of a finished run: one, or one a round."""
    run, result = task.runs[who], Result.read(folder)
    assert result is not None
    total = result.bill.total
    whole = Recipe.from_toml(folder / "recipe.toml")
    head = {
        **machine(whole.threads, side_by_side), "task": name, "who": who, "label": run.label, "seed": seed,
        "recipe": whole.hash(),
    }  # fmt: skip
    cost = {
        "seconds": result.seconds,
        "macs": total.macs.value if total.macs else None,
        "joules": [total.modelled_joules.low, total.modelled_joules.high] if total.modelled_joules else None,
    }
    ends = [row for row in read_rows(folder / "metrics.jsonl") if row.get("round_ends")]
    if ends:
        for row in ends:
            append(NAME, {
                **head, "round": row["round"], "density": row["density"], "accuracy": row["accuracy"],
                "seconds": row["seconds"], "macs": row["macs"], "joules": row["modelled_joules"],
            })  # fmt: skip
        return
    ticket = folder / "ticket.safetensors"
    density = Ticket.load(ticket).keep if ticket.exists() else 1.0
    more = run.after(folder, at) if run.after else {}
    append(NAME, {**head, "density": density, "accuracy": result.accuracy, **cost, **more})


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(name for name in TASKS if name != "quick"))
    parser.add_argument("--seeds", type=int, default=None, help="how many; default: the task's")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--budget", type=float, default=None, metavar="MINUTES", help="begin no run after it")
    parser.add_argument("--table", action="store_true", help="print the tables of the rows and stop")
    options = parser.parse_args(words)
    options.names = options.tasks.split(",")
    check_known(parser, "tasks", options.names, TASKS)
    return options


def main(words: Sequence[str] | None = None) -> None:
    options = read(words)
    if options.table:
        print(table())
        return
    names = options.names
    deadline = None if options.budget is None else time.monotonic() + 60 * options.budget
    seeds = {name: options.seeds or TASKS[name].seeds for name in names}
    for seed in range(options.first_seed, options.first_seed + max(seeds.values())):  # a seed of every task first
        for name in (name for name in names if seed < options.first_seed + seeds[name]):
            if not _run_seed(name, TASKS[name], seed, options.jobs, deadline):
                return


class _Deadline(StopSignal):
    """A stop that also comes when the time is over."""

    def __init__(self, deadline: float | None) -> None:
        super().__init__()
        self._deadline = deadline

    def caught(self) -> bool:
        return super().caught() or (self._deadline is not None and time.monotonic() > self._deadline)


def _run_seed(name: str, task: Task, seed: int, jobs: int, deadline: float | None) -> bool:
    """Run what is missing of one seed; False when the time is over. A run that was cut short goes on next time."""
    folder = WORK / NAME / f"{name}-seed{seed}"

    def at(who: str) -> Path:
        return folder / who

    known = {(row["task"], row["who"], row["seed"]) for row in rows(NAME)}
    if all((name, who, seed) in known for who in task.runs):
        return True  # measured elsewhere: there are rows, and no folders
    base = {"threads": 1, "exact": True, **task.recipe, "seed": seed}
    children = [
        Child(at(who), lambda run=run: Recipe.from_values({**base, **run.changes(at)}), tuple(map(at, run.needs)))
        for who, run in task.runs.items()
    ]

    def done(child: Child) -> None:
        if (name, child.path.name, seed) not in known:
            record(name, task, child.path.name, seed, child.path, at, jobs)

    with _Deadline(deadline) as stop:
        try:
            run_all(children, stop, jobs=jobs, quiet=False, on_done=done)
        except Interrupted:
            if deadline is None or time.monotonic() < deadline:
                raise
            return False
    return True


# ---- tables ----


def table() -> str:
    """Return the results as Markdown, one table a task: accuracy at each density, mean and spread over seeds."""
    return "\n\n".join(text for name in TASKS if name != "quick" and (text := _table(name)))


def section(images: Path) -> str:
    """Return tables and plots for the page of all results."""
    parts = []
    for name, task in TASKS.items():
        text = _table(name) if name != "quick" else ""
        if not text:
            continue
        parts.append(text)
        if name.startswith("imp"):
            file = images / f"tickets-{name}.svg"
            file.write_text(_plot(name, task), encoding="utf-8")
            parts.append(f"![{task.title}]({images.name}/{file.name})")
    return "\n\n".join(parts)


def _plot(name: str, task: Task) -> str:
    series = [
        Series(
            points=[
                (density, 100 * statistics.fmean(found)) for density, found in sorted(points.items(), reverse=True)
            ],
            colour=colour,
            label=label.replace("*", ""),
        )
        for (label, points), colour in zip(_by_label(name).items(), COLOURS)
    ]
    x, y = zip(*(point for one in series for point in one.points))
    newest = _newest(name)[-1]
    return chart(
        series, Axis.around(x, "share of the weights that is left", log=True), Axis.around(y, "test accuracy, %"),
        title=task.title, note=f"{newest['device']}, torch {newest['torch']}, {newest['date']}; means over seeds",
    )  # fmt: skip


def _newest(name: str) -> list[dict[str, Any]]:
    """Return the newest row of each run, seed and round, of runs that the task still has."""
    known = TASKS[name].runs
    found = {
        (row["who"], row["seed"], row.get("round")): row
        for row in rows(NAME)
        if row["task"] == name and row["who"] in known
    }
    return list(found.values())


def _by_label(name: str) -> dict[str, dict[float, list[float]]]:
    """Return accuracies by label and density, which is rounded so that seeds meet; one of each seed."""
    found = {(row["label"], float(f"{row['density']:.2g}"), row["seed"]): row["accuracy"] for row in _newest(name)}
    labels: dict[str, dict[float, list[float]]] = {}
    for (label, density, _), accuracy in found.items():
        labels.setdefault(label, {}).setdefault(density, []).append(accuracy)
    return labels


def _table(name: str) -> str:
    found = _newest(name)
    if not found:
        return ""
    task, labels = TASKS[name], _by_label(name)
    order = list(dict.fromkeys(run.label for run in task.runs.values()))
    shown = _densities(labels) if name.startswith("imp") else None  # all contenders at the same shares
    lines = [f"**{task.title}** (test accuracy in %, mean ± standard deviation, number of seeds)\n"]
    if shown is not None:
        lines.append("| share of weights | " + " | ".join(f"{100 * d:.3g} %" for d in shown) + " |")
        lines.append("| --- " * (len(shown) + 1) + "|")
        for label in (label for label in order if label in labels):
            cells = [_cell(labels[label].get(density)) for density in shown]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    else:
        timed = [row for row in found if "inference_saved" in row]
        lines += ["| run | share of weights or channels | accuracy |" + (" inference time saved |" if timed else ""),
                  "| --- | --- | --- |" + (" --- |" if timed else "")]  # fmt: skip
        for label in (label for label in order if label in labels):
            for density, values in sorted(labels[label].items(), reverse=True):
                line = f"| {label} | {100 * density:.3g} % | {_cell(values)} |"
                saved = [100 * row["inference_saved"] for row in timed if row["label"] == label]
                lines.append(line + (f" {spread(saved, 1) + ' %' if saved else ''} |" if timed else ""))
    dates = sorted({row["date"] for row in found})
    devices = ", ".join(sorted({row["device"] for row in found}))
    lines.append(f"\n{devices}, one thread; {dates[0]} to {dates[-1]}.")
    return "\n".join(lines)


def _densities(labels: Mapping[str, Mapping[float, Sequence[float]]]) -> list[float]:
    """Return the densities that the most runs have, dense among them."""
    count: dict[float, int] = {}
    for points in labels.values():
        for density in points:
            count[density] = count.get(density, 0) + 1
    return sorted((d for d, n in count.items() if n > 1 or d == 1), reverse=True)


def _cell(values: Sequence[float] | None) -> str:
    return "" if not values else f"{spread([100 * value for value in values])} ({len(values)})"


if __name__ == "__main__":
    main()
