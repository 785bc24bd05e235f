"""Several cuts on the way to one ticket: what is left is searched anew, and all is told in the dense model's units."""

import copy
import io
import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

import earlybird as eb
from earlybird.errors import InputError
from earlybird.tickets.coupling import find_groups
from earlybird.tickets.draw import group_masks
from tests.tickets.test_early_bird import sgd, train, train_by_closures
from tests.tickets.topologies import TOPOLOGIES, conv, images, make, tail

# no two masks agree by chance: cut at steps 7 and 12, after looks at 2, 4, 6 and at 8, 10, 12
STAGED = {
    "keep": 0.4, "stages": (0.7,), "look_every": "2it", "skip": "2it", "deadline": "12it", "window": 2,
    "tolerance": 0.0, "round_to": 1,
}  # fmt: skip
STEPS = 16


@pytest.fixture(autouse=True)
def _deadline_warnings_are_expected():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no agreement by the deadline")
        yield


def start(name="residual", **changes):
    model = make(name)
    optimizer = sgd(model)
    return model, optimizer, eb.EarlyBird(**{**STAGED, **changes}).attach(model, optimizer, example_inputs=images(2))


def shapes(model):
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def scales(model, values):
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(values))


class TestByHand:
    """Eight channels, of which 6 and then 4 stay; scales decide, and they are set by hand."""

    def run(self):
        model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), *tail(8))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
        search = eb.EarlyBird(
            keep=0.5, stages=(0.75,), score="bn_scale", look_every="1it", skip="1it", window=2, deadline=None,
            tolerance=0.125, round_to=1, refit="none",
        ).attach(model, optimizer, example_inputs=images(1))  # fmt: skip
        scales(model, [8.0, 1.0, 6.0, 5.0, 2.0, 3.0, 7.0, 4.0])
        train(model, optimizer, 2)  # two looks agree: channels 1 and 4 go
        return model, optimizer, search

    def test_after_the_first_cut_the_search_goes_on(self):
        model, _, search = self.run()
        assert model[0].out_channels == 6
        assert not search.drawn
        assert search.drawn_at == 2
        assert search.ticket is search.tickets[0.75]
        assert search.ticket.masks["1"].tolist() == [True, False, True, True, False, True, True, True]
        assert search.change.kept["1"].tolist() == [0, 2, 3, 5, 6, 7]
        assert search._ledger.phase == "search"
        assert search.status() == {}  # nothing of the first window is left

    def test_the_ticket_is_over_the_dense_channels(self):
        model, optimizer, search = self.run()
        scales(model, [1.0, 6.0, 5.0, 4.0, 3.0, 2.0])  # of 0, 2, 3, 5, 6, 7: now 0 and 7 are the least
        train(model, optimizer, 1, 2)
        scales(model, [2.0, 6.0, 5.0, 4.0, 1.0, 3.0])  # 0 and 6: two of six channels are seen otherwise
        train(model, optimizer, 1, 3)
        assert not search.drawn
        assert search.status() == {"distance": pytest.approx(2 / 6)}
        train(model, optimizer, 1, 4)
        assert search.drawn
        assert search.drawn_at == 5
        assert search.ticket.masks["1"].tolist() == [False, False, True, True, False, True, False, True]
        assert search.ticket.keep == 0.5
        assert search.change.layers == {
            "0": {"out": (8, 4)}, "1": {"out": (8, 4)}, "5": {"in": (8, 4)}
        }  # fmt: skip
        assert search.change.kept["0"].tolist() == search.change.kept["1"].tolist() == [2, 3, 5, 7]
        assert search.change.parameters_before == 8 * 27 + 16 + 45
        assert search.change.parameters_after == 4 * 27 + 8 + 25 == sum(p.numel() for p in model.parameters())
        assert [entry["keep"] for entry in search.history] == [0.75, 0.75, 0.5, 0.5, 0.5]
        assert [entry["kept"] for entry in search.history] == [6, 6, 4, 4, 4]
        assert [entry["distances"] for entry in search.history] == [[], [0], [], [pytest.approx(2 / 6)], [0]]
        assert search.ticket.provenance["after"] == [{"keep": 0.75, "step": 2, "reason": "agreement"}]
        assert search.ticket.provenance["step"] == 5
        steps, matrix = search.distance_matrix()
        assert steps == [1, 2, 3, 4, 5]
        torch.testing.assert_close(
            matrix,
            torch.tensor(
                [
                    [0, 0, 2 / 8, 2 / 8, 2 / 8],
                    [0, 0, 2 / 8, 2 / 8, 2 / 8],
                    [2 / 8, 2 / 8, 0, 2 / 6, 2 / 6],
                    [2 / 8, 2 / 8, 2 / 6, 0, 0],
                    [2 / 8, 2 / 8, 2 / 6, 0, 0],
                ]
            ),
        )
        steps, matrix = search.distance_matrix(0.75)
        assert (steps, matrix.tolist()) == ([1, 2], [[0, 0], [0, 0]])


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"round_to": 4, "stages": (0.8, 0.6)}, {"scope": "layer"}, {"score": "bn_scale", "strict": True},
        {"shuffle": True}, {"macs_share": 0.4}, {"coupled": "whole", "score": "magnitude"},
        {"refit": "least_squares", "sparsity": 1e-3},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)  # fmt: skip
