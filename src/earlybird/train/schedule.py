"""Learning-rate schedules as pure functions of the absolute optimizer step.

Nothing is counted up, so nothing has to be saved, and neither the draw of a ticket nor a resume can disturb the clock.
Published retraining continues on the same clock, too (You et al., arXiv 1909.11957: milestones stay where they are).

With ``s`` steps done, ``w`` steps of warm-up, ``T`` in all, and ``q = (s - w) / (T - w)``, the factor on ``lr`` is

- warm-up (``s < w``): ``(s + 1) / w``
- ``cosine``: ``(1 + cos(pi q)) / 2`` (Loshchilov & Hutter, arXiv 1608.03983)
- ``one_cycle``: ``1 - q``, after a warm-up of 15 % of the run unless told otherwise (Smith & Topin, arXiv 1708.07120)
- ``step``: ``lr_factor`` to the number of milestones passed
- ``constant``: 1
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from earlybird.errors import InputError
from earlybird.train.recipe import Recipe

ONE_CYCLE_WARMUP = 0.15


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate as a function of the optimizer steps done.

    Attributes:
        kind: ``cosine``, ``one_cycle``, ``step`` or ``constant``.
        lr: Peak.
        total: Optimizer steps in the whole run.
        warmup: Optimizer steps of linear rise.
        milestones: Optimizer steps, ascending (``step`` only).
        factor: Per milestone.
    """

    kind: str
    lr: float
    total: int
    warmup: int = 0
    milestones: tuple[int, ...] = ()
    factor: float = 0.1

    @classmethod
    def from_recipe(cls, recipe: Recipe, steps_per_epoch: int) -> Schedule:
        """Work out the schedule of a recipe.

        Raises:
            InputError: Warm-up or a milestone lies outside the run, or milestones do not ascend.
        """
        total = recipe.steps(steps_per_epoch)
        if recipe.lr_warmup is not None:
            warmup = recipe.lr_warmup.in_iterations(steps_per_epoch, total)
        else:
            warmup = round(ONE_CYCLE_WARMUP * total) if recipe.schedule == "one_cycle" else 0
        if warmup >= total and warmup > 0:
            raise InputError(f"lr_warmup = {recipe.lr_warmup} is as long as the run of {total} steps or longer")
        milestones = tuple(point.in_iterations(steps_per_epoch, total) for point in recipe.milestones)
        if list(milestones) != sorted(set(milestones)):
            raise InputError(f"milestones are {', '.join(map(str, recipe.milestones))}", needed="ascending points")
        if milestones and milestones[-1] >= total:
            raise InputError(
                f"milestone {recipe.milestones[-1]} lies outside the run of {recipe.epochs} epochs",
                hint="lower it, or raise epochs",
            )
        return cls(
            kind=recipe.schedule,
            lr=recipe.lr,
            total=total,
            warmup=warmup,
            milestones=milestones,
            factor=recipe.lr_factor,
        )

    def __call__(self, step: int, end: int | None = None) -> float:
        """Return the learning rate of the optimizer step that follows ``step`` finished ones.

        Args:
            step: From 0.
            end: Step at which a part of the network stops learning, for the rate of that part: what decays over the
                run decays over these steps, and is 0 afterwards. By default ``total``.
        """
        if end is not None and step >= end:
            return 0.0
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max((self.total if end is None else end) - self.warmup, 1)
        if self.kind == "cosine":
            return self.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
        if self.kind == "one_cycle":
            return self.lr * (1.0 - progress)
        if self.kind == "step":
            return self.lr * self.factor ** bisect_right(self.milestones, step)
        return self.lr
