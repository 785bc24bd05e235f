import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import earlybird as eb
from earlybird.errors import InputError, ShrinkError
from earlybird.optimizers.muon import Muon
from earlybird.tickets.coupling import find_groups
from earlybird.tickets.scores import batch_norms
from tests.tickets.topologies import TOPOLOGIES, conv, images, make, masked, tail


def muon(parameters) -> Muon:
    filters, vectors = [], []
    for parameter in parameters:
        (filters if parameter.ndim > 1 else vectors).append(parameter)
    return Muon([{"params": filters}, {"params": vectors, "orthogonal": False}], lr=0.01)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "muon": muon,
}


def random_ticket(model: nn.Module, seed: int, keep: float) -> eb.Ticket:
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, norm in batch_norms(model).items():
        mask = torch.rand(norm.num_features, generator=generator) < keep
        mask[int(torch.randint(norm.num_features, (1,), generator=generator))] = True
        masks[name] = mask
    return eb.Ticket(masks)


def assert_same_function(model: nn.Module, reference: nn.Module) -> None:
    x = images(5, seed=7)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), reference.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TOPOLOGIES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.sampled_from([0.1, 0.3, 0.5, 0.8, 0.95]))
def test_any_ticket_shrinks_to_what_the_masked_model_computes(name, seed, keep):
    model = make(name, seed)
    ticket = random_ticket(model, seed, keep)
    reference = masked(copy.deepcopy(model), ticket.masks)
    try:
        eb.shrink(model, ticket, images(1))
    except InputError as error:
        # masks drawn layer by layer may leave a coupled group without any channel; then nothing may have been touched
        assert "every channel" in str(error)  # noqa: PT017
        for (key, now), before in zip(model.state_dict().items(), make(name, seed).state_dict().values()):
            assert torch.equal(now, before), key
        return
    assert_same_function(model, reference)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_coupled_tickets_make_every_topology_smaller(name):
    model = make(name)
    ticket = eb.draw(model, 0.5, example_inputs=images(), coupled="group")
    reference = masked(copy.deepcopy(model), ticket.masks)
    change = eb.shrink(model, ticket, images(1))
    assert change.parameters_after == sum(p.numel() for p in model.parameters())
    if name == "sigmoid":  # sigmoid(0) is not 0: what reads it cannot be cut without changing the function
        assert change.silenced
        assert "0" not in change.layers
    else:
        assert change.parameters_after < 0.9 * change.parameters_before
    assert_same_function(model, reference)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", ["plain", "flatten", "residual", "grouped", "depthwise"])
def test_gradients_and_optimizer_state_follow(name, optimizer_name):
    """Momentum and all other state follow their channels, and the next steps run."""
    model = make(name)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    for seed in range(3):
        optimizer.zero_grad()
        model(images(seed=seed)).square().mean().backward()
        optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    states = {
        name: {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
        for name, p in model.named_parameters()
    }
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    identities = [id(p) for p in model.parameters()]
    groups = [[id(p) for p in g["params"]] for g in optimizer.param_groups]

    ticket = eb.draw(model, 0.5, example_inputs=images(), coupled="group")
    change = eb.shrink(model, ticket, images(1), optimizer=optimizer)

    assert identities == [id(p) for p in model.parameters()]
    assert groups == [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    sliced = 0
    for key, parameter in model.named_parameters():
        for old, new in [(before[key], parameter), (gradients[key], parameter.grad)] + [
            (states[key][k], optimizer.state[parameter][k]) for k in states[key]
        ]:
            if new.shape != old.shape:
                sliced += 1
                extra = set(new.flatten().tolist()) - set(old.flatten().tolist())
                assert extra <= ({0.0} if change.silenced else set())
            elif key.rsplit(".", 1)[0] not in change.silenced:
                assert torch.equal(old, new)
        for value in optimizer.state[parameter].values():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                assert value.shape == parameter.shape
    assert sliced > 0
    optimizer.zero_grad()
    model(images(seed=9)).square().mean().backward()
    optimizer.step()


def test_sliced_values_are_those_of_the_kept_channels():
    model = nn.Sequential(conv(3, 4, bias=True), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 3), nn.BatchNorm2d(3), *tail(3))
    dense = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(images()).sum().backward()
    optimizer.step()
    momentum = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()}
    dense.load_state_dict(model.state_dict())
    kept, kept2 = torch.tensor([0, 2, 3]), torch.tensor([1])
    ticket = eb.Ticket({"1": torch.tensor([True, False, True, True]), "4": torch.tensor([False, True, False])})
    change = eb.shrink(model, ticket, images(1), optimizer=optimizer)
    assert torch.equal(model[0].weight, dense[0].weight[kept])
    assert torch.equal(model[0].bias, dense[0].bias[kept])
    assert torch.equal(model[1].running_mean, dense[1].running_mean[kept])
    assert torch.equal(model[1].running_var, dense[1].running_var[kept])
    assert torch.equal(model[3].weight, dense[3].weight[kept2][:, kept])
    assert torch.equal(model[7].weight, dense[7].weight[:, kept2])
    assert torch.equal(optimizer.state[model[3].weight]["momentum_buffer"], momentum["3.weight"][kept2][:, kept])
    assert model[3].weight.grad.shape == (1, 3, 3, 3)
    assert (model[0].out_channels, model[3].in_channels, model[3].out_channels, model[7].in_features) == (3, 3, 1, 1)
    assert change.layers["3"] == {"out": (3, 1), "in": (4, 3)}
    assert change.kept["0"].tolist() == [0, 2, 3]
    assert "parameters" in str(change)


