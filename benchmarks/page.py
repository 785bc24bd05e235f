"""Write `benchmarks/README.md`, the page of all results, from the rows in `results/`.

python benchmarks/page.py
"""

from __future__ import annotations

import importlib
from pathlib import Path

from common import HERE

SECTIONS = {
    "vgg16_cifar10": "Whole runs: VGG-16 against what a user would pick instead",
    "speedrun_cifar10": "The fastest dense recipe, alone and with our methods",
    "networks": "Other networks",
    "paper_figures": "The figures of the Early-Bird paper",
    "step_times": "One step",
    "roofline": "What the machine could give",
    "scaling": "How costs grow",
    "overheads": "What the library itself costs",
}
"""Script to the heading of its results."""

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


def write(folder: Path) -> Path:
    """Write page and plots into ``folder``, and return the page."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    parts = [HEAD]
    for name, heading in SECTIONS.items():
        module = importlib.import_module(name)
        found = module.section(images)
        # the first line of a script's docstring is its claim
        parts.append(f"## {heading}\n\n{module.__doc__.splitlines()[0]} (`{name}.py`)\n\n{found or 'No rows yet.'}\n")
    path = folder / "README.md"
    path.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    print(f"wrote {write(HERE)}")
