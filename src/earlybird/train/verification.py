"""Sanity checks for the ticket of a run: everything that it has to be compared with, on the same terms.

    verification = verify("runs/imp", seeds=(0, 1, 2))
    print(describe(verification))

For each learning rate and seed there are runs of the same epochs and schedule: the whole network, the ticket from its
own first weights, its units shuffled within the layers, as many at random, the ticket from other first weights, and the
ticket from the weights that the dense run ended with. What they say together is in `earlybird.tickets.verify`.

A ticket belongs to one set of first weights. So all runs but the re-initialised ones begin with these, and a seed
stands for another order of the images, other augmentation, other dropout; and, where weights are drawn anew, for
those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earlybird.cost.verdict import POINTS
from earlybird.errors import InputError
from earlybird.files import read_tensors, write_json, write_tensors
from earlybird.settings import check_number, check_share
from earlybird.tickets.ticket import Ticket
from earlybird.tickets.verify import Correlation, Verdict, correlation, judge_ticket
from earlybird.train.compare import plain
from earlybird.train.contenders import Contender, Done, for_epochs, own_seed
from earlybird.train.points import statistics_of
from earlybird.train.recipe import Recipe
from earlybird.train.ticket_source import Source, read_source
from earlybird.train.turns import check_turns, claimed, run_contenders
from earlybird.train.verification_text import correlation_lines, describe, guideline

__all__ = ["ROLES", "Source", "describe", "read_source", "verification_folder", "verify"]

ROLES: dict[str, str] = {
    "dense": "the whole network, from the ticket's first weights",
    "ticket": "the ticket, from its own weights",
    "shuffled": "as many units in each layer, but others",
    "random": "as many weights in all, the same share of each layer, at random",
    "reinitialised": "the ticket, from other weights of the same distribution",
    "retrained": "pruning and retraining: the ticket, from the weights that dense ended with, pruned in one shot",
    "dense-equal-budget": "the whole network, for as many MACs as the ticket's whole bill, search included",
}
"""What is run, and what each is."""

_FIRST, _START = "first.safetensors", "start.safetensors"


def verify(
    source: str | Path | Source,
    out: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    rates: Sequence[float] = (),
    rounds: int | str = "last",
    tolerance: float = POINTS,
    share: float = 0.2,
    equal_budget: bool = True,
    jobs: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run what a ticket has to be compared with, and say what it won.

    Args:
        source: Folder of a finished run that drew a ticket, or a ticket file with ``recipe``; or what `read_source`
            made of them.
        out: Folder for run folders and ``verification.json``; by default one under ``runs/``. Started again, it keeps
            what is finished and goes on, also with more seeds, learning rates or rounds.
        recipe: Of a ticket file: model, data and the seed of its first weights.
        seeds: At least one, all different.
        rates: Learning rates; by default the recipe's own, and a tenth of it.
        rounds: Of a run in rounds: the number of one, ``'last'`` or ``'all'``.
        tolerance: See `judge_ticket`.
        share: Of the largest weights that `correlation` looks at.
        equal_budget: Also train dense for the ticket's whole bill, where that is more than one training.
        jobs: Runs at a time.
        quiet: Show nothing of the runs.

    Returns:
        What ``verification.json`` holds: ``runs`` (one row each), ``checks`` (a learning rate and round each, with
        accuracies, gaps and verdict), ``correlation``, ``left_out``, ``guideline`` and ``verdict``.

    Raises:
        InputError: There is no ticket, it does not fit, an option is out of range, or the folder belongs to another.
        Interrupted: A signal came; the same command goes on.
        EarlybirdError: A run could not be done as asked; says why.
    """
    check_turns(seeds, jobs)
    check_number("tolerance", tolerance, lambda points: points >= 0, "percentage points, 0 or more")
    check_share("share", share)
    found = source if isinstance(source, Source) else read_source(source, recipe, rounds=rounds)
    rates = _rates(rates, found.recipe.lr)
    path = (Path(out) if out is not None else verification_folder(found)).absolute()
    contenders, places, left_out = _contenders(found, path, rates, equal_budget)
    for contender in contenders:
        contender.recipe(seeds[0], {})  # what does not fit is said now, not after hours
    files = {_FIRST: found.first, _START: found.start}
    tickets = {_ticket_name(number): ticket for number, ticket in found.tickets.items()}
    correlated: dict[str, dict[str, Any]] = {}  # of dense runs that have finished, by folder

    def conclude(done: Done) -> dict[str, Any]:
        rows = [{**row, **places[name]} for (name, _), row in done.items()]
        for row in (row for row in rows if row["role"] == "dense" and row["folder"] not in correlated):
            correlated[row["folder"]] = _correlated(found, path, row, share)
        complete = len(rows) == len(contenders) * len(seeds)
        checks = _checks(found, rows, rates, tolerance)
        verification: dict[str, Any] = {
            "source": found.name,
            "recipe": {key: plain(value) for key, value in found.recipe.values().items()},
            "contenders": {contender.name: contender.about for contender in contenders},
            "about": ROLES,
            "places": places,
            "rates": list(rates),
            "rounds": [number for number in found.tickets if number is not None],
            "seeds": list(seeds),
            "tolerance": tolerance,
            "start_at": None if found.start_at == found.first_at else str(found.start_at),
            "complete": complete,
            "runs": rows,
            "checks": checks,
            "correlation": [correlated[row["folder"]] for row in rows if row["role"] == "dense"],
            "left_out": left_out,
        }
        verification["correlation_lines"] = correlation_lines(verification)
        verification["guideline"] = guideline(found, verification)
        verification["verdict"] = " ".join(check["sentence"] for check in checks)
        write_json(path / "verification.json", verification)
        return verification

    with claimed(path, found.recipe, inputs=(*files, *tickets, "verification.json")) as stop:
        _deposit(path, files, tickets)
        done = run_contenders(path, contenders, seeds, stop, same=True, jobs=jobs, quiet=quiet, tell=conclude)
        return conclude(done)


