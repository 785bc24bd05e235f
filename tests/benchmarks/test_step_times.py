import sys

import common
import pytest
import step_times
import torch


class Batches:
    """Stands for the loader: small batches of noise."""

    def epoch(self, number):
        generator = torch.Generator().manual_seed(number)
        while True:
            images = torch.randn(4, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
            yield images, torch.arange(4)


@pytest.mark.filterwarnings("ignore:no agreement by the deadline")
def test_ratios_are_medians_of_those_within_a_round(monkeypatch):
    """plain / dense is 2, 5 and 1 in the three rounds, though 6 / 2 of the medians."""
    times = {
        "plain": [4.0, 10.0, 6.0],
        "dense_pytorch": [3.0, 3.0, 9.0],
        "dense": [2.0, 2.0, 6.0],
        "ticket": [1.0, 1.0, 1.0],
        "ticket_layer": [1.0, 1.0, 2.0],
    }
    monkeypatch.setattr(step_times, "batches", Batches)

    def interleaved(actions, rounds):
        assert [*actions] == [*times]
        for action in actions.values():
            action()
        return times, 0.01

    monkeypatch.setattr(step_times, "interleaved", interleaved)
    found = {row["contestant"]: row for row in step_times.measure(0.0625, 3, search_steps=1)}
    assert found["plain"]["ratios"] == {"dense": pytest.approx(0.5)}
    assert found["dense"]["ratios"] == {"plain": 2.0}
    assert found["ticket"]["ratios"] == {"plain": 6.0, "dense": 2.0}
    assert found["ticket_layer"]["ratios"] == {"plain": 4.0, "dense": 2.0}
    assert found["plain"]["step_seconds"] == 6.0
    assert found["ticket_layer"]["spread"] == [1.0, 2.0]
    assert found["ticket"]["forward_macs"] < found["dense"]["forward_macs"] == found["plain"]["forward_macs"]


@pytest.mark.parametrize("quick", [False, True])
def test_memory_is_kept_as_in_training_and_a_quick_look_is_not_recorded(results, head, monkeypatch, capsys, quick):
    done = []
    row = {"contestant": "dense", "width": 1.0, "step_seconds": 0.1, "forward_macs": 1e8, "ratios": {}, **head()}
    monkeypatch.setattr(step_times, "keep_freed", lambda: done.append("keep"))
    monkeypatch.setattr(step_times, "measure", lambda width, *_: done.append(width) or [row])
    monkeypatch.setattr(common, "HERE", results.parent)
    monkeypatch.setattr(sys, "argv", ["step_times.py", *(["--quick"] if quick else [])])
    step_times.main()
    assert done == ["keep", 0.5 if quick else 1.0]
    assert len(common.rows(step_times.NAME)) == (0 if quick else 1)
    assert "| dense | 100 M | 100 |" in capsys.readouterr().out
