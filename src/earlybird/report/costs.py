"""The bill on the page: bars by phase, every number in tables, contenders side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from earlybird.cost import units
from earlybird.cost.bill import Bill, Estimated, Modelled, Quantity, Spending
from earlybird.report import charts
from earlybird.report.against import (
    accuracy_change,
    billed,
    is_estimated,
    pair,
    percent,
    ratios_to_dense,
    times_less,
    told_side_by_side,
)
from earlybird.report.read import Contender
from earlybird.report.tables import Row, Table


@dataclass(frozen=True)
class Cost:
    """One column of the bill: how to read it off a row, and how to print it."""

    key: str
    title: str
    note: str
    show: Callable[[float], str]

    def of(self, spending: Spending) -> Quantity | None:
        """Return this column of ``spending``."""
        found: Quantity | None = getattr(spending, self.key)
        return found


COSTS = (
    Cost("seconds", "Time", "Wall clock of the whole run.", units.seconds),
    Cost("macs", "MACs", "Multiply-accumulates of every image, forward and backward.", lambda v: units.count(v, "MAC")),
    Cost("joules", "Energy", "Read from a meter.", units.joules),
    Cost("modelled_joules", "Energy", "From counted work; middle of the DRAM price range.", units.joules),
    Cost(
        "peak_bytes",
        "Memory",
        "Peak of the process, or of a GPU's allocator; highest of all phases.",
        units.size,
    ),
)


def _level(quantity: Quantity | None) -> float | None:
    if quantity is None:
        return None
    return (quantity.low + quantity.high) / 2 if isinstance(quantity, Modelled) else quantity.value


def mean_cost(contender: Contender, cost: Cost) -> float | None:
    """Return the mean of one column over a contender's runs, or None where one lacks it."""
    levels = [_level(cost.of(bill.total)) for bill in contender.bills]
    known = [level for level in levels if level is not None]
    return fmean(known) if known and len(known) == len(levels) else None


def kind_of(contender: Contender, cost: Cost) -> str:
    """Return what kind of number a column holds: measured, estimated, counted or modelled."""
    quantity = cost.of(contender.bills[0].total)
    return "counted" if quantity is None else type(quantity).__name__.lower()


def bill_section(contenders: Sequence[Contender], figures: dict[str, charts.Figure]) -> dict[str, Any]:
    """Return the bill's bars and tables; the figures are added to ``figures``."""
    rows = billed(contenders)
    bars: list[tuple[str, list[Bill]]] = [(contender.label, bills) for contender, bills in rows]
    if not any(contender.dense for contender, _ in rows):
        estimates = [bill.dense for _, bills in rows for bill in bills if bill.dense is not None]
        if estimates:
            bars.insert(0, ("dense (estimate)", estimates[:1]))
    shown = []
    for cost in COSTS:
        totals = {label: _mean_phases(bills, cost) for label, bills in bars}
        totals = {label: phases for label, phases in totals.items() if phases}
        if not totals:
            continue
        heights = [sum(phases.values()) for phases in totals.values()]
        scale, unit = _scale(cost, max(heights))
        scaled = {label: {phase: value / scale for phase, value in phases.items()} for label, phases in totals.items()}
        name = f"bill-{cost.key}"
        figures[name] = charts.phase_bars(scaled, unit=unit, texts=[cost.show(height) for height in heights])
        shown.append({"id": name, "title": cost.title, "kind": kind_of(rows[0][0], cost), "note": cost.note})
    seeds = max((len(bills) for _, bills in bars), default=0)
    notes = [f"Bars are means over {seeds} seeds." if seeds > 1 else "", told_side_by_side(contenders)]
    phases = [p for p in charts.PHASES if any(p in bill.phases for _, bills in bars for bill in bills)]
    return {
        "bill_charts": shown,
        "bill_note": " ".join(filter(None, notes)),
        "phase_legend": [(phase, f"var(--phase-{phase})") for phase in phases],
        "bill_tables": [
            _bill_table(run.path.name, bill)
            for contender, bills in rows
            for run, bill in zip([run for run in contender.runs if run.bill is not None], bills)
        ],
    }


