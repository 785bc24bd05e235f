"""A method that decides the loss, and one that judges, in the shipped loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.ledger import Ledger
from earlybird.objective import claim_loss
from earlybird.train.recipe import Recipe
from earlybird.train.run import train

Make = Callable[..., Recipe]


class Smoothed:
    """The loop's own loss, by a method."""

    def attach(self, model: nn.Module, optimizer: Any, *, label_smoothing: float = 0.0) -> Smoothed:
        self.smoothing, self.calls = label_smoothing, 0
        self.free = claim_loss(model, type(self).__name__)
        return self

    def loss(self, forward: Any, images: Tensor, labels: Tensor, *beside: Tensor) -> Tensor:
        self.calls += 1
        return functional.cross_entropy(forward(images).float(), labels, label_smoothing=self.smoothing)

    def status(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calls = state["calls"]

    def detach(self) -> None:
        self.free()


class Judged(Smoothed):
    judged_by = "a coin's"

    def judge(self, test: Any) -> tuple[Tensor, Tensor]:
        seen = sum(len(labels) for _, labels in test)
        return torch.tensor(seen // 4), torch.tensor(seen)


def test_the_same_loss_by_a_method_gives_the_same_bits(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    recipe = small(dense=True, accumulate=2, clip_norm=1.0, ema=0.9, label_smoothing=0.1)
    train(recipe, tmp_path / "plain", quiet=True)
    method = Smoothed()
    monkeypatch.setattr(Recipe, "build_methods", lambda self: {"smoothed": method})
    result = train(recipe, tmp_path / "method", quiet=True)
    one, two = (tmp_path / name / "model.safetensors" for name in ("plain", "method"))
    assert one.read_bytes() == two.read_bytes()
    assert method.calls == 2 * result.steps
    assert result.judged_by == ""


def test_rows_and_result_say_who_judged(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Recipe, "build_methods", lambda self: {"judged": Judged()})
    result = train(small(dense=True, epochs=1), tmp_path, quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["judged_by"] for row in rows] == ["a coin's"]
    assert rows[-1]["test_loss"] is None
    assert result.accuracy == pytest.approx(0.25, abs=0.01)
    assert json.loads((tmp_path / "result.json").read_text())["judged_by"] == result.judged_by == "a coin's"


def test_two_that_decide_the_loss_are_refused(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Recipe, "build_methods", lambda self: {"one": Smoothed(), "other": Judged()})
    with pytest.raises(InputError, match="both Smoothed and Judged decide the loss"):
        train(small(dense=True), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_passes_of_another_model_are_charged_at_its_price_and_not_to_a_dense_run() -> None:
    images = torch.randn(4, 3, 8, 8)
    model, teacher = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 32, 3)
    ledger = Ledger()
    ledger.watch(model, None, images)
    ledger.passes_of(count(teacher, images), 7)
    assert not ledger.phases  # the clock stands
    ledger.enter("train")
    model(images).sum().backward()
    before = ledger.phases["train"].macs
    ledger.passes_of(count(teacher, images), 7)
    record = ledger.phases["train"]
    assert record.macs - before == 7 * 36 * 27 * 32
    assert record.images == 4
    assert record.priced(count(model, images)).macs == before
