"""The harness: who runs when, with which words, and what becomes of those that fail."""

import argparse
import dataclasses
import json
import re
import sys
import time

import common
import contest
import networks
import page
import pytest
import slots
import speedrun_cifar10
import tables
import torch
import vgg16_cifar10
from contest import Contestant, Task, command, order, words

from earlybird import Ticket
from earlybird.cli import main
from earlybird.train.recipe import Recipe

TASK = Task("A task", "digits", {"epochs": 8, "width": 0.5}, seeds=2, budget_s=20)
CONTESTANTS = {
    "dense": Contestant("dense", "dense", {"dense": True}),
    "ticket": Contestant("ticket", "ours", {"keep": 0.5}),
    "plain": Contestant("plain", "dense", rival="plain"),
    "dense-equal-time": Contestant("short", "dense", {"dense": True}, needs=("dense", "ticket"), equal_time=True),
    "snip": Contestant("SNIP", "at initialisation", rival="snip", needs=("dense", "ticket")),
}
MACHINE = {"date": "2026-01-01", "device": "a", "threads": 2, "torch": "2", "revision": "abc"}
HERE = {"accelerator": "cpu", "threads": 2}


def row(contestant, seed=0, **values):
    done = {"status": "done", "accuracy": 0.9, "seconds": 100.0, "seconds_kind": "measured", "macs": 1000}
    bill = {"phases": {"setup": {"seconds": {"value": 10.0}}}}
    known = {"epochs": 8, "bill": bill, "definition": contest.definition(TASK, CONTESTANTS[contestant])}
    return {"task": "t", "contestant": contestant, "seed": seed, "session": "s", **MACHINE, **done, **known, **values}


def tabled(rows):
    return tables.contest_table(TASK, {(row["contestant"], row["seed"]): row for row in rows}, CONTESTANTS)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(contest, "WORK", tmp_path / "runs")
    monkeypatch.setattr(contest, "yardstick", lambda threads: 0.01)
    monkeypatch.setattr(
        contest, "machine", lambda threads, slots, _: {**MACHINE, "threads": threads, "side_by_side": slots}
    )
    return tmp_path / "results"


def options(**values):
    given = {"tasks": ["t"], "contestants": list(CONTESTANTS), "seeds": None, "budget": 1e9, "retry": False}
    return argparse.Namespace(**{**given, "side_by_side": 1, "accelerator": "cpu", **values})


def script(out, wait_for="", code=0):
    """Return the command of a run that leaves a row, once the run ``wait_for`` of the same folder has begun."""
    lines = [
        "import json, os, pathlib, sys, time",
        f"out = pathlib.Path({str(out)!r}); out.mkdir(parents=True)",
        f"other = out.parent / {wait_for!r}",
        "until = time.monotonic() + 30",
        "while not other.exists() and time.monotonic() < until: time.sleep(0.02)",
        "values = {'accuracy': 0.5, 'seconds': 1.0, 'seconds_kind': 'measured', 'macs_per_image': 5.0}",
        "values['cores'] = sorted(os.sched_getaffinity(0))",
        "(out / 'row.json').write_text(json.dumps(values))",
        f"sys.exit({code} or (not other.exists()))",
    ]
    return [sys.executable, "-c", "\n".join(lines)]


def test_every_second_seed_runs_in_reverse_and_who_needs_others_last():
    assert order(CONTESTANTS, list(CONTESTANTS), 0) == ["dense", "ticket", "plain", "dense-equal-time", "snip"]
    assert order(CONTESTANTS, list(CONTESTANTS), 1) == ["plain", "ticket", "dense", "snip", "dense-equal-time"]
    assert order(CONTESTANTS, ["ticket"], 1) == ["ticket"]


def test_equal_time_is_worked_out_from_the_seconds_of_dense_and_ticket(tmp_path):
    """Dense took 10 s of set-up and 8 epochs of 20 s; the ticket took 120 s, so 5.5 epochs."""
    found = {"dense": row("dense", seconds=170.0), "ticket": row("ticket", seconds=120.0)}
    typed = command(TASK, CONTESTANTS["dense-equal-time"], 3, tmp_path, found, HERE)
    assert typed[typed.index("--epochs") + 1] == "5.5"  # of 8
    assert typed[typed.index("--seed") + 1] == "3"
    assert typed[typed.index("--threads") + 1] == "2"


def test_rows_keep_the_ticket_so_that_two_can_be_compared(tmp_path):
    for name, kept in (("a", [1, 1, 0, 0]), ("b", [1, 0, 1, 0])):
        other = torch.tensor([1, 0], dtype=torch.bool)
        Ticket({"x": torch.tensor(kept, dtype=torch.bool), "y": other}).save(tmp_path / name)
    one, two = contest.masks(tmp_path / "a"), contest.masks(tmp_path / "b")
    assert one == {"x": "1100", "y": "10"}
    assert contest.distance(one, one) == 0
    assert contest.distance(one, two) == pytest.approx(2 / 6)


