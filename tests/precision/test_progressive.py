import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import earlybird as eb
from earlybird.cost.arithmetic import PASSES
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.precision.progressive import ProgressivePrecision
from earlybird.precision.quantize import Bits, QuantisedLayer
from earlybird.precision.turning_points import deadlines, foreseen
from earlybird.step import Step
from tests.tickets.test_early_bird import batch, sgd
from tests.tickets.topologies import images, make


def steps(model, optimizer, running, count_, start=0, told=None):
    model.train()
    for step in range(start, start + count_):
        x, y = batch(step)
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        running.observe(loss if told is None else told(step))
        optimizer.step()


def begin(name="residual", total=20, **settings):
    model = make(name)
    optimizer = sgd(model)
    return model, optimizer, ProgressivePrecision(**settings).attach(model, optimizer, total_steps=total)


def moves(running):
    return [(entry["step"], entry["bits"], entry["reason"]) for entry in running.history]


# ---- the ladder ----


def test_real_rungs_are_in_the_bill_of_every_ledger_on_the_model_whoever_came_first():
    model = make("plain")
    optimizer = sgd(model)
    early = eb.Ledger()
    early.watch(model, optimizer, images(2))
    early.enter("train")
    ladder = ProgressivePrecision(forward_ladder="bf16,fp32", rungs_at=("2it",)).attach(model, optimizer, total_steps=9)
    late = eb.BatchDropping(drop=0.0).attach(model, optimizer)
    steps(model, optimizer, ladder, 4)
    bills = [early.bill(), ladder.bill(), late.bill()]
    assert {bill.total.bit_macs.value for bill in bills} == {0.625 * early.bill().total.macs.value}
    ladder.detach()
    assert early.bits == 32


def test_off_a_real_rung_the_model_computes_as_before():
    model, optimizer, ladder = begin("plain", forward_ladder="bf16,8", rungs_at=("2it",), ladder_may_fall=True)
    steps(model, optimizer, ladder, 1)
    assert ladder._ledger.bits == 16
    steps(model, optimizer, ladder, 1, 1)
    assert ladder._ledger.bits == 32


def test_rungs_and_their_usual_gradients():
    assert [str(rung) for rung in ProgressivePrecision().rungs] == ["3/6", "4/6", "6/6", "8/8"]
    published = ProgressivePrecision(**ProgressivePrecision.PRESETS["published"])
    assert [str(rung) for rung in published.rungs] == ["3/6", "4/6", "6/8", "8/8"]
    assert [str(rung) for rung in ProgressivePrecision(forward_ladder=(4, 12, "fp32")).rungs] == [
        "4/6",
        "12/16",
        "fp32",
    ]
    named = ProgressivePrecision(forward_ladder="3, 4", gradient_ladder="6,fp32")
    assert [str(rung) for rung in named.rungs] == ["3/6", "4/32"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"forward_ladder": "0,8"}, "a rung of forward_ladder is 0"),
        ({"forward_ladder": "3,17"}, "a rung of forward_ladder is 17"),
        ({"forward_ladder": "3,fp8"}, "forward_ladder names 'fp8'"),
        ({"forward_ladder": ()}, "forward_ladder has no rung"),
        ({"forward_ladder": "8,3"}, "the ladder goes from 8/8 to 3/6; .*ladder_may_fall"),
        ({"forward_ladder": "8,8"}, "the ladder goes from 8/8 to 8/8"),
        ({"forward_ladder": "fp32,bf16"}, "the ladder goes from fp32 to bf16"),
        ({"gradient_ladder": "8,8"}, "gradient_ladder has 2 rungs, and forward_ladder 4"),
        ({"gradient_ladder": "8,6,8,8"}, "the ladder goes from 3/8 to 4/6"),
        ({"forward_ladder": "4,bf16", "gradient_ladder": "6,8"}, "a rung in bf16 has gradients of 8"),
        ({"forward_ladder": "4,8", "gradient_ladder": "6,bf16"}, "a rung of 8 bits has gradients in bf16"),
        ({"rungs_at": ("50%",)}, "rungs_at names 1 points, and the ladder has 4 rungs"),
        ({"rungs_at": ("5it", "4it", "6it")}, "rungs_at names steps 5, 4, 6 of 20"),
        ({"rungs_at": ("1it", "2it", "20it")}, "rungs_at names steps 1, 2, 20 of 20; .* before the end"),
        ({"turning_window": 1}, "turning_window is 1"),
        ({"turning_threshold": -0.1}, "turning_threshold is -0.1"),
        ({"turning_decay": 0}, "turning_decay is 0"),
        ({"turning_every": "0it"}, "turning_every is 0it"),
        ({"turning_from": "none"}, "turning_from None"),
        ({"ladder_range_memory": 1.0}, "ladder_range_memory is 1.0"),
        ({"ladder_may_fall": 1}, "ladder_may_fall is 1"),
    ],
)
def test_wrong_settings_name_the_value(settings, said):
    with pytest.raises(InputError, match=said):
        begin(**settings)


