"""Scores: how much is each output channel worth? Pure functions from a model to one tensor a layer.

- ``bn_scale``: the absolute batch-norm scale, as network slimming and Early-Bird use it (Liu et al., arXiv 1708.06519;
  You et al., arXiv 1909.11957).
- ``taylor``: the first-order estimate of what the loss would change if scale and shift became zero,
  ``|gamma * dL/dgamma + beta * dL/dbeta|`` (Molchanov et al., arXiv 1906.10771, eq. 8, taken at the batch norm).
- ``magnitude``: the root mean square of a filter's weights (Li et al., arXiv 1608.08710, there the L1 norm); the one
  score that needs no batch norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from earlybird.errors import InputError
from earlybird.sharded import gathered, local, spread, whole
from earlybird.tickets.layers import BatchNorm, TransposedConv, mixes_channels

SCORES = ("bn_scale", "taylor", "magnitude")


def _has_scale(module: nn.Module) -> TypeGuard[BatchNorm]:
    return isinstance(module, BatchNorm) and isinstance(module.weight, nn.Parameter)


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Return every batch norm with a learned scale, by name, in order of definition.

    Raises:
        InputError: There is none.
    """
    found = {name: module for name, module in model.named_modules() if _has_scale(module)}
    if not found:
        raise InputError(
            f"{type(model).__name__} has no batch norm with a learned scale",
            needed="batch norms for the scores 'bn_scale' and 'taylor'",
            hint="use score='magnitude', which ranks the filters of convolutions and linear layers",
        )
    return found


def bn_scale(model: nn.Module) -> dict[str, Tensor]:
    """Return ``|gamma|`` of every batch norm: name to ``(channels,)``."""
    return {name: norm.weight.detach().abs() for name, norm in batch_norms(model).items()}


def taylor(model: nn.Module) -> dict[str, Tensor]:
    """Return ``|gamma * dgamma + beta * dbeta|`` of every batch norm from the gradients at hand: name to scores.

    Frozen batch norms are left out, and so stay whole.

    Raises:
        InputError: A batch norm has no gradient: call it between ``backward`` and ``zero_grad``.
    """
    scores: dict[str, Tensor] = {}
    for name, norm in batch_norms(model).items():
        if not norm.weight.requires_grad:  # frozen: its gradient says nothing about its worth
            continue
        if norm.weight.grad is None:
            raise InputError(
                f"batch norm '{name}' has no gradient", needed="gradients for score='taylor'",
                hint="call loss.backward() before, or use score='bn_scale'",
            )  # fmt: skip
        scores[name] = whole(_first_order(norm, norm.weight.grad).abs_())
    return scores


def _first_order(norm: BatchNorm, gradient: Tensor) -> Tensor:
    """Return ``gamma * dgamma + beta * dbeta``, shape ``(channels,)``, given the gradient of ``gamma``."""
    change = norm.weight.detach() * gradient
    if norm.bias is not None and norm.bias.grad is not None:
        change += norm.bias.detach() * norm.bias.grad
    return change


