"""`make bench`: every script runs with words that it knows, a failure stops nobody, and time is shared."""

import importlib
import subprocess
import sys
from pathlib import Path

import contest
import pytest
import run_all
from slots import cores_of_slots


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Collect what would be run, and its environment; the script `broken` names fails, and each takes `minutes`."""
    made, now = [], [0.0]

    def run(command, env, **_):
        made.append(([Path(command[1]).stem, *command[2:]], env))
        now[0] += 60 * run.minutes
        if made[-1][0][0] == "page":
            Path(command[command.index("--out") + 1], "README.md").write_text("the page")
        return subprocess.CompletedProcess(command, returncode=int(made[-1][0][0] == run.broken))

    run.broken, run.minutes = "", 0
    monkeypatch.setattr(run_all.subprocess, "run", run)
    monkeypatch.setattr(run_all.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_all, "RUNS", tmp_path / "runs")
    return made, run


def start(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["run_all.py", *words])
    return run_all.main()


def understand(name, words, monkeypatch):
    """Let the script read ``words`` with its own parser, and run nothing."""
    script = importlib.import_module(name)
    if name not in run_all.BUDGETED or name in ("early_bert", "paper_figures", "tickets"):
        script.read(words)
        return
    ran = []
    monkeypatch.setattr(contest, "run", lambda *given: ran.append(given))
    monkeypatch.setattr(contest.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    contest.main(script.NAME, script.__doc__, script.TASKS, script.CONTESTANTS, lambda: "", default=[])
    assert ran
    assert "--tasks" in words


@pytest.mark.parametrize("jobs", [run_all.quick, run_all.full])
def test_every_script_understands_its_words(jobs, monkeypatch, tmp_path):
    for name, words in jobs(tmp_path):
        understand(name, [*words, *(["--budget", "1.0"] if name in run_all.BUDGETED else [])], monkeypatch)


@pytest.mark.parametrize(("name", "words"), [
    ("vgg16_cifar10", ["--tasks", "quick", "--contestants", "dense,tikcet"]), ("networks", ["--tasks", "resnet21"]),
    ("overheads", ["detectr"]), ("scaling", ["--fast"]), ("roofline", ["layer"]), ("alternatives", ["all"]),
    ("step_times", ["--wide", "1"]), ("paper_figures", ["--work", "x", "--networks", "vgg"]),
])  # fmt: skip
def test_a_word_that_a_script_does_not_know_is_found_out(name, words, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        understand(name, words, monkeypatch)
    assert "error:" in capsys.readouterr().err


def test_both_versions_have_every_section_of_the_page(tmp_path):
    import page

    shown = {Path(script.__file__).stem for script, _ in page.SECTIONS.values()}
    for jobs in (run_all.quick, run_all.full):
        assert {name for name, _ in jobs(tmp_path)} == shown


def test_the_full_version_has_every_task_but_the_quick_ones(tmp_path):
    asked = {}
    for name, words in run_all.full(tmp_path):
        if "--tasks" in words:
            asked.setdefault(name, []).extend(words[words.index("--tasks") + 1].split(","))
    assert asked.keys() == set(run_all.BUDGETED) - {"paper_figures"}
    for name, tasks in asked.items():
        assert sorted(tasks) == sorted(set(importlib.import_module(name).TASKS) - {"quick"})


def test_the_short_version_measures_anew_in_a_folder_of_its_own_and_shows_the_page(calls, monkeypatch, capsys):
    made, _ = calls
    pages = []
    for _ in range(2):
        made.clear()
        assert start(monkeypatch) == 0
        assert [words[0] for words, _ in made] == [*(name for name, _ in run_all.quick(Path())), "page"]
        pages.append(Path(made[-1][0][-1]))
        for words, environment in made:
            assert environment["EARLYBIRD_BENCH_RESULTS"] == str(pages[-1] / "results")
            assert environment["EARLYBIRD_BENCH_WORK"] == str(pages[-1] / "runs")
            assert environment["PYTHONPATH"].startswith(str(run_all.HERE.parent / "src"))
            assert "--budget" not in words
        assert made[-2][0][-1] == str(pages[-1] / "runs" / "paper")
        said = capsys.readouterr().out
        assert "the page" in said
        assert str(pages[-1] / "README.md") in said
    assert pages[0] != pages[1]
    assert pages[0].parent == run_all.RUNS


def test_the_full_version_writes_the_committed_page(calls, monkeypatch):
    monkeypatch.delenv("EARLYBIRD_BENCH_RESULTS", raising=False)
    monkeypatch.setattr(run_all, "HERE", run_all.RUNS)
    run_all.RUNS.mkdir()
    assert start(monkeypatch, "--full", "--only", "overheads") == 0
    (_, environment), (page, _) = calls[0]
    assert page == ["page", "--out", str(run_all.HERE)]
    assert "EARLYBIRD_BENCH_RESULTS" not in environment


def test_a_failure_is_named_and_the_others_go_on(calls, monkeypatch, capsys):
    made, run = calls
    run.broken = "networks"
    assert start(monkeypatch) == 1
    assert len(made) == len(run_all.quick(Path())) + 1
    assert "failed: networks" in capsys.readouterr().err


def test_each_script_gets_its_share_and_what_one_leaves_goes_to_the_next(calls, monkeypatch):
    """Two hours for five runs of ten minutes each: 120 / 5, 110 / 4 ... minutes; roofline has no budget."""
    made, run = calls
    run.minutes = 10
    monkeypatch.setattr(run_all, "HERE", run_all.RUNS)
    run_all.RUNS.mkdir()
    words = ("--full", "--hours", f"{130 / 60}", "--only", "roofline,vgg16_cifar10,networks,paper_figures")
    assert start(monkeypatch, *words) == 0
    budgets = [words[words.index("--budget") + 1] for words, _ in made if "--budget" in words]
    assert budgets == ["24.0", "27.5", "33.3", "45.0", "80.0"]
    assert made[0][0] == ["roofline"]


def test_when_the_time_is_over_nothing_is_left_to_share(calls, monkeypatch):
    made, run = calls
    run.minutes = 100
    monkeypatch.setattr(run_all, "HERE", run_all.RUNS)
    run_all.RUNS.mkdir()
    assert start(monkeypatch, "--full", "--hours", "1", "--only", "roofline,networks") == 0
    assert made[1][0][-2:] == ["--budget", "0.0"]


def test_small_networks_run_two_at_a_time_where_there_are_two_cores(monkeypatch, tmp_path):
    cores = len(cores_of_slots(1)[0])
    paired = [words for _, words in run_all.full(tmp_path) if "--side-by-side" in words]
    assert len(paired) == (5 if cores >= 2 else 0)
    monkeypatch.setattr(run_all, "cores_of_slots", lambda slots: [{core} for core in range(slots)])
    paired = [(name, words) for name, words in run_all.full(tmp_path) if words[-2:] == ["--side-by-side", "2"]]
    assert [name for name, _ in paired] == [
        "vgg16_cifar10",
        "few_images",
        "networks",
        "efficient_steps",
        "paper_figures",
    ]
    assert paired[0][1][1] == "quarter"

    def refuse(slots):
        raise ValueError("one core")

    monkeypatch.setattr(run_all, "cores_of_slots", refuse)
    assert not any("--side-by-side" in words for _, words in run_all.full(tmp_path))


def test_an_unknown_script_is_an_error(calls, monkeypatch):
    with pytest.raises(SystemExit):
        start(monkeypatch, "--only", "made_up")
    assert calls[0] == []
