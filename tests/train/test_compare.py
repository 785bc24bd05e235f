import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from earlybird.cost.bill import Bill
from earlybird.cost.count import count
from earlybird.errors import EarlybirdError, InputError, Interrupted
from earlybird.models import build
from earlybird.tickets.ticket import Ticket
from earlybird.train import children, contenders
from earlybird.train import compare as module
from earlybird.train.compare import compare, describe
from earlybird.train.points import ratio, row_of, statistics_of
from earlybird.train.recipe import Recipe
from earlybird.train.run import train

Make = Callable[..., Recipe]


@pytest.fixture
def in_process(monkeypatch: Any) -> list[str]:
    """Run contenders in this process, which is faster, and note their order."""
    order: list[str] = []

    def run(recipe: Recipe, path: Path, stop: Any, **_: Any) -> None:
        order.append(path.name)
        train(recipe, path, quiet=True)

    monkeypatch.setattr(children, "run_one", run)
    return order


def test_contenders_take_turns_and_the_file_says_who_won(small: Make, tmp_path: Path, in_process: list[str]) -> None:
    recipe = small(epochs=2)
    found = compare(recipe, tmp_path, seeds=(3, 4), quiet=True)
    assert in_process == ["dense-seed3", "ticket-seed3", "ticket-seed4", "dense-seed4"]
    assert json.loads((tmp_path / "comparison.json").read_text()) == found
    assert [(row["contender"], row["seed"]) for row in found["runs"]] == [
        ("dense", 3), ("ticket", 3), ("ticket", 4), ("dense", 4),
    ]  # fmt: skip
    assert found["complete"]
    rows = {(row["contender"], row["seed"]): row for row in found["runs"]}
    ratios = [rows["ticket", seed]["seconds"] / rows["dense", seed]["seconds"] for seed in (3, 4)]
    assert found["against_dense"]["ticket"]["seconds_ratio"]["mean"] == pytest.approx(sum(ratios) / 2)
    assert found["against_dense"]["ticket"]["macs_ratio"]["mean"] < 1
    assert rows["ticket", 3]["parameters"] < rows["dense", 3]["parameters"]
    for row in found["runs"]:  # one definition of time: the whole run, as the bill has it
        spent = Bill.from_json(json.loads((tmp_path / row["folder"] / "bill.json").read_text()))
        assert spent.phases["evaluate"].seconds.value > 0
        assert row["seconds"] == spent.total.seconds.value == sum(row["phase_seconds"].values())
    assert "ticket took" in found["verdict"]
    table = describe(found)
    assert "dense" in table
    assert found["verdict"] in table
    assert "evaluation included" in table
    assert "Resumed" not in table
    found["runs"][1]["resumed"] = True
    assert "what was lost: ticket-seed3." in describe(found)
    found["runs"][1]["resumed"] = False

    in_process.clear()
    assert compare(recipe, tmp_path, seeds=(3, 4), quiet=True) == found
    assert not in_process  # nothing is run twice
    compare(recipe, tmp_path, seeds=(3, 4, 5), quiet=True)
    assert in_process == ["dense-seed5", "ticket-seed5"]
    with pytest.raises(InputError, match="another recipe"):
        compare(recipe.replace(lr=0.01), tmp_path, quiet=True)


def test_the_sanity_checks_are_what_they_say(small: Make, tmp_path: Path, in_process: list[str]) -> None:
    recipe = small(model="small_cnn", width=0.25, epochs=2)
    names = ("dense-equal-time", "small-dense", "ticket-shuffled", "ticket-reinitialised")
    found = compare(recipe, tmp_path, seeds=(0,), contenders=names, quiet=True)
    rows = {row["contender"]: row for row in found["runs"]}
    assert set(rows) == {"dense", "ticket", *names}
    ratio = rows["ticket"]["seconds"] / rows["dense"]["seconds"]
    assert rows["dense-equal-time"]["epochs"] == max(round(2 * ratio, 2), 0.01)
    after = rows["ticket"]["macs_per_image_after"]
    assert rows["small-dense"]["macs_per_image_after"] < rows["dense"]["macs_per_image_after"]
    assert rows["small-dense"]["drawn_at"] is None
    assert rows["ticket-reinitialised"]["macs_per_image_after"] == after
    ticket, shuffled = (Ticket.load(tmp_path / f"{name}-seed0" / "ticket.safetensors") for name in ("ticket", names[2]))
    assert shuffled.widths == ticket.widths
    assert shuffled.distance(ticket) > 0.1
    assert rows["ticket-shuffled"]["drawn_at"] == rows["ticket"]["drawn_at"]
    assert (
        Recipe.from_toml(tmp_path / "ticket-reinitialised-seed0" / "recipe.toml").settings["weights"] == "reinitialise"
    )


