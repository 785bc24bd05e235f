import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import earlybird as eb
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.precision.block_float import BlockFloat, block_float
from tests.tickets.test_early_bird import sgd, train
from tests.tickets.topologies import images, make

QUICK = {"look_every": "1it", "skip": "1it", "deadline": "4it", "window": 2, "round_to": 1}


def begin(name="residual", total=20, **settings_):
    model = make(name)
    optimizer = sgd(model)
    return model, optimizer, BlockFloat(**settings_).attach(model, optimizer, total_steps=total)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the format ----


def test_numbers_share_the_largest_ones_exponent_by_hand():
    x = torch.tensor([1.0, 0.5, -0.3, 0.001])  # exponent 0, step 1/64
    assert block_float(x, 8).mul(64).tolist() == [64, 32, -19, 0]
    assert block_float(torch.tensor([9.2, -8.0, 1.2]), 4).tolist() == [10.0, -8.0, 2.0]  # exponent 3: step 2
    assert block_float(torch.tensor([15.9, -15.9]), 4).tolist() == [14.0, -16.0]  # codes 7 and -8 are the last
    assert block_float(torch.tensor([0.9, 0.3]), 4).mul(8).tolist() == [7, 2]  # exponent -1: step 1/8


def test_powers_of_two_have_the_right_exponent():
    x = 2.0 ** torch.arange(-30.0, 30.0)
    assert torch.equal(block_float(x, 3, per=0), x)


def test_slices_have_exponents_of_their_own():
    x = torch.tensor([[1.0, 0.3], [100.0, 30.0]])
    each = torch.stack([block_float(row, 4) for row in x])
    assert torch.equal(block_float(x, 4, per=0), each)
    assert not torch.equal(block_float(x, 4), each)


def test_zeros_stay_and_what_overflowed_is_no_number_again():
    assert torch.equal(block_float(torch.zeros(3), 8), torch.zeros(3))
    assert block_float(torch.tensor([1.0, math.inf]), 8)[1].isnan()
    assert block_float(torch.tensor([1.0, math.nan]), 8).isnan().any()
    assert block_float(torch.tensor(0.3), 8, per=0).ndim == 0


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30).map(torch.tensor), st.integers(2, 16))
@settings(max_examples=60, deadline=None)
def test_errors_are_at_most_a_step_and_rounding_again_changes_nothing(x, bits):
    y = block_float(x, bits)
    largest = x.abs().max()
    if largest < 1e-30:
        return
    step = 2.0 ** (math.floor(math.log2(largest)) - bits + 2)
    # half a step, a whole one for the largest, whose code may be one too many
    assert (y - x).abs().max() <= step * (1 + 1e-6)
    assert ((y - x).abs() <= step / 2 * (1 + 1e-6))[x < 2 ** math.floor(math.log2(largest)) * 2 - step].all()
    assert torch.equal(block_float(y, bits), y) or y.abs().max() > 2.0 ** (math.floor(math.log2(largest)) + 1) - step


def test_stochastic_rounding_is_right_on_average():
    x = torch.full((20_000,), 0.7)
    x[0] = 1.0
    y = block_float(x, 4, generator=seeded())[1:]  # step 1/4
    assert set(y.tolist()) == {0.5, 0.75}
    assert abs(float(y.double().mean()) - 0.7) < 5 * 0.125 / math.sqrt(len(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_type_and_layout_stay(dtype, layout):
    x = torch.randn(2, 3, 4, 5).to(dtype).contiguous(memory_format=layout)
    for per in (None, 0):
        y = block_float(x, 8, per=per, generator=seeded())
        assert (y.dtype, y.stride()) == (x.dtype, x.stride())


# ---- training ----


def test_a_layer_computes_with_rounded_operands():
    model, _, running = begin("plain", block_rounding="nearest", block_bits=4)
    layer, x = model[3], torch.randn(2, 8, 5, 5, requires_grad=True)
    output = layer(x)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    operands = [block_float(tensor, 4, per=0).requires_grad_() for tensor in (x, layer.weight)]
    expected = functional.conv2d(operands[0], operands[1], layer.bias, padding=1)
    assert torch.equal(output, expected)
    expected.backward(block_float(upstream, 4, per=0))
    assert torch.equal(x.grad, operands[0].grad)
    assert torch.equal(layer.weight.grad, operands[1].grad)
    assert running.status() == {"bits": "block 4"}


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 3, 2, 2)

    def forward(self, x):
        return self.up(self.down(x), output_size=x.shape[-2:])


def test_a_decoder_that_names_the_size_it_wants_is_rounded_too():
    model = Decoder()
    BlockFloat().attach(model, sgd(model))
    assert model(images(2)[..., :7]).shape[-1] == 7


def test_evaluation_rounds_to_the_nearest():
    model, _, _ = begin("plain", block_bits=4)
    x = images()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_it_ends_when_it_is_told_to():
    model, optimizer, running = begin("plain", block_until="2it")
    plain = make("plain")
    train(model, optimizer, 2)
    assert running.status() == {}
    assert not hasattr(model[0], "arithmetic")
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images()), plain.eval()(images()))


