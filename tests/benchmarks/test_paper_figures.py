import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import common
import paper_figures
import pytest
import torch
from paper_figures import KEEPS, Training, as_hex, distance, groups, left_of, of, plan, read, work_off
from slots import Children, cores_of_slots

import earlybird as eb
from earlybird.train.recipe import Recipe

BASE = Training(network="vgg11", data="cifar10", epochs=10, seed=0, preset="default", kind="dense")


def options(*words):
    return read(["--work", "unused", *words])


class Machine:
    """A fake runner with its own clock: every run takes what ``takes`` says."""

    def __init__(self, takes):
        self.now, self.takes, self.ran = 0.0, takes, []

    def run(self, training, threads):
        self.now += self.takes(training)
        self.ran.append(training)

    def work(self, trainings, estimate, budget_s):
        return work_off(trainings, estimate, self.run, Children(), budget_s=budget_s, clock=lambda: self.now)


def test_without_a_budget_everything_is_done_in_order():
    machine, trainings = Machine(lambda _: 60), plan(options("--seeds", "1"))
    assert machine.work(trainings, lambda _: 1.0, None) == machine.ran == trainings


def test_a_run_that_would_not_fit_is_not_begun():
    machine, trainings = Machine(lambda _: 60), plan(options())
    assert machine.work(trainings, lambda _: 60, 200) == trainings[:3]
    assert machine.now == 180


def test_a_machine_slower_than_estimated_does_fewer():
    machine, trainings = Machine(lambda _: 120), plan(options())
    assert machine.work(trainings, lambda _: 60, 300) == trainings[:2]
    assert machine.now <= 300


def test_nothing_is_begun_when_not_even_the_first_fits():
    machine = Machine(lambda _: 60)
    assert machine.work(plan(options()), lambda _: 60, 59) == []


def test_rows_that_are_there_are_found_again_and_others_are_not():
    found = [json.loads(json.dumps({**vars(BASE), "accuracy": 0.9}))]
    assert of(BASE, found)["accuracy"] == 0.9
    for changed in (replace(BASE, seed=1), replace(BASE, kind="watch"), replace(BASE, epochs=9)):
        assert of(changed, found) is None


def test_figures_share_their_runs_and_the_first_seed_comes_first():
    whole = plan(options("--seeds", "2"))
    assert len(whole) == len(set(whole)) == 2 * (1 + 3 * 2 * 6 + 4 + 3 * 3)
    assert [training.seed for training in whole] == [0] * 50 + [1] * 50
    assert set(plan(options("--seeds", "2", "--figures", "costs"))) < set(whole)
    assert plan(options("--figures", "distances")) == plan(options("--figures", "precision"))


def test_a_plan_may_be_of_some_shares_only():
    whole, part = plan(options("--seeds", "1")), plan(options("--seeds", "1", "--keeps", "0.5"))
    assert part == [training for training in whole if training.keep in (None, 0.5)]
    assert 0 < len(part) < len(whole)


def test_every_training_has_a_folder_of_its_own_and_flags_that_say_all():
    whole = plan(options("--networks", "vgg11,resnet20,preact_resnet29", "--data", "cifar10,fashion-mnist"))
    assert len({training.name for training in whole}) == len(whole)
    assert len({tuple(training.flags()) for training in whole}) == len(whole)


@pytest.mark.parametrize("preset", ["default", "published"])
def test_flags_are_a_recipe_and_a_method(preset):
    for training in plan(options("--preset", preset, "--seeds", "1")):
        recipe = recipe_of(training)
        assert recipe.dense == (training.kind == "dense")
        assert (recipe.epochs, recipe.precision, recipe.nesterov) == (10, training.precision, False)
        method = recipe.build_methods().get("early_bird")
        if training.kind == "forced":
            assert str(method.skip) == str(method.look_every) == str(method.deadline) == training.draw
        if training.kind == "watch":
            assert method.deadline is None
            assert method.ratios == (0.5, 0.7, 0.3)
        if method is not None:
            assert method.score == ("bn_scale" if preset == "published" else "taylor")
            assert (method.weights, method.shuffle) == (training.weights, training.shuffle)


def recipe_of(training):
    values, words = {}, iter(training.flags())
    for word in words:
        key = word.removeprefix("--").replace("-", "_")
        if key.startswith("no_"):
            values[key.removeprefix("no_")] = False
        else:
            values[key] = True if key in ("dense", "shuffle") else next(words)
    return Recipe.from_values(values)


def test_draws_beyond_the_schedule_are_left_out():
    draws = {training.draw for training in plan(options("--epochs", "4")) if training.draw}
    assert draws == {"0.25ep", "0.5ep", "1ep", "2ep"}