def test_the_ticket_is_one_cut_of_the_original_model(name, changes, tmp_path):
    model, optimizer, search = start(name, **changes)
    train(model, optimizer, STEPS)
    assert search.drawn
    tickets = [search.tickets[share] for share in search.settings.targets]
    for earlier, later in itertools.pairwise(tickets):
        assert all((mask <= earlier.masks[layer]).all() for layer, mask in later.masks.items())
    dense = make(name)
    eb.shrink(dense, eb.Ticket.load(search.ticket.save(tmp_path / "ticket.safetensors")), images(1))
    assert shapes(dense) == shapes(model)
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense.eval()(images(4)), model.eval()(images(4)))


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(["plain", "flatten", "preact", "residual", "depthwise", "squeeze_excite"]),
    shares=st.lists(st.floats(0.1, 0.9), min_size=2, max_size=4, unique=True),
    score=st.sampled_from(["taylor", "bn_scale", "magnitude"]),
)
def test_as_many_channels_stay_as_keep_says(name, shares, score):
    *stages, keep = sorted(shares, reverse=True)
    model, optimizer, search = start(name, keep=keep, stages=tuple(stages), score=score)
    groups = find_groups(make(name), images(1))
    train(model, optimizer, 12)
    assert search.drawn
    assert search.ticket.widths.keys() == search._sizes.keys()
    scored = [g for g in groups if any(m.name in search._sizes and m.side != "in" for m in g.members)]
    free = [group.producers[0] for group in scored if group.producers and not group.output]
    for share, ticket in search.tickets.items():
        kept = {name: mask for name, mask in group_masks(ticket.masks, groups).items() if name in free}
        total, left = sum(mask.numel() for mask in kept.values()), sum(int(mask.sum()) for mask in kept.values())
        alone = sum(int(mask.sum()) == 1 for mask in kept.values())  # each group keeps one, whatever the ranking says
        assert max(round(share * total), 1) <= left <= max(round(share * total), 1) + alone


def test_what_has_one_channel_a_layer_left_is_searched_on_without_a_complaint():
    model, optimizer, search = start("flatten", keep=0.1, stages=(0.7, 0.15), score="magnitude")
    train(model, optimizer, 12)
    assert search.drawn
    assert [left for left, _ in search.ticket.widths.values()] == [1, 1]
    assert search.history[-1]["distances"] == [0]


def test_optimizer_and_averages_follow_every_cut():
    model = make("residual")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    average = AveragedModel(model)
    search = eb.EarlyBird(**STAGED).attach(model, optimizer, example_inputs=images(1), averaged=average)
    before = len(shapes(model))
    sizes = []
    for step in range(STEPS):
        train(model, optimizer, 1, step)
        average.update_parameters(model)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert len(set(sizes)) == 3
    assert search.drawn
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == before
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.parameters()}
    assert all(optimizer.state[parameter]["exp_avg"].shape == parameter.shape for parameter in held)
    assert shapes(average.module) == shapes(model)


