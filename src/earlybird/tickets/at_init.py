"""Pruning at initialisation: tickets that are drawn before the first step of training.

The published methods give each weight ``w`` a score ``s``; a channel's score is the sum over its filter. Larger stays.

- ``snip``: ``s = |g w|`` with ``g = dL/dw``, on one batch (Lee et al., arXiv 1810.02340, eq. 6).
- ``grasp``: ``s = w (H g)``, the change of the gradient flow ``g' g`` when the weight goes, with ``g`` and the Hessian
  ``H`` at logits divided by a temperature (Wang et al., arXiv 2002.07376, eq. 8; reference code
  github.com/alecwangcq/GraSP). Their ``S = -s`` is what is removed first.
- ``synflow``: ``s = |w dR/dw|`` with ``R`` the sum of the outputs for an input of ones after all weights have been
  replaced by their absolute values; without data, in 100 rounds, since a single one would empty whole layers
  (Tanaka et al., arXiv 2006.05467, algorithm 1; reference code github.com/ganguli-lab/Synaptic-Flow).
- ``random``: the control experiment.

`AtInit` is the method; the scores can be had by themselves. Those of channels fit `earlybird.draw` as ``scores=`` and
are keyed as ``magnitude`` is: by convolution and linear layer, without the last one. All are pure: weights, gradients,
buffers, modes and the global random generators stay as they are.

    groups = find_groups(model, images[:1])
    scores = snip(model, images, labels)
    keep = keep_for_macs(scores, groups, 0.5, coupled="group")
    ticket = eb.draw(model, keep, scores=scores, example_inputs=images[:1], coupled="group")

They save the search: over channels, every step of training is one of the small network; their own cost is that of a
few training steps. Over single weights, as published, nothing is saved in seconds (`earlybird.sparse.masks`). They do
*not* pay where the untrained weights say little about a unit: accuracy is what an early ticket's is measured against.

Deviations: channels are the default instead of single weights; SNIP's scores are not divided by their sum, which no
ranking sees, and batch norm uses the batch's statistics, where its code takes the running ones of the untrained
network; GraSP takes its samples as one batch, where the code halves it to save memory, and leaves the last layer as it
is, where the code draws it anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from earlybird import ranks
from earlybird.blocks import patterns_from
from earlybird.calls import Call, as_call, first_sample, tensors_in, undisturbed, unwrapped
from earlybird.data.loader import pick_samples
from earlybird.errors import InputError
from earlybird.ledger import Ledger
from earlybird.settings import check_choice, check_count, check_share, option
from earlybird.sparse.budget import BUDGETS, counts_for, largest, largest_by_layer
from earlybird.sparse.masks import mask_generator, prunable, ticket_of, with_zeros
from earlybird.stretches import Plan, Stretch
from earlybird.tickets.coupling import Group, find_groups
from earlybird.tickets.draw import Coupled, Scope, draw, draw_coupled, group_masks
from earlybird.tickets.held import HeldTicket
from earlybird.tickets.layers import BatchNorm, Conv, layer_of, width
from earlybird.tickets.scores import filters, hidden_layers, magnitude
from earlybird.tickets.shrink import shrink
from earlybird.tickets.ticket import Ticket

__all__ = ["AtInit", "collapsed", "grasp", "pick_samples", "random", "snip", "synflow", "synflow_masks"]

Unit = Literal["channel", "weight"]
Samples = Callable[[int], tuple[Any, Tensor]]

SAMPLES_PER_CLASS = 10
"""Samples of each class that GraSP looks at on CIFAR-10; as many images as SNIP's one batch of 100."""


