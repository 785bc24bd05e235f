"""Scores at initialisation, against the methods' definitions worked out by hand on tiny networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import earlybird as eb
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.models import MODELS, build
from earlybird.tickets.at_init import AtInit, collapsed, grasp, pick_samples, random, snip, synflow
from earlybird.tickets.coupling import find_groups
from earlybird.tickets.draw import keep_for_macs
from tests.tickets.topologies import TOPOLOGIES, images, make


def linear_net(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in pairwise(sizes)))


def labels(count: int) -> Tensor:
    return torch.arange(count) % 5


SCORES: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "snip": lambda model: snip(model, images(), labels(4)),
    "grasp": lambda model: grasp(model, images(), labels(4)),
    "synflow": lambda model: synflow(model, images(), keep=0.4, rounds=3),
    "random": lambda model: random(model, torch.Generator().manual_seed(0)),
}


def test_snip_is_gradient_times_weight_summed_over_the_filter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    plain = copy.deepcopy(model).train()
    functional.cross_entropy(plain(images()), labels(4)).backward()
    by_hand = (plain[0].weight.grad * plain[0].weight).abs().sum((1, 2, 3))
    found = snip(model.eval(), images(), labels(4))  # scored in train mode, whatever mode the model is in
    assert list(found) == ["0"]
    torch.testing.assert_close(found["0"], by_hand.detach())


def test_grasp_is_the_weight_times_an_explicit_hessian_times_the_gradient() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(3, 4), torch.randn(5, 3)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 5, bias=False))
    model[0].weight.data, model[2].weight.data = first, second
    x, y = torch.randn(7, 4), labels(7)

    def loss(flat: Tensor) -> Tensor:
        one, two = flat[:12].view(3, 4), flat[12:].view(5, 3)
        return functional.cross_entropy(torch.tanh(x @ one.T) @ two.T / 200, y)

    flat = torch.cat([first.flatten(), second.flatten()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    gradient = torch.autograd.functional.jacobian(loss, flat)
    by_hand = (flat * (hessian @ gradient))[:12].view(3, 4).sum(1)
    torch.testing.assert_close(grasp(model, x, y)["0"], by_hand, rtol=1e-3, atol=1e-9)


def test_what_grasp_would_remove_first_is_what_gradient_flow_misses_least() -> None:
    """To first order, the flow g'g without a channel is the flow with it, less twice the channel's score."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 5, bias=False))
    x, y = torch.randn(9, 6), labels(9)

    def flow(scaled: Tensor) -> Tensor:
        weights = [model[0].weight * scaled[:, None], model[2].weight]
        logits = torch.tanh(x @ weights[0].T) @ weights[1].T / 200
        gradients = torch.autograd.grad(functional.cross_entropy(logits, y), weights, create_graph=True)
        return sum(gradient.square().sum() for gradient in gradients)  # type: ignore[return-value]

    slope = torch.autograd.functional.jacobian(flow, torch.ones(8))
    torch.testing.assert_close(grasp(model, x, y)["0"], slope / 2, rtol=1e-3, atol=1e-9)


def test_synflow_on_a_linear_network_is_the_closed_form() -> None:
    model = linear_net(4, 3, 6, 2)
    first, second, third = (layer.weight.detach().double().abs() for layer in model)
    into_first = first.sum(1)  # what flows into each of its units from an input of ones
    out_of_second = third.sum(0)
    flow = {"0": into_first * (out_of_second @ second), "1": (second @ into_first) * out_of_second}
    found = synflow(model, torch.zeros(1, 4), keep=1.0, rounds=1)
    highest = max(float(value.max()) for value in flow.values())
    for name, value in flow.items():
        torch.testing.assert_close(found[name] - 2, (value / highest).float(), rtol=1e-5, atol=1e-5)
    # flow is conserved: what all units of one layer carry, all units of the other carry
    assert float(flow["0"].sum()) == pytest.approx(float(flow["1"].sum()))


