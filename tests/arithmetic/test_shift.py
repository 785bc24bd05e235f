import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from earlybird.arithmetic.fixed_point import floor_to
from earlybird.arithmetic.shift import (
    ShiftConv2d,
    ShiftLinear,
    nearest_power_of_two,
    power_of_two,
    signed_power_of_two,
)
from earlybird.cost.count import count
from earlybird.errors import InputError


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(layer, seed=0):
    layer.reset_parameters(torch.Generator().manual_seed(seed))
    return layer


def test_powers_of_two_are_exact():
    exponents = torch.arange(-126, 128)
    assert power_of_two(exponents).tolist() == [2.0**e for e in range(-126, 128)]


@pytest.mark.parametrize(
    ("shift", "sign", "weight"),
    [
        (-1.4, 0.7, 0.5), (-1.4, -0.7, -0.5), (-1.6, 0.51, 0.25), (-1.4, 0.5, 0.0), (-1.4, -0.2, 0.0),
        (0.0, 3.0, 1.0), (2.0, 1.0, 1.0), (-20.0, -1.0, -(2.0**-14)),
    ],
)  # fmt: skip
def test_shift_and_sign_by_hand(shift, sign, weight):
    p, s = torch.tensor([shift], requires_grad=True), torch.tensor([sign], requires_grad=True)
    found = signed_power_of_two(p, s)
    (6 * found).sum().backward()
    assert found.item() == weight
    assert p.grad.item() == pytest.approx(6 * weight * math.log(2))
    assert s.grad.item() == 6  # so that a zero can come back


@pytest.mark.parametrize(
    ("real", "weight"),
    [(0.3, 0.25), (-0.4, -0.5), (2.0, 1.0), (1e-9, 2.0**-15), (-0.0625, -0.0625), (0.0, 0.0)],
)
def test_a_rounded_weight_by_hand(real, weight):
    w = torch.tensor([real], requires_grad=True)
    found = nearest_power_of_two(w)
    (6 * found).sum().backward()
    assert found.item() == weight
    assert w.grad.item() == 6


@pytest.mark.parametrize(("bits", "least"), [(2, 0), (3, -2), (5, -14), (7, -62)])
def test_bits_are_those_of_sign_and_exponent(bits, least):
    shift = torch.full((1,), -100.0)
    assert signed_power_of_two(shift, torch.ones(1), bits=bits).item() == 2.0**least
    assert nearest_power_of_two(torch.full((1,), 1e-30), bits=bits).item() == 2.0 ** (least - 1)


def test_a_double_keeps_its_type():
    shift = torch.tensor([-3.0], dtype=torch.float64)
    assert signed_power_of_two(shift, torch.ones_like(shift)).dtype == torch.float64
    assert nearest_power_of_two(shift).dtype == torch.float64


