"""Contests: several ways to train one network, side by side, seed by seed, each in a process of its own.

A contest is a task (recipe and a few flags) and a list of contestants. Every second seed runs in reverse order, so that
a machine that slows down slows all alike; contestants that need to know what dense and ticket took come last. Seconds
are those of the whole run as its bill has them: set-up, tuning, search, draw, training and evaluation.

What has a row is not run again. A contestant that fails, or needs more than its budget, leaves a row that says so, and
the others go on; `--retry` runs it again. Ratios are taken within one seed, between rows of one machine
(`comparable`); those whose two runs belong to different sessions are marked in the tables.

``--side-by-side 2`` does two runs at a time, each on its own half of the cores: more runs an hour, since small networks
use one core better than two. All of them then have a neighbour, and their rows are never compared with those of runs
that had the machine to themselves.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import HERE, append, machine, rows, source, yardstick
from slots import Children, cores_of_slots, in_slots

WORK = HERE.parent / "runs" / "benchmarks"
RECIPES = HERE.parent / "recipes"


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        title: For tables.
        recipe: Name in ``recipes/``.
        flags: Keys of the recipe that differ.
        seeds: How many a full contest has.
        budget_s: A run that takes longer is stopped.
    """

    title: str
    recipe: str
    flags: Mapping[str, Any]
    seeds: int = 3
    budget_s: float = 3600.0

    @property
    def path(self) -> Path:
        """Return the recipe's file."""
        return RECIPES / f"{self.recipe}.toml"


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    Attributes:
        label: For tables.
        family: For the colours of plots, of `tables.FAMILIES`.
        flags: Of ``earlybird train``, or of the rival's own command.
        rival: Name for `rivals/run.py`; '' for earlybird itself, 'plain' for `plain_pytorch.py`.
        needs: Contestants whose row of the same seed this one needs: 'dense' gives its weights or its time, 'ticket'
            its cost.
        takes_over: The rival begins with a dense training, and takes over that of the needed row.
        longer: Factor on the epochs of the task.
        equal_time: Train dense for as many epochs as take the time of the needed ticket.
    """

    label: str
    family: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    rival: str = ""
    needs: tuple[str, ...] = ()
    takes_over: bool = False
    longer: float = 1.0
    equal_time: bool = False


Found = Mapping[str, dict[str, Any]]
"""Rows of one task and seed by contestant."""


def words(flags: Mapping[str, Any]) -> list[str]:
    """Return flags as they are typed."""
    typed: list[str] = []
    for key, value in flags.items():
        if value is not False:
            typed += ["--" + key.replace("_", "-")] + ([] if value is True else [str(value)])
    return typed


def command(task: Task, contestant: Contestant, seed: int, out: Path, found: Found) -> list[str]:
    """Return the command line of one run, which writes what `read` reads into ``out``."""
    shared = {**task.flags, "seed": seed, "out": out}
    if contestant.rival == "plain":
        return [sys.executable, str(HERE / "plain_pytorch.py"), *words({**shared, **contestant.flags})]
    if not contestant.rival:
        flags = {**shared, **contestant.flags, "epochs": round(contestant.longer * task.flags["epochs"])}
        if contestant.equal_time:
            share = found[contestant.needs[-1]]["seconds"] / found["dense"]["seconds"]
            flags["epochs"] = max(1, round(task.flags["epochs"] * share))
        return [sys.executable, "-m", "earlybird", "train", str(task.path), *words(flags), "--quiet"]
    flags = {"recipe": task.path, **shared, **contestant.flags}
    if "ticket" in contestant.needs:
        flags["macs_share"] = round(found["ticket"]["macs_per_image"] / found["dense"]["macs_per_image"], 4)
    if contestant.takes_over:
        folder = HERE.parent / found["dense"]["folder"]
        if (folder / "result.json").exists():
            flags["dense"] = folder
    return [sys.executable, str(HERE / "rivals" / "run.py"), contestant.rival, *words(flags)]


def read(out: Path) -> dict[str, Any]:
    """Return what a finished run left: a rival's or plain PyTorch's own row, or the row of a run folder."""
    if (out / "row.json").exists():
        row: dict[str, Any] = json.loads((out / "row.json").read_text())
    else:
        result, bill, tuned = (
            json.loads((out / name).read_text()) for name in ("result.json", "bill.json", "tune.json")
        )
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        row = {
            "accuracy": result["accuracy"],
            "seconds": result["seconds"],
            "seconds_kind": "measured",
            "epochs": result["epochs"],
            "parameters": result["parameters"],
            "drawn_at": result["drawn_at"],
            "curve": [[round(line["seconds"], 1), line["accuracy"]] for line in metrics],
            "choice": tuned["choice"],
            "bill": bill,
        }
    return {**row, **_costs(row)}


def _costs(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sums of a bill that tables and plots use; MACs of a training image are those of the last phase."""
    if not row.get("bill"):
        return {}
    total, train = row["bill"]["total"], row["bill"]["phases"].get("train")
    joules = total["modelled_joules"]
    return {
        "macs": total["macs"]["value"] if total["macs"] else None,
        "joules": (joules["low"] + joules["high"]) / 2 if joules else None,
        "peak_bytes": total["peak_bytes"]["value"] if total["peak_bytes"] else None,
        "macs_per_image": train["macs"]["value"] / train["images"]["value"] if train and train["macs"] else None,
    }


