"""A ticket to check, read from the run that drew it: with its model, its first weights, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from earlybird.blocks import find_blocks
from earlybird.calls import first_sample
from earlybird.errors import InputError
from earlybird.files import read_rows, read_tensors
from earlybird.models.blueprint import Blueprint
from earlybird.sparse.masks import check_fits, prunable
from earlybird.tickets.fixed import load_start
from earlybird.tickets.shrink import shrink
from earlybird.tickets.ticket import Ticket
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
        start: Those that the ticket begins with; the same, unless it is rewound to a later step.
        rewound: That step.
        budgets: By round, the MACs of the ticket's whole bill over those of one dense training; None where unknown.
        parameters: Of the whole network.
        residual: Whether it has residual blocks.
    """

    name: str
    recipe: Recipe
    tickets: Mapping[int | None, Ticket]
    first: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    rewound: int
    budgets: Mapping[int | None, float | None]
    parameters: int
    residual: bool


def read_source(path: str | Path, recipe: Recipe | None = None, *, rounds: int | str = "last") -> Source:
    """Read a ticket and the weights that belong to it.

    Args:
        path: Folder of a finished run that drew a ticket, or a ticket file.
        recipe: Of a ticket file; one of the method ``fixed_ticket`` may name ``start``, the weights it begins with.
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
        budgets = {number: _budget(path, result, number) for number in found}
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
    last = list(found.values())[-1]
    first = _weights(model)
    start, rewound = _start(recipe, model, folder, last)
    return Source(
        name=name,
        recipe=_common(recipe),
        tickets=found,
        first=first if rewound else start,
        start=start,
        rewound=rewound,
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
    there = {
        int(file.stem.removeprefix("round-")): file for file in (path / "tickets").glob("round-*.safetensors")
        if file.stem.removeprefix("round-").isdigit()
    }  # fmt: skip
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


def _budget(path: Path, result: Result, number: int | None) -> float | None:
    """Return the MACs that had been spent when the ticket was trained, over those of one dense training."""
    dense = result.bill.dense
    if dense is None or dense.total.macs is None or not dense.total.macs.value:
        return None
    if number is None:
        spent = result.bill.total.macs
        return None if spent is None else spent.value / dense.total.macs.value
    macs = [row["macs"] for row in read_rows(path / "metrics.jsonl") if row.get("round") == number]
    return macs[-1] / dense.total.macs.value if macs and macs[-1] is not None else None


def _check_methods(recipe: Recipe) -> None:
    if recipe.dense:
        raise InputError("the recipe is dense, so that no ticket belongs to it", needed="the recipe of a ticket")
    for name in recipe.method:
        if isinstance(recipe.build_methods()[name], Converting):
            raise InputError(f"{name} replaces layers of the model", needed="a ticket over the model's own layers")


def _check_ticket(ticket: Ticket, model: nn.Module, blueprint: Blueprint) -> None:
    """Make sure that the ticket fits the model, and leaves something and not all of it."""
    others = set(ticket.kinds.values()) - {"channel", "weight"}
    if others:
        raise InputError(f"no checks of units of kind '{min(others)}'", needed="a ticket over channels or weights")
    if ticket.keep == 1:
        raise InputError("the ticket keeps the whole network", needed="a ticket that removes something")
    if "weight" in ticket.kinds.values():
        check_fits(ticket, model)
    else:
        device = next(model.parameters()).device
        shrink(deepcopy(model), ticket, first_sample(blueprint.example(2).to(device)), round_to=1)


def _start(recipe: Recipe, model: nn.Module, folder: Path | None, ticket: Ticket) -> tuple[dict[str, Tensor], int]:
    """Return the weights that the ticket is trained from, and the step of a training that they are of."""
    settings = recipe.settings
    rewound = int(ticket.provenance.get("rewind_to") or 0)
    own = None if folder is None else folder / "rewind.safetensors"
    if own is not None and own.is_file():
        load_start(model, read_tensors(own)[0])
        return _weights(model), rewound
    if settings.get("fixed_weights") == "reinitialise":
        raise InputError(
            "the ticket was trained from weights drawn anew, which are nobody's first ones",
            needed="a ticket with its own weights",
        )
    given = settings.get("start")
    if given is not None:
        at = Path(given)
        leave = list(prunable(model))[-1] if settings.get("fresh_head") else None
        load_start(model, read_tensors(at / "rewind.safetensors" if at.is_dir() else at)[0], leave=leave)
    return _weights(model), 0 if given is None else rewound


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _common(recipe: Recipe) -> Recipe:
    """Return the recipe without the method that drew the ticket; what keeps the whole network goes along."""
    along = [name for name in recipe.method if not keep_key(name) and name not in _DRAWS_WITHOUT_SHARE]
    plain_ticket = {"ticket": None, "start": None, "control": "none", "fixed_weights": "start", "fresh_head": False}
    return recipe.replace(method=("fixed_ticket", *along), out=None, **plain_ticket)


def _is_residual(model: nn.Module, blueprint: Blueprint) -> bool:
    try:
        return bool(find_blocks(model, blueprint.example(2).to(next(model.parameters()).device)))
    except InputError:
        return False
