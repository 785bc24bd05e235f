"""Scores at initialisation: tickets that are drawn before the first step of training.

The published methods give each weight ``w`` a score ``s``; a channel's score is the sum over its filter. Larger stays.

- ``snip``: ``s = |g w|`` with ``g = dL/dw``, on one batch (Lee et al., arXiv 1810.02340, eq. 6).
- ``grasp``: ``s = w (H g)``, the change of the gradient flow ``g' g`` when the weight goes, with ``g`` and the Hessian
  ``H`` at logits divided by a temperature (Wang et al., arXiv 2002.07376, eq. 8; reference code
  github.com/alecwangcq/GraSP). Their ``S = -s`` is what is removed first.
- ``synflow``: ``s = |w dR/dw|`` with ``R`` the sum of the outputs for an input of ones after all weights have been
  replaced by their absolute values; without data, in 100 rounds, since a single one would empty whole layers
  (Tanaka et al., arXiv 2006.05467, algorithm 1; reference code github.com/ganguli-lab/Synaptic-Flow).
- ``random``: the control experiment.

All fit `earlybird.draw` as ``scores=`` and are keyed as ``magnitude`` is: by convolution and linear layer, without the
last one. All are pure: weights, gradients, buffers, modes and the global random generators stay as they are.

    groups = find_groups(model, images[:1])
    scores = snip(model, images, labels)
    keep = keep_for_macs(scores, groups, 0.5, coupled="group")
    ticket = eb.draw(model, keep, scores=scores, example_inputs=images[:1], coupled="group")

They save the search: every step of training is one of the small network. Their own cost is that of a few training
steps. What they know of a channel is what the untrained weights say.

Deviations: channels instead of single weights; SNIP's scores are not divided by their sum, which no ranking sees, and
batch norm uses the batch's statistics, where its code takes the running ones of the untrained network; GraSP
takes its samples as one batch, where the code halves it to save memory, and leaves the last layer as it is, where the
code draws it anew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from earlybird.calls import Call, as_call, first_sample, tensors_in, undisturbed, unwrapped
from earlybird.errors import InputError
from earlybird.settings import check_share
from earlybird.tickets.coupling import Group, find_groups
from earlybird.tickets.draw import Coupled, draw_coupled, group_masks
from earlybird.tickets.layers import BatchNorm, Conv, layer_of, width
from earlybird.tickets.scores import filters, hidden_layers
from earlybird.tickets.ticket import Ticket

SAMPLES_PER_CLASS = 10
"""Samples of each class that GraSP looks at on CIFAR-10; as many images as SNIP's one batch of 100."""


def pick_samples(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Return the indices of ``per_class`` random samples of each class, shape (classes * per_class,).

    Args:
        labels: int64 (N,).
        per_class: Samples of each class.
        generator: On the CPU.

    Raises:
        InputError: A class has fewer samples.
    """
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=generator)
    chosen = []
    for label in labels.unique():
        members = order[labels[order] == label][:per_class]
        if len(members) < per_class:
            raise InputError(f"class {int(label)} has {len(members)} samples", needed=f"{per_class} of each class")
        chosen.append(members)
    return torch.cat(chosen)


def snip(model: nn.Module, inputs: Any, labels: Tensor) -> dict[str, Tensor]:
    """Return the connection sensitivity of each channel: layer name to ``(channels,)``.

    Args:
        model: Runs in train mode, so that batch norm uses the statistics of the samples.
        inputs: Samples as the model takes them; published: one batch of 100 images of CIFAR-10.
        labels: Their classes, int64 (N,).

    Raises:
        InputError: The weight of a layer is computed by a parametrisation, or the model returns no tensor.
    """
    model = unwrapped(model)
    with _in_training(model):
        weights = _weights(model)
        loss = functional.cross_entropy(_outputs(model, weights, inputs)[0], labels)
        gradients = _gradients(loss, weights)
    return _by_filter(model, {name: (gradients[name] * weight).abs() for name, weight in weights.items()})


def grasp(model: nn.Module, inputs: Any, labels: Tensor, *, temperature: float = 200.0) -> dict[str, Tensor]:
    """Return how much gradient flow goes with each channel: layer name to ``(channels,)``; may be negative.

    Args:
        model: Runs in train mode, so that batch norm uses the statistics of the samples.
        inputs: Samples as the model takes them; published: ten of each class of CIFAR-10.
        labels: Their classes, int64 (N,).
        temperature: The logits are divided by it.

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
    return _by_filter(model, {name: weight * products[name] for name, weight in weights.items()})


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
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InputError(f"rounds is {rounds!r}", needed="a whole number of at least 1")
    model = unwrapped(model)
    groups = find_groups(model, first_sample(example_inputs))
    positive, ones = _all_positive(model), _ones(example_inputs)
    if not _finite(_flow(positive, ones)):
        positive, ones = positive.double(), _ones(example_inputs, torch.float64)
        if not _finite(_flow(positive, ones)):
            raise InputError(
                f"no synaptic flow comes through {type(model).__name__}, or more than float64 holds",
                hint="normalisation by the sample's own statistics stops it: use snip or grasp",
            )
    left = {name: torch.ones(width(module) or 0, dtype=torch.bool) for name, module in hidden_layers(model).items()}
    result = {name: torch.zeros(mask.numel()) for name, mask in left.items()}
    for number in range(1, rounds + 1):
        flow = _flow(positive, ones)
        highest = max(float(score.max()) for score in flow.values()) * (1 + 1e-6) or 1.0
        # below zero, so that what has gone does not come back for a channel that lives without any flow
        scores = {name: torch.where(left[name], score.cpu() / highest, -1.0) for name, score in flow.items()}
        stays = draw_coupled(scores, groups, keep ** (number / rounds), coupled=coupled)
        for name, mask in stays.items():
            goes, left[name] = left[name] & ~mask, left[name] & mask  # nothing comes back, whatever balances groups
            result[name][goes] = number + scores[name][goes].float()
            result[name][left[name]] = number + 1 + scores[name][left[name]].float()  # until a later round
        _silence(positive, groups, group_masks(left, groups))
    return result


def random(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return uniform random numbers: layer name to ``(channels,)``.

    Channels that several layers write together get the mean of their numbers, which lies near one half: draw with
    ``scope='layer'``, or with the layers' shares of another ticket (`earlybird.tickets.draw.shuffle`).

    Args:
        model: Only its shape counts.
        generator: On the CPU.
    """
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


def _by_filter(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum values of weights over each filter of the layers that are ranked."""
    keys = _keys(model)
    return {
        name: filters(name, module, values[keys[name]].detach()).sum(1) for name, module in hidden_layers(model).items()
    }


def _finite(flow: Mapping[str, Tensor]) -> bool:
    return 0 < sum(float(score.sum()) for score in flow.values()) < torch.inf


def _flow(positive: nn.Module, ones: Call) -> dict[str, Tensor]:
    """Return the synaptic flow through each channel: layer name to ``(channels,)``."""
    with undisturbed(positive):
        weights = _weights(positive)
        everything = torch.stack([output.sum() for output in _outputs(positive, weights, ones)]).sum()
        gradients = _gradients(everything, weights)
    return _by_filter(positive, {name: (gradients[name] * weight).abs() for name, weight in weights.items()})


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
