"""Batches that are left out: which, how many, and that nothing of them is ever made."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import earlybird as eb
from earlybird.data.loader import Loader
from earlybird.errors import InputError
from earlybird.skipping.batches import Selection
from earlybird.train.recipe import Recipe
from earlybird.train.run import resume, train


def net() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


class Watched(Dataset[Tensor]):
    """Remembers which samples were asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, list[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        self.asked.append(index)
        return torch.full((3,), float(index))


# ---- which ----


@given(st.floats(0, 0.95), st.integers(1, 60), st.integers(0, 5), st.integers(0, 5))
def test_fixed_leaves_out_exactly_its_share_of_every_epoch(drop: float, batches: int, seed: int, epoch: int) -> None:
    selection = Selection(drop, "fixed", seed)
    kept = selection.kept(epoch, batches)
    assert int(kept.sum()) == selection.length(batches) == max(round((1 - drop) * batches), 1)
    assert torch.equal(kept, Selection(drop, "fixed", seed).kept(epoch, batches))


def test_each_batch_is_left_out_equally_often_and_epochs_differ() -> None:
    for rule in ("fixed", "bernoulli"):
        drawn = torch.stack([Selection(0.3, rule, 1).kept(epoch, 50) for epoch in range(400)]).double()
        assert drawn.mean().item() == pytest.approx(0.7, abs=0.01)
        assert drawn.mean(0).sub(0.7).abs().max() < 0.1
        assert drawn.unique(dim=0).shape[0] == 400
    assert Selection(0.3, "bernoulli", 1).kept(0, 50).sum() != Selection(0.3, "bernoulli", 1).kept(1, 50).sum()


@settings(deadline=None)
@given(st.floats(0, 0.9), st.integers(1, 20), st.integers(0, 60), st.sampled_from(["fixed", "bernoulli"]))
def test_positions_go_on_from_anywhere(drop: float, batches: int, first: int, rule: str) -> None:
    """The batch after so many trained ones is the same, whether one walks there or begins there."""
    whole = [
        (epoch, batch)
        for epoch in range(200)
        for batch, stays in enumerate(Selection(drop, rule, 3).kept(epoch, batches).tolist())
        if stays
    ]
    selection = Selection(drop, rule, 3)
    if first + 1 < len(whole):
        walk = selection.positions(first, batches)
        assert [next(walk), next(walk)] == whole[first : first + 2]
        epoch, batch = whole[first]
        assert selection.attempt(first, batches) == epoch * batches + batch


# ---- in loaders ----


def test_a_data_loader_never_makes_what_is_left_out() -> None:
    model, optimizer = net()
    data = Watched(40)
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    orders = [batch[:, 0].int().tolist() for batch in loader]
    data.asked.clear()
    assert isinstance(loader.generator, torch.Generator)
    loader.generator.manual_seed(0)
    thinned = eb.BatchDropping(drop=0.5).attach(model, optimizer, seed=7).wrap(loader)
    assert isinstance(thinned, DataLoader)
    assert len(thinned) == 5
    batches = [batch[:, 0].int().tolist() for batch in thinned]
    kept = Selection(0.5, "fixed", 7).kept(0, 10).tolist()
    assert batches == [order for order, stays in zip(orders, kept) if stays]  # the same ones as without dropping
    assert data.asked == [index for batch in batches for index in batch]
    second = [batch[:, 0].int().tolist() for batch in thinned]
    assert len(second) == 5
    assert second != batches


def test_a_data_loader_with_workers_leaves_out_the_same_batches() -> None:
    seen = []
    for workers in (0, 1):
        dropping = eb.BatchDropping(drop=0.5).attach(*net())
        loader = dropping.wrap(DataLoader(Watched(16), batch_size=2, num_workers=workers))
        seen.append([[int(batch[0, 0]) for batch in loader] for _ in range(2)])
        assert dropping.state_dict()["epochs"] == [2]
    assert seen[0] == seen[1]


def test_a_data_loader_keeps_its_other_settings() -> None:
    model, optimizer = net()
    loader = DataLoader(Watched(16), batch_size=2, num_workers=1, prefetch_factor=3, drop_last=True, timeout=30)
    thinned = eb.BatchDropping(drop=0.25).attach(model, optimizer).wrap(loader)
    assert (thinned.num_workers, thinned.prefetch_factor, thinned.timeout) == (1, 3, 30)
    assert sum(1 for _ in thinned) == 6


def test_our_own_loader_gives_the_batches_it_would_have_given() -> None:
    images, labels = torch.arange(30 * 4 * 4).remainder(251).to(torch.uint8).view(30, 1, 4, 4), torch.arange(30)

    def loader() -> Loader:
        return Loader(images, labels, batch_size=3, mean=(0.5,), std=(1.0,), seed=2)

    model, optimizer = net()
    whole, thinned = loader(), eb.BatchDropping(drop=0.4).attach(model, optimizer, seed=2).wrap(loader())
    assert len(thinned) == 6
    for epoch in (0, 3):
        kept = Selection(0.4, "fixed", 2).kept(epoch, 10).tolist()
        expected = [labels for (_, labels), stays in zip(whole.epoch(epoch), kept) if stays]
        found = [labels for _, labels in thinned.epoch(epoch)]
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
        assert torch.equal(next(thinned.epoch(epoch, 4))[1], expected[4])


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (DataLoader(type("Stream", (IterableDataset,), {"__iter__": lambda self: iter([])})()), "without an index"),
        (DataLoader(Watched(4), batch_size=None), "without an index"),
        ((batch for batch in [torch.zeros(1)]), "generator"),
    ],
)
def test_a_loader_that_cannot_leave_batches_out_is_refused(loader: Any, words: str) -> None:
    model, optimizer = net()
    with pytest.raises(InputError, match=words):
        eb.BatchDropping().attach(model, optimizer).wrap(loader)


