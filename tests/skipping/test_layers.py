import copy
import itertools
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional

import earlybird as eb
from earlybird.blocks import TIMED_PASSES
from earlybird.calls import Around
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.models import build
from earlybird.skipping.layers import LayerSkipping
from earlybird.skipping.stochastic_depth import StochasticDepth
from earlybird.tickets.refit import estimate_batch_norms
from tests.tickets.test_early_bird import QUICK, batch, sgd, train
from tests.tickets.topologies import PreActBlock, conv, images, make, tail

BLOCK_MACS = 2 * 8 * 8 * 9 * 8 * 8  # of the first block of 'residual', forward, one image of 8 x 8
GATE_MACS = 8 * 10 + 4 * 10 * (10 + 10) + 10  # projection, LSTM, head


def start(model=None, **settings):
    model = make("residual") if model is None else model
    optimizer = sgd(model)
    attach = {key: settings.pop(key) for key in ("total_steps", "ledger", "seed") if key in settings}
    running = LayerSkipping(**settings).attach(model, optimizer, example_inputs=images(2), **attach)
    return model, optimizer, running


def deep(blocks=4, width=6):
    """Several blocks that can all be left out, without batch norms, so that samples do not know of each other."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(conv(3, width), *(PreActBlock(width, 5) for _ in range(blocks)), *tail(width))
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                model.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = nn.Identity()
    return model


def decide(running, score):
    """Let the gate say the same of all samples, and the price nothing."""
    with torch.no_grad():
        running._gate.network.head.weight.zero_()
        running._gate.network.head.bias.fill_(score)
    running._price.value = running._level = 0.0


def spread(running, size=30.0):
    """Let scores differ from sample to sample by more than sampling does, so that about half of them run."""
    with torch.no_grad():
        running._gate.network.head.weight.mul_(size)
        for projection in running._gate.network.projections:
            projection[0].weight.mul_(size)


# ---- what is computed ----


def test_what_is_decided_in_evaluation_is_what_a_mask_computes():
    outputs = []
    for execution in ("gathered", "masked"):
        model, _, running = start(deep(), layer_share=0.5, layer_execution=execution, layer_evaluate="decided")
        spread(running)
        with torch.no_grad():
            outputs.append(model.eval()(images(9)))
    torch.testing.assert_close(*outputs)
    ran = running.executed_per_input()
    assert 0 < int(ran.min()) + 1 <= int(ran.max()) <= 4
    assert int(ran.sum()) not in (0, 9 * 4)
    running.detach()
    with torch.no_grad():
        assert not torch.allclose(outputs[0], model(images(9)))


def test_training_computes_the_same_gathered_and_masked_where_samples_are_apart():
    """The same coins, blocks and gradients of the weights; the gates' own gradients differ by design."""
    results = []
    for execution in ("gathered", "masked"):
        model, _, running = start(deep(), layer_share=0.5, layer_execution=execution, layer_probe=0)
        for projection in running._gate.network.projections:
            nn.init.zeros_(projection[0].weight)  # no gradient from the gate to the features
        out = model.train()(images(9))
        out.square().sum().backward()
        results.append([out.detach(), *(parameter.grad for parameter in model.parameters())])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(("score", "ran"), [(100.0, 16), (-100.0, 0)])
def test_all_and_none_run(score, ran):
    model, optimizer, running = start(total_steps=1)
    plain = make("residual")
    if not ran:
        plain[3].forward = lambda x: x
    decide(running, score)
    optimizer.zero_grad()
    inputs, labels = batch(0)
    out = model.train()(inputs)
    torch.testing.assert_close(out, plain.train()(inputs))
    functional.cross_entropy(out, labels).backward()
    optimizer.step()
    assert running.history[-1]["blocks"] == [ran / 16, 1.0]