def test_the_next_backward_works_while_the_last_graph_is_alive():
    """In an ordinary loop `loss` and `output` still live when the step's hook cuts; autograd remembers old shapes."""
    model = make("residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    ticket = eb.draw(model, 0.5, example_inputs=images(), coupled="group")
    fired = []

    def cut(*_):
        if not fired:
            fired.append(eb.shrink(model, ticket, images(1), optimizer=optimizer))

    optimizer.register_step_post_hook(cut)
    alive = []
    for seed in range(3):
        output = model(images(seed=seed))
        loss = output.square().mean()
        alive.append((output, loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert fired
    assert fired[0].parameters_after < fired[0].parameters_before
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_identity_ticket_changes_nothing(name):
    model, twin = make(name), make(name)
    state = torch.random.get_rng_state()
    change = eb.shrink(model, eb.draw(model, 1.0), images(1))
    assert not change.layers
    assert torch.equal(state, torch.random.get_rng_state())
    for one, two in ((model, twin),):
        for seed in range(2):
            for net in (one, two):
                optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
                net.zero_grad()
                net(images(seed=seed)).square().mean().backward()
                optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))


def test_rounding_keeps_the_most_valued_and_says_so():
    model = nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(), *tail(16))
    model[1].weight.data = torch.linspace(0.1, 1.6, 16)
    mask = torch.zeros(16, dtype=torch.bool)
    mask[[15, 14, 13, 2, 1]] = True
    change = eb.shrink(model, eb.Ticket({"1": mask}), images(1), round_to=8)
    assert model[0].out_channels == 8
    assert change.rounded == {"1": [10, 11, 12]}
    assert not change.silenced
    assert model[1].weight.min() > 0  # rounded channels are alive


def test_grouped_convolutions_keep_equally_many_in_each_block():
    model = make("grouped")
    mask = torch.ones(8, dtype=torch.bool)
    mask[[0, 1, 2, 5]] = False  # three of the first block of four, one of the second
    reference = masked(copy.deepcopy(model), {"1": mask})
    change = eb.shrink(model, eb.Ticket({"1": mask}), images(1))
    assert model[3].in_channels == 6
    assert len(change.silenced["1"]) == 2
    assert_same_function(model, reference)


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(4)])
def test_what_is_pooled_to_one_pixel_in_channels_last_is_cut_as_in_any_layout(pool):
    """Pooling to 1x1 keeps channels_last by another view of its result, which was not followed."""
    for layout in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, 2))
        model = model.to(memory_format=layout)
        change = eb.shrink(
            model, eb.Ticket({"0": torch.arange(8) < 3}), torch.randn(2, 3, 4, 4).to(memory_format=layout)
        )
        assert not change.whole
        assert model[4].in_features == 3