def test_a_falling_ladder_is_a_control_experiment():
    model, optimizer, running = begin(forward_ladder="8,4", ladder_may_fall=True, rungs_at=("2it",))
    steps(model, optimizer, running, 3)
    assert moves(running) == [(0, "8/8", "start"), (2, "4/6", "schedule")]


# ---- when rungs begin ----


def test_turning_points_of_a_made_up_loss_raise_the_bits():
    model, optimizer, running = begin(
        turning_every="1it", turning_from="0it", turning_window=2, turning_threshold=0.05, first_rung_until="none",
        last_rung_by="none",
    )  # fmt: skip
    # looks are at the mean since the last: every step. equal neighbours at 2, 4 and 6
    losses = [3.0, 2.0, 2.0, 1.5, 1.5, 1.2, 1.2, 1.0]
    steps(model, optimizer, running, 8, told=lambda step: losses[step])
    assert moves(running) == [
        (0, "3/6", "start"), (3, "4/6", "turning point"), (5, "6/6", "turning point"), (7, "8/8", "turning point"),
    ]  # fmt: skip
    assert running.status() == {"bits": "8/8"}


def test_a_loss_that_stands_still_in_the_warm_up_has_not_begun_to_fall():
    model, optimizer, running = begin(turning_every="1it", turning_from="4it", turning_window=2, first_rung_until="8it")
    steps(model, optimizer, running, 7, told=lambda step: [2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0][step])
    assert moves(running) == [(0, "3/6", "start"), (7, "4/6", "turning point")]
    assert running.turning.early == [2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("first", "moved"),
    [
        ("none", [(10, "8/8")]),
        ("15%", [(3, "4/6"), (7, "6/6"), (10, "8/8")]),  # the middle of 3 and 10 is 6.5
        ("60%", [(10, "8/8")]),
    ],
)
def test_deadlines_force_the_rungs(first, moved):
    model, optimizer, running = begin(
        turning_every="1it", turning_window=3, turning_threshold=0.0, first_rung_until=first, last_rung_by="50%"
    )
    steps(model, optimizer, running, 12, told=lambda step: 10.0 - step)
    assert moves(running) == [(0, "3/6", "start"), *((step, bits, "deadline") for step, bits in moved)]


def test_losses_from_before_a_deadline_make_no_turning_point_after_it():
    model, optimizer, running = begin(
        turning_every="1it", turning_from="0it", turning_window=4, first_rung_until="3it", last_rung_by="18it"
    )
    steps(model, optimizer, running, 8, told=lambda step: 1.0)
    assert moves(running) == [(0, "3/6", "start"), (3, "4/6", "deadline"), (7, "6/6", "turning point")]


def test_the_second_rung_has_its_deadline_where_the_last_one_has_none():
    model, optimizer, running = begin(
        turning_every="1it", turning_threshold=0.0, first_rung_until="15%", last_rung_by="none"
    )
    steps(model, optimizer, running, 12, told=lambda step: 10.0 - step)
    assert moves(running) == [(0, "3/6", "start"), (3, "4/6", "deadline")]