def _bill_table(name: str, bill: Bill) -> Table:
    columns: dict[str, Callable[[float], str]] = {
        "seconds": units.seconds,
        "steps": lambda value: f"{value:,.0f}",
        "images": lambda value: f"{value:,.0f}",
        "macs": lambda value: units.count(value, "MAC"),
        "bit_macs": lambda value: units.count(value, "MAC"),
        "peak_bytes": units.size,
        "joules": units.joules,
        "modelled_joules": units.joules,
    }
    head = ["phase", "time", "steps", "images", "MACs", "bit-MACs", "peak memory", "energy, meter", "energy, modelled"]
    rows = [(phase, row, "") for phase, row in bill.phases.items()] + [("total", bill.total, "total")]
    if bill.dense is not None:
        rows.append(("dense, estimated" if is_estimated(bill) else "dense", bill.dense.total, ""))
    cells = [
        Row([title, *(_cell(getattr(row, key), show) for key, show in columns.items())], style)
        for title, row, style in rows
    ]
    if bill.dense is not None:
        ratios = [times_less(bill.ratios[key]) if key in bill.ratios else "" for key in columns]
        cells.append(Row(["against dense", *ratios], "total"))
    notes = [
        "Time and peak memory are measured; steps, images and MACs are counted. "
        "Bit-MACs weigh a MAC by the share of 32 bits of both operands."
    ]
    if bill.total.modelled_joules is not None:
        notes.append(f"Modelled energy: {bill.total.modelled_joules.source}, low and high price of a DRAM access.")
    return Table(f"{name}: every number", head, cells, notes=notes)


def _cell(quantity: Quantity | None, show: Callable[[float], str]) -> str:
    if quantity is None:
        return "not measured"
    if isinstance(quantity, Modelled):
        return f"{show(quantity.low)} to {show(quantity.high)}"
    return f"about {show(quantity.value)}" if isinstance(quantity, Estimated) else show(quantity.value)


def _mean_phases(bills: Sequence[Bill], cost: Cost) -> dict[str, float]:
    names = dict.fromkeys(name for bill in bills for name in bill.phases)
    found = {}
    for name in names:
        levels = [_level(cost.of(bill.phases[name])) for bill in bills if name in bill.phases]
        if levels and all(level is not None for level in levels):
            found[name] = sum(level or 0.0 for level in levels) / len(bills)
    if cost.key == "peak_bytes" and found:
        return {"peak": max(found.values())}  # peaks do not add up
    return {name: value for name, value in found.items() if value}


def _scale(cost: Cost, largest: float) -> tuple[float, str]:
    """Return what to divide by and the unit, so that an axis has short numbers."""
    if cost.key == "seconds":
        steps = ((3600.0, 7200.0, "h"), (60.0, 180.0, "min"), (1.0, 0.0, "s"))
        return next((factor, unit) for factor, least, unit in steps if largest >= least)
    if cost.key == "peak_bytes":
        return (2.0**30, "GiB") if largest >= 2**30 else (2.0**20, "MiB")
    return prefixed("MAC" if cost.key == "macs" else "J", largest)


def prefixed(unit: str, largest: float) -> tuple[float, str]:
    """Return what to divide by and the unit with its prefix, so that an axis up to ``largest`` has short numbers."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= factor:
            return factor, prefix + unit
    return 1.0, unit


def contender_table(contenders: Sequence[Contender]) -> Table | None:
    """Return one line a contender, or None where there is nothing to compare."""
    billed = [contender for contender in contenders if contender.bills]
    if len(billed) < 2:
        return None
    dense, _ = pair(contenders)
    rows = []
    for contender in billed:
        ratios = {} if contender is dense else ratios_to_dense(dense, contender)
        change = None if contender is dense else accuracy_change(dense, contender)
        rows.append(
            Row(
                [
                    contender.label,
                    _spread(contender.accuracies, percent),
                    "" if change is None else units.points(change),
                    _spread([_level(bill.total.seconds) or 0.0 for bill in contender.bills], units.seconds),
                    times_less(ratios["seconds"]) if "seconds" in ratios else "",
                    times_less(ratios["macs"]) if "macs" in ratios else "",
                    times_less(ratios["modelled_joules"]) if "modelled_joules" in ratios else "",
                    str(len(contender.runs)),
                ]
            )
        )
    head = ["", "accuracy", "against dense", "time", "against dense", "MACs", "energy, modelled", "seeds"]
    note = (
        "Less and MORE are against dense; time is that of the whole run, evaluation included. "
        "Several seeds show as their mean, with the lowest and the highest."
    )
    return Table("Contenders side by side", head, rows, note=note)


def _spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    if not values:
        return "not measured"
    text = show(fmean(values))
    return text if len(values) == 1 else f"{text} ({show(min(values))} to {show(max(values))})"
