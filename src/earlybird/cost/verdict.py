"""The verdict: one rule for who won, used by `earlybird compare` and by the report alike.

    faster     seconds / dense seconds, to two decimals, is below 1; above 1 it is slower
    worse      mean accuracy is more than 0.5 points below dense; more than 0.5 above it is better

Chance does not turn a loss into a tie: what a test of significance says is added as a remark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["POINTS", "Verdict", "judge", "judge_accuracy"]

POINTS = 0.5
"""Mean difference in accuracy, in percentage points, beyond which it counts."""


@dataclass(frozen=True)
class Verdict:
    """What a contender gained and lost against dense.

    Attributes:
        time: 1 faster, 0 the same to two decimals, -1 slower.
        accuracy: 1 better, 0 within `POINTS`, -1 worse; None if it was not compared.
        remark: What chance has to do with it, or empty.
    """

    time: int
    accuracy: int | None
    remark: str = ""

    @property
    def lost(self) -> bool:
        """Whether something was lost and nothing gained."""
        return min(self.time, self.accuracy or 0) < 0 and max(self.time, self.accuracy or 0) <= 0

    @property
    def any_loss(self) -> bool:
        """Whether time or accuracy was lost, whatever was gained for it."""
        return min(self.time, self.accuracy or 0) < 0

    def __str__(self) -> str:
        text = _TEXTS[self.time, self.accuracy]
        return f"{text} ({self.remark})" if self.remark else text


_NEAR = f"accuracy within {POINTS} points"
_TEXTS: dict[tuple[int, int | None], str] = {
    (1, 1): "a win: less time, and more accurate",
    (1, 0): f"a win: less time, {_NEAR}",
    (1, -1): "less time, but a loss of accuracy",
    (1, None): "less time; accuracy was not compared",
    (0, 1): "a win: more accurate in the same time",
    (0, 0): f"no gain: the same time, {_NEAR}",
    (0, -1): "a loss: less accurate in the same time",
    (0, None): "no gain: the same time; accuracy was not compared",
    (-1, 1): "more accurate, but a loss of time",
    (-1, 0): f"a loss: more time, {_NEAR}",
    (-1, -1): "a loss: more time and less accuracy",
    (-1, None): "a loss: more time; accuracy was not compared",
}


def judge(time_ratio: float, points: float | None, *, std: float | None = None, runs: int | None = None) -> Verdict:
    """Judge a contender against dense.

    Args:
        time_ratio: Its seconds divided by those of dense, mean over seeds.
        points: Its accuracy less that of dense, percentage points, mean over seeds; None if unknown.
        std: Standard deviation of ``points`` over seeds.
        runs: Seeds; without it nothing is said about chance.
    """
    ratio = round(time_ratio, 2)
    accuracy = None if points is None else judge_accuracy(points)
    remark = "" if runs is None or points is None else _remark(points, accuracy, std, runs)
    return Verdict((ratio < 1) - (ratio > 1), accuracy, remark)


def judge_accuracy(points: float) -> int:
    """Return 1 for better than dense, 0 for within `POINTS`, -1 for worse, by the difference in percentage points."""
    shown = round(points, 2)  # as printed, so that -0.50 is not beyond the limit by a rounding error
    return (shown > POINTS) - (shown < -POINTS)


def _remark(points: float, accuracy: int | None, std: float | None, runs: int) -> str:
    if runs < 3 or std is None:
        return "fewer than three seeds: chance is not told apart"
    clear = abs(points) > _t95(runs) * std / math.sqrt(runs)
    if accuracy and not clear:
        return f"the difference in accuracy could be chance over {runs} seeds"
    if not accuracy and clear:
        return "the small difference in accuracy is more than chance"
    return ""


def _t95(runs: int) -> float:
    """Two-sided 95 % quantile of Student's t with ``runs - 1`` degrees of freedom."""
    quantiles = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    return quantiles[runs - 2] if runs - 2 < len(quantiles) else 2.23
