"""The check of a ticket on the page: accuracies with their spread, the criteria, and where the largest weights lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from earlybird.cost.units import MINUS
from earlybird.report import charts
from earlybird.report.tables import Row, Table
from earlybird.tickets.verify import Gap

Verification = Mapping[str, Any]
"""What ``verification.json`` holds."""

_ROLES = ("dense", "dense-equal-budget", "ticket", "retrained", "reinitialised", "shuffled", "random")
COLOURS = {role: f"var(--ticket-{index})" for index, role in enumerate(_ROLES[2:])} | {
    "dense": "var(--dense)",
    "dense-equal-budget": "var(--ticket-5)",
}
"""What each role has in its own chart."""


def headline(verification: Verification) -> tuple[str, bool, list[str]]:
    """Return the first sentence about a ticket, whether it won nothing, and what must be added.

    The one that counts is that of the learning rate which trains dense best, of the last round.
    """
    checks = verification["checks"]
    means = {check["lr"]: check["accuracy"]["dense"]["mean"] for check in checks if "dense" in check["accuracy"]}
    best = max(means, key=lambda rate: means[rate]) if means else checks[0]["lr"]
    check = [one for one in checks if one["lr"] == best][-1]
    others = [one["sentence"] for one in checks if one is not check]
    return check["sentence"].rstrip("."), check["kind"] == "none", [*check["remarks"], *others]


def verification_section(
    verifications: Sequence[Verification], figures: dict[str, charts.Figure]
) -> list[dict[str, Any]]:
    """Return chart and tables of each check of a ticket; the figures are added to ``figures``."""
    shown = []
    for index, verification in enumerate(verifications):
        checks = verification["checks"]
        name = f"verification-{index}"
        groups = [_group(check) for check in checks]
        roles = [role for role in _ROLES if any(role in check["accuracy"] for check in checks)]
        series = {
            role: [
                None if (row := check["accuracy"].get(role)) is None
                else (100 * row["mean"], 100 * (row["std"] or 0), row["n"])
                for check in checks
            ]
            for role in roles
        }  # fmt: skip
        figures[name] = charts.grouped(groups, series, COLOURS)
        shown.append(
            {
                "id": name,
                "legend": [(role, COLOURS[role]) for role in roles],
                "about": [f"{role}: {verification['about'][role]}" for role in roles],
                "gaps": _gaps(checks, roles),
                "criteria": _criteria(checks),
                "left_out": [f"{role}: {reason}." for role, reason in verification["left_out"].items()],
                "correlation": verification["correlation_lines"],
                "guideline": verification["guideline"],
            }
        )
    return shown


def _group(check: Mapping[str, Any]) -> str:
    which = "" if check["round"] is None else f"round {check['round']}, "
    return f"{which}{check['keep']:.1%} kept, lr {check['lr']:g}"


def _gaps(checks: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> Table:
    rows = [
        Row([_group(check), *(_gap(check["gaps"].get(role)) for role in roles if role != "ticket")]) for check in checks
    ]
    note = "Points of accuracy, means of the differences within seeds, with their standard error."
    return Table("How far the ticket is above", ["", *(role for role in roles if role != "ticket")], rows, note=note)


def _gap(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return str(Gap(**found)).removesuffix(" points").replace("+-", "\N{PLUS-MINUS SIGN}").replace("-", MINUS)


def _criteria(checks: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return, a check each, its verdict and a line for each criterion."""
    holds = {True: "yes", False: "no", None: "not decided"}
    return [
        (
            check["sentence"],
            [f"{one['name']}: {holds[one['holds']]}; {one['reason']}." for one in check["criteria"]],
        )
        for check in checks
    ]
