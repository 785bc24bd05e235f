import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import earlybird as eb
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.precision.predictive_sign import PredictiveSign, mixed_gradient
from earlybird.precision.quantize import encode, most_significant, over_batch, range_of
from tests.tickets.test_early_bird import batch, sgd, train
from tests.tickets.topologies import images, make


def begin(name="residual", total=20, **settings):
    model = make(name)
    optimizer = sgd(model)
    return model, optimizer, PredictiveSign(**settings).attach(model, optimizer, total_steps=total)


def codes_of(x, bits, bounds):
    return encode(x.detach(), bits, bounds, symmetric=True)


def reference(layer, x, upstream, beta=0.05):
    """Output, input gradient and mixed weight gradient of one convolution, by autograd on rounded operands."""
    inputs = codes_of(x, 8, over_batch(range_of(x, 0), "mean"))
    weights = codes_of(layer.weight, 8, range_of(layer.weight, 0)).values()
    outputs = codes_of(upstream, 16, range_of(upstream))
    found = []
    for x_, y_ in ((inputs, outputs), (most_significant(inputs, 4), most_significant(outputs, 10))):
        operands = [x_.values().requires_grad_(), weights.clone().requires_grad_()]
        output = layer._conv_forward(*operands, layer.bias)
        output.backward(y_.values())
        found.append((output.detach(), *[operand.grad for operand in operands]))
    (output, of_input, full), (_, _, first) = found
    return output, of_input, mixed_gradient(first, full, beta)


# ---- the definition ----


def test_small_gradients_are_those_of_the_full_one_by_hand():
    first, full = torch.tensor([1.0, -0.04, 0.06, 0.0]), torch.tensor([2.0, 0.5, -0.1, -3.0])
    mixed, sure = mixed_gradient(first, full, beta=0.05)
    assert mixed.tolist() == pytest.approx([1.0, 0.5, 0.06, -3.0])
    assert sure.tolist() == [True, False, True, False]
    assert mixed_gradient(first, full, 0.05, threshold=0.5)[0].tolist() == pytest.approx([1.0, 0.5, -0.1, -3.0])
    assert torch.equal(mixed_gradient(first, full, 0.0)[0], first)  # all are trusted
    assert torch.equal(mixed_gradient(first, full, 0.0, threshold=9.0)[0], full)  # none is


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
        nn.Conv2d(3, 4, (2, 3), padding="same", dilation=(1, 2)),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(3, 4, 3),
    ],
)
@pytest.mark.parametrize("nonnegative", [True, False])
def test_a_convolution_against_autograd_on_rounded_operands(layer, nonnegative):
    model = nn.Sequential(copy.deepcopy(layer))
    x = torch.randn(5, layer.in_channels, 6, 6) if layer.weight.ndim == 4 else torch.randn(5, 3, 9)
    x = (x.abs() if nonnegative else x).requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    running = PredictiveSign().attach(model, optimizer)
    output = model(x)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    expected, of_input, (mixed, sure) = reference(layer, x, upstream)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(x.grad, of_input)
    torch.testing.assert_close(model[0].weight.grad, mixed)
    if layer.bias is not None:
        torch.testing.assert_close(model[0].bias.grad, upstream.transpose(0, 1).flatten(1).sum(1), rtol=1e-3, atol=1e-3)
    optimizer.step()
    assert torch.equal(model[0].weight.grad, mixed.sign())
    torch.testing.assert_close(model[0].weight.data, layer.weight - 0.25 * mixed.sign())
    assert running.shares()["predicted"]["0"] == pytest.approx(float(sure.float().mean()))


def test_only_weights_of_convolutions_are_signed():
    model, optimizer, _ = begin("plain")
    train(model, optimizer, 1)
    for name, parameter in model.named_parameters():
        signed = bool((parameter.grad.abs() <= 1).all() and torch.equal(parameter.grad, parameter.grad.sign()))
        assert signed == (name in ("0.weight", "3.weight")), name


