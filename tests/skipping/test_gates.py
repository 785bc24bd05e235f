import gc

import pytest
import torch
from torch import nn

from earlybird.blocks import Block
from earlybird.precision.fractional import FractionalPrecision
from earlybird.skipping.gates import LearnedGate, Multiplier, Price, RecurrentGate, level_for
from earlybird.skipping.layers import LayerSkipping
from tests.tickets.test_early_bird import sgd, train
from tests.tickets.topologies import images, make


def gate(channels=(3, 5), widths=(4,), seed=0):
    blocks = [Block(str(number), nn.Identity(), True, size, (), "", "") for number, size in enumerate(channels)]
    return LearnedGate(blocks, widths, 1, rate=0.01, seed=seed, device=torch.device("cpu"))


def test_scores_by_hand():
    """One channel, one hidden unit: sigmoid and tanh of the LSTM written out, over two blocks."""
    one = gate((1, 1), (1,))
    with torch.no_grad():
        for parameter in one.network.parameters():
            parameter.fill_(0.5)
        one.network.head.bias.fill_(0.25)
    x = torch.tensor([[[[1.0, 3.0]]], [[[-2.0, 0.0]]]])  # means 2 and -1
    hidden, cell = torch.zeros(2), torch.zeros(2)
    for index in range(2):
        f = 0.5 * torch.tensor([2.0, -1.0]) + 0.5
        gates = 0.5 * f + 0.5 + 0.5 * hidden + 0.5  # input, forget, cell and output gate alike
        cell = torch.sigmoid(gates) * cell + torch.sigmoid(gates) * torch.tanh(gates)
        hidden = torch.sigmoid(gates) * torch.tanh(cell)
        torch.testing.assert_close(one.scores(index, x)[:, 0], 0.5 * hidden + 0.25)
    first = one.scores(0, x)  # a new pass begins without memory
    torch.testing.assert_close(first, one.scores(0, x))


def test_maps_have_their_channels_second_and_tokens_last():
    one = gate((3,), seed=1)
    maps = torch.rand(2, 3, 4, 5)
    pooled = one.scores(0, maps)
    torch.testing.assert_close(one.scores(0, maps.flatten(2).transpose(1, 2)), pooled)
    torch.testing.assert_close(one.scores(0, maps.mean((2, 3))), pooled)


def test_the_gradient_ends_at_the_features_unless_it_is_asked_on():
    one = gate()
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    one.scores(0, x).sum().backward()
    assert x.grad is None
    one.scores(0, x, into_features=True).sum().backward()
    assert x.grad is not None


def test_multiply_accumulates_are_those_of_the_matrices():
    network = RecurrentGate((3, 7), (32, 16), 5)
    shared = 4 * 16 * (16 + 16) + 16 * 5
    assert [network.macs(index) for index in range(2)] == [3 * 32 + 32 * 16 + shared, 7 * 32 + 32 * 16 + shared]
    assert any(isinstance(part, nn.ReLU) for part in network.projections[0])


