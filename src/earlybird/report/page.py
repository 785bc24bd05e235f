"""Turn records into what the page shows: sentences, tiles, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from earlybird.cost import units
from earlybird.objective import is_probe
from earlybird.report import charts, tradeoff, verification
from earlybird.report.against import billed, is_estimated, percent
from earlybird.report.costs import bill_section, contender_table
from earlybird.report.headline import headline, tiles
from earlybird.report.masks import channel_section, distance_section
from earlybird.report.methods import input_section, operation_section, trace_section
from earlybird.report.read import Contender, RunRecord
from earlybird.report.tables import Row, Table
from earlybird.report.tradeoff import Point, tradeoff_section
from earlybird.report.verification import Verification, verification_section


def compose(
    contenders: Sequence[Contender],
    comparisons: Sequence[Sequence[Point]] = (),
    verifications: Sequence[Verification] = (),
) -> tuple[dict[str, Any], dict[str, charts.Figure]]:
    """Return what the template needs, and the figures by the id of their element.

    Args:
        contenders: All runs.
        comparisons: Points of each comparison of methods among them. The first one's are what the page begins with.
        verifications: Checks of tickets among them; without a comparison, the page begins with the first one's.
    """
    figures: dict[str, charts.Figure] = {}
    runs = [run for contender in contenders for run in contender.runs]
    methods = {point["contender"]: point["method"] for points in comparisons for point in points if point["method"]}
    for one in verifications:
        methods |= {name: place["role"] for name, place in one["places"].items() if place["role"] != "dense"}
    colours = _colours(contenders, methods)
    if comparisons:
        sentence, loss, lead = tradeoff.headline(comparisons[0])
    else:
        sentence, loss, lead = verification.headline(verifications[0]) if verifications else headline(contenders)
    subject = " on ".join(str(runs[0].recipe[key]) for key in ("model", "data") if key in runs[0].recipe)
    page = {
        "title": f"earlybird: {subject}" if subject else "earlybird report",
        "subject": subject,
        "headline": sentence,
        "loss": loss,
        "lead": lead,
        "tiles": tradeoff.tiles(comparisons[0]) if comparisons else [] if verifications else tiles(contenders),
        "verifications": verification_section(verifications, figures),
        "tradeoffs": tradeoff_section(comparisons, figures),
        "has_estimate": any(is_estimated(bill) for _, bills in billed(contenders) for bill in bills),
        **bill_section(contenders, figures),
        "contenders": contender_table(contenders),
        "accuracy": _accuracy_section(contenders, colours, methods, figures),
        **distance_section(runs, figures),
        "channels": channel_section(runs, figures),
        **trace_section(runs, figures),
        "inputs": input_section(runs),
        "operations": operation_section(contenders, figures),
        "tuned": _tuned_section(runs),
        **_environment_section(runs),
        "recipes": [{"title": run.path.name, "text": run.recipe_text} for run in runs],
    }
    return page, figures


def _accuracy_section(
    contenders: Sequence[Contender],
    colours: dict[str, str],
    methods: Mapping[str, str],
    figures: dict[str, charts.Figure],
) -> dict[str, Any] | None:
    curves: list[tuple[str, str, list[tuple[float, float]], tuple[float, float] | None]] = []
    rows: list[Row] = []
    for contender in contenders:
        for run in contender.runs:
            if not run.accuracy:
                continue
            curves.append((contender.label, colours[contender.label], run.accuracy, _draw_point(run)))
            rows.extend(
                Row([run.path.name, units.seconds(seconds), percent(accuracy)])
                for seconds, accuracy in run.accuracy[-5:]
            )
    if not curves:
        return None
    figures["accuracy-curves"] = charts.accuracy_curves(curves)
    judges = sorted({run.judged_by for contender in contenders for run in contender.runs} - {""})
    return {
        "id": "accuracy-curves",
        "legend": list({methods.get(label, label): colour for label, colour, *_ in curves}.items()),
        "table": Table("Last evaluations", ["run", "seconds of the run", "accuracy"], rows),
        "judges": [judge for judge in judges if is_probe(judge)],
        "measures": [judge for judge in judges if not is_probe(judge)],
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
                "chosen" if _setting(candidate) == _setting(choice) else "",
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
        if run.tune.get("convolutions"):
            shown.append(_convolutions(run))
    return shown


def _convolutions(run: RunRecord) -> dict[str, Any]:
    """Return what convolutions took in each way when own kernels were tried, a size of map a row."""
    rows = [
        Row(
            [
                str(gain["positions"]),
                str(gain["layers"]),
                *(f"{1e3 * gain[way]:.3g} ms" for way in ("pytorch_s", "weights_s", "passes_s")),
            ]
        )
        for gain in run.tune["convolutions"]
    ]
    columns = ["positions of the map", "layers", "PyTorch", "weight gradient as products", "all passes as products"]
    return {
        "title": f"{run.path.name}: convolutions by the size of their map",
        "reason": "Forward and backward passes of the dense network's layers, one batch, when kernels were chosen.",
        "table": Table(f"{run.path.name}: convolutions", columns, rows),
    }


def _setting(choice: dict[str, Any]) -> str:
    words = [str(choice.get("precision", "?")), "channels_last" if choice.get("channels_last") else "contiguous"]
    words.append("compiled" if choice.get("compile") else "eager")
    kernels = choice.get("kernels")  # of a candidate whether, of a choice which
    own = any(kernels.values()) if isinstance(kernels, dict) else bool(kernels)
    return " + ".join([*words, "own kernels"] if own else words)


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


def _colours(contenders: Sequence[Contender], methods: Mapping[str, str]) -> dict[str, str]:
    """Return a colour for each contender; in a comparison of methods, all of one method have the same."""
    baseline = next((contender.label for contender in contenders if contender.dense), None)
    labels = [contender.label for contender in contenders if contender.label != baseline]
    groups = list(dict.fromkeys(methods.get(label, label) for label in labels))
    colours = {group: charts.TICKET_COLOURS[i % len(charts.TICKET_COLOURS)] for i, group in enumerate(groups)}
    return {c.label: colours.get(methods.get(c.label, c.label), "var(--dense)") for c in contenders}
