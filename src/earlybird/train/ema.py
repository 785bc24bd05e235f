"""An exponential moving average of the weights, kept in the optimizer's state.

It lies there beside the momentum, so that whatever slices, saves or restores the one does the same to the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_KEY = "ema"


@torch.no_grad()
def average(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Move the averages towards the weights; call it after each optimizer step.

    Args:
        optimizer: Holds the weights.
        decay: The share of the average that stays, below 1. It grows to this as ``(1 + step) / (10 + step)``, so that
            the first steps are forgotten.
        step: Optimizer steps done before this one.
    """
    decay = min(decay, (1 + step) / (10 + step))
    averages: list[Tensor] = []
    weights: list[Tensor] = []
    for parameter in _parameters(optimizer):
        state = optimizer.state[parameter]
        if _KEY in state:
            averages.append(state[_KEY])
            weights.append(parameter)
        elif isinstance(optimizer, torch.optim.SGD) or state:
            # AdamW sets itself up only in a state that is empty, so its first step comes first.
            state[_KEY] = parameter.detach().clone(memory_format=torch.preserve_format)
    if averages:
        torch._foreach_lerp_(averages, weights, 1 - decay)


def averages(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Return the weights that have an average, each with it."""
    state = optimizer.state
    return [(weight, state[weight][_KEY]) for weight in _parameters(optimizer) if _KEY in state.get(weight, {})]


@contextlib.contextmanager
def swapped(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let each first tensor hold the second one's numbers for a while."""

    def swap() -> None:
        for one, other in pairs:
            one.data, other.data = other.data, one.data

    swap()
    try:
        yield
    finally:
        swap()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
