"""The tutorial's training script: that it times what it says."""

import json

import plain_pytorch
import pytest
from contest import RECIPES


def test_a_few_steps_stand_for_the_whole_run_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv",
        ["plain_pytorch.py", "--recipe", str(RECIPES / "vgg16-cifar10.toml"), "--model", "vgg11", "--width", "0.125",
         "--epochs", "3", "--threads", "1", "--accelerator", "cpu", "--steps", "2", "--out", str(tmp_path)],
    )  # fmt: skip
    plain_pytorch.main()
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["seconds_kind"] == "extrapolated from 2 timed steps and one test epoch"
    assert row["accuracy"] is None
    assert row["epochs"] == 3
    steps = 3 * (50_000 // 128)
    assert row["seconds"] > steps * row["step_seconds"] > 0
    assert row["seconds"] - steps * row["step_seconds"] == pytest.approx(3 * row["test_seconds"])
