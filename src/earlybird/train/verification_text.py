"""What a verification of a ticket says to people: tables, the places of the largest weights, and a guideline."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from earlybird.tickets.verify import Gap
from earlybird.train.ticket_source import Source


def guideline(source: Source, verification: Mapping[str, Any]) -> str:
    """Return a paragraph that says what was measured here of what decides about tickets, and what was not."""
    parts = []
    for check in verification["checks"]:
        found = check["gaps"].get("reinitialised")
        dense = check["accuracy"].get("dense")
        if found is None or dense is None:
            continue
        which = "" if check["round"] is None else f", round {check['round']},"
        parts.append(
            f"at learning rate {check['lr']:g}{which} dense reached {dense['mean']:.2%} and the ticket leads its "
            f"re-initialisation by {Gap(**found)}"
        )
    if not parts:
        return ""
    recipe = source.recipe
    blocks = "with residual blocks" if source.residual else "without residual blocks"
    text = f"Measured on {recipe.data}, {recipe.model} of {source.parameters:,} parameters {blocks}, "
    text += f"{recipe.epochs:g} epochs: {'; '.join(parts)}."
    best = {row["lr"]: row for row in verification["runs"] if row["role"] == "dense"}
    if len(best) > 1:
        means = {rate: _mean_accuracy(verification["runs"], rate) for rate in best}
        rate = max(means, key=lambda one: means[one])
        text += f" Of these learning rates, {rate:g} trains dense best: the ticket that counts is the one found there."
    text += " Other epochs, capacities and architectures were not measured: each may decide otherwise."
    return text


def _mean_accuracy(rows: Sequence[Mapping[str, Any]], rate: float) -> float:
    values: list[float] = [row["accuracy"] for row in rows if row["role"] == "dense" and row["lr"] == rate]
    return statistics.fmean(values)


def describe(verification: Mapping[str, Any]) -> str:
    """Return what `verify` returned as tables and verdicts, for people."""
    lines: list[str] = []
    for check in verification["checks"]:
        lines += [check["sentence"], f"{'':20}{'accuracy':>18}{'ticket above it':>24}{'seeds':>7}"]
        for role, row in check["accuracy"].items():
            spread = "" if row["std"] is None else f" +- {100 * row['std']:.2f}"
            accuracy = f"{100 * row['mean']:.2f}{spread} %"
            lines.append(f"{role:20}{accuracy:>18}{_gap_text(check['gaps'].get(role)):>24}{row['n']:>7}")
        for criterion in check["criteria"]:
            holds = {True: "yes", False: "NO", None: "not decided"}[criterion["holds"]]
            lines.append(f"  {criterion['name']}: {holds}: {criterion['reason']}")
        lines += [f"  {remark}" for remark in check["remarks"]]
        lines.append("")
    for role, reason in verification["left_out"].items():
        lines.append(f"Left out, {role}: {reason}.")
    lines.append(_told_seeds(verification))
    lines += ["", *correlation_lines(verification)]
    if verification["guideline"]:
        lines += ["", verification["guideline"]]
    return "\n".join(lines)


def _gap_text(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else str(Gap(**found))


def _told_seeds(verification: Mapping[str, Any]) -> str:
    text = "The ticket belongs to one set of first weights, from which all runs begin but the re-initialised ones; "
    text += "seeds change the order of images, augmentation and dropout. Accuracy: mean and standard deviation over "
    text += "seeds; gaps: within seeds, with the standard error of their mean."
    if verification["start_at"] is not None:
        text += (
            f" The rounds rewind to step {verification['start_at']} of the schedule: the ticket and its controls go "
        )
        text += "on from there, dense and what is retrained begin at the first."
    return text


def correlation_lines(verification: Mapping[str, Any]) -> list[str]:
    """Say, a learning rate a line, how far the first weights decide which ones end up large."""
    lines = []
    for rate in verification["rates"]:
        entries = [entry for entry in verification["correlation"] if entry["lr"] == rate]
        if not entries:
            continue
        share = entries[0]["share"]
        within, overall, chance = (
            statistics.fmean(entry[key] for entry in entries) for key in ("within", "overall", "chance")
        )
        low, high = min(entries[0]["layers"].values()), max(entries[0]["layers"].values())
        lines.append(
            f"Largest {share:.0%} of the weights at learning rate {rate:g}: {within:.1%} of them were the largest of "
            f"their layer at the start, too (chance: {share:.0%}; layers of the first seed {low:.1%} to {high:.1%}); "
            f"over the whole network {overall:.1%} (chance: {chance:.1%}). {_meaning(within, share)}"
        )
    return lines


_NEAR, _HALF = 0.1, 0.5


def _meaning(within: float, share: float) -> str:
    """Say what an overlap means: where it lies between chance and the same weights all over."""
    above = (within - share) / (1 - share) if share < 1 else 1.0
    if above < _NEAR:
        return "No relation: the first weights do not decide which ones end up large."
    if above < _HALF:
        return "Some relation: the first weights decide in part which ones end up large."
    return "A strong relation: the first weights decide most of which ones end up large; training moves them little."