def test_synflow_scores_anew_in_each_round() -> None:
    """Unit 0 feeds two weak units of the next layer (5 each); once they are gone, it is worth nothing any more."""
    model = linear_net(1, 3, 4, 1)
    model[0].weight.data = torch.ones(3, 1)
    model[1].weight.data = torch.tensor([[5.0, 0.0, 0.0], [5.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.1, 8.0]])
    model[2].weight.data = torch.ones(1, 4)
    inputs = torch.zeros(1, 1)

    def ticket(rounds: int) -> dict[str, list[bool]]:
        scores = synflow(model, inputs, keep=4 / 7, rounds=rounds)
        drawn = eb.draw(model, 4 / 7, scores=scores, example_inputs=inputs)
        return {name: mask.tolist() for name, mask in drawn.masks.items()}

    assert ticket(1) == {"0": [True, True, False], "1": [False, False, True, True]}  # 10, 9.1 and 8; 5, 5, 9 and 8.1
    assert ticket(12) == {"0": [False, True, True], "1": [False, False, True, True]}


@pytest.mark.parametrize("factor", [1e6, 1e-7])
def test_synflow_through_many_layers_leaves_the_range_of_float32(factor: float) -> None:
    model = linear_net(*[8] * 9)
    within = synflow(model, torch.zeros(1, 8), keep=0.5, rounds=4)
    for layer in model:
        layer.weight.data *= factor
    outside = synflow(model, torch.zeros(1, 8), keep=0.5, rounds=4)
    for name, scores in within.items():  # a factor common to all is no difference
        torch.testing.assert_close(outside[name], scores, rtol=1e-4, atol=1e-4)


def test_synflow_drawn_at_its_own_keep_is_the_last_rounds_ticket_and_nested_below() -> None:
    model = build("small_cnn", classes=5, in_channels=3, image_size=8, width=0.25)
    scores = synflow(model, images(1), keep=0.3, rounds=20)
    tickets = [
        eb.draw(model, keep, scores=scores, example_inputs=images(1), coupled="group") for keep in (0.2, 0.3, 0.5, 0.8)
    ]
    for small, large in pairwise(tickets):
        assert all(bool((large.masks[name] | ~mask).all()) for name, mask in small.masks.items())
    last = torch.cat([score >= 21 for score in scores.values()])
    assert torch.equal(last, torch.cat(list(tickets[1].masks.values())))


