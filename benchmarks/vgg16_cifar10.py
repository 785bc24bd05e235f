"""Claim: VGG-16-BN on CIFAR-10 reaches the dense accuracy for a fraction of the time, the search included.

Contestants, interleaved seed by seed, each in a process of its own, at equal epochs:

- ``plain``: PyTorch as tutorials write it (`plain_pytorch.py`); its time is extrapolated from timed steps of the
  same run and labelled so, its accuracy is not measured;
- ``dense``: earlybird without a ticket, tuned (bf16, channels_last, data in memory): the strong baseline;
- ``ticket``: the early ticket at keep 0.5, channels ranked over the whole network (the default);
- ``ticket_layer``: the same with each layer ranked by itself, which cuts the expensive early layers as deeply as all.

Seconds are wall time of the whole run as its bill has it: set-up, tuning, search, draw, training and evaluation.

    EARLYBIRD_DATA=... python benchmarks/vgg16_cifar10.py --width 0.5 --epochs 10 --seeds 3
    EARLYBIRD_DATA=... python benchmarks/vgg16_cifar10.py --width 1 --epochs 5 --seeds 1
    python benchmarks/vgg16_cifar10.py --table

A row that is in `results/vgg16_cifar10.jsonl` already is not run again; delete it to repeat it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import append, machine, rows, spread

NAME = "vgg16_cifar10"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dense": {"dense": True},
    "ticket": {"keep": 0.5},
    "ticket_layer": {"keep": 0.5, "scope": "layer"},
}


def run_ours(contestant: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    recipe = Path(__file__).parent.parent / "recipes" / "vgg16-cifar10.toml"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "earlybird", "train", str(recipe), "--out", str(out)]
        command += ["--width", str(options.width), "--epochs", str(options.epochs), "--seed", str(seed)]
        for key, value in SETTINGS[contestant].items():
            flag = "--" + key.replace("_", "-")
            command += [flag] if value is True else [flag, str(value)]
        subprocess.run(command, check=True)
        result = json.loads((out / "result.json").read_text())
        bill = json.loads((out / "bill.json").read_text())
        tuned = json.loads((out / "tune.json").read_text())
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "accuracy": result["accuracy"],
        "seconds": result["seconds"],
        "seconds_kind": "measured",
        "parameters": result["parameters"],
        "drawn_at": result["drawn_at"],
        "curve": [[round(row["seconds"], 1), row["accuracy"]] for row in metrics if "accuracy" in row],
        "choice": tuned["choice"],
        "bill": bill,
    }


def run_plain(options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).parent / "plain_pytorch.py"), "--width", str(options.width)]
    command += ["--steps", str(options.plain_steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    timed = json.loads(done.stdout.splitlines()[-1])
    epoch = timed["step_seconds"] * timed["steps_per_epoch"] + timed["test_seconds"]
    return {
        "accuracy": None,
        "seconds": epoch * options.epochs,
        "seconds_kind": f"extrapolated from {timed['steps']} timed steps and one test epoch",
        "step_seconds": timed["step_seconds"],
    }


NAMES = {
    "plain": "plain PyTorch (fp32, eager, DataLoader)",
    "dense": "dense, tuned",
    "ticket": "early ticket (default)",
    "ticket_layer": "early ticket, `--scope layer`",
}


def table() -> str:
    """Return the results as Markdown, as the README has them: one table a width and number of epochs."""
    lines = []
    everything = rows(NAME)
    for width, epochs in sorted({(row["width"], row["epochs"]) for row in everything}):
        block = [row for row in everything if (row["width"], row["epochs"]) == (width, epochs)]
        dates, revisions = (", ".join(sorted({row[key] for row in block})) for key in ("date", "revision"))
        lines += [
            f"**Width {width:g}, {epochs} epochs** ({block[-1]['device']}, torch {block[-1]['torch']}, {dates}, "
            f"revision {revisions})",
            "",
            "| network | seeds | test accuracy | points against dense | seconds | plain / this | dense / this |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        by_seed = {(row["contestant"], row["seed"]): row for row in block}
        for contestant, name in NAMES.items():
            mine = [row for row in block if row["contestant"] == contestant]
            if not mine:
                continue
            accuracy = [100 * row["accuracy"] for row in mine if row["accuracy"] is not None]
            dense = {row["seed"]: by_seed.get(("dense", row["seed"])) for row in mine if contestant != "dense"}
            points = [100 * (row["accuracy"] - other["accuracy"]) for row in mine
                      if (other := dense.get(row["seed"])) and row["accuracy"] is not None]  # fmt: skip
            ratios = []
            for other in ("plain", "dense"):
                faster = list(NAMES).index(other) < list(NAMES).index(contestant)
                pairs = [(by_seed.get((other, row["seed"])), row) for row in mine if faster]
                values = [theirs["seconds"] / row["seconds"] for theirs, row in pairs if theirs]
                ratios.append(f"{statistics.fmean(values):.2f}x" if values else "")
            extrapolated = "" if mine[0]["seconds_kind"] == "measured" else " (extrapolated)"
            cells = [
                name,
                str(len(mine)),
                f"{spread(accuracy)} %" if accuracy else "not measured",
                spread(points) if points else "",
                spread([row["seconds"] for row in mine], 0) + extrapolated,
                *ratios,
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contestants", default="plain,dense,ticket,ticket_layer")
    parser.add_argument("--plain-steps", type=int, default=30)
    parser.add_argument("--table", action="store_true", help="print the table of all rows and stop")
    options = parser.parse_args()
    if not options.table:
        for seed in range(options.seeds):
            order = options.contestants.split(",")
            for contestant in order if seed % 2 == 0 else reversed(order):
                key = {"contestant": contestant, "width": options.width, "epochs": options.epochs, "seed": seed}
                if any(all(row[k] == v for k, v in key.items()) for row in rows(NAME)):
                    continue
                head = machine()
                found = run_plain(options) if contestant == "plain" else run_ours(contestant, options, seed)
                append(NAME, {**key, **found, **head})
    print(table())


if __name__ == "__main__":
    main()
