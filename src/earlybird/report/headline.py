"""The top of the page: one sentence that says who won, and a tile for each number."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import stdev

from earlybird.cost import units
from earlybird.cost.bill import Ratio
from earlybird.cost.verdict import Verdict, judge, judge_accuracy
from earlybird.objective import is_probe
from earlybird.report.against import (
    accuracy_change,
    compared,
    differences,
    mean_accuracy,
    pair,
    percent,
    ratios_to_dense,
    side_by_side,
    times_less,
    told_side_by_side,
)
from earlybird.report.costs import COSTS, kind_of, mean_cost
from earlybird.report.read import Contender
from earlybird.report.tables import Tile


def headline(contenders: Sequence[Contender]) -> tuple[str, bool, list[str]]:
    """Return the page's first sentence, whether it tells of a loss, and what must be added."""
    dense, ticket = pair(contenders)
    if ticket is None:
        unfinished = next((c for c in contenders if not c.dense), None)
        only = unfinished or contenders[0]
        accuracy = only.runs[0].final_accuracy
        if accuracy is None:
            return "Nothing was evaluated yet", False, ["The run has not come to its first evaluation."]
        if not only.bills:
            drawn_at = only.runs[0].drawn_at
            where = "still searching" if drawn_at is None else f"its ticket was drawn at step {drawn_at:,}"
            where = "dense" if only.dense else where
            return f"The run is under way, at {percent(accuracy)}", False, [f"When last seen it was {where}."]
        return f"Dense training reached {percent(accuracy)}", False, ["There is no ticket to compare with."]
    ratios = ratios_to_dense(dense, ticket)
    draws = any(run.draws for run in ticket.runs)
    name = "The ticket" if draws else ticket.label.capitalize()
    if draws and not any(run.ticket is not None for run in ticket.runs):
        return "No ticket was drawn", False, ["The run ended before its masks agreed, and was dense to the end."]
    if "seconds" not in ratios:
        accuracy = mean_accuracy(ticket)
        reached = "was trained" if accuracy is None else f"reached {percent(accuracy)}"
        if judge := ticket.runs[0].judged_by:
            whose = f"trained an encoder; a {judge} probe on its features" if is_probe(judge) else f"({judge})"
            reached = f"{whose} {reached}"
        if not ratios:
            return f"{name} {reached}; there is nothing to compare it with", False, []
        if side_by_side(contenders) > 1:
            return f"{name} {reached}; its time is not judged", False, [told_side_by_side(contenders)]
        told = [remark for bill in compared(dense, ticket) for remark in bill.remarks]
        return f"{name} {reached}; what dense takes was not measured", False, list(dict.fromkeys(told))
    time = ratios["seconds"]
    change = accuracy_change(dense, ticket)
    verdict = _verdict(time, dense, ticket)
    accuracy_text = "" if change is None else f" and ended {_change_text(change)}"
    word = "an estimated " if time.kind == "estimated" else ""
    subject = f"{name} lost: it" if verdict.lost else name
    if verdict.time < 0:
        text = f"{subject} took {word}{1 / time.high:.2f}{units.TIMES} MORE time than dense{accuracy_text}"
    elif verdict.time > 0:
        text = f"{subject} trained in {word}{time.low:.2f}{units.TIMES} less time than dense{accuracy_text}"
    else:
        text = f"{subject} took the same time as dense{accuracy_text}"
    lead = [f"{str(verdict)[0].upper()}{str(verdict)[1:]}."]
    lengths = [c.runs[0].recipe.get("epochs") for c in (dense, ticket) if c is not None]
    if len(set(lengths)) > 1:
        lead.append(
            f"They did not train equally long: dense {lengths[0]} epochs, {name[0].lower()}{name[1:]} {lengths[1]}."
        )
    others = {c.label for c in contenders if c.task != ticket.task}
    if others:
        lead.append(f"Of another model or other data, and so not compared: {', '.join(sorted(others))}.")
    if change is None and (accuracy := mean_accuracy(ticket)) is not None:
        lead.append(f"It reached {percent(accuracy)}.")
    for remark in dict.fromkeys(r for bill in compared(dense, ticket) for r in bill.remarks):
        lead.append(remark)
    return text, verdict.any_loss, lead


def _verdict(time: Ratio, dense: Contender | None, ticket: Contender) -> Verdict:
    """Judge the ticket as `earlybird compare` does."""
    change = accuracy_change(dense, ticket)
    points = None if change is None else 100 * change
    by_seed = differences(dense, ticket)
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
        dense_accuracy = mean_accuracy(dense) if dense is not None else None
        judge = subject.runs[0].judged_by
        note = "test set" + (f", {judge}{' probe' if is_probe(judge) else ''}" if judge else "")
        if change is not None and dense_accuracy is not None:
            note = f"dense {percent(dense_accuracy)}, {units.points(change)}"
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
        measured = None if dense is None else mean_cost(dense, cost)
        estimate = f"about {cost.show(value * (ratio.low + ratio.high) / 2)}"
        reference = estimate if measured is None else cost.show(measured)
        text = times_less(ratio)
        note = f"{cost.show(value)}, dense {reference}"
        tiles.append(Tile(cost.title, ratio.kind, text, note, loss=ratio.loss))
    return tiles
