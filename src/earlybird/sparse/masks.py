"""Masks: weights that a ticket removes are zero, and stay zero, while the others are trained.

    w <- w * m,    g <- g * m,    state <- state * m

for the weight ``w`` of each masked layer, its gradient ``g`` and every tensor in the optimizer's state that is shaped
like it. The gradient is masked where autograd hands it over, so that what clips or counts gradients sees the sparse
network's; the weight is masked after each optimizer step as well, since some optimizers (Muon) mix the entries of a
matrix.

What it saves: nothing measured. Zeros are multiplied with like any other number here, and the bill charges the MACs
that are executed. Counted bit-MACs and modelled joules leave them out: that is what hardware that skips zeros would
spend. Where real time is wanted, whole channels have to go (`earlybird.tickets.structure`, `earlybird.shrink`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from earlybird.arithmetic.add import AddConv2d, AddLinear
from earlybird.arithmetic.shift import ShiftConv2d, ShiftLinear
from earlybird.calls import Hook, given_optimizers, unwrapped
from earlybird.errors import InputError, nearest
from earlybird.ledger import Ledger
from earlybird.sharded import is_sharded
from earlybird.tickets.layers import Conv
from earlybird.tickets.ticket import Ticket

__all__ = [
    "NOT_MULTIPLIED", "Masks", "check_fits", "left_dense", "mask_generator", "non_zeros", "prunable", "random_mask",
    "ticket_of", "with_zeros",
]  # fmt: skip

NOT_MULTIPLIED = (AddConv2d, AddLinear, ShiftConv2d, ShiftLinear)
"""Layers in which a weight of zero is not nothing."""

_MASKS = 0x5E7
"""Added to a run's seed for masks."""


def prunable(model: nn.Module, *, leave: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Return the weights that a ticket may be over: those of convolutions and linear layers, by layer name.

    Biases and norms are never among them (Frankle and Carbin, arXiv 1803.03635). A weight that several layers share is
    there once, under the first one's name.

    Args:
        model: Any module.
        leave: Layers that are not among them, see `left_dense`.

    Raises:
        InputError: There is none, a layer computes with zeros otherwise than by leaving them out, or ``leave`` names no
            layer.
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, NOT_MULTIPLIED):
            raise InputError(
                f"layer '{name}' ({type(module).__name__}) does not multiply: a weight of zero is not nothing there",
                needed="convolutions and linear layers",
                hint="leave shift_add out, or take a ticket over channels",
            )
        if not isinstance(module, (Conv, nn.Linear)):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            raise InputError(
                f"the weight of layer '{name}' is computed by a parametrisation", needed="a plain parameter",
                hint="take the parametrisation off before the weights are masked",
            )  # fmt: skip
        if id(weight) not in seen:
            seen.add(id(weight))
            found[name] = weight
    for name in left_dense(found, leave) if found else ():
        del found[name]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no weights to prune", needed="convolutions or linear layers",
            hint="check which layers are left out",
        )  # fmt: skip
    return found


def left_dense(weights: Mapping[str, Tensor], leave: Iterable[str]) -> set[str]:
    """Return the names of the layers that ``leave`` names: by themselves, or as ``'first'`` and ``'last'``.

    Raises:
        InputError: There is no such layer.
    """
    names = list(weights)
    ends = {"first": names[0], "last": names[-1]}
    found = set()
    for name in leave:
        if name not in ends and name not in weights:
            raise InputError(
                f"no layer '{name}' to leave dense", needed="a convolution or linear layer, 'first' or 'last'",
                hint=nearest(name, (*ends, *names)),
            )  # fmt: skip
        found.add(ends.get(name, name))
    return found


def with_zeros(model: nn.Module, densities: Mapping[str, float], *, gradients: float | None = None) -> nn.Module:
    """Return a copy of ``model`` whose layers say that some weights are zero, for a run on paper.

    Args:
        model: Any module.
        densities: Share of the weights that are not zero, by layer name.
        gradients: Share of these layers' weights whose gradients are wanted; default: of those that are not zero.
    """
    model = copy.deepcopy(model)
    for name, density in densities.items():
        layer = model.get_submodule(name)
        layer.weight_density = density  # type: ignore[assignment]
        if gradients is not None:
            layer.gradient_density = gradients  # type: ignore[assignment]
    return model


def mask_generator(seed: int) -> torch.Generator:
    """Return where random masks come from in a run of this seed: other numbers than its weights were drawn from.

    Of the very same numbers, a random mask would keep the weights that began largest.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + _MASKS) % 2**63)


def random_mask(shape: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """Return a mask of ``shape`` with ``count`` random positions, on the CPU."""
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    mask[torch.randperm(mask.numel(), generator=generator)[:count]] = True
    return mask.reshape(tuple(shape))


def ticket_of(masks: Mapping[str, Tensor], **provenance: Any) -> Ticket:
    """Return a ticket over single weights from masks by layer name, each shaped as the layer's weight."""
    return Ticket(masks, dict.fromkeys(masks, "weight"), provenance)


