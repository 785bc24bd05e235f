import overheads
import pytest
from overheads import COMMANDS, measured, startup, verdict


def test_commands_of_the_start_take_turns_and_the_first_round_does_not_count(monkeypatch):
    """Rounds in which importing torch takes 100, 1, 2 and 4 s, and all of the library half as much more each time."""
    now, ran = [0.0], []
    factors = {"help": 0.1, "torch": 1.0, "library": 1.5, "everything": 2.0}

    def run(command, **_):
        name = next(name for name, words in COMMANDS.items() if tuple(command[1:]) == words)
        now[0] += factors[name] * (100, 1, 2, 4)[len(ran) // len(COMMANDS)]
        ran.append(name)

    monkeypatch.setattr(overheads.subprocess, "run", run)
    monkeypatch.setattr(overheads.time, "perf_counter", lambda: now[0])
    found = startup(rounds=3)
    assert ran == [*COMMANDS] * 4
    assert found["seconds"] == pytest.approx(0.2)
    assert found["import_over_torch"] == pytest.approx(1.5)
    assert found["import_all_over_torch"] == pytest.approx(2.0)
    assert verdict(found) == "within 0.30 s"


def test_a_limit_is_kept_up_to_its_value_and_has_the_unit_of_what_it_limits():
    assert verdict({"share": 0.02, "limit": 0.02}) == "within 2.00%"
    assert verdict({"share": 0.021, "limit": 0.02}) == "ABOVE 2.00%"
    assert verdict({"seconds": 3.1, "limit": 3.0}) == "ABOVE 3.00 s"
    assert (measured({"share": 0.0034}), measured({"seconds": 0.5}), measured({})) == ("0.34%", "0.50 s", "")


def test_every_figure_is_recorded_as_it_is_printed(results, head, monkeypatch, capsys):
    monkeypatch.setattr(overheads, "machine", head)
    monkeypatch.setattr(overheads, "keep_freed", lambda: None)
    made_up = {"shrink": lambda: {"seconds": 4.0, "limit": 3.0, "detail": "slow"}}
    monkeypatch.setattr(overheads, "FIGURES", made_up)
    monkeypatch.setattr(overheads.sys, "argv", ["overheads.py"])
    overheads.main()
    (row,) = overheads.rows(overheads.NAME)
    assert (row["figure"], row["seconds"], row["limit"]) == ("shrink", 4.0, 3.0)
    assert "ABOVE 3.00 s" in capsys.readouterr().out
