"""Figures of the report as plain plotly dictionaries; colours are names of CSS variables, which the page fills in.

Every function returns ``{"data": [...], "layout": {...}}``. A colour ``"var(--name)"`` is resolved in the browser, so
that one file serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figure = dict[str, Any]

TICKET_COLOURS = tuple(f"var(--ticket-{index})" for index in range(6))

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif'


def phase_bars(totals: Mapping[str, Mapping[str, float]], *, unit: str, texts: Sequence[str]) -> Figure:
    """Stacked horizontal bars, one bar a contender, one colour a phase.

    Args:
        totals: Contender to phase to value, already in ``unit``.
        unit: What the axis counts.
        texts: The number to print at the end of each bar, in the order of ``totals``.
    """
    labels = list(totals)
    phases = [phase for phase in (*PHASES, "peak") if any(phase in values for values in totals.values())]
    bars: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": phase,
            "y": labels,
            "x": [totals[label].get(phase, 0.0) for label in labels],
            "marker": {"color": f"var(--phase-{phase})", "line": {"width": 0}},
            "hovertemplate": f"%{{y}}, {phase}: %{{x:.4g}} {unit}<extra></extra>",
        }
        for phase in phases
    ]
    sums = [sum(totals[label].values()) for label in labels]
    # the number at the end of the longest bar needs room, also on a phone
    room = (max(sums, default=0.0) or 1.0) * (1.12 + 0.05 * max(map(len, texts), default=0))
    bars.append(
        {
            "type": "scatter",
            "mode": "text",
            "x": sums,
            "y": labels,
            "text": [f" {text}" for text in texts],
            "textposition": "middle right",
            "textfont": {"color": "var(--ink)", "size": 13},
            "hoverinfo": "skip",
            "cliponaxis": False,
        }
    )
    layout = _layout(height=74 + 40 * len(labels), margin={"l": 8, "r": 8, "t": 4, "b": 40})
    layout["barmode"] = "stack"
    layout["bargap"] = 0.42
    layout["xaxis"] |= {"title": {"text": unit, "font": {"size": 12}}, "range": [0, room]}
    layout["yaxis"] |= {"autorange": "reversed", "automargin": True, "showgrid": False, "ticksuffix": "  "}
    return {"data": bars, "layout": layout}


PHASES = ("setup", "search", "draw", "train", "evaluate", "lost")


def accuracy_curves(
    curves: Sequence[tuple[str, str, Sequence[tuple[float, float]], tuple[float, float] | None]],
) -> Figure:
    """Accuracy against seconds, one line a run.

    Args:
        curves: For each run its label, its colour, its points ``(seconds, accuracy 0 to 1)`` and the point at which its
            ticket was drawn, if it was.
    """
    longest = max((points[-1][0] for _, _, points, _ in curves if points), default=0.0)
    scale, unit = (3600.0, "h") if longest > 2 * 3600 else (60.0, "min") if longest > 180 else (1.0, "s")
    data: list[dict[str, Any]] = []
    for label, colour, points, _ in curves:
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(points) <= 40 else "lines",
                "name": label,
                "legendgroup": label,
                "x": [seconds / scale for seconds, _ in points],
                "y": [100 * accuracy for _, accuracy in points],
                "line": {"color": colour, "width": 2.2},
                "marker": {"size": 5, "color": colour},
                "hovertemplate": f"{label}: %{{y:.2f}} % after %{{x:.3g}} {unit}<extra></extra>",
            }
        )
    draws = [(label, colour, draw) for label, colour, _, draw in curves if draw is not None]
    for label, colour, (seconds, accuracy) in draws:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"{label}: ticket drawn",
                "x": [seconds / scale],
                "y": [100 * accuracy],
                "marker": {
                    "symbol": "diamond",
                    "size": 12,
                    "color": "var(--card)",
                    "line": {"color": colour, "width": 2.2},
                },
                "hovertemplate": f"{label}: ticket drawn after %{{x:.3g}} {unit}<extra></extra>",
            }
        )
    layout = _layout(height=380, margin={"l": 8, "r": 12, "t": 10, "b": 44})
    layout["xaxis"] |= {"title": {"text": f"seconds of the run, measured ({unit})", "font": {"size": 12}}}
    layout["xaxis"]["rangemode"] = "tozero"
    if unit == "s":
        layout["xaxis"]["title"]["text"] = "seconds of the run, measured"
    layout["yaxis"] |= {"ticksuffix": " %", "automargin": True}
    return {"data": data, "layout": layout}


@dataclass(frozen=True)
class Place:
    """A point of a chart of accuracy against a cost, as means over seeds.

    Attributes:
        name: What it is.
        x: Cost, in the unit of the axis.
        y: Accuracy in percent.
        x_std: Standard deviation of ``x``; 0 where it is not known.
        y_std: Of ``y``.
        seeds: How many there are.
    """

    name: str
    x: float
    y: float
    x_std: float
    y_std: float
    seeds: int


SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down")


def tradeoff(
    series: Mapping[str, Sequence[Place]],
    colours: Mapping[str, str],
    dense: Place | None,
    *,
    unit: str,
    title: str,
    shares: bool,
) -> Figure:
    """Accuracy against a cost, one line a method, with bars of a standard deviation; dense as a rule with a band.

    Args:
        series: By method.
        colours: By method.
        dense: The baseline, or None.
        unit: Of the costs.
        title: Of the axis of costs, without the unit.
        shares: The costs are percent of the dense network: a logarithmic axis, from the whole to the smallest.
    """
    data: list[dict[str, Any]] = []
    for index, (method, places) in enumerate(series.items()):
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": method,
                "x": [place.x for place in places],
                "y": [place.y for place in places],
                "error_y": _bars([place.y_std for place in places], colours[method]),
                "error_x": _bars([place.x_std for place in places], colours[method]),
                "line": {"color": colours[method], "width": 1.6},
                "marker": {"size": 9, "color": colours[method], "symbol": SYMBOLS[index % len(SYMBOLS)]},
                "customdata": [[place.name, place.y_std, place.seeds] for place in places],
                "hovertemplate": (
                    f"%{{customdata[0]}}: %{{y:.2f}} % (+- %{{customdata[1]:.2f}}, n = %{{customdata[2]}}) "
                    f"at %{{x:.4g}} {unit}<extra></extra>"
                ),
            }
        )
    everything = [place for places in series.values() for place in places]
    layout = _layout(height=400, margin={"l": 8, "r": 14, "t": 12, "b": 44})
    layout["xaxis"] |= {"title": {"text": f"{title} ({unit})", "font": {"size": 12}}}
    layout["yaxis"] |= {"ticksuffix": " %", "automargin": True}
    if dense is not None:
        everything.append(dense)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "dense",
                "x": [dense.x],
                "y": [dense.y],
                "marker": {"size": 11, "color": "var(--dense)", "symbol": "x"},
                "hovertemplate": f"dense: %{{y:.2f}} % at %{{x:.4g}} {unit}<extra></extra>",
            }
        )
        across = {"xref": "paper", "x0": 0, "x1": 1, "layer": "below"}
        low, high = dense.y - dense.y_std, dense.y + dense.y_std
        band = {"type": "rect", "y0": low, "y1": high, "fillcolor": "var(--dense)", "opacity": 0.18}
        rule = {"type": "line", "y0": dense.y, "y1": dense.y}
        layout["shapes"] = [
            {**across, **band, "line": {"width": 0}},
            {**across, **rule, "line": {"color": "var(--dense)", "width": 1.6, "dash": "dash"}},
        ]
    _spread_axis(layout["xaxis"], [place.x for place in everything], shares=shares)
    return {"data": data, "layout": layout}


def _bars(deviations: Sequence[float], colour: str) -> dict[str, Any]:
    shown = any(deviations)
    return {"type": "data", "array": list(deviations), "visible": shown, "color": colour, "thickness": 1.2, "width": 4}


def grouped(
    groups: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float, int] | None]],
    colours: Mapping[str, str],
) -> Figure:
    """Accuracies side by side in groups, as points with bars of a standard deviation.

    Args:
        groups: Their names.
        series: By name, for each group mean and standard deviation in percent and how many seeds; None: not run.
        colours: By name of the series.
    """
    data: list[dict[str, Any]] = []
    width = 0.7 / max(len(series), 1)
    for index, (name, values) in enumerate(series.items()):
        shown = [(place, value) for place, value in enumerate(values) if value is not None]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [place + (index - (len(series) - 1) / 2) * width for place, _ in shown],
                "y": [mean for _, (mean, _, _) in shown],
                "error_y": _bars([std for _, (_, std, _) in shown], colours[name]),
                "marker": {"size": 10, "color": colours[name], "symbol": SYMBOLS[index % len(SYMBOLS)]},
                "customdata": [[groups[place], std, seeds] for place, (_, std, seeds) in shown],
                "hovertemplate": (
                    f"{name}, %{{customdata[0]}}: %{{y:.2f}} % (+- %{{customdata[1]:.2f}}, n = %{{customdata[2]}})"
                    "<extra></extra>"
                ),
            }
        )
    layout = _layout(height=400, margin={"l": 8, "r": 14, "t": 12, "b": 56})
    layout["xaxis"] |= {
        "tickvals": list(range(len(groups))),
        "ticktext": [group.replace(", ", "<br>") for group in groups],
        "range": [-0.5, len(groups) - 0.5],
        "showgrid": False,
    }
    layout["yaxis"] |= {"ticksuffix": " %", "automargin": True}
    return {"data": data, "layout": layout}


_WIDE = 8
"""Largest over smallest cost from which an axis is logarithmic."""


def _spread_axis(axis: dict[str, Any], costs: Sequence[float], *, shares: bool) -> None:
    """Lay out an axis over ``costs``: ticks at 1, 2 and 5 times powers of ten where it is logarithmic."""
    low, high = min(costs), max(costs)
    if low <= 0 or not (shares or high > _WIDE * low):
        axis["rangemode"] = "tozero"
        return
    room = 0.06 * max(math.log10(high / low), 0.3)
    ends = [math.log10(low) - room, math.log10(high) + room]
    steps = [digit * 10.0**power for power in range(math.floor(ends[0]), math.ceil(ends[1])) for digit in (1, 2, 5)]
    ticks = [step for step in steps if ends[0] <= math.log10(step) <= ends[1]]
    axis |= {
        "type": "log",
        "range": ends[::-1] if shares else ends,
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }


def distance_matrix(
    places: Sequence[float], unit: str, matrix: Sequence[Sequence[float]], window: tuple[int, int] | None
) -> Figure:
    """Mask distance of every look against every look; strong colour where two masks agree.

    Args:
        places: Epoch or step of each look, ``(n,)``.
        unit: ``'epoch'`` or ``'step'``.
        matrix: Normalised Hamming distances, ``(n, n)``, 0 to 1.
        window: First and last look (indices) of the window that drew the ticket.
    """
    names = [f"{place:.4g}" if unit == "epoch" else f"{place:.0f}" for place in places]
    count = len(names)
    ticks = list(range(0, count, max(1, -(-count // 6))))
    axis = {
        "tickvals": ticks,
        "ticktext": [f"{places[index]:.2g}" if unit == "epoch" else names[index] for index in ticks],
        "tickangle": 0,
        "showgrid": False,
        "zeroline": False,
        "range": [-0.5, count - 0.5],
        "constrain": "domain",
    }
    highest = max((value for row in matrix for value in row), default=0.0)
    heat = {
        "type": "heatmap",
        "z": matrix,
        "zmin": 0,
        "zmax": max(highest, 0.02),
        "xgap": 1 if count <= 40 else 0,
        "ygap": 1 if count <= 40 else 0,
        "colorscale": [[share / 4, f"var(--heat-{share})"] for share in range(5)],
        "customdata": [[[names[row], names[column]] for column in range(count)] for row in range(count)],
        "hovertemplate": (
            f"{unit} %{{customdata[0]}} against {unit} %{{customdata[1]}}: "
            "%{z:.3f} of the channels differ<extra></extra>"
        ),
        "colorbar": {
            "thickness": 10,
            "outlinewidth": 0,
            "len": 0.9,
            "tickfont": {"color": "var(--soft)", "size": 11},
            "title": {"text": "distance", "font": {"color": "var(--soft)", "size": 12}},
        },
    }
    layout = _layout(height=400, margin={"l": 8, "r": 0, "t": 8, "b": 44})
    layout["xaxis"] |= {**axis, "title": {"text": f"look at {unit}", "font": {"size": 12}}}
    layout["yaxis"] |= {**axis, "range": [count - 0.5, -0.5], "scaleanchor": "x", "automargin": True}
    if window is not None:
        first, last = window[0] - 0.5, window[1] + 0.5
        layout["shapes"] = [
            {
                "type": "rect",
                "x0": first,
                "x1": last,
                "y0": first,
                "y1": last,
                "line": {"color": "var(--mark)", "width": 2.5},
            }
        ]
    return {"data": [heat], "layout": layout, "square": True}


def settling(places: Sequence[float], unit: str, distances: Sequence[float | None], tolerance: float | None) -> Figure:
    """Largest distance of each look's mask to those before it in the window, and the tolerance.

    Args:
        places: Epoch or step of each look, ``(n,)``.
        unit: ``'epoch'`` or ``'step'``.
        distances: Normalised Hamming distances, ``(n,)``, 0 to 1; None where there was nothing to compare with.
        tolerance: At or below it, masks count as agreeing.
    """
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(places),
        "y": list(distances),
        "line": {"color": "var(--ticket-0)", "width": 2.2},
        "marker": {"size": 6, "color": "var(--ticket-0)"},
        "hovertemplate": f"{unit} %{{x:.4g}}: %{{y:.3f}}<extra></extra>",
    }
    layout = _layout(height=400, margin={"l": 8, "r": 12, "t": 8, "b": 44})
    layout["xaxis"] |= {"title": {"text": f"look at {unit}", "font": {"size": 12}}, "showgrid": False}
    layout["yaxis"] |= {"rangemode": "tozero", "automargin": True}
    if tolerance is not None:
        rule = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": tolerance, "y1": tolerance}
        layout["shapes"] = [{**rule, "line": {"color": "var(--mark)", "width": 1.5, "dash": "dash"}}]
        layout["annotations"] = [
            {
                "xref": "paper",
                "x": 1,
                "y": tolerance,
                "xanchor": "right",
                "yanchor": "bottom",
                "text": f"tolerance {tolerance:g}",
                "showarrow": False,
                "font": {"color": "var(--mark)", "size": 12},
            }
        ]
    return {"data": [line], "layout": layout, "square": True}


def channel_bars(layers: Mapping[str, tuple[int, int]], unit: str = "channels") -> Figure:
    """Channels, or other units, of every layer before (wide, pale) and after the shrink (narrow, strong).

    Args:
        layers: Layer name to ``(before, after)``.
        unit: What is counted, in the plural.
    """
    names = list(layers)
    before = [layers[name][0] for name in names]
    after = [layers[name][1] for name in names]
    share = [100 * now / old for now, old in zip(after, before)]
    common = {"type": "bar", "x": names}
    data = [
        {
            **common,
            "name": "before",
            "y": before,
            "marker": {"color": "var(--before)"},
            "width": 0.86,
            "hovertemplate": f"%{{x}}: %{{y}} {unit} before<extra></extra>",
        },
        {
            **common,
            "name": "after",
            "y": after,
            "marker": {"color": "var(--after)"},
            "width": 0.5 if len(names) <= 40 else 0.86,
            "customdata": share,
            "hovertemplate": f"%{{x}}: %{{y}} {unit} after, %{{customdata:.3g}} % of before<extra></extra>",
        },
    ]
    layout = _layout(height=330, margin={"l": 8, "r": 8, "t": 8, "b": 24})
    layout["barmode"] = "overlay"
    layout["xaxis"] |= {"type": "category", "tickangle": -60, "showgrid": False, "automargin": True}
    layout["xaxis"]["showticklabels"] = len(names) <= 40
    layout["xaxis"]["tickfont"] = {"size": 11, "color": "var(--soft)"}
    layout["yaxis"] |= {"title": {"text": unit, "font": {"size": 12}, "standoff": 10}, "automargin": True}
    return {"data": data, "layout": layout}


_SERIES = (*TICKET_COLOURS[:4], "var(--mark)", "var(--dense)")


def trace_lines(series: Mapping[str, Sequence[tuple[int, float]]], unit: str, *, hold: bool) -> Figure:
    """Numbers over the steps, one line a series.

    Args:
        series: By name, pairs of step and number.
        unit: Of a number.
        hold: Draw steps: a number holds until the next one.
    """
    last = max((pairs[-1][0] for pairs in series.values() if pairs), default=0)
    data = []
    for index, (name, pairs) in enumerate(series.items()):
        shown = [*pairs, (last, pairs[-1][1])] if hold and pairs and pairs[-1][0] < last else list(pairs)
        data.append(
            {
                "type": "scatter",
                "mode": "lines" if len(shown) > 40 or hold else "lines+markers",
                "name": name,
                "x": [step for step, _ in shown],
                "y": [value for _, value in shown],
                "line": {
                    "color": _SERIES[index % len(_SERIES)],
                    "width": 2.2,
                    "shape": "hv" if hold else "linear",
                },
                "marker": {"size": 5, "color": _SERIES[index % len(_SERIES)]},
                "hovertemplate": f"{name}, step %{{x}}: %{{y:.4g}} {unit}<extra></extra>",
            }
        )
    layout = _layout(height=330, margin={"l": 8, "r": 12, "t": 10, "b": 44})
    layout["xaxis"] |= {"title": {"text": "step", "font": {"size": 12}}, "rangemode": "tozero"}
    layout["yaxis"] |= {"title": {"text": unit, "font": {"size": 12}}, "rangemode": "tozero", "automargin": True}
    if len(series) > 1:
        layout["showlegend"] = True
        layout["legend"] = {"orientation": "h", "y": 1.12, "font": {"size": 11}}
    return {"data": data, "layout": layout}


def trace_map(series: Mapping[str, Sequence[tuple[int, float]]], unit: str, *, hold: bool) -> Figure:
    """Numbers over the steps, one row a series, the stronger the colour the larger.

    Args:
        series: By name, pairs of step and number.
        unit: Of a number.
        hold: A number holds until the next one; else what is missing at a step stays blank.
    """
    steps = sorted({step for pairs in series.values() for step, _ in pairs})
    rows = []
    for pairs in series.values():
        known, row, value = dict(pairs), list[float | None](), None
        for step in steps:
            value = known.get(step, value if hold else None)
            row.append(value)
        rows.append(row)
    # what holds fills the time to the next step, and the last one as much again
    edges = [*steps, steps[-1] + max(steps[-1] - steps[-2], 1)] if hold and len(steps) > 1 else steps
    heat = {
        "type": "heatmap",
        "x": edges,
        "y": list(series),
        "z": rows,
        "zmin": 0,
        "colorscale": [[share / 4, f"var(--heat-{4 - share})"] for share in range(5)],
        "hovertemplate": f"%{{y}}, step %{{x}}: %{{z:.4g}} {unit}<extra></extra>",
        "colorbar": {
            "thickness": 10,
            "outlinewidth": 0,
            "tickfont": {"color": "var(--soft)", "size": 11},
            "title": {"text": unit, "font": {"color": "var(--soft)", "size": 12}},
        },
    }
    layout = _layout(height=max(260, min(90 + 14 * len(series), 640)), margin={"l": 8, "r": 0, "t": 8, "b": 44})
    layout["xaxis"] |= {"title": {"text": "step", "font": {"size": 12}}, "showgrid": False}
    layout["yaxis"] |= {"type": "category", "autorange": "reversed", "automargin": True, "showgrid": False}
    layout["yaxis"]["tickfont"] = {"size": 10, "color": "var(--soft)"}
    return {"data": [heat], "layout": layout}


OPERATION_COLOURS = (
    "var(--phase-search)", "var(--phase-train)", "var(--phase-draw)", "var(--phase-evaluate)", "var(--ticket-0)",
    "var(--ticket-1)", "var(--ticket-2)", "var(--phase-setup)",
)  # fmt: skip


def operation_bars(totals: Mapping[str, Mapping[str, float]], names: Sequence[str], unit: str) -> Figure:
    """Stacked horizontal bars of energy, one bar a contender, one colour an operation.

    Args:
        totals: Contender to operation to value, already in ``unit``.
        names: Operations in the order of their colours.
        unit: What the axis counts.
    """
    labels = list(totals)
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": labels,
            "x": [totals[label].get(name, 0.0) for label in labels],
            "marker": {"color": OPERATION_COLOURS[index % len(OPERATION_COLOURS)], "line": {"width": 0}},
            "hovertemplate": f"%{{y}}, {name}: %{{x:.4g}} {unit}<extra></extra>",
        }
        for index, name in enumerate(names)
    ]
    layout = _layout(height=74 + 40 * len(labels), margin={"l": 8, "r": 8, "t": 4, "b": 40})
    layout["barmode"] = "stack"
    layout["bargap"] = 0.42
    layout["xaxis"] |= {"title": {"text": unit, "font": {"size": 12}}}
    layout["yaxis"] |= {"autorange": "reversed", "automargin": True, "showgrid": False, "ticksuffix": "  "}
    return {"data": data, "layout": layout}


def _layout(*, height: int, margin: dict[str, int]) -> dict[str, Any]:
    axis = {
        "gridcolor": "var(--grid)",
        "zerolinecolor": "var(--line)",
        "linecolor": "var(--line)",
        "tickfont": {"color": "var(--soft)", "size": 12},
        "fixedrange": True,  # a finger on a chart scrolls the page
    }
    return {
        "height": height,
        "margin": margin,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "color": "var(--soft)", "size": 13},
        "hoverlabel": {
            "bgcolor": "var(--card)",
            "bordercolor": "var(--line)",
            "font": {"color": "var(--ink)", "family": FONT},
        },
        "showlegend": False,
        "dragmode": False,
        "xaxis": dict(axis),
        "yaxis": dict(axis),
    }
