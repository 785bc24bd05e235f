"""Tables of contests, as Markdown: means over seeds, differences and ratios within a seed, failures in words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import comparable, rows, source, spread
from contest import Contestant, Task
from figures import COLOURS, Axis, Series, chart

Row = dict[str, Any]

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
    """Return one table a task that has rows."""
    everything = rows(name)
    blocks = []
    for task_name, task in tasks.items():
        block = [row for row in everything if row["task"] == task_name]
        if block:
            blocks.append(contest_table(task, block, contestants, source(name)))
    return "\n".join(blocks)


def contest_table(task: Task, block: Sequence[Row], contestants: Mapping[str, Contestant], now: str) -> str:
    """Return the table of one task.

    Args:
        task: What was trained.
        block: Its rows, newest last; of several of one contestant and seed, the last one counts.
        contestants: In the order of the table.
        now: Source digits of today's scripts; rows of others are marked.
    """
    newest = {(row["contestant"], row["seed"]): row for row in block}
    done = {key: row for key, row in newest.items() if row["status"] == "done"}
    lines = [
        f"### {task.title}",
        "",
        origin(list(newest.values())),
        "",
        "| network | seeds | test accuracy | points against dense | seconds | plain / this | dense / this "
        "| training MACs, dense / this | modelled J | weights |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    marks: set[str] = set()
    for contestant_name, contestant in contestants.items():
        mine = [row for (who, _), row in done.items() if who == contestant_name]
        if mine:
            lines.append(_line(contestant_name, contestant, mine, done, now, marks))
    lines += [
        f"| {contestants[who].label} | seed {seed} | {row['status']} | | | | | | | |"
        for (who, seed), row in newest.items()
        if row["status"] != "done" and who in contestants
    ]
    if marks:
        lines += ["", *(_MARKS[mark] for mark in _MARKS if mark in marks)]
    return "\n".join([*lines, ""])


_MARKS = {
    "*": "\\* partner runs of another session are among them: the machine may have been faster or slower then.",
    "†": "† measured with an older version of these scripts.",
    "‡": "‡ extrapolated from timed steps and a test epoch; its accuracy was not measured.",
}


def _line(
    name: str, contestant: Contestant, mine: list[Row], done: Mapping[tuple[str, int], Row], now: str, marks: set[str]
) -> str:
    accuracies = [100 * row["accuracy"] for row in mine if row["accuracy"] is not None]
    points = [100 * (row["accuracy"] - dense["accuracy"]) for row, dense in paired(mine, done, "dense", "accuracy")]
    cells = []
    for other, key in (("plain", "seconds"), ("dense", "seconds"), ("dense", "macs")):
        pairs = paired(mine, done, other, key) if name not in ("plain", other) else []
        apart = key == "seconds" and any(row.get("session") != partner.get("session") for row, partner in pairs)
        marks |= {"*"} if apart else set()
        ratios = [partner[key] / row[key] for row, partner in pairs]
        cells.append(f"{spread(ratios)}x{'*' if apart else ''}" if ratios else "")
    older = "†" if any(row.get("source") != now for row in mine) else ""
    extrapolated = "‡" if any(row["seconds_kind"].startswith("extrapolated") for row in mine) else ""
    marks |= {older, extrapolated} - {""}
    joules = [row["joules"] for row in mine if row.get("joules")]
    return "| " + " | ".join([
        f"{contestant.label}{older}",
        str(len(mine)),
        f"{spread(accuracies)} %" if accuracies else "not measured",
        spread(points) if points and name != "dense" else "",
        spread([row["seconds"] for row in mine], 0) + extrapolated,
        *cells,
        spread(joules, 0) if joules else "",
        f"{statistics.fmean(row['parameters'] for row in mine) / 1e6:.2f} M" if mine[0].get("parameters") else "",
    ]) + " |"  # fmt: skip


def paired(mine: Sequence[Row], done: Mapping[tuple[str, int], Row], other: str, key: str) -> list[tuple[Row, Row]]:
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


def contest_section(name: str, tasks: Mapping[str, Task], contestants: Mapping[str, Contestant], images: Path) -> str:
    """Return tables and plots of all tasks as Markdown; the plots are written into ``images``."""
    everything = rows(name)
    parts = []
    for task_name, task in tasks.items():
        block = [row for row in everything if row["task"] == task_name]
        if not block:
            continue
        parts.append(contest_table(task, block, contestants, source(name)))
        done = [row for row in block if row["status"] == "done" and row["accuracy"] is not None]
        curves = _curves(done, contestants)
        if len(curves) > 1:
            path = images / f"{name}-{task_name}-curves.svg"
            path.write_text(
                _plot(curves, "seconds of the run so far, measured", task.title, block[-1]), encoding="utf-8"
            )
            parts.append(f"![{task.title}: accuracy in the course of the runs]({images.name}/{path.name})\n")
        for plot, (key, label) in _PLOTS.items():
            series = _means(done, contestants, key)
            if len(series) > 1:
                path = images / f"{name}-{task_name}-{plot}.svg"
                path.write_text(_plot(series, label, task.title, block[-1]), encoding="utf-8")
                parts.append(f"![{task.title}: accuracy against {label}]({images.name}/{path.name})\n")
    return "\n".join(parts)


def _means(done: Sequence[Row], contestants: Mapping[str, Contestant], key: str) -> list[Series]:
    """Return one point a contestant: its means over seeds of ``key`` and of the accuracy in percent."""
    series = []
    for name, contestant in contestants.items():
        mine = [row for row in done if row["contestant"] == name and row.get(key)]
        if mine:
            point = (
                statistics.fmean(row[key] for row in mine),
                100 * statistics.fmean(row["accuracy"] for row in mine),
            )
            series.append(Series(points=[point], colour=FAMILIES[contestant.family], label=name, line=False))
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


def _plot(series: Sequence[Series], label: str, title: str, row: Row) -> str:
    x, y = zip(*(point for one in series for point in one.points))
    return chart(
        series, Axis.around(x, label, zero=True), Axis.around(y, "test accuracy, %"), title=title,
        note=f"{row['device']}, torch {row['torch']}, {row['date']}; up and to the left is better",
    )  # fmt: skip
