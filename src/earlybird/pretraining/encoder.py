"""A classifier as an encoder: its features, and a projector that is trained on them.

The features of an image are what the last linear layer of the model reads. While a method pre-trains, that layer is
frozen as it was drawn, so the trained model is an encoder with a fresh head. The projector belongs to the method: it is
in the optimizer, in a group like the head's, but not in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from earlybird import ranks
from earlybird.calls import (
    Hook,
    after_gradients,
    around,
    as_call,
    hook_owners,
    undisturbed,
    unwrapped,
)
from earlybird.cost.count import ModelCost, count
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_for, ledgers_on
from earlybird.objective import claim_loss
from earlybird.tickets.early_bert import UnitSearch
from earlybird.tickets.held import HeldTicket
from earlybird.tickets.search import Search

__all__ = ["Encoder", "EncoderRun", "find_head", "fp32", "projector"]


class Encoder:
    """A model that is trained by its features.

    Args:
        model: The module that is trained, on its device; attach before it is wrapped for several processes.
        optimizers: The first one gets the projector's parameters.
        example_inputs: A batch that the model runs on.
        projector: Makes the projector from the number of features; its weights come from ``seed``.
        seed: Of the projector's weights.
        method: On whose behalf.

    Attributes:
        head: The last linear layer; frozen.
        width: Number of features.
        projector: Maps features (N, width) to what is compared.

    Raises:
        InputError: The model does not end in a linear layer that is called once, there are no inputs to see that, or
            another method decides the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        example_inputs: Any,
        projector: Callable[[int], nn.Module],
        seed: int,
        method: str,
    ) -> None:
        self.model, self._optimizer = unwrapped(model), optimizers[0]
        self.head = find_head(self.model, example_inputs)
        self.width = self.head.in_features
        searches: list[Search | UnitSearch] = [*hook_owners(self.model, Search), *hook_owners(self.model, UnitSearch)]
        held = any(ticket.change is not None for ticket in hook_owners(self.model, HeldTicket))
        if held or not all(search.drawn for search in searches):
            raise InputError(
                f"a ticket cuts channels of the model, and {method} reads the model's features",
                needed="a model that keeps its shape; masks over single weights do not change it",
                hint="leave one of the two methods out, or take iterative in place of the ticket over channels",
            )
        self._free = claim_loss(self.model, method, reads=True)
        self._frozen = [p for p in self.head.parameters() if p.requires_grad]
        weight = self.head.weight
        group = next(
            (g for g in self._optimizer.param_groups if any(p is weight for p in g["params"])),
            self._optimizer.param_groups[0],
        )
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            self.projector = projector(self.width).to(weight.device, weight.dtype)
        settings = {key: value for key, value in group.items() if key != "params"}
        self._optimizer.add_param_group({**settings, "params": list(self.projector.parameters())})
        self._group = self._optimizer.param_groups[-1]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._cost = self._count()
        self._wanted = False
        self._features: Tensor | None = None
        self._handles: list[Any] = [
            around(self.head, self._run_head, self),
            self._optimizer.register_step_pre_hook(Hook(self._before_step, self)),
        ]

    def features(self, forward: Callable[[Tensor], Any], images: Tensor) -> Tensor:
        """Return the features (N, width) of ``images``; ``forward`` is the model, or what wraps it."""
        self._wanted = True
        try:
            forward(images)
        finally:
            self._wanted = False
        features, self._features = self._features, None
        if features is None:
            raise InputError(
                "the model was called without its last linear layer",
                needed="the model that the method was attached to, or what wraps it",
            )
        if features.shape[-1] != self.width:
            raise InputError(
                f"the encoder's features have become {features.shape[-1]}, and were {self.width}",
                needed="a model that keeps its shape while it is pre-trained",
                hint="leave the method out that cuts its channels; masks over single weights work",
            )
        return features

    def project(self, features: Tensor, ledger: Ledger) -> Tensor:
        """Return what the projector makes of features, and charge it."""
        projected: Tensor = self.projector(features)
        ledger.passes_of(self._cost, len(features), training=torch.is_grad_enabled())
        return projected

    def state_dict(self) -> dict[str, Any]:
        """Return the projector and its optimizer state."""
        state = self._optimizer.state
        return {
            "projector": dict(self.projector.state_dict()),
            "optimizer": {name: dict(state[p]) for name, p in self.projector.named_parameters() if p in state},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.projector.load_state_dict(state["projector"])
        for name, parameter in self.projector.named_parameters():
            self._optimizer.state.pop(parameter, None)
            if name in state["optimizer"]:
                self._optimizer.state[parameter] = {
                    key: value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value
                    for key, value in state["optimizer"][name].items()
                }

    def detach(self) -> None:
        """Take the projector out of the optimizer and all hooks off; the head learns again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._free()
        self._optimizer.param_groups[:] = [g for g in self._optimizer.param_groups if g is not self._group]
        for parameter in self.projector.parameters():
            self._optimizer.state.pop(parameter, None)
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def _count(self) -> ModelCost:
        weight = self.head.weight
        return count(self.projector, torch.zeros(2, self.width, device=weight.device, dtype=weight.dtype))

    def _run_head(self, forward: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
        if self._wanted:
            self._features = features
        return forward(features)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        return after_gradients(args, kwargs, self._share_gradients)

    def _share_gradients(self) -> None:
        """Give all ranks the mean gradient of the projector, which nothing wraps."""
        gradients = {n: p.grad for n, p in self.projector.named_parameters() if p.grad is not None}
        for name, shared in ranks.share(gradients).items():
            gradients[name].copy_(shared)


class EncoderRun:
    """What running methods share that train a model by something on its features; they add the loss.

    Args:
        encoder: Of the model; already attached.
        optimizers: Over its parameters.
        example_inputs: A batch that the model runs on.
        ledger: Where to record; None: an own one.

    Attributes:
        encoder: The model, its features and what is trained on them.
    """

    def __init__(
        self,
        encoder: Encoder,
        optimizers: list[torch.optim.Optimizer],
        example_inputs: Any,
        ledger: Ledger | None,
    ) -> None:
        self.encoder, self._optimizers = encoder, optimizers
        self._own_ledger = ledger is None
        self._ledger = ledger_for(encoder.model, optimizers, ledger, example_inputs)
        for one in ledgers_on(encoder.model, self._ledger):
            one.reprice(encoder.model)  # the last layer is frozen

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return nothing: the loss says it all."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what is trained on the features, its optimizer state, and what the own ledger holds."""
        return {**self.encoder.state_dict(), "ledger": self._ledger.state_dict() if self._own_ledger else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.encoder.load_state_dict(state)
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Take hooks, and what is trained on the features, away; the last layer learns again."""
        self.encoder.detach()
        if self._own_ledger:
            self._ledger.stop()


def find_head(model: nn.Module, example_inputs: Any) -> nn.Linear:
    """Return the linear layer that runs last in ``model``, which reads the features of an image.

    Raises:
        InputError: There is none, it is called more than once or not with (N, features), or there are no inputs.
    """
    if example_inputs is None:
        raise InputError("no inputs to find the features with", hint="pass example_inputs=x to attach")
    calls: list[tuple[nn.Module, Any]] = []

    def seen(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append((module, args[0] if args else None))

    call = as_call(example_inputs)
    with undisturbed(model), torch.no_grad():
        for module in model.modules():
            if not any(module.children()):
                module.register_forward_hook(seen)
        model(*call.args, **call.kwargs)
    with_weights = [(module, read) for module, read in calls if any(True for _ in module.parameters(recurse=False))]
    last, read = with_weights[-1] if with_weights else (None, None)
    if not isinstance(last, nn.Linear) or not isinstance(read, Tensor) or read.dim() != 2:
        raise InputError(
            f"{type(model).__name__} ends in {'nothing that has weights' if last is None else type(last).__name__}",
            needed="a linear layer that reads one vector of features an image",
        )
    if sum(module is last for module, _ in calls) > 1:
        raise InputError("the last linear layer is called more than once", needed="one vector of features an image")
    return last


def fp32(*tensors: Tensor) -> Any:
    """Return tensors in float32, and a context in which products of them stay so, whatever autocast says."""
    return torch.autocast(tensors[0].device.type, enabled=False), *(tensor.float() for tensor in tensors)


def projector(hidden: int | None, width: int, features: int, *, norm: bool) -> nn.Module:
    """Return a perceptron of two layers: (N, features) to (N, width)."""
    middle = hidden or features
    layers: list[nn.Module] = [nn.Linear(features, middle, bias=not norm)]
    return nn.Sequential(*layers, *((nn.BatchNorm1d(middle),) if norm else ()), nn.ReLU(), nn.Linear(middle, width))
