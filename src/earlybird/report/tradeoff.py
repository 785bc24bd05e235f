"""A comparison of methods on the page: accuracy against what stays, against seconds and against modelled energy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from earlybird.cost import units
from earlybird.cost.verdict import POINTS, judge_accuracy
from earlybird.report import charts
from earlybird.report.against import percent
from earlybird.report.costs import prefixed
from earlybird.report.tables import Row, Table, Tile

Point = Mapping[str, Any]
"""One of the ``points`` of ``comparison.json``."""


def tradeoff_section(comparisons: Sequence[Sequence[Point]], figures: dict[str, charts.Figure]) -> list[dict[str, Any]]:
    """Return charts and table of each comparison of methods; the figures are added to ``figures``."""
    shown = []
    for index, points in enumerate(comparisons):
        colours = method_colours(points)
        cards = []
        for key, title, kind, note in _AXES:
            if not all(point[key] is not None for point in points):
                continue
            scale, unit = _scale(key, max(point[key]["mean"] for point in points))
            name = f"tradeoff-{key.replace('_', '-')}-{index}"
            series = {
                method: [_place(point, key, scale) for point in points if point["method"] == method]
                for method in colours
            }
            dense = next((_place(point, key, scale) for point in points if not point["method"]), None)
            shares = key == "density"
            figures[name] = charts.tradeoff(series, colours, dense, unit=unit, title=title.lower(), shares=shares)
            cards.append({"id": name, "title": title, "kind": kind, "note": note})
        shown.append(
            {"charts": cards, "legend": list(colours.items()), "table": _table(points), "notes": _notes(points)}
        )
    return shown


_AXES = (
    ("density", "What stays", "counted", "Parameters that are not zero at the end, over all of the dense network's."),
    ("seconds", "Time", "measured", "Seconds of the whole run; in rounds, of all rounds so far."),
    ("modelled_joules", "Energy", "modelled", "From counted work, on hardware that skips zeros; in rounds, so far."),
)


def method_colours(points: Sequence[Point]) -> dict[str, str]:
    """Return a colour for each method, in the order of the comparison."""
    methods = dict.fromkeys(point["method"] for point in points if point["method"])
    return {method: charts.TICKET_COLOURS[i % len(charts.TICKET_COLOURS)] for i, method in enumerate(methods)}


def _place(point: Point, key: str, scale: float) -> charts.Place:
    x, y = point[key], point["accuracy"]
    return charts.Place(
        name(point), x["mean"] / scale, 100 * y["mean"], (x["std"] or 0) / scale, 100 * (y["std"] or 0), y["n"]
    )


def name(point: Point) -> str:
    """Return what a point is called: its contender, and its round where it has one."""
    return point["contender"] if point["round"] is None else f"{point['contender']}, round {point['round']}"


def _scale(key: str, largest: float) -> tuple[float, str]:
    if key == "density":
        return 0.01, "%"
    if key == "seconds":
        steps = ((3600.0, 7200.0, "h"), (60.0, 180.0, "min"), (1.0, 0.0, "s"))
        return next((factor, unit) for factor, least, unit in steps if largest >= least)
    return prefixed("J", largest)


def _notes(points: Sequence[Point]) -> list[str]:
    notes = []
    if any(point["share_of"] == "weights" for point in points):
        notes.append("Where single weights are masked, the zeros are multiplied all the same: no time is saved here.")
    if any(point["round"] is not None for point in points):
        notes.append("A run in rounds has a point for each: it cost what the run had spent by the end of that round.")
    jobs = max(point["side_by_side"] for point in points)
    if jobs > 1:
        notes.append(f"Up to {jobs} runs went side by side: their seconds do not compare with those of a lone run.")
    if any(len(point["seeds"]) > 1 for point in points):
        notes.append("Bars, and the band of dense, are a standard deviation over the seeds to either side.")
    return notes


def _table(points: Sequence[Point]) -> Table:
    rounds = any(point["round"] is not None for point in points)
    rows = []
    for point in points:
        alone = point["round_costs"] or dict.fromkeys(("seconds", "modelled_joules"))
        cells = [
            name(point),
            "" if point["kept"] is None else f"{point['kept']['mean']:.2%} of {point['share_of']}",
            _mean(point["density"], lambda value: f"{value:.2%}"),
            _spread(point["accuracy"]),
            "" if not point["method"] or point["accuracy_points"] is None else _points(point),
            _mean(point["seconds"], units.seconds),
            _mean(point["macs"], lambda value: units.count(value, "MAC")),
            _mean(point["modelled_joules"], units.joules),
            _mean(point["peak_bytes"], units.size),
            str(len(point["seeds"])),
        ]
        if rounds:
            cells[6:6] = [_mean(alone["seconds"], units.seconds, gap="")]
            cells[9:9] = [_mean(alone["modelled_joules"], units.joules, gap="")]
        rows.append(Row(cells))
    head = ["", "kept", "density", "accuracy", "against dense", "time", "MACs", "energy", "peak memory", "seeds"]
    if rounds:
        head[6:6] = ["of the round"]
        head[9:9] = ["of the round"]
    note = "Means over the seeds; of accuracy, also the lowest and the highest. Time and peak memory are measured, "
    note += "MACs counted (zeros are multiplied, too), energy is modelled."
    return Table("Every point", head, rows, note=note)


def _points(point: Point) -> str:
    return units.points(point["accuracy_points"]["mean"] / 100)


def _mean(values: Mapping[str, Any] | None, show: Callable[[float], str], *, gap: str = "not known") -> str:
    return gap if values is None else show(values["mean"])


def _spread(values: Mapping[str, Any]) -> str:
    low, mean, high = (percent(values[key]) for key in ("low", "mean", "high"))
    return mean if values["n"] == 1 else f"{mean} ({low} to {high})"


def _is_smaller(point: Point) -> bool:
    """Whether less than the whole network is left, to the precision printed."""
    return point["density"] is None or round(point["density"]["mean"], 3) < 1


def _order(point: Point, key: str) -> tuple[float, float]:
    """Order points by a number to three digits; of equals, the more accurate one is first."""
    return float(f"{point[key]['mean']:.3g}"), -point["accuracy_points"]["mean"]


def headline(points: Sequence[Point]) -> tuple[str, bool, list[str]]:
    """Return the first sentence about a comparison of methods, whether it tells of a loss, and what must be added."""
    tickets = _compared(points)
    if not tickets:
        return "Nothing can be compared with dense yet", False, []
    good = [point for point in tickets if judge_accuracy(point["accuracy_points"]["mean"]) >= 0]
    seeds = min(len(point["seeds"]) for point in tickets)
    lead = ["Fewer than three seeds: chance is not told apart."] if seeds < 3 else []
    small = [point for point in good if point["density"] is not None]
    if not small:
        best = max(tickets, key=lambda point: point["accuracy_points"]["mean"])
        return (
            f"No smaller network stays within {POINTS} points of dense",
            True,
            [f"The nearest is {name(best)}, at {_points(best)}.", *lead],
        )
    best = min(small, key=lambda point: _order(point, "density"))
    lead = [f"{len(good)} of {len(tickets)} points are within {POINTS} points of dense, or above it.", *lead]
    points_above = round(best["accuracy_points"]["mean"], 2)
    where = f"{abs(points_above):.2f} points {'above' if points_above > 0 else 'below'} dense"
    sentence = f"{name(best)} keeps {best['density']['mean']:.2%} of the network, "
    return sentence + (where if points_above else "as accurate as dense"), False, lead


def _compared(points: Sequence[Point]) -> list[Point]:
    """Return the points of smaller networks that have dense runs to compare with."""
    return [point for point in points if point["method"] and point["accuracy_points"] and _is_smaller(point)]


def tiles(points: Sequence[Point]) -> list[Tile]:
    """Return the best in what stays, in time and in modelled energy, of what is within `POINTS` of dense."""
    dense = next((point for point in points if not point["method"]), None)
    good = [point for point in _compared(points) if judge_accuracy(point["accuracy_points"]["mean"]) >= 0]
    if dense is None or not good:
        return []
    found = [Tile("Accuracy of dense", "measured", percent(dense["accuracy"]["mean"]), "test set")]
    alone = all(point["side_by_side"] == 1 for point in points)
    for key, title, kind in (
        ("density", "Smallest", "counted"),
        ("seconds", "Fastest", "measured"),
        ("modelled_joules", "Least energy", "modelled"),
    ):
        known = [point for point in good if point[key] is not None]
        if not known or dense[key] is None or (key == "seconds" and not alone):
            continue
        if key == "seconds":
            known = [_as_slow_as(dense, point) for point in known]
        best = min(known, key=lambda point, key=key: _order(point, key))  # type: ignore[misc]
        share = best[key]["mean"] / dense[key]["mean"]
        loss = round(share, 2) > 1
        value = f"{share:.1%} of dense" if key == "density" else _times(share)
        found.append(Tile(title, kind, value, f"{name(best)}, {_points(best)}", loss=loss))
    return found


def _as_slow_as(dense: Point, point: Point) -> Point:
    """Return a point of masked weights at no less than the time of dense: masks gain none, whatever the clock said."""
    if point["share_of"] != "weights" or point["seconds"]["mean"] >= dense["seconds"]["mean"]:
        return point
    return {**point, "seconds": dense["seconds"]}


def _times(share: float) -> str:
    if round(share, 2) == 1:
        return "the same"
    return f"{1 / share:.2f}{units.TIMES} less" if share < 1 else f"{share:.2f}{units.TIMES} MORE"
