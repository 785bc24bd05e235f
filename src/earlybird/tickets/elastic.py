"""Elastic tickets: a winning ticket of one depth of a family, stretched or squeezed into one of another depth.

Chen, Cheng, Wang, Gan, Liu, Wang, The Elastic Lottery Ticket Hypothesis, NeurIPS 2021,
https://arxiv.org/abs/2103.16547 (reference code: github.com/VITA-Group/ElasticLTH).

A family has the same stages at every depth, and a stage repeats one unit: a residual block, or a convolution with its
batch norm. The first unit of a stage, and what belongs to no stage (stem, head), is copied one to one. Of the others,
s in the source and t in the target, unit j of the target takes the masks and the rewound weights of unit

    floor(j s / t)    'interpolate', and 'interleaved' where t < s: copies stand side by side, gaps are spread evenly
    j mod s           'append', and 'consecutive' where t < s: the sequence is repeated, or its end left out

together with all that belongs to them: batch-norm scales, shifts, running statistics.

What it saves: the search. One iterative run serves the family, where a ticket at 10 % of the weights otherwise takes
ten whole trainings for each depth. Nothing in the training of the target, for which see `earlybird.tickets.fixed`. It
does *not* pay where only one depth is wanted, and is refused where stages of the source have nothing to copy.

Deviations: stages and units are worked out from the names and shapes of the state dict instead of by class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from torch import Tensor

from earlybird.errors import InputError
from earlybird.settings import check_choice
from earlybird.sparse.masks import ticket_of
from earlybird.tickets.ticket import Ticket

__all__ = ["Stage", "Unit", "elastic", "names_for", "stages", "stretched_masks", "stretched_state", "unit_map"]

Stretch = Literal["interpolate", "append"]
Squeeze = Literal["interleaved", "consecutive"]
STRETCHES = ("interpolate", "append")
SQUEEZES = ("interleaved", "consecutive")


@dataclass(frozen=True)
class Unit:
    """What is copied as a whole: a block, or a layer with its norm.

    Attributes:
        name: Of its first module, such as ``'blocks.3'``.
        tensors: Name within the unit to name in the state dict.
        shapes: Name within the unit to shape.
    """

    name: str
    tensors: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def outputs(self) -> int:
        """Channels that it writes: those of its last weight."""
        return [shape for shape in self.shapes.values() if len(shape) > 1][-1][0]


@dataclass(frozen=True)
class Stage:
    """Units of one width that follow each other; the first one is never copied or left out.

    Attributes:
        first: The unit that brings the width about.
        others: Units of one shape.
    """

    first: Unit
    others: tuple[Unit, ...] = ()

    @property
    def depth(self) -> int:
        """Number of units."""
        return 1 + len(self.others)


@dataclass
class _Module:
    """An entry of a sequence: its number in it, and its tensors by their name within it."""

    number: int
    tensors: dict[str, Tensor] = field(default_factory=dict)


def unit_map(
    source: int, target: int, *, stretch: Stretch = "interpolate", squeeze: Squeeze = "interleaved"
) -> list[int]:
    """Return for each of ``target`` units, the first one of the stage left out, from which of ``source`` it is copied.

    Args:
        source: Units of the source that may be copied.
        target: Units that are wanted.
        stretch: Order where there are more of them.
        squeeze: Order where there are fewer.

    Raises:
        InputError: There is nothing to copy from, or an order is unknown.
    """
    check_choice("stretch", stretch, STRETCHES)
    check_choice("squeeze", squeeze, SQUEEZES)
    if target and not source:
        raise InputError("no unit to copy", needed="at least one beside the first of the stage")
    side_by_side = stretch == "interpolate" if target > source else squeeze == "interleaved"
    return [index * source // target if side_by_side else index % source for index in range(target)]


def stages(state: Mapping[str, Tensor]) -> tuple[list[Stage], list[str]]:
    """Return the stages of a network, in order, and the names of all tensors that belong to none.

    Tensors whose name has a number in it are entries of a sequence. A unit is one entry, with the entries after it that
    have no weight of their own (a norm). A stage begins where the width changes, where another sequence does, where an
    entry without any tensor, beyond what lies between all units, stands between two units (a pooling), and where a unit
    has other shapes than those after the stage's first one.

    Args:
        state: A whole ``model.state_dict()``; only names and shapes count.
    """
    sequences: dict[str, dict[int, _Module]] = {}
    alone: list[str] = []
    for name, tensor in state.items():
        parts = name.split(".")
        at = next((place for place, part in enumerate(parts[:-1]) if part.isdigit()), None)
        if at is None:
            alone.append(name)
            continue
        number = int(parts[at])
        entries = sequences.setdefault(".".join(parts[:at]), {})
        entries.setdefault(number, _Module(number)).tensors[".".join(parts[at + 1 :])] = tensor
    found: list[Stage] = []
    for sequence, entries in sequences.items():
        units = _units(sequence, entries.values())
        steps = [later[0] - earlier[0] for earlier, later in pairwise(units)]
        usual = min(steps, default=0)
        for place, (_, unit) in enumerate(units):
            goes_on = place > 0 and steps[place - 1] == usual and unit.outputs == units[place - 1][1].outputs
            # at small widths, two stages may have one
            if goes_on and all(unit.shapes == other.shapes for other in found[-1].others):
                found[-1] = Stage(found[-1].first, (*found[-1].others, unit))
            else:
                found.append(Stage(unit))
    return found, alone


def _units(sequence: str, modules: Iterable[_Module]) -> list[tuple[int, Unit]]:
    """Return number and unit of each entry of a sequence that has a weight, with those after it that have none."""
    grouped: list[list[_Module]] = []
    for module in sorted(modules, key=lambda one: one.number):
        if grouped and all(tensor.dim() < 2 for tensor in module.tensors.values()):
            grouped[-1].append(module)
        else:
            grouped.append([module])
    units = []
    for group in grouped:
        first = group[0].number
        tensors, shapes = {}, {}
        for module in group:
            path = f"{sequence}.{module.number}" if sequence else f"{module.number}"
            for rest, tensor in module.tensors.items():
                own = f"{module.number - first}.{rest}"
                tensors[own], shapes[own] = f"{path}.{rest}", tuple(tensor.shape)
        if not any(len(shape) > 1 for shape in shapes.values()):
            raise InputError(f"'{sequence}' begins without a weight", needed="sequences of layers with their norms")
        units.append((first, Unit(f"{sequence}.{first}" if sequence else f"{first}", tensors, shapes)))
    return units


def names_for(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    *,
    stretch: Stretch = "interpolate",
    squeeze: Squeeze = "interleaved",
) -> dict[str, str]:
    """Return for each tensor of ``target`` the name of the one in ``source`` that it is copied from.

    Args:
        source: State dict of the network that the ticket was found in.
        target: That of another member of the family.
        stretch: Order of the units where a stage of the target is longer.
        squeeze: Order where it is shorter.

    Raises:
        InputError: A tensor of the target has nothing that it could be copied from; the message names it and what
            would fit.
    """
    (own, own_alone), (theirs, their_alone) = stages(source), stages(target)
    if len(own) != len(theirs):
        raise InputError(
            f"{len(own)} stages of widths {_widths(own)} in the source, {len(theirs)} of {_widths(theirs)} in the "
            "target",
            needed="two members of one family, which differ in depth alone",
        )
    names: dict[str, str] = {}
    for one, other in zip(own, theirs):
        _copy(one.first, other.first, names)
        if other.others and not one.others:
            raise InputError(
                f"the stage of '{other.first.name}' has {other.depth} units in the target and 1 in the source, which "
                "is never copied",
                needed="a source with at least 2 units in that stage",
                hint="look for the ticket in a deeper member of the family; any deeper one can be squeezed later",
            )
        chosen = unit_map(len(one.others), len(other.others), stretch=stretch, squeeze=squeeze)
        for unit, number in zip(other.others, chosen):
            _copy(one.others[number], unit, names)
    for name in their_alone:
        if name not in own_alone or source[name].shape != target[name].shape:
            there = f"is {tuple(source[name].shape)} in the source" if name in source else "is not in the source"
            raise InputError(
                f"'{name}' {there} and {tuple(target[name].shape)} in the target",
                needed="two members of one family, of one width and for the same images and classes",
            )
        names[name] = name
    assert names.keys() == target.keys()  # stages and what is alone are all there is
    return {name: names[name] for name in target}


def _widths(found: Sequence[Stage]) -> str:
    return ", ".join(str(stage.first.outputs) for stage in found) or "none"


def _copy(source: Unit, target: Unit, names: dict[str, str]) -> None:
    for key in (*target.shapes, *source.shapes):
        own, wanted = source.shapes.get(key), target.shapes.get(key)
        if own != wanted:
            raise InputError(
                f"'{target.tensors.get(key, target.name)}' {_shape(wanted)} cannot be copied from "
                f"'{source.tensors.get(key, source.name)}' {_shape(own)}",
                needed="two members of one family, of one width and for the same images and classes",
            )
    names.update((name, source.tensors[key]) for key, name in target.tensors.items())


def _shape(shape: tuple[int, ...] | None) -> str:
    return "without such a tensor" if shape is None else f"of shape {shape}"


def stretched_state(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the state dict of the target: copies of the tensors of ``state`` that `names_for` assigns."""
    return {name: state[source].clone() for name, source in names.items()}


