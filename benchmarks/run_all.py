"""Run all benchmarks, and write the page of their results: `make bench` (10 minutes) and `make bench-full` (hours).

    EARLYBIRD_DATA=... python benchmarks/run_all.py                # a short version of each
    EARLYBIRD_DATA=... python benchmarks/run_all.py --full --hours 8

Both go on where they were stopped: what has a row is not run again. A script that fails is named at the end, and the
others go on. The short version shows that everything runs and roughly where it leads; claims rest on the full one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from common import HERE

QUICK = {
    "step_times": ["--quick"],
    "overheads": ["detector", "shrink", "startup"],
    "roofline": ["--quick"],
    "scaling": ["--quick"],
    # one rival of each kind: all of them would take six minutes more
    "vgg16_cifar10": [
        "--tasks",
        "quick",
        "--contestants",
        "plain,dense,ticket,resized-ticket,dense-equal-time,small-dense,snip,prune-finetune-taylor,slimming,lottery-one-shot,"
        "progressive-resizing",
    ],
    "networks": ["--tasks", "quick", "--contestants", "dense,ticket"],
    "speedrun_cifar10": ["--tasks", "quick", "--contestants", "dense,resized-ticket"],
    "paper_figures": ["--quick", "--work", "runs/benchmarks/paper-quick"],
}
"""Script to its words for a run of a minute or two."""

FULL = {
    "step_times": ["--width", "1"],
    "overheads": [],
    "roofline": [],
    "scaling": [],
    "vgg16_cifar10": [],
    "speedrun_cifar10": [],
    "networks": [],
    "paper_figures": ["--work", "runs/benchmarks/paper"],
}
_BUDGETED = ("vgg16_cifar10", "speedrun_cifar10", "networks", "paper_figures")
"""Scripts that take ``--budget MINUTES`` and go on where they stopped."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="everything, three seeds; hours")
    parser.add_argument("--hours", type=float, default=8.0, help="of a full run; nothing is begun that would not fit")
    parser.add_argument("--only", default="", help="scripts, separated by commas")
    options = parser.parse_args()
    scripts = FULL if options.full else QUICK
    names = options.only.split(",") if options.only else list(scripts)
    unknown = [name for name in names if name not in scripts]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)} (known: {', '.join(scripts)})")
    deadline = time.monotonic() + 3600 * options.hours
    failed = []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    for name in names:
        words = list(scripts[name])
        left = (deadline - time.monotonic()) / 60
        if options.full and name in _BUDGETED:
            words += ["--budget", f"{max(left, 0):.1f}"]
        print(f"== {name} {' '.join(words)}", flush=True)
        begun = time.monotonic()
        if subprocess.run([sys.executable, str(HERE / f"{name}.py"), *words], env=environment, check=False).returncode:
            failed.append(name)
        print(f"== {name}: {time.monotonic() - begun:.0f} s", flush=True)
    if subprocess.run([sys.executable, str(HERE / "page.py")], env=environment, check=False).returncode:
        failed.append("page")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