def test_rivals_train_longer_as_well(tmp_path):
    found = {"dense": row("dense", macs_per_image=1000.0), "ticket": row("ticket", macs_per_image=640.0)}
    longer = dataclasses.replace(CONTESTANTS["snip"], longer=1.5)
    typed = command(TASK, longer, 0, tmp_path, found, HERE)
    assert typed[typed.index("--epochs") + 1] == "12"


def test_a_rival_gets_the_cost_of_the_ticket(tmp_path):
    dense = row("dense", macs_per_image=1000.0, folder="not/there")
    found = {"dense": dense, "ticket": row("ticket", macs_per_image=640.0)}
    typed = command(TASK, CONTESTANTS["snip"], 0, tmp_path, found, HERE)
    assert typed[typed.index("--macs-share") + 1] == "0.64"
    assert "--dense" not in typed  # it begins with the small network


def test_who_begins_with_a_dense_training_takes_over_the_one_that_is_there(tmp_path):
    pruned = Contestant("pruned", "after training", rival="x", needs=("dense", "ticket"), takes_over=True)
    (tmp_path / "dense").mkdir()
    found = {
        "dense": row("dense", macs_per_image=1000.0, folder=str(tmp_path / "dense")),
        "ticket": row("ticket", macs_per_image=640.0),
    }
    assert "--dense" not in command(TASK, pruned, 0, tmp_path, found, HERE)  # its folder is empty: it trains by itself
    (tmp_path / "dense" / "result.json").write_text("{}")
    typed = command(TASK, pruned, 0, tmp_path, found, HERE)
    assert typed[typed.index("--dense") + 1] == str(tmp_path / "dense")
    from benchmarks.rivals.run import BEGIN_DENSE

    for contestant in vgg16_cifar10.CONTESTANTS.values():
        rewinds = "rewind_epochs" in contestant.flags  # to weights that nobody keeps: it trains dense by itself
        assert contestant.takes_over == (contestant.rival in BEGIN_DENSE and not rewinds)


@pytest.mark.parametrize("script", [vgg16_cifar10, networks, speedrun_cifar10])
def test_every_word_of_ours_is_a_key_of_a_valid_recipe(script):
    for task in script.TASKS.values():
        for contestant in script.CONTESTANTS.values():
            assert contestant.family in tables.FAMILIES
            if not contestant.rival:
                Recipe.from_toml(task.path, {**task.flags, **contestant.flags})


def test_every_rival_is_one_that_there_is():
    from benchmarks.rivals.run import RIVALS

    asked = {contestant.rival for contestant in vgg16_cifar10.CONTESTANTS.values()} - {"", "plain"}
    assert asked <= set(RIVALS)


def test_a_real_run_a_failure_and_one_over_budget_leave_rows_and_the_others_go_on(results, monkeypatch):
    def typed(task, contestant, seed, out, found, where):
        code = {
            "dense": f"import json, pathlib; p = pathlib.Path({str(out)!r}); p.mkdir(parents=True);"
            "(p / 'row.json').write_text(json.dumps({'accuracy': 0.5, 'seconds': 1.0, 'seconds_kind': 'measured'}))",
            "ticket": "raise SystemExit('a reason')",
            "snip": "import time; time.sleep(60)",
        }[contestant.label]
        return [sys.executable, "-c", code]

    monkeypatch.setattr(contest, "command", typed)
    three = {name: Contestant(name, "ours") for name in ("dense", "ticket", "snip")}
    task = Task("A task", "digits", {}, seeds=1, budget_s=5)
    failed = contest.run("made_up", {"t": task}, three, options(contestants=list(three)))
    assert failed == ["t ticket seed 0", "t snip seed 0"]
    found = {row["contestant"]: row for row in common.rows("made_up")}
    assert found["dense"]["status"] == "done"
    assert found["ticket"]["status"] == "failed with exit code 1: a reason"
    assert found["snip"]["status"] == "needed more than 5 s and was stopped"
    assert 0 < found["dense"]["wall_s"] < 5
    before = len(common.rows("made_up"))
    contest.run("made_up", {"t": task}, three, options(contestants=list(three)))
    assert len(common.rows("made_up")) == before  # what has a row is not run again
    contest.run("made_up", {"t": task}, three, options(contestants=["ticket"], retry=True))
    assert len(common.rows("made_up")) == before + 1