def test_an_unknown_figure_is_refused(capsys):
    with pytest.raises(SystemExit):
        options("--figures", "costs,colour")
    assert "unknown: colour" in capsys.readouterr().err


def test_distances_of_written_masks_are_those_of_tickets():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(37, generator=generator) < 0.5 for _ in range(2))
    expected = eb.Ticket({"a": one}).distance(eb.Ticket({"a": other}))
    assert distance(as_hex(one.tolist()), as_hex(other.tolist()), 37) == pytest.approx(expected)
    assert len(as_hex(one.tolist())) == 10
    assert distance(as_hex([False, True]), as_hex([True, True]), 2) == 0.5


def made_up(training, accuracy):
    row = {**vars(training), "accuracy": accuracy, "macs": 1e12, "modelled_joules": [1e3, 2e3], "drawn_at": 100,
           "device": "d", "torch": "t", "date": "2026"}  # fmt: skip
    if training.kind == "watch":
        looks = [as_hex([bool(i >> bit & 1) for bit in range(8)]) for i in range(1 + training.seed, 5 + training.seed)]
        row |= {"looks": [1, 2, 3, 4], "channels": 8, "masks": {f"{keep:g}": looks for keep in KEEPS}}
    return row


def test_every_figure_of_made_up_rows_is_well_formed_and_the_table_has_all_methods():
    (group,) = groups([made_up(training, 0.9) for training in plan(options("--seeds", "2"))])
    for drawing in paper_figures.DRAWINGS.values():
        ElementTree.fromstring(drawing(group))
    lines = paper_figures.table(group).splitlines()
    assert [line.split(" | ")[0] for line in lines[4:8]] == [
        "| dense", "| early bird", "| re-initialised", "| random channels"
    ]  # fmt: skip
    assert "90.00 ± 0.00 (2)" in lines[5]
    assert "1 to 2 / 2.0" in lines[5]


def test_what_was_not_run_is_not_drawn_and_said_in_the_table():
    (group,) = groups([made_up(BASE, 0.5)])
    assert all(drawing(group) is None for drawing in paper_figures.DRAWINGS.values())
    assert "not run" in paper_figures.table(group)


def test_overlap_compares_searches_of_the_same_seed_only():
    watch = replace(BASE, kind="watch")
    found = [made_up(replace(watch, seed=seed, precision=p), 0.5) for seed, p in ((0, "fp32"), (1, "bf16"))]
    (group,) = groups(found)
    assert paper_figures.overlaps(group, 0.1, 0.5) == {}
    (group,) = groups([*found, made_up(replace(watch, seed=0), 0.5)])
    assert paper_figures.overlaps(group, 0.1, 0.5) == {1: [0.0], 2: [0.0], 3: [0.0], 4: [0.0]}


def test_side_by_side_every_training_is_done_once_with_its_share_of_the_cores():
    trainings, ran = plan(options("--seeds", "1"))[:6], []
    cores = len(cores_of_slots(1)[0])
    slots = min(2, cores)
    done = work_off(
        trainings, lambda _: 1.0, lambda *given: ran.append(given), Children(), budget_s=None, side_by_side=slots
    )  # fmt: skip
    assert sorted(done, key=trainings.index) == trainings
    assert sorted((training for training, _ in ran), key=trainings.index) == trainings
    assert {threads for _, threads in ran} == {cores // slots}


class Scripted(Children):
    """Children that run small scripts in the place of `earlybird`; notes what was to be run."""

    def __init__(self, code):
        super().__init__()
        self.code, self.asked = code, []

    def run(self, command, output, environment, limit_s):
        self.asked.append([*command[3:], environment["PYTHONPATH"].split(os.pathsep)[0]])
        return super().run([sys.executable, "-c", self.code, *command[3:]], output, environment, limit_s)


FOLDER = "import pathlib, sys; f = pathlib.Path([w for w in sys.argv if BASE in w][-1]); f.mkdir(exist_ok=True); "


def scripted(code):
    return Scripted(FOLDER.replace("BASE", repr(BASE.name)) + code)


FINISH = """
import json
(f / "recipe.toml").write_text("")
(f / "bill.json").write_text(json.dumps({"total": {"macs": {"value": 5}, "modelled_joules": {"low": 1, "high": 2}}}))
(f / "result.json").write_text(json.dumps(
    {"accuracy": 0.5, "seconds": 3.0, "parameters": 7, "drawn_at": None, "resumed": 0}))
"""


def test_a_run_that_fails_says_why_and_the_next_one_begins_anew(tmp_path):
    children = scripted("(f / 'recipe.toml').write_text(''); sys.exit('the loss is nan')")
    row = paper_figures.run(BASE, tmp_path, children)
    assert row["status"] == "failed with exit code 1: the loss is nan"
    assert not (tmp_path / BASE.name).exists()
    assert len(list(tmp_path.glob(f"{BASE.name}-failed-*"))) == 1
    children = scripted(FINISH)
    row = paper_figures.run(BASE, tmp_path, children)
    assert (row["status"], row["accuracy"], row["macs"], row["modelled_joules"]) == ("done", 0.5, 5, [1, 2])
    assert children.asked[0][0] == "train"
    assert children.asked[0][-1] == str(common.HERE.parent / "src")


def test_a_run_that_was_cut_off_is_resumed_and_one_that_ended_is_read(tmp_path):
    (tmp_path / BASE.name).mkdir()
    (tmp_path / BASE.name / "recipe.toml").write_text("")
    children = scripted(FINISH)
    assert paper_figures.run(BASE, tmp_path, children)["status"] == "done"
    assert children.asked[0][:2] == ["resume", str(tmp_path / BASE.name)]
    assert paper_figures.run(BASE, tmp_path, children)["status"] == "done"
    assert len(children.asked) == 1


def test_a_run_that_hangs_is_stopped_and_one_that_left_nothing_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_figures, "LIMIT_S", 0.5)
    assert paper_figures.run(BASE, tmp_path, scripted("import time; time.sleep(60)"))["status"].startswith(
        "needed more"
    )
    monkeypatch.setattr(paper_figures, "LIMIT_S", 60)
    assert "bill.json" in paper_figures.run(BASE, tmp_path, scripted("(f / 'result.json').write_text('{}')"))["status"]


