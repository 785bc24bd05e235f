"""Tables of contests, as Markdown: means over seeds, differences and ratios within a seed, failures in words."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import comparable, rows, spread
from contest import Contestant, Task, definition
from figures import COLOURS, Axis, Series, chart
from records import by_machine
from records import newest as newest_session

Row = dict[str, Any]

Newest = Mapping[tuple[str, int], Row]
"""Contestant and seed to the newest row, of one task on one machine."""

FAR = 25
"""Points of accuracy below the best from which on a contestant is named below a plot instead of being shown."""

PACE = 0.05
"""Change of the yardstick between two runs from which on their ratio is marked."""

FAMILIES = {
    "ours": COLOURS[0],
    "dense": COLOURS[5],
    "at initialisation": COLOURS[2],
    "after training": COLOURS[1],
    "lottery": COLOURS[3],
    "speed-up": COLOURS[4],
}
"""Kind of contestant to its colour."""

_PLOTS = {
    "seconds": ("seconds", "seconds of the whole run, measured"),
    "energy": ("joules", "joules of the whole run, modelled"),
    "weights": ("parameters", "weights of the final network, counted"),
}


def contest_tables(name: str, tasks: Mapping[str, Task], contestants: Mapping[str, Contestant]) -> str:
    """Return one table a task and machine that have rows."""
    return "\n".join(contest_table(task, newest, contestants) for _, task, newest in blocks(name, tasks))


def blocks(name: str, tasks: Mapping[str, Task]) -> list[tuple[str, Task, Newest]]:
    """Return a name for files, the task, and its rows, for each task and machine that have rows."""
    return [
        (name_of_task + suffix, task, {(row["contestant"], row["seed"]): row for row in mine})
        for name_of_task, task in tasks.items()
        for suffix, mine in by_machine([row for row in rows(name) if row["task"] == name_of_task])
    ]


def contest_table(task: Task, newest: Newest, contestants: Mapping[str, Contestant]) -> str:
    """Return the table of one task on one machine.

    Args:
        task: What was trained.
        newest: Contestant and seed to row.
        contestants: In the order of the table.
    """
    done = _done(newest)
    base = task.baseline
    called = base if base == "dense" else contestants[base].label.replace("**", "")
    ratios = {"plain / this": ("plain", "seconds"), **{title.format(called): (base, key) for title, key in _RATIOS}}
    if not any(_counts_bits(row) for row in done.values()):
        ratios = {title: ratio for title, ratio in ratios.items() if ratio[1] != "bit_macs"}
    columns = [
        "network", "seeds", "test accuracy", f"points against {called}", "seconds", *ratios, "modelled J", "weights"
    ]  # fmt: skip
    lines = [
        f"### {task.title}",
        "",
        origin(list(newest.values())),
        "",
        f"| {' | '.join(columns)} |",
        "| --- " * len(columns) + "|",
    ]
    marks: set[str] = set()
    for contestant_name, contestant in contestants.items():
        mine = [row for (who, _), row in done.items() if who == contestant_name]
        if mine:
            older = any(row.get("definition") != definition(task, contestant) for row in mine)
            lines.append(_line(contestant_name, contestant, mine, done, older, marks, base, ratios))
    lines += [
        f"| {contestants[who].label} | seed {seed} | {row['status']} |" + " |" * (len(columns) - 3)
        for (who, seed), row in newest.items()
        if row["status"] != "done" and who in contestants
    ]
    if marks:
        lines += ["", *(_MARKS[mark] for mark in _MARKS if mark in marks)]
    return "\n".join([*lines, ""])


def _done(newest: Newest) -> Newest:
    return {key: row for key, row in newest.items() if row["status"] == "done"}


_MARKS = {
    "*": "\\* runs of another session or revision are among the partners, or the machine's pace had changed by 5 %.",
    "†": "† its definition (flags, recipe, or any code of the rivals) has changed since.",
    "‡": "‡ extrapolated from timed steps and a test epoch; its accuracy was not measured.",
}


# columns in which the baseline is divided by this one, and by what
_RATIOS = (("{} / this", "seconds"), ("MACs of the run, {} / this", "macs"), ("bit-MACs, {} / this", "bit_macs"))


def _counts_bits(row: Row) -> bool:
    """Tell whether a run computed in other widths than those of its floating point."""
    operations = ((row.get("bill") or {}).get("total") or {}).get("operations") or {}
    return any(amount and "fp" not in name for name, amount in operations.items())


def _line(
    name: str, contestant: Contestant, mine: list[Row], done: Newest, older: bool, marks: set[str], base: str,
    ratios: Mapping[str, tuple[str, str]],
) -> str:  # fmt: skip
    accuracies = [100 * row["accuracy"] for row in mine if row["accuracy"] is not None]
    points = [100 * (row["accuracy"] - other["accuracy"]) for row, other in paired(mine, done, base, "accuracy")]
    cells = []
    for other, key in ratios.values():
        pairs = paired(mine, done, other, key) if name not in ("plain", other) else []
        signs = "*" if key == "seconds" and any(_apart(row, partner) for row, partner in pairs) else ""
        signs += "‡" if key == "seconds" and any(_extrapolated(partner) for _, partner in pairs) else ""
        marks |= set(signs)
        times = [partner[key] / row[key] for row, partner in pairs]
        fewer = f" (n = {len(times)})" if len(times) < len(mine) else ""
        cells.append(f"{spread(times)}x{signs}{fewer}" if times else "")
    extrapolated = "‡" if any(map(_extrapolated, mine)) else ""
    marks |= {"†" if older else "", extrapolated} - {""}
    joules = [row["joules"] for row in mine if row.get("joules")]
    weights = [row["parameters"] for row in mine if row.get("parameters")]
    return "| " + " | ".join([
        f"{contestant.label}{'†' if older else ''}",
        str(len(mine)),
        f"{spread(accuracies)} %" if accuracies else "not measured",
        spread(points) if points and name != base else "",
        spread([row["seconds"] for row in mine], 0) + extrapolated,
        *cells,
        spread(joules, 0) if joules else "",
        f"{statistics.fmean(weights) / 1e6:.2f} M" if weights else "",
    ]) + " |"  # fmt: skip


def _extrapolated(row: Row) -> bool:
    return bool(row["seconds_kind"].startswith("extrapolated"))


def _apart(row: Row, partner: Row) -> bool:
    """Tell whether the ratio of two rows rests on more than one sitting of one revision at one pace."""
    if any(row.get(key) != partner.get(key) for key in ("session", "revision")):
        return True
    paces = [one["yardstick_s"] for one in (row, partner) if "yardstick_s" in one]
    return len(paces) == 2 and max(paces) > (1 + PACE) * min(paces)


def paired(mine: Sequence[Row], done: Newest, other: str, key: str) -> list[tuple[Row, Row]]:
    """Return each row with its partner of the same seed and machine, where both have a value of ``key``."""
    partners = [(row, done.get((other, row["seed"]))) for row in mine]
    return [
        (row, partner)
        for row, partner in partners
        if partner and comparable(row, partner) and row.get(key) is not None and partner.get(key) is not None
    ]


def origin(block: Sequence[Row]) -> str:
    """Say on what and when rows were measured, and how steady the machine was."""
    texts = []
    for device in sorted({row["device"] for row in block}):
        own = [row for row in block if row["device"] == device]
        listed = {
            key: ", ".join(sorted({str(row[key]) for row in own})) for key in ("torch", "threads", "date", "revision")
        }
        neighbours = max(row.get("side_by_side", 1) for row in own)
        beside = f" ({neighbours} runs at a time, each on cores of its own)" if neighbours > 1 else ""
        text = (
            f"{device}, {listed['threads']} threads{beside}, torch {listed['torch']}; {listed['date']}; "
            f"revision {listed['revision']}"
        )
        sticks = [row["yardstick_s"] for row in own if "yardstick_s" in row]
        if len(sticks) > 1:
            text += (
                f"; a fixed piece of work took {1e3 * min(sticks):.0f} to {1e3 * max(sticks):.0f} ms before the runs"
            )
        texts.append(text)
    return ". ".join(texts) + "."


def session_tables(
    found: Sequence[Row],
    heads: Mapping[str, str],
    line: Callable[[Row], str],
    remark: Callable[[Sequence[Row]], str] = lambda rows: "",
) -> str:
    """Return the newest session of each machine as Markdown.

    Args:
        found: Rows of several kinds.
        heads: Key that a kind of row has to the head of its table.
        line: A row as a line of its table.
        remark: Said after the origin of a session's rows.
    """
    parts = []
    for _, own in by_machine(found):
        mine = newest_session(own)
        parts.append(origin(mine) + remark(mine))
        for key, head in heads.items():
            lines = [line(row) for row in mine if key in row]
            parts += ["\n".join([head, *lines])] if lines else []
    return "\n\n".join(parts)


def contest_section(name: str, tasks: Mapping[str, Task], contestants: Mapping[str, Contestant], images: Path) -> str:
    """Return tables and plots of all tasks as Markdown; the plots are written into ``images``."""
    parts = []
    for file, task, newest in blocks(name, tasks):
        parts.append(contest_table(task, newest, contestants))
        done = [row for row in _done(newest).values() if row["accuracy"] is not None]
        curves = _curves(done, contestants)
        if len(curves) > 1:
            path = images / f"{name}-{file}-curves.svg"
            path.write_text(_plot(curves, "seconds of the run so far, measured", task.title, done), encoding="utf-8")
            parts.append(
                f"![{task.title}: accuracy in the course of runs, ours and dense]({images.name}/{path.name})\n"
            )
        for plot, (key, label) in _PLOTS.items():
            series = _means(done, contestants, key)
            if len(series) > 1:
                path = images / f"{name}-{file}-{plot}.svg"
                path.write_text(_plot(series, label, task.title, done), encoding="utf-8")
                parts.append(f"![{task.title}: accuracy against {label}]({images.name}/{path.name})\n")
    return "\n".join(parts)


def _means(done: Sequence[Row], contestants: Mapping[str, Contestant], key: str) -> list[Series]:
    """Return one point a contestant, its means over seeds of ``key`` and of the accuracy in percent; n in the label."""
    series = []
    for name, contestant in contestants.items():
        mine = [row for row in done if row["contestant"] == name and row.get(key)]
        if mine:
            point = (
                statistics.fmean(row[key] for row in mine),
                100 * statistics.fmean(row["accuracy"] for row in mine),
            )
            series.append(
                Series(points=[point], colour=FAMILIES[contestant.family], label=f"{name} ({len(mine)})", line=False)
            )
    return series


def _curves(done: Sequence[Row], contestants: Mapping[str, Contestant]) -> list[Series]:
    """Return accuracy in percent against seconds of every run of ours and of dense ones; one of each has a label."""
    series: list[Series] = []
    for name, contestant in contestants.items():
        if contestant.family not in ("ours", "dense"):
            continue
        for row in (row for row in done if row["contestant"] == name and len(row.get("curve", ())) > 1):
            points = [(seconds, 100 * accuracy) for seconds, accuracy in row["curve"]]
            label = "" if any(one.label == name for one in series) else name
            series.append(Series(points=points, colour=FAMILIES[contestant.family], label=label))
    return series


def _plot(series: Sequence[Series], label: str, title: str, done: Sequence[Row]) -> str:
    """Return the chart; what ended far below the best would leave no room for the others, and is named instead."""
    floor = max(one.points[-1][1] for one in series) - FAR
    shown = [one for one in series if one.points[-1][1] >= floor]
    x, y = zip(*(point for one in shown for point in one.points))
    far = ", ".join(f"{one.label}: {one.points[-1][1]:.1f} %" for one in series if one not in shown)
    note = f"{done[-1]['device']}, torch {done[-1]['torch']}, {done[-1]['date']}; up and to the left is better"
    return chart(
        shown, Axis.around(x, label, zero=True), Axis.around(y, "test accuracy, %"), title=title,
        note=note + (f"; not shown: {far}" if far else ""),
    )  # fmt: skip