@pytest.mark.parametrize("good", [1, 2])
def test_gates_learn_which_block_is_worth_more(good):
    """One block adds what lowers the loss, the other one the opposite."""
    model = nn.Sequential(conv(3, 6), PreActBlock(6, 4), PreActBlock(6, 4), *tail(6))
    for block in (1, 2):
        with torch.no_grad():
            model[block].conv1.weight.abs_()
            model[block].conv2.weight.zero_().add_(1.0 if block == good else -1.0)
    _, optimizer, running = start(model, layer_share=0.5, layer_gate_rate=0.01)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    gaps = []
    for _ in range(60):
        (-model.train()[:3](images(16)).sum()).backward()
        first, second = (scores.mean() for _, scores, _ in running._scores)
        gaps.append(float(first - second if good == 1 else second - first))
        optimizer.step()
    assert gaps[-1] - gaps[0] > 0.3
    assert abs(running._price.value) < 1


def timed(monkeypatch, *seconds):
    """Let the blocks of a model take these seconds; return the calls with which they were timed."""
    calls = []

    def block_seconds(model, blocks, call):
        calls.append(len(call.args[0]))
        return [float(taken) for taken in seconds[: len(blocks)]]

    monkeypatch.setattr("earlybird.skipping.layers.block_seconds", block_seconds)
    return calls


def test_seconds_stand_in_for_macs(monkeypatch):
    calls = timed(monkeypatch, 3, 1, 1, 1)
    model, optimizer, running = start(deep(), layer_share=0.5, layer_cost="seconds", total_steps=100)
    model.eval()(images(2))
    assert running.seconds is None  # what takes time is training
    assert not calls
    train(model, optimizer, 60)
    assert calls == [16]
    assert running.seconds == [3, 1, 1, 1]
    assert running._costs == [2, 2 / 3, 2 / 3, 2 / 3]
    late = running.history[-40:]
    assert sum(entry["share"] for entry in late) / len(late) == pytest.approx(0.5, abs=0.02)
    for entry in late:
        assert entry["share"] == pytest.approx(sum(map(operator.mul, entry["blocks"], (3, 1, 1, 1))) / 6)


def test_seconds_are_measured_again_after_a_cut_and_not_after_resuming(monkeypatch):
    calls = timed(monkeypatch, 5, 2)
    model, optimizer, running = start(layer_share=0.6, layer_cost="seconds")
    train(model, optimizer, 2)
    assert (calls, running.seconds) == ([16], [5, 2])
    again = timed(monkeypatch, 4, 2)
    saved, twin = copy.deepcopy((running.state_dict(), model.state_dict()))
    other, other_optimizer, resumed = start(layer_share=0.6, layer_cost="seconds")
    resumed.load_state_dict(saved)
    other.load_state_dict(twin)
    train(other, other_optimizer, 1, 2)
    assert (again, resumed.seconds) == ([], [5, 2])
    inner = torch.tensor([True, False] * 4)
    eb.shrink(model, eb.Ticket({"3.norm1": inner}), images(2), optimizer=optimizer)
    assert running.seconds is None
    train(model, optimizer, 1, 2)
    assert (again, running.seconds) == ([16], [4, 2])


def test_larger_samples_have_their_blocks_timed_again_and_smaller_ones_have_not(monkeypatch):
    calls = timed(monkeypatch, 3, 1, 1, 1)
    model, _, running = start(deep(), layer_share=0.5, layer_cost="seconds")
    for size, times in ((8, 1), (8, 1), (6, 1), (10, 2), (8, 2), (10, 2)):
        model.train()(torch.randn(4, 3, size, size))
        assert len(calls) == times
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 12, 12))
    model.eval()(torch.randn(4, 3, 12, 12))
    assert len(calls) == 2
    saved = running.state_dict()["timing"]
    assert saved == [running._all_macs, 3 * 10 * 10, [3, 1, 1, 1]]


def test_an_empty_batch_is_not_timed(monkeypatch):
    calls = timed(monkeypatch, 3, 1, 1, 1)
    model, _, running = start(deep(), layer_share=0.5, layer_cost="seconds")
    model.train()(torch.randn(0, 3, 8, 8))
    assert not calls
    assert running.seconds is None