@dataclass(frozen=True, kw_only=True)
class AtInit:
    """Hyper-parameters of pruning at initialisation; `attach` draws the ticket.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    init_keep: float = option(0.5, "Share of the channels (or weights) that stays, in (0, 1].")
    init_score: Literal["snip", "grasp", "synflow", "magnitude", "random"] = option(
        "snip", "What a unit is worth before training; random is the control experiment."
    )
    init_units: Literal["channel", "weight"] = option(
        "channel", "Whole channels, which are cut out at once, or single weights, as published, which are masked."
    )
    init_budget: Literal["network", "erk", "uniform"] = option(
        "network", "Rank the whole network together, or by layer: the same share of each, or (weights) ERK shares."
    )
    init_macs_share: float | None = option(None, "Upper bound on the MACs of a ticket over channels, share of dense.")
    init_samples: int = option(SAMPLES_PER_CLASS, "Training images of each class that snip and grasp look at.")
    init_rounds: int = option(100, "Rounds of synflow.")
    init_leave: tuple[str, ...] = option((), "Layers left dense (weights): names, or 'first' and 'last'.")
    init_round_to: int | None = option(
        None, "Multiple that numbers of channels are rounded up to; 'none' takes what suits the device."
    )

    KEEP_KEY: ClassVar[str] = "init_keep"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {}, "published": {"init_units": "weight"}, "fast": {},
    }  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "init_keep", check_share("init_keep", self.init_keep))
        check_choice("init_score", self.init_score, ("snip", "grasp", "synflow", "magnitude", "random"))
        check_choice("init_units", self.init_units, ("channel", "weight"))
        check_choice("init_budget", self.init_budget, BUDGETS)
        check_count("init_samples", self.init_samples, "10", optional=False)
        check_count("init_rounds", self.init_rounds, "100", optional=False)
        check_count("init_round_to", self.init_round_to, "8")
        object.__setattr__(self, "init_leave", patterns_from("init_leave", self.init_leave))
        if self.init_units == "channel" and self.init_budget == "erk":
            raise InputError("init_budget 'erk' is for single weights", hint="use 'network' or 'uniform'")
        if self.init_units == "channel" and self.init_leave:
            raise InputError("init_leave is for single weights", hint="set init_units = 'weight'")
        if self.init_macs_share is not None:
            object.__setattr__(self, "init_macs_share", check_share("init_macs_share", self.init_macs_share))
            if self.init_units == "weight":
                raise InputError("init_macs_share is for channels: single weights save no MACs", hint="leave it out")

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of a run that is small from the first step, for `earlybird.forecast`.

        A ticket keeps the same share of each layer's units.
        """
        small: dict[int, nn.Module] = {}
        for model in (stretch.model for stretch in stretches if self.init_keep < 1):
            if id(model) not in small:
                if self.init_units == "weight":
                    names = prunable(model, leave=self.init_leave)
                    small[id(model)] = with_zeros(model, dict.fromkeys(names, self.init_keep))
                else:
                    small[id(model)] = copy.deepcopy(model)
                    ticket = draw(
                        model, self.init_keep, score="magnitude", example_inputs=plan.images(), coupled="group",
                        scope="layer", macs_share=self.init_macs_share,
                    )  # fmt: skip
                    shrink(small[id(model)], ticket, plan.images(), round_to=self.init_round_to or 8)
        return [replace(stretch, model=small.get(id(stretch.model), stretch.model)) for stretch in stretches]

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        samples: tuple[Any, Tensor] | Samples | None = None,
        example_inputs: Any = None,
        ledger: Ledger | None = None,
        seed: int = 0,
        resumed: bool = False,
    ) -> HeldTicket:
        """Draw the ticket, and cut or mask the model to it, before the first step.

        Args:
            model: The module that is trained, with its first weights; wrappers are seen through.
            optimizer: Over its parameters.
            samples: Inputs and labels that snip and grasp look at, or a function that returns them when it is given
                the number of each class (published: 10).
            example_inputs: A batch that the model runs on; needed over channels, and by synflow. Default: the samples.
            ledger: Where to record; by default an own one, which `HeldTicket.bill` reads.
            seed: Of random tickets.
            resumed: Draw nothing: the ticket comes with ``load_state_dict``.

        Returns:
            The running method.

        Raises:
            InputError: There is nothing to score with, or another method draws a ticket.
            ShrinkError: The graph of the model cannot be followed.
        """

        def ticket(model: nn.Module, ledger: Ledger) -> Ticket | None:
            if self.init_keep == 1:
                return None
            found = samples(self.init_samples) if callable(samples) else samples
            inputs = example_inputs if example_inputs is not None else None if found is None else found[0]
            return _draw_ticket(self, model, found, inputs, ledger, seed)

        return HeldTicket(
            "at_init", self, model, optimizer, ticket, example_inputs=example_inputs, ledger=ledger,
            round_to=self.init_round_to, resumed=resumed,
        )  # fmt: skip


