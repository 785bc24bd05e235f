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
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import HERE, WORK, append, condition, digest, environment, load, machine, rows, yardstick
from slots import Children, cores_of_slots, in_slots

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
        contestants: Who takes part; all of the script's where none is named.
        baseline: The contestant that tables compare the others with.
    """

    title: str
    recipe: str
    flags: Mapping[str, Any]
    seeds: int = 3
    budget_s: float = 3600.0
    contestants: tuple[str, ...] = ()
    baseline: str = "dense"

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
        equal_time: Train for as many epochs as take at least the time of the last one needed; of the first one needed
            is known what an epoch takes.
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


def command(
    task: Task, contestant: Contestant, seed: int, out: Path, found: Found, where: Mapping[str, Any]
) -> list[str]:
    """Return the command line of one run, which writes what `read` reads into ``out``.

    Args:
        task: What is trained.
        contestant: How.
        seed: Of the run.
        out: Its folder.
        found: What the contestant needs.
        where: ``accelerator`` and ``threads``.

    Raises:
        KeyError, TypeError: A needed row lacks the number that is needed.
    """
    flags = {**task.flags, "epochs": epochs(task, contestant, found), "seed": seed, **where, "out": out}
    flags |= contestant.flags
    if not contestant.rival:
        return [sys.executable, "-m", "earlybird", "train", str(task.path), *words(flags), "--quiet"]
    flags = {"recipe": task.path, **flags}
    if contestant.rival == "plain":
        return [sys.executable, str(HERE / "plain_pytorch.py"), *words(flags)]
    if "ticket" in contestant.needs:
        flags["macs_share"] = round(found["ticket"]["macs_per_image"] / found["dense"]["macs_per_image"], 4)
    if contestant.takes_over:
        folder = HERE.parent / found["dense"]["folder"]
        if (folder / "result.json").exists():
            flags["dense"] = folder
    return [sys.executable, str(HERE / "rivals" / "run.py"), contestant.rival, *words(flags)]


def epochs(task: Task, contestant: Contestant, found: Found) -> float:
    """Return how many epochs a contestant trains for; set-up does not shrink with them, so it is left out."""
    whole = task.flags["epochs"]
    if not contestant.equal_time:
        return round(contestant.longer * whole)
    own, other = found[contestant.needs[0]], found[contestant.needs[-1]]
    setup = own["bill"]["phases"]["setup"]["seconds"]["value"]
    each = (own["seconds"] - setup) / own["epochs"]
    return max(0.01, math.ceil(100 * (other["seconds"] - setup) / each) / 100)


def definition(task: Task, contestant: Contestant) -> str:
    """Return digits that change when a contestant is another one: task, flags, recipe, or the code of a rival.

    The product's own code is what ``revision`` says.
    """
    files = [task.path]
    if contestant.rival:
        files += [HERE / "plain_pytorch.py"] if contestant.rival == "plain" else sorted((HERE / "rivals").glob("*.py"))
    said = json.dumps([task.recipe, dict(task.flags), {**asdict(contestant), "label": "", "family": ""}])
    return digest(said, *files)


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
        if (out / "ticket.safetensors").exists():
            row["ticket"] = masks(out / "ticket.safetensors")
    return {**row, **_costs(row)}


def masks(path: Path) -> dict[str, str]:
    """Return the masks of a ticket's file by layer, each a string of 1 (stays) and 0."""
    from earlybird import Ticket

    return {name: "".join(str(int(stays)) for stays in mask) for name, mask in Ticket.load(path).masks.items()}


def distance(one: Mapping[str, str], other: Mapping[str, str]) -> float:
    """Return the share of units on which two tickets of `masks` differ."""
    pairs = [pair for name, mask in one.items() for pair in zip(mask, other[name], strict=True)]
    return sum(a != b for a, b in pairs) / len(pairs)


