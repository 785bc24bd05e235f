"""Turn records into what the page shows: sentences, tiles, tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from earlybird.cost.bill import Bill, Estimated, Modelled, Quantity, Ratio, Spending
from earlybird.cost.verdict import Verdict, judge, judge_accuracy
from earlybird.report import charts, units
from earlybird.report.read import Contender, RunRecord

MATRICES = 6
"""At most this many mask-distance matrices and channel charts are shown; the rest is named."""


@dataclass(frozen=True)
class Row:
    """One line of a table; the first cell is its heading."""

    cells: list[str]
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a caption."""

    caption: str
    head: list[str]
    rows: list[Row]
    note: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tile:
    """One number in large type."""

    name: str
    kind: str
    value: str
    note: str
    loss: bool = False


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
    Cost("peak_bytes", "Memory", "Peak of the process, highest of all phases.", units.size),
)
_BY_KEY = {cost.key: cost for cost in COSTS}


def compose(contenders: Sequence[Contender]) -> tuple[dict[str, Any], dict[str, charts.Figure]]:
    """Return what the template needs, and the figures by the id of their element."""
    figures: dict[str, charts.Figure] = {}
    runs = [run for contender in contenders for run in contender.runs]
    colours = _colours(contenders)
    headline, loss, lead = _headline(contenders)
    subject = " on ".join(str(runs[0].recipe[key]) for key in ("model", "data") if key in runs[0].recipe)
    page = {
        "title": f"earlybird: {subject}" if subject else "earlybird report",
        "subject": subject,
        "headline": headline,
        "loss": loss,
        "lead": lead,
        "tiles": _tiles(contenders),
        "has_estimate": any(_estimated(bill) for _, bills in _billed(contenders) for bill in bills),
        **_bill_section(contenders, figures),
        "contenders": _contender_table(contenders),
        "accuracy": _accuracy_section(contenders, colours, figures),
        **_distance_section(runs, figures),
        "channels": _channel_section(runs, figures),
        "tuned": _tuned_section(runs),
        **_environment_section(runs),
        "recipes": [{"title": run.path.name, "text": run.recipe_text} for run in runs],
    }
    return page, figures


# ---- the verdict ----


def _pair(contenders: Sequence[Contender]) -> tuple[Contender | None, Contender | None]:
    """Return the dense baseline and the first ticket."""
    dense = next((c for c in contenders if c.dense and c.bills), None)
    return dense, next((c for c in contenders if not c.dense and c.bills), None)


def _headline(contenders: Sequence[Contender]) -> tuple[str, bool, list[str]]:
    """Return the page's first sentence, whether it tells of a loss, and what must be added."""
    dense, ticket = _pair(contenders)
    if ticket is None:
        runs = [run for contender in contenders for run in contender.runs]
        accuracy = runs[0].final_accuracy
        if accuracy is None:
            return "Nothing was evaluated yet", False, ["The run has not come to its first evaluation."]
        return f"Dense training reached {_percent(accuracy)}", False, ["There is no ticket to compare with."]
    ratios = _ratios(dense, ticket)
    drawn = any(run.ticket is not None for run in ticket.runs)
    if not drawn:
        return "No ticket was drawn yet", False, ["The search was still under way when the run was last saved."]
    if "seconds" not in ratios:
        return "The ticket was trained; there is nothing to compare it with", False, []
    time = ratios["seconds"]
    change = _accuracy_change(dense, ticket)
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
    if change is None and (accuracy := _accuracy(ticket)) is not None:
        lead.append(f"It reached {_percent(accuracy)}.")
    for remark in dict.fromkeys(r for bill in _compared(dense, ticket) for r in bill.remarks):
        lead.append(remark)
    return text, verdict.any_loss, lead


def _verdict(time: Ratio, dense: Contender | None, ticket: Contender) -> Verdict:
    """Judge the ticket as `earlybird compare` does."""
    change = _accuracy_change(dense, ticket)
    points = None if change is None else 100 * change
    differences = [] if dense is None else _differences(dense, ticket)
    std = stdev(differences) if len(differences) > 1 else None
    return judge(1 / time.low, points, std=std, runs=len(differences) or None)