def test_nothing_is_begun_that_does_not_fit_or_lacks_what_it_needs(results, monkeypatch, capsys):
    monkeypatch.setattr(contest, "attempt", lambda *_: pytest.fail("begun"))
    common.append("made_up", row("ticket", seed=1, wall_s=3600.0, threads=contest_threads()))
    contest.run("made_up", {"t": TASK}, CONTESTANTS, options(contestants=["ticket", "snip"], seeds=1, budget=10))
    said = capsys.readouterr().out
    assert "ticket seed 0: about 3600 s, no time left" in said
    assert "snip seed 0: waits for dense, ticket" in said


@pytest.mark.skipif(len(slots.cores_of_slots(1)[0]) < 2, reason="needs two cores")
def test_side_by_side_runs_have_cores_of_their_own_and_wait_for_what_they_need(results, monkeypatch):
    """dense and ticket each end only when the other has begun; the third needs both."""
    together = {"dense": "ticket-seed0", "ticket": "dense-seed0", "snip": "dense-seed0"}
    monkeypatch.setattr(
        contest, "command", lambda task, contestant, seed, out, found, where: script(out, together[contestant.label])
    )
    three = {name: Contestant(name, "ours") for name in ("dense", "ticket")}
    three["snip"] = Contestant("snip", "ours", needs=("dense", "ticket"))
    task = Task("A task", "digits", {}, seeds=1)
    contest.run("made_up", {"t": task}, three, options(contestants=list(three), side_by_side=2))
    found = {row["contestant"]: row for row in common.rows("made_up")}
    assert {row["status"] for row in found.values()} == {"done"}
    assert list(found)[-1] == "snip"
    assert not set(found["dense"]["cores"]) & set(found["ticket"]["cores"])
    assert {row["side_by_side"] for row in found.values()} == {2}
    assert found["dense"]["threads"] == len(found["dense"]["cores"])


@pytest.mark.skipif(len(slots.cores_of_slots(1)[0]) < 2, reason="needs two cores")
def test_an_error_beside_a_run_ends_that_run_without_a_row(results, monkeypatch):
    def typed(task, contestant, seed, out, found, where):
        if contestant.label == "ticket":
            raise RuntimeError("a mistake in the harness")
        return [sys.executable, "-c", "import time; time.sleep(60)"]

    monkeypatch.setattr(contest, "command", typed)
    two = {name: Contestant(name, "ours") for name in ("dense", "ticket")}
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="a mistake"):
        contest.run("made_up", {"t": TASK}, two, options(contestants=list(two), side_by_side=2, seeds=1))
    assert time.monotonic() - begun < 30
    assert common.rows("made_up") == []


def test_more_runs_at_a_time_than_cores_are_refused():
    with pytest.raises(ValueError, match="1000 runs side by side on"):
        slots.cores_of_slots(1000)


def test_rows_with_and_without_neighbours_are_not_compared():
    assert common.comparable(row("dense"), row("ticket", side_by_side=1))
    assert not common.comparable(row("dense"), row("ticket", side_by_side=2))


def contest_threads():
    return len(slots.cores_of_slots(1)[0])


def test_what_was_never_run_takes_half_as_long_again_as_dense_and_no_longer_than_it_may():
    mine = [row("dense", wall_s=10.0), row("ticket", wall_s=7.0)]
    assert contest.expected_s(mine, TASK, "t", "ticket") == 7.0
    assert contest.expected_s(mine, TASK, "t", "snip") == 15.0
    assert contest.expected_s([row("dense", wall_s=100.0)], TASK, "t", "snip") == TASK.budget_s
    assert contest.expected_s([], TASK, "t", "snip") == 0.0


def test_rows_of_another_machine_do_not_count_as_run(results, monkeypatch):
    monkeypatch.setattr(contest, "attempt", lambda *_: {"status": "done", "seconds": 1.0})
    common.append("made_up", row("dense", device="another", threads=contest_threads()))
    contest.run("made_up", {"t": TASK}, CONTESTANTS, options(contestants=["dense"], seeds=1))
    assert [row["device"] for row in common.rows("made_up")] == ["another", "a"]


def test_a_number_that_is_missing_in_a_needed_row_fails_that_run_alone(results, tmp_path):
    """A dense run without counted MACs: SNIP cannot be given a cost, and says so in a row."""
    common.append("made_up", row("dense", macs_per_image=None, threads=contest_threads()))
    common.append("made_up", row("ticket", macs_per_image=None, threads=contest_threads()))
    contest.run("made_up", {"t": TASK}, CONTESTANTS, options(contestants=["snip"], seeds=1))
    assert common.rows("made_up")[-1]["status"].startswith("failed: TypeError")


def test_a_half_written_row_is_an_error_and_a_whole_one_is_one_line(results):
    common.append("made_up", {"a": 1})
    common.append("made_up", {"a": 2})
    assert [row["a"] for row in common.rows("made_up")] == [1, 2]