def test_passes_for_timing_are_on_the_bill():
    model, optimizer, running = start(deep(), layer_share=0.999, layer_cost="seconds", layer_probe=0.0)
    plain, plain_optimizer, counted = start(deep(), layer_share=0.999, layer_probe=0.0)
    train(model, optimizer, 1)
    train(plain, plain_optimizer, 1)
    more = running._ledger.phases["train"].macs - counted._ledger.phases["train"].macs
    assert more == pytest.approx(TIMED_PASSES * 16 * 3 * sum(running._all_macs), rel=0.01)


def test_a_share_of_the_time_below_what_always_runs_is_refused_before_anything_is_trained(monkeypatch):
    model, _, running = start(layer_share=0.6, layer_cost="seconds")
    timed(monkeypatch, *(1 if block.skippable else 99 for block in running.blocks))
    with pytest.raises(InputError, match=r"layer_share is 0.6, but 1 of 2 (.|\n)*of the blocks' time"):
        model.train()(images(4))


def test_a_share_of_the_time_has_no_bill_on_paper():
    with pytest.raises(InputError, match=r"layer_cost is 'seconds'(.|\n)*layer_cost=macs"):
        LayerSkipping(layer_cost="seconds").forecast([], None)
    with pytest.raises(InputError, match="layer_cost is 'time'"):
        LayerSkipping(layer_cost="time")


def test_evaluation_by_chance_is_another_one_each_time_and_training_does_not_mind():
    model, _, _ = start(deep(), layer_share=0.5)
    model.eval()
    with torch.no_grad():
        first, second = model(images(32)), model(images(32))
    assert not torch.equal(first, second)
    ends = []
    for evaluations in (0, 3):
        model, optimizer, _ = start(deep(), layer_share=0.5)
        for step in range(4):
            for _ in range(evaluations):
                with torch.no_grad():
                    model.eval()(images(8))
            train(model, optimizer, 1, step)
        ends.append(model.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(ends[0].values(), ends[1].values(), strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_and_bf16_go_through(layout):
    model, optimizer, running = start(layer_share=0.6)
    model.to(memory_format=layout)
    seen = []
    model[4].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs, labels = batch(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.cross_entropy(model.train()(inputs.contiguous(memory_format=layout)).float(), labels)
    loss.backward()
    optimizer.step()
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].is_contiguous(memory_format=layout)
    assert all(torch.isfinite(parameter).all() for parameter in running._gate.network.parameters())


# ---- the share that is held ----


@pytest.mark.parametrize("share", [0.45, 0.8])
@pytest.mark.parametrize("begin", [None, 4.0, -4.0])
def test_the_price_holds_the_share_wherever_the_gates_begin(share, begin):
    model, optimizer, running = start(layer_share=share, total_steps=100)
    if begin is not None:
        decide(running, begin)
    train(model, optimizer, 120)
    late = [entry["share"] for entry in running.history[40:]]
    assert sum(late) / len(late) == pytest.approx(share, abs=0.02)


def test_decided_gates_run_as_much_in_evaluation_as_in_training():
    model, optimizer, running = start(deep(), layer_share=0.5, layer_evaluate="decided")
    spread(running, 3.0)
    train(model, optimizer, 60)
    with torch.no_grad():
        model.eval()(batch(7)[0])
    assert running.executed_per_input().float().mean() / 4 == pytest.approx(0.5, abs=0.15)


def test_the_published_penalty_pulls_scores_down_above_the_share_and_up_below_it():
    for score, direction in ((3.0, -1), (-3.0, 1)):
        model, optimizer, running = start(
            deep(), layer_share=0.5, layer_penalty=1e3, layer_gate_rate=0.01, **LayerSkipping.PRESETS["published"]
        )
        decide(running, score)
        train(model, optimizer, 10)
        assert (running._gate.network.head.bias.item() - score) * direction > 0.04
        assert running._price.value == 0


def test_a_share_that_the_blocks_which_always_run_exceed_is_refused_with_the_floor():
    always = (8 * 12 * 9 + 12 * 12 * 9 + 8 * 12) * 16
    floor = always / (always + BLOCK_MACS)
    with pytest.raises(InputError, match=rf"1 of 2 residual blocks change the shape.*{floor:.3g} of the blocks' MACs"):
        start(layer_share=0.3)
    start(layer_share=0.34)


def test_running_everything_needs_no_gates_and_no_blocks():
    model, optimizer, running = start(make("plain"), layer_share=1.0)
    plain = make("plain")
    train(model, optimizer, 3)
    train(plain, sgd(plain), 3)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), plain.parameters(), strict=True))
    assert running.status() == {}