def _draw_ticket(
    settings: AtInit, model: nn.Module, samples: tuple[Any, Tensor] | None, inputs: Any, ledger: Ledger, seed: int
) -> Ticket:
    keep, score, units = settings.init_keep, settings.init_score, settings.init_units
    about = {"method": "at_init", "score": score, "keep": keep, "budget": settings.init_budget}
    if score in ("snip", "grasp") and samples is None:
        raise InputError(f"{score} has no samples to look at", hint="pass samples=(inputs, labels) to attach")
    if (score == "synflow" or units == "channel") and inputs is None:
        raise InputError("no inputs that the model runs on", hint="pass example_inputs=x to attach")
    if score == "synflow" and units == "weight":
        ledger.passes(settings.init_rounds, batches=settings.init_rounds, training=True)
        masks = synflow_masks(
            model, inputs, keep=keep, rounds=settings.init_rounds, budget=settings.init_budget,
            leave=settings.init_leave,
        )  # fmt: skip
        return ticket_of(masks, **about)
    scores: Mapping[str, Tensor]
    if score in ("snip", "grasp"):
        assert samples is not None
        # grasp: forward and backward, and the backward pass through both, which is twice their MACs
        passes = 1 if score == "snip" else 3
        ledger.passes(passes * len(samples[1]), batches=passes, training=True)
        scores = (snip if score == "snip" else grasp)(model, *samples, units=units)
    elif score == "synflow":
        ledger.passes(settings.init_rounds, batches=settings.init_rounds, training=True)
        scores = synflow(model, inputs, keep=keep, rounds=settings.init_rounds, coupled="group")
    elif score == "random":
        scores = random(model, mask_generator(seed), units=units)
    else:
        scores = magnitude(model) if units == "channel" else {n: w.detach().abs() for n, w in prunable(model).items()}
    scores = ranks.share(scores)
    if units == "weight":
        ranked = _ranked_weights(model, settings.init_leave)
        return ticket_of(_best_weights({name: scores[name] for name in ranked}, keep, settings.init_budget), **about)
    # random numbers rank nothing between layers
    scope: Scope = "layer" if settings.init_budget == "uniform" or score == "random" else "network"
    ticket = draw(
        model, keep, scores=scores, example_inputs=inputs, coupled="group", scope=scope,
        macs_share=settings.init_macs_share,
    )  # fmt: skip
    return Ticket(ticket.masks, ticket.kinds, about)


