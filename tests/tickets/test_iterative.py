"""Iterative magnitude pruning: train, prune what is left, rewind, and train again."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from earlybird.errors import InputError
from earlybird.files import read_rows, read_tensors
from earlybird.forecast import forecast
from earlybird.sparse.masks import prunable
from earlybird.tickets.early_bird import EarlyBird
from earlybird.tickets.iterative import Iterative, prune, shares
from earlybird.tickets.ticket import Ticket
from earlybird.train.recipe import Recipe
from earlybird.train.run import Result, resume, train
from tests.tickets.test_early_bird import sgd
from tests.tickets.topologies import images, make


def steps(model, optimizer, first, last, before=lambda step: None):
    for step in range(first, last):
        before(step)
        functional.cross_entropy(model(images(16, seed=step)), torch.arange(16) % 4).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(weights):
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def test_shares_fall_by_a_fifth_of_what_is_left_as_published():
    published = [80, 64, 51.2, 41, 32.8, 26.2, 21, 16.8, 13.4, 10.7, 8.6, 6.9, 5.5, 4.4, 3.5]
    assert [round(100 * share, 1) for share in shares(0.8**15, 0.2)] == pytest.approx(published, abs=0.06)
    assert shares(0.5, 0.2) == pytest.approx([0.8, 0.64, 0.512, 0.5])
    assert shares(1.0, 0.2) == []
    assert len(shares(0.512, 0.2)) == 3


def test_pruning_removes_the_smallest_of_those_that_are_left():
    weights = {"a": torch.tensor([4.0, -3.0, 0.1, 0.2]), "b": torch.tensor([[-1.0, 0.3], [9.0, 0.05]])}
    left = {"a": torch.tensor([True, True, True, False]), "b": torch.ones(2, 2, dtype=torch.bool)}
    masks = prune(weights, left, 0.5)
    assert masks["a"].tolist() == [True, True, False, False]
    assert masks["b"].tolist() == [[True, False], [True, False]]
    by_layer = prune(weights, left, 0.5, scope="layer", head_left=0.75)
    assert by_layer["a"].tolist() == [True, True, False, False]
    assert by_layer["b"].tolist() == [[True, True], [True, False]]


def test_a_layer_of_small_weights_keeps_one():
    weights = {"a": torch.ones(9), "b": torch.full((3,), 1e-3)}
    masks = prune(weights, whole(weights), 0.5)
    assert masks["b"].sum() == 1
    assert masks["a"].sum() == 6


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.1, 0.9), st.sampled_from(["network", "layer"]))
def test_rounds_never_bring_a_weight_back_and_leave_as_many_as_asked_for(seed, share, scope):
    generator = torch.Generator().manual_seed(seed)
    weights = {"a": torch.randn(7, 5, generator=generator), "b": torch.randn(3, 4, 3, 3, generator=generator)}
    masks = whole(weights)
    for left in shares(0.1, share):
        before, masks = masks, prune(weights, masks, left, scope=scope)
        assert all(not (masks[name] & ~before[name]).any() for name in masks)
        kept = sum(int(mask.sum()) for mask in masks.values())
        assert kept == pytest.approx(left * (35 + 108), abs=1.01)


@pytest.mark.parametrize("rewind", ["weights", "learning_rate", "fine_tuning"])
def test_a_round_begins_where_it_is_rewound_to(rewind):
    model = make("residual")
    optimizer = sgd(model)
    method = Iterative(keep_weights=0.5, prune_share=0.5, rewind=rewind, rewind_to="2it")
    assert method.total_steps(6) == 10
    running = method.attach(model, optimizer, total_steps=10)
    seen = {}
    steps(model, optimizer, 0, 6, lambda step: seen.update({step: copy.deepcopy(model.state_dict())}))
    end = copy.deepcopy(model.state_dict())
    assert running.due()
    assert running.ticket is None  # so that the end of the training can be looked at

    def note(*_):  # what the next batch is computed with
        seen["again"] = copy.deepcopy(model.state_dict())

    model.register_forward_hook(note)
    steps(model, optimizer, 6, 7)
    start = seen[2] if rewind == "weights" else end
    weights = prunable(model)
    for name, value in seen["again"].items():
        if "running" in name or "num_batches" in name:
            continue  # the forward pass has moved them by now
        layer = name.removesuffix(".weight")
        mask = running.ticket.masks[layer] if layer in weights and name.endswith("weight") else None
        assert torch.equal(value, start[name] if mask is None else start[name] * mask), name
    expected = prune({name: end[f"{name}.weight"] for name in weights}, whole(weights), 0.5)
    assert all(torch.equal(running.ticket.masks[name], mask) for name, mask in expected.items())
    assert running.ticket.keep == pytest.approx(0.5, abs=0.01)
    assert [running.clock(step) for step in range(10)] == [0, 1, 2, 3, 4, 5] + (
        [5] * 4 if rewind == "fine_tuning" else [2, 3, 4, 5]
    )


def test_running_statistics_are_rewound_too():
    model = make("residual")
    optimizer = sgd(model)
    Iterative(keep_weights=0.5, prune_share=0.5).attach(model, optimizer, total_steps=8)
    steps(model, optimizer, 0, 4)
    batches = model.state_dict()[next(key for key in model.state_dict() if key.endswith("num_batches_tracked"))]
    assert batches == 4
    steps(model, optimizer, 4, 5)
    assert batches == 1


def test_evaluation_between_rounds_sees_the_trained_network():
    model = make("plain")
    optimizer = sgd(model)
    running = Iterative(keep_weights=0.5, prune_share=0.5).attach(model, optimizer, total_steps=8)
    steps(model, optimizer, 0, 4)
    model.eval()
    model(images(4))
    model.train()
    with torch.no_grad():
        model(images(4))  # statistics, estimated anew
    assert running.round == 0
    assert running.row() == {"round": 0, "density": 1.0, "round_ends": True}


def test_dense_in_the_bill_is_one_training():
    model = make("plain")
    optimizer = sgd(model)
    running = Iterative(keep_weights=0.5, prune_share=0.5).attach(model, optimizer, total_steps=8)
    steps(model, optimizer, 0, 8)
    bill = running.bill()
    assert bill.total.images.value == 8 * 16
    assert bill.dense.total.images.value == 4 * 16
    assert "MORE than dense" in str(bill)
    assert {"search", "draw", "train"} <= bill.phases.keys()
    assert bill.phases["search"].steps.value == bill.phases["train"].steps.value == 4


def test_what_is_left_dense_keeps_all_weights():
    model = make("plain")
    names = list(prunable(model))
    optimizer = sgd(model)
    method = Iterative(keep_weights=0.3, prune_share=0.5, leave_dense=("first", names[-1]))
    running = method.attach(model, optimizer, total_steps=9)
    steps(model, optimizer, 0, 9)
    assert list(running.ticket.masks) == names[1:-1]
    assert running.ticket.keep == pytest.approx(0.3, abs=0.01)
    assert prunable(model)[names[0]].count_nonzero() == prunable(model)[names[0]].numel()
    with pytest.raises(InputError, match="no layer 'nothing'"):
        Iterative(leave_dense=("nothing",)).attach(make("plain"), sgd(make("plain")), total_steps=99)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep_weights": 0}, "keep_weights"),
        ({"prune_share": 1.0}, "prune_share"),
        ({"rewind": "time"}, "rewind"),
        ({"head_share": 0.1}, "prune_scope 'layer'"),
        ({"prune_scope": "layer", "head_share": 2}, "head_share"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Iterative(**values)


def test_too_few_steps_and_late_points_are_refused():
    model = make("plain")
    with pytest.raises(InputError, match="4 trainings"):
        Iterative(keep_weights=0.512).attach(model, sgd(model), total_steps=3)
    with pytest.raises(InputError, match="rewind_to is 6it, but a training has 6 steps"):
        Iterative(rewind_to="6it").total_steps(6)


def test_two_tickets_at_a_time_are_refused_in_either_order():
    for first, second in ((True, False), (False, True)):
        model = make("plain")
        optimizer = sgd(model)
        attach = {
            True: lambda m=model, o=optimizer: Iterative().attach(m, o, total_steps=99),
            False: lambda m=model, o=optimizer: EarlyBird(deadline="4it").attach(
                m, o, example_inputs=images(2), steps_per_epoch=5
            ),
        }
        running = attach[first]()
        with pytest.raises(InputError, match="leave one of them out"):
            attach[second]()
        running.detach()
        attach[second]()


RECIPE = {
    "data": "digits", "model": "small_cnn", "method": "iterative", "keep_weights": 0.3, "prune_share": 0.5,
    "rewind_to": "1ep", "epochs": 4, "train_images": 512, "batch_size": 32, "exact": True, "threads": 1,
}  # fmt: skip


def test_a_run_of_rounds_end_to_end(tmp_path):
    result = train(Recipe.from_values(RECIPE), tmp_path / "imp", quiet=True)
    rows = read_rows(tmp_path / "imp" / "metrics.jsonl")
    ends = [row for row in rows if row["round_ends"]]
    assert [row["density"] for row in ends] == pytest.approx([1.0, 0.5, 0.3], abs=0.005)
    assert result.steps == (4 + 2 * 3) * 16 == ends[-1]["step"]
    assert result.epochs == 10
    assert ends[0]["lr"] == pytest.approx(ends[1]["lr"]) == pytest.approx(ends[2]["lr"])
    assert min(row["accuracy"] for row in ends) > 0.9
    final, _ = read_tensors(tmp_path / "imp" / "model.safetensors")
    ticket = Ticket.load(tmp_path / "imp" / "ticket.safetensors")
    assert ticket == Ticket.load(tmp_path / "imp" / "tickets" / "round-2.safetensors")
    start, _ = read_tensors(tmp_path / "imp" / "rewind.safetensors")
    assert start.keys() == final.keys()
    for name, mask in ticket.masks.items():
        assert not final[f"{name}.weight"][~mask].any()
        assert start[f"{name}.weight"].all()
    dense = result.bill.dense
    assert dense.total.steps.value == 64
    looks = [row for row in rows if row["round"] == 0]
    share = len(looks) / len(rows)  # a dense run evaluates as often as the first training, not as all rounds
    assert dense.phases["evaluate"].macs.value == pytest.approx(share * result.bill.phases["evaluate"].macs.value)
    assert (tmp_path / "imp" / "history.json").exists()


@pytest.mark.parametrize("stop_at", [5, 64, 120])
def test_stopped_and_resumed_in_any_round_the_files_are_the_same(tmp_path, stop_at):
    class Stop(Exception):
        pass

    def stop(kind, fields):
        if kind == "checkpoint" and fields["step"] >= stop_at:
            raise Stop

    recipe = Recipe.from_values({**RECIPE, "checkpoint_every": f"{stop_at}it", "evaluate_every": "2ep"})
    train(recipe, tmp_path / "whole", quiet=True)
    with pytest.raises(Stop):
        train(recipe, tmp_path / "stopped", quiet=True, on_event=stop)
    assert isinstance(resume(tmp_path / "stopped", quiet=True), Result)
    for name in ("model.safetensors", "ticket.safetensors", "rewind.safetensors", "tickets/round-1.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


def test_on_paper_all_rounds_are_paid_for():
    text = str(forecast(Recipe.from_values({**RECIPE, "rewind_to": "0it", "keep_weights": 0.125})))
    assert "x4.00 MORE" in text  # MACs: four trainings


def test_dense_in_the_bill_is_one_training_whatever_batches_are_left_out_of_the_rounds(tmp_path):
    short = {**RECIPE, "epochs": 2, "rewind_to": "0it", "keep_weights": 0.25}
    dense = train(Recipe.from_values({**short, "dense": True}), tmp_path / "dense", quiet=True).bill
    rounds = Recipe.from_values({**short, "method": "iterative,batch_dropping"})
    bill = train(rounds, tmp_path / "rounds", quiet=True).bill
    # evaluations of the later rounds are not those of a dense run either
    for phases in ("train", "evaluate"):
        assert bill.dense.phases[phases].images.value == dense.phases[phases].images.value
        assert bill.dense.phases[phases].macs.value == dense.phases[phases].macs.value


def test_all_rounds_are_evaluated_by_the_same_views(tmp_path):
    recipe = {**RECIPE, "epochs": 2, "keep_weights": 0.5, "test_time": "mirror"}
    train(Recipe.from_values(recipe), tmp_path / "run", quiet=True)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["test_time"] for row in rows if row["round_ends"]] == ["mirror", "mirror"]
    assert [row["test_time"] for row in rows if not row["round_ends"]] == ["none"]


def test_the_heads_share_is_not_that_of_the_last_layer_that_is_pruned():
    model = make("plain")
    names = list(prunable(model))
    optimizer = sgd(model)
    method = Iterative(keep_weights=0.5, prune_share=0.5, prune_scope="layer", head_share=0.1, leave_dense=("last",))
    running = method.attach(model, optimizer, total_steps=4)
    steps(model, optimizer, 0, 3)
    assert list(running.ticket.widths) == names[:-1]
    for kept, total in running.ticket.widths.values():
        assert kept == pytest.approx(total / 2, abs=1)


def test_methods_that_go_by_the_steps_of_the_run_are_refused_beside_rounds():
    beside = {**RECIPE, "method": "iterative,progressive_resizing"}
    with pytest.raises(InputError, match="progressive_resizing changes with the steps of the run, and iterative"):
        Recipe.from_values(beside)
    Recipe.from_values({**beside, "keep_weights": 1.0})  # one training
    Recipe.from_values({**beside, "dense": True})
    Recipe.from_values({**RECIPE, "method": "iterative,batch_dropping"})


def test_a_layer_that_has_all_but_gone_is_named_once():
    model = make("plain")
    last = list(prunable(model))[-1]
    with torch.no_grad():
        prunable(model)[last].mul_(1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    Iterative(keep_weights=0.25, prune_share=0.5).attach(model, optimizer, total_steps=6)
    with pytest.warns(UserWarning, match=f"round 1 leaves 1 of .* weights of layer '{last}'") as told:
        steps(model, optimizer, 0, 6)
    assert sum("leaves" in str(one.message) for one in told) == 1