def _differences(dense: Contender, ticket: Contender) -> list[float]:
    """Return points of accuracy above dense, for each seed that both have."""
    theirs = {run.recipe.get("seed"): run.final_accuracy for run in dense.runs}
    pairs = [(run.final_accuracy, theirs.get(run.recipe.get("seed"))) for run in ticket.runs]
    return [100 * (a - b) for a, b in pairs if a is not None and b is not None]


def _change_text(change: float) -> str:
    if abs(change) < 0.00005:
        return "at the same accuracy"
    return f"{abs(100 * change):.2f} points {'above' if change > 0 else 'below'} it in accuracy"


def _compared(dense: Contender | None, contender: Contender) -> list[Bill]:
    """Return a contender's bills, each against the dense run of its seed, or against its own estimate without one."""
    if dense is None or contender is dense:
        return contender.bills
    by_seed = {run.recipe.get("seed"): run.bill for run in dense.runs if run.bill is not None}
    return [
        run.bill.against(by_seed.get(run.recipe.get("seed"), dense.bills[0]))
        for run in contender.runs
        if run.bill is not None
    ]


def _billed(contenders: Sequence[Contender]) -> list[tuple[Contender, list[Bill]]]:
    """Return all contenders that have bills, with the bills as they are to be compared."""
    dense, _ = _pair(contenders)
    return [(contender, _compared(dense, contender)) for contender in contenders if contender.bills]


def _ratios(dense: Contender | None, ticket: Contender) -> dict[str, Ratio]:
    """Return dense over ticket: one over the mean within seeds of ticket over dense, as `earlybird compare` has it."""
    bills = _compared(dense, ticket)
    found: dict[str, Ratio] = {}
    for key in bills[0].ratios if bills else ():
        parts = [bill.ratios[key] for bill in bills if key in bill.ratios]
        if all(part.low > 0 and part.high > 0 for part in parts):
            low, high = (1 / fmean(1 / side for side in sides) for sides in zip(*((p.low, p.high) for p in parts)))
            found[key] = Ratio(low, high, parts[0].kind)
    return found


def _tiles(contenders: Sequence[Contender]) -> list[Tile]:
    dense, ticket = _pair(contenders)
    subject = ticket or dense
    if subject is None:
        return []
    ratios = _ratios(dense, ticket) if ticket is not None else {}
    tiles = []
    accuracy = _accuracy(subject)
    if accuracy is not None:
        change = _accuracy_change(dense, ticket) if ticket is not None else None
        reference = _accuracy(dense) if dense is not None else None
        note = (
            f"dense {_percent(reference)}, {units.points(change)}" if change is not None and reference else "test set"
        )
        tiles.append(
            Tile(
                "Accuracy",
                "measured",
                _percent(accuracy),
                note,
                loss=change is not None and judge_accuracy(100 * change) < 0,
            )
        )
    for cost in COSTS:
        value = _mean(subject, cost)
        if value is None:
            continue
        ratio = ratios.get(cost.key)
        if ratio is None:
            tiles.append(Tile(cost.title, _kind(subject, cost), cost.show(value), ""))
            continue
        reference_value = value * (ratio.low + ratio.high) / 2
        text = _times_text(ratio)
        note = f"{cost.show(value)}, dense {'about ' if ratio.kind == 'estimated' else ''}{cost.show(reference_value)}"
        tiles.append(Tile(cost.title, ratio.kind, text, note, loss=ratio.loss))
    return tiles


def _times_text(ratio: Ratio) -> str:
    if ratio.gain:
        return f"{min(ratio.low, ratio.high):.2f}{units.TIMES} less"
    if ratio.loss:
        return f"{1 / max(ratio.low, ratio.high):.2f}{units.TIMES} MORE"
    return "the same"


# ---- the bill ----