def _ranked_weights(model: nn.Module, leave: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the weights that a ticket is drawn over; what is frozen stays as it is."""
    return {name: weight for name, weight in prunable(model, leave=leave).items() if weight.requires_grad}


def _best_weights(scores: Mapping[str, Tensor], keep: float, budget: str) -> dict[str, Tensor]:
    if budget == "network":
        return largest(scores, max(round(keep * sum(score.numel() for score in scores.values())), 1))
    return largest_by_layer(scores, counts_for({name: score.shape for name, score in scores.items()}, keep, budget))


def snip(model: nn.Module, inputs: Any, labels: Tensor, *, units: Unit = "channel") -> dict[str, Tensor]:
    """Return the connection sensitivity of each channel, layer name to ``(channels,)``, or of each weight.

    Args:
        model: Runs in train mode, so that batch norm uses the statistics of the samples.
        inputs: Samples as the model takes them; published: one batch of 100 images of CIFAR-10.
        labels: Their classes, int64 (N,).
        units: ``'channel'``, or ``'weight'`` for scores shaped as the weights, of the last layer, too.

    Raises:
        InputError: The weight of a layer is computed by a parametrisation, or the model returns no tensor.
    """
    model = unwrapped(model)
    with _in_training(model):
        weights = _weights(model)
        loss = functional.cross_entropy(_outputs(model, weights, inputs)[0], labels)
        gradients = _gradients(loss, weights)
    return _by_unit(model, {name: (gradients[name] * weight).abs() for name, weight in weights.items()}, units)


def grasp(
    model: nn.Module, inputs: Any, labels: Tensor, *, temperature: float = 200.0, units: Unit = "channel"
) -> dict[str, Tensor]:
    """Return how much gradient flow goes with each channel, layer name to ``(channels,)``, or weight; may be negative.

    Args:
        model: Runs in train mode, so that batch norm uses the statistics of the samples.
        inputs: Samples as the model takes them; published: ten of each class of CIFAR-10.
        labels: Their classes, int64 (N,).
        temperature: The logits are divided by it.
        units: As `snip`.

    Raises:
        InputError: As `snip`.
    """
    model = unwrapped(model)
    with _in_training(model):
        weights = _weights(model)
        loss = functional.cross_entropy(_outputs(model, weights, inputs)[0] / temperature, labels)
        gradients = _gradients(loss, weights, again=True)
        flow = sum(((gradient.detach() * gradient).sum() for gradient in gradients.values()), loss.new_zeros(()))
        products = _gradients(flow, weights)  # H g
    return _by_unit(model, {name: weight * products[name] for name, weight in weights.items()}, units)


def synflow(
    model: nn.Module, example_inputs: Any, *, keep: float, rounds: int = 100, coupled: Coupled = "whole"
) -> dict[str, Tensor]:
    """Return the round in which each channel goes, plus its synaptic flow then, below 1: layer name to ``(channels,)``.

    Round r of n leaves ``keep ** (r / n)`` of the channels, scored anew on what the round before has left. Drawn with
    the same ``keep`` and ``coupled``, the scores give the ticket of the last round; with another ``keep`` they go back
    to an earlier round, or on in the order of the last one.

    Batch norms take part with the absolute value of their scale, at the statistics of an untrained network. Where the
    flow through many layers leaves the range of float32, it is computed in float64.

    Args:
        model: Any module that can be traced.
        example_inputs: What the model is called with; only its shape counts.
        keep: Share of the free channels that the last round leaves, in (0, 1].
        rounds: Published: 100.
        coupled: See `earlybird.draw`.

    Raises:
        InputError: ``keep`` or ``rounds`` is out of range, no channel is free to go, no flow reaches the output (or
            more than float64 can hold), or as `snip`.
    """
    keep = check_share("keep", keep)
    check_count("rounds", rounds, "100", optional=False)
    model = unwrapped(model)
    groups = find_groups(model, first_sample(example_inputs))
    positive, ones = _flowing(model, example_inputs)
    left = {name: torch.ones(width(module) or 0, dtype=torch.bool) for name, module in hidden_layers(model).items()}
    result = {name: torch.zeros(mask.numel()) for name, mask in left.items()}
    for number in range(1, rounds + 1):
        flow = _flow(positive, ones)
        highest = _highest(flow)
        # below zero, so that what has gone does not come back for a channel that lives without any flow
        scores = {name: torch.where(left[name], score.cpu() / highest, -1.0) for name, score in flow.items()}
        stays = draw_coupled(scores, groups, keep ** (number / rounds), coupled=coupled)
        for name, mask in stays.items():
            goes, left[name] = left[name] & ~mask, left[name] & mask  # nothing comes back, whatever balances groups
            result[name][goes] = number + scores[name][goes].float()
            result[name][left[name]] = number + 1 + scores[name][left[name]].float()  # until a later round
        _silence(positive, groups, group_masks(left, groups))
    return result


def synflow_masks(
    model: nn.Module, example_inputs: Any, *, keep: float, rounds: int = 100, budget: str = "network",
    leave: Iterable[str] = (),
) -> dict[str, Tensor]:  # fmt: skip
    """Return the weights that synaptic flow leaves after all rounds: layer name to a mask shaped as the weight.

    As published, over single weights: round r of n leaves ``keep ** (r / n)`` of them, scored anew on what is left.

    Args:
        model: Any module.
        example_inputs: What the model is called with; only its shape counts.
        keep: Share of the weights that the last round leaves, in (0, 1].
        rounds: Published: 100.
        budget: Of `earlybird.sparse.budget.BUDGETS`.
        leave: Layers that are left dense, see `earlybird.sparse.masks.left_dense`.

    Raises:
        InputError: As `synflow`.
    """
    keep = check_share("keep", keep)
    check_count("rounds", rounds, "100", optional=False)
    model = unwrapped(model)
    positive, ones = _flowing(model, example_inputs)
    ranked = _ranked_weights(positive, leave)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in ranked.items()}
    for number in range(1, rounds + 1):
        flow = _flow(positive, ones, "weight")
        # what has gone stays gone, and comes last where nothing flows
        scores = {name: torch.where(mask, flow[name] / _highest(flow), -1.0) for name, mask in masks.items()}
        stays = _best_weights(scores, keep ** (number / rounds), budget)
        with torch.no_grad():
            for name, mask in stays.items():
                masks[name] &= mask
                ranked[name].mul_(masks[name])
    return {name: mask.cpu() for name, mask in masks.items()}


def random(model: nn.Module, generator: torch.Generator, *, units: Unit = "channel") -> dict[str, Tensor]:
    """Return uniform random numbers: layer name to ``(channels,)``, or shaped as the weights.

    Channels that several layers write together get the mean of their numbers, which lies near one half: draw with
    ``scope='layer'``, or with the layers' shares of another ticket (`earlybird.tickets.draw.shuffle`).

    Args:
        model: Only its shape counts.
        generator: On the CPU; not seeded as the one that drew the weights was, see `earlybird.sparse.masks`.
        units: As `snip`.
    """
    if units == "weight":
        return {name: torch.rand(weight.shape, generator=generator) for name, weight in prunable(model).items()}
    layers = hidden_layers(unwrapped(model))
    return {name: torch.rand(width(module) or 0, generator=generator) for name, module in layers.items()}


def collapsed(ticket: Ticket) -> list[str]:
    """Return the layers that hang by one channel: a ranking over the whole network would have emptied them.

    `earlybird.draw` leaves each layer its best channel whatever its score; what is left is hardly a layer any more.
    """
    return [name for name, (kept, total) in ticket.widths.items() if kept == 1 < total]


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    with undisturbed(model):
        model.train()
        yield


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of all convolutions and linear layers, frozen ones included, ready for a gradient."""
    return {
        key: model.get_parameter(key).detach().requires_grad_()
        for key in dict.fromkeys(_keys(model).values())  # a weight that layers share once
    }


def _keys(model: nn.Module) -> dict[str, str]:
    """Return the name of the weight of each convolution and linear layer; layers that share one have the same name."""
    first: dict[int, str] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), key)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (Conv, nn.Linear)):
            if id(module.weight) not in first:
                raise InputError(
                    f"the weight of layer '{name}' is computed by a parametrisation", needed="a plain parameter",
                    hint="score the model before it is parametrised",
                )  # fmt: skip
            found[name] = first[id(module.weight)]
    return found