@pytest.mark.parametrize("drop", [1, 1.0, -0.1, "half", True, float("nan")])
def test_a_share_that_leaves_nothing_is_refused_at_construction(drop: Any) -> None:
    with pytest.raises(InputError, match="drop is"):
        eb.BatchDropping(drop=drop)


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(InputError, match="drop_rule"):
        eb.BatchDropping(drop_rule="poisson")
    with pytest.raises(InputError, match="drop_clock"):
        eb.BatchDropping(drop_clock="wall")


# ---- the bill ----


def test_the_bill_knows_what_dense_would_have_trained_on() -> None:
    model, optimizer = net()
    dropping = eb.BatchDropping(drop=0.75).attach(model, optimizer)
    batches = [torch.ones(4, 3) for _ in range(8)]
    for _ in range(3):
        for x in batches[:2]:
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert dropping.bill().dense is None  # nothing is wrapped, so nothing was left out
    thinned = dropping.wrap(batches)
    for _ in range(3):
        for x in thinned:
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    dropping.detach()
    bill = dropping.bill()
    assert bill.total.images.value == 4 * (6 + 6)
    assert bill.dense.total.images.value == 4 * (6 + 24)
    assert bill.dense.total.steps.value == 6 + 24
    assert "this run's own" in str(bill)


def test_a_loop_of_ones_own_goes_on_in_the_epoch_in_which_it_was_stopped() -> None:
    batches = [torch.full((1, 3), float(number)) for number in range(10)]

    def walks(count: int, state: Any = None) -> tuple[list[list[float]], Any]:
        model, optimizer = net()
        dropping = eb.BatchDropping(drop=0.5).attach(model, optimizer, seed=5)
        loader = dropping.wrap(batches)
        if state is not None:
            dropping.load_state_dict(json.loads(json.dumps(state)))
        return [[x[0, 0].item() for x in loader] for _ in range(count)], dropping.state_dict()

    whole, _ = walks(4)
    first, state = walks(2)
    second, _ = walks(2, state)
    assert first + second == whole
    model, optimizer = net()
    with pytest.raises(InputError, match="wrap"):
        eb.BatchDropping().attach(model, optimizer).load_state_dict(state)


