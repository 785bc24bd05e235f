"""What the methods did: their numbers over the steps, the inputs that stood out, and the energy of each operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from earlybird.cost.energy import picojoules
from earlybird.errors import InputError
from earlybird.report import charts
from earlybird.report.costs import prefixed
from earlybird.report.read import Contender, RunRecord
from earlybird.traces import Trace

SHOWN = 12
_LINES = 6  # more of them are told apart better by the rows of a map


def trace_section(runs: Sequence[RunRecord], figures: dict[str, charts.Figure]) -> dict[str, Any]:
    """Return the charts of what methods tell; the figures are added to ``figures``."""
    shown = []
    told = [
        (run, name.replace("_", " "), Trace.from_json(trace))
        for run in runs
        for name, traces in run.traces.items()
        for trace in traces
    ]
    told = [(run, name, trace) for run, name, trace in told if any(trace.series.values())]
    for index, (run, name, trace) in enumerate(told[:SHOWN]):
        key = f"trace-{index}"
        draw = charts.trace_lines if len(trace.series) <= _LINES else charts.trace_map
        figures[key] = draw(trace.series, trace.unit, hold=trace.steps_hold)
        shown.append({"id": key, "title": f"{name}: {trace.title}", "run": run.path.name, "note": trace.note})
    left = len(told) - len(shown)
    return {"traces": shown, "traces_left_out": f"{left} more are in the runs' traces.json." if left else ""}


def input_section(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return the inputs on which methods spent the least and the most."""
    return [
        {
            "title": f"{run.path.name}, {name.replace('_', ' ')}",
            "note": f"Blocks executed per image of the last evaluation; {ranking['mean']:.3g} in the mean.",
            "rows": [("fewest", ranking["least"]), ("most", ranking["most"])],
        }
        for run in runs
        for name, ranking in run.inputs.items()
    ]


def operation_section(contenders: Sequence[Contender], figures: dict[str, charts.Figure]) -> dict[str, Any] | None:
    """Return the bars of modelled energy by operation, where runs have more than those of one floating point.

    Each bar is the first seed's; data movement is taken in the middle of the DRAM price range.
    """
    rows: dict[str, dict[str, float]] = {}
    for contender in contenders:
        for bill in contender.bills[:1]:
            for label, one in ((contender.label, bill), ("dense (estimate)", bill.dense)):
                if one is None or one.total.operations is None or label in rows:
                    continue
                try:
                    priced = {name: 1e-12 * amount * picojoules(name) for name, amount in one.total.operations.items()}
                except InputError:  # a bill of operations that this version has no price for
                    continue
                modelled = one.total.modelled_joules
                if modelled is not None:
                    moved = (modelled.low + modelled.high) / 2 - sum(priced.values())
                    priced["data movement"] = max(moved, 0.0)
                rows[label] = priced
    if not rows or all(len(row) <= 3 for row in rows.values()):
        return None
    scale, unit = prefixed("J", max(sum(row.values()) for row in rows.values()))
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    figures["operations"] = charts.operation_bars(
        {label: {name: value / scale for name, value in row.items()} for label, row in rows.items()}, names, unit
    )
    return {"id": "operations", "legend": [(name, charts.OPERATION_COLOURS[i % 8]) for i, name in enumerate(names)]}