def _products(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return each parameter times its gradient, this rank's part of sharded ones."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    return list(torch._foreach_mul([local(parameter.detach()) for parameter in parameters], gradients))


class TaylorMean:
    """The running mean of the Taylor scores over the steps of a training.

    Args:
        norms: Layer name to batch norm.
        memory: Share of the mean that a step leaves as it is, 0 to 1.
    """

    def __init__(self, norms: Mapping[str, BatchNorm], memory: float) -> None:
        self._norms, self._memory = dict(norms), memory
        self.reset()

    def reset(self) -> None:
        """Begin anew, with layers as wide as they are now."""
        self._means = {n: torch.zeros_like(norm.weight, dtype=torch.float32) for n, norm in self._norms.items()}

    @torch.no_grad()
    def move(self, scale: Tensor | None = None) -> None:
        """Move the mean by the gradients at hand; a layer whose scores are not all finite stays where it is.

        Args:
            scale: What the gradients are multiplied by, shape ().
        """
        # all layers at once: in every step of a search, small operations one by one would be what it costs
        seen = [
            (norm, mean) for name, mean in self._means.items() if (norm := self._norms[name]).weight.grad is not None
        ]
        if not seen:
            return
        changes = _products([norm.weight for norm, _ in seen])
        shifted = [at for at, (norm, _) in enumerate(seen) if norm.bias is not None and norm.bias.grad is not None]
        if shifted:
            torch._foreach_add_([changes[at] for at in shifted], _products([seen[at][0].bias for at in shifted]))
        changes = [change.float() for change in changes]
        torch._foreach_abs_(changes)
        if scale is not None:
            torch._foreach_div_(changes, [scale.to(change.device) for change in changes])
        sizes, means = torch._foreach_norm(changes, 1), [local(mean) for _, mean in seen]
        news = [torch.where(torch.isfinite(size), change, own) for size, change, own in zip(sizes, changes, means)]
        torch._foreach_lerp_(means, news, 1 - self._memory)

    def scores(self) -> dict[str, Tensor]:
        """Return name to scores, each layer's over their norm; zeros before the first step.

        Layers differ in the size of their gradients by orders of magnitude.
        """
        tiny = torch.finfo(torch.float32).tiny
        means = {name: whole(mean) for name, mean in self._means.items()}
        return {name: mean / mean.norm().clamp_min(tiny) for name, mean in means.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the means by name, whole ones of sharded layers."""
        return {name: whole(mean).clone() for name, mean in self._means.items()}

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Tell whether ``state`` has the layers of this model."""
        shapes = {name: mean.shape for name, mean in self._means.items()}
        return shapes == {name: mean.shape for name, mean in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        for name, mean in state.items():
            local(self._means[name]).copy_(local(spread(mean, self._means[name])))


def hidden_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers whose filters can be ranked, by name, in order of definition.

    The last one is taken for the classifier and left out, since its outputs are not free to go. Depthwise convolutions
    follow the layer that feeds them. Frozen filters are left out, too, and so stay whole.

    Raises:
        InputError: There is none.
    """
    layers = [(name, module) for name, module in model.named_modules() if mixes_channels(module)]
    hidden = [(name, module) for name, module in layers[:-1] if module.weight.requires_grad]
    if not hidden:
        raise InputError(f"{type(model).__name__} has no hidden convolution or linear layer to rank")
    return dict(hidden)


def filters(name: str, module: nn.Module, values: Tensor) -> Tensor:
    """Return ``values``, one for each weight of ``module``, with a row for each of its filters: (out_channels, rest).

    Raises:
        InputError: The layer ``name`` is a grouped transposed convolution.
    """
    if isinstance(module, TransposedConv):
        if module.groups > 1:
            raise InputError(f"layer '{name}' is a grouped transposed convolution, whose filters cannot be ranked")
        values = values.transpose(0, 1)
    return values.flatten(1)


def magnitude(model: nn.Module) -> dict[str, Tensor]:
    """Return the root mean square of each filter, over the layer's mean: name to ``(out_channels,)``.

    The layers are those of `hidden_layers`.
    """
    scores: dict[str, Tensor] = {}
    for name, module in hidden_layers(model).items():
        weight: Tensor = module.weight.detach()  # type: ignore[operator]
        norm = filters(name, module, weight).float().pow(2).mean(1).sqrt()
        scores[name] = norm / norm.mean().clamp_min(torch.finfo(norm.dtype).tiny)
    return scores


def score_channels(model: nn.Module, score: str) -> dict[str, Tensor]:
    """Return the scores called ``score`` (one of `SCORES`): layer name to ``(channels,)``."""
    functions = {"bn_scale": bn_scale, "taylor": taylor, "magnitude": magnitude}
    if score not in functions:
        raise InputError(f"unknown score '{score}'", needed=f"one of {', '.join(SCORES)}")
    if score == "taylor":  # its gradients are where the shards are
        return taylor(model)
    with gathered(model):
        return functions[score](model)