def _costs(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sums of a bill that tables and plots use; MACs of a training image are those of the last phase."""
    if not row.get("bill"):
        return {}
    total, train = row["bill"]["total"], row["bill"]["phases"].get("train")
    joules = total["modelled_joules"]
    return {
        "macs": total["macs"]["value"] if total["macs"] else None,
        "bit_macs": total["bit_macs"]["value"] if total["bit_macs"] else None,
        "joules": (joules["low"] + joules["high"]) / 2 if joules else None,
        "peak_bytes": total["peak_bytes"]["value"] if total["peak_bytes"] else None,
        "macs_per_image": train["macs"]["value"] / train["images"]["value"] if train and train["macs"] else None,
    }


Job = tuple[str, int, str]
"""Task, seed and contestant."""


class Queue:
    """What is left to run; hands out the first run that has what it needs, to several threads at once."""

    def __init__(
        self,
        name: str,
        tasks: Mapping[str, Task],
        contestants: Mapping[str, Contestant],
        options: argparse.Namespace,
        here: tuple[Any, ...],
    ) -> None:
        self._name, self._tasks, self._contestants, self._here = name, tasks, contestants, here
        self._retry, self._deadline = options.retry, time.monotonic() + 60 * options.budget
        self._waiting: list[Job] = [
            (task, seed, contestant)
            for task in options.tasks
            for seed in range(options.seeds or tasks[task].seeds)
            for contestant in order(contestants, options.contestants, seed)
            if contestant in (tasks[task].contestants or contestants)
        ]
        self._running: set[Job] = set()
        self._changed = threading.Condition()

    def take(self) -> tuple[Job, Found] | None:
        """Return a run and the rows that it needs, when there are such; None when nothing is left."""
        with self._changed:
            while self._waiting:
                mine = [row for row in rows(self._name) if condition(row) == self._here]
                for job in list(self._waiting):
                    task, seed, contestant = job
                    same = [row for row in mine if (row["task"], row["seed"]) == (task, seed)]
                    found = {row["contestant"]: row for row in same if row["status"] == "done"}
                    tried = any(row["contestant"] == contestant for row in same)
                    expected = expected_s(mine, self._tasks[task], task, contestant)
                    if contestant in found or (tried and not self._retry):
                        self._waiting.remove(job)
                    elif any(need not in found for need in self._contestants[contestant].needs):
                        continue
                    elif time.monotonic() + expected > self._deadline:
                        self._waiting.remove(job)
                        tell(job, f"about {expected:.0f} s, no time left")
                    else:
                        self._waiting.remove(job)
                        self._running.add(job)
                        return job, found
                if self._waiting and not self._running:  # nobody is left who could bring what they need
                    for job in self._waiting:
                        tell(job, f"waits for {', '.join(self._contestants[job[2]].needs)}")
                    self._waiting.clear()
                elif self._waiting:
                    self._changed.wait()
        return None

    def end(self, job: Job, row: Mapping[str, Any] | None) -> None:
        """Write the row of a run that is over; without one, it was stopped, and nothing is begun any more."""
        with self._changed:
            self._running.remove(job)
            if row is None:
                self._waiting.clear()
            else:
                append(self._name, row)
            self._changed.notify_all()


def run(
    name: str, tasks: Mapping[str, Task], contestants: Mapping[str, Contestant], options: argparse.Namespace
) -> list[str]:
    """Run what has no row of this machine yet, within the budget of ``options``; return what failed, in words."""
    session = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M")
    slots = cores_of_slots(options.side_by_side)
    where = {"accelerator": options.accelerator, "threads": len(slots[0])}
    head = {**machine(len(slots[0]), len(slots), options.accelerator), "session": session}
    queue = Queue(name, tasks, contestants, options, condition(head))
    children = Children()
    failed: list[str] = []

    def work(_: int) -> None:
        while (taken := queue.take()) is not None:
            job, found = taken
            task, seed, contestant = job
            row = None
            try:
                tell(job, "begins")
                key = {
                    "task": task, "contestant": contestant, "seed": seed, **head, "load_before": load(),
                    "definition": definition(tasks[task], contestants[contestant]),
                    "yardstick_s": yardstick(where["threads"]),
                }  # fmt: skip
                out = WORK / name / task / f"{contestant}-seed{seed}"
                begun = time.monotonic()
                outcome = attempt(tasks[task], contestants[contestant], seed, out, found, where, children)
                if not children.killed:
                    row = {**outcome, **key, "wall_s": round(time.monotonic() - begun, 3)}
                    tell(job, row["status"] if row["status"] != "done" else f"{row['seconds']:.0f} s")
                    if row["status"] != "done":
                        failed.append(f"{task} {contestant} seed {seed}")
            finally:
                queue.end(job, row)

    in_slots(slots, work, children.kill)
    return failed


def tell(job: Job, text: str) -> None:
    """Print what becomes of a run."""
    task, seed, contestant = job
    print(f"{task} {contestant} seed {seed}: {text}", flush=True)


def order(contestants: Mapping[str, Contestant], asked: Sequence[str], seed: int) -> list[str]:
    """Return the contestants in the order of this seed: to and fro, those that need others last."""
    names = [name for name in contestants if name in asked]
    first = [name for name in names if not contestants[name].needs]
    later = [name for name in names if contestants[name].needs]
    return [*first, *later] if seed % 2 == 0 else [*reversed(first), *reversed(later)]


def expected_s(mine: Sequence[Mapping[str, Any]], task: Task, name: str, contestant: str) -> float:
    """Return the seconds that a run should take: what it took before, else half as much again as dense, else 0."""

    def walls(who: str) -> list[float]:
        same = [row for row in mine if (row["task"], row["contestant"]) == (name, who)]
        return [row["wall_s"] for row in same if "wall_s" in row]

    return max(walls(contestant), default=min(1.5 * max(walls("dense"), default=0.0), task.budget_s))


def attempt(
    task: Task,
    contestant: Contestant,
    seed: int,
    out: Path,
    found: Found,
    where: Mapping[str, Any],
    children: Children,
) -> dict[str, Any]:
    """Do one run in a process of its own, of ``children`` while it runs; return its row, whatever becomes of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.parent / f"{out.name}.log"
    _discard(out)
    try:
        typed = command(task, contestant, seed, out, found, where)
        with open(log, "w+", encoding="utf-8") as said:
            code = children.run(typed, said, environment(), task.budget_s)
        if code:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["no message"]
            return {"status": f"failed with exit code {code}: {last[0]}"}
        return {"status": "done", "folder": os.path.relpath(out, HERE.parent), **read(out)}
    except subprocess.TimeoutExpired:
        return {"status": f"needed more than {task.budget_s:.0f} s and was stopped"}
    except (KeyError, TypeError, ZeroDivisionError, FileNotFoundError, json.JSONDecodeError) as error:
        # a number is missing in a row that it needs, or in what it left: its own failure, not that of the others
        return {"status": f"failed: {error!r}"}


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
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu", help="what is trained on")
    parser.add_argument("--side-by-side", type=int, default=1, help="runs at a time, each on its own cores")
    parser.add_argument("--retry", action="store_true", help="try again what failed or was stopped")
    parser.add_argument("--table", action="store_true", help="print the table of all rows and stop")
    options = parser.parse_args()
    for asked, known in ((options.tasks, tasks), (options.contestants, contestants)):
        unknown = [name for name in asked if name not in known]
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)} (known: {', '.join(known)})")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a child in its own session goes, too
    failed = [] if options.table else run(script, tasks, contestants, options)
    print(table())
    if failed:
        sys.exit(f"failed: {', '.join(failed)} (the rows say why; --retry tries again)")