def test_what_failed_is_skipped_unless_it_is_to_be_tried_again():
    other, third = replace(BASE, seed=1), replace(BASE, seed=2)
    found = [{**vars(BASE), "accuracy": 0.9}, {**vars(other), "status": "failed"}]
    assert left_of([BASE, other, third], found, retry=False) == [third]
    assert left_of([BASE, other, third], found, retry=True) == [other, third]
    found.append({**vars(other), "status": "done"})
    assert left_of([BASE, other, third], found, retry=True) == [third]
    assert of(other, found)["status"] == "done"


def test_a_failure_leaves_a_row_and_the_others_go_on(results, tmp_path, monkeypatch, capsys):
    """Three seeds, of which the second one ends badly."""
    monkeypatch.setattr(paper_figures, "StepClock", lambda: lambda _: 1.0)
    monkeypatch.setattr(paper_figures.signal, "signal", lambda *_: None)

    def run(training, work, children):
        if training.seed == 1:
            return {"status": "failed: it is the second", "seconds": 1.0}
        return {key: made_up(training, 0.5)[key] for key in ("accuracy", "macs", "modelled_joules", "drawn_at")} | {
            "status": "done", "seconds": 2.0
        }  # fmt: skip

    monkeypatch.setattr(paper_figures, "run", run)
    monkeypatch.setattr(sys, "argv", ["x", "--work", str(tmp_path), "--figures", "costs"])
    with pytest.raises(SystemExit, match="failed: vgg11"):
        paper_figures.main()
    found = common.rows(paper_figures.NAME)
    assert len(found) == 3 * 7
    assert [row["status"] for row in found] == ["done"] * 7 + ["failed: it is the second"] * 7 + ["done"] * 7
    assert {row["side_by_side"] for row in found} == {1}
    said = capsys.readouterr().out
    assert "50.00 ± 0.00 (2)" in said
    assert said.count(": failed: it is the second\n") == 7
    paper_figures.main()
    assert len(common.rows(paper_figures.NAME)) == 3 * 7


def test_a_quick_look_has_a_new_folder_each_time(tmp_path):
    quick = read(["--work", str(tmp_path / "w"), "--quick"])
    folders = {paper_figures.work_folder(quick) for _ in range(2)}
    assert len(folders) == 2
    assert all(folder.parent == tmp_path / "w" for folder in folders)
    assert paper_figures.work_folder(options()) == Path("unused")


def test_when_it_is_stopped_its_children_go_too_and_no_row_is_left(tmp_path):
    """A process that runs a training, which notes its number and sleeps, is told to end."""
    script = f"""
import sys
sys.path.insert(0, {str(common.HERE)!r})
import common, paper_figures, slots
from pathlib import Path
common.RESULTS = Path({str(tmp_path / "results")!r})
class Sleeping(slots.Children):
    def run(self, command, *given):
        code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
        return super().run([sys.executable, "-c", code, {str(tmp_path / "child")!r}], *given)
paper_figures.Children = Sleeping
paper_figures.StepClock = lambda: lambda _: 1.0
sys.argv = ["x", "--work", {str(tmp_path / "work")!r}, "--figures", "costs", "--seeds", "1"]
paper_figures.main()
"""
    stopped = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    child = tmp_path / "child"
    until = time.monotonic() + 60
    while not (child.exists() and child.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)
    assert not (tmp_path / "results").exists()
