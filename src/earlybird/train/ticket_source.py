"""A ticket to check, read from the run that drew it: with its model, its first weights, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from earlybird.blocks import find_blocks
from earlybird.calls import first_sample
from earlybird.cost.bill import Bill
from earlybird.errors import InputError
from earlybird.files import read_tensors
from earlybird.models.blueprint import Blueprint
from earlybird.sparse.masks import check_fits
from earlybird.start import load_start, read_start
from earlybird.step import Step
from earlybird.tickets.shrink import shrink
from earlybird.tickets.ticket import Ticket, round_files
from earlybird.train.contenders import keep_key
from earlybird.train.parts import located
from earlybird.train.recipe import Recipe
from earlybird.train.result import Result
from earlybird.train.run import Converting, first_model

_DRAWS_WITHOUT_SHARE = ("early_bert", "fixed_ticket")
"""Methods that decide which units stay, but have no single share that could be asked for."""


@dataclass(frozen=True)
class Source:
    """A ticket, or those of several rounds, and what is known of where it came from.

    Attributes:
        name: For people, and for folders.
        recipe: What all runs have in common: the recipe of the ticket's run, without what drew it.
        tickets: By round; None: the run has no rounds.
        first: The weights that the dense network begins with.
        start: Those that the ticket begins with; the same, unless its rounds rewind to a later step.
        first_at: The step of the schedule that they are of; None: its beginning.
        start_at: That of ``start``.
        budgets: By round, the MACs of the ticket's whole bill over those of one dense training; None where unknown.
        parameters: Of the whole network.
        residual: Whether it has residual blocks.
    """

    name: str
    recipe: Recipe
    tickets: Mapping[int | None, Ticket]
    first: Mapping[str, Tensor]
    first_at: Step | None
    start: Mapping[str, Tensor]
    start_at: Step | None
    budgets: Mapping[int | None, float | None]
    parameters: int
    residual: bool


def read_source(path: str | Path, recipe: Recipe | None = None, *, rounds: int | str = "last") -> Source:
    """Read a ticket and the weights that belong to it.

    Args:
        path: Folder of a finished run that drew a ticket, or a ticket file.
        recipe: Of a ticket file; its ``start``, if there is one, names the weights to begin with.
        rounds: Of a run in rounds: the number of one, ``'last'`` or ``'all'``.

    Raises:
        InputError: There is no ticket, a file is damaged, or it does not fit the model.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"nothing at {path}", needed="the folder of a run that drew a ticket, or a ticket file")
    if path.is_dir():
        if recipe is not None:
            raise InputError(f"both the run {path} and a recipe", needed="one of them", hint="leave --recipe out")
        recipe, found, result = _read_run(path, rounds)
        name, folder = path.resolve().name, path
        budgets = {number: _budget(result.bill, ticket, number) for number, ticket in found.items()}
    else:
        found = {None: Ticket.load(path)}
        if recipe is None:
            raise InputError(f"{path} is a file, which tells no model and data", hint="add --recipe recipe.toml")
        if rounds != "last":
            raise InputError(f"rounds of the file {path}", needed="the folder of a run in rounds")
        name, folder, budgets = path.stem, None, {None: None}
    recipe = located(recipe)
    _check_methods(recipe)
    blueprint, model = first_model(recipe)
    for ticket in found.values():
        _check_ticket(ticket, model, blueprint)
    if recipe.start is not None:
        load_start(model, read_start(recipe.start), fresh_head=recipe.fresh_head)
    first, first_at = _weights(model), recipe.start_at
    rewound = _rewound(folder, model, list(found.values())[-1])
    start, start_at = _weights(model), first_at
    if rewound:
        start_at = (first_at or Step()).later(rewound)
    elif rewound == 0:
        first = start  # as saved: drawn anew from the seed, another version of PyTorch may give others
    return Source(
        name=name,
        recipe=_common(recipe),
        tickets=found,
        first=first,
        first_at=first_at,
        start=start,
        start_at=start_at,
        budgets=budgets,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        residual=_is_residual(model, blueprint),
    )


