"""The top of the page: one sentence that says who won, and a tile for each number."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import stdev

from earlybird.cost import units
from earlybird.cost.bill import Ratio
from earlybird.cost.verdict import Verdict, judge, judge_accuracy
from earlybird.report.against import (
    accuracy_change,
    compared,
    differences,
    mean_accuracy,
    pair,
    percent,
    ratios_to_dense,
    times_less,
)
from earlybird.report.costs import COSTS, kind_of, mean_cost
from earlybird.report.read import Contender
from earlybird.report.tables import Tile


def headline(contenders: Sequence[Contender]) -> tuple[str, bool, list[str]]:
    """Return the page's first sentence, whether it tells of a loss, and what must be added."""
    dense, ticket = pair(contenders)
    if ticket is None:
        runs = [run for contender in contenders for run in contender.runs]
        accuracy = runs[0].final_accuracy
        if accuracy is None:
            return "Nothing was evaluated yet", False, ["The run has not come to its first evaluation."]
        return f"Dense training reached {percent(accuracy)}", False, ["There is no ticket to compare with."]
    ratios = ratios_to_dense(dense, ticket)
    drawn = any(run.ticket is not None for run in ticket.runs)
    if not drawn:
        return "No ticket was drawn yet", False, ["The search was still under way when the run was last saved."]
    if "seconds" not in ratios:
        return "The ticket was trained; there is nothing to compare it with", False, []
    time = ratios["seconds"]
    change = accuracy_change(dense, ticket)
    verdict = _verdict(time, dense, ticket)
    accuracy_text = "" if change is None else f" and ended {_change_text(change)}"
    word = "an estimated " if time.kind == "estimated" else ""
    subject = "The ticket lost: it" if verdict.lost else "The ticket"
    if verdict.time < 0:
        text = f"{subject} took {word}{1 / time.high:.2f}{units.TIMES} MORE time than dense{accuracy_text}"
    elif verdict.time > 0:
        text = f"{subject} trained in {word}{time.low:.2f}{units.TIMES} less time than dense{accuracy_text}"
    else:
        text = f"{subject} took the same time as dense{accuracy_text}"
    lead = [f"{str(verdict)[0].upper()}{str(verdict)[1:]}."]
    if change is None and (accuracy := mean_accuracy(ticket)) is not None:
        lead.append(f"It reached {percent(accuracy)}.")
    for remark in dict.fromkeys(r for bill in compared(dense, ticket) for r in bill.remarks):
        lead.append(remark)
    return text, verdict.any_loss, lead


def _verdict(time: Ratio, dense: Contender | None, ticket: Contender) -> Verdict:
    """Judge the ticket as `earlybird compare` does."""
    change = accuracy_change(dense, ticket)
    points = None if change is None else 100 * change
    by_seed = [] if dense is None else differences(dense, ticket)
    std = stdev(by_seed) if len(by_seed) > 1 else None
    return judge(1 / time.low, points, std=std, runs=len(by_seed) or None)


def _change_text(change: float) -> str:
    if abs(change) < 0.00005:
        return "at the same accuracy"
    return f"{abs(100 * change):.2f} points {'above' if change > 0 else 'below'} it in accuracy"


def tiles(contenders: Sequence[Contender]) -> list[Tile]:
    """Return the tiles: accuracy, and one a column of the bill."""
    dense, ticket = pair(contenders)
    subject = ticket or dense
    if subject is None:
        return []
    ratios = ratios_to_dense(dense, ticket) if ticket is not None else {}
    tiles = []
    accuracy = mean_accuracy(subject)
    if accuracy is not None:
        change = accuracy_change(dense, ticket) if ticket is not None else None
        reference = mean_accuracy(dense) if dense is not None else None
        note = f"dense {percent(reference)}, {units.points(change)}" if change is not None and reference else "test set"
        tiles.append(
            Tile(
                "Accuracy",
                "measured",
                percent(accuracy),
                note,
                loss=change is not None and judge_accuracy(100 * change) < 0,
            )
        )
    for cost in COSTS:
        value = mean_cost(subject, cost)
        if value is None:
            continue
        ratio = ratios.get(cost.key)
        if ratio is None:
            tiles.append(Tile(cost.title, kind_of(subject, cost), cost.show(value), ""))
            continue
        reference_value = value * (ratio.low + ratio.high) / 2
        text = times_less(ratio)
        note = f"{cost.show(value)}, dense {'about ' if ratio.kind == 'estimated' else ''}{cost.show(reference_value)}"
        tiles.append(Tile(cost.title, ratio.kind, text, note, loss=ratio.loss))
    return tiles