def test_autocast_does_not_reach_into_the_gate():
    one = gate()
    x = torch.rand(2, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = one.scores(0, x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, one.scores(0, x))


def test_first_weights_come_from_the_seed_and_leave_the_global_generator_alone():
    random = torch.get_rng_state()
    one, same, other = gate(seed=1), gate(seed=1), gate(seed=2)
    assert torch.equal(random, torch.get_rng_state())
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(one.scores(0, x), same.scores(0, x))
    assert not torch.equal(one.scores(0, x), other.scores(0, x))


def test_a_gate_goes_on_with_the_channels_that_stay_and_its_state_goes_through_a_dict():
    one = gate()
    x = torch.rand(6, 3, 2, 2)
    one.scores(0, x).sum().backward()
    one.step()
    loss = one.scores(0, x).sum()
    loss.backward()
    kept, stayed = torch.tensor([0, 2]), torch.tensor([True, False, True])
    gradient = one.network.projections[0][0].weight.grad.clone()
    one.follow(0, stayed)
    one.follow(0, stayed)  # it has: nothing is left to be done
    assert torch.equal(one.network.projections[0][0].weight.grad, gradient[:, kept])
    assert (one.channels(0), one.channels(1)) == (2, 5)
    held = [id(parameter) for group in one._adam.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, one.network.parameters()))
    one.step()
    other = gate(seed=9)
    other.load_state_dict(one.state_dict())
    assert other.channels(0) == 2
    for current in (one, other):
        current.scores(0, x[:, kept]).sum().backward()
        current.step()
    assert torch.equal(one.scores(0, x[:, kept]), other.scores(0, x[:, kept]))


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 4.0])
def test_a_price_ends_where_the_target_is_met_however_steep_the_share_is(sharpness):
    price = Price()
    for _ in range(60):
        share = float(torch.sigmoid(torch.tensor(sharpness * (2.0 - price.value))))
        price.move(share - 0.3, sharpness * share * (1 - share))
    assert share == pytest.approx(0.3, abs=1e-3)
    assert price.value == pytest.approx(2.0 - float(torch.logit(torch.tensor(0.3))) / sharpness, abs=1e-2)


def test_a_price_finds_its_way_back_from_where_all_gates_are_decided():
    price = Price()
    price.value = -30.0
    for _ in range(60):
        share = float(torch.sigmoid(torch.tensor(-price.value)))
        price.move(share - 0.5, share * (1 - share))
    assert share == pytest.approx(0.5, abs=1e-3)


def test_the_level_of_a_share_by_hand():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.3])
    assert level_for(scores, torch.ones(4), 0.5) == pytest.approx(0.4)
    assert level_for(scores, torch.tensor([1.0, 6.0, 2.0, 1.0]), 0.6) == pytest.approx(0.7)
    assert level_for(scores, torch.ones(4), 1.0) == pytest.approx(0.1)
    assert level_for(scores, torch.ones(4), 0.1) == pytest.approx(0.9)


def test_the_multiplier_is_what_a_unit_of_cost_is_worth_on_the_whole():
    multiplier = Multiplier()
    multiplier.after_step(torch.device("cpu"))
    assert multiplier.value == 0
    cost = torch.tensor([1.0, 2.0, 0.5])
    multiplier.see(-3 * cost, cost)
    multiplier.see(torch.tensor([1.0, -2.0]), torch.tensor([2.0, 1.0]))  # orthogonal: says nothing of cost
    multiplier.after_step(torch.device("cpu"))
    assert multiplier.value == pytest.approx(-3 * 5.25 / (5.25 + 5))
    multiplier.see(2 * cost, cost)
    saved = multiplier.state_dict()
    multiplier.after_step(torch.device("cpu"))
    expected = (0.9 * -3 * 5.25 + 2 * 5.25) / (0.9 * (5.25 + 5) + 5.25)
    assert multiplier.value == pytest.approx(expected)
    other = Multiplier()
    other.load_state_dict(saved)
    assert other.value == pytest.approx(-3 * 5.25 / (5.25 + 5))
    multiplier.see(cost * float("inf"), cost)  # a step that a scaled loss has made overflow
    multiplier.after_step(torch.device("cpu"))
    assert multiplier.value == pytest.approx(expected)


@pytest.mark.parametrize(
    "settings",
    [LayerSkipping(), LayerSkipping(layer_execution="masked"), FractionalPrecision()],
    ids=["gathered", "masked", "bits"],
)
def test_no_step_leaves_a_tensor_behind(settings):
    model = make("residual")
    optimizer = sgd(model)
    settings.attach(model, optimizer, example_inputs=images(2))
    alive = []
    for steps in (1, 2):
        train(model, optimizer, steps)
        gc.collect()
        alive.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    assert alive[0] == alive[1]