def test_signs_are_of_the_gradient_that_was_accumulated():
    model, optimizer, _ = begin("plain")
    both = []
    for step in range(2):
        x, y = batch(step)
        functional.cross_entropy(model(x), y).backward()
        both.append(model[0].weight.grad.clone())
    optimizer.step()
    assert torch.equal(model[0].weight.grad, both[1].sign())
    assert not torch.equal(model[0].weight.grad, both[0].sign())


def test_sign_sgd_is_the_sign_of_the_plain_gradient():
    model, optimizer, running = begin("plain", sign_of="full")
    plain = make("plain")
    for net in (plain, model):
        functional.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    assert torch.equal(model[3].weight.grad, plain[3].weight.grad.sign())
    assert torch.equal(model[3].bias.grad, plain[3].bias.grad)
    assert running.status() == {}
    assert not hasattr(model[0], "arithmetic")


def test_a_fused_optimizer_that_unscales_steps_by_signs():
    model = make("plain")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, fused=True)
    PredictiveSign().attach(model, optimizer)
    before = model[0].weight.detach().clone()
    (8.0 * functional.cross_entropy(model(batch(0)[0]), batch(0)[1])).backward()
    gradient = model[0].weight.grad.clone()
    optimizer.grad_scale = torch.tensor(8.0)  # as GradScaler sets it
    optimizer.step()
    torch.testing.assert_close(model[0].weight.data, before - 0.25 * gradient.sign())


def test_before_its_beginning_training_is_plain():
    model, optimizer, _ = begin("plain", sign_from="3it")
    plain = make("plain")
    train(plain, sgd(plain), 3)
    train(model, optimizer, 3)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)
    train(model, optimizer, 1, start=3)
    assert torch.equal(model[0].weight.grad, model[0].weight.grad.sign())


def test_evaluation_uses_the_running_range():
    model, optimizer, running = begin("plain", sign_range_memory=0.5)
    layer = running._layers["0"]
    train(model, optimizer, 2)
    means = [over_batch(range_of(batch(step)[0], 0), "mean") for step in range(2)]
    assert torch.equal(layer.ranges.running.high, means[0].high.lerp(means[1].high, 0.5))
    before = layer.ranges.running
    model.eval()(images())
    assert layer.ranges.running is before


# ---- what is known about it ----


def test_predicted_signs_are_right_and_the_others_less_often():
    model, optimizer, running = begin("residual")
    train(model, optimizer, 5)
    shares = running.shares()
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert all(list(shares[key]) == convolutions for key in shares)
    right, below = (sum(shares[key].values()) / len(convolutions) for key in ("right", "right_below"))
    assert below < right
    assert right > 0.9
    assert running.status()["predicted"].endswith("%")


def test_more_bits_predict_more_rightly():
    right = []
    for bits in (2, 8):
        model, optimizer, running = begin("plain", predictor_bits=bits, predictor_gradient_bits=16)
        train(model, optimizer, 2)
        right.append(running.shares()["right"]["3"])
    assert right[0] < right[1] == 1.0


def test_each_hundred_steps_the_shares_are_written_down():
    model, optimizer, running = begin("plain")
    running._steps = 98
    train(model, optimizer, 2)
    entry = running.history[0]
    assert entry["step"] == 100
    assert list(entry["predicted"]) == ["0", "3"]
    assert running.shares()["predicted"] == {}
    assert running.status()["predicted"].endswith("%")


def test_the_bill_charges_the_predictor_for_what_it_predicted():
    model, optimizer, running = begin("plain")
    price = count(model, images(1)).layers
    train(model, optimizer, 2)
    expected = 0.0
    for name, cost in price.items():
        if name not in ("0", "3"):
            expected += 32 * (cost.macs + cost.error_macs + cost.weight_macs)
            continue
        share = running.shares()["predicted"][name]
        weight_pass = share * 4 * 10 + (1 - share) * 8 * 16
        expected += 32 / 1024 * (8 * 8 * cost.macs + 16 * 8 * cost.error_macs + weight_pass * cost.weight_macs)
    assert math.isclose(running.bill().phases["train"].bit_macs.value, expected, rel_tol=1e-6)


