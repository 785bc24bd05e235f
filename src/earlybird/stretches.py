"""A run on paper: stretches of steps that cost the same, which a method's ``forecast`` changes as it would the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from earlybird.cost.arithmetic import Arithmetic
from earlybird.errors import InputError

__all__ = ["BLOCKS", "LAYERS", "Forecasting", "Plan", "Stretch", "after", "computing"]

LAYERS, BLOCKS = "how layers compute", "how blocks are run"
"""What one method at a time decides."""

Routes = tuple[tuple[tuple[str, ...], float, Arithmetic | None], ...]


@dataclass(frozen=True)
class Plan:
    """What a method may need to know of the run.

    Attributes:
        steps_per_epoch: Of a dense run.
        total_steps: Of a dense run.
        seed: Of the run.
        shape: Of an image: channels, height, width.
    """

    steps_per_epoch: int
    total_steps: int
    seed: int
    shape: tuple[int, int, int]

    def images(self, side: int | None = None) -> Tensor:
        """Return two images to count on, as large as they come or with sides of ``side`` pixels."""
        channels, height, width = self.shape
        return torch.zeros(2, channels, side or height, side or width)


@dataclass(frozen=True)
class Stretch:
    """Steps that all cost the same.

    Attributes:
        steps: How many; fractions are fine.
        model: What is trained; its layers may say how they compute (``arithmetic``).
        side: Height and width of its images, pixels.
        routes: Shares of the images that pass some layers otherwise: layers, share, arithmetic (None: not at all).
        training_routes: The same, of training alone: in evaluation, all images pass those layers as they are.
        beside: Models that see training images, too, forward only, such as a teacher; and the share of them.
        owners: Which method decides, by what it decides on: `LAYERS` or `BLOCKS`.
    """

    steps: float
    model: nn.Module
    side: int
    routes: Routes = ()
    training_routes: Routes = ()
    beside: tuple[tuple[nn.Module, float], ...] = ()
    owners: Mapping[str, str] = field(default_factory=dict)

    def decided(self, method: str, *parts: str) -> Stretch:
        """Return the stretch with ``method`` as the owner of ``parts``.

        Raises:
            InputError: Another method is, so that the run would be refused.
        """
        for part in parts:
            if self.owners.get(part, method) != method:
                raise InputError(
                    f"both {self.owners[part]} and {method} decide {part}", hint="leave one of the two methods out"
                )
        return replace(self, owners={**self.owners, **dict.fromkeys(parts, method)})


@runtime_checkable
class Forecasting(Protocol):
    """What is asked of a method's settings."""

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]: ...  # noqa: D102


def after(stretches: Sequence[Stretch], step: float, change: Callable[[Stretch], Stretch]) -> list[Stretch]:
    """Return the stretches with ``change`` done to all that comes after ``step`` steps."""
    found: list[Stretch] = []
    done = 0.0
    for stretch in stretches:
        before = min(max(step - done, 0.0), stretch.steps)
        done += stretch.steps
        if before:
            found.append(replace(stretch, steps=before))
        if before < stretch.steps:
            found.append(change(replace(stretch, steps=stretch.steps - before)))
    return found


def computing(
    stretch: Stretch, method: str, arithmetic: Callable[[nn.Module], dict[nn.Module, Arithmetic | None]]
) -> Stretch:
    """Return the stretch with layers that compute otherwise, and all others as they are made.

    Args:
        stretch: Its model is left alone.
        method: Which decides that.
        arithmetic: Returns how layers of a copy of the model compute; None: in the run's floating point.

    Raises:
        InputError: Another method decides how layers compute.
    """
    stretch = stretch.decided(method, LAYERS)
    model = copy.deepcopy(stretch.model)
    for layer in model.modules():
        layer.__dict__.pop("arithmetic", None)  # what an earlier stretch set
    for layer, how in arithmetic(model).items():
        if how is not None:
            layer.arithmetic = how  # type: ignore[assignment]
    return replace(stretch, model=model)