def run(
    name: str, tasks: Mapping[str, Task], contestants: Mapping[str, Contestant], options: argparse.Namespace
) -> None:
    """Run what has no row yet, within the budget of ``options``."""
    session = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M")
    deadline = time.monotonic() + 60 * options.budget
    slots = cores_of_slots(options.side_by_side)
    waiting = [
        (task_name, seed, contestant_name)
        for task_name in options.tasks
        for seed in range(options.seeds or tasks[task_name].seeds)
        for contestant_name in order(contestants, options.contestants, seed)
    ]
    running: set[tuple[str, int, str]] = set()
    children = Children()
    changed = threading.Condition()

    def tell(job: tuple[str, int, str], text: str) -> None:
        print(f"{job[0]} {job[2]} seed {job[1]}: {text}", flush=True)

    def missing(job: tuple[str, int, str], found: Found) -> list[str]:
        return [need for need in contestants[job[2]].needs if need not in found]

    def take() -> tuple[tuple[str, int, str], Found] | None:
        """Return the first run that has all it needs, and what it needs; None when there is none left."""
        with changed:
            while waiting and not children.killed:
                everything = rows(name)
                for job in list(waiting):
                    task_name, seed, contestant_name = job
                    same = [row for row in everything if (row["task"], row["seed"]) == (task_name, seed)]
                    found = {row["contestant"]: row for row in same if row["status"] == "done"}
                    tried = any(row["contestant"] == contestant_name for row in same)
                    expected = _expected(everything, task_name, contestant_name)
                    if contestant_name in found or (tried and not options.retry):
                        waiting.remove(job)
                    elif missing(job, found):
                        continue
                    elif time.monotonic() + expected > deadline:
                        waiting.remove(job)
                        tell(job, f"about {expected:.0f} s, no time left")
                    else:
                        waiting.remove(job)
                        running.add(job)
                        return job, found
                if waiting and not running:  # nobody is left who could bring what they need
                    for job in waiting:
                        tell(job, f"waits for {', '.join(contestants[job[2]].needs)}")
                    waiting.clear()
                elif waiting:
                    changed.wait()
        return None

    def work(slot: int) -> None:
        while (taken := take()) is not None:
            (task_name, seed, contestant_name), found = taken
            try:
                threads = len(slots[slot])
                head = {**machine(threads), "side_by_side": len(slots), "session": session, "source": source(name)}
                head["yardstick_s"] = yardstick(threads)
                tell(taken[0], "begins")
                out = WORK / name / task_name / f"{contestant_name}-seed{seed}"
                row = attempt(tasks[task_name], contestants[contestant_name], seed, out, found, children)
                if children.killed:
                    return
                append(name, {"task": task_name, "contestant": contestant_name, "seed": seed, **row, **head})
                tell(taken[0], row["status"] if row["status"] != "done" else f"{row['seconds']:.0f} s")
            finally:
                with changed:
                    running.remove(taken[0])
                    changed.notify_all()

    in_slots(slots, work, children.kill)


def order(contestants: Mapping[str, Contestant], asked: Sequence[str], seed: int) -> list[str]:
    """Return the contestants in the order of this seed: to and fro, those that need others last."""
    names = [name for name in contestants if name in asked]
    first = [name for name in names if not contestants[name].needs]
    later = [name for name in names if contestants[name].needs]
    return [*first, *later] if seed % 2 == 0 else [*reversed(first), *reversed(later)]


def _expected(everything: Sequence[Mapping[str, Any]], task: str, contestant: str) -> float:
    known = [
        row["seconds"]
        for row in everything
        if (row["task"], row["contestant"], row["status"]) == (task, contestant, "done")
        and row["seconds_kind"] == "measured"
    ]
    return max(known, default=0.0)


def attempt(
    task: Task, contestant: Contestant, seed: int, out: Path, found: Found, children: Children
) -> dict[str, Any]:
    """Do one run in a process of its own, of ``children`` while it runs; return its row, whatever becomes of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.parent / f"{out.name}.log"
    _discard(out)
    begun = time.monotonic()
    with open(log, "w+", encoding="utf-8") as said:
        try:
            code = children.run(command(task, contestant, seed, out, found), said, _environment(), task.budget_s)
        except subprocess.TimeoutExpired:
            return {"status": f"needed more than {task.budget_s:.0f} s and was stopped"}
    if code:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["no message"]
        return {"status": f"failed with exit code {code}: {last[0]}", "seconds": time.monotonic() - begun}
    return {"status": "done", "folder": str(out.relative_to(HERE.parent)), **read(out)}


def _environment() -> dict[str, str]:
    """Return an environment in which the children import this checkout, not whatever is installed."""
    path = os.pathsep.join(filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def _discard(out: Path) -> None:
    """Make room for a run: what an earlier try left there has no row, or it would not be tried again."""
    if out.exists():
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        out.rename(out.with_name(f"{out.name}-abandoned-{stamp}"))


def main(
    script: str,
    doc: str,
    tasks: Mapping[str, Task],
    contestants: Mapping[str, Contestant],
    table: Callable[[], str],
    default: Sequence[str],
) -> None:
    """The command line of a contest."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    listed = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--tasks", type=listed, default=list(default), help=f"of {', '.join(tasks)}")
    parser.add_argument("--contestants", type=listed, default=list(contestants), help=f"of {', '.join(contestants)}")
    parser.add_argument("--seeds", type=int, help="how many; default: the task's")
    parser.add_argument("--budget", type=float, default=1e9, help="minutes; nothing is begun that would not fit")
    parser.add_argument("--side-by-side", type=int, default=1, help="runs at a time, each on its own cores")
    parser.add_argument("--retry", action="store_true", help="try again what failed or was stopped")
    parser.add_argument("--table", action="store_true", help="print the table of all rows and stop")
    options = parser.parse_args()
    for asked, known in ((options.tasks, tasks), (options.contestants, contestants)):
        unknown = [name for name in asked if name not in known]
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)} (known: {', '.join(known)})")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a child in its own session goes, too
    if not options.table:
        run(script, tasks, contestants, options)
    print(table())
