"""What the page is made of, as plain values: tables, and tiles with one number in large type."""

from __future__ import annotations

from dataclasses import dataclass, field


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
