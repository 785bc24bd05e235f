"""What a comparison has to plot: rows of finished runs, and what each method reached at each share, over seeds.

The share that stays is counted: ``kept`` on the ticket, over what it ranks; ``density`` on the network at the end, as
its parameters that are not zero over all of the dense network's. So a shrunk network and a masked one are on one axis.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from earlybird.cost.bill import Spending
from earlybird.files import read_rows
from earlybird.tickets.ticket import Ticket
from earlybird.train.result import Result

COSTS = ("seconds", "macs", "bit_macs", "modelled_joules", "peak_bytes")
"""What a point cost; of the modelled joules, the middle between low and high price of a DRAM access."""


def row_of(path: Path, contender: str, seed: int) -> dict[str, Any]:
    """Return what a comparison tells of one finished run."""
    result = Result.read(path)
    assert result is not None, f"{path} has no result"
    total, after = result.bill.total, result.bill.phases.get("train")
    energy = total.modelled_joules
    ticket = path / "ticket.safetensors"
    return {
        "contender": contender,
        "seed": seed,
        "folder": path.name,
        "accuracy": result.accuracy,
        "judged_by": result.judged_by,
        "loss": result.loss if math.isfinite(result.loss) else None,
        "epochs": result.epochs,
        "seconds": None if total.seconds is None else total.seconds.value,
        "phase_seconds": result.to_json()["phase_seconds"],
        "macs": None if total.macs is None else total.macs.value,
        "bit_macs": None if total.bit_macs is None else total.bit_macs.value,
        "modelled_joules": None if energy is None else (energy.low + energy.high) / 2,
        "peak_bytes": None if total.peak_bytes is None else total.peak_bytes.value,
        "parameters": result.parameters,
        "nonzero": result.nonzero,
        "drawn_at": result.drawn_at,
        "macs_per_image_after": _per_image(after) if after else None,
        "resumed": result.resumed,
        **(_kept(ticket) if ticket.is_file() else {"kept": None, "share_of": None}),
        "rounds": _rounds(path),
    }


def _per_image(spent: Spending) -> float | None:
    """Return MACs a sample, or None where nothing was counted or no sample went through (a draw at the last step)."""
    return spent.macs.value / spent.images.value if spent.macs and spent.images.value else None


def _kept(path: Path) -> dict[str, Any]:
    ticket = Ticket.load(path)
    kinds = dict.fromkeys(ticket.kinds.values())
    return {"kept": ticket.keep, "share_of": " and ".join(f"{kind}s" for kind in kinds)}


def _rounds(path: Path) -> list[dict[str, Any]]:
    """Return where each round of a run ended, with what had been spent by then; none for a run without rounds."""
    last: dict[int, dict[str, Any]] = {}
    for row in read_rows(path / "metrics.jsonl"):
        if row.get("round") is not None:
            last[row["round"]] = row
    found = []
    for number, row in sorted(last.items()):
        energy = row["modelled_joules"]
        found.append(
            {
                "round": number,
                **{name: row[name] for name in ("accuracy", "seconds", "macs", "bit_macs", "nonzero")},
                "modelled_joules": None if energy is None else sum(energy) / 2,
                "kept": row["density"],
            }
        )
    return found


def points_of(rows: Sequence[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Return the points of a comparison of methods: a row each, or, of a run in rounds, a round each.

    Args:
        rows: As from `row_of`, with the keys ``method`` and ``keep`` of the contender and ``side_by_side``.
        baseline: Contender that is dense.

    Returns:
        One dict a point: ``contender``, ``method``, ``keep`` (as asked for), ``round`` (or None), ``seeds``,
        ``share_of``, ``side_by_side``, and statistics over the seeds: ``kept``, ``density``, ``accuracy``,
        ``accuracy_points`` (above dense, within seeds), the costs (`COSTS`) from the beginning of the run (the peak is
        the whole run's), and in ``round_costs`` those of the round alone.
    """
    dense = {row["seed"]: row for row in rows if row["contender"] == baseline}
    groups: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for row in rows:
        before: Mapping[str, Any] = {}
        for stage in row["rounds"] or [{"round": None}]:
            point = {**row, **stage}
            whole = dense.get(row["seed"], next(iter(dense.values()), None))
            point["density"] = None if whole is None else ratio(point["nonzero"], whole["parameters"])
            if row["seed"] in dense:
                point["accuracy_points"] = 100 * (point["accuracy"] - dense[row["seed"]]["accuracy"])
            else:
                point["accuracy_points"] = None
            point["round_costs"] = {name: _less(point[name], before.get(name, 0)) for name in COSTS[:-1]}
            before = stage
            groups.setdefault((row["contender"], stage["round"]), []).append(point)
    return [_point(group) for group in groups.values()]


def _point(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = group[0]
    numbers = ("kept", "density", "accuracy", "accuracy_points", *COSTS)
    return {
        **{name: first[name] for name in ("contender", "method", "keep", "round", "share_of")},
        "seeds": [point["seed"] for point in group],
        "side_by_side": max(point["side_by_side"] for point in group),
        **{name: statistics_of([point[name] for point in group]) for name in numbers},
        "round_costs": {
            name: statistics_of([point["round_costs"][name] for point in group]) for name in first["round_costs"]
        }
        if first["round"] is not None
        else None,
    }


def _less(value: float | None, before: float | None) -> float | None:
    return None if value is None or before is None else value - before


def ratio(value: float | None, of: float | None) -> float | None:
    """Return ``value / of``, or None where one is not known or ``of`` is zero."""
    return value / of if value is not None and of else None


def statistics_of(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Return mean, standard deviation, lowest, highest and number of values; None where one is not known."""
    known = [value for value in values if value is not None]
    if len(known) != len(values):
        return None
    return {
        "mean": statistics.fmean(known),
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "low": min(known),
        "high": max(known),
        "n": len(known),
    }