def test_weights_and_momentum_are_rounded_only_when_asked_for():
    for asked in (False, True):
        model, optimizer, _ = begin("plain", block_state=asked, block_of="tensor")
        train(model, optimizer, 2)
        weight = model[0].weight
        held = (weight.data, weight.grad, optimizer.state[weight]["momentum_buffer"])
        assert [torch.equal(block_float(tensor, 8), tensor) for tensor in held] == [asked] * 3


@pytest.mark.parametrize("first", ["search", "block_float"])
def test_the_search_runs_in_few_bits_and_the_rest_in_all(first):
    model = make("residual")
    optimizer = sgd(model)
    ledger = eb.Ledger()
    ledger.watch(model, optimizer, images(2))
    ledger.enter("search")
    price = count(model, images(1))
    for name in sorted(("search", "block_float"), key=lambda name: name != first):
        if name == "search":
            search = eb.EarlyBird(**QUICK).attach(
                model, optimizer, example_inputs=images(2), steps_per_epoch=5, ledger=ledger
            )
        else:
            running = BlockFloat().attach(model, optimizer, ledger=ledger)
    with pytest.warns(UserWarning, match="no agreement"):
        train(model, optimizer, 4)
    assert search.drawn
    train(model, optimizer, 2, start=4)
    assert not running.active
    assert not hasattr(model[0], "arithmetic")
    phases = ledger.bill().phases
    last = price.layers["7"]
    classifier = last.macs + last.error_macs + last.weight_macs
    quantised = phases["search"].macs.value / (4 * 16) - classifier
    assert phases["search"].bit_macs.value == pytest.approx(4 * 16 * (quantised / 16 + classifier))
    assert phases["train"].bit_macs.value == phases["train"].macs.value


def test_in_either_order_the_same_ticket_and_bits():
    ends = []
    for order in ((0, 1), (1, 0)):
        model = make("residual")
        optimizer = sgd(model)
        methods = [eb.EarlyBird(**QUICK), BlockFloat()]
        for index in order:
            more = {"example_inputs": images(2), "steps_per_epoch": 5} if index == 0 else {}
            methods[index].attach(model, optimizer, **more)
        with pytest.warns(UserWarning, match="no agreement"):
            train(model, optimizer, 7)
        ends.append(model.state_dict())
    for one, two in zip(*(end.values() for end in ends), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("block_state", [False, True])
def test_stopped_and_resumed_ends_in_the_same_bits(stop, block_state):
    more = {"block_until": "4it", "block_state": block_state}
    whole, optimizer, _ = begin("plain", **more)
    train(whole, optimizer, 6)
    first, first_optimizer, first_running = begin("plain", **more)
    train(first, first_optimizer, stop)
    saved = copy.deepcopy((first_running.state_dict(), first.state_dict(), first_optimizer.state_dict()))
    second, second_optimizer, second_running = begin("plain", **more)
    for owner, state in zip((second_running, second, second_optimizer), saved):
        owner.load_state_dict(state)
    train(second, second_optimizer, 6 - stop, start=stop)
    for one, two in zip(second.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_nothing_to_do_is_plain_training_and_so_is_detached():
    plain = make("plain")
    train(plain, sgd(plain), 3)
    for detach in (False, True):
        model, optimizer, running = begin("plain", **({} if detach else {"block_until": "0it"}))
        if detach:
            running.detach()
        train(model, optimizer, 3)
        for one, two in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"block_bits": 1}, "block_bits is 1"),
        ({"block_bits": 17}, "block_bits is 17"),
        ({"block_of": "row"}, "block_of is 'row'"),
        ({"block_rounding": "up"}, "block_rounding is 'up'"),
        ({"block_until": "later"}, "later"),
        ({"block_state": 1}, "block_state is 1"),
    ],
)
def test_wrong_settings_name_the_value(settings_, said):
    with pytest.raises(InputError, match=said):
        BlockFloat(**settings_)


def test_what_it_cannot_do_is_refused():
    model, optimizer, _ = begin("plain")
    with pytest.raises(InputError, match="another method decides how layer '0' computes"):
        BlockFloat().attach(model, optimizer)
    with pytest.raises(InputError, match="no optimizer"):
        BlockFloat().attach(make("plain"), [])
    with pytest.raises(InputError, match="nothing to quantise"):
        BlockFloat().attach(nn.Sequential(nn.Linear(2, 2)), optimizer)