def test_a_definition_changes_with_what_a_contestant_does_and_not_with_its_label(tmp_path, monkeypatch):
    snip = CONTESTANTS["snip"]
    same = contest.definition(TASK, snip)
    assert contest.definition(TASK, dataclasses.replace(snip, label="another")) == same
    assert contest.definition(TASK, dataclasses.replace(snip, longer=2)) != same
    assert contest.definition(dataclasses.replace(TASK, flags={"epochs": 9}), snip) != same
    (tmp_path / "rivals").mkdir()
    monkeypatch.setattr(contest, "HERE", tmp_path)
    assert contest.definition(TASK, snip) != same  # its code is another one
    assert contest.definition(TASK, CONTESTANTS["ticket"]) == row("ticket")["definition"]  # ours has none there


def test_tables_pair_seeds_of_one_machine_and_mark_sessions_failures_and_older_scripts():
    block = [
        row("dense", 0), row("dense", 1, accuracy=0.92), row("dense", 2, device="another"),
        row("ticket", accuracy=0.89, seconds=50.0, macs=500), row("ticket", 1, accuracy=0.92, seconds=25, session="z"),
        row("ticket", 2, accuracy=0.1, seconds=1.0), row("snip", 0, status="failed with exit code 1: x"),
    ]  # fmt: skip
    text = tabled(block)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    lines = {first: rest for first, *rest in cells}
    ticket = lines["ticket"]
    assert ticket[0] == "3"
    assert ticket[2] == "-0.50 ± 0.71"  # -1 and 0 points; the third seed ran on another machine
    assert ticket[5] == "3.00 ± 1.41x* (n = 2)"  # 2x and 4x, of which the second in another session
    assert ticket[6] == "1.50 ± 0.71x (n = 2)"
    assert lines["SNIP"][:2] == ["seed 0", "failed with exit code 1: x"]
    assert "\\* runs of another session" in text
    older = tabled([row("dense", definition="old")])
    assert "| dense† |" in older
    assert "has changed since" in older


def test_a_ratio_to_an_extrapolated_time_or_at_another_pace_is_marked():
    plain = row("plain", seconds_kind="extrapolated from 30 timed steps", seconds=300.0, yardstick_s=0.050)
    text = tabled([plain, row("dense", yardstick_s=0.052), row("ticket", yardstick_s=0.053)])
    assert "| 3.00x‡ |" in text  # dense
    assert "| 3.00x*‡ |" in text  # 6 % slower
    assert "‡ extrapolated" in text


def test_machines_have_tables_of_their_own(results):
    for device in ("a", "b"):
        common.append("made_up", row("dense", device=device))
    text = tables.contest_tables("made_up", {"t": TASK}, CONTESTANTS)
    assert text.count("### A task") == 2
    assert [name for name, _, _ in tables.blocks("made_up", {"t": TASK})] == ["t", "t-2"]


def test_a_section_has_a_table_and_plots_with_one_dot_a_contestant(results, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("dense", "ticket"):
        common.append("made_up", row(name, joules=5.0 + len(name), parameters=1000 * len(name)))
    text = tables.contest_section("made_up", {"t": TASK}, CONTESTANTS, images)
    links = re.findall(r"\]\(images/([^)]+)\)", text)
    assert links == [f"made_up-t-{plot}.svg" for plot in ("seconds", "energy", "weights")]
    for link in links:
        assert (images / link).read_text().count("<circle") == 2


def test_the_page_has_every_script_and_every_plot_that_it_shows(tmp_path):
    text = page.write(tmp_path).read_text()
    for heading, (script, _) in page.SECTIONS.items():
        assert f"## {heading}\n\n{script.__doc__.splitlines()[0]}" in text
    for link in re.findall(r"\]\((images/[^)]+)\)", text):
        assert (tmp_path / link).exists(), link


def test_words():
    assert words({"dense": True, "scope": "layer", "tune": False, "lr_head": 0.5}) == [
        "--dense", "--scope", "layer", "--lr-head", "0.5",
    ]  # fmt: skip


def test_a_run_of_ours_is_read_with_its_costs(tmp_path):
    assert main(["train", "--data", "digits", "--epochs", "1", "--width", "0.25", "--out", str(tmp_path / "run"),
                 "--quiet", "--dense", "--no-tune"]) == 0  # fmt: skip
    found = contest.read(tmp_path / "run")
    bill = json.loads((tmp_path / "run" / "bill.json").read_text())
    assert found["macs"] == bill["total"]["macs"]["value"]
    assert found["joules"] > 0
    assert (
        found["macs_per_image"] == bill["phases"]["train"]["macs"]["value"] / bill["phases"]["train"]["images"]["value"]
    )
    assert found["curve"][-1][1] == found["accuracy"]
