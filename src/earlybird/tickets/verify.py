"""Is a ticket a winning one: the criteria and the correlation of weights, as functions on numbers.

Ma et al., Sanity Checks for Lottery Tickets: Does Your Winning Ticket Really Win the Jackpot?, NeurIPS 2021,
https://arxiv.org/abs/2107.00166 (reference code: github.com/boone891214/sanity-check-LTH); the correlation of weights:
Liu et al., Lottery Ticket Preserves Weight Correlation, ICML 2021, https://arxiv.org/abs/2102.11068. A ticket that is
sparse wins

    the jackpot             if  (a) it is as accurate as dense, trained by a sufficient recipe,
                                (b) it is more accurate than its own re-initialisation, by more than the spread,
                            and (c) it is not notably less accurate than pruning and retraining;
    the secondary prize     if  (a) fails, and (b) and (c) hold

and nothing otherwise. Which weights end up large is decided by the first weights as far as

    R_p(theta, theta') = |T_p(theta) & T_p(theta')| / (p N),    T_p: positions of the share p of largest |theta|

is above what chance gives: ``p`` within a layer.

What it saves: nothing; it costs several trainings a seed (`earlybird.train.verification` runs them). It does *not* pay
for a ticket that is used because it is small and accurate enough, whatever made it so.

Deviations: "as accurate", "notably" and "the spread" are not given as numbers in the paper. Here the first two are a
tolerance in points of accuracy, and the spread is the larger one of the two standard deviations over seeds. Dense is
the best over all learning rates that were run; where a dense network that trained longer is better than that by more
than the tolerance, the recipe was not sufficient, and it is the one to reach. Over the whole network, chance gives more
than ``p`` where layers have weights of different sizes; so what chance gives is computed from their numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from earlybird.cost.verdict import POINTS
from earlybird.errors import InputError
from earlybird.settings import check_number, check_share

__all__ = ["Correlation", "Criterion", "Gap", "Verdict", "correlation", "gap", "judge_ticket"]

Kind = Literal["jackpot", "secondary prize", "none", "undecided"]
Row = Mapping[str, Any]

_NAMES: dict[str, str] = {
    "jackpot": "a jackpot ticket",
    "secondary prize": "a secondary-prize ticket",
    "none": "no winning ticket",
    "undecided": "undecided",
}


@dataclass(frozen=True)
class Gap:
    """Accuracy of the ticket above another's, within seeds.

    Attributes:
        points: Mean difference, percentage points.
        std: Standard deviation of the differences over seeds; None of one seed.
        error: Standard error of the mean; None of one seed.
        seeds: How many.
    """

    points: float
    std: float | None
    error: float | None
    seeds: int

    def __str__(self) -> str:
        error = "" if self.error is None else f" +- {self.error:.2f}"
        return f"{round(self.points, 2) + 0.0:+.2f}{error} points"  # the sum makes -0.00 a +0.00


@dataclass(frozen=True)
class Criterion:
    """One criterion: what it asks, whether it holds (None: not decided), and why, in one line."""

    name: str
    holds: bool | None
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What a ticket won.

    Attributes:
        kind: ``'jackpot'``, ``'secondary prize'``, ``'none'`` or ``'undecided'``.
        criteria: (a), (b) and (c).
        gaps: Role to the ticket's accuracy above it.
        remarks: What else has to be known.
    """

    kind: Kind
    criteria: tuple[Criterion, ...]
    gaps: Mapping[str, Gap]
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return _NAMES[self.kind]

    def to_json(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return {**asdict(self), "criteria": [asdict(one) for one in self.criteria], "remarks": list(self.remarks)}


@dataclass(frozen=True)
class Correlation:
    """How far the largest weights are the same ones.

    Attributes:
        share: ``p``.
        overall: Overlap over all layers ranked together, 0 to 1.
        chance: What ``overall`` is if, within each layer, the positions have nothing to do with each other.
        layers: Overlap within each layer, ranked by itself; chance gives ``p``.
    """

    share: float
    overall: float
    chance: float
    layers: Mapping[str, float]

    @property
    def within(self) -> float:
        """Mean over layers of the overlap within them."""
        return statistics.fmean(self.layers.values())


def correlation(theta: Mapping[str, Tensor], theta_prime: Mapping[str, Tensor], share: float) -> Correlation:
    """Return the share of the largest weights of one network that are among the largest of the other; see the module.

    Args:
        theta: Weights by layer name, any shapes.
        theta_prime: Of the same layers and shapes.
        share: ``p``, in (0, 1].

    Raises:
        InputError: Layers or shapes differ, or the share is out of range.
    """
    share = check_share("share", share)
    mine, theirs = ({name: tuple(weight.shape) for name, weight in one.items()} for one in (theta, theta_prime))
    if mine != theirs or not mine:
        different = sorted(set(mine.items()) ^ set(theirs.items()))
        raise InputError(
            f"weights of different layers, first at '{different[0][0]}'" if different else "no weights to compare",
            needed="two states of one network",
        )
    one, other = ({name: weight.detach().abs().flatten().double().cpu() for name, weight in w.items()}
                  for w in (theta, theta_prime))  # fmt: skip
    layers = {name: _overlap(_largest(one[name], share), _largest(other[name], share)) for name in one}
    tops = [_largest(torch.cat(list(values.values())), share) for values in (one, other)]
    sizes = [len(values) for values in one.values()]
    parts = [[int(part.sum()) for part in top.split(sizes)] for top in tops]
    chance = sum(a * b / n for a, b, n in zip(*parts, sizes)) / int(tops[0].sum())
    return Correlation(share, _overlap(*tops), chance, layers)


def _largest(values: Tensor, share: float) -> Tensor:
    top = torch.zeros(len(values), dtype=torch.bool)
    order = torch.argsort(values, descending=True, stable=True)
    top[order[: max(round(share * len(values)), 1)]] = True
    return top


def _overlap(one: Tensor, other: Tensor) -> float:
    return int((one & other).sum()) / int(one.sum())


def gap(ticket: Mapping[int, float], other: Mapping[int, float]) -> Gap | None:
    """Return how much more accurate the ticket is, over the seeds that both have; None where they share none.

    Args:
        ticket: Accuracy by seed, 0 to 1.
        other: The same.
    """
    points = [100 * (ticket[seed] - other[seed]) for seed in ticket if seed in other]
    if not points:
        return None
    std = statistics.stdev(points) if len(points) > 1 else None
    error = None if std is None else std / math.sqrt(len(points))
    return Gap(statistics.fmean(points), std, error, len(points))


def judge_ticket(rows: Sequence[Row], *, tolerance: float = POINTS) -> Verdict:
    """Say what a ticket won.

    Args:
        rows: Finished runs of one ticket at one learning rate, each with ``role`` (``'ticket'``, ``'dense'``,
            ``'reinitialised'``, ``'retrained'``, ``'shuffled'``, ``'random'``, ``'dense-equal-budget'``), ``seed``,
            ``lr`` and ``accuracy`` (0 to 1). Dense runs may be of other learning rates, too.
        tolerance: Percentage points by which a ticket may stay behind and still be as accurate.

    Raises:
        InputError: No run of the ticket is among them, it has several learning rates, or the tolerance is negative.
    """
    check_number("tolerance", tolerance, lambda points: points >= 0, "percentage points, 0 or more")
    rates = {row["lr"] for row in rows if row["role"] == "ticket"}
    if len(rates) != 1:
        raise InputError(f"runs of the ticket at {len(rates)} learning rates", needed="one")
    (lr,) = rates

    def accuracies(role: str, at: float) -> dict[int, float]:
        return {row["seed"]: row["accuracy"] for row in rows if row["role"] == role and row["lr"] == at}

    ticket = accuracies("ticket", lr)
    gaps = {}
    for role in dict.fromkeys(row["role"] for row in rows if row["role"] != "ticket"):
        found = gap(ticket, accuracies(role, lr))
        if found is not None:
            gaps[role] = found
    dense = {at: accuracies("dense", at) for at in dict.fromkeys(r["lr"] for r in rows if r["role"] == "dense")}
    longer = {at: accuracies("dense-equal-budget", at) for at in (lr, *dense)}
    criteria = (
        _as_dense(ticket, dense, {at: found for at, found in longer.items() if found}, tolerance),
        _above_reinitialised(ticket, accuracies("reinitialised", lr), gaps.get("reinitialised")),
        _as_retrained(gaps.get("retrained"), tolerance),
    )
    return Verdict(_kind(*(one.holds for one in criteria)), criteria, gaps, tuple(_remarks(ticket, rows, gaps, dense)))


def _kind(a: bool | None, b: bool | None, c: bool | None) -> Kind:
    if b is False or c is False:
        return "none"
    if a is None or b is None or c is None:
        return "undecided"
    return "jackpot" if a else "secondary prize"


def _as_dense(
    ticket: Mapping[int, float],
    dense: Mapping[float, Mapping[int, float]],
    longer: Mapping[float, Mapping[int, float]],
    tolerance: float,
) -> Criterion:
    name = "(a) as accurate as dense"
    if not dense:
        return Criterion(name, None, "dense has not been run")
    best = max(dense, key=lambda at: _mean(dense[at]))
    reference, which = dense[best], f"dense at its best learning rate here, {best:g}" if len(dense) > 1 else "dense"
    beyond = [at for at in longer if 100 * (_mean(longer[at]) - _mean(reference)) > tolerance]
    if beyond:
        at = max(beyond, key=lambda at: _mean(longer[at]))
        more = 100 * (_mean(longer[at]) - _mean(reference))
        reference = longer[at]
        which = f"dense trained for the ticket's whole bill ({more:+.2f} points: the recipe was not sufficient)"
    found = gap(ticket, reference)
    if found is None:
        return Criterion(name, None, "no seed has both ticket and dense")
    return Criterion(name, _at_least(found.points, -tolerance), f"{found} against {which}; tolerance {tolerance:g}")


def _above_reinitialised(ticket: Mapping[int, float], other: Mapping[int, float], found: Gap | None) -> Criterion:
    name = "(b) above its own re-initialisation"
    if found is None:
        return Criterion(name, None, "the re-initialised ticket has not been run")
    if found.seeds < 2:
        return Criterion(name, None, f"{found}; one seed has no spread")
    seeds = [seed for seed in ticket if seed in other]
    spread = max(100 * statistics.stdev([runs[seed] for seed in seeds]) for runs in (ticket, other))
    holds = round(found.points, 2) > round(spread, 2)
    return Criterion(name, holds, f"{found}; spread over seeds {spread:.2f}")


def _as_retrained(found: Gap | None, tolerance: float) -> Criterion:
    name = "(c) not below pruning and retraining"
    if found is None:
        return Criterion(name, None, "pruning and retraining has not been run")
    return Criterion(name, _at_least(found.points, -tolerance), f"{found}; tolerance {tolerance:g}")


def _remarks(
    ticket: Mapping[int, float],
    rows: Sequence[Row],
    gaps: Mapping[str, Gap],
    dense: Mapping[float, Mapping[int, float]],
) -> list[str]:
    remarks = []
    if len(ticket) < 3:
        remarks.append("Fewer than three seeds: chance is not told apart.")
    if len(dense) == 1:
        remarks.append("One learning rate was run: whether another one makes dense better is not known.")
    for role, says in _CONTROLS.items():
        if role not in gaps or gaps[role].std is None:
            continue
        others = [row["accuracy"] for row in rows if row["role"] == role and row["seed"] in ticket]
        spread = 100 * max(statistics.stdev(values) for values in (list(ticket.values()), others) if len(values) > 1)
        if round(gaps[role].points, 2) <= round(spread, 2):
            remarks.append(says.format(gap=gaps[role]))
    return remarks


_CONTROLS = {
    "shuffled": "Shuffled within its layers it is as good, or better ({gap}): which units a layer keeps does not count "
    "here, only how many.",
    "random": "A random ticket of as many weights is as good, or better ({gap}).",
}


def _at_least(points: float, limit: float) -> bool:
    return round(points, 2) >= round(limit, 2)  # as printed


def _mean(values: Mapping[int, float]) -> float:
    return statistics.fmean(values.values())
