"""The table of `benchmarks/transfer.py`, and its tasks."""

from __future__ import annotations

import pytest
import transfer

from earlybird.data.parts import split
from earlybird.train.recipe import Recipe

HEAD = {
    "device": "a machine",
    "threads": 1,
    "torch": "2",
    "date": "today",
    "revision": "abc",
    "source": "supervised",
    "task": "x",
    "judged_by": "",
}


def row(kind: str, accuracy: float, sparsity: float | None = None) -> dict:
    return {**HEAD, "kind": kind, "accuracy": accuracy, "sparsity": sparsity}


def test_what_matches_is_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("dense", 0.80), row("dense", 0.84), row("ticket", 0.80, 0.5), row("ticket", 0.70, 0.9)]
    monkeypatch.setattr(transfer, "rows", lambda name: rows)
    lines = transfer.table().splitlines()
    cells = next(line for line in lines if "ticket on pre-trained" in line).split("|")[2:4]
    assert [cell.strip() for cell in cells] == ["**80.00 (n = 1)**", "70.00 (n = 1)"]  # 82 less 2.83
    dense = next(line for line in lines if "full pre-trained" in line)
    assert dense.count("82.00 ± 2.83 (n = 2)") == 2


def test_without_rows_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "rows", lambda name: [])
    assert transfer.table() == "No rows yet."


@pytest.mark.parametrize("task", transfer.TASKS)
def test_tasks_are_recipes(task: str) -> None:
    data = "cracks" if task == "cracks" else task
    assert Recipe.from_values({**transfer._COMMON, **transfer.TASKS[task], "data": data}).data == data
    assert split(data)[0] in ("cifar10", "fashion-mnist", "cracks")


@pytest.mark.parametrize("source", transfer.SOURCES)
def test_sources_are_recipes(source: str) -> None:
    own = transfer.SOURCES[source]
    for changes in (own.pretraining, {**own.pruning, "epochs": 1}):
        Recipe.from_values({**transfer._COMMON, **transfer._NETWORK, **changes}).build_methods()
    assert set(own.tasks) <= set(transfer.TASKS)


def test_masks_of_two_sources_are_compared_beside_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = {**HEAD, "kind": transfer.MASKS, "one": "a", "other": "b", "round": 4, "jaccard": 0.5, "by_chance": 0.25}
    monkeypatch.setattr(transfer, "rows", lambda name: [row("dense", 0.8), alike])
    assert "| a, b | 4 | 0.500 | 0.250 |" in transfer.table()


def test_an_unknown_task_is_an_error() -> None:
    with pytest.raises(SystemExit):
        transfer.main(["--tasks", "made_up"])
