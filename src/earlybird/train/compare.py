"""Compare ways to train on equal terms: same recipe, same seeds, one process each, in turns.

Contenders of one seed run one after the other, and every second seed in reverse order, so that a machine that slows
down slows all of them. Differences are taken within a seed. What took more than dense is called a loss. Time is that of
the whole measured run, as the bill has it: set-up, search, draw, training, evaluation, and what a kill cost.

Who takes part is in `earlybird.train.contenders`: checks on the ticket of one recipe, or methods at several shares of
the network. For the latter there are also *points*: what each method reached at each share, and at what cost. A method
that passes through all shares in one run has a point a round, which cost what the run had spent by then.

Runs that went side by side disturbed each other: what they took is written down, but time is not judged by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from earlybird.cost import units
from earlybird.cost.verdict import POINTS, judge, judge_accuracy
from earlybird.errors import InputError
from earlybird.files import write_json
from earlybird.step import Step
from earlybird.train.contenders import BASELINE, CONTENDERS, Contender, checks_on_a_ticket, methods_at_shares
from earlybird.train.parts import located
from earlybird.train.points import COSTS, points_of, ratio, statistics_of
from earlybird.train.recipe import Recipe
from earlybird.train.turns import check_turns, claimed, run_contenders

__all__ = ["CONTENDERS", "compare", "compare_contenders", "comparison_folder", "describe"]


def compare(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    contenders: Sequence[str] = ("dense", "ticket"),
    methods: Sequence[str] = (),
    keeps: Sequence[float] = (),
    jobs: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run every contender with every seed, and say who won and by how much.

    Args:
        recipe: Of the ticket, or what the methods have in common; its own seed is not used.
        out: Folder for run folders and ``comparison.json``; by default the recipe's ``out``, else one under ``runs/``.
            Started again with the same recipe, it keeps what is finished and goes on.
        seeds: At least one, all different.
        contenders: Names of `CONTENDERS`; ``dense`` is always among them. Not used with ``methods``.
        methods: Methods to compare, by their own or a short name (``imp``, ``snip``, ``rigl``), each with every one of
            ``keeps``; ``dense`` is always among them.
        keeps: Shares of the network that stay, below 1.
        jobs: Runs at a time. With more than one, no time is judged.
        quiet: Show nothing of the runs.

    Returns:
        What ``comparison.json`` holds: ``runs`` (one row each), ``summary`` (mean, standard deviation, lowest and
        highest by contender), ``against_dense`` (within seeds: ratios of seconds and MACs, contender divided by dense;
        accuracy in points), ``points`` (of methods: one for each share) and ``verdict``.

    Raises:
        InputError: Unknown contender or method, a share that a method cannot keep, more jobs than cores, or the folder
            belongs to another comparison.
        Interrupted: A signal came; the same command goes on.
        EarlybirdError: A run could not be done as asked; says why.
        RuntimeError: A run died of a failure of our own; ends with the last lines that it wrote.
    """
    recipe = located(recipe)
    check_turns(seeds, jobs)
    if methods:
        found, common = methods_at_shares(recipe, methods, keeps), recipe.replace(dense=True)
    else:
        found, common = checks_on_a_ticket(recipe, contenders, seeds[0]), recipe
    if jobs > 1 and any(contender.name == "dense-equal-time" for contender in found):
        raise InputError("dense-equal-time goes by seconds, which runs side by side disturb", hint="leave --jobs out")
    path = Path(out) if out is not None else comparison_folder(recipe, methods)
    return compare_contenders(
        recipe, found, path, common=common, seeds=seeds, jobs=jobs, quiet=quiet, same=bool(methods)
    )


