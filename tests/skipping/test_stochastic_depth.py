import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import earlybird as eb
from earlybird.blocks import find_blocks
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.skipping.stochastic_depth import StochasticDepth, survival_for, survivals
from tests.skipping.test_layers import BLOCK_MACS, deep
from tests.tickets.test_early_bird import QUICK, batch, sgd, train
from tests.tickets.topologies import images, make


def start(model=None, **settings):
    model = make("residual") if model is None else model
    optimizer = sgd(model)
    running = StochasticDepth(**settings).attach(model, optimizer, example_inputs=images(2))
    return model, optimizer, running


def test_the_linear_rule_by_hand():
    blocks = find_blocks(deep(4), images(1))
    assert survivals(blocks, 0.5) == [0.875, 0.75, 0.625, 0.5]
    mixed = find_blocks(make("residual"), images(1))  # the second one changes the shape
    assert survivals(mixed, 0.5) == [0.75, 1.0]


def test_a_share_of_macs_becomes_the_last_blocks_probability():
    blocks = find_blocks(deep(4), images(1))
    last = survival_for(blocks, [1, 1, 1, 1], 0.75)
    assert sum(survivals(blocks, last)) / 4 == pytest.approx(0.75)
    last = survival_for(blocks, [1, 2, 3, 4], 0.6)
    run = sum(m * p for m, p in zip([1, 2, 3, 4], survivals(blocks, last), strict=True))
    assert run / 10 == pytest.approx(0.6)
    assert survival_for(blocks, [1, 1, 1, 1], 1.0) == 1.0
    with pytest.raises(InputError, match=r"depth_share is 0\.3, .* the others take 0\.375"):
        survival_for(blocks, [1, 1, 1, 1], 0.3)
    _, _, running = start(deep(4), depth_share=0.8)
    assert running.share == pytest.approx(0.8)
    assert running.status() == {"layers": "80%"}


@pytest.mark.parametrize("by", ["batch", "sample"])
def test_blocks_run_as_often_as_they_should(by):
    model, _, running = start(deep(2), depth_survival=0.4, depth_by=by)
    ran, rounds, size = [0, 0], 60, 16
    whole = set()
    for block, module in enumerate((model[1], model[2])):

        def counting(x, block=block, inner=module.conv1.forward):
            if len(x) > 1:  # one sample alone is counted
                ran[block] += len(x)
                whole.add(len(x))
            return inner(x)

        module.conv1.forward = counting
    for _ in range(rounds):
        with torch.no_grad():
            model.train()(images(size))
    total = rounds * size
    tolerance = 4 * (0.25 / (rounds if by == "batch" else total)) ** 0.5
    for count_, chance in zip(ran, running.survivals, strict=True):
        assert count_ / total == pytest.approx(chance, abs=tolerance)
    assert (whole == {size}) == (by == "batch")


@pytest.mark.parametrize("by", ["batch", "sample"])
def test_in_training_what_runs_is_scaled_and_evaluation_is_the_plain_network(by):
    model, _, _ = start(deep(1), depth_survival=0.4, depth_by=by)
    x = images(200)
    entered, left = [], []
    model[1].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model[1].register_forward_hook(lambda module, args, out: left.append(out))
    with torch.no_grad():
        model.train()(x)
        plain = deep(1)[1](entered[0])
    ran = (left[0] != entered[0]).flatten(1).any(1)
    expected = torch.where(ran.view(-1, 1, 1, 1), entered[0] + (plain - entered[0]) / 0.4, entered[0])
    torch.testing.assert_close(left[0], expected, rtol=1e-4, atol=1e-5)
    if by == "sample":
        torch.testing.assert_close(ran.float().mean().item(), 0.4, rtol=0, atol=0.15)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), deep(1).eval()(x))


def test_published_training_is_not_scaled_and_evaluation_gives_the_mean_over_the_coin():
    model, _, running = start(**{**StochasticDepth.PRESETS["published"], "depth_survival": 0.4})
    plain = make("residual")
    chance = running.survivals[0]
    assert chance == pytest.approx(0.7)
    x = images(6)
    with torch.no_grad():
        entered = plain[:3].eval()(x)
        block = plain[3].eval()(entered)
        expected = plain[4:].eval()(chance * block + (1 - chance) * entered)
        torch.testing.assert_close(model.eval()(x), expected)


def test_coins_are_thrown_anew_for_each_pass_and_do_not_depend_on_evaluation():
    ends = []
    for evaluations in (0, 2):
        model, optimizer, _ = start(deep(3), depth_by="sample")
        for step in range(4):
            for _ in range(evaluations):
                with torch.no_grad():
                    model.eval()(images(3))
            train(model, optimizer, 1, step)
        ends.append(model.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(ends[0].values(), ends[1].values(), strict=True))
    model, _, _ = start(deep(3), depth_by="sample")
    model.train()
    assert not torch.equal(model(images(16)), model(images(16)))