class TestLayers:
    def test_a_shift_layer_is_the_convolution_with_its_weight(self):
        x = seeded(2, 4, 7, 6)
        for form in ("q", "ps", "frozen"):
            layer = ShiftConv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, form=form)
            plain = functional.conv2d(x, layer.weight, layer.bias, (2, 1), (1, 0), 1, 2)
            assert torch.equal(layer(x), plain)
            reflected = ShiftConv2d(4, 6, 3, padding=1, padding_mode="reflect", form=form)
            padded = functional.pad(x, (1, 1, 1, 1), mode="reflect")
            torch.testing.assert_close(reflected(x), functional.conv2d(padded, reflected.weight, reflected.bias))
            linear = ShiftLinear(6, 5, form=form)
            assert torch.equal(linear(x), functional.linear(x, linear.weight, linear.bias))

    def test_weights_are_drawn_as_published(self):
        conv, linear = drawn(ShiftConv2d(64, 64, 3, form="ps")), drawn(ShiftLinear(200, 100, form="ps"))
        for layer, low, high in ((conv, -10, -1), (linear, -14, 0)):
            shift = layer.shift.detach()
            assert low <= float(shift.min()) < low + 0.1
            assert high - 0.1 < float(shift.max()) <= high
        for layer in (conv, linear):
            sign = layer.sign.detach()
            assert (float(sign.min()), float(sign.max())) == (pytest.approx(-1, abs=0.01), pytest.approx(1, abs=0.01))
            assert float((layer.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.03)
        real = drawn(ShiftConv2d(64, 64, 3)).real.detach()
        assert float(real.abs().max()) == pytest.approx(1 / math.sqrt(64 * 9), rel=0.01)  # Kaiming uniform
        assert drawn(ShiftConv2d(8, 8, 3, form="ps", bits=3)).shift.min().item() == -2

    def test_one_generator_one_layer(self):
        for form in ("q", "ps", "frozen"):
            one, two, other = (drawn(ShiftConv2d(2, 3, 3, form=form), seed) for seed in (5, 5, 6))
            assert torch.equal(one.weight, two.weight)
            assert torch.equal(one.bias, two.bias)
            assert not torch.equal(one.weight, other.weight)

    def test_in_training_the_shift_is_clipped_in_place(self):
        layer = ShiftConv2d(1, 1, 1, form="ps")
        nn.init.constant_(layer.shift, -20)
        layer.eval()(seeded(1, 1, 1, 1))
        assert layer.shift.item() == -20
        layer.train()(seeded(1, 1, 1, 1)).sum().backward()
        assert layer.shift.item() == -14

    def test_it_learns(self):
        """A single weight finds the power of two and the sign that were asked of it."""
        layer = ShiftLinear(1, 1, bias=False, form="ps")
        nn.init.constant_(layer.shift, -1)
        nn.init.constant_(layer.sign, 0.9)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        x = seeded(64, 1)
        for _ in range(200):
            optimizer.zero_grad()
            (layer(x) + 0.25 * x).square().mean().backward()
            optimizer.step()
        assert layer.weight.item() == -0.25

    def test_frozen_weights_are_drawn_once_and_cost_no_gradient(self):
        layer = drawn(ShiftConv2d(64, 64, 3, form="frozen"))
        assert not any(layer.get_parameter(name).requires_grad for name in ("shift", "sign"))
        assert layer.bias.requires_grad
        assert torch.equal(layer.shift, layer.shift.round())
        assert (layer.shift.min().item(), layer.shift.max().item()) == (-7, 0)
        assert layer.shift.mean().item() == pytest.approx(-3.5, abs=0.05)
        assert float((layer.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.03)
        pruned = drawn(ShiftConv2d(64, 64, 3, form="frozen", threshold=0.8))
        assert float((pruned.weight == 0).float().mean()) == pytest.approx(0.8, abs=0.03)
        model = nn.Sequential(nn.Conv2d(3, 64, 1), layer)
        assert count(model, seeded(2, 3, 4, 4)).layers["1"].weight_macs == 0
        assert count(model, seeded(2, 3, 4, 4)).layers["1"].error_macs == 4 * 64 * 64 * 9

    def test_copies_and_saved_states_are_the_same_layer(self):
        for form, names in (("q", {"real", "bias"}), ("ps", {"shift", "sign", "bias"})):
            layer, x = ShiftConv2d(2, 3, 3, form=form), seeded(1, 2, 4, 4)
            other = copy.deepcopy(layer)
            assert torch.equal(layer(x), other(x))
            assert set(layer.state_dict()) == set(dict(layer.named_parameters())) == names
            fresh = ShiftConv2d(2, 3, 3, form=form)
            fresh.load_state_dict(layer.state_dict())
            assert torch.equal(layer(x), fresh(x))

    def test_its_weight_cannot_be_set(self):
        with pytest.raises((AttributeError, KeyError)):
            ShiftConv2d(2, 3, 3).weight = nn.Parameter(torch.zeros(3, 2, 3, 3))

    def test_the_bill_sees_shifts(self):
        arithmetic = ShiftConv2d(2, 3, 3).arithmetic
        assert arithmetic.operations("forward") == {"shift 32": 1, "add fp32": 1}
        assert arithmetic.bit_macs("forward") == 5 / 32
        assert ShiftLinear(2, 3, fraction_bits=16).arithmetic.operations("forward") == {"shift 32": 1, "add 32": 1}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"form": "pq"}, "form 'pq'"),
            ({"bits": 1}, "shift weights of 1 bits; a whole number from 2 to 7"),
            ({"bits": 8}, "of 8 bits"),
            ({"bits": True}, "of True bits"),
            ({"threshold": 1.0}, "threshold 1.0"),
            ({"fraction_bits": 0}, "0 bits after the point; a whole number from 1 to 16, or none"),
        ],
    )
    def test_bad_settings_are_named(self, settings, message):
        for make in (lambda **s: ShiftConv2d(2, 2, 1, **s), lambda **s: ShiftLinear(2, 2, **s)):
            with pytest.raises(InputError, match=message):
                make(**settings)


class TestFixedPoint:
    def test_numbers_are_floored_and_clipped_and_gradients_pass(self):
        x = torch.tensor([0.3, -0.3, 0.25, 40000.0, -40000.0], requires_grad=True)
        found = floor_to(x, 2)
        found.sum().backward()
        assert found.tolist() == [0.25, -0.5, 0.25, 2.0**15 - 0.25, -(2.0**15)]
        assert x.grad.tolist() == [1] * 5

    def test_inputs_of_a_shift_layer_are_floored(self):
        layer, x = ShiftConv2d(2, 3, 1, fraction_bits=4), seeded(2, 2, 3, 3).requires_grad_()
        layer(x).sum().backward()
        assert torch.equal(layer(x), functional.conv2d(floor_to(x, 4), layer.weight, layer.bias))
        assert torch.allclose(x.grad, layer.weight.sum(0).view(1, 2, 1, 1).expand_as(x))

    @pytest.mark.parametrize("make", [lambda **s: ShiftConv2d(2, 3, 1, **s), lambda **s: ShiftLinear(3, 3, **s)])
    def test_autocast_leaves_it_its_bits(self, make):
        layer, x = make(fraction_bits=16), seeded(2, 2, 3, 3)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), layer(x).float())
            assert make()(x).dtype == torch.bfloat16
            found = layer(x.bfloat16())
        assert torch.equal(found, layer(x.bfloat16().float()))
