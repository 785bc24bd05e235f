"""A sweep over keep ratios on the machines of a Ray cluster: one run each, in a folder that all machines see.

Each trial is a run of its own, as `earlybird.train.run.train` makes it: it can be resumed, reported and exported. What
is finished stays, what was stopped goes on from its checkpoint; typing the same again after any stop goes on with the
sweep, and a trial whose machine is lost is started again elsewhere. Needs the extra ``sweep`` (Ray Tune).
"""

from __future__ import annotations

import importlib.util
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from earlybird.errors import EarlybirdError, InputError
from earlybird.files import write_json, write_text
from earlybird.settings import check_share
from earlybird.train.parts import located
from earlybird.train.recipe import Recipe
from earlybird.train.result import Result
from earlybird.train.run import resume, train

_TRIES = 3
"""How often a trial is started again when its process or machine is lost."""


def sweep(
    recipe: Recipe, out: str | Path, keeps: Sequence[float], *, dense: bool = True, cpus: float = 1, gpus: float = 0
) -> list[dict[str, Any]]:
    """Train ``recipe`` once for each keep ratio, as many at a time as the cluster has room for.

    The cluster is the one that `ray.init` has connected to, else a local one.

    Args:
        recipe: What the trials have in common.
        out: Folder of the sweep, on a file system that all machines share; ``sweep.json`` and ``sweep.md`` go there.
        keeps: Shares of the channels that stay, each in (0, 1].
        dense: Train dense, too, as the baseline.
        cpus: Cores of a trial.
        gpus: Accelerators of a trial.

    Returns:
        A row a trial, dense first: ``{'trial', 'keep', 'accuracy', 'seconds', 'macs', 'parameters', 'drawn_at',
        'resumed', 'folder'}``.

    Raises:
        InputError: Ray is missing, or there is nothing to sweep over.
        EarlybirdError: A trial failed; the others are finished and stay.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError("Ray is not installed", hint="pip install 'earlybird[sweep]'")
    shares = sorted({check_share("keep", keep) for keep in keeps})
    if not shares:
        raise InputError("no keep ratios to sweep over", hint="name some, such as 0.3 and 0.5")
    recipe = located(recipe)  # workers start elsewhere
    folder = Path(out).absolute()
    for share in shares:
        recipe.replace(keep=share)  # what does not fit is said now
    changes: list[dict[str, Any]] = [{"dense": True}] if dense else []
    changes += [{"keep": share} for share in shares]
    missing = [change for change in changes if not _is_done(folder, change)]
    failed = _run(recipe, folder, missing, cpus, gpus) if missing else []
    rows = [_row(folder, change) for change in changes if _is_done(folder, change)]
    write_json(folder / "sweep.json", {"recipe": recipe.to_toml(), "trials": rows})
    write_text(folder / "sweep.md", table(rows) + "\n")
    if failed:
        raise EarlybirdError(
            f"{len(failed)} of {len(changes)} trials failed, the first one with: {failed[0]}",
            needed=f"the others are finished: {folder / 'sweep.md'}",
            hint="mend the cause and start the sweep again: it goes on with what is missing",
        )
    return rows


def _run(recipe: Recipe, folder: Path, changes: Sequence[dict[str, Any]], cpus: float, gpus: float) -> list[str]:
    """Run the trials and return what those that failed say."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune

    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": cpus, "gpu": gpus}),
        param_space={
            "recipe": recipe.to_toml(), "folder": str(folder),
            "change": tune.grid_search(list(changes)),
        },
        run_config=tune.RunConfig(
            storage_path=str(folder / "ray"), verbose=0, failure_config=tune.FailureConfig(max_failures=_TRIES)
        ),
    )  # fmt: skip
    errors = tuner.fit().errors
    return [(str(error).strip().splitlines() or [type(error).__name__])[-1] for error in errors]


def trial(config: Mapping[str, Any]) -> None:
    """Train one ratio, or go on with it; Ray Tune hears of every evaluation, and runs this where there is room."""
    from ray import tune

    def tell(kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "row":
            tune.report({name: fields[name] for name in ("step", "epoch", "accuracy", "loss", "seconds")})

    path = Path(config["folder"]) / _name(config["change"])
    if (path / "recipe.toml").exists():
        resume(path, quiet=True, on_event=tell)
    else:
        values = tomllib.loads(config["recipe"]) | config["change"]
        train(Recipe.from_values(values), path, quiet=True, on_event=tell)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of `sweep` as Markdown; times are set against the dense row's where there is one."""
    baseline = next((row for row in rows if row["trial"] == "dense"), None)
    lines = [
        "| trial | accuracy | seconds | dense / this | MACs | parameters |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ratio = "" if baseline is None else f"{baseline['seconds'] / row['seconds']:.2f}x"
        macs = "not counted" if row["macs"] is None else f"{row['macs']:.3g}"
        lines.append(
            f"| {row['trial']} | {row['accuracy']:.2%} | {row['seconds']:.1f} | {ratio} | {macs} "
            f"| {row['parameters']:,} |"
        )
    return "\n".join(lines)


def _name(change: Mapping[str, Any]) -> str:
    return "dense" if change.get("dense") else f"keep{change['keep']:g}"


def _is_done(folder: Path, change: Mapping[str, Any]) -> bool:
    return (folder / _name(change) / "result.json").exists()


def _row(folder: Path, change: Mapping[str, Any]) -> dict[str, Any]:
    name = _name(change)
    result = Result.read(folder / name)
    assert result is not None, f"{folder / name} has no result"
    macs = result.bill.total.macs
    return {
        "trial": name,
        "keep": change.get("keep", 1.0),
        "accuracy": result.accuracy,
        "seconds": result.seconds,
        "macs": None if macs is None else macs.value,
        "parameters": result.parameters,
        "drawn_at": result.drawn_at,
        "resumed": result.resumed,
        "folder": str(result.folder),
    }
