import copy

import pytest
import torch
from torch import nn

import earlybird as eb
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.precision.fractional import FractionalPrecision, _Choose, cost_of, rounded
from earlybird.precision.quantize import Bits, Range, quantise, range_of
from earlybird.skipping.layers import LayerSkipping
from tests.skipping.test_layers import BLOCK_MACS, deep
from tests.tickets.test_early_bird import QUICK, batch, sgd, train
from tests.tickets.topologies import images, make

STRIDED_MACS = (8 * 12 * 9 + 12 * 12 * 9 + 8 * 12) * 16
CHEAPEST, DEAREST = Bits(3, 4, 6), Bits(6, 4, 12)


def start(model=None, **settings):
    model = make("residual") if model is None else model
    optimizer = sgd(model)
    attach = {key: settings.pop(key) for key in ("total_steps", "steps_per_epoch", "ledger", "seed") if key in settings}
    running = FractionalPrecision(**settings).attach(model, optimizer, example_inputs=images(2), **attach)
    return model, optimizer, running


def prefer(running, *scores):
    """Let the gates say the same of all samples."""
    with torch.no_grad():
        running._gate.network.head.weight.zero_()
        running._gate.network.head.bias.copy_(torch.tensor(scores))


# ---- rounding ----


def test_the_cost_of_candidates_is_the_published_one():
    assert cost_of(Bits(8, 8, 8)) == pytest.approx(0.0625)
    assert cost_of(Bits(6, 6, 8)) == pytest.approx(0.043, abs=5e-5)
    assert cost_of(Bits(3, 3, 6)) == pytest.approx(0.0146, abs=5e-5)
    assert cost_of(CHEAPEST) == pytest.approx(0.0176, abs=5e-5)
    assert cost_of(Bits()) == 1


def test_each_sample_is_rounded_by_its_own_bits_within_one_range():
    x = torch.randn(4, 3, 5, 5)
    bits = torch.tensor([2, 8, 2, 5])
    ours = rounded(x, bits, range_of(x))
    for row, number in enumerate(bits.tolist()):
        torch.testing.assert_close(ours[row], quantise(x, number, range_of(x))[row])
    assert len(ours[0].unique()) <= 4


def test_a_sample_with_a_range_of_its_own_does_not_know_of_larger_ones():
    x = torch.randn(3, 2, 4)
    bits = torch.tensor([3, 3, 5])
    ours = rounded(x, bits, range_of(x, 0))
    louder = torch.cat([x[:2], 1000 * x[2:]])
    assert torch.equal(rounded(louder, bits, range_of(louder, 0))[:2], ours[:2])
    for row, number in enumerate(bits.tolist()):
        torch.testing.assert_close(ours[row], quantise(x[row], number, range_of(x[row])))
    assert not torch.equal(rounded(louder, bits, range_of(louder))[:2], ours[:2])


def test_stochastic_rounding_is_right_in_the_mean_and_stays_in_its_range():
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-1, 1, 7).expand(400, 7).contiguous()
    ours = rounded(x, torch.full((400,), 2), Range(torch.tensor(-1.0), torch.tensor(1.0)), generator)
    torch.testing.assert_close(ours.mean(0), x[0], atol=0.06, rtol=0)
    assert float(ours.abs().max()) <= 1 + 1e-6


def test_the_gradient_of_a_choice_by_hand():
    """The value is that of the chosen candidate; each candidate gets what its rounding changes, times the gradient."""
    x = torch.tensor([[0.0, 0.4, 1.0], [0.2, 0.6, 1.0]], requires_grad=True)
    choice = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    bounds = Range(torch.tensor(0.0), torch.tensor(1.0))
    out = _Choose.apply(x, choice, torch.tensor([1, 2]), bounds, (1, 1, 2))
    thirds = torch.tensor([1 / 3, 2 / 3, 1.0])
    torch.testing.assert_close(out, torch.stack([torch.tensor([0.0, 0.0, 1.0]), thirds]))
    gradient = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    out.backward(gradient)
    assert torch.equal(x.grad, gradient)
    one_bit = torch.tensor([2.0 * (0 - 0.4), 4.0 * (0 - 0.2) + 5.0 * (1 - 0.6)])
    two_bits = torch.tensor([2.0 * (1 / 3 - 0.4), 4.0 * (1 / 3 - 0.2) + 5.0 * (2 / 3 - 0.6)])
    torch.testing.assert_close(choice.grad, torch.stack([one_bit, one_bit, two_bits], 1))


