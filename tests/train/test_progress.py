import io
from typing import Any

import pytest
from rich.console import Console

from earlybird.train import progress
from earlybird.train.progress import Display, _duration

ROW = {"epoch": 1.0, "loss": 0.5, "accuracy": 0.875, "images_per_s": 1234.5, "seconds": 61.0}


@pytest.fixture
def terminal(monkeypatch: Any) -> io.StringIO:
    """A terminal that remembers what was written to it."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=120, highlight=False)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    monkeypatch.setattr(progress, "_EVERY_S", 0.0)
    return written


def test_the_bar_shows_accuracy_distance_speed_and_time_left(terminal: io.StringIO) -> None:
    display = Display(100, 10)
    assert display.due()
    display.row(ROW, {})
    for step in (10, 20):
        display.step(step, 0.25, 64, {"distance": 0.125})
    shown = terminal.getvalue()
    for part in ("epoch 2.0/10", "loss 0.250", "accuracy 87.50%", "distance 0.125", "images/s", "left"):
        assert part in shown
    display.close()
    assert not display.due()


@pytest.mark.parametrize("mode", ["quiet", "mute"])
def test_quiet_keeps_warnings_and_mute_nothing(mode: str, terminal: io.StringIO) -> None:
    display = Display(100, 10, **{mode: True})  # type: ignore[arg-type]
    assert not display.due()
    display.row(ROW, {})
    display.say("text")
    display.warn("[bold]careful")
    display.close()
    assert ("warning: [bold]careful" in terminal.getvalue()) == (mode == "quiet")
    assert "text" not in terminal.getvalue()


def test_durations_read_like_a_clock() -> None:
    assert [_duration(value) for value in (0.44, 59.4, 61, 3700)] == ["0.4 s", "59.4 s", "1:01", "1:01:40"]
