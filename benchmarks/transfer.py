"""Question: does one ticket of pre-trained weights serve other tasks, and up to which sparsity?

ResNet-18, a quarter of its width, pre-trained on classes 0 to 4 of CIFAR-10 (25,000 images): with labels for 12
epochs, and without, by SimCLR and MoCo, for 15. Iterative pruning goes on from there on the same task at a tenth of the
learning rate (5,000 images, an epoch a round, 20 % each, first and last layer dense). Its rounds 4 and 8 are tried on
other tasks: classes 5 to 9 of CIFAR-10, clothes, cracks in asphalt (segmentation), clothes to be found on a canvas
(detection). Pre-training has one seed, the tasks have three.

    EARLYBIRD_DATA=... python benchmarks/transfer.py                    # hours, resumable
    EARLYBIRD_DATA=... python benchmarks/transfer.py --sources supervised --tasks cracks
    python benchmarks/transfer.py --table

Seconds are not the question: runs share one process, one after another, and maybe the machine.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from common import WORK, append, check_known, machine, rows, spread

NAME = "transfer"
SEEDS = (0, 1, 2)
ROUNDS = (4, 8)
QUICK_ROUNDS = (2,)
MASKS = "similarity of masks"
_COMMON = {"tune": False, "precision": "bf16", "channels_last": True, "compile": False, "kernels": False, "threads": 1,
           "batch_size": 64}  # fmt: skip
_NETWORK = {"model": "resnet18", "width": 0.25, "data": "cifar10:0-4", "seed": 0}
_CLASSES = {"epochs": 20, "train_images": 2500, "lr": 0.05, "evaluate_every": "20ep"}
_PLACES = {"epochs": 10, "train_images": 2500, "lr": 0.02, "evaluate_every": "10ep"}
TASKS: dict[str, dict[str, Any]] = {
    "cifar10:5-9": _CLASSES,
    "fashion-mnist:rgb": {**_CLASSES, "image_size": 32, "crop": 2},
    "cracks": {**_PLACES, "image_size": 32},
    "fashion-mnist:boxes+rgb": {**_PLACES, "image_size": 40},
}


@dataclass(frozen=True)
class Source:
    """A pre-training.

    Attributes:
        pretraining: Keys of its recipe.
        pruning: Keys that iterative pruning changes.
        tasks: On which its tickets are tried.
    """

    pretraining: Mapping[str, Any]
    pruning: Mapping[str, Any]
    tasks: tuple[str, ...]


def _without_labels(method: str) -> Source:
    settings = {"batch_size": 256, "method": method, "epochs": 15, "lr": 0.1, "train_images": 25_000}
    pruning = {"batch_size": 256, "method": f"iterative,{method}"}
    return Source({**settings, "evaluate_every": "15ep"}, pruning, ("cifar10:5-9",))


SOURCES = {
    "supervised": Source(
        {
            "dense": True, "epochs": 12, "lr": 0.1, "train_images": 25_000, "weight_decay": 1e-3,
            "evaluate_every": "12ep",
        },
        {"method": "iterative"},
        tuple(TASKS),
    ),
    "simclr": _without_labels("simclr"),
    "moco": _without_labels("moco"),
}  # fmt: skip
ABOUT = {
    "dense": "full pre-trained weights",
    "ticket": "**ticket on pre-trained weights**",
    "random_init": "the ticket's mask, random weights",
    "shuffled": "random mask in each layer, pre-trained weights",
    "one_shot": "largest pre-trained weights, no search",
}


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", default=",".join(SOURCES), help="of " + ", ".join(SOURCES))
    parser.add_argument("--tasks", default=",".join(TASKS), help="of " + ", ".join(TASKS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--quick", action="store_true", help="few images and one round; nothing is recorded")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    options = parser.parse_args(words)
    for kind, names in (("sources", SOURCES), ("tasks", TASKS)):
        asked = [name for name in getattr(options, kind).split(",") if name]
        check_known(parser, kind, asked, names)
        setattr(options, kind, asked)
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, or print the table."""
    options = read(words)
    if options.table:
        print(table())
        return
    for source in options.sources:
        tasks = [name for name in options.tasks if name in SOURCES[source].tasks]
        if tasks:
            run(source, tasks, range(options.seeds), quick=options.quick)
    if not options.quick:
        compare_masks()
        print(table())


