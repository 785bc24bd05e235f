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

from earlybird.calls import arounds, unwrapped
from earlybird.errors import InputError
from earlybird.kernels.batch_norm import available
from earlybird.kernels.convolution import Gain, SmallMaps, chosen, gains, is_overridden
from earlybird.kernels.fuse import FusedBatchNorms

__all__ = ["Installed", "Kernels", "choose", "install", "use_kernels"]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Which kernels of our own a model computes with; none by default.

    Attributes:
        products_for_weights: Positions of the largest output map on which the weight gradient of a convolution is
            computed as a matrix product; see `earlybird.kernels.convolution`.
        products_for_all: The same for all three passes.
        batch_norms: Batch norms, with the ReLUs that read nothing but them, go through `earlybird.kernels.batch_norm`.
    """

    products_for_weights: int = 0
    products_for_all: int = 0
    batch_norms: bool = False

    @classmethod
    def read(cls, value: Any) -> Kernels | None:
        """Return what was written as a dict, or None if ``value`` is not that."""
        if not isinstance(value, dict) or value.keys() != asdict(cls()).keys():
            return None
        known = all(type(value[key]) is type(own) for key, own in asdict(cls()).items())
        return cls(**value) if known and min(value.values()) >= 0 else None

    def __bool__(self) -> bool:
        return self != Kernels()

    def __str__(self) -> str:
        words = []
        if self.products_for_weights:
            words.append(f"weight gradients on maps of up to {self.products_for_weights} positions as products")
        if self.products_for_all:
            words.append(f"all passes up to {self.products_for_all}")
        if self.batch_norms:
            words.append("batch norms with their ReLU")
        return ", ".join(words) or "PyTorch's kernels"


class Installed:
    """Kernels under a model; `remove` takes them away.

    Attributes:
        kernels: Which.
        gains: What their layers took in each way, where that was timed.
    """

    def __init__(self, model: nn.Module, kernels: Kernels, example_inputs: Any, timed: tuple[Gain, ...] = ()) -> None:
        if any(is_overridden(module) or arounds(module, FusedBatchNorms) for module in model.modules()):
            raise InputError("the model has kernels of ours already", hint="call remove() of what has put them there")
        self.kernels, self.gains = kernels, timed
        # first, since it calls the model, which may fail
        self._norms = FusedBatchNorms(model, example_inputs) if kernels.batch_norms else None
        self._maps = SmallMaps(model, weights=kernels.products_for_weights, passes=kernels.products_for_all)

    def remove(self) -> None:
        """Let the model compute by PyTorch's kernels again."""
        self._maps.remove()
        if self._norms is not None:
            self._norms.remove()


def choose(model: nn.Module, example_inputs: Any, dtype: torch.dtype = torch.float32) -> tuple[Kernels, list[Gain]]:
    """Time convolutions both ways, and return which kernels to use here, with what was timed.

    The kernel of batch norms is faster for every layer; it is taken where it can be compiled, which takes some seconds
    on a machine that has not done so before.

    Args:
        model: On a CPU; on other devices there is nothing to choose. It is called once, without a trace.
        example_inputs: What it is called with in training: a whole batch, since times depend on it.
        dtype: In which its layers compute; bfloat16 is that of autocast.
    """
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cpu":
        return Kernels(), []
    timed = gains(model, example_inputs, dtype)
    best = chosen(timed)
    norms = any(type(module) is nn.BatchNorm2d for module in model.modules()) and available()
    kernels = Kernels(products_for_weights=best["weights"], products_for_all=best["passes"], batch_norms=norms)
    return kernels, timed


def install(model: nn.Module, kernels: Kernels, example_inputs: Any) -> Installed:
    """Put ``kernels`` under ``model``, which may be called with ``example_inputs``, once, and without a trace."""
    return Installed(unwrapped(model), kernels, example_inputs)


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

    Raises:
        InputError: The model has them already.
    """
    model = unwrapped(model)
    kernels, timed = choose(model, example_inputs, dtype)
    return Installed(model, kernels, example_inputs, tuple(timed))
