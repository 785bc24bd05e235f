import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from earlybird.cost.arithmetic import Arithmetic
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.precision.int8 import ARITHMETIC, Int8Layer, check_device, convolve, wide
from earlybird.precision.progressive import ProgressivePrecision

needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no int8 instructions")


def layer(inputs=8, outputs=6, seed=0, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Conv2d(inputs, outputs, 3, **settings)


def image(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


def rounded(x, weight, signed):
    """Both operands as the codes have them, float64."""
    x_step = x.abs().max().double() / (126 if signed else 254)
    steps = weight.abs().amax((1, 2, 3), keepdim=True).double() / 127
    return (x.double() / x_step).round() * x_step, (weight.double() / steps).round() * steps


@needs_vnni
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"padding": 1, "bias": False}, {"stride": 2, "padding": (1, 0)}, {"dilation": 2, "padding": 2}]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_convolution_of_the_codes(signed, settings, layout):
    own = layer(**settings)
    x = image(4, 8, 9, 9).contiguous(memory_format=layout)
    x = x if signed else x.abs()
    output = convolve(x, own)
    x_rounded, weight = rounded(x, own.weight.detach(), signed)
    expected = functional.conv2d(
        x_rounded, weight, None if own.bias is None else own.bias.double(), own.stride, own.padding, own.dilation
    )
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=2**-8 * float(expected.abs().max()) / 8)


@needs_vnni
def test_gradients_are_those_of_the_rounded_weight():
    own = layer(padding=1)
    x = image(4, 8, 6, 6).abs().requires_grad_()
    output = convolve(x, own)
    upstream = image(*output.shape, seed=2).bfloat16()
    output.backward(upstream)
    weight = rounded(x.detach(), own.weight.detach(), False)[1].bfloat16().requires_grad_()
    copy_of_x, bias = x.detach().bfloat16().requires_grad_(), own.bias.detach().bfloat16().requires_grad_()
    functional.conv2d(copy_of_x, weight, bias, padding=1).backward(upstream)
    for ours, theirs in ((x, copy_of_x), (own.weight, weight), (own.bias, bias)):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(
            ours.grad, theirs.grad.float(), rtol=2**-6, atol=2**-6 * float(theirs.grad.abs().max())
        )


@needs_vnni
def test_zeros_stay_and_what_overflowed_is_no_number_again():
    own = layer(bias=False)
    assert torch.equal(convolve(torch.zeros(1, 8, 4, 4), own), torch.zeros(1, 6, 2, 2, dtype=torch.bfloat16))
    for bad in (math.nan, math.inf):
        x = torch.ones(1, 8, 4, 4)
        x[0, 0, 0, 0] = bad
        assert not convolve(x, own).isfinite().all()


@needs_vnni
def test_a_layer_is_plain_until_it_is_switched_on():
    own, x = layer(), image(2, 8, 5, 5)
    plain = own(x)
    ours = Int8Layer(own)
    assert torch.equal(own(x), plain)
    ours.active = True
    assert own(x).dtype == torch.bfloat16
    assert own(x[:0]).shape == (0, 6, 3, 3)
    assert torch.equal(copy.deepcopy(own)(x), plain)
    ours.remove()
    assert torch.equal(own(x), plain)


def test_only_wide_plain_convolutions_are_worth_it():
    layers = {
        "narrow": layer(32, 64), "grouped": layer(128, 128, groups=2), "same": layer(64, 64, padding="same"),
        "mirrored": layer(64, 64, padding_mode="reflect"), "wide": layer(64, 64, padding=1),
    }  # fmt: skip
    found = wide(nn.ModuleDict(layers))
    assert [*found] == ["wide"]
    with pytest.raises(InputError, match="no plain convolution from 64 channels to 64"):
        wide(nn.Sequential(layer()))


def test_a_device_without_the_kernels_is_refused(monkeypatch):
    with pytest.raises(InputError, match=r"rung int8 on cuda.*begin the ladder with bf16"):
        check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(InputError, match="a CPU without VNNI"):
        ProgressivePrecision(forward_ladder="int8").attach(network(), torch.optim.SGD([nn.Parameter(torch.ones(1))]))


@needs_vnni
def test_as_the_first_rung_of_a_ladder():
    model = network()
    price = count(model, image(1, 3, 8, 8)).layers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    running = ProgressivePrecision(forward_ladder="int8,bf16", rungs_at=("2it",)).attach(model, optimizer)
    assert model[3].arithmetic == ARITHMETIC
    assert running.status() == {"bits": "int8"}
    assert running.history[0]["layers"] == {"3": [8, 8, 16]}
    x, dtypes = image(4, 3, 8, 8), []
    model[3].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    for step in range(3):
        output = model(x)
        assert output.dtype == torch.float32
        loss = functional.cross_entropy(output, torch.arange(4))
        loss.backward()
        optimizer.step()
        assert hasattr(model[3], "arithmetic") == (step == 0)
    assert running.history[1]["layers"] == {"3": [16, 16, 16]}
    spent = running.bill().phases["train"].bit_macs.value
    half = Arithmetic.of_floats(16)
    expected = 0.0
    for name, cost in price.items():
        for images, arithmetic in ((8, ARITHMETIC if name == "3" else half), (4, half)):
            for pass_, macs in (("forward", cost.macs), ("error", cost.error_macs), ("weight", cost.weight_macs)):
                expected += images * macs * arithmetic.bit_macs(pass_)
    assert spent == pytest.approx(expected)
    running.detach()
    assert "forward" not in model[3].__dict__


@needs_vnni
def test_it_trains_like_bf16():
    losses = []
    for ladder in ("int8", "bf16"):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        ProgressivePrecision(forward_ladder=ladder).attach(model, optimizer)
        for _ in range(60):
            loss = functional.cross_entropy(model(image(16, 3, 8, 8)), torch.arange(16) % 5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] < 0.5 * math.log(5)
    assert abs(losses[0] - losses[1]) < 0.1


@needs_vnni
@pytest.mark.parametrize("signed", [False, True])
def test_the_largest_number_does_not_wrap_around_in_bf16(signed):
    """Near the last code, bf16 knows halves only, and one rounding more made 128 of 127.5: code 0 for the largest."""
    own = layer(padding=1, bias=False)
    for seed in range(40):
        x = image(2, 8, 4, 4, seed=seed)
        x = (x if signed else x.abs()).bfloat16()
        expected = functional.conv2d(x.float(), own.weight.detach(), padding=1)
        error = (convolve(x, own).detach().float() - expected).abs().max() / expected.abs().max()
        assert float(error) < 0.05
