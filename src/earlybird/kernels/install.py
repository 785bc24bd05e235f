"""Kernels of our own under a model that trains: which of them are worth it, by timing, and where they are put.

    handle = use_kernels(model, images, dtype=torch.bfloat16)   # times, takes what is faster here
    ...                                                         # any training loop
    handle.remove()

What is computed stays the same up to the order of additions, and so do modules, parameters and state dict.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from earlybird.calls import unwrapped
from earlybird.kernels.convolution import Gain, SmallMaps, chosen, gains

__all__ = ["Installed", "Kernels", "choose", "install", "use_kernels"]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Which kernels of our own a model computes with; none by default.

    Attributes:
        products_for_weights: Positions of the largest output map on which the weight gradient of a convolution is
            computed as a matrix product; see `earlybird.kernels.convolution`.
        products_for_all: The same for all three passes.
    """

    products_for_weights: int = 0
    products_for_all: int = 0

    @classmethod
    def read(cls, value: Any) -> Kernels | None:
        """Return what was written as a dict, or None if ``value`` is not that."""
        if not isinstance(value, dict) or value.keys() != asdict(cls()).keys():
            return None
        known = all(type(positions) is int and positions >= 0 for positions in value.values())
        return cls(**value) if known else None

    def __bool__(self) -> bool:
        return self != Kernels()

    def __str__(self) -> str:
        words = []
        if self.products_for_weights:
            words.append(f"weight gradients on maps of up to {self.products_for_weights} positions as products")
        if self.products_for_all:
            words.append(f"all passes up to {self.products_for_all}")
        return ", ".join(words) or "PyTorch's kernels"


class Installed:
    """Kernels under a model; `remove` takes them away.

    Attributes:
        kernels: Which.
        gains: What their layers took in each way, where that was timed.
    """

    def __init__(self, model: nn.Module, kernels: Kernels, timed: tuple[Gain, ...] = ()) -> None:
        self.kernels, self.gains = kernels, timed
        self._maps = SmallMaps(model, weights=kernels.products_for_weights, passes=kernels.products_for_all)

    def remove(self) -> None:
        """Let the model compute by PyTorch's kernels again."""
        self._maps.remove()


def choose(model: nn.Module, example_inputs: Any, dtype: torch.dtype = torch.float32) -> tuple[Kernels, list[Gain]]:
    """Time the layers for which there is a kernel, and return which to use here, with what was timed.

    Args:
        model: On a CPU; on other devices there is nothing to choose. It is called once, and left as it was.
        example_inputs: What it is called with in training: a whole batch, since times depend on it.
        dtype: In which its layers compute; bfloat16 is that of autocast.
    """
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cpu":
        return Kernels(), []
    timed = gains(model, example_inputs, dtype)
    best = chosen(timed)
    return Kernels(products_for_weights=best["weights"], products_for_all=best["passes"]), timed


def install(model: nn.Module, kernels: Kernels) -> Installed:
    """Put ``kernels`` under ``model``."""
    return Installed(unwrapped(model), kernels)


def use_kernels(model: nn.Module, example_inputs: Any, *, dtype: torch.dtype = torch.float32) -> Installed:
    """Time, and use what is faster than PyTorch's kernels on this machine, in any training loop.

    Call it before or after a ticket is drawn, and before `torch.compile` (which has kernels of its own; these are idle
    under it).

    Args:
        model: The model that trains; wrappers are seen through.
        example_inputs: A batch of the size and memory format of the training's.
        dtype: ``torch.bfloat16`` for a loop under ``torch.autocast("cpu", torch.bfloat16)``.

    Returns:
        What is in use, with `Installed.remove`.
    """
    model = unwrapped(model)
    kernels, timed = choose(model, example_inputs, dtype)
    return Installed(model, kernels, tuple(timed))