# ---- blocks ----


@pytest.mark.parametrize("ranges", ["batch", "sample"])
def test_one_candidate_for_all_is_a_block_that_computes_with_quantised_operands(ranges):
    model, _, running = start(deep(1), fractional_choice="highest", fractional_ranges=ranges)
    prefer(running, -9.0, -9.0, -9.0, -9.0, 9.0)
    x = images(6)
    x = deep(1)[0](x)
    plain = deep(1)[1]
    per = None if ranges == "batch" else 0
    hidden = torch.relu(quantise_conv(plain.conv1, torch.relu(x), 6, per))
    expected = x + quantise_conv(plain.conv2, hidden, 6, per)
    with torch.no_grad():
        torch.testing.assert_close(model.train()[1](x), expected)


def quantise_conv(layer, x, bits, per=0):
    weight = quantise(layer.weight, 4, range_of(layer.weight, 0))
    return nn.functional.conv2d(quantise(x, bits, range_of(x, per)), weight, padding=layer.padding)


def test_samples_of_several_candidates_are_computed_once_each_as_if_alone_with_their_bits():
    """A sample does not know what was chosen for the others, nor how large they are."""
    model, _, _ = start(deep(1), fractional_bits=(2, 8), fractional_gradient_bits=(8, 8), fractional_target=0.03)
    x = deep(1)[0](images(12))
    calls = []
    model[1].conv1.register_forward_hook(lambda module, args, out: calls.append((len(args[0]), out)))
    with torch.no_grad():
        model.train()[1](x)
    assert [size for size, _ in calls] == [12]
    plain = deep(1)[1]
    both = [quantise_conv(plain.conv1, torch.relu(x), bits) for bits in (2, 8)]
    near = [(calls[0][1] - one).flatten(1).abs().amax(1) < 1e-5 for one in both]
    assert bool((near[0] ^ near[1]).all())
    assert 0 < int(near[0].sum()) < 12


def test_gradients_are_rounded_by_the_bits_of_their_sample():
    model, _, running = start(
        deep(1), fractional_bits=(8, 8), fractional_gradient_bits=(1, 8), fractional_target=0.04,
        fractional_weight_bits=8,
    )  # fmt: skip
    around, outputs = running._layers[0][1]._around, []
    inner = around.inner

    def watched(x):
        outputs.append(inner(x))
        outputs[-1].retain_grad()
        return outputs[-1]

    around.inner = watched
    out = model.train()[1](deep(1)[0](images(12)))
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)))
    levels = [len(gradient.unique()) for gradient in outputs[0].grad]
    assert sorted(levels)[0] == 2
    assert all(number == 2 or number > 20 for number in levels)
    assert [levels.count(2), 12 - levels.count(2)] == running._counts[0]


@pytest.mark.parametrize("bits", [8, 32])
def test_layers_outside_of_the_blocks_have_bits_of_their_own(bits):
    model, _, running = start(deep(1), fractional_outside_bits=bits, fractional_target=0.025)
    x, plain = images(6), deep(1)[0]
    with torch.no_grad():
        ours, as_it_is = model.train()[0](x), plain(x)
        assert torch.equal(ours, as_it_is) == (bits == 32)
        torch.testing.assert_close(ours, as_it_is, atol=0.05, rtol=0.05)
        running.detach()
        assert torch.equal(model[0](x), as_it_is)
    assert not hasattr(model[0], "arithmetic")


