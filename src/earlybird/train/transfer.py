"""Tickets of pre-trained weights on other tasks: every task, round, control and seed as runs of one comparison each.

The sources are folders of iterative pruning. What their rounds begin from is theta_p, and the ticket of each round is
tried on every task, with a fresh head, beside the full theta_p and the controls of `earlybird.tickets.transfer`. The
runs of one source on one task lie in a folder that is a comparison (`earlybird.train.compare`), so that a report of it
can be made; ``transfer.json`` beside them says up to which sparsity the tickets match.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from earlybird.data.dataset import DataSet
from earlybird.data.loader import Loader
from earlybird.errors import InputError
from earlybird.files import write_json
from earlybird.models.blueprint import Blueprint
from earlybird.settings import accepted
from earlybird.sparse.masks import check_fits
from earlybird.start import head_of, load_start, read_start, read_trained
from earlybird.tickets.ticket import Ticket, round_files
from earlybird.tickets.transfer import (
    CONTROLS,
    bound,
    expected_jaccard,
    jaccard,
    largest_matching,
    matching,
    one_shot,
    universal,
)
from earlybird.train.compare import compare_contenders
from earlybird.train.contenders import BASELINE, Contender, keep_key, own_seed
from earlybird.train.parts import located, read_data
from earlybird.train.points import statistics_of
from earlybird.train.recipe import Recipe
from earlybird.train.turns import check_turns

__all__ = ["DEFAULT_CONTROLS", "Plan", "Source", "describe", "plan", "read_source", "transfer"]

DEFAULT_CONTROLS = ("random_init", "shuffled", "one_shot")
_HEADS = {"mask": "segmentation", "box": "detection"}
"""What is looked for in an image to the method that does."""


@dataclass(frozen=True)
class Source:
    """Pre-trained weights and their tickets.

    Attributes:
        name: Of the folder.
        folder: Of a run of iterative pruning.
        blueprint: Of its network.
        tickets: Round to ticket.
    """

    name: str
    folder: Path
    blueprint: Blueprint
    tickets: Mapping[int, Ticket]

    @property
    def start(self) -> Path:
        """The file of the weights that its rounds begin from."""
        return self.folder / "rewind.safetensors"

    def ticket_file(self, number: int) -> Path:
        """Return the file of a round's ticket."""
        return self.folder / "tickets" / f"round-{number}.safetensors"


def read_source(folder: str | Path, rounds: Sequence[int] = ()) -> Source:
    """Read a run of iterative pruning.

    Args:
        folder: Of a finished run.
        rounds: Those to try; none: all.

    Raises:
        InputError: It is no such run, not finished, or has not all of the rounds.
    """
    folder = Path(folder).expanduser().absolute()
    if not (folder / "rewind.safetensors").is_file():
        raise InputError(
            f"{folder} has no rewind.safetensors, the weights that its rounds begin from",
            needed="a finished run of --method iterative with --rewind weights",
        )
    files = round_files(folder)
    wanted = sorted(rounds) or sorted(files)
    if missing := [number for number in wanted if number not in files]:
        raise InputError(f"{folder} has no round {missing[0]}", needed=f"of {', '.join(map(str, sorted(files)))}")
    if not wanted:
        raise InputError(f"{folder} has no tickets", needed="a run that has pruned at least once")
    blueprint, _ = read_trained(folder)
    return Source(folder.name, folder, blueprint, {number: Ticket.load(files[number]) for number in wanted})