# ---- in company ----


def test_autocast_and_channels_last_train():
    model, optimizer, running = begin("depthwise")
    model.to(memory_format=torch.channels_last)
    for step in range(2):
        x, y = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x.contiguous(memory_format=torch.channels_last))
        functional.cross_entropy(output.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())
    assert running.shares()["right"]


def test_the_ticket_is_drawn_under_it():
    model, optimizer, running = begin("residual")
    search = eb.EarlyBird(keep=0.5, look_every="1it", skip="1it", deadline="3it", window=2, round_to=1).attach(
        model, optimizer, example_inputs=images(2), steps_per_epoch=5
    )
    with pytest.warns(UserWarning, match="no agreement"):
        train(model, optimizer, 6)
    assert search.drawn
    assert torch.equal(model[0].weight.grad, model[0].weight.grad.sign())
    assert running.bill().total.steps.value == 6


@pytest.mark.parametrize("stop", [1, 4])
def test_stopped_and_resumed_ends_in_the_same_bits(stop):
    whole, optimizer, running = begin(sign_from="2it")
    train(whole, optimizer, 6)
    first, first_optimizer, first_running = begin(sign_from="2it")
    train(first, first_optimizer, stop)
    saved = copy.deepcopy((first_running.state_dict(), first.state_dict(), first_optimizer.state_dict()))
    second, second_optimizer, second_running = begin(sign_from="2it")
    for owner, state in zip((second_running, second, second_optimizer), saved):
        owner.load_state_dict(state)
    train(second, second_optimizer, 6 - stop, start=stop)
    for one, two in zip(second.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(second.eval()(images()), whole.eval()(images()))
    assert second_running.shares() == running.shares()


def test_detached_it_leaves_the_plain_model_and_its_gradients():
    model, optimizer, running = begin("plain")
    running.detach()
    plain = copy.deepcopy(model)
    train(model, optimizer, 1)
    train(plain, sgd(plain), 1)
    assert torch.equal(model[0].weight, plain[0].weight)
    assert not hasattr(model[0], "arithmetic")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sign_of": "half"}, "sign_of is 'half'"),
        ({"sign_bits": 1}, "sign_bits is 1"),
        ({"sign_gradient_bits": 17}, "sign_gradient_bits is 17"),
        ({"predictor_bits": 0}, "predictor_bits is 0"),
        ({"predictor_bits": 9}, "predictor_bits is 9; at most sign_bits, 8"),
        ({"sign_gradient_bits": 8}, "predictor_gradient_bits is 10; at most sign_gradient_bits, 8"),
        ({"predictor_beta": 1.5}, "predictor_beta is 1.5"),
        ({"predictor_threshold": -1.0}, "predictor_threshold is -1.0"),
        ({"sign_range_memory": 1}, "sign_range_memory is 1"),
        ({"sign_from": "soon"}, "soon"),
    ],
)
def test_wrong_settings_name_the_value(settings, said):
    with pytest.raises(InputError, match=said):
        PredictiveSign(**settings)


def test_what_it_cannot_do_is_refused_by_name():
    model, optimizer, _ = begin("plain")
    with pytest.raises(InputError, match="another method decides how layer '0' computes"):
        PredictiveSign().attach(model, optimizer)
    with pytest.raises(InputError, match="layer '3' is a ConvTranspose2d"):
        PredictiveSign().attach(make("transposed"), optimizer)
    with pytest.raises(InputError, match="Sequential has no convolution"):
        PredictiveSign().attach(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), optimizer)
    with pytest.raises(InputError, match="no optimizer"):
        PredictiveSign().attach(make("plain"), [])