def test_the_forecast_has_rungs_begin_where_the_run_would():
    settings = ProgressivePrecision(last_rung_by="50%")
    length = (10, 20)
    due = deadlines(4, settings.first_rung_until, settings.last_rung_by, *length)
    assert due == [3, 7, 10]
    assert foreseen(4, (), settings.first_rung_until, settings.last_rung_by, *length) == [0, *due]
    assert foreseen(4, (), None, settings.last_rung_by, *length) == [0, 3, 7, 10]  # evenly up to the deadline
    assert foreseen(3, (), None, None, *length) == [0, 10, 20]
    assert foreseen(2, (Step.parse("25%"),), settings.first_rung_until, settings.last_rung_by, *length) == [0, 5]
    assert foreseen(1, (), settings.first_rung_until, settings.last_rung_by, *length) == [0]


@pytest.mark.parametrize(
    ("ladder", "rungs"),
    [("3,4,6,8", ["3/6", "4/6", "6/8", "8/8"]), ("4,16", ["4/6", "16/16"]), ("6,bf16,fp32", ["6/8", "bf16", "fp32"])],
)
def test_published_gradients_go_with_any_ladder(ladder, rungs):
    settings = ProgressivePrecision(**{**ProgressivePrecision.PRESETS["published"], "forward_ladder": ladder})
    assert [str(rung) for rung in settings.rungs] == rungs


def test_two_rungs_have_one_deadline():
    model, optimizer, running = begin(
        forward_ladder="4,8", turning_every="1it", turning_threshold=0.0, last_rung_by="50%"
    )
    steps(model, optimizer, running, 12, told=lambda step: 10.0 - step)
    assert moves(running) == [(0, "4/6", "start"), (10, "8/8", "deadline")]


def test_points_of_ones_own_need_no_loss():
    model, optimizer, running = begin(rungs_at=("10%", "20%", "30%"))
    for step in range(7):
        functional.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
    assert moves(running) == [(0, "3/6", "start")] + [
        (step, bits, "schedule") for step, bits in ((2, "4/6"), (4, "6/6"), (6, "8/8"))
    ]


def test_a_loop_that_tells_no_loss_is_told_what_to_call():
    model, optimizer, _ = begin(turning_every="2it")
    functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    with pytest.raises(InputError, match=r"call observe\(loss\) .* or set rungs_at"):
        optimizer.step()


def test_shares_of_the_run_need_its_length():
    model = make("plain")
    with pytest.raises(InputError, match="pass total_steps"):
        ProgressivePrecision().attach(model, sgd(model))
    ProgressivePrecision(forward_ladder="8").attach(model, sgd(model))  # one rung has no clock


# ---- what is computed ----


@pytest.mark.parametrize("ranges", ["batch", "sample"])
def test_one_rung_computes_as_its_layers_by_hand(ranges):
    model, optimizer, running = begin("plain", forward_ladder="4", gradient_ladder="5", ladder_ranges=ranges)
    other = make("plain")
    other_optimizer = sgd(other)
    generator = torch.Generator()
    for module in (other[0], other[3]):
        QuantisedLayer(module, Bits(4, 4, 5), generator=generator, ranges=ranges)
    for step in range(3):
        generator.manual_seed(running._generator.initial_seed())
        steps(model, optimizer, running, 1, start=step)
        loss = functional.cross_entropy(other(batch(step)[0]), batch(step)[1])
        other_optimizer.zero_grad()
        loss.backward()
        other_optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_noise_is_another_at_each_step_and_seed():
    ends = []
    for seed in (0, 0, 1):
        model = make("plain")
        optimizer = sgd(model)
        running = ProgressivePrecision(forward_ladder="8", gradient_ladder="2").attach(model, optimizer, seed=seed)
        seeds = [running._generator.initial_seed()]
        steps(model, optimizer, running, 2)
        assert running._generator.initial_seed() not in seeds
        ends.append(model[0].weight.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_depthwise_layers_keep_eight_bits_and_gradients_sixteen():
    _, _, running = begin("depthwise")
    layers = running.history[0]["layers"]
    assert layers["0"] == [3, 3, 6]
    assert layers["3.depthwise"] == [8, 8, 16]


def test_real_rungs_switch_autocast_and_hand_back_float32():
    seen = []
    model, optimizer, running = begin("plain", forward_ladder="bf16,fp32", rungs_at=("2it",))

    def note(module, args, output):
        if module.training:  # the ledger counts the model in eval mode
            seen.append(output.dtype)

    model[0].register_forward_hook(note)
    for _ in range(4):
        output = model(images())
        assert output.dtype == torch.float32
        output.sum().backward()
        optimizer.step()
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2
    work = running.bill().phases["train"]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images()).dtype == torch.float32  # the last rung is fp32, whatever the loop is in
    assert work.bit_macs.value == work.macs.value * (2 * 0.25 + 2) / 4


