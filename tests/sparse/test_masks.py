"""Masks over single weights: what a ticket removes is zero after every step, and costs hardware nothing."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from earlybird.arithmetic.add import AddLinear
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.ledger import Ledger
from earlybird.sparse.masks import Masks, non_zeros, prunable, ticket_of
from tests.tickets.topologies import images, make


def half(model: nn.Module, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return ticket_of({n: torch.rand(w.shape, generator=generator) < 0.5 for n, w in prunable(model).items()})


def steps(model, optimizer, count=3, clip=None):
    for step in range(count):
        x = images(16, seed=step)
        functional.cross_entropy(model(x), torch.arange(16) % 4).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def test_prunable_are_convolutions_and_linear_layers_but_no_norms_and_no_biases():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5), nn.Linear(5, 2))
    assert list(prunable(model)) == ["0", "3", "4"]
    assert list(prunable(model, leave=("first",))) == ["3", "4"]
    assert list(prunable(model, leave=("first", "last"))) == ["3"]
    assert prunable(model)["3"] is model[3].weight


def test_a_weight_that_two_layers_share_is_there_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(prunable(model)) == ["0"]
    masks = Masks(model, torch.optim.SGD(model.parameters(), lr=0.1), half(model))
    masks.let_gradients_through(True)
    cost = count(model, torch.zeros(1, 4))  # both multiply with its zeros
    assert cost.densities["0"] == cost.densities["1"] == masks.masks["0"].float().mean()
    assert cost.gradient_densities == {"0": 1.0, "1": 1.0}
    masks.remove()
    assert not count(model, torch.zeros(1, 4)).densities


def test_layers_that_do_not_multiply_are_refused():
    with pytest.raises(InputError, match="does not multiply"):
        prunable(nn.Sequential(nn.Linear(3, 3), AddLinear(3, 3)))
    with pytest.raises(InputError, match="no weights to prune"):
        prunable(nn.Sequential(nn.BatchNorm2d(3)))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_removed_weights_and_their_state_are_zero_after_every_step_and_others_move(kind):
    model = make("residual")
    optimizer = OPTIMIZERS[kind](model.parameters())
    steps(model, optimizer)  # momentum is there before the masks come
    ticket = half(model)
    masks = Masks(model, optimizer, ticket)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        steps(model, optimizer, 1)
        for name, weight in masks.weights.items():
            mask = ticket.masks[name]
            assert not weight[~mask].any()
            assert (weight[mask] != before[f"{name}.weight"][mask]).float().mean() > 0.5  # dead units do not
            for value in optimizer.state[weight].values():
                if value.shape == weight.shape:
                    assert not value[~mask].any()


def test_masked_training_is_that_of_the_masked_network_written_by_hand():
    model = make("plain")
    by_hand = copy.deepcopy(model)
    ticket = half(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    Masks(model, optimizer, ticket)
    steps(model, optimizer, 5, clip=0.5)
    other = OPTIMIZERS["sgd"](by_hand.parameters())
    own = prunable(by_hand)
    for step in range(5):
        weights = {f"{name}.weight": own[name] * mask for name, mask in ticket.masks.items()}
        logits = torch.func.functional_call(by_hand, weights, images(16, seed=step))
        functional.cross_entropy(logits, torch.arange(16) % 4).backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        other.step()
        other.zero_grad()
    for name, weight in prunable(model).items():
        mask = ticket.masks[name]
        torch.testing.assert_close(weight[mask], own[name][mask], rtol=1e-5, atol=1e-6)


def test_a_mask_of_ones_is_plain_pytorch_to_the_bit():
    model = make("residual")
    plain = copy.deepcopy(model)
    optimizer, other = OPTIMIZERS["sgd"](model.parameters()), OPTIMIZERS["sgd"](plain.parameters())
    Masks(model, optimizer, ticket_of({n: torch.ones_like(w, dtype=torch.bool) for n, w in prunable(model).items()}))
    steps(model, optimizer)
    steps(plain, other)
    for (key, one), two in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, two), key


def test_zeros_are_left_out_of_bit_macs_and_energy_but_not_of_macs():
    model = make("plain")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    ledger = Ledger()
    ledger.watch(model, optimizer, images(2))
    ledger.enter("train")
    masks = Masks(model, optimizer, ledger=ledger)
    steps(model, optimizer, 1)
    whole = ledger.bill().total
    empty = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in prunable(model).items()}
    for mask in empty.values():
        mask.view(-1)[: mask.numel() // 2] = True
    masks.set(ticket_of(empty))
    steps(model, optimizer, 1)
    both = ledger.bill().total
    assert both.macs.value == 2 * whole.macs.value
    assert both.bit_macs.value == pytest.approx(1.5 * whole.bit_macs.value, rel=0.02)
    assert both.modelled_joules.low < 2 * whole.modelled_joules.low
    masks.remove()
    ledger.reread_arithmetic()
    steps(model, optimizer, 1)
    assert ledger.bill().total.bit_macs.value == pytest.approx(2.5 * whole.bit_macs.value, rel=0.02)


def test_moved_masks_zero_what_they_remove_and_let_gradients_of_the_rest_through():
    model = make("plain")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masks = Masks(model, optimizer, half(model))
    steps(model, optimizer)
    name, weight = list(masks.weights.items())[-1]
    turned = ~masks.masks[name]
    masks.move({name: turned})
    assert not weight.any()  # what has grown begins at zero
    masks.let_gradients_through(True)
    functional.cross_entropy(model(images(16)), torch.arange(16) % 4).backward()
    assert weight.grad[~turned].any()
    optimizer.step()
    assert weight[turned].any()
    assert not weight[~turned].any()


def test_a_ticket_of_another_model_says_which_entries_do_not_fit():
    model, other = make("plain"), make("residual")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(InputError, match=r"not in the model.*more of"):
        Masks(model, optimizer, half(other))
    wide = {name: torch.ones(3, *mask.shape[1:], dtype=torch.bool) for name, mask in half(model).masks.items()}
    with pytest.raises(InputError, match="has shape"):
        Masks(model, optimizer, ticket_of(wide))
    before = copy.deepcopy(model.state_dict())
    steps(model, optimizer, 1)  # nothing hangs on the model that would mask it
    assert all((model.state_dict()[key] != before[key]).any() for key in before if key.endswith("weight"))


def test_non_zeros_counts_biases_and_norms():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        model[0].bias.fill_(1)
    assert non_zeros(model) == (1 + 2 + 2, 4 + 2 + 4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**16))
def test_a_ticket_over_weights_survives_its_file_at_a_bit_a_weight(tmp_path_factory, shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    ticket = ticket_of({"layer": mask}, method="test")
    path = ticket.save(tmp_path_factory.mktemp("ticket") / "t.safetensors")
    found = type(ticket).load(path)
    assert found == ticket
    assert hash(found) == hash(ticket)
    assert found.kinds["layer"] == "weight"
    assert found.keep == pytest.approx(mask.float().mean().item())
    from earlybird.files import read_tensors

    assert read_tensors(path)[0]["layer"].numel() == -(-mask.numel() // 8)


def test_the_share_of_a_layer_is_counted_in_half_precision_too():
    model = nn.Sequential(nn.Linear(1000, 10), nn.Linear(10, 2)).to(torch.bfloat16)
    mask = torch.zeros(10, 1000, dtype=torch.bool)
    mask.view(-1)[:1001] = True
    Masks(model, torch.optim.SGD(model.parameters(), lr=0.1), ticket_of({"0": mask}))
    assert model[0].weight_density == 0.1001
