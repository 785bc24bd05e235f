"""Contenders against the dense baseline: which bills compare, by what factor, at what accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from earlybird.cost import units
from earlybird.cost.bill import Bill, Estimated, Ratio
from earlybird.report.read import Contender


def pair(contenders: Sequence[Contender]) -> tuple[Contender | None, Contender | None]:
    """Return the dense baseline and the first ticket."""
    dense = next((c for c in contenders if c.dense and c.bills), None)
    return dense, next((c for c in contenders if not c.dense and c.bills), None)


def compared(dense: Contender | None, contender: Contender) -> list[Bill]:
    """Return a contender's bills, each against the dense run of its seed, or against its own estimate without one."""
    if dense is None or contender is dense:
        return contender.bills
    by_seed = {run.recipe.get("seed"): run.bill for run in dense.runs if run.bill is not None}
    return [
        run.bill.against(by_seed.get(run.recipe.get("seed"), dense.bills[0]))
        for run in contender.runs
        if run.bill is not None
    ]


def billed(contenders: Sequence[Contender]) -> list[tuple[Contender, list[Bill]]]:
    """Return all contenders that have bills, with the bills as they are to be compared."""
    dense, _ = pair(contenders)
    return [(contender, compared(dense, contender)) for contender in contenders if contender.bills]


def ratios_to_dense(dense: Contender | None, ticket: Contender) -> dict[str, Ratio]:
    """Return dense over ticket: one over the mean within seeds of ticket over dense, as `earlybird compare` has it."""
    bills = compared(dense, ticket)
    found: dict[str, Ratio] = {}
    for key in bills[0].ratios if bills else ():
        parts = [bill.ratios[key] for bill in bills if key in bill.ratios]
        if all(part.low > 0 and part.high > 0 for part in parts):
            low, high = (1 / fmean(1 / side for side in sides) for sides in zip(*((p.low, p.high) for p in parts)))
            found[key] = Ratio(low, high, parts[0].kind)
    return found


def differences(dense: Contender, ticket: Contender) -> list[float]:
    """Return points of accuracy above dense, for each seed that both have."""
    theirs = {run.recipe.get("seed"): run.final_accuracy for run in dense.runs}
    pairs = [(run.final_accuracy, theirs.get(run.recipe.get("seed"))) for run in ticket.runs]
    return [100 * (a - b) for a, b in pairs if a is not None and b is not None]


def mean_accuracy(contender: Contender) -> float | None:
    """Return the mean final accuracy over seeds, 0 to 1."""
    return fmean(contender.accuracies) if contender.accuracies else None


def accuracy_change(dense: Contender | None, ticket: Contender) -> float | None:
    """Return the mean accuracy of ``ticket`` above that of ``dense``, -1 to 1."""
    ours, theirs = mean_accuracy(ticket), None if dense is None else mean_accuracy(dense)
    return None if ours is None or theirs is None else ours - theirs


def times_less(ratio: Ratio) -> str:
    """Say a ratio dense / ticket in words: ``2.40x less``, ``1.20x MORE``, ``the same``."""
    if ratio.gain:
        return f"{min(ratio.low, ratio.high):.2f}{units.TIMES} less"
    if ratio.loss:
        return f"{1 / max(ratio.low, ratio.high):.2f}{units.TIMES} MORE"
    return "the same"


def percent(accuracy: float) -> str:
    """Write an accuracy, 0 to 1, as ``91.20 %``."""
    return f"{100 * accuracy:.2f} %"


def is_estimated(bill: Bill) -> bool:
    """Tell whether the bill's dense side was not run."""
    return bill.dense is not None and isinstance(bill.dense.total.seconds, Estimated)
