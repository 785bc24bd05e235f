"""EarlyBERT: learned coefficients rank heads and neurons in the first part of an epoch; then the small net trains.

Chen, Cheng, Gan, Liu, Wang: EarlyBERT: Efficient BERT Training via Early-bird Lottery Tickets, ACL 2021, arXiv
2101.00063; reference code github.com/VITA-Group/EarlyBERT. Each head's output and each neuron's activation is
multiplied by a coefficient c, 1 in the beginning, which is trained along with the weights:

    loss + head_sparsity * sum |c_heads| + neuron_sparsity * sum |c_neurons|

At ``draw_at`` the units with the largest c stay, heads ranked layer by layer, neurons over the network; the weights go
back to what they were before the search, and the small network is trained, with a larger rate and fewer steps (both are
the loop's matter, see docs/early-bert.md).

What it saves: seconds, MACs and bytes of every step after the draw, and of inference. It does *not* pay where
embeddings and classifier are most of the work, or where the full model, stopped after the same time, is as good.

The coefficients live outside of the model: a factor on a unit is a factor on the columns that read it, W_eff = c * W,
so they are multiplied into the weight, and dL/dc = <W_eff, dL/dW_eff> / c is taken from the gradient that the loop has
computed anyway. No hook runs in forward passes, gradients are unscaled, clipped and averaged over processes like all
others, and fused attention and torch.compile go on working. They have an Adam of their own, since the loop's optimizer
would decay them, and its schedulers would have to know of parameters that are there for a while.

Deviations: the columns' step in W is 1/c times the published one (Adam divides the factor c out); c does not fall below
`FLOOR`, where its gradient would be lost; ``coefficient_rate`` is constant instead of the loop's rate, which
``PRESETS['published']`` takes; ``round(keep * n)`` units stay (see `earlybird.draw_units`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from earlybird import data_parallel
from earlybird.calls import Call, Hook, first_sample, given_optimizers, hook_owners, unwrapped
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_of
from earlybird.objective import check_may_cut
from earlybird.settings import check_choice, check_count, check_number, check_share, option
from earlybird.sharded import is_sharded
from earlybird.step import Step
from earlybird.tickets.claim import check_unclaimed
from earlybird.tickets.draw import Scope, draw_units
from earlybird.tickets.search import Search
from earlybird.tickets.shrink import Change, cut_to_shape, describe, shrink
from earlybird.tickets.ticket import Ticket
from earlybird.tickets.units import find_units, first_order, inputs_of, read_weight, score_units

__all__ = ["EarlyBert", "UnitSearch"]

FLOOR = 1e-3
"""Of a coefficient."""
_BETAS, _EPS = (0.9, 0.999), 1e-8
SCORES = ("coefficient", "taylor", "magnitude", "random")


@dataclass(frozen=True, kw_only=True)
class EarlyBert:
    """Hyper-parameters of the search for heads and neurons; `attach` starts it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    keep_heads: float = option(2 / 3, "Share of the attention heads that stay, in (0, 1].")
    keep_neurons: float = option(0.6, "Share of the feed-forward neurons that stay, in (0, 1].")
    draw_at: Step = option(Step.parse("0.2ep"), "When the ticket is drawn, at the latest.")
    unit_score: Literal["coefficient", "taylor", "magnitude", "random"] = option(
        "coefficient", "What a unit is worth: learned, the mean first-order term, the size of its weights, or chance."
    )
    head_scope: Scope = option("layer", "Rank the heads of each 'layer' by themselves, or of the whole 'network'.")
    neuron_scope: Scope = option("network", "Rank the neurons of the whole 'network', or each 'layer' by itself.")
    head_sparsity: float = option(1e-4, "Factor of the L1 term on the coefficients of heads.")
    neuron_sparsity: float = option(1e-4, "Factor of the L1 term on the coefficients of neurons.")
    coefficient_rate: float | None = option(
        1e-3, "Learning rate of the coefficients; 'none' takes the optimizer's, which must then be an Adam's."
    )
    unit_look_every: Step = option(Step.parse("0.02ep"), "How often a mask is drawn and compared.")
    unit_window: int = option(5, "How many masks must agree, the newest included.")
    unit_tolerance: float | None = option(
        None,
        "Largest mask distance that counts as agreement, upon which the ticket is drawn; 'none' waits for draw_at.",
    )
    unit_weights: Literal["rewind", "continue"] = option(
        "rewind", "Begin again with the weights from before the search, or go on with those that it trained."
    )
    unit_optimizer_state: Literal["reset", "keep"] = option(
        "reset", "Let the optimizer begin with empty state, or go on with its state."
    )
    round_neurons_to: int = option(1, "Multiple that a layer's neurons are rounded up to.")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "published": {"coefficient_rate": None},
        "fast": {},
    }

    def __post_init__(self) -> None:
        for name in ("keep_heads", "keep_neurons"):
            object.__setattr__(self, name, check_share(name, getattr(self, name)))
        for name in ("draw_at", "unit_look_every"):
            object.__setattr__(self, name, Step.parse(getattr(self, name)))
            if getattr(self, name) == Step():
                raise InputError(f"{name} is zero", needed="a positive step such as '0.2ep' or '50it'")
        for name in ("coefficient_rate", "unit_tolerance"):
            if str(getattr(self, name)) == "none":
                object.__setattr__(self, name, None)
        for name, allowed in (
            ("unit_score", SCORES), ("head_scope", ("layer", "network")), ("neuron_scope", ("network", "layer")),
            ("unit_weights", ("rewind", "continue")), ("unit_optimizer_state", ("reset", "keep")),
        ):  # fmt: skip
            check_choice(name, getattr(self, name), allowed)
        for name, optional in (
            ("head_sparsity", False), ("neuron_sparsity", False), ("coefficient_rate", True), ("unit_tolerance", True),
        ):  # fmt: skip
            value = getattr(self, name)
            if not (optional and value is None):
                check_number(name, value, lambda number: 0 <= number < float("inf"), "a number of at least 0")
        for name, least in (("unit_window", 2), ("round_neurons_to", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}", needed=f"a whole number of at least {least}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> EarlyBert:
        """Return the preset called ``name`` (see ``PRESETS``), with ``changes`` on top."""
        if name not in cls.PRESETS:
            raise InputError(f"unknown preset '{name}'", needed=f"one of {', '.join(cls.PRESETS)}")
        return cls(**{**cls.PRESETS[name], **changes})

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        example_inputs: Any = None,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        ledger: Ledger | None = None,
        seed: int = 0,
    ) -> UnitSearch:
        """Start the search; from here on an ordinary training loop does the rest.

        Args:
            model: A transformer (see `earlybird.tickets.units.find_units`), with the weights to which it will go back;
                wrappers of torch.compile and DistributedDataParallel are seen through.
            optimizer: The optimizer over its parameters; the draw happens inside its ``step()``. Of several, all are
                sliced, and the first one keeps the clock.
            example_inputs: A tensor, tuple or dict the model runs on, on which the cut is proven; a batch of one is
                enough. Default: the training batch at hand.
            steps_per_epoch: Optimizer steps in an epoch; needed when a step is given in epochs.
            total_steps: Optimizer steps of the whole training; needed when a step is a share of it ('10%').
            ledger: Where to record; by default an own one, which `UnitSearch.bill` reads.
            seed: For ``unit_score='random'``.

        Returns:
            The running search.

        Raises:
            InputError: The model has no heads and neurons, those are frozen or searched already, or no optimizer was
                given.
        """
        return UnitSearch(self, model, optimizer, example_inputs, steps_per_epoch, total_steps, ledger, seed)

    def cut(
        self,
        model: nn.Module,
        state: Mapping[str, Any],
        *,
        example_inputs: Any = None,
        averaged: Iterable[nn.Module] = (),
    ) -> None:
        """Shrink a dense ``model`` to the ticket of a saved search, without an optimizer.

        For loops that load weights before there is one: cut, load the weights, make the optimizer, `attach`, and let
        `UnitSearch.load_state_dict` take over the state. What is shrunk already, and a search that has not drawn,
        change nothing.

        Args:
            model: The module that is trained.
            state: What `UnitSearch.state_dict` returned.
            example_inputs: Not needed: the cut was proven when the ticket was drawn.
            averaged: Copies of the model that hold moving averages of its weights.

        Raises:
            InputError: The state belongs to another model, or is from before the draw and the model is shrunk.
        """
        for one in (model, *averaged):
            one = unwrapped(one)
            if _is_to_be_cut(one, state):
                ticket = _saved_ticket(state)
                cut_to_shape(one, ticket)
                describe(one, ticket)