def compare_contenders(
    recipe: Recipe,
    found: Sequence[Contender],
    path: Path,
    *,
    common: Recipe,
    seeds: Sequence[int],
    jobs: int,
    quiet: bool,
    same: bool,
) -> dict[str, Any]:
    """Run contenders with every seed into one folder, in turns; `compare` says what comes back and what is raised.

    Args:
        recipe: Written into the comparison.
        found: Contenders, `BASELINE` among them.
        path: The folder.
        common: What a folder that is there already has to be a comparison of; its seed does not matter.
        seeds: See `compare`.
        jobs: See `compare`.
        quiet: See `compare`.
        same: See `earlybird.train.turns.run_contenders`.
    """
    with claimed(path, common) as stop:
        done = run_contenders(
            path, found, seeds, stop, same=same, jobs=jobs, quiet=quiet,
            tell=lambda done: write_json(path / "comparison.json", _conclude(recipe, found, seeds, done)),
        )  # fmt: skip
        comparison = _conclude(recipe, found, seeds, done)
        write_json(path / "comparison.json", comparison)
    return comparison


def comparison_folder(recipe: Recipe, methods: Sequence[str] = ()) -> Path:
    """Return where a comparison goes that is told no other place."""
    if methods:
        name = recipe.replace(seed=0, dense=True).name.removesuffix("-dense-seed0") + "-methods"
    else:
        name = recipe.replace(seed=0).name.removesuffix("-seed0")
    return Path(recipe.out or f"runs/compare-{name}")


def describe(comparison: Mapping[str, Any]) -> str:
    """Return what `compare` returned as a table and a verdict, for people."""
    points = comparison["points"]
    lines = _point_table(comparison) if points else _contender_table(comparison)
    lines += ["", "Seconds: measured, of the whole run: set-up, search and evaluation included. MACs: counted."]
    if points:
        lines.append("Density: parameters that are not zero, counted at the end, over all of dense. Energy: modelled.")
    if any(point["round"] is not None for point in points):
        lines.append("A round: seconds and energy are those of all rounds up to it.")
    resumed = [row["folder"] for row in comparison["runs"] if row["resumed"]]
    if resumed:
        lines.append(f"Resumed, so their seconds include starting again and what was lost: {', '.join(resumed)}.")
    jobs = max((row["side_by_side"] for row in comparison["runs"]), default=1)
    if jobs > 1:
        lines.append(f"Up to {jobs} runs went side by side, so their seconds do not compare with those of a lone run.")
    return "\n".join([*lines, "", comparison["verdict"]])


def _contender_table(comparison: Mapping[str, Any]) -> list[str]:
    lines = [f"{'':22}{'accuracy':>18}{'seconds':>18}{'MACs':>12}{'time / dense':>14}"]
    for name, row in comparison["summary"].items():
        accuracy, seconds = row["accuracy"], row["seconds"]
        time_ratio = comparison["against_dense"].get(name, {}).get("seconds_ratio")
        macs = row["macs"]["mean"] if row["macs"] else None
        lines.append(
            f"{name:22}{_spread(accuracy, 100, '%'):>18}{_spread(seconds, 1, 's'):>18}"
            f"{'not counted' if macs is None else f'{macs:.3g}':>12}"
            f"{'' if time_ratio is None else format(time_ratio['mean'], '.3f'):>14}"
        )
    return lines


def _point_table(comparison: Mapping[str, Any]) -> list[str]:
    lines = [f"{'':26}{'density':>9}{'accuracy':>18}{'seconds':>18}{'MACs':>12}{'energy':>12}"]
    for point in comparison["points"]:
        name = point["contender"] if point["round"] is None else f"{point['contender']}, round {point['round']}"
        density, macs, energy = (
            None if point[key] is None else point[key]["mean"] for key in ("density", "macs", "modelled_joules")
        )
        lines.append(
            f"{name:26}{'not known' if density is None else f'{density:.2%}':>9}"
            f"{_spread(point['accuracy'], 100, '%'):>18}{_spread(point['seconds'], 1, 's'):>18}"
            f"{'not counted' if macs is None else f'{macs:.3g}':>12}"
            f"{'not counted' if energy is None else units.joules(energy):>12}"
        )
    return lines


