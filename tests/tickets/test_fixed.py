"""Given tickets: trained from their own weights, from others, and as the controls they have to beat."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import earlybird as eb
from earlybird.errors import InputError
from earlybird.files import read_rows, read_tensors
from earlybird.forecast import forecast
from earlybird.models import build
from earlybird.sparse.masks import prunable, ticket_of
from earlybird.start import load_start, read_start
from earlybird.tickets.fixed import FixedTicket, control_of
from earlybird.train.recipe import Recipe
from earlybird.train.run import resume, train
from tests.tickets.test_early_bird import sgd
from tests.tickets.topologies import images, make

DIGITS = {"data": "digits", "train_images": 256, "batch_size": 64, "epochs": 2, "exact": True, "threads": 1}


def weights_ticket(model, share=0.3):
    generator = torch.Generator().manual_seed(1)
    return ticket_of({n: torch.rand(w.shape, generator=generator) < share for n, w in prunable(model).items()})


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.2, 0.8))
def test_controls_keep_as_many(seed, share):
    model = make("plain")
    ticket = weights_ticket(model, share)
    shuffled = control_of(ticket, model, "shuffled", seed)
    assert shuffled.widths == ticket.widths
    assert shuffled != ticket
    assert control_of(ticket, model, "shuffled", seed) == shuffled
    random = control_of(ticket, model, "random", seed)
    kept = sum(kept for kept, _ in ticket.widths.values())
    assert abs(sum(kept for kept, _ in random.widths.values()) - kept) <= len(ticket.masks)
    for name, (found, total) in random.widths.items():
        assert abs(found - ticket.keep * total) <= 1, name
    reverse = control_of(ticket, model, "reversed", seed)
    assert all(torch.equal(reverse.masks[name], ~mask) for name, mask in ticket.masks.items())


def test_channels_are_shuffled_within_their_layers():
    model = make("residual")
    ticket = eb.draw(model, 0.5, score="magnitude", example_inputs=images(2), coupled="group")
    shuffled = control_of(ticket, model, "shuffled", 0, images(2))
    assert shuffled.widths == ticket.widths
    assert shuffled != ticket
    with pytest.raises(InputError, match="'shuffled'"):
        control_of(ticket, model, "random", 0, images(2))


def test_a_layer_that_is_kept_whole_has_no_reverse():
    model = make("plain")
    ticket = ticket_of({name: torch.ones_like(w, dtype=torch.bool) for name, w in prunable(model).items()})
    with pytest.raises(InputError, match="keeps all of layer"):
        control_of(ticket, model, "reversed")


def test_a_run_begins_from_the_weights_it_is_given(tmp_path):
    dense = {**DIGITS, "dense": True, "lr": 1e-9, "weight_decay": 0.0, "epochs": 1}
    train(Recipe.from_values(dense), tmp_path / "first", quiet=True)
    other = Recipe.from_values({**dense, "seed": 3, "start": str(tmp_path / "first")})
    train(other, tmp_path / "second", quiet=True)
    one, two, new = (
        read_start(tmp_path / "first"),
        read_start(tmp_path / "second" / "model.safetensors"),
        read_start(train(other.replace(start=None), tmp_path / "third", quiet=True).folder),
    )
    for name in (name for name in one if name.endswith("weight") and one[name].ndim > 1):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)
        assert (one[name] - new[name]).abs().max() > 1e-3
    with pytest.raises(InputError, match="no weights to begin from"):
        read_start(tmp_path)


def test_reinitialised_it_begins_from_other_weights_of_the_same_kind(tmp_path):
    model, other = make("plain"), make("plain", seed=7)
    path = weights_ticket(model).save(tmp_path / "t.safetensors")
    method = FixedTicket(ticket=str(path), fixed_weights="reinitialise")
    method.attach(model, sgd(model), fresh=lambda: copy.deepcopy(other))
    for name, weight in prunable(model).items():
        mask = eb.Ticket.load(path).masks[name]
        assert torch.equal(weight, other.get_submodule(name).weight * mask)
    with pytest.raises(InputError, match="pass fresh"):
        FixedTicket(fixed_weights="reinitialise").attach(other, sgd(other))


def test_a_ticket_over_channels_is_cut_out_before_the_first_step(tmp_path):
    model = make("residual")
    ticket = eb.draw(model, 0.5, score="magnitude", example_inputs=images(2), coupled="group")
    by_hand = copy.deepcopy(model)
    eb.shrink(by_hand, ticket, images(2))
    running = FixedTicket(ticket=str(ticket.save(tmp_path / "t.safetensors"))).attach(
        model, sgd(model), example_inputs=images(2)
    )
    assert running.change is not None
    for one, two in zip(model.state_dict().values(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    saved = running.state_dict()
    again = make("residual")
    second = FixedTicket(ticket="gone").attach(again, sgd(again), example_inputs=images(2), resumed=True)
    second.load_state_dict(saved)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    model = make("plain")
    before = copy.deepcopy(model.state_dict())
    start = make("residual").state_dict()
    with pytest.raises(InputError, match=r"the (start|model) has no .* more of"):
        load_start(model, start)
    last = list(prunable(model))[-1]
    other = {
        name: torch.zeros(9, *value.shape[1:]) if name.startswith(f"{last}.") else value
        for name, value in before.items()
    }
    with pytest.raises(InputError, match="fresh_head"):
        load_start(model, other)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    load_start(model, {name: value + 1 for name, value in other.items()}, fresh_head=True)
    for name, value in model.state_dict().items():
        own = name.startswith(f"{last}.")
        assert torch.equal(value, before[name] if own else before[name] + 1), name
    model.load_state_dict(before)
    nothing = ticket_of({name: torch.zeros_like(w, dtype=torch.bool) for name, w in prunable(model).items()})
    path = nothing.save(tmp_path / "empty.safetensors")
    with pytest.raises(InputError, match="no signal passes"):
        FixedTicket(ticket=str(path)).attach(model, sgd(model))
    assert not model._forward_pre_hooks
    with pytest.raises(InputError, match="no file"):
        FixedTicket(ticket=str(tmp_path / "absent")).attach(model, sgd(model))
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="has no ticket"):
        FixedTicket(ticket=str(tmp_path / "run")).attach(model, sgd(model))


def test_a_run_of_rounds_is_trained_once_more_by_its_files_and_resumed_without_them(tmp_path):
    imp = {**DIGITS, "method": "iterative", "keep_weights": 0.5, "prune_share": 0.5, "rewind_to": "2it"}
    train(Recipe.from_values(imp), tmp_path / "imp", quiet=True)
    again = {**DIGITS, "method": "fixed_ticket", "ticket": str(tmp_path / "imp"), "start": str(tmp_path / "imp")}

    class Stop(Exception):
        pass

    def stop(kind, fields):
        if kind == "checkpoint":
            raise Stop

    recipe = Recipe.from_values({**again, "checkpoint_every": "3it"})
    train(recipe, tmp_path / "whole", quiet=True)
    with pytest.raises(Stop):
        train(recipe, tmp_path / "stopped", quiet=True, on_event=stop)
    (tmp_path / "imp" / "ticket.safetensors").unlink()
    resume(tmp_path / "stopped", quiet=True)
    one, two = (read_tensors(tmp_path / name / "model.safetensors")[0] for name in ("whole", "stopped"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    ticket = eb.Ticket.load(tmp_path / "whole" / "ticket.safetensors")
    assert all(not one[f"{name}.weight"][~mask].any() for name, mask in ticket.masks.items())


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow", "random"])
@pytest.mark.parametrize("units", ["channel", "weight"])
def test_tickets_at_initialisation_train_end_to_end(tmp_path, score, units):
    own = {"method": "at_init", "init_score": score, "init_units": units, "init_rounds": 5, "init_round_to": 1}
    result = train(Recipe.from_values({**DIGITS, **own}), tmp_path / "run", quiet=True)
    ticket = eb.Ticket.load(tmp_path / "run" / "ticket.safetensors")
    assert ticket.keep == pytest.approx(0.5, abs=0.02)
    assert result.drawn_at == 0
    assert result.bill.total.images.value > 512
    dense = result.bill.dense
    if units == "channel":
        assert result.parameters < 300_000
        assert result.bill.phases["train"].macs.value < 0.5 * dense.total.macs.value
    else:
        final = read_tensors(tmp_path / "run" / "model.safetensors")[0]
        assert all(not final[f"{name}.weight"][~mask].any() for name, mask in ticket.masks.items())


def test_synflow_over_weights_leaves_a_path_at_high_sparsity():
    from earlybird.tickets.at_init import synflow_masks

    model = make("plain")
    masks = synflow_masks(model, images(2), keep=0.02, rounds=100)
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    assert all(kept.values())
    assert sum(kept.values()) == pytest.approx(0.02 * sum(m.numel() for m in masks.values()), abs=len(masks))
    one_round = synflow_masks(model, images(2), keep=0.02, rounds=1)
    assert min(int(mask.sum()) for mask in masks.values()) >= min(int(mask.sum()) for mask in one_round.values())


def test_weights_are_ranked_by_snip_as_defined():
    from torch.nn import functional

    from earlybird.tickets.at_init import snip

    model = make("plain")
    plain = copy.deepcopy(model).train()
    labels = torch.arange(8) % 4
    functional.cross_entropy(plain(images(8)), labels).backward()
    found = snip(model, images(8), labels, units="weight")
    assert list(found) == list(prunable(model))
    for name, weight in prunable(plain).items():
        torch.testing.assert_close(found[name], (weight * weight.grad).abs().detach())


def test_weights_of_a_step_go_on_from_that_step_of_the_schedule(tmp_path):
    imp = {**DIGITS, "method": "iterative", "keep_weights": 1.0, "epochs": 3, "schedule": "cosine", "lr": 0.02}
    train(Recipe.from_values({**imp, "epochs": 1}), tmp_path / "first", quiet=True)
    rest = {**DIGITS, "dense": True, "epochs": 3, "schedule": "cosine", "lr": 0.02, "start": str(tmp_path / "first")}
    result = train(Recipe.from_values({**rest, "start_at": "1ep"}), tmp_path / "rest", quiet=True)
    whole = train(Recipe.from_values({**rest, "start": None}), tmp_path / "whole", quiet=True)
    rows, all_rows = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("rest", "whole"))
    assert [row["lr"] for row in rows] == [row["lr"] for row in all_rows[1:]]
    assert result.steps == 8 < whole.steps
    assert result.epochs == 2
    with pytest.raises(InputError, match="start_at is 3ep"):
        train(Recipe.from_values({**rest, "start_at": "3ep"}), tmp_path / "late", quiet=True)
    with pytest.raises(InputError, match="name them with start"):
        Recipe.from_values({"start_at": "1ep"})


def test_on_paper_a_ticket_costs_what_its_network_costs(tmp_path):
    own = {**DIGITS, "model": "small_cnn"}
    model = build("small_cnn", classes=10, in_channels=1, image_size=8)
    given = {**own, "method": "fixed_ticket"}
    dense = forecast(Recipe.from_values({**own, "dense": True})).bill.total
    weights = weights_ticket(model).save(tmp_path / "weights")
    masked = forecast(Recipe.from_values({**given, "ticket": str(weights)})).bill.total
    assert masked.macs.value == dense.macs.value
    assert masked.bit_macs.value < 0.5 * dense.bit_macs.value
    inputs = torch.zeros(2, 1, 8, 8)
    channels = eb.draw(model, 0.5, score="magnitude", example_inputs=inputs, coupled="group").save(
        tmp_path / "channels"
    )
    cut = forecast(Recipe.from_values({**given, "ticket": str(channels)})).bill.total
    assert cut.macs.value < 0.6 * dense.macs.value
    other = weights_ticket(make("plain")).save(tmp_path / "other")
    with pytest.raises(InputError, match="the ticket"):
        forecast(Recipe.from_values({**given, "ticket": str(other)}))
