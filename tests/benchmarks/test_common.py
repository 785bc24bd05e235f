import common
import pytest
from common import interleaved


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(common, "others_s", lambda: 0.0)


def test_every_action_is_timed_once_a_round_in_turn(quiet):
    calls = []
    times, others = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == ["a", "a", "b", "b", *"ababab"]  # two calls each warm up
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}
    assert others == 0


def test_a_short_action_is_repeated_within_a_round(quiet, monkeypatch):
    """An action of a quarter second, at least a second a round: four calls each, after the two that warm up."""
    now, calls = [0.0], []

    def action():
        calls.append(now[0])
        now[0] += 0.25

    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    times, _ = interleaved({"a": action}, 2, least_s=1.0)
    assert len(calls) == 2 + 2 * 4
    assert times == {"a": [0.25, 0.25]}


def test_rounds_that_others_disturbed_are_done_again(monkeypatch):
    """Each call takes so many seconds of the clock, in which others use so many of the processors."""
    now, busy = [0.0], [0.0]
    script = iter([(1, 0), (1, 0), (8, 4), (2, 0), (3, 0)])  # two calls to warm up, then the rounds

    def action():
        for total, more in zip((now, busy), next(script)):
            total[0] += more

    monkeypatch.setattr(common, "others_s", lambda: busy[0])
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    assert interleaved({"a": action}, 2) == ({"a": [2.0, 3.0]}, 0)


def test_a_machine_that_never_rests_ends_it_and_says_so(monkeypatch, capsys):
    calls = []
    ticks = iter(range(1000))
    monkeypatch.setattr(common, "others_s", lambda: float(next(ticks)))
    times, others = interleaved({"a": lambda: calls.append(1)}, 2)
    assert len(times["a"]) == 2
    assert others > common.DISTURBED
    assert len(calls) == 2 + common.PATIENCE * 2
    assert "other processes took" in capsys.readouterr().err


def test_seconds_of_others_are_those_of_all_less_our_own(monkeypatch, tmp_path):
    """300 + 20 + 100 + 1 + 2 + 50 ticks of all; waiting (999 and 5) is not work."""
    statistic = tmp_path / "stat"
    statistic.write_text("cpu  300 20 100 999 5 1 2 50 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    monkeypatch.setattr(common, "STATISTIC", statistic)
    monkeypatch.setattr(common.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(common.os, "times", lambda: (1.5, 0.5, 0.0, 0.0, 0.0))
    assert common.others_s() == pytest.approx(4.73 - 2.0)
    monkeypatch.setattr(common, "STATISTIC", tmp_path / "none")
    assert common.others_s() == 0.0
