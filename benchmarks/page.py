"""Write the page of all results, `benchmarks/README.md`, from the rows in `results/`.

python benchmarks/page.py
python benchmarks/page.py --out FOLDER     # FOLDER/README.md and FOLDER/images
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import add_layer
import alternatives
import batch_norm
import block_kernel
import early_bert
import efficient_steps
import few_images
import int8_forward
import networks
import overheads
import paper_figures
import processes
import roofline
import scaling
import speedrun_cifar10
import step_times
import tickets
import transfer
import vgg16_cifar10
from common import HERE, rows

HEAD = """# Benchmarks

This page is made from the rows in [results](results) by `python benchmarks/page.py`; nothing in it is typed by hand.
Every row has device, threads, versions, date and source revision, and that of a whole run its seed. Losses stand beside
wins.

    make bench         # a short version of everything, some ten minutes; its page has a folder of its own
    make bench-full    # all of it, three seeds; hours, goes on where it was stopped

Accuracies come from complete runs. Seconds are wall time of whole runs, set-up, tuning, search, pruning, fine-tuning
and evaluation included; what was extrapolated says so. MACs are counted, joules are modelled (Horowitz, ISSCC 2014,
45 nm; the mean of low and high DRAM price). Every whole run is a process of its own. Where a table does not say how
many ran at a time, they ran one after the other. Ratios and differences are taken within a seed, and never between
machines. Rivals (`rivals/`) are given bf16, channels_last and, since 2026-11-29, kernels of our own without the time
that tuning takes, which favours them a little. Rows of the product from before that day know no such kernels.

A ± b is the mean over seeds and their sample standard deviation; what has no ± is of one seed, or a mean alone
(weights; energy and FLOPs in the figures of the paper). Steps and parts of steps have no seeds: they are medians of
rounds within one process. Of exponents, ± is the standard error.
"""


def step_times_section(images: Path) -> str:
    return step_times.table(rows(step_times.NAME))


def overheads_section(images: Path) -> str:
    return overheads.table(rows(overheads.NAME))


def roofline_section(images: Path) -> str:
    return "\n\n".join([roofline.tables(rows(roofline.NAME)), pictures(images, roofline.draw(images))])


def processes_section(images: Path) -> str:
    return processes.table(rows(processes.NAME))


def alternatives_section(images: Path) -> str:
    return alternatives.tables(rows(alternatives.NAME))


def add_layer_section(images: Path) -> str:
    return add_layer.tables(rows(add_layer.NAME))


def batch_norm_section(images: Path) -> str:
    return batch_norm.tables(rows(batch_norm.NAME))


def int8_forward_section(images: Path) -> str:
    return int8_forward.tables(rows(int8_forward.NAME))


def block_kernel_section(images: Path) -> str:
    return block_kernel.tables(rows(block_kernel.NAME))


def scaling_section(images: Path) -> str:
    return "\n\n".join([scaling.tables(rows(scaling.NAME)), pictures(images, scaling.draw(images))])


def paper_figures_section(images: Path) -> str:
    tables = [paper_figures.table(group) for group in paper_figures.groups(rows(paper_figures.NAME))]
    return "\n\n".join([*tables, pictures(images, paper_figures.draw(images))])


def early_bert_section(images: Path) -> str:
    return early_bert.table()


def pictures(images: Path, named: dict[str, str]) -> str:
    """Return Markdown that shows the files of ``named``, which has file and text."""
    return "\n\n".join(f"![{text}]({images.name}/{file})" for file, text in named.items())


SECTIONS: dict[str, tuple[Any, Callable[[Path], str]]] = {
    "Whole runs: VGG-16 against what a user would pick instead": (vgg16_cifar10, vgg16_cifar10.section),
    "The fastest dense recipe, alone and with our methods": (speedrun_cifar10, speedrun_cifar10.section),
    "Few images, many epochs": (few_images, few_images.section),
    "Other networks": (networks, networks.section),
    "Less on every step: samples, layers, bits, operations": (efficient_steps, efficient_steps.section),
    "Tickets over single weights": (tickets, tickets.section),
    "Transformers: heads and neurons": (early_bert, early_bert_section),
    "Tickets of pre-trained weights on other tasks": (transfer, transfer.section),
    "The figures of the Early-Bird paper": (paper_figures, paper_figures_section),
    "One step": (step_times, step_times_section),
    "Several processes": (processes, processes_section),
    "What the machine could give": (roofline, roofline_section),
    "Other ways to compute a convolution": (alternatives, alternatives_section),
    "The kernel of the add layer": (add_layer, add_layer_section),
    "The kernel of batch norm": (batch_norm, batch_norm_section),
    "A forward pass in 8-bit integers": (int8_forward, int8_forward_section),
    "Dense blocks of a sparse weight": (block_kernel, block_kernel_section),
    "How costs grow": (scaling, scaling_section),
    "What the library itself costs": (overheads, overheads_section),
}
"""Heading to the script and what makes its part of the page; plots go into the folder that this is given."""


def write(folder: Path) -> Path:
    """Write page and plots into ``folder``, and return the page."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    parts = [HEAD]
    for heading, (script, section) in SECTIONS.items():
        # the first line of a script's docstring says what it asks
        asked = f"{script.__doc__.splitlines()[0]} (`{Path(script.__file__).name}`)"
        parts.append(f"## {heading}\n\n{asked}\n\n{section(images).strip() or 'No rows yet.'}\n")
    path = folder / "README.md"
    path.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=HERE, help="where page and images go")
    print(f"wrote {write(parser.parse_args().out)}", file=sys.stderr)


if __name__ == "__main__":
    main()