class Turned(nn.Module):
    """Exchanges channels and rows behind PyTorch's back, without a change of shape."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.conv(x).contiguous().as_strided((len(x), 4, 4, 4), (64, 4, 16, 1)))


def test_a_view_that_moves_elements_is_not_followed():
    model = Turned()
    with pytest.raises(ShrinkError, match="'as_strided' after layer 'conv', which is not followed"):
        eb.shrink(model, eb.Ticket({"conv": torch.arange(4) < 3}), torch.randn(2, 3, 4, 4))


def test_channels_last_survives():
    model = make("residual").to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(images()).sum().backward()
    optimizer.step()
    eb.shrink(model, eb.draw(model, 0.5, example_inputs=images(), coupled="group"), images(1), optimizer=optimizer)
    filters = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    assert any(weight.shape[2] == 1 for weight in filters)  # whose strides alone tell
    for weight in filters:
        strides = weight.detach().clone(memory_format=torch.channels_last).stride()
        assert weight.stride() == optimizer.state[weight]["momentum_buffer"].stride() == strides


def test_shrinking_twice():
    model = make("residual")
    for keep in (0.7, 0.6):
        ticket = eb.draw(model, keep, example_inputs=images(), coupled="group")
        reference = masked(copy.deepcopy(model), ticket.masks)
        eb.shrink(model, ticket, images(1))
        assert_same_function(model, reference)


def test_frozen_layers_are_cut_too():
    model = make("plain")
    for parameter in model[3].parameters():
        parameter.requires_grad_(False)
    eb.shrink(model, eb.draw(model, 0.5), images(1))
    assert model[3].out_channels < 12
    assert not model[3].weight.requires_grad


def test_inputs_as_tuple_and_dict():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make("plain")

        def forward(self, x, scale):
            return self.body(x) * scale

    for inputs in ((images(1), torch.ones(1)), {"x": images(1), "scale": torch.ones(1)}):
        model = Two()
        assert eb.shrink(model, eb.draw(model, 0.5), inputs).parameters_after < sum(
            p.numel() for p in Two().parameters()
        )


class TestRefusals:
    """Whatever is refused leaves every weight, buffer, attribute and state as it was."""

    def check(self, model, ticket, error, match, optimizer=None, inputs=None):
        before = copy.deepcopy(model.state_dict())
        shown = repr(model)
        with pytest.raises(error, match=match):
            eb.shrink(model, ticket, images(1) if inputs is None else inputs, optimizer=optimizer)
        assert repr(model) == shown
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def test_foreign_ticket(self):
        self.check(make("plain"), eb.Ticket({"nowhere": torch.tensor([True])}), InputError, "nowhere")
        self.check(make("plain"), eb.Ticket({"1": torch.tensor([True, False])}), InputError, "2 channels for layer '1'")
        self.check(make("plain"), eb.Ticket({"2": torch.tensor([True, False])}), InputError, "layer '2' .ReLU.")
        heads = eb.Ticket({"1": torch.ones(8, dtype=torch.bool)}, {"1": "head"})
        self.check(make("plain"), heads, InputError, "kind 'head'")

    def test_every_channel_of_a_layer(self):
        self.check(
            make("plain"), eb.Ticket({"1": torch.zeros(8, dtype=torch.bool)}), InputError, "every channel of layer '0'"
        )

    def test_outputs_of_the_model(self):
        model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 5), nn.BatchNorm1d(5))
        self.check(
            model,
            eb.Ticket({"4": torch.tensor([True] * 4 + [False])}),
            ShrinkError,
            "layer '4' that have to stay .outputs",
        )

    def test_a_layer_of_fixed_width_is_named(self):
        class Fixed(nn.Module):
            def forward(self, x):
                return x.view(-1, 8, x.shape[2] * x.shape[3]).mean(2)

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())
                self.fixed, self.head = Fixed(), nn.Linear(8, 5)

            def forward(self, x):
                return self.head(self.fixed(self.body(x)))

        model = Net()
        self.check(model, eb.draw(model, 0.5), ShrinkError, "fixed|head")

    def test_reparametrised_weights(self):
        model = make("plain")
        nn.utils.parametrizations.weight_norm(model[3])
        self.check(model, eb.draw(model, 0.5), ShrinkError, "weight '3.weight' is computed")

    def test_optimizer_state_of_another_shape(self):
        model = make("plain")
        optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
        model(images()).sum().backward()
        optimizer.step()
        self.check(model, eb.draw(model, 0.5), ShrinkError, "Adafactor keeps state 'row_var'", optimizer=optimizer)

    def test_inputs_the_model_cannot_run_on(self):
        self.check(
            make("plain"),
            eb.draw(make("plain"), 0.5),
            ShrinkError,
            "cannot be traced at layer '0'",
            inputs=torch.ones(1, 4, 8, 8),
        )


def test_hooks_of_the_user_are_not_called():
    model = make("plain")
    calls = []
    model.register_forward_pre_hook(lambda *a: calls.append("model"))
    model[3].register_forward_hook(lambda *a: calls.append("layer"))
    eb.shrink(model, eb.draw(model, 0.5, example_inputs=images()), images(1))
    assert calls == []
    model(images())
    assert calls == ["layer", "model"] or calls == ["model", "layer"]


def test_weights_shared_by_two_layers():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = conv(3, 6), nn.BatchNorm2d(6)
            self.one, self.two = conv(6, 6), conv(6, 6)
            self.two.weight = self.one.weight
            self.norm1, self.norm2, self.head = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Linear(6, 5)

        def forward(self, x):
            x = torch.relu(self.norm(self.stem(x)))
            x = torch.relu(self.norm1(self.one(x)))
            return self.head(torch.relu(self.norm2(self.two(x))).mean((2, 3)))

    mask = torch.tensor([True, True, False, True, False, True])
    model = Tied()
    reference = masked(copy.deepcopy(model), dict.fromkeys(("norm", "norm1", "norm2"), mask))
    eb.shrink(model, eb.Ticket(dict.fromkeys(("norm", "norm1", "norm2"), mask)), images(1))
    assert model.one.weight is model.two.weight
    assert model.one.weight.shape[:2] == (4, 4)
    assert_same_function(model, reference)
    model = Tied()
    reference = masked(copy.deepcopy(model), {"norm": mask})
    eb.shrink(model, eb.Ticket({"norm": mask}), images(1))  # the others still need them: they fall silent
    assert model.stem.out_channels == 6
    assert_same_function(model, reference)
    model = Tied()
    (group,) = (group for group in find_groups(model, images(1)) if not group.output)
    assert group.size == 6
    assert not group.residual
    drawn = eb.draw(model, 0.5, example_inputs=images())
    eb.shrink(model, drawn, images(1))
    assert model.one.weight is model.two.weight
    assert model.one.weight.shape[:2] == (3, 3)


def test_a_weight_that_two_layers_share_in_blocks_of_other_sizes_stays_whole():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.whole, self.halves = conv(3, 8), conv(8, 8), nn.Conv2d(16, 8, 3, padding=1, groups=2)
            self.wide, self.head = conv(8, 16), nn.Linear(8, 5)
            self.halves.weight = self.whole.weight

        def forward(self, x):
            return self.head(self.halves(self.wide(self.whole(self.stem(x)))).mean((2, 3)))

    groups = find_groups(Tied(), images(1))
    stays = {member.name for group in groups if group.output for member in group.members}
    assert stays >= {"stem", "whole", "halves", "wide"}
    assert any("which the layers 'whole' and 'halves' share" in group.why for group in groups)


def test_a_weight_that_a_layer_shares_with_one_that_is_never_called_stays_whole():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head, self.other = conv(3, 6), nn.BatchNorm2d(6), nn.Linear(6, 5), conv(3, 6)
            self.other.weight = self.stem.weight

        def forward(self, x):
            return self.head(torch.relu(self.norm(self.stem(x))).mean((2, 3)))

    groups = find_groups(Unused(), images(1))
    assert [group.why for group in groups if "norm" in {member.name for member in group.members}] == [
        "'weight', which the layers 'stem' and 'other' share"
    ]


def test_all_parameters_are_in_the_optimizer_exactly_once():
    model = make("depthwise")
    optimizer = torch.optim.AdamW(model.parameters())
    eb.shrink(model, eb.draw(model, 0.5), images(1), optimizer=optimizer)
    held = list(itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups))
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


def test_heads_and_neurons_of_a_shared_weight_are_not_cut_in_one_place_alone():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True) for _ in range(2))
            self.two.linear1.weight = self.one.linear1.weight
            self.two.self_attn.in_proj_weight = self.one.self_attn.in_proj_weight

        def forward(self, x):
            return self.two(self.one(x))

    for name, kind, count in (("one.linear1", "neuron", 32), ("two.self_attn", "head", 4)):
        ticket = eb.Ticket({name: torch.arange(count) > 0}, {name: kind})
        with pytest.raises(ShrinkError, match="share the weight"):
            eb.shrink(Tied(), ticket, torch.randn(2, 5, 16))
