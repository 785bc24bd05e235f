"""Write `benchmarks/README.md`, the page of all results, from the rows in `results/`.

python benchmarks/page.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import networks
import overheads
import paper_figures
import roofline
import scaling
import speedrun_cifar10
import step_times
import vgg16_cifar10
from common import HERE, rows
from tables import origin

HEAD = """# Benchmarks

This page is made from the rows in [results](results) by `python benchmarks/page.py`; nothing in it is typed by hand.
Every row has device, threads, versions, date, source revision and seed. Losses stand beside wins.

    make bench         # a short version of everything, some ten minutes
    make bench-full    # all of it, three seeds; hours, goes on where it was stopped

Accuracies come from complete runs. Seconds are wall time of whole runs, set-up, tuning, search, pruning, fine-tuning
and evaluation included; what was extrapolated says so. MACs are counted, joules are modelled (Horowitz, ISSCC 2014,
45 nm; the mean of low and high DRAM price). Contestants of one seed run one after the other, each in a process of its
own; ratios and differences are taken within a seed, and never between machines. Rivals (`rivals/`) are given bf16 and
channels_last without the time that tuning takes, which favours them a little.
"""


def step_times_section(images: Path) -> str:
    """Return one table of step times a width, from the newest rows."""
    newest = {(row["width"], row["contestant"]): row for row in rows("step_times")}
    parts = []
    for width in sorted({width for width, _ in newest}, reverse=True):
        mine = {name: row for (of, name), row in newest.items() if of == width}
        lines = [
            f"Width {width:g}: {origin(list(mine.values()))}", "",
            "| network | forward MACs | ms a step (median) | plain / this | dense / this |",
            "| --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for name, row in mine.items():
            ratios = [
                f"{mine[other]['step_seconds'] / row['step_seconds']:.2f}x" if other in mine and other != name else ""
                for other in ("plain", "dense")
            ]
            macs, ms = f"{row['forward_macs'] / 1e6:.0f} M", f"{1e3 * row['step_seconds']:.0f}"
            lines.append("| " + " | ".join([name, macs, ms, *ratios]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def overheads_section(images: Path) -> str:
    """Return the newest figure of each kind."""
    newest = {row["figure"]: row for row in rows("overheads")}
    if not newest:
        return ""
    lines = [origin(list(newest.values())), "", "| figure | share | what was measured |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {format(row['share'], '.2%') if 'share' in row else ''} | {row['detail']} |"
        for name, row in newest.items()
    ]
    return "\n".join(lines)


def roofline_section(images: Path) -> str:
    """Return what whole steps reach, what rounding brings, and the figures."""
    found = rows(roofline.NAME)
    steps = {(row["width"], row["network"]): row for row in found if row["part"] == "layers"}
    rounded = {(row["width"], row["multiple"]): row for row in found if row["part"] == "rounding"}
    parts = []
    if steps:
        lines = [
            origin(list(steps.values())), "",
            "| width | network | ms a step | GFLOP/s | share of the fastest matrix product | of the roofline |",
            "| --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        lines += [
            f"| {width:g} | {name} | {1e3 * row['step_seconds']:.1f} | {row['flops'] / row['step_seconds'] / 1e9:.0f} "
            f"| {row['of_peak']:.0%} | {row['of_roofline']:.0%} |"
            for (width, name), row in steps.items()
        ]
        parts.append("\n".join(lines))
    if rounded:
        lines = [
            "Widths of one ticket, rounded up:", "",
            "| width | multiple of | weights | forward MACs | ms a step | against 1 |",
            "| --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        lines += [
            f"| {width:g} | {multiple} | {row['parameters'] / 1e6:.2f} M | {row['forward_macs'] / 1e6:.1f} M "
            f"| {1e3 * row['step_seconds']:.1f} | {row['against_1']:.2f}x |"
            for (width, multiple), row in rounded.items()
        ]
        parts.append("\n".join(lines))
    if steps and any(row["part"] == "channels" for row in found):
        roofline.draw(images)
        parts += pictures(
            images, {"roofline.svg": "Speed against intensity", "channels.svg": "Efficiency against channels"}
        )
    return "\n\n".join(parts)


def scaling_section(images: Path) -> str:
    """Return exponents, points and figures of all sweeps."""
    found = rows(scaling.NAME)
    if not found:
        return ""
    named = {}
    for sweep in scaling.SWEEPS:
        if scaling.complete(sweep, found):
            named[f"scaling-{sweep}.svg"] = f"Time of a step against {sweep}"
            (images / f"scaling-{sweep}.svg").write_text(scaling.figure(sweep, found), encoding="utf-8")
    return "\n\n".join([origin(found), scaling.table(found), *pictures(images, named), scaling.points_table(found)])


def paper_figures_section(images: Path) -> str:
    """Return table and figures of every network and data set."""
    parts = []
    for group in paper_figures.groups(rows(paper_figures.NAME)):
        parts.append(paper_figures.table(group))
        named = {}
        for name, drawing in paper_figures.DRAWINGS.items():
            svg = drawing(group)
            if svg is not None:
                file = f"paper-{name}-{group.network}-{group.data}-{group.preset}-{group.epochs}ep.svg".replace(
                    "_", "-"
                )
                (images / file).write_text(svg, encoding="utf-8")
                named[file] = f"{name.replace('_', ' ')}: {group.title}"
        parts += pictures(images, named)
    return "\n\n".join(parts)


def pictures(images: Path, named: dict[str, str]) -> Iterable[str]:
    """Return Markdown that shows the files of ``named``, which has file and text."""
    return [f"![{text}]({images.name}/{file})" for file, text in named.items()]


SECTIONS: dict[str, tuple[Any, Callable[[Path], str]]] = {
    "Whole runs: VGG-16 against what a user would pick instead": (vgg16_cifar10, vgg16_cifar10.section),
    "The fastest dense recipe, alone and with our methods": (speedrun_cifar10, speedrun_cifar10.section),
    "Other networks": (networks, networks.section),
    "The figures of the Early-Bird paper": (paper_figures, paper_figures_section),
    "One step": (step_times, step_times_section),
    "What the machine could give": (roofline, roofline_section),
    "How costs grow": (scaling, scaling_section),
    "What the library itself costs": (overheads, overheads_section),
}
"""Heading to the script and what makes its part of the page."""


def write(folder: Path) -> Path:
    """Write page and plots into ``folder``, and return the page."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    parts = [HEAD]
    for heading, (script, section) in SECTIONS.items():
        # the first line of a script's docstring is its claim
        claim = f"{script.__doc__.splitlines()[0]} (`{Path(script.__file__).name}`)"
        parts.append(f"## {heading}\n\n{claim}\n\n{section(images).strip() or 'No rows yet.'}\n")
    path = folder / "README.md"
    path.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    print(f"wrote {write(HERE)}", file=sys.stderr)
