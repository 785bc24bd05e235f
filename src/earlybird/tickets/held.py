"""A ticket that is there before the first step: the model is cut or masked to it, and trained.

What tickets at initialisation (`earlybird.tickets.at_init`) and given ones (`earlybird.tickets.fixed`) have in common.
Over channels, the model and its optimizer are shrunk at once; over single weights, masks are held on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from earlybird import ranks
from earlybird.calls import Hook, first_sample, given_optimizers, unwrapped
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_for, ledgers_on
from earlybird.objective import check_may_cut
from earlybird.sharded import is_sharded
from earlybird.sparse.masks import Masks
from earlybird.tickets.claim import claim
from earlybird.tickets.layers import fitting_multiple, width
from earlybird.tickets.scores import hidden_layers
from earlybird.tickets.shrink import Change, shrink, with_rounded
from earlybird.tickets.ticket import Ticket

__all__ = ["HeldTicket"]


class HeldTicket:
    """A ticket that a model trains with from the first step on; all its state is in `state_dict`.

    Args:
        name: Of the method.
        settings: Its hyper-parameters.
        model: The module that is trained; wrappers are seen through.
        optimizer: Over its parameters.
        draw: Returns the ticket, for the model as it is, or None for the whole model; may change its weights. Not
            called when ``resumed``.
        example_inputs: What the model runs on; needed to cut channels.
        ledger: Where to record; by default an own one.
        round_to: Multiple that widths are rounded up to; None takes what suits the device.
        resumed: The ticket will come with `load_state_dict`.

    Attributes:
        settings: The hyper-parameters.
        ticket: What is trained, or None for the whole model.
        change: What was cut, or None.
        drawn: Whether the ticket is there.
        drawn_at: 0, or None without a ticket.
        history: One entry, as of an early-bird search.
    """

    def __init__(
        self,
        name: str,
        settings: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        draw: Callable[[nn.Module, Ledger], Ticket | None],
        *,
        example_inputs: Any,
        ledger: Ledger | None,
        round_to: int | None = None,
        resumed: bool = False,
    ) -> None:
        self.settings, self._name = settings, name
        self._model = model = unwrapped(model)
        if is_sharded(model):
            raise InputError(
                "parameters are sharded (fully_shard), and the ticket comes before the first step",
                hint=f"attach {name} first, then shard the model",
            )
        self._optimizers = given_optimizers(optimizer)
        self._example_inputs = example_inputs
        self.ticket: Ticket | None = None
        self.change: Change | None = None
        self._masks: Masks | None = None
        self._free = claim(model, name)
        self._own_ledger = ledger is None
        self._ledger = ledger_for(model, self._optimizers, ledger, example_inputs)
        # so that copies of the model and others can ask for it
        self._handle = model.register_forward_pre_hook(Hook(None, self))
        self.drawn = not resumed
        try:
            if not resumed:
                with self._ledger.during("draw"):
                    ticket = draw(model, self._ledger)
                    if ticket is not None:
                        ranks.check_alike(ranks.of_masks(ticket.masks), "all ranks need the same model, data and seed")
                        self._hold(ticket, round_to)
        except BaseException:
            self.detach()
            raise

    @property
    def drawn_at(self) -> int | None:
        """0, or None without a ticket."""
        return None if self.ticket is None else 0

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry for the ticket, if there is one."""
        if self.ticket is None:
            return []
        kept = {name: found for name, (found, _) in self.ticket.widths.items()}
        return [{"step": 0, "epoch": 0.0, "keep": self.ticket.keep, "distances": [], "kept": kept}]

    def distance_matrix(self) -> tuple[list[int], Tensor]:
        """Return the step of the ticket, and its distance to itself."""
        count = len(self.history)
        return [0] * count, torch.zeros(count, count)

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return what a progress bar may show: the share of channels or weights that is trained."""
        if self.ticket is None:
            return {}
        return {"channels" if self._masks is None else "weights": f"{self.ticket.keep:.1%}"}

    def files(self) -> dict[str, Ticket | Mapping[str, Tensor]]:
        """Return the ticket, by file name."""
        return {} if self.ticket is None else {"ticket.safetensors": self.ticket}

    def state_dict(self) -> dict[str, Any]:
        """Return the state: the ticket, and what the own ledger holds."""
        ticket = self.ticket
        return {
            "masks": {} if ticket is None else dict(ticket.masks),
            "kinds": {} if ticket is None else dict(ticket.kinds),
            "provenance": {} if ticket is None else dict(ticket.provenance),
            "ledger": self._ledger.state_dict() if self._own_ledger else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; a model that is whole is cut or masked first.

        Raises:
            InputError: The model was cut to another ticket, or the state is of another model.
        """
        ticket = Ticket(state["masks"], state["kinds"], state["provenance"]) if state["masks"] else None
        if self.drawn and ticket != self.ticket:
            raise InputError(
                f"the model holds another ticket than the saved {self._name}",
                hint="build the dense model, and attach with resumed=True before the state is loaded",
            )
        if not self.drawn and ticket is not None:
            self._hold(ticket, round_to=1)  # it has what rounding kept
        self.drawn = True
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Take all hooks off; what was cut stays cut, what is zero is trained like any other weight from here on."""
        self._handle.remove()
        self._free()
        if self._masks is not None:
            self._masks.remove()
        if self._own_ledger:
            self._ledger.stop()

    def _hold(self, ticket: Ticket, round_to: int | None) -> None:
        if ticket.over_weights:
            self._masks = Masks(self._model, self._optimizers, ticket, ledger=self._ledger)
            self.ticket = ticket
            return
        check_may_cut(self._model, self._name)
        if self._example_inputs is None:
            raise InputError("no inputs to follow the model's graph with", hint="pass example_inputs=x to attach")
        inputs = first_sample(self._example_inputs)
        if round_to is None:
            widest = max((width(layer) or 1 for layer in hidden_layers(self._model).values()), default=1)
            round_to = fitting_multiple(widest, next(self._model.parameters()).device)
        with ranks.all_or_none():
            self.change = shrink(self._model, ticket, inputs, optimizer=self._optimizers, round_to=round_to)
        self.ticket = with_rounded(ticket, self.change.rounded) if self.change.rounded else ticket
        for ledger in ledgers_on(self._model, self._ledger):
            ledger.recount(self._model, inputs)