def test_a_candidate_of_no_bits_leaves_the_block_out_where_it_can():
    settings = {"fractional_bits": (0, 8), "fractional_gradient_bits": (0, 8), "fractional_weight_bits": 8}
    model, optimizer, running = start(fractional_target=0.05, fractional_choice="highest", **settings)
    prefer(running, 9.0, -9.0)
    ran = []
    for block in (3, 4):
        model[block].conv1.register_forward_pre_hook(
            lambda module, args, block=block: ran.append((block, len(args[0])))
        )
    model.eval()(images(16))
    assert ran == [(4, 16)]  # the second block changes the shape
    train(model, optimizer, 1)
    assert running._counts == [[16.0, 0.0], [0.0, 16.0]]
    with pytest.raises(
        InputError, match=f"the cheapest candidates cost {0.0625 * STRIDED_MACS / (STRIDED_MACS + BLOCK_MACS):.3g}"
    ):
        start(fractional_target=0.02, **settings)


@pytest.mark.parametrize("outside_bits", [8, 32])
def test_the_bill_counts_every_sample_in_the_bits_that_were_chosen(outside_bits):
    model, optimizer, running = start(total_steps=1000, fractional_outside_bits=outside_bits)
    cost = count(model, images(1))
    train(model, optimizer, 1)
    gate = sum((8 * 32 + 32 * 16 + 4 * 16 * 32 + 16 * 5) * 16 for _ in range(2))
    work = running._ledger.phases["train"]
    assert work.macs == pytest.approx(16 * cost.training_macs + 3 * gate, rel=1e-9)
    stem = 2 * 3 * 8 * 9 * 64 * (outside_bits / 32) ** 2  # no gradient of images
    outside = 16 * (stem + 3 * 12 * 5) + 3 * gate  # classifier and gates in 32 bits
    inside = 0.0
    for counts, macs in zip(running._counts, (BLOCK_MACS, STRIDED_MACS), strict=True):
        assert sum(counts) == 16
        inside += sum(n * 3 * macs * cost_of(bits) for n, bits in zip(counts, running.settings.candidates, strict=True))
    assert work.bit_macs == pytest.approx(outside + inside, rel=1e-9)
    spent, whole = running._record
    assert spent / whole == pytest.approx(inside / (3 * 16 * (BLOCK_MACS + STRIDED_MACS)))
    assert any(name.startswith("mult 6x4") for name in work.operations)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        return x + self.norm(x)


def test_a_block_without_a_product_has_no_bits_to_choose():
    model, _, running = start(nn.Sequential(*deep(2)[:2], Norm(), *deep(2)[2:]))
    assert [block.name for block in running.blocks] == ["1", "3"]
    model(images(2)).sum().backward()


def test_depthwise_convolutions_keep_their_bits():
    model, optimizer, running = start(make("depthwise"), fractional_target=0.06)
    train(model, optimizer, 1)
    operations = running._ledger.phases["train"].operations
    depthwise = 16 * 2 * 12 * 9 * 64
    stem = 16 * 2 * 3 * 6 * 9 * 64  # of 8 bits, too, and without a gradient of images
    assert operations["mult 8x8"] == pytest.approx(depthwise + stem)
    assert operations["mult 16x8"] == pytest.approx(2 * depthwise)


# ---- the cost that is held ----


@pytest.mark.parametrize("choice", ["drawn", "highest", "random"])
@pytest.mark.parametrize("target", [0.022, 0.035])
def test_the_price_holds_the_cost_however_candidates_are_chosen(choice, target):
    model, optimizer, running = start(fractional_target=target, fractional_choice=choice, total_steps=100)
    train(model, optimizer, 70)
    late = [entry["cost"] for entry in running.history[30:]]
    assert sum(late) / len(late) == pytest.approx(target, rel=0.05)
    assert running.status() == {"cost": f"{running.history[-1]['cost']:.2%}"}
    bits, cost = running.traces()
    shares = running.history[-1]["blocks"][0]
    assert bits.series["3"][-1] == (70, pytest.approx(sum(n * b for n, b in zip(shares, (3, 4, 4, 6, 6), strict=True))))
    assert cost.series["target"][-1] == (70, target)