def _read_run(path: Path, rounds: int | str) -> tuple[Recipe, dict[int | None, Ticket], Result]:
    if not (path / "recipe.toml").is_file():
        raise InputError(f"no run in {path} (no recipe.toml)", needed="the folder of a run that drew a ticket")
    recipe = Recipe.from_toml(path / "recipe.toml")
    result = Result.read(path)
    if result is None:
        raise InputError(f"the run in {path} is not finished", hint=f"go on with 'earlybird resume {path}'")
    if not (path / "ticket.safetensors").is_file():
        raise InputError(f"the run in {path} drew no ticket", needed="one of a method that decides what stays")
    last = Ticket.load(path / "ticket.safetensors")
    there = round_files(path)
    if not there:
        if rounds != "last":
            raise InputError(f"the run in {path} has no rounds", hint="leave --round and --rounds out")
        return recipe, {None: last}, result
    if rounds == "last":
        return recipe, {max(there): last}, result
    asked = sorted(there) if rounds == "all" else [int(rounds)]
    if not set(asked) <= set(there):
        raise InputError(f"no ticket of round {asked[0]} in {path}", needed=f"a round from 1 to {max(there)}")
    return recipe, {number: Ticket.load(there[number]) for number in asked}, result


def _budget(bill: Bill, ticket: Ticket, number: int | None) -> float | None:
    """Return what had been spent when the ticket was trained over one dense training, in MACs but for evaluation."""
    if number is not None:  # zeros are multiplied, too: every step costs what one of dense does
        training, rewound = (ticket.provenance.get(name) for name in ("training", "rewind_to"))
        return None if training is None or rewound is None else float(1 + number * (training - rewound) / training)
    own, dense = _training_macs(bill), None if bill.dense is None else _training_macs(bill.dense)
    return own / dense if own and dense else None


def _training_macs(bill: Bill) -> float | None:
    macs = [spent.macs for name, spent in bill.phases.items() if name != "evaluate"]
    return None if any(one is None for one in macs) else sum(one.value for one in macs if one is not None)


def _check_methods(recipe: Recipe) -> None:
    if recipe.dense:
        raise InputError("the recipe is dense, so that no ticket belongs to it", needed="the recipe of a ticket")
    for name in recipe.method:
        if isinstance(recipe.build_methods()[name], Converting):
            raise InputError(f"{name} replaces layers of the model", needed="a ticket over the model's own layers")
    if recipe.settings.get("fixed_weights") == "reinitialise":
        raise InputError(
            "the ticket was trained from weights drawn anew, which are nobody's first ones",
            needed="a ticket with its own weights",
        )


def _check_ticket(ticket: Ticket, model: nn.Module, blueprint: Blueprint) -> None:
    """Make sure that the ticket fits the model, and leaves something and not all of it."""
    others = set(ticket.kinds.values()) - {"channel", "weight"}
    if others:
        raise InputError(f"no checks of units of kind '{min(others)}'", needed="a ticket over channels or weights")
    if ticket.keep == 1:
        raise InputError("the ticket keeps the whole network", needed="a ticket that removes something")
    if ticket.over_weights:
        check_fits(ticket, model)
    else:
        device = next(model.parameters()).device
        shrink(deepcopy(model), ticket, first_sample(blueprint.example(2).to(device)), round_to=1)


def _rewound(folder: Path | None, model: nn.Module, ticket: Ticket) -> int | None:
    """Give the model the weights that the rounds of a run begin from; return their step, or None without rounds."""
    if folder is None or not (folder / "rewind.safetensors").is_file():
        return None
    load_start(model, read_tensors(folder / "rewind.safetensors")[0])
    return int(ticket.provenance.get("rewind_to", 0))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _common(recipe: Recipe) -> Recipe:
    """Return the recipe without the method that drew the ticket; what keeps the whole network goes along."""
    along = [name for name in recipe.method if not keep_key(name) and name not in _DRAWS_WITHOUT_SHARE]
    ticket = {"ticket": None, "control": "none", "fixed_weights": "start"}
    start = {"start": None, "start_at": None, "fresh_head": False}
    return recipe.replace(method=("fixed_ticket", *along), out=None, **ticket, **start)


def _is_residual(model: nn.Module, blueprint: Blueprint) -> bool:
    try:
        return bool(find_blocks(model, blueprint.example(2).to(next(model.parameters()).device)))
    except InputError:
        return False