def non_zeros(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters of ``model`` are not zero, and how many there are: biases and norms included."""
    parameters = list(model.parameters())
    return sum(int(p.count_nonzero()) for p in parameters), sum(p.numel() for p in parameters)


class Masks:
    """A ticket over single weights, held on a model while it trains.

    Args:
        model: The module that is trained; wrappers are seen through.
        optimizer: Over its parameters; of several, all are seen to.
        ticket: Over weights; see `set`. None: nothing is masked yet.
        ledger: It and all that watch the model are told how many weights are left whenever that changes.

    Raises:
        InputError: The ticket is not this model's, or parameters are sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        ticket: Ticket | None = None,
        *,
        ledger: Ledger | None = None,
    ) -> None:
        self._model = unwrapped(model)
        if is_sharded(self._model):
            raise InputError(
                "parameters are sharded (fully_shard), of which no rank holds a whole weight to mask",
                hint="train with DistributedDataParallel, or take a ticket over channels",
            )
        self._optimizers = given_optimizers(optimizer)
        self._ledger = ledger
        self._factors: dict[str, Tensor] = {}
        self._weights: dict[str, nn.Parameter] = {}
        self._layers: dict[str, list[nn.Module]] = {}  # all that hold the weight, to be told of it
        self._dense_gradients = False
        self._hooks: list[Any] = []
        self._after = [one.register_step_post_hook(Hook(self._after_step, self)) for one in self._optimizers]
        if ticket is not None:
            self.set(ticket)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by layer name, as they are now, on the weights' devices; copies."""
        return {name: factor != 0 for name, factor in self._factors.items()}

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """The masked weights by layer name."""
        return self._weights

    @torch.no_grad()
    def set(self, ticket: Ticket) -> None:
        """Hold ``ticket`` from now on: removed weights and their optimizer state become zero, others stay as they are.

        Raises:
            InputError: A layer is missing, its weight has another shape, or units are not single weights; the message
                names the first. Nothing is changed then.
        """
        weights = check_fits(ticket, self._model)
        self._forget()
        self._weights = weights
        self._layers = {
            name: [module for module in self._model.modules() if module._parameters.get("weight") is weight]
            for name, weight in weights.items()
        }
        # numbers, in the weights' memory format: a product with booleans, or with another format, is ten times slower
        self._factors = {
            name: torch.empty_like(weight, requires_grad=False).copy_(mask)
            for (name, weight), mask in zip(weights.items(), ticket.masks.values())
        }
        self._hooks = [
            weight.register_post_accumulate_grad_hook(self._mask_gradient(self._factors[name]))
            for name, weight in weights.items()
            if weight.requires_grad
        ]
        self.apply()

    @torch.no_grad()
    def move(self, masks: Mapping[str, Tensor]) -> None:
        """Change the masks of some layers, for masks that move as training goes on; what they remove becomes zero."""
        for name, mask in masks.items():
            self._factors[name].copy_(mask)
        self.apply(masks)

    @torch.no_grad()
    def apply(self, only: Iterable[str] | None = None) -> None:
        """Zero what is removed, in weights and optimizer state, and tell the ledger how many weights are left."""
        for name in self._factors if only is None else only:
            weight, factor = self._weights[name], self._factors[name]
            weight.mul_(factor)
            for optimizer in self._optimizers:
                for value in optimizer.state.get(weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        value.mul_(factor)
            left = int(factor.count_nonzero()) / factor.numel()  # not the mean, which half precision rounds
            for layer in self._layers[name]:
                layer.weight_density = left  # type: ignore[assignment]
        if self._ledger is not None:
            self._ledger.reread_arithmetic()

    def let_gradients_through(self, yes: bool) -> None:
        """Say whether gradients of removed weights are left as autograd computes them, for who grows by them.

        The ledgers are told that they are wanted, so that they are charged.
        """
        if yes == self._dense_gradients:
            return
        self._dense_gradients = yes
        for layer in chain.from_iterable(self._layers.values()):
            if yes:
                layer.gradient_density = 1.0  # type: ignore[assignment]
            else:
                layer.__dict__.pop("gradient_density", None)
        if self._ledger is not None:
            self._ledger.reread_arithmetic()

    def remove(self) -> None:
        """Take all hooks off; weights that are zero are trained like any other from here on."""
        self._forget()
        for hook in self._after:
            hook.remove()
        self._after.clear()

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for layer in chain.from_iterable(self._layers.values()):
            for said in ("weight_density", "gradient_density"):
                layer.__dict__.pop(said, None)
        self._factors, self._weights, self._layers = {}, {}, {}
        self._dense_gradients = False

    def _mask_gradient(self, factor: Tensor) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            if not self._dense_gradients and weight.grad is not None:
                weight.grad.mul_(factor)

        return hook

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._weights:
            torch._foreach_mul_(list(self._weights.values()), list(self._factors.values()))


def check_fits(ticket: Ticket, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weight of each layer that a ticket over weights names, in its order.

    Raises:
        InputError: What does not fit, with how many other entries.
    """
    own = prunable(model)
    modules = dict(model.named_modules())
    wrong: list[tuple[str, str]] = []
    for name, kind in ticket.kinds.items():
        if kind != "weight":
            wrong.append((name, f"the ticket's units of '{name}' are of kind '{kind}', not single weights"))
        elif name not in own:
            there = f"is no convolution or linear layer ({type(modules[name]).__name__})" if name in modules else ""
            wrong.append((name, f"layer '{name}' of the ticket {there or 'is not in the model'}"))
        elif own[name].shape != ticket.masks[name].shape:
            found, needed = tuple(ticket.masks[name].shape), tuple(own[name].shape)
            wrong.append((name, f"the ticket's mask of '{name}' has shape {found}, the model's weight {needed}"))
    if wrong:
        more = f" (and {len(wrong) - 1} more of {len(ticket.kinds)} entries)" if len(wrong) > 1 else ""
        raise InputError(
            wrong[0][1] + more,
            needed="the ticket of this model: same architecture, width, image channels and classes",
            hint=nearest(wrong[0][0], own) if wrong[0][0] not in own else "",
        )
    return {name: own[name] for name in ticket.kinds}
