"""Question: does one ticket of pre-trained weights serve other tasks, and up to which sparsity?

ResNet-20, half width, pre-trained with labels on classes 0 to 4 of CIFAR-10 (10,000 images, 6 epochs); iterative
pruning from there at a tenth of the learning rate (5,000 images, an epoch a round, 20 % each, first and last layer
dense). Rounds 4, 8 and 12 on four tasks: classes 5 to 9 of CIFAR-10, clothes, cracks in asphalt (segmentation), clothes
to be found on a canvas (detection). Small: it shows the order of the contenders, not the published numbers.

    EARLYBIRD_DATA=... python benchmarks/transfer.py                    # resumable
    python benchmarks/transfer.py --table

Seconds are not the question: runs share one process, one after another, and maybe the machine.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import WORK, append, check_known, machine, rows, spread

NAME = "transfer"
SEEDS = (0, 1, 2)
ROUNDS = (4, 8, 12)
QUICK_ROUNDS = (2,)
_COMMON = {"tune": False, "precision": "bf16", "channels_last": True, "compile": False, "kernels": False, "threads": 1,
           "batch_size": 64}  # fmt: skip
_NETWORK = {"model": "resnet20", "width": 0.5}
TASKS: dict[str, dict[str, Any]] = {
    "cifar10:5-9": {"epochs": 4, "train_images": 1500, "lr": 0.05, "evaluate_every": "4ep"},
    "fashion-mnist:rgb": {"image_size": 32, "crop": 2, "epochs": 3, "train_images": 1500, "lr": 0.05,
                          "evaluate_every": "3ep"},
    "cracks": {"image_size": 32, "epochs": 4, "train_images": 1500, "lr": 0.05, "evaluate_every": "4ep"},
    "fashion-mnist:boxes+rgb": {"image_size": 40, "epochs": 5, "train_images": 1500, "lr": 0.05,
                                "evaluate_every": "5ep"},
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
    parser.add_argument("--tasks", default=",".join(TASKS), help="of " + ", ".join(TASKS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--quick", action="store_true", help="few images and one round; nothing is recorded")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    options = parser.parse_args(words)
    options.tasks = [name for name in options.tasks.split(",") if name]
    check_known(parser, "tasks", options.tasks, TASKS)
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, or print the table."""
    options = read(words)
    if options.table:
        print(table())
    else:
        run(options.tasks, range(options.seeds), quick=options.quick)


def run(asked: Sequence[str], seeds: Sequence[int], *, quick: bool) -> None:
    """Pre-train, prune, and try every contender of every task, a row each; seed by seed, so that all tasks advance."""
    from earlybird.errors import DataError
    from earlybird.train import parts
    from earlybird.train.recipe import Recipe
    from earlybird.train.result import Result
    from earlybird.train.run import resume, train
    from earlybird.train.transfer import describe, plan, transfer

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
    work = WORK / (f"{NAME}-quick" if quick else NAME)
    images = {"train_images": 500} if quick else {}
    pretraining = {**_COMMON, **_NETWORK, "data": "cifar10:0-4", "seed": 0}
    finished(
        Recipe.from_values({**pretraining, "dense": True, "epochs": 6, "lr": 0.1, "train_images": 10_000,
                            "evaluate_every": "6ep", **images}),
        work / "pretrained",
    )  # fmt: skip
    lottery = {
        "start": str(work / "pretrained"), "method": "iterative", "keep_weights": 0.6 if quick else 0.8**12,
        "leave_dense": "first,last", "epochs": 1, "lr": 0.01, "train_images": 5000, **images,
    }  # fmt: skip
    finished(Recipe.from_values({**pretraining, **lottery}), work / "supervised")
    recipes = {}
    for task in asked:
        data = _cracks() if task == "cracks" else task
        if data is None:
            raise DataError("no folder crackforest in EARLYBIRD_DATA", hint="leave the task 'cracks' out")
        recipes[task] = Recipe.from_values({**_COMMON, **TASKS[task], **images, "data": data})
    rounds = QUICK_ROUNDS if quick else ROUNDS
    plans = plan([work / "supervised"], recipes, work, rounds=rounds)
    known = {row["folder"] for row in rows(NAME)}
    revision = machine(1)["revision"]  # of the code that this process has loaded
    for seed in seeds:
        for one in plans:
            for contender in one.contenders:
                path = one.folder / f"{contender.name}-seed{seed}"
                if f"{path.parent.name}/{path.name}" in known:
                    continue
                recipe = contender.recipe(seed, {})
                head = {**machine(1), "revision": revision}
                result = finished(recipe, path)
                row = {
                    **head, "folder": f"{path.parent.name}/{path.name}", "task": one.task, "source": one.source.name,
                    "kind": contender.method or "dense", "round": _round(contender.name),
                    "sparsity": None if contender.keep is None else 1 - contender.keep, "seed": seed,
                    "accuracy": result.accuracy, "judged_by": result.judged_by, "seconds": result.seconds,
                    "epochs": result.epochs, "train_images": recipe.train_images, "recipe": recipe.hash(),
                    "accuracy_before": Result.read(work / "pretrained").accuracy,
                }  # fmt: skip
                if not quick:
                    append(NAME, row)
                print(f"{row['folder']}: {result.accuracy:.2%} {result.judged_by}".rstrip(), flush=True)
    folders = [one.folder / f"{c.name}-seed{seed}" for one in plans for c in one.contenders for seed in seeds]
    if not all((path / "result.json").is_file() for path in folders):
        return  # rows of another machine: the table is made of rows
    print(describe(transfer([work / "supervised"], recipes, work, rounds=rounds, seeds=seeds, quiet=True)))


def _cracks() -> str | None:
    """Return the folder of photographs of cracks and their masks."""
    folder = Path(os.environ.get("EARLYBIRD_DATA", "")) / "crackforest"
    return str(folder) if folder.is_dir() else None


def _round(name: str) -> int | None:
    number = name.rpartition("round")[2]
    return int(number) if number.isdigit() else None


def table() -> str:
    """Return the results as Markdown, one table a task; what matches is marked."""
    from earlybird.tickets.transfer import bound

    found = rows(NAME)
    parts = []
    for task in dict.fromkeys(row["task"] for row in found):
        own = [row for row in found if row["task"] == task]
        measure = own[0]["judged_by"] or "accuracy"
        sparsities = sorted({row["sparsity"] for row in own if row["sparsity"] is not None})
        full = [row["accuracy"] for row in own if row["kind"] == "dense"]
        least = bound(full) if len(full) > 1 else float("inf")  # one seed has no spread to lose
        lines = [
            f"### {task}: {measure} in %\n",
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