def verification_folder(source: Source) -> Path:
    """Return where a verification goes that is told no other place."""
    return Path(f"runs/verify-{source.name}")


def _rates(rates: Sequence[float], own: float) -> tuple[float, ...]:
    for rate in rates:
        check_number("lr", rate, lambda value: value > 0, "learning rates above 0")
    by_name = {f"{rate:g}": float(rate) for rate in rates or (own, own / 10)}
    return tuple(own if name == f"{own:g}" else float(name) for name in by_name)


def _ticket_name(number: int | None) -> str:
    return "ticket.safetensors" if number is None else f"ticket-round{number}.safetensors"


def _deposit(path: Path, files: Mapping[str, Mapping[str, Tensor]], tickets: Mapping[str, Ticket]) -> None:
    """Write what all runs begin with into the folder, so that it stays with them; or find it there already."""
    other = InputError(f"{path} holds a verification of another ticket", hint="choose another --out")
    for name, tensors in files.items():
        if not (path / name).exists():
            write_tensors(path / name, tensors, {})
            continue
        held = read_tensors(path / name)[0]
        if held.keys() != tensors.keys() or any(not torch.equal(held[key], tensors[key]) for key in held):
            raise other
    for name, ticket in tickets.items():
        if not (path / name).exists():
            ticket.save(path / name)
        elif Ticket.load(path / name) != ticket:
            raise other


def _contenders(
    source: Source, path: Path, rates: Sequence[float], equal_budget: bool
) -> tuple[list[Contender], dict[str, dict[str, Any]], dict[str, str]]:
    """Return who takes part, the place of each (role, learning rate, round), and why others do not."""
    found: list[Contender] = []
    places: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}

    def add(role: str, rate: float, number: int | None, recipe: Callable[[int], Recipe], needs: Iterable[str]) -> None:
        name = _name(role, rate, number)
        places[name] = {"role": role, "lr": rate, "round": number}
        found.append(Contender(name, ROLES[role], lambda seed, done: own_seed(recipe(seed), seed), tuple(needs)))

    roles = ["ticket", "shuffled", "random", "reinitialised", "retrained"]
    if any("channel" in ticket.kinds.values() for ticket in source.tickets.values()):
        roles.remove("random")
        left_out["random"] = "the ticket is over channels: at random in each layer, they are its shuffled control"
    budgets, reason = _equal_budgets(source, rates, equal_budget)
    if reason:
        left_out["dense-equal-budget"] = reason
    for rate in rates:
        base = source.recipe.replace(lr=rate)
        dense = _whole(base).replace(start=str(path / _FIRST), start_at=source.first_at)
        add("dense", rate, None, _always(dense), ())
        for number in source.tickets:
            ticket = base.replace(ticket=str(path / _ticket_name(number)))
            own = ticket.replace(start=str(path / _START), start_at=source.start_at)
            recipes: dict[str, Callable[[int], Recipe]] = {
                "ticket": _always(own),
                "shuffled": _always(own.replace(control="shuffled")),
                "random": _always(own.replace(control="random")),
                "reinitialised": _always(own.replace(fixed_weights="reinitialise")),
                "retrained": _from_dense(ticket, path, _name("dense", rate, None)),
            }
            for role in roles:
                add(role, rate, number, recipes[role], [_name("dense", rate, None)] if role == "retrained" else ())
            if rate == source.recipe.lr and number in budgets:
                longer = for_epochs(dense, source.recipe.epochs * budgets[number])
                add("dense-equal-budget", rate, number, _always(longer), ())
    return found, places, left_out