def run(name: str, asked: Sequence[str], seeds: Sequence[int], *, quick: bool) -> None:
    """Pre-train, prune, and try every contender of every task, a row each; seed by seed, so that all tasks advance."""
    from earlybird.errors import DataError
    from earlybird.train import parts
    from earlybird.train.recipe import Recipe
    from earlybird.train.result import Result
    from earlybird.train.run import resume, train
    from earlybird.train.transfer import plan

    def finished(recipe: Recipe, path: Path) -> Result:
        if (path / "recipe.toml").exists():
            return resume(path, quiet=True)
        return train(recipe, path, quiet=True)

    read, kept = parts.read_data, {}

    def read_once(recipe: Recipe, progress: Any = None) -> Any:
        """Data are decoded, and canvases made, once, not in every run."""
        key = (recipe.data, recipe.image_size, recipe.train_images)
        if key not in kept:
            kept[key] = read(recipe, progress)
        return kept[key]

    parts.read_data = read_once
    work = WORK / (f"{NAME}-quick" if quick else NAME) / name
    source, images = SOURCES[name], {"train_images": 500} if quick else {}
    few = {"epochs": 1, "evaluate_every": "1ep"} if quick else {}
    pretraining = {**_COMMON, **_NETWORK, **source.pretraining, **images, **few}
    before = finished(Recipe.from_values(pretraining), work / "pretrained")
    pruning = {
        **_COMMON, **_NETWORK, "start": str(work / "pretrained"), "keep_weights": 0.6 if quick else 0.8 ** max(ROUNDS),
        "leave_dense": "first,last", "epochs": 1, "lr": 0.01, "train_images": 5000, **source.pruning, **images,
    }  # fmt: skip
    finished(Recipe.from_values(pruning), work / name)
    recipes = {}
    for task in asked:
        data = _cracks() if task == "cracks" else task
        if data is None:
            raise DataError("no folder crackforest in EARLYBIRD_DATA", hint="leave the task 'cracks' out")
        recipes[task] = Recipe.from_values({**_COMMON, **TASKS[task], **images, "data": data})
    rounds = QUICK_ROUNDS if quick else ROUNDS
    plans = plan([work / name], recipes, work, rounds=rounds)
    known = {row["folder"] for row in rows(NAME) if row["kind"] != MASKS}
    revision = machine(1)["revision"]  # of the code that this process has loaded
    for seed in seeds:
        for one in plans:
            for contender in one.contenders:
                path = one.folder / f"{contender.name}-seed{seed}"
                own = f"{name}/{path.parent.name}/{path.name}"
                if own in known:
                    continue
                recipe = contender.recipe(seed, {})
                head = {**machine(1), "revision": revision}
                result = finished(recipe, path)
                row = {
                    **head, "folder": own, "task": one.task, "source": name,
                    "kind": contender.method or "dense", "round": _round(contender.name),
                    "sparsity": None if contender.keep is None else 1 - contender.keep, "seed": seed,
                    "accuracy": result.accuracy, "judged_by": result.judged_by, "seconds": result.seconds,
                    "epochs": result.epochs, "train_images": recipe.train_images, "recipe": recipe.hash(),
                    "accuracy_before": before.accuracy, "judged_before_by": before.judged_by,
                }  # fmt: skip
                if not quick:
                    append(NAME, row)
                print(f"{row['folder']}: {result.accuracy:.2%} {result.judged_by}".rstrip(), flush=True)


