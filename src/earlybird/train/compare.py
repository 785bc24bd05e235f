"""Compare ways to train on equal terms: same recipe, same seeds, one process each, in turns.

Contenders of one seed run one after the other, and every second seed in reverse order, so that a machine that slows
down slows all of them. Differences are taken within a seed. What took more than dense is called a loss. Time is that of
the whole measured run, as the bill has it: set-up, search, draw, training, evaluation, and what a kill cost.

Sanity checks among the contenders (Su et al., arXiv 2009.11094; Liu et al., arXiv 1810.05270): a dense run stopped at
the ticket's time, a small dense network of the ticket's cost, the ticket's widths with random channels, and the ticket
with its weights drawn anew.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from earlybird.cost.bill import Spending
from earlybird.cost.count import count
from earlybird.cost.verdict import judge
from earlybird.errors import EarlybirdError, InputError, Interrupted
from earlybird.files import write_json, write_text
from earlybird.models import MODELS, build, takes_width
from earlybird.step import Step
from earlybird.train.folder import RunFolder
from earlybird.train.loop import StopSignal
from earlybird.train.parts import read_data
from earlybird.train.recipe import Recipe
from earlybird.train.result import Result
from earlybird.train.run import resume, train

CONTENDERS: dict[str, str] = {
    "dense": "the whole network, all epochs",
    "ticket": "the recipe as it is",
    "dense-equal-time": "the whole network, in as many epochs as take the ticket's time",
    "small-dense": "a narrower network from the start, with the MACs of the shrunk one",
    "ticket-shuffled": "the ticket's widths with channels chosen at random",
    "ticket-reinitialised": "the ticket's shape with weights drawn anew",
}
"""What can be compared, and what each is."""

_BASELINE = "dense"
_LAST_LINES = 30
"""Lines of a dead contender's message that are handed on."""
_AFTER = ("dense-equal-time", "small-dense")  # need to know what dense and ticket took


def compare(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    contenders: Sequence[str] = ("dense", "ticket"),
    quiet: bool = False,
) -> dict[str, Any]:
    """Run every contender with every seed, and say who won and by how much.

    Args:
        recipe: Of the ticket; its own seed is not used.
        out: Folder for run folders and ``comparison.json``; by default the recipe's ``out``, else one under ``runs/``.
            Started again with the same recipe, it keeps what is finished and goes on.
        seeds: At least one, all different.
        contenders: Names of `CONTENDERS`; ``dense`` is always among them.
        quiet: Show nothing of the runs.

    Returns:
        What ``comparison.json`` holds: ``runs`` (one row each), ``summary`` (mean, standard deviation, lowest and
        highest by contender), ``against_dense`` (within seeds: ratios of seconds and MACs, contender divided by dense;
        accuracy in points) and ``verdict``.

    Raises:
        InputError: Unknown contender, or the folder belongs to another comparison.
        Interrupted: A signal came; the same command goes on.
        EarlybirdError: A run could not be done as asked; says why.
        RuntimeError: A run died of a failure of our own; ends with the last lines that it wrote.
    """
    names = _check(recipe, seeds, contenders)
    path = Path(out) if out is not None else comparison_folder(recipe)
    with RunFolder(path) as folder, StopSignal() as stop, contextlib.ExitStack() as stack:
        _claim(folder, recipe)
        stack.callback(_discard_unless_begun, path)
        done: dict[tuple[str, int], dict[str, Any]] = {}
        for turn, seed in enumerate(seeds):
            for name in _order(names, turn):
                run_path = path / f"{name}-seed{seed}"
                if not (run_path / "result.json").exists():
                    own = _recipe(recipe, name, seed, done)
                    _run(own, run_path, stop, quiet=quiet)
                done[name, seed] = _row(run_path, name, seed)
                write_json(path / "comparison.json", _conclude(recipe, names, seeds, done))
    return _conclude(recipe, names, seeds, done)


def comparison_folder(recipe: Recipe) -> Path:
    """Return where a comparison goes that is told no other place."""
    return Path(recipe.out or f"runs/compare-{recipe.replace(seed=0).name.removesuffix('-seed0')}")


