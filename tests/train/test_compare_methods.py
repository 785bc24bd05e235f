import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from earlybird.cli import main
from earlybird.errors import EarlybirdError, InputError, Interrupted
from earlybird.methods import METHODS, SHORT_NAMES
from earlybird.tickets.early_bird import EarlyBird
from earlybird.train import children
from earlybird.train.children import Task, cores, run_all, run_one, shares_of_cores
from earlybird.train.compare import compare, comparison_folder, describe
from earlybird.train.contenders import keep_key, methods_at_shares, resolve
from earlybird.train.points import points_of, row_of
from earlybird.train.recipe import Recipe, keys, method_class
from earlybird.train.run import train
from tests.train.nets import with_dropout

Make = Callable[..., Recipe]
IMP = {"method": ("early_bird", "iterative"), "prune_share": 0.5}


@pytest.fixture
def in_process(monkeypatch: Any) -> list[str]:
    """Run contenders in this process, which is faster, and note their order."""
    order: list[str] = []

    def run(recipe: Recipe, path: Path, stop: Any, **_: Any) -> None:
        order.append(path.name)
        train(recipe, path, quiet=True)

    monkeypatch.setattr(children, "run_one", run)
    return order


def test_methods_run_at_each_share_and_rounds_give_theirs_in_one_run(
    small: Make, tmp_path: Path, in_process: list[str]
) -> None:
    recipe = small(epochs=2, **IMP)
    found = compare(recipe, tmp_path, seeds=(0,), methods=("early-bird", "imp"), keeps=(0.25, 0.5), quiet=True)
    assert in_process == ["dense-seed0", "early_bird-0.5-seed0", "early_bird-0.25-seed0", "imp-0.25-seed0"]
    rows = {row["contender"]: row for row in found["runs"]}
    assert {name: (row["method"], row["keep"], row["share_of"]) for name, row in rows.items()} == {
        "dense": ("", None, None),
        "early_bird-0.5": ("early_bird", 0.5, "channels"),
        "early_bird-0.25": ("early_bird", 0.25, "channels"),
        "imp-0.25": ("imp", 0.25, "weights"),
    }
    held = Recipe.from_toml(tmp_path / "imp-0.25-seed0" / "recipe.toml")
    assert held.method == ("iterative",)
    assert held.settings["keep_weights"] == 0.25
    assert held.settings["prune_share"] == 0.5

    points = {(point["contender"], point["round"]): point for point in found["points"]}
    assert list(points) == [
        ("dense", None), ("early_bird-0.5", None), ("early_bird-0.25", None),
        ("imp-0.25", 0), ("imp-0.25", 1), ("imp-0.25", 2),
    ]  # fmt: skip
    kept = [points["imp-0.25", number]["kept"]["mean"] for number in range(3)]
    assert kept == pytest.approx([1, 0.5, 0.25], abs=0.001)
    # the density is counted on the network that the run left, which has biases and norms beside what is pruned
    names = {name for name, _ in with_dropout(10, 1, 8).named_parameters()}
    left = load_file(tmp_path / "imp-0.25-seed0" / "model.safetensors")
    nonzero = sum(int(tensor.count_nonzero()) for name, tensor in left.items() if name in names)
    last = points["imp-0.25", 2]
    assert last["density"]["mean"] == nonzero / rows["dense"]["parameters"] == rows["imp-0.25"]["nonzero"] / rows[
        "dense"
    ]["parameters"]  # fmt: skip
    assert 0.25 < last["density"]["mean"] < 0.3
    # a shrunk network on the same axis
    small_one = rows["early_bird-0.25"]
    assert points["early_bird-0.25", None]["density"]["mean"] == pytest.approx(
        small_one["parameters"] / rows["dense"]["parameters"], rel=0.01
    )
    # the first training is the dense one, and what a round cost is what came on top of the one before
    first = points["imp-0.25", 0]
    assert first["accuracy"]["mean"] == rows["dense"]["accuracy"]
    assert first["macs"]["mean"] == rows["dense"]["macs"]
    assert last["accuracy"]["mean"] == rows["imp-0.25"]["accuracy"]
    assert last["macs"]["mean"] == rows["imp-0.25"]["macs"]
    for cost in ("seconds", "macs", "bit_macs", "modelled_joules"):
        costs = [points["imp-0.25", number][cost]["mean"] for number in range(3)]
        alone = [points["imp-0.25", number]["round_costs"][cost]["mean"] for number in range(3)]
        assert alone == pytest.approx([costs[0], costs[1] - costs[0], costs[2] - costs[1]])
    assert last["round_costs"]["bit_macs"]["mean"] < 0.5 * first["round_costs"]["bit_macs"]["mean"]
    assert last["round_costs"]["macs"]["mean"] == pytest.approx(first["round_costs"]["macs"]["mean"], rel=0.01)

    assert "masked, which saves no time on this device" in found["verdict"]
    assert found["verdict"].count("masked") == 1  # of imp alone
    table = describe(found)
    assert "imp-0.25, round 1" in table
    assert "those of all rounds up to it" in table
    assert json.loads((tmp_path / "comparison.json").read_text()) == found

    in_process.clear()
    compare(recipe, tmp_path, seeds=(0,), methods=("early_bird",), keeps=(0.25, 0.7), quiet=True)
    assert in_process == ["early_bird-0.7-seed0"]  # what is there stays, whatever else is asked for
    with pytest.raises(InputError, match=r"early_bird-0.7-seed0 holds a run of other settings"):
        compare(recipe.replace(tolerance=0.2), tmp_path, seeds=(0,), methods=("early_bird",), keeps=(0.7,), quiet=True)
    with pytest.raises(InputError, match="another recipe"):
        compare(recipe.replace(lr=0.01), tmp_path, methods=("imp",), keeps=(0.5,), quiet=True)