def _name(role: str, rate: float, number: int | None) -> str:
    return f"{role}{'' if number is None else f'-round{number}'}-lr{rate:g}"


def _whole(recipe: Recipe) -> Recipe:
    """Return the recipe of the whole network, with the methods that go along."""
    along = tuple(name for name in recipe.method if name != "fixed_ticket")
    return recipe.replace(method=along) if along else recipe.replace(dense=True)


def _always(recipe: Recipe) -> Callable[[int], Recipe]:
    return lambda seed: recipe


def _from_dense(ticket: Recipe, path: Path, dense: str) -> Callable[[int], Recipe]:
    return lambda seed: ticket.replace(start=str(path / f"{dense}-seed{seed}" / "model.safetensors"))


def _equal_budgets(source: Source, rates: Sequence[float], wanted: bool) -> tuple[dict[int | None, float], str]:
    """Return the last round's bill in dense trainings where dense is to be trained for it, or why it is not."""
    number = list(source.tickets)[-1]
    budget = source.budgets[number]
    if not wanted:
        return {}, "not asked for"
    if budget is None:
        return {}, "what the ticket cost in MACs is not known"
    if round(budget, 2) <= 1:
        return {}, f"the ticket's whole bill is {budget:.2f} of one dense training, in MACs: dense has had more"
    if source.recipe.lr not in rates:
        return {}, f"the ticket was found at learning rate {source.recipe.lr:g}, which is not among those asked for"
    return {number: budget}, ""


def _checks(
    source: Source, rows: Sequence[Mapping[str, Any]], rates: Sequence[float], tolerance: float
) -> list[dict[str, Any]]:
    """Return one entry a learning rate and round, as far as its ticket has been trained."""
    checks = []
    for rate in rates:
        for number, ticket in source.tickets.items():
            own = [
                row for row in rows
                if row["role"] in ("dense", "dense-equal-budget") or (row["lr"] == rate and row["round"] == number)
            ]  # fmt: skip
            if not any(row["role"] == "ticket" for row in own):
                continue
            verdict = judge_ticket(own, tolerance=tolerance)
            here = [row for row in own if row["lr"] == rate]
            accuracy = {
                role: statistics_of([row["accuracy"] for row in here if row["role"] == role])
                for role in ROLES if any(row["role"] == role for row in here)
            }  # fmt: skip
            checks.append(
                {
                    "lr": rate,
                    "round": number,
                    "keep": ticket.keep,
                    "share_of": "weights" if ticket.over_weights else "channels",
                    "accuracy": accuracy,
                    **verdict.to_json(),
                    "sentence": _sentence(rate, number, ticket, verdict),
                }
            )
    return checks


def _sentence(rate: float, number: int | None, ticket: Ticket, verdict: Verdict) -> str:
    which = "The ticket" if number is None else f"Round {number}"
    return f"{which}, {ticket.keep:.1%} kept, at learning rate {rate:g}: {verdict}."


def _correlated(source: Source, path: Path, row: Mapping[str, Any], share: float) -> dict[str, Any]:
    trained = read_tensors(path / row["folder"] / "model.safetensors")[0]
    layers = list(next(iter(source.tickets.values())).masks)
    one, other = (
        {name: weights[f"{name}.weight"] for name in layers if f"{name}.weight" in weights}
        for weights in (source.first, trained)
    )
    found = correlation(one, other, share)
    return {"lr": row["lr"], "seed": row["seed"], **_correlation_json(found)}


def _correlation_json(found: Correlation) -> dict[str, Any]:
    return {
        "share": found.share, "overall": found.overall, "chance": found.chance, "within": found.within,
        "layers": dict(found.layers),
    }  # fmt: skip
