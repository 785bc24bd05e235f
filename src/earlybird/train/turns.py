"""Contenders in turns: one folder for all of them, each run in a process of its own, every second seed in reverse.

What `earlybird compare` and `earlybird verify` have in common: the folder is taken for one recipe, what is finished is
never run again, and a signal lets runs save and stop.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from earlybird.errors import InputError
from earlybird.files import read_json, write_json, write_text
from earlybird.train import children
from earlybird.train.children import Task
from earlybird.train.contenders import Contender
from earlybird.train.folder import RunFolder
from earlybird.train.loop import StopSignal
from earlybird.train.points import row_of
from earlybird.train.recipe import Recipe

_JOBS = "side-by-side.json"
"""Says how many ran at a time when a run was begun."""


def check_turns(seeds: Sequence[int], jobs: int) -> None:
    """Raise an `InputError` where seeds are missing or named twice, or jobs are more than cores."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"seeds are {', '.join(map(str, seeds)) or 'missing'}", needed="at least one, all different")
    children.shares_of_cores(children.cores(), jobs)
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        raise InputError("compare and verify do not work under torchrun", hint="start them as one process")


@contextlib.contextmanager
def claimed(path: Path, recipe: Recipe, *, inputs: Sequence[str] = ()) -> Iterator[StopSignal]:
    """Take the folder for the runs that belong to ``recipe``, or find that it is theirs already.

    Where no run gets as far as its first step, the folder is given free again, so that a mended recipe may have it.

    Args:
        path: Made if it is not there.
        recipe: What the contenders have in common; its seed does not matter.
        inputs: Names of files that the caller writes into it before the runs.

    Raises:
        InputError: The folder is in use, or holds something else.
    """
    with RunFolder(path) as folder, StopSignal() as stop, contextlib.ExitStack() as stack:
        mark = path / "comparison.toml"
        if not mark.exists():
            folder.check_unused()
            write_text(mark, recipe.to_toml())
        elif Recipe.from_toml(mark).replace(seed=0).hash() != recipe.replace(seed=0).hash():
            raise InputError(f"{path} holds a comparison of another recipe", hint="choose another --out")
        folder.accept()
        stack.callback(_discard_unless_begun, path, inputs)
        yield stop


def _discard_unless_begun(path: Path, inputs: Sequence[str]) -> None:
    if not any(path.glob("*/environment.json")):
        shutil.rmtree(path / "recipes", ignore_errors=True)
        for name in ("comparison.toml", _JOBS, *inputs):
            (path / name).unlink(missing_ok=True)


def run_contenders(
    path: Path,
    contenders: Sequence[Contender],
    seeds: Sequence[int],
    stop: StopSignal,
    *,
    same: bool,
    jobs: int,
    quiet: bool,
    tell: Callable[[Mapping[tuple[str, int], dict[str, Any]]], object],
) -> dict[tuple[str, int], dict[str, Any]]:
    """Run every contender with every seed, as far as that is not done.

    Args:
        path: A folder that is `claimed`.
        contenders: Each names those it needs.
        seeds: In their order.
        stop: Looked at all the time.
        same: Refuse runs that are there already with other settings than a contender's.
        jobs: Runs at a time.
        quiet: Show nothing of them.
        tell: Called with the rows so far, whenever a run has finished.

    Returns:
        Rows by contender and seed, seed by seed.

    Raises:
        InputError: A run that is there already has other settings.
        Interrupted, EarlybirdError, RuntimeError: As `earlybird.train.children.run_all`.
    """
    done: dict[tuple[str, int], dict[str, Any]] = {}
    whose: dict[Path, tuple[Contender, int]] = {}
    for turn, seed in enumerate(seeds):
        for contender in _order(contenders, turn):
            whose[path / f"{contender.name}-seed{seed}"] = contender, seed

    def finish(run: Path) -> None:
        contender, seed = whose[run]
        done[contender.name, seed] = _row(run, contender, seed, _side_by_side(path).get(run.name, 1))

    def tell_of(task: Task) -> None:
        finish(task.path)
        tell(done)

    def begin(contender: Contender, seed: int, run: Path) -> Recipe:
        if jobs > 1:
            write_json(path / _JOBS, {**_side_by_side(path), run.name: jobs})
        return contender.recipe(seed, done)

    tasks = []
    for run, (contender, seed) in whose.items():
        if same and (run / "recipe.toml").exists():
            _check_same(run, contender.recipe(seed, {}))
        if (run / "result.json").exists():
            finish(run)
        else:
            needs = tuple(path / f"{name}-seed{seed}" for name in contender.needs)
            tasks.append(Task(run, partial(begin, contender, seed, run), needs))
    children.run_all(tasks, stop, jobs=jobs, quiet=quiet, on_done=tell_of)
    return {(c.name, seed): done[c.name, seed] for c, seed in whose.values()}  # in their order, however they ended


def _side_by_side(path: Path) -> dict[str, int]:
    return dict(read_json(path / _JOBS) or {})


def _check_same(run: Path, recipe: Recipe) -> None:
    """Make sure that a run that is there already is the one that is wanted; threads may have been divided."""
    held = Recipe.from_toml(run / "recipe.toml").replace(threads=None)
    if held.hash() != recipe.replace(threads=None).hash():
        raise InputError(f"{run} holds a run of other settings", hint="choose another --out, or delete that folder")


def _order(contenders: Sequence[Contender], turn: int) -> list[Contender]:
    first = [contender for contender in contenders if not contender.needs]
    return (first if turn % 2 == 0 else first[::-1]) + [contender for contender in contenders if contender.needs]


def _row(path: Path, contender: Contender, seed: int, side_by_side: int) -> dict[str, Any]:
    own = {"method": contender.method, "keep": contender.keep, "side_by_side": side_by_side}
    return {**row_of(path, contender.name, seed), **own}