def test_small_dense_costs_what_the_ticket_costs() -> None:
    recipe = Recipe.from_values({"data": "digits", "model": "small_cnn"})
    images = torch.zeros(1, 1, 8, 8)
    whole = count(build("small_cnn", classes=10, in_channels=1, image_size=8), images).training_macs
    for share in (0.6, 0.2):
        width = contenders.width_of(recipe, {"macs_per_image_after": share * whole})
        small = build("small_cnn", classes=10, in_channels=1, image_size=8, width=width)
        assert count(small, images).training_macs == pytest.approx(share * whole, rel=0.15)
    with pytest.raises(InputError, match="was drawn"):
        contenders.width_of(recipe, {"macs_per_image_after": None})


def test_equal_time_scales_a_schedule_by_milestones(small: Make) -> None:
    recipe = small(epochs=100, schedule="step", milestones="50ep,75ep", lr_warmup="10it")
    done: Any = {("dense", 0): {"seconds": 10.0}, ("ticket", 0): {"seconds": 4.0}}
    shorter = contenders.check_recipe(recipe, "dense-equal-time", 0, done)
    assert shorter.epochs == 40
    assert [str(point) for point in shorter.milestones] == ["20ep", "30ep"]
    assert str(shorter.lr_warmup) == "4it"
    assert shorter.dense


