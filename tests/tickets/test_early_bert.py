"""EarlyBERT: coefficients by hand and by autograd, the draw, what is rewound, what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import earlybird as eb
from earlybird.errors import InputError, ShrinkError
from earlybird.tickets import early_bert
from earlybird.tickets.early_bert import FLOOR
from tests.tickets.test_early_bird import sgd, train
from tests.tickets.topologies import images, make

QUICK = {"draw_at": "6it", "unit_look_every": "2it", "unit_window": 2, "coefficient_rate": 0.01}


def adam(model, lr=1e-3):
    return torch.optim.Adam(model.parameters(), lr=lr)


def start(**settings):
    model = make("patches")
    optimizer = adam(model)
    search = eb.EarlyBert(**{**QUICK, **settings}).attach(model, optimizer, example_inputs=images(2))
    return model, optimizer, search


class Chain(nn.Module):
    """Two feed-forward pairs whose every output is known by hand."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Pair(), Pair()

    def forward(self, x):
        return self.second(x + self.first(x))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


def chain(seed=0):
    torch.manual_seed(seed)
    return Chain(), torch.randn(32, 6), torch.randn(32, 6)


def test_the_coefficients_are_those_that_autograd_and_adam_would_learn():
    model, x, y = chain()
    reference = copy.deepcopy(model)
    factors = [torch.ones(10, requires_grad=True) for _ in range(2)]
    for pair, factor in zip((reference.first, reference.second), factors):
        pair.fc2.register_forward_pre_hook(lambda m, args, factor=factor: args[0] * factor)
    learner = torch.optim.Adam(factors, lr=0.05)
    still = torch.optim.SGD(model.parameters(), lr=0.0)  # weights that stand still, so that both see the same ones
    search = eb.EarlyBert(
        coefficient_rate=0.05, neuron_sparsity=0.001, draw_at="1000it", unit_look_every="999it"
    ).attach(model, still)
    for _ in range(12):
        still.zero_grad()
        functional.mse_loss(model(x), y).backward()
        still.step()
        learner.zero_grad()
        (functional.mse_loss(reference(x), y) + 0.001 * sum(factor.abs().sum() for factor in factors)).backward()
        learner.step()
    for own, factor in zip(search.coefficients.values(), factors):
        torch.testing.assert_close(own, factor.detach(), rtol=1e-4, atol=1e-5)
        assert own.std() > 0.02
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)
    weight = reference.first.fc2.weight * search.coefficients["first.fc1"]
    torch.testing.assert_close(model.first.fc2.weight, weight, rtol=1e-4, atol=1e-6)


def test_a_coefficient_does_not_fall_below_the_floor():
    model, x, y = chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    search = eb.EarlyBert(coefficient_rate=0.5, neuron_sparsity=10.0, draw_at="1000it", unit_look_every="999it").attach(
        model, optimizer
    )
    for _ in range(8):
        optimizer.zero_grad()
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
    assert all(bool((value == FLOOR).all()) for value in search.coefficients.values())


def test_the_published_rate_is_the_optimizers():
    model, x, y = chain()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    search = eb.EarlyBert.preset("published", draw_at="50it", unit_look_every="50it").attach(model, optimizer)
    functional.mse_loss(model(x), y).backward()
    optimizer.step()
    for value in search.coefficients.values():  # Adam's first step is its rate, whatever the gradient
        torch.testing.assert_close((value - 1).abs(), torch.full((10,), 0.002), rtol=1e-3, atol=1e-6)