def _bill_section(contenders: Sequence[Contender], figures: dict[str, charts.Figure]) -> dict[str, Any]:
    billed = _billed(contenders)
    bars: list[tuple[str, list[Bill]]] = [(contender.label, bills) for contender, bills in billed]
    if not any(contender.dense for contender, _ in billed):
        estimates = [bill.dense for _, bills in billed for bill in bills if bill.dense is not None]
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
        shown.append({"id": name, "title": cost.title, "kind": _kind(billed[0][0], cost), "note": cost.note})
    phases = [p for p in charts.PHASES if any(p in bill.phases for _, bills in bars for bill in bills)]
    seeds = max((len(bills) for _, bills in bars), default=0)
    return {
        "bill_charts": shown,
        "bill_note": f"Bars are means over {seeds} seeds." if seeds > 1 else "",
        "phase_legend": [(phase, f"var(--phase-{phase})") for phase in phases],
        "bill_tables": [
            _bill_table(run.path.name, bill)
            for contender, bills in billed
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
        rows.append(("dense, estimated" if _estimated(bill) else "dense", bill.dense.total, ""))
    cells = [
        Row([title, *(_cell(getattr(row, key), show) for key, show in columns.items())], style)
        for title, row, style in rows
    ]
    if bill.dense is not None:
        ratios = [_times_text(bill.ratios[key]) if key in bill.ratios else "" for key in columns]
        cells.append(Row(["against dense", *ratios], "total"))
    notes = [
        "Time and peak memory are measured; steps, images and MACs are counted. "
        "Bit-MACs weigh a MAC by (bits/32) squared."
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
    unit = "MAC" if cost.key == "macs" else "J"
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= factor:
            return factor, prefix + unit
    return 1.0, unit


# ---- who won ----


def _contender_table(contenders: Sequence[Contender]) -> Table | None:
    billed = [contender for contender in contenders if contender.bills]
    if len(billed) < 2:
        return None
    dense, _ = _pair(contenders)
    rows = []
    for contender in billed:
        ratios = {} if contender is dense else _ratios(dense, contender)
        change = None if contender is dense else _accuracy_change(dense, contender)
        rows.append(
            Row(
                [
                    contender.label,
                    _spread(contender.accuracies, _percent),
                    "" if change is None else units.points(change),
                    _spread([bill.total.seconds.value for bill in contender.bills], units.seconds),
                    _times_text(ratios["seconds"]) if "seconds" in ratios else "",
                    _times_text(ratios["macs"]) if "macs" in ratios else "",
                    _times_text(ratios["modelled_joules"]) if "modelled_joules" in ratios else "",
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


# ---- accuracy ----


def _accuracy_section(
    contenders: Sequence[Contender], colours: dict[str, str], figures: dict[str, charts.Figure]
) -> dict[str, Any] | None:
    curves: list[tuple[str, str, list[tuple[float, float]], tuple[float, float] | None]] = []
    rows: list[Row] = []
    for contender in contenders:
        for run in contender.runs:
            if not run.accuracy:
                continue
            curves.append((contender.label, colours[contender.label], run.accuracy, _draw_point(run)))
            rows.extend(
                Row([run.path.name, units.seconds(seconds), _percent(accuracy)])
                for seconds, accuracy in run.accuracy[-5:]
            )
    if not curves:
        return None
    figures["accuracy-curves"] = charts.accuracy_curves(curves)
    return {
        "id": "accuracy-curves",
        "legend": [(label, colour) for label, colour in colours.items() if any(label == curve[0] for curve in curves)],
        "table": Table("Last evaluations", ["run", "seconds of the run", "accuracy"], rows),
    }


def _draw_point(run: RunRecord) -> tuple[float, float] | None:
    """Return when the ticket was drawn and the accuracy on the line at that moment; None if that is not known."""
    drawn_at = run.drawn_at
    if drawn_at is None:
        return None
    rows = [row for row in run.metrics if row.get("accuracy") is not None]
    before = [(0, 0.0, None)] + [(r["step"], r["seconds"], r["accuracy"]) for r in rows if r["step"] <= drawn_at]
    after = [(r["step"], r["seconds"], r["accuracy"]) for r in rows if r["step"] > drawn_at]
    step, seconds, accuracy = before[-1]
    if not after:
        return (seconds, accuracy) if accuracy is not None else None
    share = (drawn_at - step) / (after[0][0] - step)
    here = after[0][2] if accuracy is None else accuracy + share * (after[0][2] - accuracy)
    return seconds + share * (after[0][1] - seconds), here


# ---- masks and channels ----


def _distance_section(runs: Sequence[RunRecord], figures: dict[str, charts.Figure]) -> dict[str, Any]:
    looked = [run for run in runs if len(run.history.get("matrix") or []) > 1]
    shown = []
    for index, run in enumerate(looked[:MATRICES]):
        steps, matrix = run.history["steps"], run.history["matrix"]
        entries = {
            entry["step"]: entry for entry in run.history.get("history", []) if entry["keep"] == _first_keep(run)
        }
        epochs = [float(entries[step]["epoch"]) for step in steps if entries.get(step, {}).get("epoch") is not None]
        unit = "epoch" if len(epochs) == len(steps) else "step"
        places = epochs if unit == "epoch" else [float(step) for step in steps]
        window = _window(run, steps)
        figures[f"matrix-{index}"] = charts.distance_matrix(places, unit, matrix, window)
        note = f"{len(steps)} looks; " + (
            "not drawn yet" if run.drawn_at is None else f"drawn at step {run.drawn_at:,}"
        )
        if run.ticket is not None and run.ticket.provenance.get("reason") == "deadline":
            note += " by the deadline, before the masks had settled"
        shown.append(
            {"id": f"matrix-{index}", "title": run.path.name, "note": note + ".", "framed": window is not None}
        )
        largest = [max(entries[step]["distances"], default=None) if step in entries else None for step in steps]
        tolerance = run.recipe.get("tolerance")
        if any(value is not None for value in largest):
            figures[f"settling-{index}"] = charts.settling(places, unit, largest, tolerance)
            limit = "" if tolerance is None else f"; the ticket is drawn once it is at most {tolerance:g}"
            note = f"Largest distance of the newest mask to the {run.recipe.get('window', 5) - 1} before it{limit}."
            shown.append({"id": f"settling-{index}", "title": "Settling", "note": note, "framed": False})
    left = [run.path.name for run in looked[MATRICES:]]
    return {"distances": shown, "distances_left_out": f"Not shown: {', '.join(left)}." if left else ""}


def _first_keep(run: RunRecord) -> Any:
    keep = run.recipe.get("keep")
    return keep[0] if isinstance(keep, list) else keep


def _window(run: RunRecord, steps: Sequence[int]) -> tuple[int, int] | None:
    drawn_at = run.drawn_at
    if (
        drawn_at is None
        or drawn_at not in steps
        or run.ticket is None
        or run.ticket.provenance.get("reason") != "agreement"
    ):
        return None
    last = list(steps).index(drawn_at)
    size = int(run.recipe.get("window", 5))
    return max(0, last - size + 1), last


def _channel_section(runs: Sequence[RunRecord], figures: dict[str, charts.Figure]) -> list[dict[str, Any]]:
    shown = []
    for index, run in enumerate([run for run in runs if run.ticket is not None][:MATRICES]):
        assert run.ticket is not None
        layers = {layer: (total, kept) for layer, (kept, total) in run.ticket.widths.items()}
        name = f"channels-{index}"
        figures[name] = charts.channel_bars(layers)
        note = f"{run.ticket.keep:.0%} of the channels stayed"
        before, after = run.change.get("parameters_before"), run.change.get("parameters_after")
        if before and after:
            note += f"; {units.count(before)} weights became {units.count(after)} ({after / before:.0%})"
        extra = sum(len(channels) for channels in run.change.get("rounded", {}).values())
        if extra:
            note += f"; {extra} of them only because widths were rounded"
        rows = [
            Row([layer, f"{before:,}", f"{after:,}", f"{after / before:.0%}"])
            for layer, (before, after) in layers.items()
        ]
        table = Table(f"{run.path.name}: channels", ["layer", "before", "after", "kept"], rows)
        shown.append({"id": name, "title": run.path.name, "note": note + ".", "table": table})
    return shown


# ---- tuning and environment ----


def _tuned_section(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    shown = []
    for run in runs:
        if not run.tune:
            continue
        choice = run.tune.get("choice", {})
        rows = [
            Row(
                [
                    _setting(candidate),
                    "not timed" if candidate.get("step_s") is None else f"{1e3 * candidate['step_s']:.3g} ms",
                    str(candidate.get("steps_timed", "")),
                    candidate.get("failure", ""),
                ],
                "chosen" if all(candidate.get(key) == choice.get(key) for key in _SETTINGS) else "",
            )
            for candidate in run.tune.get("candidates", [])
        ]
        table = (
            Table(f"{run.path.name}: timed steps", ["candidate", "fastest step", "steps timed", ""], rows)
            if rows
            else None
        )
        seconds = run.tune.get("seconds")
        took = f" Timing took {units.seconds(seconds)}." if seconds and rows else ""
        reason = str(run.tune.get("reason", "")).rstrip(".")
        shown.append(
            {"title": f"{run.path.name}: {_setting(choice)}", "reason": f"Why: {reason}.{took}", "table": table}
        )
    return shown


_SETTINGS = ("precision", "channels_last", "compile")


def _setting(choice: dict[str, Any]) -> str:
    words = [str(choice.get("precision", "?")), "channels_last" if choice.get("channels_last") else "contiguous"]
    return " + ".join([*words, "compiled" if choice.get("compile") else "eager"])


def _environment_section(runs: Sequence[RunRecord]) -> dict[str, Any]:
    first: dict[str, Any] = next((run.environment for run in runs if run.environment), {})
    facts = [(name.replace("_", " "), _flat(value)) for name, value in first.items() if value not in (None, "", [], {})]
    others = [run.path.name for run in runs if run.environment and _machine(run) != _machine_of(first)]
    notes = [f"Other runs were made elsewhere: {', '.join(others)}. Their times do not compare."] if others else []
    return {"environment": facts, "environment_notes": notes}


def _machine_of(environment: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(str(environment.get(key)) for key in ("processor", "device", "cores", "threads", "torch"))


def _machine(run: RunRecord) -> tuple[Any, ...]:
    return _machine_of(run.environment)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)


# ---- small things ----


def _colours(contenders: Sequence[Contender]) -> dict[str, str]:
    baseline = next((contender.label for contender in contenders if contender.dense), None)
    others = [contender.label for contender in contenders if contender.label != baseline]
    colours = {label: f"var(--ticket-{index % 4})" for index, label in enumerate(others)}
    return {c.label: colours.get(c.label, "var(--dense)") for c in contenders}


def _percent(accuracy: float) -> str:
    return f"{100 * accuracy:.2f} %"


def _accuracy(contender: Contender) -> float | None:
    return fmean(contender.accuracies) if contender.accuracies else None


def _accuracy_change(dense: Contender | None, ticket: Contender) -> float | None:
    ours, theirs = _accuracy(ticket), None if dense is None else _accuracy(dense)
    return None if ours is None or theirs is None else ours - theirs


def _level(quantity: Quantity | None) -> float | None:
    if quantity is None:
        return None
    return (quantity.low + quantity.high) / 2 if isinstance(quantity, Modelled) else quantity.value


def _mean(contender: Contender, cost: Cost) -> float | None:
    levels = [_level(cost.of(bill.total)) for bill in contender.bills]
    known = [level for level in levels if level is not None]
    return fmean(known) if known and len(known) == len(levels) else None


def _kind(contender: Contender, cost: Cost) -> str:
    quantity = cost.of(contender.bills[0].total)
    return "counted" if quantity is None else type(quantity).__name__.lower()


def _estimated(bill: Bill) -> bool:
    return bill.dense is not None and isinstance(bill.dense.total.seconds, Estimated)