def test_real_processes_are_interrupted_and_go_on(small: Make, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(small(epochs=3000, checkpoint_every="50it").to_toml())
    code = (
        "import sys; from earlybird.train.compare import compare; from earlybird.train.recipe import Recipe\n"
        "from earlybird.errors import Interrupted\n"
        "try: compare(Recipe.from_toml(sys.argv[1]), sys.argv[2], seeds=(0,), quiet=True)\n"
        "except Interrupted as error: print(error); sys.exit(3)"
    )
    command = [sys.executable, "-c", code, str(recipe), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob("dense-seed0/checkpoint-*.json")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "type the same command again" in said
    assert list((out / "dense-seed0").glob("checkpoint-*.json"))
    with pytest.raises(InputError, match="another recipe"):
        compare(small(), out, seeds=(0,), quiet=True)


def test_a_child_does_one_run_and_goes_on_with_it(small: Make, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "recipe.toml").write_text(small(epochs=1).to_toml())
    arguments = [str(tmp_path / "recipe.toml"), str(tmp_path / "run"), "--quiet"]
    assert children.child(arguments) == 0
    assert children.child(arguments) == 0  # finished already
    (tmp_path / "wrong.toml").write_text(small(model="tests.train.nets:wrong_classes").to_toml())
    assert children.child([str(tmp_path / "wrong.toml"), str(tmp_path / "other"), "--quiet"]) == 2
    out = capsys.readouterr().out
    assert "10 classes" in out
    assert out.count("\n") == 1


class _Silent:
    def caught(self) -> bool:
        return False


class _Caught:
    def caught(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("echo no such data; exit 2", EarlybirdError, "^ticket-seed0 failed: no such data$"),
        ("echo last words; exit 1", RuntimeError, "ticket-seed0 died with exit code 1.*\nlast words$"),
        ("exit 1", RuntimeError, "died with exit code 1.*\nIt left no message"),
        ("yes | head -n 100000; exit 1", RuntimeError, "what is finished stays.\n(y\n){29}y$"),  # fills no pipe
        ("kill -SEGV $$", RuntimeError, "was killed by SIGSEGV"),
        ("exit 3", Interrupted, "stopped at ticket-seed0"),
        ("kill -TERM $$", Interrupted, "stopped at ticket-seed0"),
    ],
)
def test_how_a_child_ended_is_handed_on(
    script: str, error: type[Exception], message: str, small: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    child = tmp_path / "child"
    child.write_text(f"#!/bin/sh\n{script}\n")
    child.chmod(0o755)
    monkeypatch.setattr(children.sys, "executable", str(child))
    with pytest.raises(error, match=message) as found:
        children.run_one(small(), tmp_path / "ticket-seed0", _Silent(), quiet=True)  # type: ignore[arg-type]
    assert isinstance(found.value, EarlybirdError) == (error is not RuntimeError)
    with pytest.raises(Interrupted, match="ticket-seed0"):
        children.run_one(small(), tmp_path / "ticket-seed0", _Caught(), quiet=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "code"), [("breaks", 1), ("wrong_classes", 2)])
def test_the_exit_code_tells_our_failure_from_wrong_input(model: str, code: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    keys = {"data": "digits", "model": f"tests.train.nets:{model}", "epochs": "1", "seeds": "1", "out": str(out)}
    words = [word for name, value in keys.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "earlybird", "compare", *words, "--exact", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code
    if code == 1:
        assert done.stderr.rstrip().endswith("ValueError: the tenth pass")
        assert "dense-seed0 died with exit code 1" in done.stderr
        assert "printed by the model" in done.stderr
    else:
        assert done.stderr.startswith("error: dense-seed0 failed: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "keywords", "message"),
    [
        ({}, {"contenders": ("dense", "tickets")}, "unknown contender 'tickets'"),
        ({}, {"contenders": ("dense",)}, "nothing to compare"),
        ({}, {"seeds": ()}, "seeds"),
        ({}, {"seeds": (1, 1)}, "all different"),
        ({"dense": True}, {}, "the recipe is dense"),
    ],
)
def test_what_cannot_be_compared(
    changes: dict[str, Any], keywords: dict[str, Any], message: str, small: Make, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        compare(small(**changes), tmp_path / "out", **keywords)
    assert not (tmp_path / "out").exists()


def verdict(ratios: list[float], points: list[float]) -> str:
    dense = statistics_of([0.9] * len(points))
    ticket = statistics_of([0.9 + value / 100 for value in points])
    against = {"seconds_ratio": statistics_of(ratios), "accuracy_points": statistics_of(points)}
    return module._verdict("ticket", {"dense": {"accuracy": dense}, "ticket": {"accuracy": ticket}}, against)


@pytest.mark.parametrize(
    ("ratios", "points", "said"),
    [
        ([0.40, 0.42, 0.41], [-0.2, 0.3, -0.1], "a win: less time, accuracy within 0.5 points."),
        ([0.40, 0.42, 0.41], [1.1, 1.0, 0.9], "a win: less time, and more accurate."),
        ([0.40, 0.42, 0.41], [-1.1, -1.0, -0.9], "less time, but a loss of accuracy."),
        (
            [0.40, 0.42, 0.41],
            [-6.0, 1.0, -1.0],
            "a loss of accuracy (the difference in accuracy could be chance over 3",
        ),
        ([0.40, 0.42, 0.41], [-0.4, -0.41, -0.39], "within 0.5 points (the small difference in accuracy is more than"),
        ([1.20, 1.30, 1.10], [1.1, 1.0, 0.9], "more accurate, but a loss of time."),
        ([1.20, 1.30, 1.10], [0.1, -0.1, 0.0], "a loss: more time, accuracy within 0.5 points."),
        ([1.20, 1.30, 1.10], [-1.1, -1.0, -0.9], "a loss: more time and less accuracy."),
        ([0.5], [-2.0], "a loss of accuracy (fewer than three seeds: chance is not told apart)"),
        ([0.5], [-0.5], "accuracy within 0.5 points (fewer than three seeds"),
        (
            [0.998],
            [0.0],
            "took the same time as dense, and reached 90.00% against 90.00% (+0.00 points): no gain: the same",
        ),
    ],
)
def test_a_loss_is_called_a_loss(ratios: list[float], points: list[float], said: str) -> None:
    sentence = verdict(ratios, points)
    assert said in sentence
    if ratios[0] > 1:
        assert "MORE" in sentence
        assert "win" not in sentence
    elif ratios[0] < 0.99:
        assert "times less time than dense" in sentence


def test_a_ticket_drawn_at_the_last_step_has_no_price_afterwards(small: Make, tmp_path: Path) -> None:
    result = train(small(epochs=1), tmp_path / "run", quiet=True)
    assert result.drawn_at == result.steps
    row = row_of(tmp_path / "run", "ticket", 0)
    assert row["macs_per_image_after"] is None
    with pytest.raises(InputError, match="before the last step"):
        contenders.width_of(small(), row)


def test_what_one_run_lacks_the_summary_lacks() -> None:
    assert statistics_of([1.0, None]) is None
    assert statistics_of([2.0]) == {"mean": 2.0, "std": None, "low": 2.0, "high": 2.0, "n": 1}
    assert ratio(None, 2.0) is None
    assert ratio(1.0, 0.0) is None


def test_a_comparison_that_never_began_frees_its_folder(small: Make, tmp_path: Path, in_process: list[str]) -> None:
    with pytest.raises(EarlybirdError, match="batch size"):
        compare(small(batch_size=10**6), tmp_path / "out", seeds=(0,), quiet=True)
    assert not (tmp_path / "out" / "comparison.toml").exists()
    assert in_process == ["dense-seed0"]
    assert compare(small(epochs=1), tmp_path / "out", seeds=(0,), quiet=True)["complete"]


def test_contenders_have_one_order_however_they_are_typed(small: Make) -> None:
    recipe = small(model="small_cnn")
    found = contenders.checks_on_a_ticket(recipe, ("ticket-shuffled", "small-dense", "ticket"), 0)
    assert [contender.name for contender in found] == ["dense", "ticket", "small-dense", "ticket-shuffled"]


def test_a_width_that_a_factory_does_not_take_is_said_first(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "narrow_nets.py").write_text("def build(classes):\n    raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="needs a width"):
        contenders.checks_on_a_ticket(small(model="narrow_nets:build"), ("small-dense",), 0)


@pytest.mark.parametrize(
    ("contender", "message"), [("ticket-shuffled", "'shuffle' belongs to the method"), ("small-dense", "as wide as")]
)
def test_what_needs_a_ticket_is_refused_without_one_before_anything_runs(
    contender: str, message: str, tmp_path: Path
) -> None:
    recipe = Recipe.from_values({"data": "digits", "method": "progressive_resizing", "initial_scale": 0.5})
    with pytest.raises(InputError, match=message):
        compare(recipe, tmp_path / "out", contenders=(contender,))
    assert not (tmp_path / "out").exists()