def test_points_are_statistics_over_the_seeds_that_have_them() -> None:
    def row(contender: str, seed: int, accuracy: float, jobs: int = 1) -> dict[str, Any]:
        return {
            "contender": contender, "method": "" if contender == "dense" else "snip", "keep": 0.5, "seed": seed,
            "accuracy": accuracy, "nonzero": 100 if contender == "dense" else 50, "parameters": 100, "seconds": 1.0,
            "macs": None, "bit_macs": 2.0, "modelled_joules": 3.0, "peak_bytes": 4, "kept": 0.5,
            "share_of": "weights", "rounds": [], "side_by_side": jobs,
        }  # fmt: skip

    rows = [row("dense", 0, 0.9), row("snip-0.5", 0, 0.8), row("snip-0.5", 1, 0.7, jobs=3)]
    dense, snip = points_of(rows, "dense")
    assert snip["seeds"] == [0, 1]
    assert snip["accuracy"]["mean"] == pytest.approx(0.75)
    assert snip["density"] == {"mean": 0.5, "std": 0.0, "low": 0.5, "high": 0.5, "n": 2}
    assert snip["accuracy_points"] is None  # the second seed has no dense run yet
    assert snip["macs"] is None
    assert snip["side_by_side"] == 3
    assert snip["round_costs"] is None
    assert dense["accuracy_points"]["mean"] == 0


def test_short_names_stand_for_settings_that_are_there() -> None:
    for short, (method, settings) in SHORT_NAMES.items():
        if method in METHODS:
            assert resolve(short) == (method, settings)
            method_class(method)(**settings)
    assert resolve("IMP") == resolve("iterative") == ("iterative", {})
    assert resolve("lr-rewinding") == ("iterative", {"rewind": "learning_rate"})


@pytest.mark.parametrize("method", METHODS)
def test_the_key_of_the_share_is_one_of_the_methods_own(method: str) -> None:
    expected = {"early_bird": "keep", "iterative": "keep_weights", "at_init": "init_keep", "dynamic_sparse": "density"}
    own = [key.name for key in keys() if key.method == method]
    assert keep_key(method) == expected.get(method, keep_key(method))
    assert not keep_key(method) or keep_key(method) in own