@pytest.mark.parametrize("cut_at", [1, 6, 7, 9, 11, 12, 14])
@pytest.mark.parametrize(
    "changes",
    [{}, {"refit": "least_squares", "round_to": 4}, {"score": "bn_scale", "stages": (0.8, 0.6)}, {"macs_share": 0.5}],
    ids=lambda changes: "-".join(changes) or "default",
)
@pytest.mark.parametrize("order", ["search first", "weights first"])
def test_it_resumes_to_the_bit_before_between_and_after_the_cuts(cut_at, changes, order):
    model, optimizer, search = start(**changes)
    train(model, optimizer, STEPS)
    first, first_optimizer, first_search = start(**changes)
    train(first, first_optimizer, cut_at)
    file = io.BytesIO()
    torch.save([first.state_dict(), first_optimizer.state_dict(), first_search.state_dict()], file)
    file.seek(0)
    weights, momentum, state = torch.load(file, weights_only=True)

    second = make("residual")
    if order == "weights first":
        search.settings.cut(second, state)
        second.load_state_dict(weights)
    second_optimizer = sgd(second)
    again = search.settings.attach(second, second_optimizer, example_inputs=images(2))
    again.load_state_dict(state)
    second.load_state_dict(weights)
    second_optimizer.load_state_dict(momentum)
    assert (again.drawn, again.ticket, again.change) == (first_search.drawn, first_search.ticket, first_search.change)
    assert again._ledger.phase == ("train" if again.drawn else "search")
    train(second, second_optimizer, STEPS - cut_at, cut_at)
    assert again.history == search.history
    assert again.tickets == search.tickets
    assert again.ticket.provenance == search.ticket.provenance
    assert again.change.layers == search.change.layers
    assert again.drawn_at == search.drawn_at
    assert torch.equal(again.distance_matrix()[1], search.distance_matrix()[1])
    assert {name: record.steps for name, record in again._ledger.phases.items() if record.steps} == {
        "search": search.drawn_at, "train": STEPS - search.drawn_at
    }  # fmt: skip
    for (key, one), two in zip(second.state_dict().items(), model.state_dict().values()):
        assert torch.equal(one, two), key


def test_inputs_are_taken_from_the_loop_at_each_cut():
    model = make("residual")
    optimizer = sgd(model)
    search = eb.EarlyBird(**STAGED).attach(model, optimizer)
    train(model, optimizer, 9)
    assert not search.drawn
    state = copy.deepcopy(search.state_dict())
    train(model, optimizer, 4, 9)
    assert search.drawn
    fresh = make("residual")
    between = eb.EarlyBird(**STAGED).attach(fresh, sgd(fresh))
    between.load_state_dict(state)  # no batch was seen yet
    assert between.change.layers == eb.Change.from_json(state["change"]).layers


class TestWhen:
    def test_the_time_from_skip_to_deadline_is_shared(self):
        method = eb.EarlyBird(keep=0.5, stages=(0.8, 0.6), skip="1ep", deadline="4ep")
        assert method.deadlines(10, None) == [20, 30, 40]
        assert eb.EarlyBird(keep=0.5, skip="1ep", deadline="4ep").deadlines(10, None) == [40]
        assert eb.EarlyBird(keep=0.5, stages=(0.8,), deadline=None).deadlines(10, None) is None

    def test_each_is_drawn_at_its_share_of_the_deadline_and_looks_go_on(self):
        model, optimizer, search = start()
        with pytest.warns(UserWarning, match=r"deadline \(step 7\): keep=0.7"):
            train(model, optimizer, 8)
        with pytest.warns(UserWarning, match=r"deadline \(12it\): keep=0.4"):
            train(model, optimizer, 8, 8)
        assert [entry["step"] for entry in search.history] == [2, 4, 6, 8, 10, 12]
        assert [entry["distances"] == [] for entry in search.history] == [True, False, False, True, False, False]
        assert (search.tickets[0.7].provenance["step"], search.drawn_at) == (7, 12)

    def test_without_a_deadline_each_waits_for_agreement(self):
        model, optimizer, search = start(deadline=None, tolerance=1.0)
        train(model, optimizer, STEPS)
        assert [search.tickets[share].provenance["step"] for share in (0.7, 0.4)] == [4, 8]
        assert search.ticket.provenance["reason"] == "agreement"

    def test_there_must_be_a_step_for_each(self):
        model = make("plain")
        method = eb.EarlyBird(keep=0.5, stages=(0.8, 0.6), look_every="1it", skip="3it", deadline="5it")
        with pytest.raises(InputError, match=r"3 cuts between step 3 \(skip\) and step 5.*at least one step"):
            method.attach(model, sgd(model))


