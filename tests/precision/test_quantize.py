import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from earlybird.calls import hooks_idle
from earlybird.cost.arithmetic import PASSES
from earlybird.errors import InputError
from earlybird.precision.quantize import (
    Bits,
    LayerRanges,
    QuantisedLayer,
    Range,
    averaged,
    declare,
    encode,
    gradient_through,
    most_significant,
    over_batch,
    quantisable,
    quantise,
    range_of,
    round_,
    seed_of_step,
    straight_through,
)
from tests.tickets.topologies import images, make


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bounds(low, high):
    return Range(torch.tensor(float(low)), torch.tensor(float(high)))


numbers = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=40).map(torch.tensor)


# ---- definitions, by hand ----


def test_affine_codes_by_hand():
    encoded = encode(torch.tensor([-1.0, -0.4, 0.4, 2.0]), 2, bounds(-1, 2))  # step 1, codes 0..3
    assert encoded.codes.tolist() == [0, 1, 1, 3]
    assert encoded.values().tolist() == [-1, 0, 0, 2]


def test_symmetric_codes_by_hand_signed_and_unsigned():
    signed = encode(torch.tensor([-3.0, -0.6, 0.0, 1.4]), 3, bounds(-3, 1.4), symmetric=True)  # step 1, codes -3..3
    assert signed.codes.tolist() == [-3, -1, 0, 1]
    unsigned = encode(torch.tensor([0.0, 3.4, 7.0]), 3, bounds(0, 7), symmetric=True)  # step 1, codes 0..7
    assert unsigned.codes.tolist() == [0, 3, 7]
    assert unsigned.zero == 0


def test_what_lies_outside_gets_the_nearest_code():
    assert encode(torch.tensor([-9.0, 9.0]), 2, bounds(0, 3)).codes.tolist() == [0, 3]
    assert encode(torch.tensor([-9.0, 9.0]), 3, bounds(-3, 3), symmetric=True).codes.tolist() == [-3, 3]
    assert encode(torch.tensor([-9.0, 9.0]), 3, bounds(0, 7), symmetric=True).codes.tolist() == [0, 7]


def test_ranges_of_tensor_channel_and_sample():
    x = torch.tensor([[[1.0, 2.0], [3.0, -4.0]], [[5.0, 6.0], [0.0, 8.0]]])  # (N=2, C=2, 2)
    assert range_of(x) == (-4, 8)
    assert range_of(x, 0).low.tolist() == [[[-4.0]], [[0.0]]]
    assert range_of(x, 0).high.flatten().tolist() == [3, 8]
    assert range_of(x, 1).low.flatten().tolist() == [1, -4]
    assert range_of(x, 1).high.shape == (1, 2, 1)
    assert over_batch(range_of(x, 0), "extreme") == range_of(x)
    assert over_batch(range_of(x, 0), "mean") == (-2, 5.5)


def test_each_channel_has_its_own_step():
    weight = torch.tensor([[0.0, 1.0, 3.0], [0.0, 100.0, 300.0]])
    assert torch.equal(quantise(weight, 2, range_of(weight, 0)), weight)
    assert not torch.equal(quantise(weight, 2), weight)


def test_running_ranges_begin_with_the_first_and_forget():
    first = averaged(None, bounds(-1, 1), 0.9)
    assert first == (-1, 1)
    second = averaged(first, bounds(-2, 4), 0.75)
    assert second == (-1.25, 1.75)


def test_a_constant_tensor_and_the_smallest_gradients_survive():
    assert torch.equal(quantise(torch.full((3,), 0.3), 4), torch.full((3,), 0.3))
    assert torch.equal(quantise(torch.zeros(3), 4, symmetric=True), torch.zeros(3))
    tiny = 1e-9 * torch.linspace(-1, 1, 11)
    torch.testing.assert_close(quantise(tiny, 16), tiny, rtol=1e-3, atol=1e-13)


def test_32_bits_and_nothing_at_all_come_back_as_they_are():
    x = torch.rand(3)
    assert quantise(x, 32) is x
    empty = torch.rand(0, 3)
    assert quantise(empty, 8) is empty


