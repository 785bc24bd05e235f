"""Turning points of a training loss: when has it stopped falling?

The indicator of Fu et al., FracTrain, NeurIPS 2020, https://arxiv.org/abs/2012.13113 (reference code
github.com/RICE-EIC/FracTrain). With ``L`` the mean losses between looks, ``window`` of them, and ``S`` the mean of the
first ten of the run, a look is a turning point where

    max over i of  |L_i - L_newest| / S  <=  threshold

after which the window is empty and the threshold is multiplied by ``decay``. Dividing by ``S`` lets one threshold serve
many tasks; emptying the window keeps the dip of accuracy that a change of precision brings from being the next turning
point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from earlybird.calls import processes
from earlybird.errors import InputError
from earlybird.step import Step

_EARLY = 10  # looks whose losses are the measure of all later differences


def turns(losses: Sequence[float], scale: float, threshold: float) -> bool:
    """Tell whether the older of ``losses`` differ from the newest, the last, by at most ``threshold * scale``."""
    return all(abs(loss - losses[-1]) <= threshold * scale for loss in losses[:-1])


class TurningPoints:
    """When has the loss stopped falling? The state of the indicator, which a loop tells its losses.

    Args:
        window: Looks that are compared.
        threshold: Largest difference that is a standstill, as a share of the early loss.
        decay: What each turning point multiplies the threshold by.

    Attributes:
        losses: Mean losses of the looks since the last turning point, the last ``window`` of them.
        early: Mean losses of the first ten looks.
    """

    def __init__(self, window: int, threshold: float, decay: float) -> None:
        self.losses: list[float] = []
        self.early: list[float] = []
        self._window, self._threshold, self._decay = window, threshold, decay
        self._sum: Tensor | float = 0.0  # on its device: nobody waits for it before the next look
        self._count = 0

    def observe(self, loss: Tensor | float) -> None:
        """Add the loss of one batch, a scalar."""
        self._sum = self._sum + (loss.detach().float() if isinstance(loss, Tensor) else loss)
        self._count += 1

    def look(self, *, warm: bool = True) -> bool:
        """Tell whether this is a turning point, by the mean of what was observed since the last look.

        Args:
            warm: Whether training has warmed up; before that a loss that stands still has not begun to fall, and counts
                for the early loss only.

        Raises:
            InputError: Nothing was.
        """
        if not self._count:
            raise InputError(
                "the loss has stopped falling, or not: nobody has told it",
                hint="call observe(loss) of what attach returned before each optimizer.step(), or set rungs_at "
                "(fractional_at)",
            )
        mean = torch.as_tensor(self._sum / self._count, dtype=torch.float32)
        if processes() > 1:  # all must turn at once
            torch.distributed.all_reduce(mean)
            mean /= processes()
        self._sum, self._count = 0.0, 0
        newest = float(mean)
        self.losses = [*self.losses, newest][-self._window :] if warm else []
        self.early = [*self.early, newest][:_EARLY]
        turned = len(self.losses) == self._window and turns(
            self.losses, sum(self.early) / len(self.early), self._threshold
        )
        if turned:
            self.losses = []
            self._threshold *= self._decay
        return turned

    def begin_anew(self) -> None:
        """Forget the losses since the last turning point: another precision has begun."""
        self.losses, self._sum, self._count = [], 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers and lists."""
        return {
            "losses": list(self.losses), "early": list(self.early), "threshold": self._threshold,
            "sum": float(self._sum), "count": self._count,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.losses, self.early = [*state["losses"]], [*state["early"]]
        self._threshold, self._sum, self._count = state["threshold"], state["sum"], state["count"]


def deadlines(
    count: int, first_until: Step | None, last_by: Step | None, steps_per_epoch: int | None, total_steps: int | None
) -> list[int]:
    """Return the step by which each stage of ``count`` but the first begins in any case, as far as that is sure.

    Args:
        count: Stages.
        first_until: When the second one begins at the latest, if there is a third; None: when the last one does.
        last_by: When the last one begins at the latest, those between evenly before it; None: none but the second has
            a deadline.
        steps_per_epoch: Optimizer steps in an epoch; needed when a point is given in epochs.
        total_steps: Optimizer steps of the training; needed when a point is a share of it.
    """
    length = (steps_per_epoch, total_steps)
    first = None if first_until is None else first_until.in_iterations(*length)
    if count < 2 or last_by is None:
        return [first] if first is not None and count > 1 else []
    last = last_by.in_iterations(*length)
    if first is None or count == 2:
        return [last] * (count - 1)
    first = min(first, last)
    return [math.ceil(first + (last - first) * number / (count - 2)) for number in range(count - 1)]


def foreseen(
    count: int, points: Sequence[Step], first_until: Step | None, last_by: Step | None, steps_per_epoch: int, total: int
) -> list[int]:
    """Return when each of ``count`` stages is taken to begin in a run that nobody has made, the first one at 0.

    That is at ``points``, or where all have deadlines at these; else evenly up to the last one's, or the end.
    """
    if points:
        return [0, *(point.in_iterations(steps_per_epoch, total) for point in points)]
    if first_until is not None and last_by is not None:
        return [0, *deadlines(count, first_until, last_by, steps_per_epoch, total)]
    last = total if last_by is None else last_by.in_iterations(steps_per_epoch, total)
    return [round(number * last / max(count - 1, 1)) for number in range(count)]


class Stages:
    """When each of several stages of a run begins: at points, or at turning points, or by deadlines if none comes.

    Args:
        name: Of the setting that has the points.
        count: Stages.
        points: When all but the first begin; none for turning points.
        every: How often the loss is looked at.
        warm_up: Until when a loss that stands still has not begun to fall.
        first_until: See `deadlines`.
        last_by: See `deadlines`.
        turning: The indicator.
        steps_per_epoch: Optimizer steps in an epoch; needed when a point is given in epochs.
        total_steps: Optimizer steps of the training; needed when a point is a share of it.

    Raises:
        InputError: A length is not known, or a stage begins before the one below it or after the end.
    """

    def __init__(
        self,
        name: str,
        count: int,
        *,
        points: Sequence[Step],
        every: Step,
        warm_up: Step,
        first_until: Step | None = None,
        last_by: Step | None = None,
        turning: TurningPoints,
        steps_per_epoch: int | None,
        total_steps: int | None,
    ) -> None:
        length = (steps_per_epoch, total_steps)
        by_loss = count > 1 and not points
        self._last, self._turning = count - 1, turning
        self._points = [point.in_iterations(*length) for point in points]
        self._look_every = max(every.in_iterations(*length), 1) if by_loss else 0
        self._warm_from = warm_up.in_iterations(*length) if by_loss else 0
        self._deadlines = deadlines(count, first_until, last_by, *length) if by_loss else []
        end = [] if total_steps is None else [total_steps]
        if points and any(later <= earlier for earlier, later in pairwise((0, *self._points, *end))):
            raise InputError(
                f"{name} names steps {', '.join(map(str, self._points))} of {total_steps or 'a run of unknown length'}",
                needed="later ones one by one, after 0 and before the end",
            )

    def observe(self, stage: int, loss: Tensor | float) -> None:
        """Take note of the loss of one batch in ``stage``, a scalar."""
        if self._look_every and stage < self._last:
            self._turning.observe(loss)

    def after(self, stage: int, steps: int) -> tuple[int, str]:
        """Return the stage that follows ``steps`` finished steps, the last of them in ``stage``, and why it begins."""
        if stage == self._last:
            return stage, ""
        if self._points:
            return sum(steps >= point for point in self._points), "schedule"
        due = sum(steps >= deadline for deadline in self._deadlines)
        if due > stage:
            self._turning.begin_anew()
            return due, "deadline"
        turned = steps % self._look_every == 0 and self._turning.look(warm=steps > self._warm_from)
        return stage + turned, "turning point"