@pytest.mark.parametrize("by", ["batch", "sample"])
@pytest.mark.parametrize("stop", [1, 6, 11])
def test_stopped_and_resumed_ends_in_the_same_bits_over_a_cut(stop, by):
    def begin():
        model, optimizer, running = start(depth_by=by)
        bird = eb.EarlyBird(**{**QUICK, "deadline": "8it"}, keep=0.5).attach(model, optimizer, example_inputs=images(2))
        return model, optimizer, running, bird

    whole, optimizer, _, bird = begin()
    with pytest.warns(UserWarning, match="no agreement by the deadline"):
        train(whole, optimizer, 14)
    assert bird.drawn
    first, first_optimizer, *methods = begin()
    if stop > 8:
        with pytest.warns(UserWarning, match="no agreement by the deadline"):
            train(first, first_optimizer, stop)
    else:
        train(first, first_optimizer, stop)
    saved = copy.deepcopy(([m.state_dict() for m in methods], first.state_dict(), first_optimizer.state_dict()))
    second, second_optimizer, *methods = begin()
    for method, state in zip(methods, saved[0], strict=True):
        method.load_state_dict(state)
    second.load_state_dict(saved[1])
    second_optimizer.load_state_dict(saved[2])
    if stop > 8:
        train(second, second_optimizer, 14 - stop, stop)
    else:
        with pytest.warns(UserWarning, match="no agreement by the deadline"):
            train(second, second_optimizer, 14 - stop, stop)
    for one, two in zip(second.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_the_bill_counts_what_ran():
    model, optimizer, running = start(depth_survival=0.2, depth_by="sample")
    ran = []
    model[3].conv1.register_forward_pre_hook(lambda module, args: ran.append(len(args[0])) if module.training else None)
    cost = count(model, images(1))
    train(model, optimizer, 5)
    assert 0 < sum(ran) < 80
    expected = 80 * cost.training_macs - (80 - sum(ran)) * 3 * BLOCK_MACS
    assert running._ledger.phases["train"].macs == pytest.approx(expected, rel=1e-12)
    with torch.no_grad():
        model.eval()(images(8))
    assert running._ledger.phases["evaluate"].macs == 8 * cost.forward_macs


def test_a_survival_of_one_leaves_the_model_alone():
    model, optimizer, running = start(make("plain"), depth_survival=1.0)
    plain = make("plain")
    train(model, optimizer, 3)
    train(plain, sgd(plain), 3)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), plain.parameters(), strict=True))
    assert running.status() == {}


def test_detached_every_block_runs_unscaled():
    model, _, running = start(deep(2), depth_survival=0.1)
    running.detach()
    with torch.no_grad():
        assert torch.equal(model.train()(images(4)), deep(2).train()(images(4)))
    assert not model[1].conv2._forward_hooks


def test_bf16_goes_through():
    model, optimizer, _ = start(depth_by="sample")
    inputs, labels = batch(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.cross_entropy(model.train()(inputs).float(), labels)
    loss.backward()
    optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


class Functional(nn.Module):
    """Its branch ends in a function, so that nobody can scale it from outside."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return x + functional.gelu(self.layer(x))


def test_what_cannot_work_is_refused_before_the_first_step():
    model = nn.Sequential(Functional(), nn.Linear(6, 2))
    optimizer = sgd(model)
    with pytest.raises(InputError, match=r"what block '0' adds .* depth_scale='evaluation'"):
        StochasticDepth().attach(model, optimizer, example_inputs=torch.zeros(2, 6))
    StochasticDepth(depth_scale="evaluation").attach(model, optimizer, example_inputs=torch.zeros(2, 6))
    model(torch.zeros(3, 6))
    with pytest.raises(InputError, match="pass example_inputs"):
        StochasticDepth().attach(model, optimizer)
    with pytest.raises(InputError, match="no optimizer was given"):
        StochasticDepth().attach(model, [], example_inputs=torch.zeros(2, 6))
    with pytest.raises(InputError, match="has no residual block"):
        StochasticDepth().attach(make("plain"), optimizer, example_inputs=images(2))


class Remembering(nn.Module):
    """Its block is run in training without memory, and once more in the backward pass."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=True) if self.training else self.inner(x)


@pytest.mark.parametrize("place", [1, 4])
def test_a_block_that_is_run_again_in_the_backward_pass_is_refused(place):
    """Another coin would be thrown for it: the first block by a new pass, the last one by the next number."""
    model = deep()
    model[place] = Remembering(model[place])
    optimizer = sgd(model)
    StochasticDepth().attach(model, optimizer, example_inputs=images(2))
    with pytest.raises(InputError, match=f"block '{place}.inner' .* checkpointing"):
        train(model, optimizer, 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"depth_survival": 0}, "depth_survival is 0"),
        ({"depth_share": 1.5}, "depth_share is 1.5"),
        ({"depth_by": "block"}, "depth_by is 'block'"),
        ({"depth_scale": "never"}, "depth_scale is 'never'"),
        ({"depth_blocks": 3}, "depth_blocks is 3"),
    ],
)
def test_wrong_settings_name_the_value(settings, said):
    with pytest.raises(InputError, match=said):
        StochasticDepth(**settings)