def _conclude(
    recipe: Recipe,
    contenders: Sequence[Contender],
    seeds: Sequence[int],
    done: Mapping[tuple[str, int], dict[str, Any]],
) -> dict[str, Any]:
    summary, against, verdicts = {}, {}, []
    for name in [contender.name for contender in contenders]:
        rows = [done[name, seed] for seed in seeds if (name, seed) in done]
        if not rows:
            continue
        keys = ("accuracy", "loss", *COSTS, "parameters", "nonzero", "kept")
        summary[name] = {key: statistics_of([row[key] for row in rows]) for key in keys}
        pairs = [(row, done[BASELINE, row["seed"]]) for row in rows if (BASELINE, row["seed"]) in done]
        if name != BASELINE and pairs:
            alone = all(row["side_by_side"] == 1 for pair in pairs for row in pair)
            against[name] = {
                f"{key}_ratio": statistics_of([ratio(row[key], dense[key]) for row, dense in pairs])
                if alone or key != "seconds"
                else None
                for key in COSTS
            }
            points = [100 * (row["accuracy"] - dense["accuracy"]) for row, dense in pairs]
            against[name]["accuracy_points"] = statistics_of(points)
            masked = rows[0]["share_of"] == "weights"
            verdicts.append(_verdict(name, summary, against[name], masked=masked))
            if masked:
                verdicts.append(_of_masks(against[name]))
    return {
        "recipe": {key: plain(value) for key, value in recipe.values().items()},
        "contenders": {contender.name: contender.about for contender in contenders},
        "seeds": list(seeds),
        "complete": len(done) == len(contenders) * len(seeds),
        "runs": list(done.values()),
        "summary": summary,
        "against_dense": against,
        "points": points_of(list(done.values()), BASELINE) if any(c.method for c in contenders) else [],
        "verdict": " ".join(verdicts),
    }


def _verdict(name: str, summary: Mapping[str, Any], against: Mapping[str, Any], *, masked: bool = False) -> str:
    """Say in two sentences what a contender gained and lost; masks gain no time, whatever the clock said."""
    time_ratio, points = against["seconds_ratio"], against["accuracy_points"]
    accuracy, dense = summary[name]["accuracy"]["mean"], summary[BASELINE]["accuracy"]["mean"]
    runs = points["n"]
    reached = f"reached {accuracy:.2%} against {dense:.2%} ({points['mean']:+.2f} points"
    reached += f", standard deviation {points['std']:.2f})" if runs > 1 else ")"
    if time_ratio is None:
        remark = judge(1.0, points["mean"], std=points["std"], runs=runs).remark
        text = f"{name} {reached}: {_ACCURACY[judge_accuracy(points['mean'])]}; time is not judged"
        return f"{text} ({remark})." if remark else f"{text}."
    mean = max(time_ratio["mean"], 1.0) if masked else time_ratio["mean"]
    verdict = judge(mean, points["mean"], std=points["std"], runs=runs)
    took = f"took {_TOOK[verdict.time].format(less=1 / mean, more=mean)} dense"
    spread = f", {time_ratio['low']:.3f} to {time_ratio['high']:.3f} of it over {runs} seeds" if runs > 1 else ""
    return f"{name} {took}{spread}, and {reached}: {verdict}."


_TOOK = {1: "{less:.2f} times less time than", 0: "the same time as", -1: "{more:.2f} times, MORE time than"}
_ACCURACY = {1: "more accurate", 0: f"accuracy within {POINTS} points", -1: "a loss of accuracy"}


def _of_masks(against: Mapping[str, Any]) -> str:
    """Say what single weights that are masked save: nothing but what is counted for hardware that skips zeros."""
    energy = against["modelled_joules_ratio"]
    on_paper = "" if energy is None else f"; with hardware that skips zeros, {_times(energy['mean'])} energy (modelled)"
    return f"Its weights are masked, which saves no time on this device{on_paper}."


def _times(mean: float) -> str:
    return f"{1 / mean:.2f} times less" if mean < 1 else f"{mean:.2f} times, MORE"


def _spread(row: Mapping[str, Any], factor: float, unit: str) -> str:
    text = f"{row['mean'] * factor:.2f}"
    return f"{text} +- {row['std'] * factor:.2f} {unit}" if row["std"] is not None else f"{text} {unit}"


def plain(value: Any) -> Any:
    """Return a setting as JSON can hold it."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Step) else value