# ---- the shipped loop ----


def recipe(**more: Any) -> Recipe:
    values = {"data": "digits", "epochs": 3, "width": 0.25, "tune": False, "evaluate_every": "1ep"}
    return Recipe.from_values({**values, "method": "batch_dropping=0.6", **more})


def test_the_shipped_loop_makes_so_many_steps(tmp_path: Any) -> None:
    whole = train(recipe(method="batch_dropping=0.0"), tmp_path / "whole", quiet=True)
    result = train(recipe(), tmp_path / "run", quiet=True)
    per_epoch = whole.steps // 3
    assert result.steps == 3 * round(0.4 * per_epoch)
    assert result.bill.dense is not None
    assert result.bill.dense.phases["train"].steps.value == pytest.approx(whole.steps, abs=1)
    assert result.bill.dense.phases["train"].images.value == pytest.approx(
        whole.bill.phases["train"].images.value, rel=0.01
    )
    assert result.bill.ratios["macs"].low == pytest.approx(
        whole.bill.total.macs.value / result.bill.total.macs.value,
        rel=0.01,  # type: ignore[union-attr]
    )


@pytest.mark.parametrize("rule", ["fixed", "bernoulli"])
@pytest.mark.parametrize("clock", ["executed", "attempted"])
def test_stopped_and_resumed_it_ends_in_the_same_bits(tmp_path: Any, rule: str, clock: str) -> None:
    own = {"drop_rule": rule, "drop_clock": clock, "checkpoint_every": "5it"}
    whole = train(recipe(**own), tmp_path / "whole", quiet=True)

    class Stop(Exception):
        pass

    def stop(kind: str, fields: Any) -> None:
        if kind == "step" and fields["step"] == 13:
            raise Stop

    with pytest.raises(Stop):
        train(recipe(**own), tmp_path / "cut", quiet=True, on_event=stop)
    again = resume(tmp_path / "cut", quiet=True)
    assert again.steps == whole.steps
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_schedules_by_attempts_end_with_the_run(tmp_path: Any) -> None:
    rates: dict[str, list[float]] = {}
    for clock in ("executed", "attempted"):
        train(recipe(drop_clock=clock, drop_rule="bernoulli"), tmp_path / clock, quiet=True)
        rows = [json.loads(line) for line in (tmp_path / clock / "metrics.jsonl").read_text().splitlines()]
        rates[clock] = [row["lr"] for row in rows]
    assert rates["executed"] != rates["attempted"]
    assert rates["attempted"][-1] == pytest.approx(rates["executed"][-1], abs=0.01)


def test_the_published_rule_and_clock_are_a_preset() -> None:
    settings = Recipe.from_values({"method": "batch_dropping", "preset": "published"}).settings
    assert settings == {"drop": 0.5, "drop_rule": "bernoulli", "drop_clock": "attempted"}


def test_a_method_with_a_value_sets_its_first_key() -> None:
    assert recipe().settings["drop"] == 0.6
    several = Recipe.from_values({"method": ["early_bird=0.7", "batch_dropping=.25"]})
    assert several.method == ("early_bird", "batch_dropping")
    assert (several.settings["keep"], several.settings["drop"]) == (0.7, 0.25)
    assert Recipe.from_values({"method": "early_bird=0.7,batch_dropping"}).settings["drop"] == 0.5
    with pytest.raises(InputError, match="one of them"):
        Recipe.from_values({"method": "batch_dropping=0.5", "drop": 0.25})
    with pytest.raises(InputError, match="unknown method 'no_such'"):
        Recipe.from_values({"method": "no_such=1"})
    with pytest.raises(InputError, match="below 1"):
        Recipe.from_values({"method": "batch_dropping=1"})