def test_without_rungs_of_whole_numbers_no_layer_is_touched():
    model, _, _ = begin("plain", forward_ladder="fp32")
    assert "forward" not in model[0].__dict__


# ---- the bill ----


def test_the_bill_prices_each_rung_in_its_own_bits():
    model, optimizer, running = begin("plain", forward_ladder="4,8", gradient_ladder="6,8", rungs_at=("1it",), total=3)
    price = count(model, images(1)).layers
    steps(model, optimizer, running, 3)
    expected = 0.0
    for layer, cost in price.items():
        for rung, images_seen in (((4, 6), 16), ((8, 8), 32)):
            quantised = layer in ("0", "3")
            a, g = rung if quantised else (32, 32)
            bit_macs = {"forward": a * a, "error": g * a, "weight": a * g}
            macs = dict(zip(PASSES, (cost.macs, cost.error_macs, cost.weight_macs)))
            expected += images_seen * sum(bit_macs[key] / 1024 * macs[key] for key in PASSES)
    assert math.isclose(running.bill().phases["train"].bit_macs.value, expected, rel_tol=1e-6)


def test_detached_it_leaves_the_plain_model():
    model, optimizer, running = begin("plain")
    plain = copy.deepcopy(model)
    running.detach()
    x = images()
    assert torch.equal(model(x), plain(x))
    assert all("forward" not in module.__dict__ and not hasattr(module, "arithmetic") for module in model.modules())
    steps(model, optimizer, running, 1)
    assert running._steps == 0


# ---- state ----


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_stopped_and_resumed_ends_in_the_same_bits(stop):
    settings = {
        "turning_every": "2it",
        "turning_from": "1it",
        "turning_window": 2,
        "turning_threshold": 0.5,
        "last_rung_by": "80%",
    }
    whole, optimizer, running = begin(total=10, **settings)
    steps(whole, optimizer, running, 10)
    assert len(running.history) > 2
    first, first_optimizer, first_running = begin(total=10, **settings)
    steps(first, first_optimizer, first_running, stop)
    saved = copy.deepcopy((first_running.state_dict(), first.state_dict(), first_optimizer.state_dict()))
    second, second_optimizer, second_running = begin(total=10, **settings)
    for owner, state in zip((second_running, second, second_optimizer), saved):
        owner.load_state_dict(state)
    steps(second, second_optimizer, second_running, 10 - stop, start=stop)
    for one, two in zip(second.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(second.eval()(images()), whole.eval()(images()))  # running ranges, too
    assert moves(second_running) == moves(running)


def test_the_state_of_another_model_is_refused():
    _, _, running = begin("plain")
    _, _, other = begin("residual")
    with pytest.raises(InputError, match="another model"):
        other.load_state_dict(running.state_dict())


@pytest.mark.filterwarnings("ignore:no agreement")
def test_the_ticket_may_be_drawn_while_bits_are_few():
    model = make("residual")
    optimizer = sgd(model)
    running = ProgressivePrecision(rungs_at=("2it", "5it", "8it")).attach(model, optimizer, total_steps=12)
    search = eb.EarlyBird(keep=0.5, look_every="1it", skip="1it", deadline="4it", window=2, round_to=1).attach(
        model, optimizer, example_inputs=images(2), steps_per_epoch=5
    )
    steps(model, optimizer, running, 12)
    assert search.drawn
    assert running.status() == {"bits": "8/8"}
    assert sum(parameter.numel() for parameter in model.parameters()) == search.change.parameters_after


def test_a_second_one_is_refused():
    model, optimizer, _ = begin("plain")
    with pytest.raises(InputError, match="progressive already"):
        ProgressivePrecision().attach(model, optimizer, total_steps=10)
    with pytest.raises(InputError, match="no optimizer"):
        ProgressivePrecision().attach(make("plain"), [], total_steps=10)
    with pytest.raises(InputError, match="nothing to quantise"):
        ProgressivePrecision().attach(nn.Sequential(nn.Linear(2, 2)), optimizer, total_steps=10)
