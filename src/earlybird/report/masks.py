"""The ticket on the page: when the masks settled, and which channels stayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from earlybird.cost import units
from earlybird.report import charts
from earlybird.report.read import RunRecord
from earlybird.report.tables import Row, Table

MATRICES = 6


def distance_section(runs: Sequence[RunRecord], figures: dict[str, charts.Figure]) -> dict[str, Any]:
    """Return the mask-distance matrices and how the masks settled; the figures are added to ``figures``."""
    looked = [run for run in runs if len(run.history.get("matrix") or []) > 1]
    shown = []
    for index, run in enumerate(looked[:MATRICES]):
        steps, matrix = run.history["steps"], run.history["matrix"]
        rounds = run.ticket is not None and run.ticket.provenance.get("round")
        entries = {
            entry["step"]: entry for entry in run.history.get("history", []) if rounds or entry["keep"] in _targets(run)
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
        if rounds:
            note = f"The tickets of {len(steps)} rounds, each a part of the one before"
        shown.append(
            {"id": f"matrix-{index}", "title": run.path.name, "note": note + ".", "framed": window is not None}
        )
        if rounds:
            continue
        largest = [max(entries[step]["distances"], default=None) if step in entries else None for step in steps]
        tolerance = run.recipe.get("tolerance")
        if any(value is not None for value in largest):
            figures[f"settling-{index}"] = charts.settling(places, unit, largest, tolerance)
            limit = "" if tolerance is None else f"; the ticket is drawn once it is at most {tolerance:g}"
            note = f"Largest distance of the newest mask to the {run.recipe.get('window', 5) - 1} before it{limit}."
            shown.append({"id": f"settling-{index}", "title": "Settling", "note": note, "framed": False})
    left = [run.path.name for run in looked[MATRICES:]]
    return {
        "distances": shown,
        "distances_left_out": f"Not shown: {', '.join(left)}." if left else "",
        "distances_rounds": any(run.ticket is not None and run.ticket.provenance.get("round") for run in looked),
    }


def _targets(run: RunRecord) -> list[Any]:
    """Return the shares that the run cuts to, one after another."""
    keep = run.recipe.get("keep")
    return [*run.recipe.get("stages", []), keep[0] if isinstance(keep, list) else keep]


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


def channel_section(runs: Sequence[RunRecord], figures: dict[str, charts.Figure]) -> list[dict[str, Any]]:
    """Return the channels of each layer before and after; the figures are added to ``figures``."""
    shown = []
    for index, run in enumerate([run for run in runs if run.ticket is not None][:MATRICES]):
        assert run.ticket is not None
        layers = {layer: (total, kept) for layer, (kept, total) in run.ticket.widths.items()}
        name = f"channels-{index}"
        ranked = " and ".join(f"{kind}s" for kind in dict.fromkeys(run.ticket.kinds.values()))
        figures[name] = charts.channel_bars(layers, ranked)
        note = f"{run.ticket.keep:.2%} of the {ranked} stayed"
        extra = sum(len(channels) for channels in run.change.get("rounded", {}).values())
        if extra:
            note += f", {extra} of them only because widths were rounded"
        before, after = run.change.get("parameters_before"), run.change.get("parameters_after")
        if before and after:
            note += f"; {units.count(before)} weights became {units.count(after)} ({after / before:.0%})"
        rows = [
            Row([layer, f"{before:,}", f"{after:,}", f"{after / before:.0%}"])
            for layer, (before, after) in layers.items()
        ]
        table = Table(f"{run.path.name}: {ranked}", ["layer", "before", "after", "kept"], rows)
        shown.append({"id": name, "title": run.path.name, "note": note + ".", "table": table})
    return shown
