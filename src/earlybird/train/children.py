"""Runs in processes of their own, so that nothing warm is inherited: one after another, or several side by side.

Side by side, each gets cores and threads of its own where the system can tell them apart. They still share caches,
memory and clock rate, so that their seconds say nothing about a run that has the machine to itself.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from earlybird.errors import EarlybirdError, InputError, Interrupted
from earlybird.files import read_rows, write_text
from earlybird.train.recipe import Recipe
from earlybird.train.run import resume, train

_LAST_LINES = 30
"""Lines of a dead child's message that are handed on."""
_LOOK_EVERY_S, _READ_EVERY_S = 0.05, 1.0

OnRow = Callable[[Path, dict[str, Any]], None]
"""Called with the folder of a run and a row of its ``metrics.jsonl``."""


class Stop(Protocol):
    """Tells whether somebody wants to stop."""

    def caught(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        path: Its folder; a run that was begun there goes on.
        recipe: Makes its recipe, when the runs that it needs are finished.
        needs: Folders of those.
    """

    path: Path
    recipe: Callable[[], Recipe]
    needs: tuple[Path, ...] = ()


def cores() -> list[int]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def shares_of_cores(available: Sequence[int], jobs: int) -> list[list[int]]:
    """Divide cores among jobs, neighbours together, as equally as they go.

    Raises:
        InputError: There are fewer cores than jobs, or no job.
    """
    if not 1 <= jobs <= len(available):
        raise InputError(
            f"{jobs} runs side by side on {len(available)} cores", needed=f"a whole number from 1 to {len(available)}"
        )
    bounds = [len(available) * job // jobs for job in range(jobs + 1)]
    return [list(available[low:high]) for low, high in pairwise(bounds)]


def run_all(tasks: Sequence[Task], stop: Stop, *, jobs: int, quiet: bool, on_done: Callable[[Task], None]) -> None:
    """Run ``tasks`` in their order, ``jobs`` at a time.

    When one fails, those that run save and stop, and the failure is raised.

    Args:
        tasks: None needs one that comes after it.
        stop: Looked at all the time.
        jobs: Processes at a time.
        quiet: Show nothing but warnings.
        on_done: Called in this thread with each task that has finished.

    Raises:
        InputError: There are fewer cores than jobs.
        Interrupted, EarlybirdError, RuntimeError: As `run_one`.
    """
    if jobs == 1:
        for number, task in enumerate(tasks, 1):
            if not quiet:
                print(f"--- {task.path.name} ({number} of {len(tasks)})", file=sys.stderr, flush=True)
            run_one(task.recipe(), task.path, stop, quiet=quiet)
            on_done(task)
        return
    free: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for share in shares_of_cores(cores(), jobs):
        free.put(share)
    failed = _Either(stop)
    waiting, unfinished = list(tasks), {task.path for task in tasks}
    running: dict[Future[None], Task] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                ready = [task for task in waiting if not unfinished.intersection(task.needs)]
                for task in ready[: jobs - len(running)]:
                    waiting.remove(task)
                    recipe = task.recipe()
                    if recipe.threads is not None:
                        recipe = recipe.replace(threads=max(recipe.threads // jobs, 1))
                    _tell(quiet, f"{task.path.name}: begins ({len(tasks) - len(waiting)} of {len(tasks)})")
                    running[pool.submit(_run_on_cores, free, recipe, task.path, failed, quiet)] = task
                done, _ = wait(running, timeout=_LOOK_EVERY_S, return_when=FIRST_COMPLETED)
                for future in done:
                    task = running.pop(future)
                    future.result()
                    unfinished.discard(task.path)
                    on_done(task)
        except BaseException:
            failed.event.set()
            raise


class _Either:
    """Stops for a signal, or because another run has failed."""

    def __init__(self, stop: Stop) -> None:
        self._stop, self.event = stop, threading.Event()

    def caught(self) -> bool:
        return self.event.is_set() or self._stop.caught()


def _run_on_cores(free: queue.SimpleQueue[list[int]], recipe: Recipe, path: Path, stop: Stop, quiet: bool) -> None:
    own = free.get()
    try:
        # of this thread alone; the process that it starts inherits them
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, own)
        run_one(recipe, path, stop, quiet=True, threads=len(own), on_row=None if quiet else _tell_row)
    finally:
        free.put(own)


def _tell(quiet: bool, text: str) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def _tell_row(path: Path, row: dict[str, Any]) -> None:
    _tell(False, f"{path.name}: epoch {row['epoch']:g}  accuracy {row['accuracy']:.2%}  {row['seconds']:.0f} s")


def run_one(
    recipe: Recipe,
    path: Path,
    stop: Stop,
    *,
    quiet: bool,
    threads: int | None = None,
    on_row: OnRow | None = None,
) -> None:
    """Train or resume in a process of its own.

    Args:
        recipe: Of the run, if it is new.
        path: Its folder.
        stop: Looked at all the time; the run then saves and ends.
        quiet: Show nothing but warnings.
        threads: Of the process, where the recipe names none.
        on_row: Called with each new row of ``metrics.jsonl``.

    Raises:
        Interrupted: It was stopped; what it had done is saved.
        EarlybirdError: It could not be done as asked; says why.
        RuntimeError: It died of a failure of our own; ends with the last lines that it wrote.
    """
    if stop.caught():
        raise interrupted(path)
    own = path.parent / "recipes" / f"{path.name}.toml"
    write_text(own, recipe.to_toml())
    # with faulthandler, a crash of native code says where it was
    command = [sys.executable, "-X", "faulthandler", "-m", "earlybird.train.children", str(own), str(path)]
    command += ["--quiet"] if quiet else []
    environment = None if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    shown = len(read_rows(path / "metrics.jsonl")) if on_row else 0
    # a file, not a pipe: a pipe that nobody reads stops who fills it
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as said,
        subprocess.Popen(command, stdout=said, env=environment) as process,
    ):
        told, looked = False, time.monotonic()
        while process.poll() is None:
            if stop.caught() and not told:
                process.terminate()  # after Ctrl-C it has the signal already, and a second one does no harm
                told = True
            if on_row and time.monotonic() - looked > _READ_EVERY_S:
                looked, shown = time.monotonic(), _tell_rows(path, shown, on_row)
            time.sleep(_LOOK_EVERY_S)
        if on_row:
            _tell_rows(path, shown, on_row)
        said.seek(0)
        message = said.read().strip()
    code = process.returncode
    if code in (Interrupted.exit_code, -signal.SIGINT, -signal.SIGTERM) or (stop.caught() and code):
        raise interrupted(path)
    if code == EarlybirdError.exit_code:
        raise EarlybirdError(f"{path.name} failed: {message}")
    if code:
        died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"died with exit code {code}"
        last = "\n".join(message.splitlines()[-_LAST_LINES:]) or "It left no message but what is on standard error."
        raise RuntimeError(f"{path.name} {died}; what is finished stays.\n{last}")


def _tell_rows(path: Path, shown: int, on_row: OnRow) -> int:
    rows = read_rows(path / "metrics.jsonl")
    for row in rows[shown:]:
        on_row(path, row)
    return len(rows)


def interrupted(path: Path) -> Interrupted:
    """Return the error of a comparison that was stopped at a run."""
    return Interrupted(f"stopped at {path.name}", needed="what is finished stays", hint="type the same command again")


def child(arguments: Sequence[str]) -> int:
    """Do what `run_one` asks of the new process.

    Standard output takes only what the parent has to know: an error of the user on one line, or the traceback of a
    failure of our own. All else, what a model prints included, goes to standard error, which both processes share.
    """
    recipe, path, quiet = Path(arguments[0]), Path(arguments[1]), "--quiet" in arguments[2:]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            if (path / "recipe.toml").exists():
                resume(path, quiet=quiet)
            else:
                train(Recipe.from_toml(recipe), path, quiet=quiet)
    except EarlybirdError as error:
        print(" ".join(str(error).split()))
        return error.exit_code
    except Exception:
        print(traceback.format_exc())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[1:]))