def stretched_masks(masks: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the masks of the target by layer; layers whose source has no mask have none.

    Args:
        masks: Layer name of the source to mask, of the weight's shape.
        names: From `names_for`.
    """
    sources = {
        name.removesuffix(".weight"): source.removesuffix(".weight")
        for name, source in names.items()
        if name.endswith(".weight")
    }
    return {name: masks[source].clone() for name, source in sources.items() if source in masks}


def elastic(
    ticket: Ticket,
    state: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    *,
    stretch: Stretch = "interpolate",
    squeeze: Squeeze = "interleaved",
) -> tuple[Ticket, dict[str, Tensor]]:
    """Return the ticket and the rewound weights of another depth. Pure.

    Its provenance holds the orders, the map of names, the provenance of the source's ticket, and the shares of weights
    that source and target keep: they differ, since what is copied one to one weighs less in a deeper network.

    Args:
        ticket: Of single weights, found in the source.
        state: The source's rewound weights and buffers, not its trained ones.
        target: State dict of the freshly built target; only names and shapes count.
        stretch: See `unit_map`.
        squeeze: See `unit_map`.

    Raises:
        InputError: As `names_for`; or a mask is not one of weights of ``state``.
    """
    for name, mask in ticket.masks.items():
        weight = state.get(f"{name}.weight")
        if ticket.kinds[name] != "weight" or weight is None or weight.shape != mask.shape:
            found = "no weight" if weight is None else f"a weight of shape {tuple(weight.shape)}"
            raise InputError(
                f"the ticket has a mask of kind '{ticket.kinds[name]}' and shape {tuple(mask.shape)} for '{name}', "
                f"which has {found}",
                needed="a ticket over single weights, and the weights that it was found in",
            )
    names = names_for(state, target, stretch=stretch, squeeze=squeeze)
    masks = stretched_masks(ticket.masks, names)
    kept, total = (sum(counts) for counts in zip(*((int(mask.sum()), mask.numel()) for mask in masks.values())))
    provenance = {
        "method": "elastic",
        "stretch": stretch,
        "squeeze": squeeze,
        "map": {name: names[f"{name}.weight"].removesuffix(".weight") for name in masks},
        "source_keep": ticket.keep,
        "keep": kept / total,
        "source": dict(ticket.provenance),
    }
    return ticket_of(masks, **provenance), stretched_state(state, names)
