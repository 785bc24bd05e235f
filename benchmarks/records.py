"""Rows of one session: shown together, and apart from those of another session or another machine."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Sequence
from typing import Any

import common

from earlybird.allocator import keep_freed

Row = dict[str, Any]

SESSION = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
"""When this process began: in every row that it records."""


def record(name: str, row: Row, *, quick: bool) -> None:
    """Append a row with its session; that of a quick look only where results are not the committed ones."""
    if not quick or common.RESULTS != common.HERE / "results":
        common.append(name, {**row, "session": SESSION})


def time_or_show(
    options: argparse.Namespace,
    name: str,
    tables: Callable[[Sequence[Row]], str],
    *parts: Callable[[argparse.Namespace], None],
) -> None:
    """Do what `common.read_rounds` was told: print the tables of the rows that are there, or measure all parts."""
    if options.table:
        print(tables(common.rows(name)))
        return
    keep_freed()  # as `earlybird train` does
    for part in parts:
        part(options)


def by_machine(found: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Return the rows of each machine (`common.comparable`), with what tells their files apart: '', '-2', '-3' ..."""
    machines: list[list[Row]] = []
    for row in found:
        mine = next((own for own in machines if common.comparable(own[0], row)), None)
        if mine is None:
            machines.append([row])
        else:
            mine.append(row)
    return [(f"-{number + 1}" if number else "", mine) for number, mine in enumerate(machines)]


def newest(found: Sequence[Row], *keys: str) -> list[Row]:
    """Return the rows of the last session that has them, for each value of ``keys``, in their order.

    Rows from before sessions were written down count as one session.
    """

    def group(row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in keys)

    last = {group(row): row.get("session") for row in found}
    return [row for row in found if row.get("session") == last[group(row)]]