# ---- the bill ----


@pytest.mark.parametrize("probe", [0, 0.5])
def test_the_bill_counts_what_ran_the_probes_and_the_gates(probe):
    model, optimizer, running = start(total_steps=1, layer_probe=probe)
    cost = count(model, images(1))
    sizes = []
    model[3].conv1.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    train(model, optimizer, 1)
    ran = round(16 * running.history[-1]["blocks"][0])
    assert 0 < ran < 16
    probes = sum(sizes) - ran
    assert bool(probes) == bool(probe)
    stem = 3 * 8 * 9 * 64
    dense = 3 * cost.forward_macs - stem  # forward, error and weight pass; images need no gradient
    assert cost.training_macs == dense
    expected = 16 * dense - (16 - ran) * 3 * BLOCK_MACS + 16 * 3 * GATE_MACS + probes * BLOCK_MACS
    assert running._ledger.phases["train"].macs == pytest.approx(expected, rel=1e-12)
    with torch.no_grad():
        model.eval()(images(8))
    evaluated = int(running.executed_per_input().sum()) - 8
    expected = 8 * (cost.forward_macs + GATE_MACS) - (8 - evaluated) * BLOCK_MACS
    assert running._ledger.phases["evaluate"].macs == pytest.approx(expected, rel=1e-12)


def test_every_ledger_on_the_model_hears_of_it_and_a_mask_saves_nothing():
    ledger = eb.Ledger()
    model = make("residual")
    ledger.watch(model, None, images(2))
    ledger.enter("train")
    _, optimizer, running = start(model, layer_share=0.5)
    train(model, optimizer, 2)
    assert ledger.phases["train"].macs == running._ledger.phases["train"].macs
    model, optimizer, running = start(layer_share=0.5, layer_execution="masked")
    train(model, optimizer, 1)
    expected = 16 * (count(model, images(1)).training_macs + 3 * GATE_MACS)
    assert running._ledger.phases["train"].macs == pytest.approx(expected, rel=1e-12)


def test_history_has_an_entry_every_hundredth_of_the_run_and_status_its_last_share():
    model, optimizer, running = start(layer_share=0.6, total_steps=400)
    assert running.status() == {}
    train(model, optimizer, 9)
    assert [entry["step"] for entry in running.history] == [4, 8]
    entry = running.history[-1]
    always = 1 - BLOCK_MACS / sum((BLOCK_MACS, (8 * 12 * 9 + 12 * 12 * 9 + 8 * 12) * 16))
    assert entry["share"] == pytest.approx(always + (1 - always) * entry["blocks"][0])
    assert running.status() == {"layers": f"{entry['share']:.0%}"}
    (trace,) = running.traces()
    assert trace.series["3"] == [(entry["step"], entry["blocks"][0]) for entry in running.history]
    assert trace.series["4"] == [(4, 1.0), (8, 1.0)]


def test_executed_blocks_of_each_input_are_those_of_the_last_evaluation():
    model, _, running = start(deep(), layer_evaluate="decided")
    assert running.executed_per_input() is None
    decide(running, 1.0)
    model.eval()(images(5))
    decide(running, -1.0)
    model(images(3))
    assert running.executed_per_input().tolist() == [4] * 5 + [0] * 3
    model.train()(images(2))
    assert running.executed_per_input().tolist() == [4] * 5 + [0] * 3
    model.eval()(images(3))
    assert running.executed_per_input().tolist() == [0] * 3


def test_estimating_batch_norms_is_no_evaluation():
    model, _, running = start()
    estimate_batch_norms(model.eval(), [images(4)])
    assert running.executed_per_input() is None
    model(images(2))
    assert len(running.executed_per_input()) == 2


