"""Read run folders and comparison folders into plain records, as far as the runs have come."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from earlybird.cost.bill import Bill
from earlybird.errors import InputError
from earlybird.files import read_json, read_rows
from earlybird.tickets.ticket import Ticket


@dataclass(frozen=True)
class RunRecord:
    """What one run folder holds; whatever the run has not written yet is empty or None.

    Attributes:
        path: The run folder.
        recipe: The recipe's keys.
        recipe_text: The recipe as written.
        metrics: Rows of ``metrics.jsonl``, in order.
        bill: What was spent.
        ticket: The drawn ticket.
        history, change, traces, inputs, tune, environment: The JSON files of those names.
        side_by_side: How many runs of its comparison went at a time.
    """

    path: Path
    recipe: dict[str, Any]
    recipe_text: str
    metrics: list[dict[str, Any]]
    bill: Bill | None
    ticket: Ticket | None
    history: dict[str, Any]
    change: dict[str, Any]
    traces: dict[str, Any]
    inputs: dict[str, Any]
    tune: dict[str, Any]
    environment: dict[str, Any]
    side_by_side: int = 1

    @property
    def dense(self) -> bool:
        """Whether the whole network was trained to the end."""
        return bool(self.recipe.get("dense"))

    @property
    def methods(self) -> list[str]:
        """Names of the methods that the recipe calls for."""
        named = self.recipe.get("method", "early_bird")
        return [named] if isinstance(named, str) else named

    @property
    def label(self) -> str:
        """What the recipe calls for: ``dense``, ``ticket, keep 0.5``, or the names of other methods."""
        if self.dense:
            return "dense"
        others = [name for name in self.methods if name != "early_bird"]
        if not self.draws:
            return ", ".join(others).replace("_", " ")
        keep = self.recipe.get("keep", "default")
        keep = keep[0] if isinstance(keep, list) else keep
        label = f"ticket, keep {keep:g}" if isinstance(keep, (int, float)) else "ticket"
        return ", ".join([label, *others]).replace("_", " ")

    @property
    def draws(self) -> bool:
        """Whether one of the methods draws a ticket."""
        return not self.dense and "early_bird" in self.methods

    @property
    def drawn_at(self) -> int | None:
        """Optimizer step after which the ticket was drawn."""
        return None if self.ticket is None else self.ticket.provenance.get("step")

    @cached_property
    def accuracy(self) -> list[tuple[float, float]]:
        """``(seconds, accuracy)`` of every evaluation, seconds since the run began, accuracy 0 to 1."""
        rows = [row for row in self.metrics if row.get("accuracy") is not None and row.get("seconds") is not None]
        return [(float(row["seconds"]), float(row["accuracy"])) for row in rows]

    @property
    def judged_by(self) -> str:
        """What the accuracy is that of; empty: the network's own classifier."""
        return str(self.metrics[-1].get("judged_by", "")) if self.metrics else ""

    @property
    def final_accuracy(self) -> float | None:
        """Test accuracy of the last evaluation, 0 to 1."""
        return self.accuracy[-1][1] if self.accuracy else None


@dataclass(frozen=True)
class Contender:
    """Runs that differ in nothing but their seed."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def dense(self) -> bool:
        """Whether this is the baseline."""
        return self.runs[0].dense

    @property
    def task(self) -> tuple[Any, ...]:
        """What is trained on what: only runs of one task compare."""
        keys = (self.runs[0].recipe.get(key) for key in ("model", "data", "image_size"))
        return (*keys, self.runs[0].judged_by)

    @property
    def bills(self) -> list[Bill]:
        """The bills of all runs that have one."""
        return [run.bill for run in self.runs if run.bill is not None]

    @property
    def accuracies(self) -> list[float]:
        """Final accuracy of all runs that have one, 0 to 1."""
        return [run.final_accuracy for run in self.runs if run.final_accuracy is not None]


def read(paths: Sequence[Path]) -> list[Contender]:
    """Read run folders, and folders of run folders such as a comparison; the dense baseline comes first.

    Raises:
        InputError: A folder holds no run, or one of its files is damaged.
    """
    folders: dict[Path, str] = {}
    for path in paths:
        folders.update(_run_folders(path))
    groups: dict[str, list[RunRecord]] = {}
    names: dict[str, str] = {}
    for folder, contender in folders.items():
        run = _read_run(folder)
        same = {key: value for key, value in run.recipe.items() if key not in ("seed", "out")}
        group = f"{folder.parent} {contender}" if contender else json.dumps(same, sort_keys=True)
        groups.setdefault(group, []).append(run)
        names[group] = contender or run.label
    labels = list(names.values())
    longer = {group: f"{name} ({groups[group][0].path.name})" for group, name in names.items()}
    contenders = []
    for group, name in names.items():
        if labels.count(name) > 1:
            first = groups[group][0].path
            unique = list(longer.values()).count(longer[group]) == 1
            name = longer[group] if unique else f"{name} ({first.parent.name}/{first.name})"
        contenders.append(Contender(name, tuple(groups[group])))
    baseline = next((contender for contender in contenders if contender.dense), None)
    return sorted(contenders, key=lambda contender: contender is not baseline)


def read_points(paths: Sequence[Path]) -> list[list[dict[str, Any]]]:
    """Return the points of each folder that holds a comparison of methods, as far as it has come."""
    return [points for path in paths if (points := _object(path / "comparison.json").get("points"))]


def read_verifications(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return what each folder that holds a verification of a ticket says, as far as it has come."""
    return [found for path in paths if (found := _object(path / "verification.json")).get("checks")]


def _run_folders(path: Path) -> dict[Path, str]:
    """Return the run folders in ``path``, each with its contender's name where a comparison gave it one."""
    hint = "name a folder that 'earlybird train' or 'earlybird compare' wrote"
    if not path.is_dir():
        raise InputError(f"no folder {path}", hint=hint)
    if (path / "recipe.toml").is_file():
        return {path.resolve(): ""}
    found = sorted(recipe.parent.resolve() for recipe in path.glob("*/recipe.toml"))
    if not found:
        raise InputError(f"{path} holds no run (there is no recipe.toml in it, nor one level below)", hint=hint)
    files = (_object(path / name) for name in ("comparison.json", "verification.json"))
    order = [name for file in files for name in file.get("contenders", {})]
    names = {folder: folder.name.rpartition("-seed")[0] for folder in found}
    compared = [folder for folder in found if names[folder] in order]
    compared.sort(key=lambda folder: order.index(names[folder]))
    return {folder: names[folder] for folder in compared} | {f: "" for f in found if f not in compared}


def _read_run(path: Path) -> RunRecord:
    text = (path / "recipe.toml").read_text(encoding="utf-8")
    try:
        recipe = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path / 'recipe.toml'} is damaged ({error})") from error
    bill, ticket = _object(path / "bill.json"), path / "ticket.safetensors"
    return RunRecord(
        path=path,
        recipe=recipe,
        recipe_text=text,
        metrics=read_rows(path / "metrics.jsonl"),
        bill=Bill.from_json(bill) if bill else None,
        ticket=Ticket.load(ticket) if ticket.is_file() else None,
        history=_object(path / "history.json"),
        change=_object(path / "change.json"),
        traces=_object(path / "traces.json"),
        inputs=_object(path / "inputs.json"),
        tune=_object(path / "tune.json"),
        environment=_object(path / "environment.json"),
        side_by_side=_object(path.parent / "side-by-side.json").get(path.name, 1),
    )


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}", needed="an object")
    return value or {}