def test_the_published_penalty_pulls_towards_the_target():
    for scores, direction in (((0, 0, 0, 0, 5.0), -1), ((5.0, 0, 0, 0, 0), 1)):
        model, optimizer, running = start(
            fractional_target=0.03, fractional_choice="highest", fractional_control="penalty", fractional_penalty=1e4,
            fractional_gate_rate=0.01,
        )  # fmt: skip
        prefer(running, *scores)
        train(model, optimizer, 5)
        bias = running._gate.network.head.bias.detach()
        assert (bias[4] - bias[0] - (scores[4] - scores[0])) * direction > 0.04


def test_targets_rise_at_turning_points_of_the_loss_by_points_and_by_the_deadline():
    targets = (0.02, 0.025, 0.03)
    model, optimizer, running = start(fractional_target=targets, fractional_at=("2it", "4it"))
    rungs = []
    for step in range(5):
        train(model, optimizer, 1, step)
        rungs.append(running.rung)
    assert rungs == [0, 1, 1, 2, 2]
    assert [entry["reason"] for entry in running.history if "reason" in entry] == ["schedule"] * 2

    model, optimizer, running = start(fractional_target=targets, fractional_every="1it", total_steps=40)
    rungs = []
    for step in range(9):
        running.observe(torch.tensor(1.0))
        train(model, optimizer, 1, step)
        rungs.append(running.rung)
    assert rungs == [*[0] * 8, 1]  # four steps of warm-up, then five equal losses
    assert [entry["reason"] for entry in running.history if "reason" in entry] == ["turning point"]

    model, optimizer, running = start(fractional_target=targets, fractional_last_by="2it", total_steps=400)
    train(model, optimizer, 2)
    assert running.rung == 2

    model, optimizer, running = start(fractional_target=targets, fractional_every="1it", total_steps=40)
    with pytest.raises(InputError, match="nobody has told it"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("target", [0.0175, 0.0469])
def test_a_target_out_of_reach_is_refused_with_what_can_be_reached(target):
    with pytest.raises(InputError, match=rf"is {target}, but the cheapest candidates cost 0\.0176 .*dearest 0\.0469"):
        start(fractional_target=target)


def test_full_precision_leaves_the_model_alone():
    model, optimizer, running = start(make("plain"), fractional_target=1.0)
    plain = make("plain")
    train(model, optimizer, 3)
    train(plain, sgd(plain), 3)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), plain.parameters(), strict=True))
    assert running.status() == {}


# ---- resuming, cutting, composing ----


@pytest.mark.parametrize("stop", [1, 6, 11])
@pytest.mark.parametrize("cut", [False, True])
def test_stopped_and_resumed_ends_in_the_same_bits(stop, cut):
    def begin():
        model, optimizer, running = start(
            fractional_target=(0.02, 0.03), fractional_at=("7it",), total_steps=300, seed=3,
            fractional_bits=(0, 3, 6, 6), fractional_gradient_bits=(0, 6, 8, 12),
        )  # fmt: skip
        methods = [running]
        if cut:
            settings = {**QUICK, "deadline": "8it"}
            methods.append(eb.EarlyBird(**settings, keep=0.5).attach(model, optimizer, example_inputs=images(2)))
        return model, optimizer, methods

    whole, optimizer, methods = begin()
    train(whole, optimizer, 14)
    first, first_optimizer, first_methods = begin()
    train(first, first_optimizer, stop)
    saved = copy.deepcopy(([m.state_dict() for m in first_methods], first.state_dict(), first_optimizer.state_dict()))
    second, second_optimizer, second_methods = begin()
    for method, state in zip(second_methods, saved[0], strict=True):
        method.load_state_dict(state)
    second.load_state_dict(saved[1])
    second_optimizer.load_state_dict(saved[2])
    train(second, second_optimizer, 14 - stop, stop)
    for one, two in zip(second.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert second_methods[0].history == methods[0].history
    if cut:
        assert methods[1].drawn
        assert second_methods[0]._gate.channels(1) == whole[4].conv1.in_channels < 8


def test_evaluation_takes_the_highest_score_and_the_running_range():
    model, optimizer, _ = start(deep(2))
    train(model, optimizer, 3)
    with torch.no_grad():
        model.eval()
        x = images(6)
        assert torch.equal(model(x), model(x))
        torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_bf16_and_channels_last_go_through():
    model, optimizer, running = start()
    model.to(memory_format=torch.channels_last)
    inputs, labels = batch(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model.train()(inputs).float(), labels)
    loss.backward()
    optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in running._gate.network.parameters())