def _outputs(model: nn.Module, weights: Mapping[str, Tensor], inputs: Any) -> list[Tensor]:
    args, kwargs = as_call(inputs)
    found = tensors_in(functional_call(model, dict(weights), args, kwargs))
    if not found:
        raise InputError(f"{type(model).__name__} returns no tensor", needed="logits (N, classes)")
    return found


def _gradients(value: Tensor, weights: Mapping[str, Tensor], *, again: bool = False) -> dict[str, Tensor]:
    """Return the gradient of ``value`` by weight; ``again`` keeps the graph, so that it can be derived once more."""
    found = torch.autograd.grad(
        value, list(weights.values()), create_graph=again, allow_unused=True, materialize_grads=True
    )
    return dict(zip(weights, found))


def _by_unit(model: nn.Module, values: Mapping[str, Tensor], units: Unit) -> dict[str, Tensor]:
    """Return values of weights by layer, or sum them over each filter of the layers that are ranked."""
    keys = _keys(model)
    if units == "weight":
        return {name: values[keys[name]].detach() for name in prunable(model)}
    return {
        name: filters(name, module, values[keys[name]].detach()).sum(1) for name, module in hidden_layers(model).items()
    }


def _finite(flow: Mapping[str, Tensor]) -> bool:
    return 0 < sum(float(score.sum()) for score in flow.values()) < torch.inf


