"""Iterative magnitude pruning: train, remove the smallest weights, rewind what is left, and train again.

Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019, https://arxiv.org/abs/1803.03635; rewinding to an early
step instead of the first: Frankle et al., arXiv 1903.01611 and 1912.05671; rewinding the learning rate alone, and
fine-tuning: Renda et al., https://arxiv.org/abs/2003.02389. One training takes ``T`` steps; after it, of the weights
that are left, the share ``p`` with the smallest ``|w|`` is removed (eq. 1: survivors only), and

    weights          w <- m * w_k,  go on at step k of the schedule, with an empty optimizer state
    learning_rate    w <- m * w_T,  go on at step k of the schedule
    fine_tuning      w <- m * w_T,  go on for T - k steps at the last learning rate

until the share ``keep_weights`` is left; so n rounds of pruning take ``T + n (T - k)`` steps, and the tickets on the
way, of the shares ``(1 - p)^i``, come with them.

What it saves: nothing in training. It is the most expensive of all ways to a ticket, and the bill says so: set against
one dense training, all rounds are added up. Counted bit-MACs and modelled joules leave zeros out
(`earlybird.sparse.masks`). What it is for: tickets of few weights, which others are measured by, and from which
structured ones can be made (`earlybird.tickets.structure`).

Deviations: the network's ``scope`` ranks the weights of all layers together, the head's included, unless
``leave_dense`` names them; published code differs in what it leaves out. A layer that would lose its last weight keeps
its largest one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from earlybird.blocks import patterns_from
from earlybird.calls import Hook, given_optimizers, unwrapped
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_for, ledgers_on
from earlybird.settings import check_choice, check_count, check_number, check_share, option
from earlybird.sparse.budget import largest, largest_by_layer
from earlybird.sparse.masks import Masks, prunable, ticket_of, with_zeros
from earlybird.start import head_of
from earlybird.step import Step
from earlybird.stretches import Plan, Stretch
from earlybird.tickets.claim import claim
from earlybird.tickets.ticket import Ticket, packed, unpacked

__all__ = ["Iterative", "Rounds", "prune", "shares"]


@dataclass(frozen=True, kw_only=True)
class Iterative:
    """Hyper-parameters of iterative magnitude pruning; `attach` starts it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    keep_weights: float = option(0.2, "Share of the prunable weights that stays in the end, in (0, 1].")
    prune_share: float = option(0.2, "Share of the weights that are left which a round removes, in (0, 1).")
    rewind: Literal["weights", "learning_rate", "fine_tuning"] = option(
        "weights", "What a round begins from: early weights, or the trained ones with the schedule rewound or ended."
    )
    rewind_to: Step = option(Step.parse("0it"), "The step of the first training to rewind to, such as '500it' or '3%'.")
    prune_scope: Literal["network", "layer"] = option(
        "network", "Rank all weights together, or remove the same share of each layer."
    )
    head_share: float | None = option(
        None, "With prune_scope 'layer': the share a round removes from the last layer; published for LeNet: half."
    )
    leave_dense: tuple[str, ...] = option((), "Layers that are not pruned: names, or 'first' and 'last'.")

    KEEP_KEY: ClassVar[str] = "keep_weights"
    KEEPS_ALL_ON_THE_WAY: ClassVar[bool] = True
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "published": {}, "fast": {}}

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_weights", check_share("keep_weights", self.keep_weights))
        for name in ("prune_share", "head_share"):
            value = getattr(self, name)
            if value is not None or name == "prune_share":
                check_number(name, value, lambda share: 0 < share < 1, "a share above 0 and below 1")
        check_choice("rewind", self.rewind, ("weights", "learning_rate", "fine_tuning"))
        check_choice("prune_scope", self.prune_scope, ("network", "layer"))
        object.__setattr__(self, "rewind_to", Step.parse(self.rewind_to))
        if self.head_share is not None and self.prune_scope != "layer":
            raise InputError("head_share is for prune_scope 'layer'", hint="set prune_scope = 'layer'")
        object.__setattr__(self, "leave_dense", patterns_from("leave_dense", self.leave_dense))

    @property
    def rounds(self) -> int:
        """Trainings after the first one, each begun by a pruning."""
        return len(shares(self.keep_weights, self.prune_share))

    def rewound_to(self, training: int, steps_per_epoch: int | None) -> int:
        """Return the step of a training of ``training`` steps from which the later rounds go on.

        Raises:
            InputError: It lies at the end of the training or behind it.
        """
        step = self.rewind_to.in_iterations(steps_per_epoch, training)
        if step >= training:
            raise InputError(
                f"rewind_to is {self.rewind_to}, but a training has {training} steps",
                needed="an earlier step",
                hint="rewind to a few per cent of the training, such as 3%",
            )
        return step

    def total_steps(self, training: int, steps_per_epoch: int | None = None) -> int:
        """Return the optimizer steps of all rounds, of one training's."""
        return training + self.rounds * (training - self.rewound_to(training, steps_per_epoch))

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of all rounds, for `earlybird.forecast`; a round keeps the same share of each layer."""
        first = self.rewound_to(round(sum(stretch.steps for stretch in stretches)), plan.steps_per_epoch)
        again = [
            replace(one, steps=steps)
            for one, begin in zip(stretches, accumulate((s.steps for s in stretches), initial=0.0))
            if (steps := min(one.steps, begin + one.steps - first)) > 0
        ]
        found = list(stretches)
        for left in shares(self.keep_weights, self.prune_share):
            for one in again:
                names = prunable(one.model, leave=self.leave_dense)
                found.append(replace(one, model=with_zeros(one.model, dict.fromkeys(names, left))))
        return found

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        total_steps: int,
        steps_per_epoch: int | None = None,
        example_inputs: Any = None,
        ledger: Ledger | None = None,
    ) -> Rounds:
        """Prune and rewind from now on, whenever a training is over.

        A round ends with the last optimizer step of its training, when the model can be evaluated; the next one begins
        with the next training batch. The loop goes on for ``total_steps``, and asks `Rounds.clock` where in the
        schedule of one training it is.

        Args:
            model: The module that is trained; wrappers are seen through.
            optimizer: Over its parameters. ``step()`` of the first one is the clock; the state of all is emptied when a
                round begins.
            total_steps: Optimizer steps of all rounds together: `Iterative.total_steps`.
            steps_per_epoch: Needed when ``rewind_to`` is given in epochs.
            example_inputs: A batch, to count the model's work on. Default: the first one of the training.
            ledger: Where to record; by default an own one, which `Rounds.bill` reads.

        Returns:
            The running method.

        Raises:
            InputError: The model has nothing to prune, another method draws a ticket, or there are fewer steps than
                rounds.
        """
        return Rounds(self, model, optimizer, total_steps, steps_per_epoch, example_inputs, ledger)


def shares(keep: float, share: float) -> list[float]:
    """Return the shares of the weights that are left after each round: ``(1 - share)^i``, and ``keep`` at the end."""
    found: list[float] = []
    left = 1.0
    while left > keep * (1 + 1e-9):
        left = max(left * (1 - share), keep)
        found.append(left)
    return found


def prune(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    left: float,
    *,
    scope: str = "network",
    head_left: float | None = None,
) -> dict[str, Tensor]:
    """Return masks without the smallest of the weights that are left.

    Args:
        weights: Trained, by layer name.
        masks: What is left, shaped as the weights.
        left: Share of all of them that is to stay, 0 to 1.
        scope: ``'network'`` ranks all together, ``'layer'`` each by itself.
        head_left: Share of the last one's that is to stay, by layer; default: as of the others.

    Returns:
        Masks in which every ``True`` was one before, and at least one a layer.
    """
    scores = {name: weights[name].detach().abs().float().masked_fill(~mask, -math.inf) for name, mask in masks.items()}
    if scope == "network":
        return largest(scores, max(round(left * sum(mask.numel() for mask in masks.values())), 1))
    shares_ = dict.fromkeys(masks, left)
    if head_left is not None:
        shares_[list(masks)[-1]] = head_left
    return largest_by_layer(scores, {name: round(shares_[name] * mask.numel()) for name, mask in masks.items()})


class Rounds:
    """Running iterative pruning, made by `Iterative.attach`; all its state is in `state_dict`.

    Attributes:
        settings: The hyper-parameters.
        training: Optimizer steps of one training.
        rewound: The step of it from which the later rounds go on.
        round: Prunings done.
        tickets: Those of the rounds, in their order.
        ticket: The last of them, or None.
        drawn_at: Optimizer step at which it was drawn, or None.
        history: One entry a pruning: ``{'step', 'epoch', 'keep', 'distances', 'kept'}``, as of an early-bird search.
        change: None: nothing is cut.
    """

    def __init__(
        self,
        settings: Iterative,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        total_steps: int,
        steps_per_epoch: int | None,
        example_inputs: Any,
        ledger: Ledger | None,
    ) -> None:
        self.settings = settings
        self._model = model = unwrapped(model)
        self._optimizers = given_optimizers(optimizer)
        self._steps_per_epoch = check_count("steps_per_epoch", steps_per_epoch, "len(loader)")
        total = check_count("total_steps", total_steps, "Iterative.total_steps(steps)", optional=False)
        assert total is not None
        self.training = _training_of(settings, total, steps_per_epoch)
        self.rewound = settings.rewound_to(self.training, steps_per_epoch)
        self._left = shares(settings.keep_weights, settings.prune_share)
        self._weights, self._head = prunable(model, leave=settings.leave_dense), head_of(model)
        self.round = 0
        self.tickets: list[Ticket] = []
        self.history: list[dict[str, Any]] = []
        self.change = None
        self._steps = 0
        self._start: dict[str, Tensor] | None = None  # weights and buffers to rewind to
        self._others: dict[str, Tensor] = {}  # the same of what the optimizers train beside the model
        self._free = claim(model, "iterative")
        self._own_ledger = ledger is None
        self._ledger = ledger_for(model, self._optimizers, ledger, example_inputs)
        if self._left:
            self._ledger.enter("search")
        self._masks = Masks(model, self._optimizers, ledger=self._ledger)
        self._handles: list[Any] = [
            # before the ledgers' own, which charge the batch to the phase that they are in
            model.register_forward_pre_hook(Hook(self._before_forward, self), prepend=True),
            self._optimizers[0].register_step_post_hook(Hook(self._after_step, self)),
        ]

    @property
    def ticket(self) -> Ticket | None:
        """The ticket of the last round, or None."""
        return self.tickets[-1] if self.tickets else None

    @property
    def drawn(self) -> bool:
        """Whether the last round's ticket has been drawn."""
        return self.round == len(self._left)

    @property
    def drawn_at(self) -> int | None:
        """Optimizer step at which the newest ticket was drawn, or None."""
        return self.history[-1]["step"] if self.history else None

    def clock(self, step: int | None = None) -> int:
        """Return where in the schedule of one training the step after ``step`` finished ones is; default: the next."""
        step = self._steps if step is None else step
        if step < self.training:
            return step
        if self.settings.rewind == "fine_tuning":
            return self.training - 1
        round_steps = self.training - self.rewound
        number = min((step - self.training) // round_steps, max(len(self._left) - 1, 0))
        return min(self.rewound + step - self.training - number * round_steps, self.training - 1)

    def bill(self) -> Any:
        """Return what was spent so far in all rounds, as a `Bill`; dense is one training."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return what a progress bar may show: the round, and the share of the weights that is left."""
        left = 1.0 if self.ticket is None else self.ticket.keep
        return {"round": f"{self.round + 1}/{len(self._left) + 1}", "weights": f"{left:.1%}"} if self._left else {}

    def row(self) -> dict[str, Any]:
        """Return what belongs in a row of results: the round, its share of weights, and whether it ends here."""
        if not self._left:
            return {}
        ends = self._steps == self._ends(self.round) or (self.drawn and self._steps > self._ends(self.round))
        return {"round": self.round, "density": 1.0 if self.ticket is None else self.ticket.keep, "round_ends": ends}

    def due(self) -> bool:
        """Whether a round has just ended: what is worth looking at before the next one begins."""
        return bool(self._left) and self._steps == self._ends(self.round)

    def distance_matrix(self) -> tuple[list[int], Tensor]:
        """Return the steps of the prunings, and the mask distances between all their tickets, 0 to 1."""
        matrix = torch.zeros(len(self.tickets), len(self.tickets))
        for i, one in enumerate(self.tickets):
            for j, other in enumerate(self.tickets):
                matrix[i, j] = one.distance(other)
        return [entry["step"] for entry in self.history], matrix

    def files(self) -> dict[str, Ticket | Mapping[str, Tensor]]:
        """Return what is worth keeping of the run, by file name: all tickets, and the weights they begin from."""
        found: dict[str, Ticket | Mapping[str, Tensor]] = {
            f"tickets/round-{number}.safetensors": ticket for number, ticket in enumerate(self.tickets, start=1)
        }
        if self.ticket is not None:
            found["ticket.safetensors"] = self.ticket
        if self._start is not None:
            found["rewind.safetensors"] = self._start
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state: steps, rounds, tickets, the weights to rewind to, and what the own ledger holds."""
        return {
            "steps": self._steps,
            "history": self.history,
            "tickets": [
                {name: packed(mask) for name, mask in ticket.masks.items()} for ticket in self.tickets
            ],
            "start": self._start or {},
            "others": self._others,
            "ledger": self._ledger.state_dict() if self._own_ledger else {},
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; weights that are removed become zero.

        Raises:
            InputError: The state belongs to another model.
        """
        shapes = {name: list(weight.shape) for name, weight in self._learning().items()}
        if any(masks.keys() != shapes.keys() for masks in state["tickets"]):
            raise InputError("the saved rounds are of another model, or leave other layers dense")
        self._steps = int(state["steps"])
        self.history = list(state["history"])
        self.tickets = [
            self._ticket({name: unpacked(mask, shapes[name]) for name, mask in masks.items()}, number)
            for number, masks in enumerate(state["tickets"], start=1)
        ]
        self.round = len(self.tickets)
        self._start = dict(state["start"]) or None
        self._others = dict(state["others"])
        if self.ticket is not None:
            self._masks.set(self.ticket)
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])
        self._ledger.enter("train" if self.drawn else "search")

    def detach(self) -> None:
        """Take all hooks off model and optimizer; what is zero is trained like any other weight from here on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._masks.remove()
        self._free()
        if self._own_ledger:
            self._ledger.stop()

    def _learning(self) -> dict[str, nn.Parameter]:
        """Return the weights to prune without those that are frozen, such as the head's in pre-training."""
        return {name: weight for name, weight in self._weights.items() if weight.requires_grad}

    def _ends(self, number: int) -> int:
        """Return the optimizer step after which a round is over, from 0."""
        return self.training + number * (self.training - self.rewound)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if self.settings.rewind == "weights" and self._left and self._start is None and self._steps == self.rewound:
            self._remember()  # by now all other methods are attached, too
        if self._steps >= self.training:
            for ledger in ledgers_on(self._model, self._ledger):
                ledger.end_dense()
        if not self.drawn and self._steps >= self._ends(self.round):
            self._next_round()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._steps += 1

    def _remember(self) -> None:
        self._start = {name: value.detach().clone() for name, value in self._model.state_dict().items()}
        self._others = {str(at): value.detach().clone() for at, value in enumerate(self._beside())}

    def _beside(self) -> list[Tensor]:
        """Return what the optimizers train that is not in the model, such as gates of other methods."""
        own = {id(parameter) for parameter in self._model.parameters()}
        held = [p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]]
        return [parameter for parameter in held if id(parameter) not in own]

    @torch.no_grad()
    def _next_round(self) -> None:
        """Prune what the training has left smallest, and put everything where the next training begins."""
        settings = self.settings
        with self._ledger.during("draw"):
            left = self._left[self.round]
            weights = self._learning()
            head = None
            if settings.head_share is not None and list(weights)[-1] == self._head:
                head = (1 - settings.head_share) ** (self.round + 1)
            before = self._masks.masks or {
                name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()
            }
            masks = prune(weights, before, left, scope=settings.prune_scope, head_left=head)
            ticket = self._ticket(masks, self.round + 1)
            distances = [ticket.distance(other) for other in self.tickets]
            epoch = None if self._steps_per_epoch is None else self._steps / self._steps_per_epoch
            kept = {name: found for name, (found, _) in ticket.widths.items()}
            self.history.append(
                {"step": self._steps, "epoch": epoch, "keep": left, "distances": distances, "kept": kept}
            )
            self._warn_of_thin_layers(ticket)
            self.tickets.append(ticket)
            self.round += 1
            if self._start is not None:
                for name, value in self._model.state_dict().items():
                    value.copy_(self._start[name])
                for value, start in zip(self._beside(), self._others.values(), strict=True):
                    value.copy_(start)
            for optimizer in self._optimizers:
                optimizer.state.clear()
            self._masks.set(ticket)
        self._ledger.enter("train" if self.drawn else "search")

    def _warn_of_thin_layers(self, ticket: Ticket) -> None:
        """Name layers that have fewer weights than outputs from this round on: some of these say nothing any more."""
        before = {} if self.ticket is None else self.ticket.widths
        for name, (kept, total) in ticket.widths.items():
            outputs = len(ticket.masks[name])
            if kept < outputs <= before.get(name, (total, total))[0]:
                warnings.warn(
                    f"round {len(self.tickets) + 1} leaves {kept} of {total} weights of layer '{name}', fewer than its "
                    f"{outputs} outputs; to prevent that, set prune_scope = 'layer' or leave_dense = '{name}'",
                    stacklevel=2,
                )

    def _ticket(self, masks: Mapping[str, Tensor], number: int) -> Ticket:
        settings = self.settings
        return ticket_of(
            masks, method="iterative", round=number, keep=self._left[number - 1], rewind=settings.rewind,
            rewind_to=self.rewound, training=self.training, scope=settings.prune_scope,
        )  # fmt: skip


def _training_of(settings: Iterative, total: int, steps_per_epoch: int | None) -> int:
    """Return the steps of one training of which all rounds take ``total``; what is left over goes to the last one."""
    low, high = 1, total
    while low < high:
        middle = (low + high + 1) // 2
        try:
            fits = settings.total_steps(middle, steps_per_epoch) <= total
        except InputError:  # too short to rewind in
            fits = True
        low, high = (middle, high) if fits else (low, middle - 1)
    try:
        return low if settings.total_steps(low, steps_per_epoch) <= total else _too_short(settings, total)
    except InputError:
        return _too_short(settings, total)


def _too_short(settings: Iterative, total: int) -> int:
    raise InputError(
        f"{total} steps for {settings.rounds + 1} trainings that are rewound to {settings.rewind_to}",
        needed="at least one step for each after that",
        hint="train longer, rewind to an earlier step, or keep more weights",
    )
