"""`make bench`: every script runs, a failure is named and stops nobody, and budgets are handed on."""

import subprocess
import sys
from pathlib import Path

import pytest
import run_all


@pytest.fixture
def calls(monkeypatch):
    """Collect what would be run; the script `broken` names fails."""
    made = []

    def run(command, **_):
        made.append([Path(command[1]).stem, *command[2:]])
        return subprocess.CompletedProcess(command, returncode=int(made[-1][0] == run.broken))

    run.broken = ""
    monkeypatch.setattr(run_all.subprocess, "run", run)
    return made, run


def start(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["run_all.py", *words])
    return run_all.main()


def test_the_short_version_runs_every_script_and_then_the_page(calls, monkeypatch):
    assert start(monkeypatch) == 0
    assert [call[0] for call in calls[0]] == [*run_all.QUICK, "page"]
    for name in run_all.QUICK:
        assert (run_all.HERE / f"{name}.py").exists()
    assert run_all.FULL.keys() == run_all.QUICK.keys()


def test_a_failure_is_named_and_the_others_go_on(calls, monkeypatch, capsys):
    made, run = calls
    run.broken = "networks"
    assert start(monkeypatch) == 1
    assert len(made) == len(run_all.QUICK) + 1
    assert "failed: networks" in capsys.readouterr().err


def test_a_full_run_hands_what_is_left_of_its_time_to_those_that_can_stop(calls, monkeypatch):
    assert start(monkeypatch, "--full", "--hours", "2", "--only", "networks,roofline") == 0
    networks, roofline, _ = calls[0]
    assert 119 < float(networks[networks.index("--budget") + 1]) <= 120
    assert "--budget" not in roofline


def test_an_unknown_script_is_an_error(calls, monkeypatch):
    with pytest.raises(SystemExit):
        start(monkeypatch, "--only", "made_up")
    assert calls[0] == []