def test_detached_the_model_is_plain_again():
    model, _, running = start(deep(2))
    running.detach()
    with torch.no_grad():
        assert torch.equal(model.eval()(images(3)), deep(2).eval()(images(3)))


def test_what_cannot_work_is_refused_before_the_first_step():
    model = make("residual")
    optimizer = sgd(model)
    with pytest.raises(InputError, match="pass example_inputs"):
        FractionalPrecision().attach(model, optimizer)
    with pytest.raises(InputError, match="no optimizer was given"):
        FractionalPrecision().attach(model, [], example_inputs=images(2))
    with pytest.raises(InputError, match="has no residual block"):
        FractionalPrecision().attach(make("plain"), optimizer, example_inputs=images(2))
    with pytest.raises(InputError, match=r"fractional_at names steps 9 of 9; .* before the end"):
        FractionalPrecision(fractional_target=(0.02, 0.03), fractional_at=("9it",)).attach(
            model, optimizer, example_inputs=images(2), total_steps=9
        )
    with pytest.raises(InputError, match="total_steps"):
        FractionalPrecision(fractional_target=(0.02, 0.03)).attach(model, optimizer, example_inputs=images(2))
    first = LayerSkipping().attach(model, optimizer, example_inputs=images(2))
    with pytest.raises(InputError, match="block '3' is run by LayerGates already"):
        FractionalPrecision().attach(model, optimizer, example_inputs=images(2))
    first.detach()
    FractionalPrecision().attach(model, optimizer, example_inputs=images(2))
    with pytest.raises(InputError, match="block '3' is run by FractionalBits already"):
        LayerSkipping().attach(model, optimizer, example_inputs=images(2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fractional_target": 0}, "fractional_target is 0"),
        ({"fractional_target": (0.03, 0.02)}, r"fractional_target is \(0\.03, 0\.02\)"),
        ({"fractional_target": ()}, "fractional_target"),
        ({"fractional_target": (0.03, 1.0)}, r"fractional_target is \(0\.03, 1\.0\); 1 alone"),
        ({"fractional_bits": (3,), "fractional_gradient_bits": (6,)}, "names 1 candidates"),
        ({"fractional_bits": (3, 4)}, "names 2 candidates, fractional_gradient_bits 5"),
        ({"fractional_bits": (3, 17), "fractional_gradient_bits": (6, 8)}, "fractional_bits is 17"),
        ({"fractional_bits": (0, 4), "fractional_gradient_bits": (6, 8)}, "bits 0/6"),
        ({"fractional_bits": (0, 0), "fractional_gradient_bits": (0, 0)}, "names 0 alone"),
        ({"fractional_weight_bits": 0}, "fractional_weight_bits is 0"),
        ({"fractional_choice": "argmax"}, "fractional_choice is 'argmax'"),
        ({"fractional_control": "reg"}, "fractional_control is 'reg'"),
        ({"fractional_choice": "random", "fractional_control": "penalty"}, "no effect"),
        ({"fractional_penalty": 0}, "fractional_penalty is 0"),
        ({"fractional_gate_rate": -1}, "fractional_gate_rate is -1"),
        ({"fractional_range_memory": 1}, "fractional_range_memory is 1"),
        ({"fractional_threshold": -1}, "fractional_threshold is -1"),
        ({"fractional_every": "0it"}, "fractional_every is 0"),
        ({"fractional_at": ("2it",)}, "fractional_at names 1 points, and there are 1 targets"),
    ],
)
def test_wrong_settings_name_the_value(settings, said):
    with pytest.raises(InputError, match=said):
        FractionalPrecision(**settings)