def describe(comparison: Mapping[str, Any]) -> str:
    """Return what `compare` returned as a table and a verdict, for people."""
    lines = [f"{'':22}{'accuracy':>18}{'seconds':>18}{'MACs':>12}{'time / dense':>14}"]
    for name, row in comparison["summary"].items():
        accuracy, seconds = row["accuracy"], row["seconds"]
        ratio = comparison["against_dense"].get(name, {}).get("seconds_ratio")
        macs = row["macs"]["mean"] if row["macs"] else None
        lines.append(
            f"{name:22}{_spread(accuracy, 100, '%'):>18}{_spread(seconds, 1, 's'):>18}"
            f"{'not counted' if macs is None else f'{macs:.3g}':>12}"
            f"{'' if ratio is None else format(ratio['mean'], '.3f'):>14}"
        )
    lines += ["", "Seconds: measured, of the whole run: set-up, search and evaluation included. MACs: counted."]
    resumed = [row["folder"] for row in comparison["runs"] if row["resumed"]]
    if resumed:
        lines.append(f"Resumed, so their seconds include starting again and what was lost: {', '.join(resumed)}.")
    return "\n".join([*lines, "", comparison["verdict"]])


def _check(recipe: Recipe, seeds: Sequence[int], contenders: Sequence[str]) -> list[str]:
    for name in contenders:
        if name not in CONTENDERS:
            raise InputError(f"unknown contender '{name}'", needed=f"of {', '.join(CONTENDERS)}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"seeds are {', '.join(map(str, seeds)) or 'missing'}", needed="at least one, all different")
    asked = {_BASELINE, *contenders}
    if asked == {_BASELINE}:
        raise InputError("nothing to compare dense with", hint="add a contender, such as ticket")
    if asked & set(_AFTER):
        asked.add("ticket")
    if "small-dense" in asked and recipe.model not in MODELS and not takes_width(recipe.model):
        raise InputError(
            f"small-dense needs a width, which {recipe.model} does not take",
            hint="give the factory a keyword argument 'width', or leave small-dense out",
        )
    names = [name for name in CONTENDERS if name in asked]
    if recipe.dense:
        raise InputError("the recipe is dense (keep = 1)", needed="one with a ticket", hint="set keep below 1")
    for name in names:
        if name not in _AFTER:
            _recipe(recipe, name, seeds[0], {})  # what does not fit the methods is said now, not after hours
    if "small-dense" in asked and "keep" not in recipe.settings:
        raise InputError(
            f"small-dense is as wide as a ticket, which {', '.join(recipe.method)} draws none of",
            hint="leave small-dense out",
        )
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        raise InputError("compare does not work under torchrun", hint="start it as one process")
    return names


def _claim(folder: RunFolder, recipe: Recipe) -> None:
    """Take the folder for this comparison, or find that it is its own already."""
    mark = folder.path / "comparison.toml"
    if not mark.exists():
        folder.check_unused()
        write_text(mark, recipe.to_toml())
    elif Recipe.from_toml(mark).replace(seed=0).hash() != recipe.replace(seed=0).hash():
        raise InputError(f"{folder.path} holds a comparison of another recipe", hint="choose another --out")
    folder.accept()


def _discard_unless_begun(path: Path) -> None:
    """Give the folder free again where no run got as far as its first step, so that a mended recipe may have it."""
    if not any(path.glob("*/environment.json")):
        shutil.rmtree(path / "recipes", ignore_errors=True)
        (path / "comparison.toml").unlink(missing_ok=True)


def _order(names: list[str], turn: int) -> list[str]:
    first = [name for name in names if name not in _AFTER]
    return (first if turn % 2 == 0 else first[::-1]) + [name for name in names if name in _AFTER]


def _recipe(recipe: Recipe, name: str, seed: int, done: Mapping[tuple[str, int], Mapping[str, Any]]) -> Recipe:
    """Return the recipe of a contender."""
    own = recipe.replace(seed=seed, out=None)
    if name == "ticket":
        return own
    if name == "ticket-reinitialised":
        return own.replace(weights="reinitialise")
    if name == "ticket-shuffled":
        return own.replace(shuffle=True)
    if name == "dense":
        return own.replace(dense=True)
    dense, ticket = done["dense", seed], done["ticket", seed]
    if name == "small-dense":
        return own.replace(dense=True, width=_width(own, ticket))
    epochs = max(round(recipe.epochs * ticket["seconds"] / dense["seconds"], 2), 0.01)
    share = epochs / recipe.epochs
    milestones = tuple(_scaled(point, share) for point in recipe.milestones)
    warmup, stem = (None if point is None else _scaled(point, share) for point in (recipe.lr_warmup, recipe.stem_until))
    return own.replace(dense=True, epochs=epochs, milestones=milestones, lr_warmup=warmup, stem_until=stem)


def _scaled(point: Step, share: float) -> Step:
    return Step(Fraction(f"{float(point.epochs) * share:.6f}"), round(point.iterations * share), point.share)


def _width(recipe: Recipe, ticket: Mapping[str, Any]) -> float:
    """Find the width at which a model from the start costs what the ticket costs after the draw."""
    wanted = ticket["macs_per_image_after"]
    if wanted is None:
        raise InputError(
            "small-dense needs a ticket that was drawn before the last step, with its MACs counted",
            hint="leave small-dense out, or set an earlier deadline",
        )
    data = read_data(recipe)
    images = data.train_images[:1].float()

    def cost(width: float) -> int:
        model = build(
            recipe.model,
            classes=len(data.classes),
            in_channels=images.shape[1],
            image_size=images.shape[2],
            width=width,
        )
        return count(model, images).training_macs

    low, high = 0.0, recipe.width  # channels come whole, so the cost is a staircase
    for _ in range(10):
        middle = round((low + high) / 2, 4)
        low, high = (low, middle) if cost(middle) > wanted else (middle, high)
    return min([width for width in (low, high) if width > 0], key=lambda width: abs(cost(width) - wanted))


def _run(recipe: Recipe, path: Path, stop: StopSignal, *, quiet: bool) -> None:
    """Train or resume in a process of its own, so that nothing warm is inherited."""
    if stop.caught():
        raise _interrupted(path)
    own = path.parent / "recipes" / f"{path.name}.toml"
    write_text(own, recipe.to_toml())
    # with faulthandler, a crash of native code says where it was
    command = [sys.executable, "-X", "faulthandler", "-m", "earlybird.train.compare", str(own), str(path)]
    command += ["--quiet"] if quiet else []
    if not quiet:
        print(f"--- {path.name}", file=sys.stderr, flush=True)
    # a file, not a pipe: a pipe that nobody reads stops who fills it
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said, subprocess.Popen(command, stdout=said) as process:
        told = False
        while process.poll() is None:
            if stop.caught() and not told:
                process.terminate()  # after Ctrl-C it has the signal already, and a second one does no harm
                told = True
            time.sleep(0.05)
        said.seek(0)
        message = said.read().strip()
    code = process.returncode
    if code in (Interrupted.exit_code, -signal.SIGINT, -signal.SIGTERM) or (stop.caught() and code):
        raise _interrupted(path)
    if code == EarlybirdError.exit_code:
        raise EarlybirdError(f"{path.name} failed: {message}")
    if code:
        died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"died with exit code {code}"
        last = "\n".join(message.splitlines()[-_LAST_LINES:]) or "It left no message but what is on standard error."
        raise RuntimeError(f"{path.name} {died}; what is finished stays.\n{last}")


def _interrupted(path: Path) -> Interrupted:
    return Interrupted(f"stopped at {path.name}", needed="what is finished stays", hint="type the same command again")


def _child(arguments: Sequence[str]) -> int:
    """Do what `_run` asks of the new process.

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


def _row(path: Path, name: str, seed: int) -> dict[str, Any]:
    result = Result.read(path)
    assert result is not None, f"{path} has no result"
    total, after = result.bill.total, result.bill.phases.get("train")
    return {
        "contender": name,
        "seed": seed,
        "folder": path.name,
        "accuracy": result.accuracy,
        "loss": result.loss,
        "epochs": result.epochs,
        "seconds": None if total.seconds is None else total.seconds.value,
        "phase_seconds": result.to_json()["phase_seconds"],
        "macs": None if total.macs is None else total.macs.value,
        "bit_macs": None if total.bit_macs is None else total.bit_macs.value,
        "peak_bytes": None if total.peak_bytes is None else total.peak_bytes.value,
        "parameters": result.parameters,
        "drawn_at": result.drawn_at,
        "macs_per_image_after": _per_image(after) if after else None,
        "resumed": result.resumed,
    }


def _per_image(spent: Spending) -> float | None:
    """Return MACs a sample, or None where nothing was counted or no sample went through (a draw at the last step)."""
    return spent.macs.value / spent.images.value if spent.macs and spent.images.value else None


def _conclude(
    recipe: Recipe, names: Sequence[str], seeds: Sequence[int], done: Mapping[tuple[str, int], dict[str, Any]]
) -> dict[str, Any]:
    summary, against = {}, {}
    for name in names:
        rows = [done[name, seed] for seed in seeds if (name, seed) in done]
        if not rows:
            continue
        keys = ("accuracy", "loss", "seconds", "macs", "bit_macs", "peak_bytes", "parameters")
        summary[name] = {key: _statistics([row[key] for row in rows]) for key in keys}
        pairs = [(row, done[_BASELINE, row["seed"]]) for row in rows if (_BASELINE, row["seed"]) in done]
        if name != _BASELINE and pairs:
            against[name] = {
                f"{key}_ratio": _statistics([_ratio(row[key], dense[key]) for row, dense in pairs])
                for key in ("seconds", "macs", "bit_macs", "peak_bytes")
            }
            points = [100 * (row["accuracy"] - dense["accuracy"]) for row, dense in pairs]
            against[name]["accuracy_points"] = _statistics(points)
    return {
        "recipe": {key: _plain(value) for key, value in recipe.values().items()},
        "contenders": {name: CONTENDERS[name] for name in names},
        "seeds": list(seeds),
        "complete": len(done) == len(names) * len(seeds),
        "runs": list(done.values()),
        "summary": summary,
        "against_dense": against,
        "verdict": " ".join(_verdict(name, summary, rows) for name, rows in against.items()),
    }


def _verdict(name: str, summary: Mapping[str, Any], against: Mapping[str, Any]) -> str:
    """Say in two sentences what a contender gained and lost."""
    time_ratio, points = against["seconds_ratio"], against["accuracy_points"]
    accuracy, dense = summary[name]["accuracy"]["mean"], summary[_BASELINE]["accuracy"]["mean"]
    runs, mean = points["n"], time_ratio["mean"]
    verdict = judge(mean, points["mean"], std=points["std"], runs=runs)
    took = f"took {_TOOK[verdict.time].format(less=1 / mean, more=mean)} dense"
    spread = f", {time_ratio['low']:.3f} to {time_ratio['high']:.3f} of it over {runs} seeds" if runs > 1 else ""
    reached = f"reached {accuracy:.2%} against {dense:.2%} ({points['mean']:+.2f} points"
    reached += f", standard deviation {points['std']:.2f})" if runs > 1 else ")"
    return f"{name} {took}{spread}, and {reached}: {verdict}."


_TOOK = {1: "{less:.2f} times less time than", 0: "the same time as", -1: "{more:.2f} times, MORE time than"}


def _ratio(value: float | None, dense: float | None) -> float | None:
    return value / dense if value is not None and dense else None


def _statistics(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    if len(known) != len(values):
        return None
    return {
        "mean": statistics.fmean(known),
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "low": min(known),
        "high": max(known),
        "n": len(known),
    }


def _spread(row: Mapping[str, Any], factor: float, unit: str) -> str:
    text = f"{row['mean'] * factor:.2f}"
    return f"{text} +- {row['std'] * factor:.2f} {unit}" if row["std"] is not None else f"{text} {unit}"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Step) else value


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1:]))