@pytest.mark.parametrize("bits", [0, 17, -1, True, 4.0, "8"])
def test_bits_out_of_range_are_named(bits):
    with pytest.raises(InputError, match=f"is {bits!r}"):
        encode(torch.rand(3), bits, bounds(0, 1))
    with pytest.raises(InputError, match="2 to 16"):
        encode(torch.rand(3), 1, bounds(0, 1), symmetric=True)
    with pytest.raises(InputError, match="activation"):
        Bits(activation=bits)


# ---- properties ----


@given(numbers, st.integers(1, 16), st.booleans())
@settings(max_examples=60, deadline=None)
def test_errors_are_at_most_half_a_step_and_order_stays(x, bits, symmetric):
    bits = max(bits, 2) if symmetric else bits
    encoded = encode(x, bits, range_of(x), symmetric=symmetric)
    values = encoded.values()
    assert (values - x).abs().max() <= 0.5 * encoded.step + 4e-7 * x.abs().max()
    order = x.argsort()
    assert (values[order].diff() >= 0).all()
    assert torch.equal(encoded.codes, encoded.codes.round())
    assert encoded.codes.max() - encoded.codes.min() <= 2**bits - 1


@given(numbers, st.integers(2, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_quantising_twice_changes_nothing_more(x, bits, symmetric):
    whole = range_of(x)
    once = encode(x, bits, whole, symmetric=symmetric)
    twice = encode(once.values(), bits, whole, symmetric=symmetric)
    unsure = once.step < 1e-6 * x.abs().max()  # steps below the resolution of float32
    assert unsure or torch.equal(once.codes, twice.codes)


@given(numbers, st.integers(2, 16), st.data())
@settings(max_examples=60, deadline=None)
def test_most_significant_bits_are_those_of_the_same_code(x, bits, data):
    kept = data.draw(st.integers(1, bits))
    encoded = encode(x, bits, range_of(x), symmetric=True)
    first = most_significant(encoded, kept)
    unit = 2 ** (bits - kept)
    assert torch.equal(first.codes % unit, torch.zeros_like(x))
    assert (first.codes - encoded.codes).abs().max() <= unit / 2
    assert (first.step, first.zero, first.bits) == (encoded.step, encoded.zero, bits)
    if kept == bits:
        assert torch.equal(first.codes, encoded.codes)


def test_most_significant_bits_by_hand():
    encoded = encode(torch.tensor([0.0, 7.0, 9.0, 100.0, 255.0]), 8, bounds(0, 255), symmetric=True)
    assert most_significant(encoded, 4).codes.tolist() == [0, 0, 16, 96, 256]
    with pytest.raises(InputError, match="9 most significant bits"):
        most_significant(encoded, 9)


@given(st.floats(-0.999, 0.999), st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(value, bits):
    count = 20_000
    x = torch.full((count,), value)
    encoded = encode(x, bits, bounds(-1, 1), generator=seeded())
    step = float(encoded.step)
    assert (encoded.values() - x).abs().max() < step * (1 + 1e-5)
    # the deviation of the mean is at most half a step over the root of the count; five of them never happen
    assert abs(float(encoded.values().double().mean()) - value) < 5 * 0.5 * step / math.sqrt(count) + 1e-6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_noise_is_even_and_independent_in_every_layout(layout):
    x = torch.zeros(50, 7, 9, 11).contiguous(memory_format=layout) + 0.25
    up = round_(x.clone(), seeded())
    assert up.stride() == x.stride()
    assert set(up.unique().tolist()) == {0.0, 1.0}
    flat = up.flatten().double()
    deviation = math.sqrt(0.25 * 0.75 / len(flat))
    assert abs(float(flat.mean()) - 0.25) < 5 * deviation
    for lag in (1, 2, 3, 4, 7):  # four numbers share a draw
        pairs = float((flat[:-lag] * flat[lag:]).mean())
        assert abs(pairs - 0.25**2) < 5 * math.sqrt(0.25**2 * (1 - 0.25**2) / len(flat))
    ends = round_(torch.tensor([0.0, 1.0, -3.0] * 1000), seeded())
    assert torch.equal(ends, torch.tensor([0.0, 1.0, -3.0] * 1000))


def test_stochastic_rounding_leaves_codes_alone_and_follows_its_generator():
    whole = torch.arange(16.0)
    assert torch.equal(quantise(whole, 4, generator=seeded()), whole)
    x = torch.rand(1000)
    assert torch.equal(quantise(x, 3, generator=seeded(1)), quantise(x, 3, generator=seeded(1)))
    assert not torch.equal(quantise(x, 3, generator=seeded(1)), quantise(x, 3, generator=seeded(2)))


def test_noise_differs_from_step_to_step():
    seeds = {
        seed_of_step(seed, step, stream) % 2**32 for seed in range(20) for step in range(200) for stream in range(3)
    }
    assert len(seeds) == 20 * 200 * 3


# ---- gradients, types ----


def test_the_gradient_passes_a_quantiser_exactly():
    x = torch.randn(5, 3, requires_grad=True)
    upstream = torch.randn(5, 3)
    quantise(x, 2).backward(upstream)
    assert torch.equal(x.grad, upstream)
    y = torch.randn(5, 3, requires_grad=True)
    straight_through(y, torch.zeros(5, 3)).backward(upstream)
    assert torch.equal(y.grad, upstream)


def test_the_gradient_is_changed_on_its_way_back_and_the_value_is_not():
    x = torch.randn(5, 3, requires_grad=True)
    output = gradient_through(x, lambda gradient: quantise(gradient, 2))
    assert torch.equal(output, x)
    upstream = torch.randn(5, 3)
    output.backward(upstream)
    assert torch.equal(x.grad, quantise(upstream, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("generator", [None, seeded()])
def test_type_and_layout_stay(dtype, layout, generator):
    x = torch.randn(2, 3, 4, 5).to(dtype).contiguous(memory_format=layout)
    for bounds_ in (None, range_of(x, 0), range_of(x, 1)):
        y = quantise(x, 6, bounds_, generator=generator)
        assert (y.dtype, y.stride()) == (x.dtype, x.stride())


# ---- layers ----


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, padding=1), nn.Linear(5, 4), nn.ConvTranspose2d(3, 4, 2)])
def test_a_layer_computes_with_the_rounded_operands(layer):
    layer = copy.deepcopy(layer)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    quantised = QuantisedLayer(layer, Bits(4, 3, 5), generator=seeded())
    plain = copy.deepcopy(layer)  # a copy has its plain forward
    output = layer(x)
    upstream = torch.randn_like(output)
    output.backward(upstream)

    per = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    with torch.no_grad():
        plain.weight.copy_(quantise(plain.weight, 3, range_of(plain.weight, per)))
    x_plain = quantise(x.detach(), 4).requires_grad_()
    expected = plain(x_plain)
    assert torch.equal(output, expected)
    expected.backward(quantise(upstream, 5, generator=seeded()))
    assert torch.equal(x.grad, x_plain.grad)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, dict(plain.named_parameters())[name].grad), name
    quantised.remove()
    assert "forward" not in layer.__dict__


def test_a_layer_of_32_bits_is_the_plain_one_and_single_operands_can_be_left_alone():
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    plain = layer(x)
    quantised = QuantisedLayer(layer, generator=seeded())
    assert torch.equal(layer(x), plain)
    quantised.bits = Bits(activation=2)
    assert torch.equal(layer(x), functional.linear(quantise(x, 2), layer.weight, layer.bias))
    quantised.bits = Bits(gradient=2)
    assert torch.equal(layer(x), plain)
    with hooks_idle():
        quantised.bits = Bits(2, 2, 2)
        assert torch.equal(layer(x), plain)


def test_a_transposed_convolution_may_be_told_the_size_that_it_puts_out():
    layer = nn.ConvTranspose2d(3, 2, 2, 2)
    QuantisedLayer(layer, Bits(8, 8, 8), generator=seeded())
    assert layer(torch.randn(1, 3, 4, 4), output_size=[9, 8]).shape == (1, 2, 9, 8)


def test_bits_of_the_forward_pass_hold_in_its_backward_pass():
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    quantised = QuantisedLayer(layer, Bits(gradient=2), generator=seeded())
    output = layer(x)
    quantised.bits = Bits()
    upstream = torch.randn(3, 4)
    output.backward(upstream)
    assert torch.equal(layer.bias.grad, quantise(upstream, 2, generator=seeded()).sum(0))


def test_evaluation_uses_the_running_range_of_training():
    layer = nn.Linear(2, 2)
    quantised = QuantisedLayer(layer, Bits(activation=4), generator=seeded(), memory=0.5)
    outlier = torch.tensor([[0.0, 100.0]])
    layer.eval()(outlier)
    assert quantised.ranges.running is None  # before training there is none: the batch's own serves
    layer.train()(torch.tensor([[0.0, 15.0]]))
    layer(torch.tensor([[0.0, 45.0]]))
    assert quantised.ranges.running == (0, 30)
    with torch.no_grad():
        layer(outlier)
    layer.eval()
    expected = functional.linear(torch.tensor([[0.0, 30.0]]), layer.weight, layer.bias)
    torch.testing.assert_close(layer(outlier), expected)
    assert quantised.ranges.running == (0, 30)


def test_a_vector_has_one_range_where_each_sample_of_a_batch_has_its_own():
    ranges = LayerRanges(nn.Linear(3, 2), "sample", 0.9)
    vector = torch.tensor([1.0, -2.0, 4.0])
    assert ranges.of(vector) == (-2, 4)
    assert ranges.of(torch.stack([vector, 2 * vector])).high.tolist() == [[4], [8]]
    assert LayerRanges(nn.Linear(3, 2), "mean", 0.9).of(torch.stack([vector, 2 * vector])) == (-3, 6)


def test_ranges_by_sample_are_the_samples_own_in_training_and_evaluation():
    layer = nn.Conv2d(3, 4, 3)
    QuantisedLayer(layer, Bits(activation=3, gradient=4), generator=seeded(), ranges="sample")
    x = images(3)
    louder = torch.cat([x[:2], 100 * x[2:]])
    for training in (True, False):
        layer.train(training)
        assert torch.equal(layer(louder)[:2], layer(x)[:2])
        expected = functional.conv2d(quantise(x[:1], 3), layer.weight, layer.bias)
        torch.testing.assert_close(layer(louder)[:1], expected)
    upstream = torch.randn(3, 4, 6, 6) * torch.tensor([1.0, 1.0, 100.0]).view(-1, 1, 1, 1)
    x = louder.requires_grad_()
    layer(x).backward(upstream)
    rounded = quantise(upstream, 4, range_of(upstream, 0), generator=seeded())
    torch.testing.assert_close(layer.bias.grad, rounded.sum((0, 2, 3)))
    assert min(len(one.unique()) for one in rounded) > 10  # the quieter ones have nearly all of the 16 codes, too


def test_the_layer_says_how_it_computes():
    layer = nn.Linear(2, 2)
    declare(layer, Bits(3, 4, 6).arithmetic())
    assert layer.arithmetic.operands("error") == (6, 4)
    assert layer.arithmetic.whole == PASSES
    declare(layer, Bits().arithmetic())
    assert not hasattr(layer, "arithmetic")


def test_autocast_hands_back_its_own_type():
    layer = nn.Conv2d(3, 4, 3)
    QuantisedLayer(layer, Bits(8, 8, 8), generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(images(2).contiguous(memory_format=torch.channels_last))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


# ---- which layers ----


def test_all_but_the_classifier_are_quantised():
    model = make("residual")
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert list(quantisable(model)) == convolutions


def test_what_cannot_be_quantised_is_refused_by_name():
    with pytest.raises(InputError, match="nothing to quantise"):
        quantisable(nn.Sequential(nn.Linear(2, 2)))
    model = make("plain")
    QuantisedLayer(model[0], generator=seeded())
    with pytest.raises(InputError, match="another method decides how layer '0' computes"):
        quantisable(model)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 1)))
    with pytest.raises(InputError, match="layer '0' is computed by a parametrization"):
        quantisable(normed)


def test_projections_of_attention_are_left_alone():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 1), "b": nn.Linear(4, 4), "c": nn.Linear(4, 2)})
    assert list(quantisable(model)) == ["b"]