def test_the_draw_keeps_the_largest_coefficients_and_begins_again():
    model, optimizer, search = start(keep_heads=0.5, keep_neurons=0.5)
    begun = copy.deepcopy(model.state_dict())
    alive = train(model, optimizer, 5)
    assert not search.drawn
    before = search.coefficients
    train(model, optimizer, 1, 5)
    assert alive
    assert search.drawn_at == 6
    assert search.change.parameters_after < search.change.parameters_before
    assert not any(torch.equal(search.coefficients[name], value) for name, value in before.items())  # of step 6
    values = search.coefficients
    for name, mask in search.ticket.masks.items():
        if search.ticket.kinds[name] == "head":  # layer by layer
            assert mask.sum() == 2
            assert values[name][mask].min() >= values[name][~mask].max()
    neurons = [name for name, kind in search.ticket.kinds.items() if kind == "neuron"]
    mask, value = (torch.cat([of[name] for name in neurons]) for of in (search.ticket.masks, values))
    assert mask.sum() == 24
    assert value[mask].min() >= value[~mask].max()
    assert not optimizer.state
    reference = make("patches")
    reference.load_state_dict(begun)
    eb.shrink(reference, search.ticket, images(2))
    for (key, one), two in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(one, two), key
    assert search.ticket.provenance["method"] == "early_bert"
    assert search.status() == {"ticket": "drawn at step 6"}
    train(model, optimizer, 4, 6)
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters() if p.grad is not None)
    bill = str(search.bill())
    assert all(phase in bill for phase in ("search", "draw", "train"))


def test_it_can_go_on_with_weights_and_optimizer_state():
    model, optimizer, search = start(unit_weights="continue", unit_optimizer_state="keep")
    train(model, optimizer, 6)
    twin, other, _ = start(unit_weights="continue", unit_optimizer_state="keep", draw_at="7it")
    train(twin, other, 6)
    eb.shrink(twin, search.ticket, images(2), optimizer=other)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)
        if one in optimizer.state:
            assert torch.equal(optimizer.state[one]["exp_avg"], other.state[two]["exp_avg"])
    assert optimizer.state


@pytest.mark.parametrize("score", ["taylor", "magnitude", "random"])
def test_other_scores(score):
    model, optimizer, search = start(unit_score=score, unit_weights="continue")
    plain = make("patches")
    train(plain, adam(plain), 5)
    train(model, optimizer, 5)
    for one, two in zip(model.parameters(), plain.parameters()):  # nothing is multiplied into the weights
        assert torch.equal(one, two)
    train(model, optimizer, 1, 5)
    assert search.drawn
    again, optimizer, other = start(unit_score=score, unit_weights="continue")
    train(again, optimizer, 6)
    assert other.ticket == search.ticket


def test_all_stay():
    plain = make("patches")
    train(plain, sgd(plain), 9)
    model = make("patches")
    optimizer = sgd(model)
    settings = {"keep_heads": 1.0, "keep_neurons": 1.0, "unit_weights": "continue", "unit_optimizer_state": "keep"}
    search = eb.EarlyBert(**{**QUICK, **settings}).attach(model, optimizer, example_inputs=images(2))
    train(model, optimizer, 9)
    assert search.drawn
    for one, two in zip(model.parameters(), plain.parameters()):
        assert torch.equal(one, two)


def test_masks_that_agree_are_drawn_early_and_distances_are_by_hand():
    model, optimizer, search = start(draw_at="40it", unit_tolerance=1.0, unit_window=3)
    train(model, optimizer, 4)
    assert not search.drawn
    masks = [mask.clone() for mask in search._masks]
    assert search.history[1]["distances"] == [float((masks[0] != masks[1]).float().mean())]
    steps, matrix = search.distance_matrix()
    assert steps == [2, 4]
    assert float(matrix[0, 1]) == pytest.approx(search.history[1]["distances"][0])
    train(model, optimizer, 4, 4)
    assert search.drawn_at == 6
    assert search.ticket.provenance["reason"] == "agreement"


def test_a_closure_is_seen():
    model, x, y = chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    search = eb.EarlyBert(**QUICK).attach(model, optimizer, example_inputs=x)

    def closure():
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
    assert search.drawn