def _highest(flow: Mapping[str, Tensor]) -> float:
    """Return a number a little above all flows, so that those divided by it are below 1."""
    return max(float(score.max()) for score in flow.values()) * (1 + 1e-6) or 1.0


def _flowing(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, Call]:
    """Return a positive copy of ``model`` and an input of ones, in a precision that holds the flow."""
    positive, ones = _all_positive(model), _ones(example_inputs)
    if not _finite(_flow(positive, ones)):
        positive, ones = positive.double(), _ones(example_inputs, torch.float64)
        if not _finite(_flow(positive, ones)):
            raise InputError(
                f"no synaptic flow comes through {type(model).__name__}, or more than float64 holds",
                hint="normalisation by the sample's own statistics stops it: use snip or grasp",
            )
    return positive, ones


def _flow(positive: nn.Module, ones: Call, units: Unit = "channel") -> dict[str, Tensor]:
    """Return the synaptic flow through each unit, by layer name."""
    with undisturbed(positive):
        weights = _weights(positive)
        everything = torch.stack([output.sum() for output in _outputs(positive, weights, ones)]).sum()
        gradients = _gradients(everything, weights)
    return _by_unit(positive, {name: (gradients[name] * weight).abs() for name, weight in weights.items()}, units)


def _all_positive(model: nn.Module) -> nn.Module:
    """Return a copy in float32 without a negative number, whose batch norms are those of an untrained network."""
    positive = copy.deepcopy(model).float()
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()
        for module in positive.modules():
            if isinstance(module, BatchNorm) and module.track_running_stats:
                module.reset_running_stats()
    return positive


def _ones(inputs: Any, dtype: torch.dtype = torch.float32) -> Call:
    """Return a call of the shape of one sample of ``inputs``, with ones for numbers."""

    def ones(value: Any) -> Any:
        numbers = isinstance(value, Tensor) and value.is_floating_point()
        return torch.ones_like(value, dtype=dtype) if numbers else value

    args, kwargs = as_call(first_sample(inputs))
    return Call(tuple(ones(value) for value in args), {key: ones(value) for key, value in kwargs.items()})


@torch.no_grad()
def _silence(model: nn.Module, groups: list[Group], chosen: Mapping[str, Tensor]) -> None:
    """Set to zero whatever writes or scales a channel that has gone."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for group in groups:
        gone = ~chosen[group.producers[0]] if group.producers else torch.zeros(group.size, dtype=torch.bool)
        for member in group.members if bool(gone.any()) else ():
            rows = member.local[gone[member.root]]
            if member.dim is not None:
                parameter = parameters[member.name]
                parameter.index_fill_(member.dim, rows.to(parameter.device), 0.0)
            elif member.side != "in":
                layer = layer_of(modules[member.name])
                assert layer is not None  # the trace found it
                for attribute, dim in layer.writes:
                    written: Tensor | None = getattr(modules[member.name], attribute, None)
                    if written is not None:
                        written.index_fill_(dim, rows.to(written.device), 0.0)
