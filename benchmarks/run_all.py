"""Run all benchmarks, and write the page of their results: `make bench` (10 minutes) and `make bench-full` (hours).

    EARLYBIRD_DATA=... python benchmarks/run_all.py                # a short version of each
    EARLYBIRD_DATA=... python benchmarks/run_all.py --full --hours 8

The short version measures everything anew, writes rows, run folders and page into a new folder below `runs/`, and
prints the page: it shows that everything runs and roughly where it leads. Claims rest on the full one, whose rows and
page are the committed ones. The full one goes on where it was stopped: whole runs and sweeps that have their rows are
not done again. What takes minutes (steps, roofline, other ways, overheads) is timed anew each time.

Scripts of whole runs share what is left of the hours: each may use what is left over the number of those still to come,
and what it leaves goes to the next. A script that fails is named at the end, and the others go on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import HERE, WORK, environment
from slots import cores_of_slots

RUNS = HERE.parent / "runs"
Job = tuple[str, list[str]]
"""Script and its words."""

BUDGETED = (
    "vgg16_cifar10",
    "speedrun_cifar10",
    "few_images",
    "networks",
    "efficient_steps",
    "tickets",
    "early_bert",
    "paper_figures",
)
"""Scripts that take ``--budget MINUTES`` and go on where they stopped."""

# one rival of each kind: all of them would take six minutes more
_CONTESTANTS = (
    "plain", "dense", "ticket", "resized-ticket", "dense-equal-time", "small-dense", "snip", "prune-finetune-taylor",
    "slimming", "lottery-one-shot", "progressive-resizing",
)  # fmt: skip


def quick(work: Path) -> list[Job]:
    """Return every script with words for a run of a minute or two, run folders below ``work``."""
    return [
        ("step_times", ["--quick"]),
        ("overheads", ["--quick"]),
        ("processes", ["--quick"]),
        ("roofline", ["--quick"]),
        ("alternatives", ["--quick"]),
        ("add_layer", ["--quick"]),
        ("batch_norm", ["--quick"]),
        ("int8_forward", ["--quick"]),
        ("block_kernel", ["--quick"]),
        ("scaling", ["--quick"]),
        ("vgg16_cifar10", ["--tasks", "quick", "--contestants", ",".join(_CONTESTANTS)]),
        ("few_images", ["--tasks", "quick"]),
        ("networks", ["--tasks", "quick", "--contestants", "dense,ticket"]),
        ("speedrun_cifar10", ["--tasks", "quick", "--contestants", "dense,resized-ticket"]),
        ("efficient_steps", ["--tasks", "quick"]),
        ("tickets", ["--tasks", "quick", "--seeds", "1"]),
        ("early_bert", ["--quick"]),
        ("transfer", ["--quick", "--seeds", "1"]),
        ("paper_figures", ["--quick", "--work", str(work / "paper")]),
    ]


def full(work: Path) -> list[Job]:
    """Return every script with words for all that it has, run folders below ``work``.

    Small networks use one core better than two, so theirs run two at a time where there are two cores.
    """
    together = side_by_side()
    return [
        ("step_times", ["--width", "1"]),
        ("step_times", ["--width", "0.5"]),
        ("overheads", []),
        ("processes", []),
        ("roofline", []),
        ("alternatives", []),
        ("add_layer", []),
        ("batch_norm", []),
        ("int8_forward", []),
        ("block_kernel", []),
        ("scaling", []),
        ("vgg16_cifar10", ["--tasks", "half"]),
        ("vgg16_cifar10", ["--tasks", "quarter", *together]),
        ("vgg16_cifar10", ["--tasks", "full"]),
        ("speedrun_cifar10", ["--tasks", "speedrun"]),
        ("few_images", ["--tasks", "half,full", *together]),
        ("networks", ["--tasks", "resnet20,resnet18,preact_resnet29,mobilenet_v2", *together]),
        (
            "efficient_steps",
            ["--tasks", "dropping,skipping,skipping-time,ladder,signs,e2,operations,search,together", *together],
        ),
        ("tickets", ["--tasks", "imp-mnist,imp-fashion,dynamic,kd,elastic,structure,sanity,sanity-plain"]),
        ("early_bert", ["--tasks", "sst2,scratch,mlm"]),
        ("paper_figures", ["--work", str(work / "paper"), *together]),
        ("transfer", []),
    ]


def side_by_side() -> list[str]:
    """Return the words for two runs at a time, where two cores can be told apart."""
    try:
        cores_of_slots(2)
    except ValueError:
        return []
    return ["--side-by-side", "2"]


def run(jobs: list[Job], deadline: float | None, variables: dict[str, str]) -> list[str]:
    """Run scripts one after the other, with ``variables`` in their environment; return the names of those that failed.

    Args:
        jobs: What to run.
        deadline: Of `time.monotonic`, which budgeted scripts share; None: they run as long as they take.
        variables: To be set.
    """
    failed = []
    for index, (name, own) in enumerate(jobs):
        words = list(own)
        if deadline is not None and name in BUDGETED:
            to_come = sum(other in BUDGETED for other, _ in jobs[index:])
            words += ["--budget", f"{max(deadline - time.monotonic(), 0) / 60 / to_come:.1f}"]
        print(f"== {name} {' '.join(words)}", flush=True)
        begun, command = time.monotonic(), [sys.executable, str(HERE / f"{name}.py"), *words]
        if subprocess.run(command, env={**environment(), **variables}, check=False).returncode:
            failed.append(name)
        print(f"== {name}: {time.monotonic() - begun:.0f} s", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="everything, three seeds; hours")
    parser.add_argument("--hours", type=float, default=8.0, help="of a full run; nothing is begun that would not fit")
    parser.add_argument("--only", default="", help="scripts, separated by commas")
    options = parser.parse_args()
    known = list(dict.fromkeys(name for name, _ in full(RUNS)))
    chosen = options.only.split(",") if options.only else known
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)} (known: {', '.join(known)})")
    if options.full:
        page, variables, deadline = HERE, {}, time.monotonic() + 3600 * options.hours
        jobs = full(WORK)
    else:
        RUNS.mkdir(exist_ok=True)
        page, deadline = Path(tempfile.mkdtemp(prefix="bench-", dir=RUNS)), None
        variables = {"EARLYBIRD_BENCH_RESULTS": str(page / "results"), "EARLYBIRD_BENCH_WORK": str(page / "runs")}
        jobs = quick(page / "runs")
    failed = run([job for job in jobs if job[0] in chosen], deadline, variables)
    written = run([("page", ["--out", str(page)])], None, variables)
    if not options.full and not written:
        print((page / "README.md").read_text(encoding="utf-8"))
        print(f"This page: {page / 'README.md'}", flush=True)
    if failed or written:
        print(f"failed: {', '.join([*failed, *written])}", file=sys.stderr)
    return bool(failed or written)


if __name__ == "__main__":
    sys.exit(main())