# ---- resuming, cutting, composing ----


@pytest.mark.parametrize("stop", [1, 6, 11])
@pytest.mark.parametrize("cut", [False, True])
def test_stopped_and_resumed_ends_in_the_same_bits(stop, cut):
    def begin():
        model, optimizer, running = start(layer_share=0.5, total_steps=300, seed=3)
        bird = (
            eb.EarlyBird(**{**QUICK, "deadline": "8it"}, keep=0.5).attach(model, optimizer, example_inputs=images(2))
            if cut
            else None
        )
        return model, optimizer, running, bird

    whole, optimizer, running, _ = begin()
    train(whole, optimizer, 14)
    first, first_optimizer, first_running, first_bird = begin()
    train(first, first_optimizer, stop)
    saved = copy.deepcopy(
        (
            first_running.state_dict(),
            first_bird and first_bird.state_dict(),
            first.state_dict(),
            first_optimizer.state_dict(),
        )
    )
    second, second_optimizer, second_running, second_bird = begin()
    second_running.load_state_dict(saved[0])
    if cut:
        second_bird.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    second_optimizer.load_state_dict(saved[3])
    train(second, second_optimizer, 14 - stop, stop)
    for one, two in zip(second.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    ours, theirs = (r._gate.state_dict() for r in (second_running, running))
    assert all(torch.equal(ours["weights"][name], value) for name, value in theirs["weights"].items())
    assert second_running.history == running.history
    assert second_running._price.value == running._price.value


def test_a_cut_takes_the_same_channels_from_the_gates_and_from_their_optimizer():
    model, optimizer, running = start(layer_share=0.6)
    alive = train(model, optimizer, 3)  # the last graph is alive while the cut is made
    before = running._gate.state_dict()
    stay = torch.tensor([True, False, True, True, False, True, True, True])
    every = torch.ones(8, dtype=torch.bool)
    ticket = eb.Ticket({"1": stay, "3.norm1": every, "3.norm2": stay})
    eb.shrink(model, ticket, images(2), optimizer=optimizer)
    name = "projections.0.0.weight"
    after = running._gate.state_dict()
    assert torch.equal(after["weights"][name], before["weights"][name][:, stay])
    assert torch.equal(after["adam"][name]["exp_avg"], before["adam"][name]["exp_avg"][:, stay])
    assert torch.equal(after["adam"]["head.bias"]["exp_avg"], before["adam"]["head.bias"]["exp_avg"])
    assert running._macs == [2 * 6 * 8 * 9 * 64]
    train(model, optimizer, 2, 3)
    moved = running._gate.state_dict()["weights"][name]
    assert moved.shape == (10, 6)
    assert not torch.equal(moved, after["weights"][name])
    assert alive


def test_a_cut_that_leaves_too_little_to_skip_is_said():
    model, optimizer, _ = start(layer_share=0.34)
    inner = torch.tensor([True] + [False] * 7)
    ticket = eb.Ticket({"3.norm1": inner})
    with pytest.warns(UserWarning, match="layer_share = 0.34 leaves less than 2% of the others"):
        eb.shrink(model, ticket, images(2), optimizer=optimizer)
    train(model, optimizer, 2)


def test_a_model_that_changed_behind_the_gates_is_refused_by_name():
    model, _, _ = start()
    with pytest.raises(InputError, match="block '3' gets 6 channels, its gate expects 8"):
        model[3](torch.zeros(2, 6, 8, 8))


@pytest.mark.parametrize("refit", ["batch_norm", "least_squares"])
def test_the_ticket_is_drawn_and_refitted_with_gates_on(refit, recwarn):
    model, optimizer, running = start(layer_share=0.6)
    bird = eb.EarlyBird(**QUICK, keep=0.5, refit=refit).attach(model, optimizer, example_inputs=images(2))
    train(model, optimizer, 14)
    assert bird.drawn
    assert running._gate.channels(0) == model[3].conv1.in_channels < 8
    assert not [warning for warning in recwarn if "refit" in str(warning.message)]


def test_the_shipped_loop_runs_it_on_a_network_of_the_zoo():
    model = build("resnet20", classes=5, image_size=8, width=0.25)
    optimizer = sgd(model)
    running = LayerSkipping(layer_share=0.7).attach(model, optimizer, example_inputs=images(2), total_steps=4)
    train(model, optimizer, 4)
    assert len(running.history[-1]["blocks"]) == 9
    assert running.bill().total.macs.value > 0


def test_neither_the_model_nor_anybodys_random_numbers_know_of_the_gates():
    model = make("residual")
    optimizer = sgd(model)
    names, groups, random = list(model.state_dict()), len(optimizer.param_groups), torch.get_rng_state()
    running = LayerSkipping().attach(model, optimizer, example_inputs=images(2))
    model.train()(images(4))
    assert torch.equal(random, torch.get_rng_state())
    assert (list(model.state_dict()), len(optimizer.param_groups)) == (names, groups)
    twin = copy.deepcopy(model)
    assert not isinstance(twin[3].forward, Around)
    running.detach()
    assert "forward" not in model[3].__dict__


def test_gradients_that_overflow_leave_the_gates_as_they_are():
    model, optimizer, running = start()
    train(model, optimizer, 1)
    before = running._gate.state_dict()["weights"]
    (model(images(8)).sum() * float("inf")).backward()
    running._gate.step()
    after = running._gate.state_dict()["weights"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in running._gate.network.parameters())


# ---- what is refused ----


def test_what_cannot_work_is_refused_before_the_first_step():
    model = make("residual")
    optimizer = sgd(model)
    with pytest.raises(InputError, match="pass example_inputs"):
        LayerSkipping().attach(model, optimizer)
    with pytest.raises(InputError, match="no optimizer was given"):
        LayerSkipping().attach(model, [], example_inputs=images(2))
    with pytest.raises(InputError, match="has no residual block"):
        LayerSkipping().attach(make("plain"), optimizer, example_inputs=images(2))
    first = LayerSkipping().attach(model, optimizer, example_inputs=images(2))
    for method in (LayerSkipping(), StochasticDepth()):
        with pytest.raises(InputError, match="block '3' is run by LayerGates already"):
            method.attach(model, optimizer, example_inputs=images(2))
    first.detach()
    LayerSkipping().attach(model, optimizer, example_inputs=images(2))


def test_blocks_out_of_their_turn_are_refused():
    model, _, _ = start(deep())
    model.train()(images(2))
    with pytest.raises(InputError, match="block '3' was called out of its turn"):
        model[3](torch.zeros(2, 6, 8, 8))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layer_share": 0}, "layer_share is 0"),
        ({"layer_share": 1.2}, "layer_share is 1.2"),
        ({"layer_control": "smooth"}, "layer_control is 'smooth'"),
        ({"layer_execution": "skipped"}, "layer_execution is 'skipped'"),
        ({"layer_evaluate": "p"}, "layer_evaluate is 'p'"),
        ({"layer_penalty": 0}, "layer_penalty is 0"),
        ({"layer_probe": 1}, "layer_probe is 1"),
        ({"layer_gate_rate": float("inf")}, "layer_gate_rate is inf"),
        ({"layer_blocks": ""}, "layer_blocks is ''"),
        ({"layer_blocks": ("a", 3)}, "layer_blocks is"),
    ],
)
def test_wrong_settings_name_the_value(settings, said):
    with pytest.raises(InputError, match=said):
        LayerSkipping(**settings)


@pytest.mark.parametrize("order", list(itertools.permutations(range(2))))
def test_with_smaller_images_first_the_order_of_attaching_does_not_matter(order):
    ends = []
    for sequence in ((0, 1), order):
        model = make("residual")
        optimizer = sgd(model)
        for number in sequence:
            if number:
                eb.ProgressiveResizing(grow_from="2it", whole_from="4it", size_step=1).attach(model, optimizer)
            else:
                LayerSkipping().attach(model, optimizer, example_inputs=images(2))
        train(model, optimizer, 6)
        ends.append(model.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(ends[0].values(), ends[1].values(), strict=True))
