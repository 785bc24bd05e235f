"""Figures as SVG text that reads on light and dark pages: lines, dots and heat maps, on linear or logarithmic axes.

    series = Series(points=[(8, 21.0), (16, 90.5)], colour=COLOURS[0], label="forward")
    svg = chart([series], Axis.around([8, 16], "channels", log=True), Axis.around([21.0, 90.5], "GFLOP/s"), title="...")

No style sheet, font or script is needed; ink follows the page's colour scheme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 380, 56, 56, 62
COLOURS = ("#12977f", "#c77d1a", "#4a7fd6", "#b5548f", "#7a6ad0", "#8a8f98")
"""Readable as lines and as text on white and on near-black."""
LABELS = 12
_STEPS = (1, 2, 5)
_TICKS = 8
_LETTER = 7.2  # pixels a letter of 13 px takes, on average
_LINE = 15  # pixels between two labels


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one colour.

    Attributes:
        points: Pairs ``(x, y)``, in the order in which they are joined.
        colour: Of line, dots and label.
        label: Written beside the last point; empty: nothing.
        line: Join the points.
        dots: Draw each point.
        dashed: Break the line: for what was not measured.
    """

    points: Sequence[tuple[float, float]]
    colour: str
    label: str = ""
    line: bool = True
    dots: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """What one direction of a chart stands for.

    Attributes:
        label: What is counted, with its unit.
        low, high: Ends of the axis.
        log: Logarithmic.
    """

    label: str
    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], label: str, *, log: bool = False, zero: bool = False) -> Axis:
        """Return an axis that contains ``values``, with ends at ticks (linear) or a little beyond them (log).

        Args:
            values: At least one.
            label: See `Axis`.
            log: Logarithmic; all values are positive.
            zero: Begin at 0.
        """
        found = list(values)
        low, high = min(found), max(found)
        if log:
            if low <= 0:
                raise ValueError(f"{low} on a logarithmic axis, which has room for positive numbers only")
            return cls(label, low / 1.15, high * 1.15, log=True)
        low = min(low, 0.0) if zero else low
        step = _step(high - low or abs(high) or 1.0)
        low, up = math.floor(low / step) * step, math.ceil(high / step) * step
        return cls(label, low, up if up > low else low + step)

    def share(self, value: float) -> float:
        """Return where ``value`` lies: 0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return the round numbers on the axis: multiples of 1, 2 or 5 times a power of ten."""
        if not self.log:
            step = _step(self.high - self.low)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [round(number * step, 12) for number in range(first, last + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in (_STEPS, (1,)):
            found = [digit * 10.0**power for power in decades for digit in digits]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) <= _TICKS:
                break
        return found


def _step(span: float) -> float:
    """Return the smallest round step that cuts ``span`` in at most `_TICKS` - 1 parts."""
    power = 10.0 ** math.floor(math.log10(span / (_TICKS - 1)))
    return next(digit * power for digit in (*_STEPS, 10) if span / (digit * power) <= _TICKS - 1)


def chart(series: Sequence[Series], x: Axis, y: Axis, *, title: str, note: str = "") -> str:
    """Return an SVG of ``series``. More than `LABELS` labels become numbers, with a list beside the chart.

    Args:
        series: Drawn in this order, the last one on top.
        x, y: Axes that contain all points.
        title: One line above.
        note: One line below, in small print: machine and date.
    """
    labelled = [one for one in series if one.label and one.points]
    numbered = len(labelled) > LABELS
    height = max(HEIGHT, TOP + BOTTOM + _LINE * len(labelled)) if numbered else HEIGHT
    right = 16 + max((_LETTER * len(one.label) for one in series), default=0.0) + (40 if numbered else 0)
    bottom, edge = height - BOTTOM, WIDTH - right

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + x.share(point[0]) * (edge - LEFT), bottom - y.share(point[1]) * (bottom - TOP)

    parts = [*_head(title, height), f'<text x="{LEFT - 40}" y="40" font-size="11">{escape(y.label)}</text>']
    for tick in y.ticks():
        top = at((x.low, tick))[1]
        parts.append(f'<line class="g" x1="{LEFT}" x2="{edge:.1f}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{top + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x.ticks():
        left = at((tick, y.low))[0]
        parts.append(f'<line class="g" x1="{left:.1f}" x2="{left:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{left:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{edge:.1f}" y="{height - 26}" text-anchor="end" font-size="11">{escape(x.label)}</text>')
    parts.append(_note(note, height))
    for one in series:
        places = [at(point) for point in one.points]
        if one.line:
            points = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
            dash = ' stroke-dasharray="5 4"' if one.dashed else ""
            parts.append(f'<polyline points="{points}" fill="none" stroke="{one.colour}" stroke-width="2"{dash}/>')
        if one.dots:
            parts += [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3.2" fill="{one.colour}"/>' for left, top in places]
    ends = [at(one.points[-1]) for one in labelled]
    if numbered:
        for number, (one, (left, top)) in enumerate(zip(labelled, beside(ends)), 1):
            parts.append(f'<text x="{left:.1f}" y="{top:.1f}" font-size="10" style="fill:{one.colour}">{number}</text>')
            line = TOP + _LINE * (number - 0.5)
            text = f'x="{edge + 24:.1f}" y="{line:.1f}" style="fill:{one.colour}">{number}  {escape(one.label)}'
            parts.append(f"<text {text}</text>")
    else:
        for one, (left, _), top in zip(labelled, ends, apart([top for _, top in ends], _LINE, TOP, bottom)):
            text = f'x="{left + 8:.1f}" y="{top + 4:.1f}" style="fill:{one.colour}">{escape(one.label)}'
            parts.append(f"<text {text}</text>")
    return "\n".join([*parts, "</svg>\n"])


def beside(dots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return where to write a number of two digits at each dot: where it covers least of dots and numbers."""
    sides = ((5, 4), (-6, -6), (-6, 13), (-17, 4), (6, -6), (6, 13), (-17, -5), (-17, 12))
    taken = [(left - 3, top + 3) for left, top in dots]
    found = []
    for left, top in dots:
        places = [(left + x, top + y) for x, y in sides]

        def covered(place: tuple[float, float]) -> float:
            near = [(abs(place[0] - x), abs(place[1] - y)) for x, y in taken]
            return sum(max(0, 12 - x) * max(0, 9 - y) for x, y in near)

        best = min(places, key=covered)
        taken.append(best)
        found.append(best)
    return found


def heat_maps(
    maps: Sequence[tuple[str, Sequence[float], Sequence[Sequence[float]]]], *, title: str, key: str, note: str = ""
) -> str:
    """Return an SVG of square matrices side by side, four in a row, on one scale; strong colour where a value is small.

    Args:
        maps: For each its name, the place of each of its n rows (and columns), and its values ``(n, n)``, at least 0.
        title: One line above.
        key: What the values are.
        note: One line below, in small print.
    """
    columns = min(len(maps), 4)
    gap, head = 24, 24
    side = min((WIDTH - 2 * 16 - (columns - 1) * gap) / columns, 300.0)
    tall = head + side + 26
    height = round(TOP + math.ceil(len(maps) / columns) * tall + 40)
    highest = max((value for _, _, matrix in maps for row in matrix for value in row), default=0.0) or 1.0
    parts = _head(title, height)
    for index, (name, places, matrix) in enumerate(maps):
        left, top = 16 + index % columns * (side + gap), TOP + index // columns * tall + head
        cell = side / max(len(matrix), 1)
        parts.append(f'<text x="{left:.1f}" y="{top - 8:.1f}">{escape(name)}</text>')
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                parts.append(
                    f'<rect class="cell" x="{left + column * cell:.2f}" y="{top + side - (row + 1) * cell:.2f}" '
                    f'width="{cell:.2f}" height="{cell:.2f}" fill="{COLOURS[0]}" '
                    f'fill-opacity="{1 - 0.94 * value / highest:.3f}"><title>{places[column]:g}, {places[row]:g}: '
                    f"{value:.3f}</title></rect>"
                )
        for share, anchor in ((0.0, "start"), (1.0, "end")):
            place = places[0] if share == 0 else places[-1]
            parts.append(
                f'<text x="{left + share * side:.1f}" y="{top + side + 15:.1f}" text-anchor="{anchor}" '
                f'font-size="11">{place:g}</text>'
            )
    for step in range(5):
        parts.append(
            f'<rect class="key" x="{16 + 22 * step}" y="{height - 42}" width="22" height="12" fill="{COLOURS[0]}" '
            f'fill-opacity="{1 - 0.94 * step / 4:.3f}"/>'
        )
    parts.append(
        f'<text x="134" y="{height - 32}" font-size="11">{escape(key)}, 0 to {highest:.2f}</text>',
    )
    return "\n".join([*parts, _note(note, height, left=16), "</svg>\n"])


def apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return ``heights`` moved so that neighbours are ``gap`` apart, in the same order, within the ends if they fit."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    moved = list(heights)
    for before, index in pairwise(order):
        moved[index] = max(moved[index], moved[before] + gap)
    limit = high
    for index in reversed(order):
        moved[index] = max(min(moved[index], limit), low)
        limit = moved[index] - gap
    return moved


def _head(title: str, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" '
        'font-size="13"><style>text{fill:#24292f}.g{stroke:#8884}@media(prefers-color-scheme:dark)'
        "{text{fill:#e6edf3}}</style>",
        f'<text x="16" y="20" font-weight="600">{escape(title)}</text>',
    ]


def _note(note: str, height: int, left: int = LEFT) -> str:
    return f'<text x="{left}" y="{height - 8}" font-size="11">{escape(note)}</text>'