def test_settings_go_to_those_that_have_them_and_other_methods_go_along(small: Make) -> None:
    recipe = small(method=("early_bird", "batch_dropping"), drop=0.25, tolerance=0.05)
    dense, bird, imp = methods_at_shares(recipe, ["early_bird", "fine_tuning"], [0.3])
    assert dense.recipe(3, {}).dense
    first, second = bird.recipe(1, {}), imp.recipe(2, {})
    assert (first.method, first.seed) == (("early_bird", "batch_dropping"), 1)
    assert (first.settings["keep"], first.settings["tolerance"], first.settings["drop"]) == (0.3, 0.05, 0.25)
    assert (second.method, second.seed) == (("iterative", "batch_dropping"), 2)
    assert (second.settings["keep_weights"], second.settings["rewind"]) == (0.3, "fine_tuning")
    assert imp.about == "iterative, batch_dropping keeps 0.3"


@pytest.mark.parametrize(
    ("changes", "methods", "keeps", "message"),
    [
        ({}, ["inp"], [0.5], "unknown method 'inp'.*did you mean 'imp'"),
        ({}, ["progressive_precision"], [0.5], "progressive_precision has no share that stays"),
        ({}, ["imp"], [0.5, 1.5], r"keep is 1\.5"),
        ({}, ["imp"], [0.0], r"keep is 0\.0"),
        ({}, ["imp"], [1.0], "keep = 1 is dense"),
        ({}, ["imp"], [], "no shares to compare"),
        ({}, ["dense"], [0.5], "no methods to compare"),
        ({}, ["imp", "iterative"], [0.5], "imp and iterative are the same contender"),
        ({}, ["imp", "imp"], [0.5], "the same contender"),
        ({"method": ("early_bird", "fixed_ticket")}, ["imp"], [0.5], "fixed_ticket decides already which units stay"),
        (
            {"method": ("early_bird", "progressive_resizing")},
            ["imp"],
            [0.5],
            r"0\.5: progressive_resizing changes",
        ),
        ({"stages": (0.6,)}, ["early_bird"], [0.5, 0.7], r"early_bird cannot keep 0\.7: stages"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_runs(
    changes: dict[str, Any], methods: list[str], keeps: list[float], message: str, small: Make, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        compare(small(**changes), tmp_path / "out", methods=methods, keeps=keeps)
    assert not (tmp_path / "out").exists()


def test_a_method_that_passes_all_shares_runs_once(small: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr(EarlyBird, "KEEPS_ALL_ON_THE_WAY", True, raising=False)
    names = [contender.name for contender in methods_at_shares(small(), ["early_bird"], [0.5, 0.2, 0.05])]
    assert names == ["dense", "early_bird-0.05"]


def test_the_folder_has_one_name_whatever_methods_are_asked_for(small: Make) -> None:
    assert comparison_folder(small(), ["imp"]) == Path("runs/compare-with_dropout-digits-methods")
    assert comparison_folder(small(**IMP), ["imp", "early_bird"]) == comparison_folder(small(), ["imp"])
    assert comparison_folder(small(out="here"), ["imp"]) == Path("here")


# ---- side by side ----


class _Stop:
    def __init__(self) -> None:
        self.now = False

    def caught(self) -> bool:
        return self.now


def test_cores_are_shared_out_whole() -> None:
    assert shares_of_cores([0, 1, 2, 3, 8], 2) == [[0, 1], [2, 3, 8]]
    assert shares_of_cores([4, 5], 2) == [[4], [5]]
    for jobs in (0, 3):
        with pytest.raises(InputError, match=f"{jobs} runs side by side on 2 cores"):
            shares_of_cores([4, 5], jobs)


def tasks(small: Make, tmp_path: Path, names: str, needs: dict[str, str]) -> list[Task]:
    recipe = small(threads=4)
    return [
        Task(tmp_path / name, lambda: recipe, tuple(tmp_path / need for need in needs.get(name, ""))) for name in names
    ]


@pytest.fixture
def two_cores(monkeypatch: Any) -> None:
    monkeypatch.setattr(children, "cores", lambda: [0, 1])


def test_runs_go_side_by_side_and_wait_for_those_they_need(
    small: Make, tmp_path: Path, two_cores: None, monkeypatch: Any
) -> None:
    meet = threading.Barrier(2, timeout=20)
    ran: list[tuple[str, int | None, int | None]] = []

    def run(recipe: Recipe, path: Path, stop: Any, *, quiet: bool, threads: int | None = None, **_: Any) -> None:
        ran.append((path.name, threads, recipe.threads))
        if path.name in "ab":
            meet.wait()  # they would wait for ever if one ran after the other

    monkeypatch.setattr(children, "run_one", run)
    monkeypatch.setattr(children.os, "sched_setaffinity", lambda *_: None, raising=False)
    done: list[str] = []
    run_all(
        tasks(small, tmp_path, "abc", {"c": "ab"}), _Stop(), jobs=2, quiet=True,
        on_done=lambda task: done.append(task.path.name),
    )  # fmt: skip
    assert sorted(ran[:2]) == [("a", 1, 2), ("b", 1, 2)]  # a core each, and half of the recipe's threads
    assert ran[2][0] == "c"
    assert sorted(done[:2]) == ["a", "b"]
    assert done[2] == "c"


def test_when_one_fails_the_others_save_and_no_more_begin(
    small: Make, tmp_path: Path, two_cores: None, monkeypatch: Any
) -> None:
    stopped: list[str] = []

    def run(recipe: Recipe, path: Path, stop: Any, **_: Any) -> None:
        if path.name == "a":
            raise EarlybirdError("a failed")
        begun = time.monotonic()
        while not stop.caught():
            assert time.monotonic() - begun < 20
            time.sleep(0.01)
        stopped.append(path.name)
        raise Interrupted("stopped")

    monkeypatch.setattr(children, "run_one", run)
    monkeypatch.setattr(children.os, "sched_setaffinity", lambda *_: None, raising=False)
    with pytest.raises(EarlybirdError, match=r"^a failed$"):
        run_all(tasks(small, tmp_path, "bac", {}), _Stop(), jobs=2, quiet=True, on_done=lambda task: None)
    assert stopped == ["b"]


@pytest.mark.skipif(len(cores()) < 2 or not hasattr(os, "sched_getaffinity"), reason="needs two cores that can be told")
def test_each_process_has_cores_of_its_own_and_says_what_it_does(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    child = tmp_path / "child"
    child.write_text(
        f"#!{sys.executable}\nimport os, sys, json, pathlib\n"
        "path = pathlib.Path(sys.argv[6]); path.mkdir()\n"
        "own = [sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'], sys.argv[7:]]\n"
        "(path / 'own.json').write_text(json.dumps(own))\n"
        "(path / 'metrics.jsonl').write_text(json.dumps({'epoch': 1.0, 'accuracy': 0.5, 'seconds': 3.0}) + '\\n')\n"
    )
    child.chmod(0o755)
    monkeypatch.setattr(children.sys, "executable", str(child))
    rows: list[tuple[str, float]] = []
    monkeypatch.setattr(children, "_tell_row", lambda path, row: rows.append((path.name, row["accuracy"])))
    before = os.sched_getaffinity(0)
    run_all(tasks(small, tmp_path, "ab", {}), _Stop(), jobs=2, quiet=False, on_done=lambda task: None)
    assert os.sched_getaffinity(0) == before
    own = [json.loads((tmp_path / name / "own.json").read_text()) for name in "ab"]
    shares = shares_of_cores(cores(), 2)
    assert sorted(affinity for affinity, *_ in own) == shares
    assert [int(threads) for _, threads, _ in own] == [len(affinity) for affinity, *_ in own]
    assert [flags for *_, flags in own] == [["--quiet"]] * 2  # two displays at once would be a mess
    assert sorted(rows) == [("a", 0.5), ("b", 0.5)]


@pytest.mark.skipif(len(cores()) < 2, reason="needs two cores")
def test_side_by_side_is_written_down_and_time_is_not_judged(
    small: Make, tmp_path: Path, in_process: list[str], monkeypatch: Any
) -> None:
    lock = threading.Lock()  # generators are shared by all threads of a process
    real = children.run_one

    def run(*args: Any, **keywords: Any) -> None:
        with lock:
            real(*args, **keywords)

    monkeypatch.setattr(children, "run_one", run)
    recipe = small(epochs=1)
    found = compare(recipe, tmp_path, seeds=(0,), methods=("early_bird",), keeps=(0.5,), jobs=2, quiet=True)
    assert [row["side_by_side"] for row in found["runs"]] == [2, 2]
    assert found["against_dense"]["early_bird-0.5"]["seconds_ratio"] is None
    assert found["against_dense"]["early_bird-0.5"]["macs_ratio"]["n"] == 1
    assert "time is not judged (fewer than three seeds: chance is not told apart)" in found["verdict"]
    assert "Up to 2 runs went side by side" in describe(found)
    # what is finished keeps what it was, when the rest runs alone
    found = compare(recipe, tmp_path, seeds=(0, 1), methods=("early_bird",), keeps=(0.5,), quiet=True)
    assert {row["folder"]: row["side_by_side"] for row in found["runs"]} == {
        "dense-seed0": 2, "early_bird-0.5-seed0": 2, "dense-seed1": 1, "early_bird-0.5-seed1": 1,
    }  # fmt: skip
    assert found["against_dense"]["early_bird-0.5"]["seconds_ratio"] is None
    with pytest.raises(InputError, match="which runs side by side disturb"):
        compare(recipe, tmp_path / "other", contenders=("dense-equal-time",), jobs=2)


@pytest.mark.skipif(len(cores()) < 2, reason="needs two cores")
def test_ctrl_c_lets_all_save_and_stop(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--data", "digits", "--model", "tests.train.nets:with_dropout", "--epochs", "1500", "--exact"]
    words += ["--methods", "early_bird", "--keep", "0.5", "--seeds", "1", "--jobs", "2", "--out", str(out)]
    words += ["--checkpoint-every", "50it"]
    command = [sys.executable, "-m", "earlybird", "compare", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while len({path.parent for path in out.glob("*/checkpoint-*.json")}) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        _, said = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "type the same command again" in said
    assert "dense-seed0: begins (1 of 2)" in said
    assert not list(out.glob("*/result.json"))
    assert json.loads((out / "side-by-side.json").read_text()) == {"dense-seed0": 2, "early_bird-0.5-seed0": 2}
    steps = {path.parent.name: int(path.stem.partition("-")[2]) for path in sorted(out.glob("*/checkpoint-*.json"))}
    assert all(step >= 50 for step in steps.values())


# ---- the command line ----


def test_the_command_compares_methods(tmp_path: Path, capsys: Any, in_process: list[str]) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(
        'data = "digits"\nmodel = "tests.train.nets:with_dropout"\nepochs = 1\nexact = true\nkeep = 0.9\n'
    )
    words = ["compare", str(recipe), "--methods", "early_bird,imp", "--keep", "0.5,.25", "--prune-share", "0.75"]
    assert main([*words, "--seeds", "1", "--quiet", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for contender in ("dense", "early_bird-0.5", "early_bird-0.25", "imp-0.25, round 0", "imp-0.25, round 1"):
        assert f"\n{contender} " in printed
    assert f"earlybird report {out}" in printed
    assert main(["report", str(out)]) == 0
    assert '<section id="tradeoff">' in (out / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--methods", "imp"], "no shares to compare"),
        (["--methods", "imp", "--keep", "0.5", "--contenders", "ticket"], "both --contenders and --methods"),
        (["--methods", "snipp", "--keep", "0.5"], "did you mean"),
        (["--methods", "imp", "--keep", "half"], "shares, such as 0.5,0.2,0.05"),
        (["--methods", "imp", "--keep", "0.5", "--prune-share", "2"], "prune_share"),
        (["--methods", "imp", "--keep", "0.5", "--jobs", "1000"], "1000 runs side by side"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], found: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 2
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_rounds_are_read_from_the_rows(small: Make, tmp_path: Path) -> None:
    train(small(epochs=1), tmp_path / "run", quiet=True)
    assert row_of(tmp_path / "run", "ticket", 0)["rounds"] == []
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["nonzero"] == row_of(tmp_path / "run", "ticket", 0)["nonzero"]
    told = [{**rows[-1], "round": number // 2, "density": 1.0, "accuracy": number / 10} for number in range(4)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    found = row_of(tmp_path / "run", "ticket", 0)["rounds"]
    assert [(stage["round"], stage["accuracy"]) for stage in found] == [(0, 0.1), (1, 0.3)]  # where each ended


def test_one_run_can_be_told_to_stop_before_it_begins(small: Make, tmp_path: Path) -> None:
    stop = _Stop()
    stop.now = True
    with pytest.raises(Interrupted):
        run_one(small(), tmp_path / "run", stop, quiet=True)