def test_dense_steps_are_priced_by_those_of_the_whole_network_alone():
    model, optimizer, search = start()
    train(model, optimizer, STEPS)
    ledger = search._ledger
    assert ledger.phases["search"].train_images == 16 * 12
    assert ledger._dense_search.train_images == 16 * 7
    assert ledger._dense_search.seconds < ledger.phases["search"].seconds
    macs = {name: record.macs / record.train_images for name, record in ledger.phases.items() if record.steps}
    assert macs["train"] < macs["search"] < ledger._dense_search.macs / ledger._dense_search.train_images
    bill = search.bill()
    assert bill.total.steps.value == STEPS
    assert bill.dense.total.steps.value == STEPS


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"stages": 0.7}, "stages is 0.7; several shares"), ({"stages": (1.0,)}, "below 1 and above keep"),
        ({"stages": (0.4,)}, "above keep"), ({"stages": (0.3,)}, "above keep"), ({"stages": (0,)}, "stages is 0"),
        ({"stages": (0.6, 0.8)}, "falling"), ({"stages": (0.6, 0.6)}, "falling"), ({"stages": ("a",)}, "stages is 'a'"),
        ({"keep": (0.4, 0.3)}, "several ratios"), ({"weights": "reinitialise"}, "weights='reinitialise'"),
        ({"keep": 1.0}, "above keep"),
    ],
)  # fmt: skip
def test_stages_that_cannot_work_are_refused(changes, match):
    with pytest.raises(InputError, match=match):
        eb.EarlyBird(**{**STAGED, **changes})


class TestStates:
    def test_of_other_stages_are_refused(self):
        _, _, search = start()
        _, _, other = start(stages=(0.8,))
        with pytest.raises(InputError, match=r"stages=\[0.8\]; \[0.7\]"):
            search.load_state_dict(other.state_dict())

    def test_from_an_earlier_stage_are_refused_by_a_model_that_was_cut_further_and_change_nothing(self):
        model, optimizer, search = start()
        states = []
        for step in range(STEPS):
            states.append(copy.deepcopy(search.state_dict()))
            train(model, optimizer, 1, step)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        for state in (states[3], states[9]):
            for load in (search.load_state_dict, lambda state: search.settings.cut(model, state)):
                with pytest.raises(InputError, match="build model and optimizer anew"):
                    load(state)
        assert search.drawn
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    def test_from_a_later_stage_are_refused_by_a_model_between_stages(self):
        model, optimizer, search = start()
        train(model, optimizer, STEPS)
        between, its_optimizer, its_search = start()
        train(between, its_optimizer, 9)
        with pytest.raises(InputError, match="build model and optimizer anew"):
            its_search.load_state_dict(search.state_dict())


def test_compiled_models_shrink_at_every_cut():
    model, optimizer, search = start("plain")
    train(torch.compile(model, backend="eager"), optimizer, STEPS)
    assert search.drawn
    assert model[3].out_channels < 12


def test_with_a_closure_it_is_the_same():
    ends = []
    for closures in (False, True):
        model, optimizer, _ = start()
        train_by_closures(model, optimizer, STEPS, closures=closures)
        ends.append(model.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(ends[0].values(), ends[1].values(), strict=True))
