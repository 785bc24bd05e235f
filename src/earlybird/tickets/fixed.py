"""A given ticket is trained, from its own first weights or from others, or one of the controls that it has to beat.

Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019, https://arxiv.org/abs/1803.03635, train what pruning has
left from the weights it began with; whoever finds, stretches, refills or transfers a ticket does the same with it.
Controls (Su et al., Sanity-Checking Pruning Methods: Random Tickets can Win the Jackpot, NeurIPS 2020,
https://arxiv.org/abs/2009.11094; Frankle et al., Pruning Neural Networks at Initialization, arXiv 2009.08576):

    shuffled     the units of each layer change places: as many stay in each layer, but others
    random       as many stay in the network, the same share of each layer
    reversed     what the ticket removes stays, and the other way round
    fixed_weights = reinitialise    the ticket's own units, with weights drawn anew from the same distribution

What it saves: the search. A ticket over channels is cut out before the first step, so that all of training is that of
the small network; one over single weights saves nothing in seconds (`earlybird.sparse.masks`). It does *not* pay to
train a ticket that another task has found where that task's units are of no use: the controls say whether they are.

Deviations: a control over channels keeps channels that are written together together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from earlybird.errors import InputError
from earlybird.ledger import Ledger
from earlybird.settings import check_choice, option
from earlybird.sparse.budget import uniform
from earlybird.sparse.masks import check_fits, mask_generator, random_mask, with_zeros
from earlybird.start import head_of, load_start
from earlybird.stretches import Plan, Stretch
from earlybird.tickets.coupling import find_groups
from earlybird.tickets.draw import shuffle
from earlybird.tickets.held import HeldTicket
from earlybird.tickets.shrink import shrink
from earlybird.tickets.ticket import Ticket

__all__ = ["CONTROLS", "FixedTicket", "control_of"]

CONTROLS = ("none", "shuffled", "random", "reversed")


@dataclass(frozen=True, kw_only=True)
class FixedTicket:
    """A ticket to train, and what to train it from; `attach` cuts or masks the model to it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    ticket: str | None = option(None, "Ticket file, or the folder of a run that has drawn one.", path=True)
    fixed_weights: Literal["start", "reinitialise"] = option(
        "start",
        "Begin from the weights that the model has (see start), or from others of that distribution in their place.",
    )
    control: Literal["none", "shuffled", "random", "reversed"] = option(
        "none",
        "Train a control in the ticket's place: its units shuffled in each layer, at random, or what it removes.",
    )

    DECIDES: ClassVar[bool] = True  # which units stay, without a share that could be chosen
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "published": {}, "fast": {}}

    def __post_init__(self) -> None:
        check_choice("fixed_weights", self.fixed_weights, ("start", "reinitialise"))
        check_choice("control", self.control, CONTROLS)
        object.__setattr__(self, "ticket", None if self.ticket in (None, "none") else str(self.ticket))

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of a run of the ticket's network, for `earlybird.forecast`.

        Raises:
            InputError: The ticket is not one of the model.
        """
        if self.ticket is None:
            return stretches
        ticket = Ticket.load(_ticket_file(Path(self.ticket)))
        small: dict[int, nn.Module] = {}
        for model in (stretch.model for stretch in stretches):
            if id(model) not in small:
                _check_layers(ticket, model)
                if ticket.over_weights:
                    shares = {name: kept / total for name, (kept, total) in ticket.widths.items()}
                    small[id(model)] = with_zeros(model, shares)
                else:
                    small[id(model)] = copy.deepcopy(model)
                    shrink(small[id(model)], ticket, plan.images())
        return [replace(stretch, model=small[id(stretch.model)]) for stretch in stretches]

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        example_inputs: Any = None,
        fresh: Callable[[], nn.Module] | None = None,
        ledger: Ledger | None = None,
        seed: int = 0,
        fresh_head: bool = False,
        resumed: bool = False,
    ) -> HeldTicket:
        """Cut or mask the model to the ticket, before the first step.

        Args:
            model: The dense module that is trained, with the weights to begin from; wrappers are seen through.
            optimizer: Over its parameters.
            example_inputs: A batch that the model runs on; needed for tickets over channels.
            fresh: Builds the model with other weights, for ``fixed_weights='reinitialise'``.
            ledger: Where to record; by default an own one, which `HeldTicket.bill` reads.
            seed: Of the controls.
            fresh_head: The last layer is another than the ticket's, for other classes, and stays dense.
            resumed: Read nothing: the ticket comes with ``load_state_dict``.

        Returns:
            The running method. Without ``ticket``, the whole model is trained.

        Raises:
            InputError: A file is missing or damaged, or does not fit the model, or another method draws a ticket.
        """

        def prepared(model: nn.Module, ledger: Ledger) -> Ticket | None:
            ticket = None if self.ticket is None else Ticket.load(_ticket_file(Path(self.ticket)))
            if ticket is not None:
                if fresh_head:
                    ticket = ticket.without(head_of(model))
                _check_layers(ticket, model)
                ticket = control_of(ticket, model, self.control, seed, example_inputs)
            if self.fixed_weights == "reinitialise":
                if fresh is None:
                    raise InputError(
                        "fixed_weights 'reinitialise' needs new weights",
                        hint="pass fresh, a function that builds the model anew",
                    )
                load_start(model, fresh().state_dict())
            return ticket

        return HeldTicket(
            "fixed_ticket", self, model, optimizer, prepared, example_inputs=example_inputs, ledger=ledger, round_to=1,
            resumed=resumed,
        )  # fmt: skip


def control_of(ticket: Ticket, model: nn.Module, control: str, seed: int = 0, example_inputs: Any = None) -> Ticket:
    """Return the control of a ticket: one of `CONTROLS`; see the module.

    Args:
        ticket: Over channels or single weights.
        model: Dense.
        control: ``'none'`` returns the ticket itself.
        seed: Of the random choices.
        example_inputs: Needed for channels.

    Raises:
        InputError: The reverse of the ticket would leave nothing of a layer, or channels have no such control.
    """
    check_choice("control", control, CONTROLS)
    if control == "none":
        return ticket
    others = set(ticket.kinds.values()) - {"channel", "weight"}
    if others:
        raise InputError(f"no control of units of kind '{min(others)}'", needed="a ticket over channels or weights")
    generator = mask_generator(seed)
    masks: Mapping[str, Tensor] = ticket.masks
    about = {**ticket.provenance, "control": control, "control_seed": seed}
    if control == "reversed":
        masks = {name: ~mask for name, mask in masks.items()}
        empty = [name for name, mask in masks.items() if not mask.any()]
        if empty:
            raise InputError(
                f"the ticket keeps all of layer '{empty[0]}', so that its reverse would keep nothing",
                hint="take a ticket that removes a part of every layer, or another control",
            )
    elif ticket.over_weights:
        kept = {name: found for name, (found, _) in ticket.widths.items()}
        if control == "random":
            kept = uniform({name: mask.shape for name, mask in masks.items()}, ticket.keep)
        masks = {name: random_mask(mask.shape, kept[name], generator) for name, mask in masks.items()}
    elif control == "random":
        raise InputError(
            "control 'random' is for single weights: channels at random in each layer are control 'shuffled'",
            hint="for the same share of each layer: method at_init with init_score 'random'",
        )
    else:
        masks = shuffle(masks, find_groups(model, example_inputs), generator)[0]
    return Ticket(masks, ticket.kinds, about)


def _check_layers(ticket: Ticket, model: nn.Module) -> None:
    if ticket.over_weights:
        check_fits(ticket, model)
    empty = [name for name, (kept, _) in ticket.widths.items() if not kept]
    if empty:
        raise InputError(
            f"the ticket keeps nothing of layer '{empty[0]}', so that no signal passes it",
            needed="at least one unit of each layer",
        )


def _ticket_file(path: Path) -> Path:
    """Return the ticket of a run's folder, or the file itself."""
    if not path.is_dir():
        return path
    found = path / "ticket.safetensors"
    if not found.is_file():
        raise InputError(f"{path} has no ticket", needed="a finished run that has drawn one", hint="or name the file")
    return found