def transfer(
    sources: Sequence[str | Path],
    tasks: Mapping[str, Recipe],
    out: str | Path,
    *,
    rounds: Sequence[int] = (),
    controls: Sequence[str] = DEFAULT_CONTROLS,
    seeds: Sequence[int] = (0, 1, 2),
    deviations: float = 1.0,
    jobs: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Try the tickets of each source on each task, beside the full weights and the controls.

    Args:
        sources: Folders of iterative pruning that began from pre-trained weights.
        tasks: Name to what is trained there; model, width and ``start`` are those of the source, the seed is not used.
            Methods that keep the whole network go along; the one that finds masks or boxes is added where the data
            have them.
        out: Folder for all runs and ``transfer.json``. Started again, it keeps what is finished and goes on.
        rounds: Those of the sources to try; none: all.
        controls: Of `CONTROLS`. ``reversed`` takes part in the rounds in which it keeps something of each layer.
        seeds: At least one, all different.
        deviations: How many standard deviations of the full weights a matching ticket may lose.
        jobs: Runs at a time.
        quiet: Show nothing of the runs.

    Returns:
        What ``transfer.json`` holds: ``tasks``, one entry for each source and task, with statistics of the full
        weights, the ``bound``, a ``table`` of contenders and the ``largest_matching`` sparsity of each kind;
        ``universal``, by source; ``similarity`` of the sources' masks.

    Raises:
        InputError: A source is no such run, or its weights, tickets or heads do not fit a task; nothing has run then.
        Interrupted, EarlybirdError, RuntimeError: As `earlybird.train.compare.compare`.
    """
    check_turns(seeds, jobs)
    bound([0.0], deviations)
    plans = plan(sources, tasks, out, rounds=rounds, controls=controls)
    read = list({one.source.name: one.source for one in plans}.values())
    entries: list[dict[str, Any]] = []
    for one in plans:
        comparison = compare_contenders(
            one.full, one.contenders, one.folder, common=one.full, seeds=seeds, jobs=jobs, quiet=quiet, same=True
        )
        entries.append(_entry(one, comparison, deviations))
        concluded = _conclude(read, entries, seeds, deviations, complete=len(entries) == len(plans))
        write_json(Path(out) / "transfer.json", concluded)
    return concluded


@dataclass(frozen=True)
class Plan:
    """What one source is tried by on one task.

    Attributes:
        source: The source.
        task: Name of the task.
        folder: Where the runs go.
        full: Recipe of the full weights.
        contenders: All of them; the full weights come first.
    """

    source: Source
    task: str
    folder: Path
    full: Recipe
    contenders: tuple[Contender, ...]


def plan(
    sources: Sequence[str | Path],
    tasks: Mapping[str, Recipe],
    out: str | Path,
    *,
    rounds: Sequence[int] = (),
    controls: Sequence[str] = DEFAULT_CONTROLS,
) -> list[Plan]:
    """Return what `transfer` would run, having checked that it fits; see there for arguments and errors."""
    unknown = [name for name in controls if name not in CONTROLS]
    if unknown or len(set(controls)) != len(controls):
        raise InputError(f"controls {', '.join(controls)}", needed=f"of {', '.join(CONTROLS)}, each once")
    if not sources or not tasks:
        raise InputError("no source or no task", needed="the folder of a run, and data to try it on")
    read = _distinct([read_source(folder, rounds) for folder in sources])
    found: list[tuple[Source, str, Recipe]] = []
    for task, given in tasks.items():
        data = read_data(given)
        for source in read:
            recipe = _for_source(source, located(given), data)
            _check_task(source, task, recipe, data)
            found.append((source, task, recipe))
    slugs = [_slug(f"{source.name}-{task}" if len(read) > 1 else task) for source, task, _ in found]
    if len(set(slugs)) != len(slugs):
        raise InputError(f"tasks {', '.join(tasks)} have the same folder", hint="give recipe files other names")
    plans = []
    for (source, task, recipe), slug in zip(found, slugs):
        contenders = tuple(_contenders(source, recipe, controls, Path(out)))
        plans.append(Plan(source, task, Path(out) / slug, contenders[0].recipe(0, {}), contenders))
    return plans


def describe(found: Mapping[str, Any]) -> str:
    """Return what `transfer` returned as tables, for people."""
    lines = []
    for entry in found["tasks"]:
        full = entry["full"]
        what = entry["judged_by"] or "accuracy"
        lines += [
            f"{entry['task']} from {entry['source']}: {what}, full weights {_spread(full)}, "
            f"matching from {100 * entry['bound']:.2f} % on",
            f"  {'':14}" + "".join(f"{sparsity:>18.2%}" for sparsity in entry["sparsities"]),
        ]
        for kind in entry["largest_matching"]:
            cells = {row["sparsity"]: row for row in entry["table"] if row["kind"] == kind}
            shown = [
                f"{_spread(cells[s]['reached']) + (' *' if cells[s]['matching'] else '  '):>18}"
                if s in cells
                else " " * 18
                for s in entry["sparsities"]
            ]
            lines.append(f"  {kind:14}" + "".join(shown))
        best = entry["largest_matching"]["ticket"]
        lines += [f"  largest matching sparsity of the ticket: {'none' if best is None else f'{best:.2%}'}", ""]
    for source, best in found["universal"].items():
        lines.append(f"{source}: matching in every task up to {'no sparsity' if best is None else f'{best:.2%}'}")
    for pair in found["similarity"]:
        lines.append(
            f"masks of {pair['one']} and {pair['other']}, round {pair['round']}: Jaccard {pair['jaccard']:.3f} "
            f"(random masks: {pair['expected']:.3f})"
        )
    tolerance, seeds = found["deviations"], len(found["seeds"])
    lines.append(
        f"* matching: mean over {seeds} seeds at least that of the full weights less {tolerance:g} of their standard "
        f"deviations{'' if seeds > 1 else ', which one seed does not have'}. Sparsity: of the layers that were pruned."
    )
    return "\n".join(lines)


def _spread(statistics: Mapping[str, Any]) -> str:
    mean, std = 100 * statistics["mean"], statistics["std"]
    return f"{mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def _distinct(sources: list[Source]) -> list[Source]:
    names = [source.name for source in sources]
    if len({source.folder for source in sources}) != len(sources):
        raise InputError("a source is named twice", needed="different folders")
    return [
        replace(source, name=f"{source.folder.parent.name}-{source.name}") if names.count(source.name) > 1 else source
        for source in sources
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")


def _along(recipe: Recipe) -> tuple[str, ...]:
    """Return the methods of a recipe that keep the whole network."""
    return (
        () if recipe.dense else tuple(name for name in recipe.method if not keep_key(name) and name != "fixed_ticket")
    )


def _for_source(source: Source, recipe: Recipe, data: DataSet) -> Recipe:
    """Return the recipe with the source's network, and the head that the data need."""
    along = _along(recipe)
    head = _HEADS.get(data.looked_for)
    if head is not None and head not in along:
        along = (*along, head)
    own = {"model": source.blueprint.model, "width": source.blueprint.width, "out": None, "fresh_head": True}
    return recipe.replace(**own, dense=False, method=along) if along else recipe.replace(**own, dense=True)


def _check_task(source: Source, task: str, recipe: Recipe, data: DataSet) -> None:
    """Find out before hours of training whether weights, tickets and head fit a task."""
    channels, size = data.train_images.shape[1:3]
    if channels != source.blueprint.in_channels:
        raise InputError(
            f"images of {task} have {channels} channels, those of {source.name} {source.blueprint.in_channels}",
            hint=f"take '{task}:rgb'" if source.blueprint.in_channels == 3 else "take data of as many channels",
        )
    if len(data.test_images) < 1 or size != data.train_images.shape[3]:
        raise InputError(f"the images of {task} are no squares", hint="set image_size")
    blueprint = replace(source.blueprint, classes=len(data.classes), image_size=size, class_names=data.classes)
    model = blueprint.build(0)
    load_start(model, read_start(source.start), fresh_head=True)
    head = head_of(model)
    for ticket in source.tickets.values():
        check_fits(ticket.without(head), model)
    shared: dict[str, Any] = {"batch_size": 2, "mean": data.mean, "std": data.std, "shuffle": False}
    loader = Loader(data.train_images[:2], data.train_labels[:2], **shared)
    loader.targets = None if data.train_targets is None else data.train_targets[:2]
    context = {"example_inputs": loader.sample(2, 0), "loader": loader}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for name, method in recipe.build_methods().items():
        if name in _HEADS.values():
            try:
                method.attach(model, optimizer, **accepted(method.attach, context)).detach()
            except InputError as error:
                raise InputError(f"{task}: {error.found}", needed=error.needed, hint=error.hint) from error


def _contenders(source: Source, recipe: Recipe, controls: Sequence[str], out: Path) -> list[Contender]:
    start = str(source.start)
    along = _along(recipe)

    def made(name: str, about: str, own: Recipe, kind: str, keep: float) -> Contender:
        return Contender(name, about, lambda seed, done: own_seed(own, seed), method=kind, keep=keep)

    full = recipe.replace(start=start)
    found = [Contender(BASELINE, "the full pre-trained weights", lambda seed, done: own_seed(full, seed))]
    for number, ticket in source.tickets.items():
        whole: dict[str, Any] = {"dense": False, "method": ("fixed_ticket", *along)}
        given = {**whole, "ticket": str(source.ticket_file(number)), "start": start}
        changes: dict[str, dict[str, Any]] = {"ticket": given}
        for kind in controls:
            if kind == "random_init":
                changes[kind] = {**given, "start": None}
            elif kind == "one_shot":
                path = out / "one-shot" / _slug(source.name) / f"round-{number}.safetensors"
                one_shot(read_start(source.start), ticket).save(path)
                changes[kind] = {**given, "ticket": str(path.absolute())}
            elif kind == "shuffled" or _reversible(ticket):
                changes[kind] = {**given, "control": kind}
        for kind, change in changes.items():
            about = "the ticket on the pre-trained weights" if kind == "ticket" else CONTROLS[kind]
            own = recipe.replace(**change)
            found.append(made(f"{kind}-round{number}", f"{about}, round {number}", own, kind, ticket.keep))
    return found


def _reversible(ticket: Ticket) -> bool:
    """Whether a ticket removes something of each layer."""
    return all(kept < total for kept, total in ticket.widths.values())


def _entry(one: Plan, comparison: Mapping[str, Any], deviations: float) -> dict[str, Any]:
    reached: dict[str, list[float]] = {}
    for row in comparison["runs"]:
        reached.setdefault(row["contender"], []).append(row["accuracy"])
    full = reached[BASELINE]
    least = bound(full, deviations)
    table = []
    by_kind: dict[str, dict[float, list[float]]] = {}
    for contender in one.contenders[1:]:
        assert contender.keep is not None
        sparsity, values = 1 - contender.keep, reached[contender.name]
        by_kind.setdefault(contender.method, {})[sparsity] = values
        table.append(
            {
                "kind": contender.method,
                "contender": contender.name,
                "round": int(contender.name.rpartition("round")[2]),
                "sparsity": sparsity,
                "reached": statistics_of(values),
                "matching": matching(full, {sparsity: values}, deviations)[sparsity],
            }
        )
    return {
        "task": one.task,
        "source": one.source.name,
        "folder": one.folder.name,
        "judged_by": comparison["runs"][0]["judged_by"],
        "full": statistics_of(full),
        "bound": least,
        "sparsities": sorted({row["sparsity"] for row in table}),
        "table": table,
        "largest_matching": {kind: largest_matching(full, values, deviations) for kind, values in by_kind.items()},
    }


def _conclude(
    sources: Sequence[Source],
    entries: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    deviations: float,
    *,
    complete: bool,
) -> dict[str, Any]:
    per_source: dict[str, list[dict[float, bool]]] = {}
    for entry in entries:
        good = {row["sparsity"]: row["matching"] for row in entry["table"] if row["kind"] == "ticket"}
        per_source.setdefault(entry["source"], []).append(good)
    return {
        "seeds": list(seeds),
        "deviations": deviations,
        "complete": complete,
        "sources": [
            {
                "name": source.name,
                "folder": str(source.folder),
                "model": source.blueprint.model,
                "sparsity": {str(number): 1 - ticket.keep for number, ticket in source.tickets.items()},
            }
            for source in sources
        ],
        "tasks": list(entries),
        "universal": {name: universal(found) for name, found in per_source.items()},
        "similarity": _similarity(sources),
    }


def _similarity(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Compare the masks of each two sources of one network, round by round."""
    found = []
    for one, other in combinations(sources, 2):
        for number in one.tickets.keys() & other.tickets.keys():
            first, second = one.tickets[number], other.tickets[number]
            if {n: m.shape for n, m in first.masks.items()} == {n: m.shape for n, m in second.masks.items()}:
                overall, layers = jaccard(first, second)
                expected = expected_jaccard(first.keep, second.keep)
                names = {"one": one.name, "other": other.name, "round": number}
                found.append({**names, "jaccard": overall, "expected": expected, "layers": layers})
    return found
