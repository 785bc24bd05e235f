import argparse

import architectures
import common
import pytest
import torch
from architectures import ARCHITECTURES, EQUAL, PAGE, QUICK, examine, line, newest_of, page, read
from torch import nn

SHORT = argparse.Namespace(rounds=1, no_times=True, no_onnx=True, no_rival=False)


@pytest.mark.parametrize("name", QUICK)
def test_small_ones_are_cut_to_what_the_masked_network_computes(name):
    row = examine(name, SHORT)
    assert row["after"] < 0.7 * row["parameters"]
    assert row["difference"] <= EQUAL
    assert row["effect"] > 1e-2  # what went had a say
    assert row["rival"] == "runs"
    assert row["rival_after"] < row["parameters"]
    assert line(row).count("|") == 9


def test_times_and_onnx_are_of_the_small_network(monkeypatch):
    monkeypatch.setattr(
        architectures, "interleaved", lambda actions, rounds: ({n: [a() or 1.0] for n, a in actions.items()}, 0)
    )
    row = examine("perceptron", argparse.Namespace(rounds=1, no_times=False, no_onnx=False, no_rival=True))
    assert row["dense_seconds"] == row["small_seconds"] == 1.0
    assert float(row["onnx"]) < 1e-4
    assert "rival" not in row


def test_what_fails_says_so_in_its_row(monkeypatch):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x).softmax(-1))

    one = architectures.Architecture("odd", Odd, lambda: torch.randn(2, 4), {"score": "magnitude"})
    monkeypatch.setitem(ARCHITECTURES, "odd", one)
    row = examine("odd", SHORT)
    assert "InputError: none of the ranked channels is free" in line(row)
    assert row["rival_difference"] > EQUAL
    assert "not equal" in line(row)


def test_the_newest_rows_make_the_page(results, head):
    old = {"name": "unet", "title": "U-Net", "parameters": 100, "error": "old", **head()}
    new = {
        "name": "unet", "title": "U-Net", "parameters": 100, "after": 40, "difference": 1e-7, "normed": False,
        "whole": {"a.b": "a reason"}, "dense_seconds": 0.2, "small_seconds": 0.1, "onnx": "1e-07", "rival": "runs",
        "rival_after": 30, "rival_difference": 0.5, **head(session="second"),
    }  # fmt: skip
    for row in (old, new):
        common.append(architectures.NAME, row)
    text = page(common.rows(architectures.NAME))
    assert "| U-Net | 100 | 40 (40%) | yes (1e-07) | 200.0 | 100.0 | 1e-07 | 30%, not equal (5e-01) |" in text
    assert "1 of 1 are cut, 1 of them to what the masked network computes" in text
    assert "- U-Net: 1 layers, among them `a.b`: a reason" in text
    assert "No rows yet." in page([])


def test_the_committed_page_is_what_the_rows_give():
    found = common.rows(architectures.NAME)
    assert page(found) == PAGE.read_text(encoding="utf-8")
    assert len([row for row in newest_of(found) if row.get("difference", 1.0) <= EQUAL]) >= 20


def test_words():
    assert read(["--quick"]).only == list(QUICK)
    assert read(["--only", "unet"]).rounds == 5
    with pytest.raises(SystemExit):
        read(["--only", "unett"])