def test_one_round_of_synflow_empties_a_layer_and_many_do_not() -> None:
    """Layer collapse: in one round the wide layer, whose channels carry least each, goes first."""
    model = linear_net(8, 8, 64, 8, 4)
    inputs = torch.zeros(1, 8)
    once = eb.draw(model, 0.1, scores=synflow(model, inputs, keep=0.1, rounds=1), example_inputs=inputs)
    often = eb.draw(model, 0.1, scores=synflow(model, inputs, keep=0.1), example_inputs=inputs)
    assert collapsed(once) == ["1"]
    assert collapsed(often) == []
    assert all(kept >= 1 for kept, _ in once.widths.values())


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_nothing_is_changed(name: str, score: str) -> None:
    model = make(name)
    model[0].weight.requires_grad_(False)  # a frozen layer stays whole, and frozen
    model.eval()
    model[-1].weight.grad = torch.ones_like(model[-1].weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    found = SCORES[score](model)
    assert "0" not in found
    assert all(bool(torch.isfinite(value).all()) for value in found.values())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(module.training for module in model.modules())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["0.weight"]
    assert torch.equal(model[-1].weight.grad, torch.ones_like(model[-1].weight))
    assert all(parameter.grad is None for parameter in list(model.parameters())[:-2])


@pytest.mark.parametrize("coupled", ["whole", "group"])
@pytest.mark.parametrize("name", ["small_cnn", "vgg11", "resnet20", "preact_resnet29", "resnet18", "mobilenet_v2"])
def test_every_family_of_the_zoo_is_cut_to_the_share_that_was_asked_for(name: str, coupled: str) -> None:
    assert name in MODELS
    model = build(name, classes=5, in_channels=3, image_size=16, width=0.25)
    x = torch.randn(6, 3, 16, 16)
    dense = count(model, x).forward_macs
    groups = find_groups(model, x[:1])
    scores = snip(model, x, labels(6))
    keep = keep_for_macs(scores, groups, 0.6, coupled=coupled)
    ticket = eb.draw(model, keep, scores=scores, example_inputs=x[:1], coupled=coupled)
    change = eb.shrink(model, ticket, x[:1])
    assert not change.silenced
    assert count(model, x).forward_macs / dense == pytest.approx(0.6, rel=0.05)


def test_samples_are_as_many_of_each_class() -> None:
    classes = torch.tensor([0, 1, 1, 2, 0, 2, 2, 1, 0, 0])
    found = pick_samples(classes, 2, torch.Generator().manual_seed(0))
    assert classes[found].bincount().tolist() == [2, 2, 2]
    assert len(found.unique()) == 6
    assert not torch.equal(found, pick_samples(classes, 2, torch.Generator().manual_seed(1)))
    with pytest.raises(InputError, match="class 1 has 3 samples"):
        pick_samples(classes, 4, torch.Generator())


def test_what_cannot_be_scored_is_said() -> None:
    model = linear_net(2, 3, 2)
    with pytest.raises(InputError, match="keep is 0"):
        synflow(model, torch.zeros(1, 2), keep=0)
    with pytest.raises(InputError, match="rounds is 0"):
        synflow(model, torch.zeros(1, 2), keep=0.5, rounds=0)
    with pytest.raises(InputError, match="no hidden"):
        snip(nn.Linear(2, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))  # type: ignore[no-any-return]


def test_layers_that_share_a_weight_share_its_gradient() -> None:
    torch.manual_seed(0)
    model, x, y = Tied(), torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    functional.cross_entropy(model(x), y).backward()
    assert model.first.weight.grad is not None
    expected = (model.first.weight.grad * model.first.weight).abs().sum(1).detach()
    model.zero_grad()
    scores = snip(model, x, y)
    torch.testing.assert_close(scores["first"], expected)
    torch.testing.assert_close(scores["second"], expected)


def test_a_weight_that_is_computed_is_refused_by_name_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    for score in (snip, grasp):
        with pytest.raises(InputError, match="layer '0' is computed by a parametrisation"):
            score(model, torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Centred(nn.Module):
    """Takes the mean over pixels away, as normalisation by the sample's own statistics does."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


def test_a_network_without_synaptic_flow_is_refused() -> None:
    """Nothing of constant ones is left without their mean: all channels would tie."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), Centred(), nn.Flatten(), nn.Linear(64, 2, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)  # so that the differences are 0 to the bit
    with pytest.raises(InputError, match="no synaptic flow"):
        synflow(model, torch.zeros(1, 1, 4, 4), keep=0.5)


def test_what_synflow_has_removed_stays_removed_where_groups_are_balanced() -> None:
    """Scores tell the round in which a channel went: of a nested sequence of tickets, whatever the rounding."""
    model = make("grouped")
    scores = synflow(model, images(1), keep=0.3, rounds=10)
    rounds = torch.cat([score.floor() for score in scores.values()])
    assert rounds.min() >= 1
    assert rounds.max() == 11
    smaller = synflow(model, images(1), keep=0.3, rounds=10, coupled="group")
    assert smaller.keys() == scores.keys()


@pytest.mark.parametrize("units", ["weight", "channel"])
def test_random_tickets_do_not_follow_the_numbers_that_the_weights_were_drawn_from(units: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 5))
    first = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = AtInit(init_score="random", init_units=units, init_keep=0.2, init_round_to=1)
    ticket = method.attach(model, optimizer, example_inputs=torch.zeros(2, 300), seed=3).ticket
    assert ticket is not None
    kept = first[ticket.masks["0"]]
    assert abs(float(kept.mean())) < 5 * float(first.std()) / kept.numel() ** 0.5
