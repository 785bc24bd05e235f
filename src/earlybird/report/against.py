"""Contenders against the dense baseline: which bills compare, by what factor, at what accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from earlybird.cost import units
from earlybird.cost.bill import Bill, Ratio
from earlybird.report.read import Contender, RunRecord


def pair(contenders: Sequence[Contender]) -> tuple[Contender | None, Contender | None]:
    """Return the first ticket, and before it the dense baseline of the same task; without a ticket, any dense one."""
    ticket = next((c for c in contenders if not c.dense and c.bills), None)
    dense = (c for c in contenders if c.dense and c.bills and (ticket is None or c.task == ticket.task))
    return next(dense, None), ticket


def _paired(dense: Contender | None, contender: Contender) -> list[tuple[RunRecord, RunRecord]]:
    """Return finished runs and the dense run of each one's seed; none without a dense contender of the same task.

    Where no seed is shared, any dense run serves for all.
    """
    if dense is None or contender is dense or contender.task != dense.task:
        return []
    by_seed = {run.recipe.get("seed"): run for run in dense.runs if run.bill is not None}
    finished = [run for run in contender.runs if run.bill is not None]
    pairs = [(run, by_seed[seed]) for run in finished if (seed := run.recipe.get("seed")) in by_seed]
    return pairs or [(run, next(iter(by_seed.values()))) for run in finished if by_seed]


def compared(dense: Contender | None, contender: Contender) -> list[Bill]:
    """Return the bills of a contender's runs that have one: against the dense run of the seed, else as they are."""
    partners = {run.path: other.bill for run, other in _paired(dense, contender)}
    bills = [(run.bill, partners.get(run.path)) for run in contender.runs if run.bill is not None]
    return [bill if other is None else bill.against(other) for bill, other in bills]


def billed(contenders: Sequence[Contender]) -> list[tuple[Contender, list[Bill]]]:
    """Return all contenders that have bills, with the bills as they are to be compared."""
    dense, _ = pair(contenders)
    return [(contender, compared(dense, contender)) for contender in contenders if contender.bills]


def side_by_side(contenders: Sequence[Contender]) -> int:
    """Return how many runs at most went at a time; 1: each had the machine to itself."""
    return max((run.side_by_side for contender in contenders for run in contender.runs), default=1)


def told_side_by_side(contenders: Sequence[Contender]) -> str:
    """Return what has to be said where several runs went at a time; empty where none did."""
    jobs = side_by_side(contenders)
    if jobs < 2:
        return ""
    return f"Up to {jobs} runs went side by side: their seconds do not compare with those of a lone run."


def ratios_to_dense(dense: Contender | None, ticket: Contender) -> dict[str, Ratio]:
    """Return dense over ticket: one over the mean within seeds of ticket over dense, as `earlybird compare` has it.

    Runs whose seed dense does not have are left out, unless none is shared. Of runs side by side no seconds compare.
    """
    paired = [run.bill.against(other.bill) for run, other in _paired(dense, ticket) if run.bill and other.bill]
    bills = paired or compared(dense, ticket)
    found: dict[str, Ratio] = {}
    for key in bills[0].ratios if bills else ():
        parts = [bill.ratios[key] for bill in bills if key in bill.ratios]
        if all(part.low > 0 and part.high > 0 for part in parts):
            low, high = (1 / fmean(1 / side for side in sides) for sides in zip(*((p.low, p.high) for p in parts)))
            found[key] = Ratio(low, high, parts[0].kind)
    if side_by_side([ticket] if dense is None else [ticket, dense]) > 1:
        found.pop("seconds", None)
    return found


def differences(dense: Contender | None, ticket: Contender) -> list[float]:
    """Return points of accuracy above dense, for each pair of runs that `ratios_to_dense` compares."""
    pairs = [(run.final_accuracy, other.final_accuracy) for run, other in _paired(dense, ticket)]
    return [100 * (a - b) for a, b in pairs if a is not None and b is not None]


def mean_accuracy(contender: Contender) -> float | None:
    """Return the mean final accuracy over seeds, 0 to 1."""
    return fmean(contender.accuracies) if contender.accuracies else None


def accuracy_change(dense: Contender | None, ticket: Contender) -> float | None:
    """Return the mean of ``ticket``'s accuracy above that of ``dense``, -1 to 1, over the pairs that both have."""
    points = differences(dense, ticket)
    return fmean(points) / 100 if points else None


def times_less(ratio: Ratio) -> str:
    """Say a ratio dense / ticket in words: ``2.40x less``, ``1.20x MORE``, ``the same``; of a range, its worse end."""
    worse = min(ratio.low, ratio.high)
    if ratio.gain:
        return f"{worse:.2f}{units.TIMES} less"
    if ratio.loss:
        return f"{1 / worse:.2f}{units.TIMES} MORE"
    return "the same"


def percent(accuracy: float) -> str:
    """Write an accuracy, 0 to 1, as ``91.20 %``."""
    return f"{100 * accuracy:.2f} %"


def is_estimated(bill: Bill) -> bool:
    """Tell whether the bill's dense side was not run."""
    return bill.dense is not None and not bill.dense.was_run
