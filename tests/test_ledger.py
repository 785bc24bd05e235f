"""The ledger: exact with a clock that tests turn by hand, in every kind of loop."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from earlybird import ledger as ledger_module
from earlybird.cost.arithmetic import PASSES, Arithmetic
from earlybird.cost.bill import Bill, Estimated, Measured
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.ledger import PHASES, Ledger


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> Iterator[Ledger]:
    ledger = Ledger(clock=clock)
    yield ledger
    ledger.stop()


def net(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def step(model: nn.Module, *optimizers: torch.optim.Optimizer, images: int = 10) -> None:
    model(torch.ones(images, 4)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


# ---- time ----


def test_phases_add_up_to_the_wall_time_while_running(ledger: Ledger, clock: Clock) -> None:
    clock.wait(5)  # before the first enter nothing runs
    for phase, seconds in (("setup", 1), ("search", 2), ("draw", 4), ("train", 8), ("search", 16)):
        ledger.enter(phase)
        clock.wait(seconds)
    assert {name: record.seconds for name, record in ledger.phases.items()} == {
        "setup": 1,
        "search": 18,
        "draw": 4,
        "train": 8,
    }
    assert ledger.seconds == clock.now - 1005


def test_real_clock_loses_nothing_between_phases() -> None:
    ticks = iter(float(tick) for tick in range(10_000))
    readings: list[float] = []

    def clock() -> float:
        readings.append(next(ticks))
        return readings[-1]

    ledger = Ledger(clock=clock)
    ledger.enter("search")
    begin = readings[-1]
    for _ in range(20):
        with ledger.during("draw"), ledger.during("setup"):
            ledger.phases  # noqa: B018
        ledger.enter("train")
        ledger.state_dict()
        ledger.enter("search")
    ledger.stop()
    assert sum(record.seconds for record in ledger.phases.values()) == readings[-1] - begin


def test_during_nests_and_goes_back(ledger: Ledger, clock: Clock) -> None:
    ledger.enter("search")
    with ledger.during("draw"):
        clock.wait(1)
        with ledger.during("setup"):
            clock.wait(2)
        assert ledger.phase == "draw"
        clock.wait(4)
    assert ledger.phase == "search"
    clock.wait(8)
    assert {name: record.seconds for name, record in ledger.phases.items()} == {"setup": 2, "search": 8, "draw": 5}


def test_during_goes_back_after_an_exception(ledger: Ledger, clock: Clock) -> None:
    ledger.enter("train")

    def fail() -> None:
        with ledger.during("draw"):
            clock.wait(1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.wait(2)
    assert ledger.phases["train"].seconds == 2


def test_during_before_the_first_phase_stands_still_again(ledger: Ledger, clock: Clock) -> None:
    with ledger.during("setup"):
        clock.wait(1)
    clock.wait(50)
    assert ledger.phase is None
    assert ledger.seconds == 1


def test_phase_may_change_for_good_inside_during(ledger: Ledger, clock: Clock) -> None:
    ledger.enter("search")
    with ledger.during("draw"):
        clock.wait(1)
    ledger.enter("train")
    clock.wait(2)
    assert ledger.phase == "train"
    assert ledger.seconds == 3


def test_pause_is_not_counted(ledger: Ledger, clock: Clock) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("train")
    clock.wait(1)
    ledger.pause()
    clock.wait(100)
    step(model, optimizer)
    ledger.resume()
    clock.wait(2)
    with ledger.during("draw"):
        ledger.pause()
        clock.wait(100)
        ledger.resume()
        clock.wait(4)
    assert ledger.phases["train"].seconds == 3
    assert ledger.phases["draw"].seconds == 4
    assert ledger.phases["train"].images == 0


def test_during_inside_a_pause_leaves_the_clock_standing(ledger: Ledger, clock: Clock) -> None:
    ledger.enter("train")
    ledger.pause()
    with ledger.during("draw"):
        clock.wait(1)
    clock.wait(100)
    ledger.resume()
    clock.wait(2)
    assert ledger.phase == "train"
    assert {name: record.seconds for name, record in ledger.phases.items()} == {"draw": 1, "train": 2}


def test_unknown_phase_is_refused(ledger: Ledger) -> None:
    with pytest.raises(InputError, match="unknown phase 'trian'"):
        ledger.enter("trian")
    with pytest.raises(InputError, match="unknown phase"):
        ledger.charge("coffee", 1)
    assert ledger.phases == {}


def test_lost_time_can_be_charged(ledger: Ledger, clock: Clock) -> None:
    ledger.enter("train")
    clock.wait(1)
    ledger.charge("lost", 30.0)
    assert ledger.bill().phases["lost"].seconds == Measured(30.0, "s", "clock")
    assert ledger.seconds == 31


# ---- loops ----


def test_bare_loop(ledger: Ledger, clock: Clock) -> None:
    model = net()
    optimizer = sgd(model)
    cost = count(model, torch.ones(10, 4))
    ledger.watch(model, optimizer)
    ledger.enter("train")
    for _ in range(7):
        clock.wait(3)
        step(model, optimizer)
    record = ledger.phases["train"]
    assert (record.steps, record.images, record.seconds) == (7, 70, 21)
    assert record.macs == 70 * cost.training_macs
    assert record.bit_macs == record.macs
    assert record.moved_bytes == cost.moved_bytes(70, 7, 32, training=True) + 7 * cost.update_bytes


def test_last_smaller_batch_is_counted_as_it_is(ledger: Ledger) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("train")
    for images in (10, 10, 3):
        step(model, optimizer, images=images)
    assert ledger.phases["train"].images == 23


def test_gradient_accumulation_is_one_step(ledger: Ledger, clock: Clock) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("train")
    for batch in range(12):
        clock.wait(1)
        step(model, *([optimizer] if batch % 4 == 3 else []))
    record = ledger.phases["train"]
    assert (record.steps, record.images) == (3, 120)
    assert record.work[32].train_batches == 12


def test_evaluation_in_between_has_its_own_phase(ledger: Ledger, clock: Clock) -> None:
    model = net()
    optimizer = sgd(model)
    cost = count(model, torch.ones(10, 4))
    ledger.watch(model, optimizer)
    ledger.enter("search")
    for _ in range(2):
        for _ in range(3):
            clock.wait(1)
            step(model, optimizer)
        model.eval()
        with torch.no_grad():
            for _ in range(5):
                model(torch.ones(20, 4))
                clock.wait(10)
        assert ledger.phase == "evaluate"
        model.train()
    step(model, optimizer)
    search, evaluate = ledger.phases["search"], ledger.phases["evaluate"]
    assert (search.images, search.steps, search.seconds) == (70, 7, 5)
    # the wait for the first batch after an evaluation still belongs to it
    assert (evaluate.images, evaluate.steps, evaluate.seconds) == (200, 0, 101)
    assert evaluate.macs == 200 * cost.forward_macs
    assert search.macs == 70 * cost.training_macs


def test_explicit_evaluation_phase_agrees_with_the_hook(ledger: Ledger, clock: Clock) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("train")
    step(model, optimizer)
    with ledger.during("evaluate"), torch.no_grad():
        model.eval()
        model(torch.ones(5, 4))
        clock.wait(2)
        model.train()
    assert ledger.phase == "train"
    clock.wait(1)
    assert ledger.phases["evaluate"].seconds == 2
    assert ledger.phases["train"].seconds == 1


def test_draw_and_setup_keep_what_happens_inside(ledger: Ledger, clock: Clock) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("setup")
    step(model, optimizer)
    model.eval()
    model(torch.ones(5, 4))
    ledger.enter("draw")
    model(torch.ones(6, 4))
    model.train()
    with torch.no_grad():
        model(torch.ones(7, 4))
    clock.wait(1)
    assert set(ledger.phases) == {"setup", "draw"}
    assert ledger.phases["setup"].work[32].train_images == 10
    assert ledger.phases["setup"].work[32].forward_images == 5
    assert ledger.phases["draw"].work[32].forward_images == 13
    assert ledger.phases["draw"].seconds == 1


def test_two_optimizers_for_one_batch_are_one_step(ledger: Ledger) -> None:
    model = net()
    first, second = sgd(model[0]), sgd(model[3])
    ledger.watch(model, [first, second])
    ledger.enter("train")
    for _ in range(4):
        step(model, first, second)
    record = ledger.phases["train"]
    assert (record.steps, record.images, record.work[32].updates) == (4, 40, 4)
    one = Ledger()
    one.watch(model, sgd(model))
    one.enter("train")
    for _ in range(4):
        step(model, first, second)
    assert record.moved_bytes == count(model, torch.ones(1, 4)).update_bytes * 4 + one.phases["train"].moved_bytes


def test_two_optimizers_in_turn_are_two_steps(ledger: Ledger) -> None:
    model = net()
    first, second = sgd(model[0]), sgd(model[3])
    ledger.watch(model, [first, second])
    ledger.enter("train")
    for _ in range(4):
        step(model, first)
        step(model, second)
    assert ledger.phases["train"].steps == 8


def test_draw_inside_the_optimizers_step(ledger: Ledger, clock: Clock) -> None:
    """What an early-bird search does: change the phase and the model from a hook of the optimizer."""
    model, small = net(), net(4)
    optimizer = sgd(model)
    ledger.watch(model, optimizer, torch.ones(10, 4))
    ledger.enter("search")

    def draw(*_: object) -> None:
        clock.wait(100)
        with ledger.during("draw"):
            clock.wait(7)
            ledger.recount(small)
        ledger.enter("train")

    clock.wait(1)
    step(model, optimizer)
    handle = optimizer.register_step_pre_hook(draw)
    step(model, optimizer)
    handle.remove()
    clock.wait(1)
    step(model, optimizer)
    phases = ledger.phases
    assert (phases["search"].steps, phases["train"].steps) == (2, 1)  # a step belongs where its batch was seen
    assert phases["search"].seconds == 101
    assert phases["draw"].seconds == 7
    dense, ticket = count(model, torch.ones(10, 4)), count(small, torch.ones(10, 4))
    assert phases["search"].macs == 20 * dense.training_macs
    assert phases["train"].macs == 10 * ticket.training_macs
    assert ledger.dense_cost == dense
    assert ledger.cost is not None
    assert ledger.cost.layers == ticket.layers


def test_keyword_inputs_are_counted(ledger: Ledger) -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, *, values: torch.Tensor) -> torch.Tensor:
            return self.layer(values)

    model = Keyword()
    ledger.watch(model)
    ledger.enter("train")
    model(values=torch.ones(9, 4))
    record = ledger.phases["train"]
    assert (record.images, record.macs) == (9, 9 * 16)


@pytest.mark.parametrize("when", ["before", "after", "in place"])
def test_compiled_models_are_counted_batch_by_batch(ledger: Ledger, when: str) -> None:
    torch._dynamo.reset()
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    model = net()
    optimizer = sgd(model)
    if when == "before":
        called = torch.compile(model, backend=backend)
        ledger.watch(called, optimizer)
    else:
        ledger.watch(model, optimizer)
        called = model
        if when == "after":
            called = torch.compile(model, backend=backend)
        else:
            model.compile(backend=backend)
    ledger.enter("train")
    for _ in range(6):
        step(called, optimizer)
    model.eval()
    with torch.no_grad():
        called(torch.ones(5, 4))
    phases = ledger.phases
    assert (phases["train"].images, phases["train"].steps, phases["evaluate"].images) == (60, 6, 5)
    assert phases["train"].macs == 60 * count(model, torch.ones(1, 4)).training_macs
    # one graph for training and one for evaluation: a counter that changes must not compile anything anew
    assert len(graphs) == 2


def test_hooks_do_not_change_the_training() -> None:
    def trained(watched: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ledger = Ledger()
        if watched:
            ledger.watch(model, optimizer)
            ledger.enter("train")
        for _ in range(3):
            model(nn.functional.dropout(torch.randn(10, 4))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ledger.stop()
        return [*model.parameters(), *model.buffers()]

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


def test_unwatch_and_stop_remove_the_hooks(ledger: Ledger) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.watch(model, optimizer)  # again: replaced, not doubled
    ledger.enter("train")
    step(model, optimizer)
    assert ledger.phases["train"].images == 10
    ledger.stop()
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert ledger.phases["train"].steps == 1


def test_passes_below_the_hooks_can_be_reported(ledger: Ledger) -> None:
    model = net()
    cost = count(model, torch.ones(1, 4))
    ledger.watch(model, example_inputs=torch.ones(10, 4))
    with ledger.during("draw"):
        ledger.passes(30, batches=3)
        ledger.passes(10, training=True)
    assert ledger.phases["draw"].macs == 30 * cost.forward_macs + 10 * cost.training_macs


def test_all_processes_are_counted(clock: Clock) -> None:
    ledger = Ledger(world_size=4, clock=clock)
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("train")
    step(model, optimizer)
    clock.wait(2)
    record = ledger.phases["train"]
    assert (record.images, record.steps, record.seconds) == (40, 1, 2)
    assert record.work[32].updates == record.work[32].train_batches == 4


def test_a_model_that_cannot_be_counted_trains_on_and_the_bill_says_so(ledger: Ledger, clock: Clock) -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training:
                raise RuntimeError("not in eval mode")
            return self.layer(x)

    model = Moody()
    optimizer = sgd(model)
    with pytest.raises(InputError, match="not in eval mode"):
        ledger.watch(model, optimizer, torch.ones(3, 4))
    ledger.watch(model, optimizer)
    ledger.enter("train")
    with pytest.warns(UserWarning, match="MACs are not counted: .*not in eval mode"):
        step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        step(model, optimizer)
    clock.wait(1)
    row = ledger.bill().phases["train"]
    assert row.images.value == 20
    assert row.macs is row.modelled_joules is None
    assert "not counted" in str(ledger.bill())


# ---- precision ----


def test_bits_apply_to_what_follows(ledger: Ledger) -> None:
    model = net()
    optimizer = sgd(model)
    macs = count(model, torch.ones(1, 4)).training_macs
    ledger.watch(model, optimizer)
    ledger.enter("train")
    step(model, optimizer)
    ledger.bits = 16
    step(model, optimizer)
    step(model, optimizer)
    record = ledger.phases["train"]
    assert {bits: work.train_images for bits, work in record.work.items()} == {32: 10, 16: 20}
    assert record.macs == 30 * macs
    assert record.bit_macs == (10 + 20 / 4) * macs
    assert record.energy.compute_joules == pytest.approx((10 * 4.6 + 20 * 1.5) * macs * 1e-12)
    with pytest.raises(InputError, match="8 bits"):
        ledger.bits = 8


# ---- state ----


def test_state_round_trip_is_exact(ledger: Ledger, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("earlybird.ledger.PeakMemory.read", lambda self: 4096)  # the process goes on growing
    model, small = net(), net(4)
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("search")
    step(model, optimizer)
    clock.wait(1.1)
    ledger.recount(small)
    ledger.bits = 16
    ledger.enter("train")
    step(model, optimizer)
    clock.wait(2.3)
    ledger.stop()  # the peak of memory would go on rising
    state = json.loads(json.dumps(ledger.state_dict(), allow_nan=False))
    other = Ledger(clock=clock)
    other.load_state_dict(state)
    assert other.state_dict() == ledger.state_dict()
    assert other.bill() == ledger.bill()
    assert other.bits == 16


def test_resuming_process_adds_its_own_time(ledger: Ledger, clock: Clock) -> None:
    ledger.enter("setup")
    clock.wait(1)
    ledger.enter("train")
    clock.wait(10)
    state = ledger.state_dict()
    clock.wait(1000)  # not running
    resumed = Ledger(clock=clock)
    resumed.enter("setup")
    clock.wait(2)
    resumed.load_state_dict(state)
    clock.wait(4)
    resumed.enter("train")
    clock.wait(20)
    assert {name: record.seconds for name, record in resumed.phases.items()} == {"setup": 7, "train": 30}


def test_resume_after_the_draw_still_knows_dense(clock: Clock) -> None:
    def begin() -> tuple[Ledger, nn.Module, torch.optim.SGD]:
        ledger, model = Ledger(clock=clock), net()
        optimizer = sgd(model)
        ledger.watch(model, optimizer, torch.ones(10, 4))
        return ledger, model, optimizer

    first, model, optimizer = begin()
    first.enter("search")
    step(model, optimizer)
    clock.wait(3)
    first.recount(net(4))
    first.enter("train")
    step(model, optimizer)
    clock.wait(1)
    resumed, _, _ = begin()
    resumed.recount(net(4))
    resumed.load_state_dict(first.state_dict())
    assert resumed.dense_cost is not None
    assert resumed.dense_cost.to_json() == first.state_dict()["dense_cost"]
    assert resumed.bill().dense is not None
    assert resumed.bill().dense.total.seconds == first.bill().dense.total.seconds


def test_recount_before_anything_was_seen_counts_the_next_batch(ledger: Ledger) -> None:
    model = net(4)
    ledger.watch(model)
    assert ledger.recount(model) is None
    ledger.enter("train")
    model(torch.ones(10, 4)).sum().backward()
    assert ledger.cost == count(model, torch.ones(10, 4))
    assert ledger.dense_cost is None  # the dense model was never seen: no estimate of it
    assert ledger.bill().dense is None


def test_price_as_charges_what_follows_and_leaves_what_came_before(ledger: Ledger) -> None:
    model, inputs = net(8), torch.ones(10, 4)
    large, small = count(model, inputs), count(net(2), inputs)
    ledger.watch(model, sgd(model))
    ledger.enter("train")
    model(inputs).sum().backward()
    ledger.price_as(small)
    ledger.passes(3)
    ledger.price_as(large)
    model(inputs).sum().backward()
    assert ledger.phases["train"].macs == 20 * large.training_macs + 3 * small.forward_macs
    assert ledger.cost == large
    assert ledger.bill().dense is None  # no draw was recorded, so nothing is estimated


def test_state_in_the_middle_does_not_disturb_the_run(ledger: Ledger, clock: Clock) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("train")
    for _ in range(5):
        step(model, optimizer)
        clock.wait(1)
        ledger.state_dict()
        ledger.bill()
    assert (ledger.phases["train"].images, ledger.phases["train"].steps, ledger.seconds) == (50, 5, 5)


# ---- the bill ----


def test_bill_has_every_phase_in_order_and_its_numbers(ledger: Ledger, clock: Clock) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    for phase in reversed(PHASES[:4]):
        ledger.enter(phase)
        step(model, optimizer)
        clock.wait(1)
    bill = ledger.bill()
    assert list(bill.phases) == list(PHASES[:4])
    for name, row in bill.phases.items():
        assert row.seconds == Measured(1, "s", "clock")
        assert row.macs is not None
        assert row.macs.value == ledger.phases[name].macs > 0
        assert row.modelled_joules is not None
        assert row.modelled_joules.low < row.modelled_joules.high
    assert bill.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_dense_estimate_by_hand(ledger: Ledger, clock: Clock) -> None:
    model, small = net(), net(4)
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("setup")
    clock.wait(0.5)
    ledger.enter("search")
    for _ in range(4):  # 40 images in 8 s
        step(model, optimizer)
        clock.wait(2)
    model.eval()
    model(torch.ones(50, 4))  # 50 images in 3 s
    clock.wait(3)
    model.train()
    with ledger.during("draw"):
        clock.wait(1)
        ledger.recount(small)
    ledger.enter("train")
    for _ in range(6):  # 60 images in 6 s
        step(model, optimizer)
        clock.wait(1)
    model.eval()
    model(torch.ones(50, 4))  # 50 images in 2 s
    clock.wait(2)
    bill = ledger.bill()
    dense = count(model, torch.ones(1, 4))
    assert bill.dense is not None
    rows = bill.dense.phases
    assert {name: row.seconds.value for name, row in rows.items()} == {"setup": 0.5, "train": 20, "evaluate": 6}
    assert all(isinstance(row.seconds, Estimated) for row in rows.values())
    assert rows["train"].seconds.basis == "the search phase's own 2000 ms a step"
    assert rows["train"].macs is not None
    assert rows["train"].macs.value == 100 * dense.training_macs
    assert rows["evaluate"].macs is not None
    assert rows["evaluate"].macs.value == 100 * dense.forward_macs
    assert rows["train"].steps.value == 10
    assert bill.dense.total.joules is None
    assert bill.ratios["seconds"].low == pytest.approx(26.5 / 20.5)
    assert bill.ratios["seconds"].kind == "estimated"
    assert bill.total.peak_bytes is not None
    assert isinstance(bill.dense.total.peak_bytes, Estimated)
    assert bill.ratios["peak_bytes"].kind == "estimated"
    dense_line = next(line for line in str(bill).splitlines() if line.startswith("dense (estimate)"))
    assert str(bill.dense.total.peak_bytes) in dense_line
    assert str(bill.dense.total.peak_bytes).startswith("~")
    assert Bill.from_json(bill.to_json()) == bill


def test_freezing_changes_the_price_of_what_follows(ledger: Ledger) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("train")
    step(model, optimizer)
    whole = count(model, torch.ones(10, 4))
    model[0].requires_grad_(False)
    ledger.reprice(model)
    step(model, optimizer)
    frozen = count(model, torch.ones(10, 4))
    assert frozen.training_macs == whole.training_macs - 4 * 8
    assert ledger.phases["train"].macs == 10 * (whole.training_macs + frozen.training_macs)
    assert ledger.dense_cost == frozen
    assert ledger.bill().dense is None


def test_dense_estimate_pays_for_warming_up_once(ledger: Ledger, clock: Clock) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("search")
    for seconds in (50, 1, 1, 2, 2, 2, 2):  # the first step compiles
        clock.wait(seconds)
        step(model, optimizer)
    ledger.recount(net(4))
    ledger.enter("train")
    for _ in range(5):
        clock.wait(1)
        step(model, optimizer)
    state = ledger.state_dict()
    resumed = Ledger(clock=clock)
    resumed.load_state_dict(state)
    for bill in (ledger.bill(), resumed.bill()):
        assert bill.dense is not None
        assert bill.dense.phases["train"].seconds == Estimated(52 + 9 * 2, "s", "the search phase's own 2000 ms a step")


def test_dense_estimate_takes_the_fastest_evaluation(ledger: Ledger, clock: Clock) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("search")
    for seconds in (30, 5, 6):
        step(model, optimizer)
        with ledger.during("evaluate"), torch.no_grad():
            model.eval()
            model(torch.ones(50, 4))
            model.train()
            clock.wait(seconds)
    ledger.recount(net(4))
    ledger.enter("train")
    with ledger.during("evaluate"), torch.no_grad():
        model.eval()
        model(torch.ones(50, 4))
        clock.wait(1)
    dense = ledger.bill().dense
    assert dense is not None
    assert dense.phases["evaluate"].seconds.value == 4 * 5


def test_without_evaluation_before_the_draw_dense_gets_the_small_models_time(ledger: Ledger, clock: Clock) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("search")
    step(model, optimizer)
    clock.wait(2)
    ledger.recount(net(4))
    ledger.enter("train")
    model.eval()
    model(torch.ones(50, 4))
    clock.wait(3)
    dense = ledger.bill().dense
    assert dense is not None
    assert dense.phases["evaluate"].seconds.value == 3


def test_nothing_to_compare_before_the_draw(ledger: Ledger, clock: Clock) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("search")
    step(model, optimizer)
    clock.wait(2)
    assert ledger.bill().dense is None


def test_measured_dense_bill_is_used_as_it_is(ledger: Ledger, clock: Clock) -> None:
    other = Ledger(clock=clock)
    other.enter("train")
    clock.wait(30)
    dense = other.bill()
    ledger.enter("train")
    clock.wait(10)
    bill = ledger.bill(dense)
    assert bill.dense == dense
    assert str(bill.ratios["seconds"]) == "x3.00 less"
    assert bill.ratios["seconds"].kind == "measured"


def test_peaks_are_measured_by_phase() -> None:
    ledger = Ledger()
    if ledger._peak.name != "VmHWM":
        pytest.skip("this system does not let a process reset its high-water mark")
    ledger.enter("search")
    block = torch.ones(96 << 20, dtype=torch.uint8)
    ledger.enter("train")
    del block
    ledger.enter("draw")
    ledger.enter("train")
    ledger.stop()
    search, draw = ledger.phases["search"].peak_bytes, ledger.phases["draw"].peak_bytes
    assert search is not None
    assert draw is not None
    assert search - draw > 64 << 20
    peak = ledger.bill().phases["search"].peak_bytes
    assert peak is not None
    assert peak.meter == "VmHWM"


def test_meter_readings_are_split_between_phases(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        name = "test meter"

        def read(self) -> float:
            return 50 * (clock.now - 1000)  # 50 W

    monkeypatch.setattr("earlybird.ledger.energy_meter", lambda device: Meter())
    ledger = Ledger(clock=clock)
    clock.wait(10)
    ledger.enter("search")
    clock.wait(1)
    ledger.enter("train")
    clock.wait(2)
    ledger.pause()
    clock.wait(100)
    ledger.resume()
    clock.wait(4)
    assert {name: row.joules for name, row in ledger.bill().phases.items()} == {
        "search": Measured(50, "J", "test meter"),
        "train": Measured(300, "J", "test meter"),
    }


def conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def square(side: int) -> Tensor:
    return torch.zeros(2, 1, side, side)


def test_images_of_many_sizes_are_not_counted_at_every_step(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    real = ledger_module.count

    def counting(model: nn.Module, inputs: Any) -> Any:
        counted.append(1)
        return real(model, inputs)

    monkeypatch.setattr(ledger_module, "count", counting)
    model = conv()
    ledger.watch(model)
    ledger.enter("train")
    for side in range(8, 72):
        model(square(side)).sum().backward()
    assert len(counted) == 16
    exact = 2 * sum(real(model, square(side)).training_macs for side in range(8, 72))
    assert ledger.phases["train"].macs == pytest.approx(exact, rel=0.01)  # only the classifier does not scale


def test_passes_below_the_hooks_are_priced_at_their_own_size(ledger: Ledger) -> None:
    model = conv()
    ledger.watch(model)
    ledger.enter("train")
    model(square(8)).sum().backward()
    before = ledger.phases["train"].macs
    assert [batch.shape[-1] for batch in ledger.passing([square(16), square(16)])] == [16, 16]
    model(square(8)).sum().backward()
    price = {side: count(model, square(side)) for side in (8, 16)}
    assert ledger.phases["train"].macs - before == 2 * (2 * price[16].forward_macs + price[8].training_macs)


def test_a_price_given_before_the_first_images_is_that_of_their_size(ledger: Ledger) -> None:
    model = conv()
    dear = count(model, square(32))
    ledger.watch(model)
    ledger.enter("train")
    ledger.price_as(dear)
    for side in (8, 16, 8):  # there and back
        model(square(side)).sum().backward()
    own = count(model, square(16)).training_macs
    assert ledger.phases["train"].macs == 2 * (2 * dear.training_macs + own)


def test_another_model_has_another_price(ledger: Ledger) -> None:
    for model in (conv(), nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())):
        ledger.watch(model)
        ledger.enter("train")
        before = ledger.phases["train"].macs
        model(square(8)).sum().backward()
        assert ledger.phases["train"].macs - before == 2 * count(model, square(8)).training_macs


def test_dense_time_is_estimated_for_whole_images(clock: Clock) -> None:
    """The search takes 1 s a step on images of a quarter of the MACs: dense would have taken some 4 s a step."""
    ledger = Ledger(clock=clock)
    model = conv()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger.watch(model, optimizer, square(16))
    ledger.enter("search")
    for _ in range(4):
        model(square(8)).sum().backward()
        clock.now += 1.0
        optimizer.step()
    ledger.recount(model)
    ledger.enter("train")
    dense = ledger.bill().dense
    assert dense is not None
    whole = count(model, square(16)).training_macs / count(model, square(8)).training_macs
    assert 3.9 < whole < 4
    assert dense.phases["train"].seconds.value == pytest.approx(4 * whole, rel=0.01)
    assert "for the MACs of whole images" in dense.phases["train"].seconds.basis


# ---- layers that compute otherwise, samples that are left out ----

EIGHT = Arithmetic(activation=8, weight=8, gradient=8, whole=PASSES)


def test_layers_that_say_how_they_compute_are_priced_so(ledger: Ledger) -> None:
    model = net()
    optimizer = sgd(model)
    model[3].arithmetic = EIGHT
    ledger.watch(model, optimizer)
    ledger.enter("train")
    step(model, optimizer)
    first, last = count(model, torch.ones(1, 4)).layers["0"], count(model, torch.ones(1, 4)).layers["3"]
    record = ledger.phases["train"]
    assert record.macs == 10 * (first.macs + first.backward_macs + last.macs + last.backward_macs)
    assert record.bit_macs == 10 * (first.macs + first.backward_macs + (last.macs + last.backward_macs) / 16)
    assert record.operations["mult 8x8"] == record.operations["add 8"] == 10 * 3 * last.macs
    model[3].arithmetic = dataclasses.replace(EIGHT, weight=4)
    ledger.reread_arithmetic()
    step(model, optimizer)
    found = ledger.phases["train"].operations
    assert found["mult 8x8"] == 10 * 4 * last.macs  # the second step's weight pass multiplies no weights
    assert found["mult 8x4"] == 10 * 2 * last.macs
    del model[3].arithmetic
    ledger.reread_arithmetic()
    step(model, optimizer)
    assert ledger.phases["train"].operations["mult 8x8"] == 10 * 4 * last.macs


def test_samples_that_pass_layers_otherwise_or_not_at_all(ledger: Ledger) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("train")
    step(model, optimizer)  # ten samples
    ledger.reroute(["3"], 4, None, training=True)
    ledger.reroute(["3"], 2.5, EIGHT, training=True)
    cost = count(model, torch.ones(1, 4))
    last = cost.layers["3"].macs + cost.layers["3"].backward_macs
    record = ledger.phases["train"]
    assert record.macs == 10 * cost.training_macs - 4 * last
    assert record.bit_macs == pytest.approx(record.macs - 2.5 * last * 15 / 16)
    assert record.operations["mult 8x8"] == 2.5 * last
    before = record.macs
    step(model, optimizer)  # said of one step, it holds for that step alone
    assert ledger.phases["train"].macs == before + 10 * cost.training_macs
    dense = ledger.bill().dense
    assert dense is not None
    assert dense.phases["train"].macs is not None
    assert dense.phases["train"].macs.value == 20 * cost.training_macs
    assert dense.total.seconds is None  # steps with rounding or gates are no measure of dense ones
    assert "its time is not known" in str(ledger.bill())
    bill = ledger.bill()  # another one may have a higher peak of memory
    assert Bill.from_json(bill.to_json()) == bill


def test_what_is_rerouted_while_the_clock_stands_is_not_counted_either(ledger: Ledger) -> None:
    model = net()
    ledger.watch(model, sgd(model), torch.ones(1, 4))
    ledger.enter("train")
    ledger.pause()
    model(torch.ones(10, 4))
    ledger.reroute(("0",), 10, None, training=True)
    ledger.leave_out(10)
    ledger.resume()
    model(torch.ones(10, 4))
    assert ledger.phases["train"].macs == 10 * count(model, torch.ones(1, 4)).training_macs
    assert ledger.phases["train"].work[32].left_images == 0


def test_a_resumed_run_still_knows_how_each_layer_computes(ledger: Ledger) -> None:
    model = net()
    model[0].arithmetic = Arithmetic(activation=8, weight=8, gradient=8, whole=PASSES)  # type: ignore[assignment]
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("train")
    step(model, optimizer)
    state = json.loads(json.dumps(ledger.state_dict()))
    ledger.stop()
    resumed = Ledger()
    resumed.watch(model, optimizer)
    resumed.enter("train")
    resumed.load_state_dict(state)
    assert resumed.bill().parameters == ledger.bill().parameters
    step(model, optimizer)
    resumed.reroute(("3",), 10, None, training=True)
    once, twice = ledger.phases["train"], resumed.phases["train"]
    last = count(model, torch.ones(1, 4)).layers["3"]
    assert twice.bit_macs == 2 * once.bit_macs - 10 * (last.macs + last.backward_macs)


def test_dense_trains_on_what_was_left_out_at_this_runs_own_pace(ledger: Ledger, clock: Clock) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer)
    ledger.enter("train")
    for _ in range(8):
        clock.wait(1)
        step(model, optimizer)
        ledger.leave_out(10)
    ledger.stop()
    bill, cost = ledger.bill(), count(model, torch.ones(1, 4))
    assert bill.total.images.value == 80
    assert bill.dense is not None
    row = bill.dense.phases["train"]
    assert (row.seconds, row.steps.value, row.images.value) == (
        Estimated(16, "s", "this run's own 1000 ms a step"), 16, 160,
    )  # fmt: skip
    assert row.macs is not None
    assert row.macs.value == 160 * cost.training_macs
    assert bill.ratios["seconds"].low == 2


def test_what_was_left_out_and_rerouted_survives_a_resume(ledger: Ledger, clock: Clock) -> None:
    model = net()
    optimizer = sgd(model)
    ledger.watch(model, optimizer, torch.ones(1, 4))
    ledger.enter("train")
    step(model, optimizer)
    ledger.leave_out(10)
    ledger.reroute(["3"], 5, EIGHT, training=True)
    again = Ledger(clock=clock)
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert {name: record.work for name, record in again.phases.items()} == {
        name: record.work for name, record in ledger.phases.items()
    }
    assert again.bill().dense == ledger.bill().dense