def test_infinite_gradients_are_left_out():
    model, x, y = chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    search = eb.EarlyBert(**QUICK).attach(model, optimizer, example_inputs=x)
    functional.mse_loss(model(x), y).backward()
    model.first.fc2.weight.grad[0, 0] = torch.inf
    optimizer.step()
    assert all(bool((value == 1).all()) for value in search.coefficients.values())


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 8])
@pytest.mark.parametrize("weights", ["rewind", "continue"])
def test_resumed_to_the_bit(stop, weights):
    model, optimizer, search = start(unit_weights=weights)
    train(model, optimizer, stop)
    saved = copy.deepcopy((search.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 10 - stop, stop)
    other, second, again = start(unit_weights=weights)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    train(other, second, 10 - stop, stop)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert again.ticket == search.ticket
    assert again.history == search.history
    assert again.drawn_at == search.drawn_at == 6


def test_cut_before_there_is_an_optimizer():
    model, optimizer, search = start()
    train(model, optimizer, 8)
    saved = copy.deepcopy((search.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 3, 8)
    method, other = eb.EarlyBert(**QUICK), make("patches")
    for _ in range(2):  # what is cut already is left alone
        method.cut(other, saved[0])
    other.load_state_dict(saved[1])
    second = adam(other)
    again = method.attach(other, second, example_inputs=images(2))
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[2])
    assert again.drawn
    train(other, second, 3, 8)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert again.state_dict()["sizes"] == search.state_dict()["sizes"]
    early, _, undecided = start()
    method.cut(early, undecided.state_dict())  # nothing was drawn yet
    assert early.layers[0].linear1.out_features == 24
    with pytest.raises(InputError, match="another model"):
        method.cut(other, undecided.state_dict())


class TestRefusals:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"keep_heads": 0}, {"keep_neurons": 2}, {"unit_score": "bn_scale"}, {"head_sparsity": -1},
            {"coefficient_rate": "fast"}, {"unit_window": 1}, {"round_neurons_to": 0}, {"unit_weights": "again"},
            {"draw_at": "0ep"}, {"unit_tolerance": True},
        ],
    )  # fmt: skip
    def test_values_out_of_range(self, wrong):
        with pytest.raises(InputError, match=next(iter(wrong))):
            eb.EarlyBert(**wrong)

    def test_models_it_is_not_for(self):
        model = make("residual")
        with pytest.raises(InputError, match="no attention heads"):
            eb.EarlyBert(**QUICK).attach(model, sgd(model))
        model = make("patches")
        with pytest.raises(InputError, match="no optimizer"):
            eb.EarlyBert(**QUICK).attach(model, [])
        model.layers[1].linear2.requires_grad_(False)
        with pytest.raises(InputError, match=r"layers\.1\.linear2.* is frozen"):
            eb.EarlyBert(**QUICK).attach(model, sgd(model))
        eb.EarlyBert(**QUICK, unit_score="magnitude").attach(model, sgd(model))
        with pytest.raises(InputError, match="attached to this model already"):
            eb.EarlyBert(**QUICK, unit_score="magnitude").attach(model, sgd(model))

    def test_shards(self, monkeypatch):
        monkeypatch.setattr(early_bert, "is_sharded", lambda model: True)
        with pytest.raises(InputError, match="fully_shard"):
            start()

    def test_steps_without_gradients(self):
        _, optimizer, search = start()
        optimizer.step()
        with pytest.raises(InputError, match="nothing to choose by"):
            optimizer.step()
        assert not search.drawn

    def test_states_of_others(self):
        _, _, search = start()
        chain_model, _, _ = chain()
        other = eb.EarlyBert(**QUICK).attach(chain_model, adam(chain_model))
        with pytest.raises(InputError, match="another model"):
            other.load_state_dict(search.state_dict())
        _, _, going_on = start(unit_weights="continue")
        with pytest.raises(InputError, match="unit_weights='rewind'"):
            going_on.load_state_dict(search.state_dict())

    def test_what_cannot_be_cut_is_left_as_it_was_trained(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)

            def forward(self, x):
                return self.fc2(self.fc1(x).softmax(-1))

        torch.manual_seed(0)
        model = Odd()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        search = eb.EarlyBert(**{**QUICK, "draw_at": "2it"}).attach(model, optimizer)
        x = torch.randn(8, 6)
        untrained = copy.deepcopy(model.state_dict())
        model(x).square().sum().backward()
        optimizer.step()
        with pytest.raises(ShrinkError, match="something else"):
            optimizer.step()
        assert not search.drawn
        assert model.fc1.weight.shape == (10, 6)
        assert not torch.equal(model.fc1.weight, untrained["fc1.weight"])
