"""Dynamic sparse training: sparse from the first step on, and which weights those are changes as training goes on.

SET: Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity, Nature
Communications 2018, https://arxiv.org/abs/1707.04780. RigL: Evci et al., Rigging the Lottery, ICML 2020,
https://arxiv.org/abs/1911.11134 (code: google-research/rigl). Each layer begins with ``n`` random weights
(`earlybird.sparse.budget` says how many); every ``regrow_every`` steps ``k`` of them are exchanged, while ``t < T``,

    f(t) = alpha / 2 (1 + cos(pi t / T)),    k = f(t) n
    drop: the k active weights with the smallest |w|
    grow: k of all that are not active then, at random (SET), or where the gradient |dL/dw| is largest (RigL)

with ``alpha`` = ``drop_share`` and ``T`` = ``regrow_until``. What grows begins at zero, its optimizer state as well;
what was just dropped may grow back, and then keeps its value, as in the authors' code. ``n`` is the same at all times.

What it saves: nothing measured, see `earlybird.sparse.masks`. Counted bit-MACs and modelled joules, of training, too,
leave zeros out; the gradient of a whole layer, which RigL needs in a step in which it grows, is charged as such. It
does *not* pay where time is wanted, and in runs of few exchanges, in which it is a random mask that does not move.

Deviations:

- ``regrow_step``: published, RigL makes no optimizer step when it grows. Under ``PRESETS['published']`` no parameter
  has a gradient then, so that no optimizer moves it, by momentum or decay either. By default the weights that stay are
  trained on that batch as well, since short runs have no steps to give away;
- published, SET exchanges weights after the last step of an epoch; here before it, on the same batch (all exchanges
  come before the step in which they fall, when the gradients are there). ``PRESETS['set']`` has the rest: an exchange
  an epoch to the end, by sign, and always the same share;
- gradients that are clipped are, in steps in which RigL grows, clipped by the norm of the whole gradient.

Last checked 2026-12 on a CPU, torch 2.13.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from earlybird import ranks
from earlybird.blocks import patterns_from
from earlybird.calls import Hook, after_gradients, given_optimizers, unwrapped
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_for
from earlybird.settings import check_choice, check_number, check_share, option
from earlybird.sparse.budget import best, counts_for
from earlybird.sparse.masks import (
    Masks,
    left_dense,
    mask_generator,
    prunable,
    random_mask,
    ticket_of,
    with_zeros,
)
from earlybird.step import Step
from earlybird.stretches import Plan, Stretch
from earlybird.tickets.claim import claim
from earlybird.tickets.ticket import Ticket, packed, unpacked
from earlybird.traces import Trace

__all__ = ["DynamicSparse", "Regrowing", "drop_and_grow", "drop_fraction", "worth"]


@dataclass(frozen=True, kw_only=True)
class DynamicSparse:
    """Hyper-parameters of dynamic sparse training; `attach` starts it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    density: float = option(0.1, "Share of the weights that are not zero, from the first step on, in (0, 1].")
    regrow: Literal["rigl", "set"] = option("rigl", "Grow where the gradient is largest (rigl), or at random (set).")
    drop_share: float = option(
        0.3, "Share of the active weights that the first exchange drops, in [0, 1); 0: a random mask that never moves."
    )
    drop_by: Literal["magnitude", "sign"] = option(
        "magnitude", "Drop the smallest weights, or the same share of the positive and of the negative ones."
    )
    regrow_every: Step = option(Step.parse("100it"), "Between two exchanges.")
    regrow_until: Step = option(Step.parse("75%"), "Where exchanges end, so that what has grown is trained.")
    regrow_decay: Literal["cosine", "none"] = option("cosine", "How the share that is dropped falls to zero by then.")
    regrow_step: Literal["made", "left_out"] = option(
        "made", "Whether the optimizer steps, too, in a step in which rigl grows; published: left_out."
    )
    sparse_budget: Literal["erk", "uniform"] = option(
        "erk", "How the weights are shared out among layers; uniform leaves the first layer dense, as published."
    )
    sparse_leave: tuple[str, ...] = option((), "Layers that are left dense: names, or 'first' and 'last'.")
    rescale_init: bool = option(False, "Divide the first weights by the root of their layer's density.")

    KEEP_KEY: ClassVar[str] = "density"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "published": {"regrow_step": "left_out"},
        "set": {
            "regrow": "set", "drop_by": "sign", "regrow_every": "1ep", "regrow_until": "100%", "regrow_decay": "none",
        },
        "fast": {},
    }  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_share("density", self.density))
        check_number("drop_share", self.drop_share, lambda share: 0 <= share < 1, "a share of at least 0 and below 1")
        check_choice("regrow", self.regrow, ("rigl", "set"))
        check_choice("drop_by", self.drop_by, ("magnitude", "sign"))
        check_choice("regrow_decay", self.regrow_decay, ("cosine", "none"))
        check_choice("regrow_step", self.regrow_step, ("made", "left_out"))
        check_choice("sparse_budget", self.sparse_budget, ("erk", "uniform"))
        object.__setattr__(self, "regrow_every", Step.parse(self.regrow_every))
        object.__setattr__(self, "regrow_until", Step.parse(self.regrow_until))
        object.__setattr__(self, "sparse_leave", patterns_from("sparse_leave", self.sparse_leave))
        if not isinstance(self.rescale_init, bool):
            raise InputError(f"rescale_init is {self.rescale_init!r}", needed="true or false")

    def exchanges(self, total_steps: int | None, steps_per_epoch: int | None = None) -> tuple[int, int]:
        """Return how many steps lie between two exchanges, and before which step, from 1, they end.

        Raises:
            InputError: There would be none, or lengths are not known.
        """
        if not self.drop_share or self.density == 1:
            return 1, 0
        every = self.regrow_every.in_iterations(steps_per_epoch, total_steps)
        until = self.regrow_until.in_iterations(steps_per_epoch, total_steps)
        if not 1 <= every < until:
            raise InputError(
                f"regrow_every is {self.regrow_every} ({every} steps), and regrow_until {self.regrow_until} "
                f"({until} steps): nothing would ever regrow",
                needed="at least one step between exchanges, and one exchange before they end",
                hint="lower regrow_every, or set drop_share = 0 for a random mask that never moves",
            )
        return every, until

    def counts(self, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """Return how many of the weights of each layer are active, of those that are not left dense.

        Raises:
            InputError: ``sparse_leave`` names no layer, or leaves none.
        """
        dense = left_dense(weights, self.sparse_leave)
        if self.sparse_budget == "uniform":
            dense |= left_dense(weights, ("first",))
        shapes = {name: weight.shape for name, weight in weights.items() if name not in dense}
        if not shapes:
            raise InputError("no layer is left to be sparse", hint="name fewer layers, or set sparse_budget = 'erk'")
        return counts_for(shapes, self.density, self.sparse_budget)

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of a sparse run, those of whole gradients apart, for `earlybird.forecast`."""
        if self.density == 1:
            return stretches
        total = round(sum(stretch.steps for stretch in stretches))
        every, until = self.exchanges(total, round(plan.steps_per_epoch * total / plan.total_steps))
        found, begin = [], 0.0
        for stretch in stretches:
            weights = prunable(stretch.model)
            shares = {name: count / weights[name].numel() for name, count in self.counts(weights).items()}
            last = min(begin + stretch.steps, until - 1)
            whole = max(int(last // every) - int(begin // every), 0) if self.regrow == "rigl" else 0
            begin += stretch.steps
            found.append(replace(stretch, steps=stretch.steps - whole, model=with_zeros(stretch.model, shares)))
            if whole:
                growing = with_zeros(stretch.model, shares, gradients=1.0)
                found.append(replace(stretch, steps=float(whole), model=growing))
        return found

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        example_inputs: Any = None,
        ledger: Ledger | None = None,
        seed: int = 0,
    ) -> Regrowing:
        """Set all but a random share of the weights to zero, and exchange some of the others from time to time.

        To go on with a run: attach first, then load the method's state, then the weights.

        Args:
            model: The module that is trained, on the device where it will be; wrappers are seen through.
            optimizer: Over its parameters. ``step()`` of the first one is the clock, and when exchanges happen.
            total_steps: Of the run; needed where ``regrow_until`` is a share of it.
            steps_per_epoch: Needed where steps are given in epochs.
            example_inputs: A batch, to count the model's work on. Default: the first one of the training.
            ledger: Where to record; by default an own one, which `Regrowing.bill` reads.
            seed: Of the masks, and of what grows at random.

        Returns:
            The running method.

        Raises:
            InputError: The model has nothing to prune, another method decides which weights stay, nothing would ever
                regrow, or processes that train together have different seeds.
        """
        return Regrowing(self, model, optimizer, total_steps, steps_per_epoch, example_inputs, ledger, seed)


def drop_fraction(step: int, until: int, alpha: float, *, decay: str = "cosine") -> float:
    """Return the share of the active weights that an exchange at ``step`` drops: ``alpha`` at 0, 0 from ``until`` on.

    Args:
        step: Optimizer steps, from 0.
        until: The step by which it has fallen to 0.
        alpha: At the beginning, 0 to 1.
        decay: ``'cosine'``; ``'none'``: it stays until it ends.
    """
    if step >= until:
        return 0.0
    return alpha if decay == "none" else alpha / 2 * (1 + math.cos(math.pi * step / until))


def worth(weight: Tensor, mask: Tensor, by: str = "magnitude") -> Tensor:
    """Return by what active weights are ranked, the first to be dropped lowest; shaped as ``weight``.

    Args:
        weight: Any shape.
        mask: The active ones.
        by: ``'magnitude'``: their ``|w|``. ``'sign'``: the share of the weights of their sign that are no larger, so
            that as large a share of the positive as of the negative ones goes (Mocanu et al.); zero is worth nothing.
    """
    if by == "magnitude":
        return weight.detach().abs()
    found = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for sign in (1, -1):
        ours = mask & (sign * weight.detach() > 0)
        values = weight.detach()[ours].abs()
        order = values.argsort(descending=True, stable=True)
        rank = torch.empty(len(values), dtype=torch.float64, device=weight.device)
        rank[order] = torch.arange(len(values), dtype=torch.float64, device=weight.device)
        found[ours] = 1 - rank / max(len(values), 1)
    return found


def drop_and_grow(weight: Tensor, mask: Tensor, growth: Tensor, count: int, *, by: str = "magnitude") -> Tensor:
    """Return a mask with ``count`` active weights exchanged for others; as many are active as before.

    Args:
        weight: Any shape; only the active ones are looked at.
        mask: The active ones.
        growth: Where to grow: the gradient, or random numbers; the largest magnitudes of those that are not active
            any more, the dropped ones included. Ties go to the first position.
        count: 0 to the number of active weights.
        by: See `worth`.

    Raises:
        InputError: ``count`` is out of its range.
    """
    active = int(mask.sum())
    if not 0 <= count <= active:
        raise InputError(f"{count} weights to drop", needed=f"0 to {active}, which is how many are active")
    kept = best(worth(weight, mask, by).masked_fill(~mask, -math.inf), active - count)
    return kept | best(growth.detach().abs().masked_fill(kept, -math.inf), count)


class Regrowing:
    """Running dynamic sparse training, made by `DynamicSparse.attach`; all its state is in `state_dict`.

    Attributes:
        settings: The hyper-parameters.
        history: One entry an exchange: ``{'step', 'dropped', 'regrown', 'explored'}``, shares of the active weights
            that were dropped, of those that are others now, and of all weights that have ever been active.
    """

    def __init__(
        self,
        settings: DynamicSparse,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        total_steps: int | None,
        steps_per_epoch: int | None,
        example_inputs: Any,
        ledger: Ledger | None,
        seed: int,
    ) -> None:
        self.settings = settings
        self.history: list[dict[str, Any]] = []
        self._model = model = unwrapped(model)
        self._optimizers = given_optimizers(optimizer)
        self._every, self._until = settings.exchanges(total_steps, steps_per_epoch)
        weights = prunable(model)
        counts = {} if settings.density == 1 else settings.counts(weights)
        ranks.check_alike([("seed", f"= {seed}")], "attach with the same seed on all ranks")
        self._generator = mask_generator(seed)
        self._steps = 0
        self._due = False  # the step that comes exchanges weights
        self._free = claim(model, "dynamic_sparse")
        self._own_ledger = ledger is None
        self._ledger = ledger_for(model, self._optimizers, ledger, example_inputs)
        self._masks = Masks(model, self._optimizers, ledger=self._ledger)
        self._ever: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        if not counts:
            return
        masks = {name: random_mask(weights[name].shape, count, self._generator) for name, count in counts.items()}
        self._masks.set(ticket_of(masks))
        self._ever = self._masks.masks
        if settings.rescale_init:
            with torch.no_grad():
                for name, count in counts.items():
                    weights[name].mul_(math.sqrt(weights[name].numel() / count))
        clock = self._optimizers[0]
        before = clock.register_step_pre_hook(Hook(self._before_step, self))
        # first of all, whenever the others were attached: who rounds gradients, say, shall see those of the new masks
        cast("OrderedDict[int, Any]", clock._optimizer_step_pre_hooks).move_to_end(before.id, last=False)
        self._handles = [before, clock.register_step_post_hook(Hook(self._after_step, self))]
        self._look_ahead()

    @property
    def ticket(self) -> Ticket | None:
        """The weights that are active now; None where all are."""
        masks, settings = self._masks.masks, self.settings
        if not masks:
            return None
        return ticket_of(
            masks, method="dynamic_sparse", density=settings.density, regrow=settings.regrow, step=self._steps,
            drop_share=settings.drop_share, budget=settings.sparse_budget, exchanges=len(self.history),
        )  # fmt: skip

    @property
    def explored(self) -> float:
        """Share of the weights that have ever been active, 0 to 1."""
        if not self._ever:
            return 1.0
        return sum(int(ever.sum()) for ever in self._ever.values()) / sum(ever.numel() for ever in self._ever.values())

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return what a progress bar may show: the share of the weights that are active."""
        return {"weights": f"{self.settings.density:.1%}"} if self._ever else {}

    def traces(self) -> list[Trace]:
        """Return the exchanges, and how much of the network they have tried."""
        if not self._ever:
            return []
        series = {key: [(entry["step"], entry[key]) for entry in self.history] for key in ("dropped", "regrown")}
        seen = [(entry["step"], entry["explored"]) for entry in self.history]
        return [
            Trace(
                title="Weights exchanged", unit="share", series=series,
                note="Of the active weights: those dropped at an exchange, and those that are others after it.",
            ),
            Trace(
                title="Weights that were ever active", unit="share", series={"all layers": seen},
                note=f"Of all weights; {self.settings.density:.3g} are active at any time.", steps_hold=True,
            ),
        ]  # fmt: skip

    def files(self) -> dict[str, Ticket]:
        """Return what is worth keeping of the run, by file name: the ticket of its last step."""
        return {} if self.ticket is None else {"ticket.safetensors": self.ticket}

    def state_dict(self) -> dict[str, Any]:
        """Return the state: steps, masks, what was ever active, the random generator, and what the own ledger holds."""
        return {
            "steps": self._steps,
            "history": self.history,
            "masks": {name: packed(mask) for name, mask in self._masks.masks.items()},
            "ever": {name: packed(ever) for name, ever in self._ever.items()},
            "generator": self._generator.get_state(),
            "ledger": self._ledger.state_dict() if self._own_ledger else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; weights that are not active become zero.

        Raises:
            InputError: The state belongs to another model.
        """
        shapes = {name: list(ever.shape) for name, ever in self._ever.items()}
        if state["masks"].keys() != shapes.keys():
            raise InputError("the saved masks are of another model, or leave other layers dense")
        self._steps = int(state["steps"])
        self.history = list(state["history"])
        self._generator.set_state(state["generator"].cpu())
        if shapes:
            device = {name: ever.device for name, ever in self._ever.items()}
            self._masks.set(ticket_of({name: unpacked(state["masks"][name], shapes[name]) for name in shapes}))
            self._ever = {name: unpacked(state["ever"][name], shapes[name]).to(device[name]) for name in shapes}
            self._look_ahead()
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Take all hooks off model and optimizer; what is zero is trained like any other weight from here on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._masks.remove()
        self._free()
        if self._own_ledger:
            self._ledger.stop()

    def _look_ahead(self) -> None:
        """Say whether the step that comes exchanges weights, and if so by gradients, let them through."""
        step = self._steps + 1
        self._due = step % self._every == 0 and step < self._until
        self._masks.let_gradients_through(self._due and self.settings.regrow == "rigl")

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        return after_gradients(args, kwargs, self._on_gradients) if self._due else None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._steps += 1
        self._look_ahead()

    @torch.no_grad()
    def _on_gradients(self) -> None:
        """Exchange weights by the gradients of all batches of this step; they are masked after that."""
        if not self._due:  # the closure of this step has been called before
            return
        self._due = False
        settings = self.settings
        fraction = drop_fraction(self._steps + 1, self._until, settings.drop_share, decay=settings.regrow_decay)
        before = self._masks.masks
        after: dict[str, Tensor] = {}
        dropped = 0
        for name, weight in self._masks.weights.items():
            mask = before[name]
            active = int(mask.sum())
            count = round(fraction * active)
            # what is frozen stays as it is, and so does a layer that no sample of this step went through
            if not weight.requires_grad or (settings.regrow == "rigl" and weight.grad is None):
                continue
            growth = weight.grad if settings.regrow == "rigl" else self._random(weight)
            assert growth is not None
            after[name] = drop_and_grow(weight, mask, growth, count, by=settings.drop_by)
            dropped += count
        after = ranks.of_the_first({name: after.get(name, mask) for name, mask in before.items()})
        for name, weight in self._masks.weights.items():
            if weight.grad is not None:
                weight.grad.mul_(before[name] & after[name])  # what has grown is zero until it is computed with
        self._masks.move(after)
        self._masks.let_gradients_through(False)
        if settings.regrow == "rigl" and settings.regrow_step == "left_out":
            for optimizer in self._optimizers:  # which none of them moves
                optimizer.zero_grad(set_to_none=True)
        self._note(before, after, dropped)

    def _random(self, weight: Tensor) -> Tensor:
        """Return random numbers above 0, no two alike, shaped as ``weight``."""
        order = torch.randperm(weight.numel(), generator=self._generator).double() + 1
        return order.reshape(weight.shape).to(weight.device)

    def _note(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], dropped: int) -> None:
        active = sum(int(mask.sum()) for mask in after.values())
        grown = sum(int((mask & ~before[name]).sum()) for name, mask in after.items())
        for name, mask in after.items():
            self._ever[name] |= mask
        self.history.append(
            {
                "step": self._steps + 1,
                "dropped": dropped / active,
                "regrown": grown / active,
                "explored": self.explored,
            }
        )