def compare_masks() -> None:
    """Record how alike the masks of different pre-trainings are, where both are here: Jaccard index by round."""
    from earlybird.tickets.transfer import expected_jaccard, jaccard
    from earlybird.train.transfer import read_source

    here = {name: WORK / NAME / name / name for name in SOURCES}
    tickets = {
        name: read_source(folder, ROUNDS).tickets for name, folder in here.items() if (folder / "result.json").exists()
    }
    known = {(row["one"], row["other"], row["round"]) for row in rows(NAME) if row["kind"] == MASKS}
    for one, other in combinations(tickets, 2):
        for number in ROUNDS:
            if (one, other, number) not in known:
                pair = tickets[one][number], tickets[other][number]
                overall, layers = jaccard(*pair)
                append(NAME, {
                    **machine(1), "kind": MASKS, "one": one, "other": other, "round": number, "jaccard": overall,
                    "layers": layers, "by_chance": expected_jaccard(*(ticket.keep for ticket in pair)),
                })  # fmt: skip


def _cracks() -> str | None:
    """Return the folder of photographs of cracks and their masks."""
    folder = Path(os.environ.get("EARLYBIRD_DATA", "")) / "crackforest"
    return str(folder) if folder.is_dir() else None


def _round(name: str) -> int | None:
    number = name.rpartition("round")[2]
    return int(number) if number.isdigit() else None


def table() -> str:
    """Return the results as Markdown, one table a pre-training and task; what matches is marked."""
    from earlybird.tickets.transfer import bound

    found = [row for row in rows(NAME) if row["kind"] != MASKS]
    alike = [row for row in rows(NAME) if row["kind"] == MASKS]
    parts = []
    for source, task in dict.fromkeys((row["source"], row["task"]) for row in found):
        own = [row for row in found if (row["source"], row["task"]) == (source, task)]
        measure = own[0]["judged_by"] or "accuracy"
        sparsities = sorted({row["sparsity"] for row in own if row["sparsity"] is not None})
        full = [row["accuracy"] for row in own if row["kind"] == "dense"]
        least = bound(full) if len(full) > 1 else float("inf")  # one seed has no spread to lose
        lines = [
            f"### Pre-trained: {source}; tried on {task}: {measure} in %\n",
            "| contender | " + " | ".join(f"{s:.1%} sparse" for s in sparsities) + " |",
            "| --- |" + " --- |" * len(sparsities),
        ]
        for kind, about in ABOUT.items():
            cells = []
            for sparsity in sparsities:
                values = [r["accuracy"] for r in own if r["kind"] == kind and r["sparsity"] in (sparsity, None)]
                good = kind != "dense" and bool(values) and sum(values) / len(values) >= least
                text = spread([100 * v for v in values]) + (f" (n = {len(values)})" if values else "") if values else ""
                cells.append(f"**{text}**" if good else text)
            lines.append(f"| {about} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    if not parts:
        return "No rows yet."
    if alike:
        lines = [
            "### How alike the masks of two pre-trainings are (Jaccard index)\n",
            "| masks | round | alike | by chance |",
        ]
        lines.append("| --- " * 4 + "|")
        for row in alike:
            both = f"{row['one']}, {row['other']}"
            lines.append(f"| {both} | {row['round']} | {row['jaccard']:.3f} | {row['by_chance']:.3f} |")
        parts.append("\n".join(lines))
    where = sorted({f"{row['device']}, {row['threads']} thread, torch {row['torch']}; {row['date']}" for row in found})
    revisions = ", ".join(dict.fromkeys(row["revision"] for row in found))
    note = (
        f"{'; '.join(where)}; revision {revisions}. The machine was shared with other work, so no time is told.\n\n"
        "Bold: matching, the mean is at least that of the full weights less one of their standard deviations, of two "
        "seeds at least. Sparsity "
        "is that of the layers that were pruned; the full weights stand in every column."
    )
    return "\n\n".join([*parts, note])


def section(images: Path) -> str:
    """Return the tables for the page of all results."""
    return table()


if __name__ == "__main__":
    main()