class UnitSearch:
    """A running search for heads and neurons, made by `EarlyBert.attach`; all its state is in `state_dict`.

    Attributes:
        settings: The hyper-parameters.
        drawn: Whether the ticket has been drawn and the model shrunk.
        ticket: The drawn ticket, or None.
        change: What the shrink changed, or None; also None where `EarlyBert.cut` has shrunk the model before.
        drawn_at: Optimizer step after which the ticket was drawn, or None.
        history: One entry a look: ``{'step', 'epoch', 'keep', 'distances', 'kept'}``; ``distances`` are those of the
            newest mask to the others in the window, 0 to 1.
    """

    def __init__(
        self,
        settings: EarlyBert,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        example_inputs: Any,
        steps_per_epoch: int | None,
        total_steps: int | None,
        ledger: Ledger | None,
        seed: int,
    ) -> None:
        self.settings = settings
        self.ticket: Ticket | None = None
        self.change: Change | None = None
        self.drawn_at: int | None = None
        self.history: list[dict[str, Any]] = []
        self._wrapper = data_parallel.wrapper_of(model)  # of several processes, as far as it is known
        self._model = model = unwrapped(model)
        self._optimizers = given_optimizers(optimizer)
        if is_sharded(model):
            raise InputError(
                "fully_shard keeps the rows of a weight on different ranks, and coefficients are learned from all",
                hint="use DistributedDataParallel, or eb.draw_units and eb.shrink",
            )
        check_unclaimed(model, "early_bert")
        check_may_cut(model, "early_bert")
        others: list[Search | UnitSearch] = [*hook_owners(model, Search), *hook_owners(model, UnitSearch)]
        if not all(search.drawn for search in others):
            raise InputError("a search is attached to this model already", hint="call its detach() first")
        self._example_inputs, self._seed = example_inputs, seed
        self._steps_per_epoch = check_count("steps_per_epoch", steps_per_epoch, "len(loader)")
        check_count("total_steps", total_steps, "epochs * len(loader)")
        self._draw_at = max(settings.draw_at.in_iterations(steps_per_epoch, total_steps), 1)
        self._look_every = max(settings.unit_look_every.in_iterations(steps_per_epoch, total_steps), 1)
        self._steps = 0
        self._looked_at: list[int] = []
        self._masks: list[Tensor] = []
        self._last_call: Call | None = None
        score_units(model, "magnitude")  # a model without units, or with weights that cannot be ranked, is refused here
        shares = {"head": settings.keep_heads, "neuron": settings.keep_neurons}
        self._units = {name: units for name, units in find_units(model).items() if shares[units.kind] < 1}
        self._sizes = {name: units.count for name, units in self._units.items()}
        self._check_trainable()
        device = next(model.parameters()).device
        self._coefficients = torch.ones(sum(self._sizes.values()), device=device)  # of all units, in order
        self._moments = torch.zeros(2, len(self._coefficients), device=device)
        self._taylor = torch.zeros_like(self._coefficients)
        self._gradient: Tensor | None = None
        sparsity = {"head": settings.head_sparsity, "neuron": settings.neuron_sparsity}
        each = [sparsity[units.kind] for units in self._units.values() for _ in range(units.count)]
        self._sparsity = torch.tensor(each, device=device, dtype=torch.float32)
        rewind = settings.unit_weights == "rewind"
        self._before = {name: value.detach().clone() for name, value in _everything(model).items()} if rewind else {}
        self._own_ledger = ledger is None
        self._ledger = ledger_of(model) if ledger is None else ledger
        if self._own_ledger:
            self._ledger.watch(model, self._optimizers, example_inputs)
        self._ledger.enter("search")
        clock = self._optimizers[0]
        self._handles: list[Any] = [
            clock.register_step_pre_hook(Hook(self._before_step, self)),
            clock.register_step_post_hook(Hook(self._after_step, self)),
            model.register_forward_pre_hook(Hook(self._remember_call, self), with_kwargs=True),
        ]

    def _check_trainable(self) -> None:
        if self.settings.unit_score not in ("coefficient", "taylor"):
            return
        for units in self._units.values():
            if not read_weight(units, self._model)[0].requires_grad:
                raise InputError(
                    f"layer '{units.reads}' is frozen, so what it reads cannot be scored by its gradient",
                    hint="use unit_score='magnitude'",
                )

    @property
    def drawn(self) -> bool:
        """Whether the ticket has been drawn and the model shrunk."""
        return self.ticket is not None

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """The coefficients as they are: name to float32 ``(units,)``; those at the draw, once it was made."""
        return self._by_name(self._coefficients.clone())

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return what a progress bar may show: the last look's largest mask distance, or that the ticket is drawn."""
        if self.drawn:
            return {"ticket": f"drawn at step {self.drawn_at}"}
        distances: list[float] = self.history[-1]["distances"] if self.history else []
        return {"distance": max(distances)} if distances else {}

    def distance_matrix(self) -> tuple[list[int], Tensor]:
        """Return the distances of all looks to all looks: steps, and a matrix of shape (looks, looks), 0 to 1."""
        if not self._masks:
            return [], torch.zeros(0, 0)
        stacked = torch.stack(self._masks).float()
        return list(self._looked_at), torch.cdist(stacked, stacked, p=1) / stacked.shape[1]

    def detach(self) -> None:
        """Take all hooks off model and optimizer and stop the own ledger's clock; the run goes on as it is."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._own_ledger:
            self._ledger.stop()

    def __repr__(self) -> str:
        state = f"drawn at step {self.drawn_at}: {self.ticket}" if self.drawn else f"searching, step {self._steps}"
        return f"UnitSearch({state}, {len(self.history)} looks)"

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors, numbers, strings and lists."""
        return {
            "steps": self._steps,
            "drawn_at": self.drawn_at,
            "sizes": dict(self._sizes),
            "history": [dict(entry) for entry in self.history],
            "looked_at": list(self._looked_at),
            "masks": torch.stack(self._masks) if self._masks else torch.zeros(0, 0),
            "coefficients": self._coefficients.clone(),
            "moments": self._moments.clone(),
            "taylor": self._taylor.clone(),
            "before": {name: value.clone() for name, value in self._before.items()},
            "ledger": self._ledger.state_dict() if self._own_ledger else {},
            "ticket": {} if self.ticket is None else {
                "masks": dict(self.ticket.masks), "kinds": dict(self.ticket.kinds),
                "provenance": dict(self.ticket.provenance),
            },
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state. When its ticket was drawn, a model and optimizer still dense are shrunk to it.

        Load the weights and the optimizer's state after this, into the shapes that it leaves. Where weights are loaded
        before there is an optimizer, let `EarlyBert.cut` shrink the model before; it is left as it is then.

        Raises:
            InputError: The state belongs to another model, or to a search that rewinds where this one does not, or is
                from before the draw and the model is shrunk already.
        """
        dense = _is_to_be_cut(self._model, state)
        if not state["ticket"] and set(state["before"]) != set(self._before):
            raise InputError(
                f"the saved search {'rewinds' if state['before'] else 'continues'}",
                needed=f"unit_weights='{'rewind' if state['before'] else 'continue'}'",
            )
        self._steps = int(state["steps"])
        self.history = [dict(entry) for entry in state["history"]]
        self._looked_at = [int(step) for step in state["looked_at"]]
        self._masks = list(state["masks"].bool())
        self._sizes = {name: int(size) for name, size in state["sizes"].items()}
        device = self._coefficients.device
        self._coefficients, self._moments, self._taylor = (
            state[key].to(device, copy=True) for key in ("coefficients", "moments", "taylor")
        )
        for name, value in self._before.items() if not state["ticket"] else ():
            value.copy_(state["before"][name])
        if state["ticket"] and not self.drawn:
            self.drawn_at = int(state["drawn_at"])
            self._finish(_saved_ticket(state), dense=dense)
            if self._ledger.phase == "search":
                self._ledger.enter("train")
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def _by_name(self, values: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._sizes, values.split(list(self._sizes.values()))))

    def _remember_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and not self.drawn:
            self._last_call = Call(args, kwargs)
            self._wrapper = data_parallel.active_wrapper() or self._wrapper

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.drawn and not _has_closure(args, kwargs):  # of a closure, the gradients come inside the step
            self._read_gradients(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.drawn:
            return
        if _has_closure(args, kwargs):
            self._read_gradients(optimizer)
        self._steps += 1
        if self._gradient is not None:
            self._learn(optimizer.param_groups[0]["lr"])
        if self._steps % self._look_every == 0 or self._steps >= self._draw_at:
            self._look()

    def _read_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients of the coefficients from those of the weights; none, where one is missing or infinite."""
        self._gradient = None
        if not self._units or self.settings.unit_score not in ("coefficient", "taylor"):
            return
        found = [first_order(units, self._model) for units in self._units.values()]
        if any(gradient is None for gradient in found):
            return
        gradient = torch.cat([value.to(self._coefficients.device) for value in found if value is not None])
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer under GradScaler unscales in its own kernel
        gradient = gradient / (self._coefficients if scale is None else self._coefficients * scale.to(gradient.device))
        if bool(torch.isfinite(gradient).all()):
            self._gradient = gradient

    @torch.no_grad()
    def _learn(self, rate: float) -> None:
        """Move the running score, or the coefficients, and multiply what they have changed by into the weights."""
        gradient, self._gradient = self._gradient, None
        assert gradient is not None
        if self.settings.unit_score == "taylor":
            self._taylor += gradient.abs()
            return
        before = self._coefficients.clone()
        gradient = gradient + self._sparsity * before.sign()
        first, second = self._moments
        first.lerp_(gradient, 1 - _BETAS[0])
        second.lerp_(gradient.square(), 1 - _BETAS[1])
        mean, square = first / (1 - _BETAS[0] ** self._steps), second / (1 - _BETAS[1] ** self._steps)
        own = self.settings.coefficient_rate
        self._coefficients -= (rate if own is None else own) * mean / (square.sqrt() + _EPS)
        self._coefficients.clamp_(min=FLOOR)
        for name, factor in self._by_name(self._coefficients / before).items():
            weight, dim = read_weight(self._units[name], self._model)
            columns = inputs_of(self._units[name], factor, self._model).to(weight.device, weight.dtype)
            weight.mul_(columns.view([-1 if at == dim else 1 for at in range(weight.dim())]))

    def _scores(self) -> dict[str, Tensor]:
        score = self.settings.unit_score
        if not self._units:  # all stay
            return {}
        if score == "coefficient":
            return self._by_name(self._coefficients)
        if score == "taylor":
            sums = self._by_name(self._taylor)
            return {name: value / value.norm().clamp_min(1e-30) for name, value in sums.items()}
        found = score_units(self._model, score, torch.Generator().manual_seed(self._seed))
        return {name: found[name] for name in self._units}

    def _look(self) -> None:
        """Draw a mask and compare it with the last ones; draw the ticket when they agree, or it is time."""
        settings, scores = self.settings, self._scores()
        if scores and len(torch.cat(list(scores.values())).unique()) == 1:
            raise InputError(
                "all heads and neurons have the same score: there is nothing to choose by",
                hint="step after backward and before zero_grad, or use unit_score='magnitude'",
            )
        ticket = draw_units(
            self._model, keep_heads=settings.keep_heads, keep_neurons=settings.keep_neurons, scores=scores or None,
            head_scope=settings.head_scope, neuron_scope=settings.neuron_scope, round_to=settings.round_neurons_to,
        )  # fmt: skip
        flat = torch.cat(list(ticket.masks.values()))
        queue = self._masks[-(settings.unit_window - 1) :]
        distances = [float((flat ^ other).float().mean()) for other in queue]
        self._masks.append(flat)
        self._looked_at.append(self._steps)
        epoch = self._steps / self._steps_per_epoch if self._steps_per_epoch else None
        kept = int(flat.sum())
        self.history.append(
            {"step": self._steps, "epoch": epoch, "keep": kept / len(flat), "distances": distances, "kept": kept}
        )
        full = len(distances) == settings.unit_window - 1
        agree = settings.unit_tolerance is not None and full and max(distances) <= settings.unit_tolerance
        if agree or self._steps >= self._draw_at:
            self._draw(ticket, "agreement" if agree else "draw_at")

    def _draw(self, ticket: Ticket, reason: str) -> None:
        """Shrink model and optimizer to the ticket; before, let the weights be what they were before the search."""
        settings = {f.name: getattr(self.settings, f.name) for f in fields(self.settings)}
        provenance = {
            "method": "early_bert", "step": self._steps, "reason": reason,
            "settings": {key: str(value) if isinstance(value, Step) else value for key, value in settings.items()},
        }  # fmt: skip
        with self._ledger.during("draw"):
            rewound = _everything(self._model) if self._before else {}
            trained = {name: value.detach().clone() for name, value in rewound.items()}
            try:
                _restore(self._model, self._before)
                self._finish(Ticket(ticket.masks, ticket.kinds, provenance))
            except BaseException:
                _restore(self._model, trained)  # what cannot be cut is left as it was trained
                raise
            self.drawn_at = self._steps
            if self.settings.unit_optimizer_state == "reset":
                for optimizer in self._optimizers:
                    optimizer.state.clear()
        self._ledger.enter("train")

    def _finish(self, ticket: Ticket, *, dense: bool = True) -> None:
        inputs = first_sample(self._last_call if self._example_inputs is None else self._example_inputs)
        if dense and inputs is None:
            raise InputError("no inputs to prove the cut with", hint="pass example_inputs=x to attach")
        if dense:
            self.change = shrink(self._wrapper or self._model, ticket, inputs, optimizer=self._optimizers)
        self.ticket = ticket
        self._wrapper = None  # it may be replaced by another; nobody should keep it
        self._before = {}
        self._last_call = None
        for ledger in {self._ledger, *hook_owners(self._model, Ledger)}:
            ledger.recount(self._model, inputs)


def _is_to_be_cut(model: nn.Module, state: Mapping[str, Any]) -> bool:
    """Tell whether ``model`` is what the search began with, and not what its ticket has left of it."""
    counts = {name: units.count for name, units in find_units(model).items() if name in state["sizes"]}
    if counts == {name: int(size) for name, size in state["sizes"].items()}:
        return bool(state["ticket"])
    if not state["ticket"] or counts != {name: kept for name, (kept, _) in _saved_ticket(state).widths.items()}:
        raise InputError(
            "the saved search belongs to another model",
            needed="the model it was drawn from" + (", or what its ticket left of it" if state["ticket"] else ""),
        )
    return False


def _saved_ticket(state: Mapping[str, Any]) -> Ticket:
    saved = state["ticket"]
    masks = {name: mask.bool() for name, mask in saved["masks"].items()}
    return Ticket(masks, saved["kinds"], saved["provenance"])


def _everything(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _restore(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in _everything(model).items() if values else ():
        tensor.copy_(values[name])


def _has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("closure") is not None or any(callable(arg) for arg in args[1:])
