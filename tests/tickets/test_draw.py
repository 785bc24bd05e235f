import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import earlybird as eb
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.tickets.coupling import find_groups
from earlybird.tickets.draw import draw_coupled, group_masks, keep_for_macs, macs_share_of, shuffle
from earlybird.tickets.scores import bn_scale
from tests.tickets.topologies import TOPOLOGIES, conv, images, make, stem, tail


def two_norms(first: list[float], second: list[float]) -> nn.Sequential:
    a, b = len(first), len(second)
    model = nn.Sequential(nn.Conv2d(3, a, 1), nn.BatchNorm2d(a), nn.Conv2d(a, b, 1), nn.BatchNorm2d(b))
    model[1].weight.data = torch.tensor(first)
    model[3].weight.data = torch.tensor(second)
    return model


def test_one_ranking_for_the_whole_network():
    ticket = eb.draw(two_norms([0.1, -0.9, 0.2], [0.8, -0.3, 0.7]), keep=0.5)
    assert {name: mask.tolist() for name, mask in ticket.masks.items()} == {
        "1": [False, True, False],
        "3": [True, False, True],
    }


def test_published_comparison_is_strict():
    # N = 6, int(6 * 0.5) = 3, threshold = sorted[3] = 0.7: only what is larger stays
    ticket = eb.draw(two_norms([0.1, 0.9, 0.2], [0.8, 0.3, 0.7]), keep=0.5, strict=True)
    assert ticket.masks["1"].tolist() == [False, True, False]
    assert ticket.masks["3"].tolist() == [True, False, False]


def test_every_layer_keeps_its_best_channel():
    for strict in (False, True):
        ticket = eb.draw(two_norms([0.01, 0.03, 0.02], [0.8, 0.3, 0.7]), keep=0.5, strict=strict)
        assert ticket.masks["1"].tolist() == [False, True, False]


def test_draw_changes_nothing():
    model = make("residual")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    eb.draw(model, 0.5, example_inputs=images(), coupled="group")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.random.get_rng_state())


@settings(max_examples=60, deadline=None)
@given(
    first=st.lists(st.floats(0.001, 1), min_size=1, max_size=12),
    second=st.lists(st.floats(0.001, 1), min_size=1, max_size=12),
    keep=st.floats(0.01, 1.0),
)
def test_as_many_channels_stay_as_asked(first, second, keep):
    ticket = eb.draw(two_norms(first, second), keep=keep)
    kept = [kept for kept, _ in ticket.widths.values()]
    asked = max(round(keep * (len(first) + len(second))), 1)
    assert min(kept) >= 1
    assert asked <= sum(kept) <= asked + 1  # one more where a layer had to be given its best channel


@pytest.mark.parametrize("keep", [0, 1.5, -0.1, math.nan, "half"])
def test_keep_out_of_range(keep):
    with pytest.raises(InputError, match="keep is"):
        eb.draw(make("plain"), keep)


def test_without_batch_norm_the_error_names_the_score_that_works():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(InputError, match="magnitude"):
        eb.draw(model, 0.5)
    ticket = eb.draw(model, 0.5, score="magnitude")
    assert ticket.widths == {"0": (4, 8)}


def test_taylor_is_the_first_order_term():
    model = two_norms([1.0, 2.0], [3.0])
    model[1].bias.data = torch.tensor([0.5, -1.0])
    model[1].weight.grad, model[1].bias.grad = torch.tensor([2.0, -1.0]), torch.tensor([4.0, 3.0])
    model[3].weight.grad, model[3].bias.grad = torch.tensor([1.0]), torch.tensor([0.0])
    from earlybird.tickets.scores import taylor

    assert taylor(model)["1"].tolist() == [abs(1 * 2 + 0.5 * 4), abs(2 * -1 + -1 * 3)]
    model[1].weight.grad = None
    with pytest.raises(InputError, match="no gradient"):
        eb.draw(model, 0.5, score="taylor")


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_coupled_layers_get_one_mask(name):
    model = make(name)
    ticket = eb.draw(model, 0.5, example_inputs=images(), coupled="group")
    for group in find_groups(model, images()):
        seen: dict[int, bool] = {}
        for member in group.members:
            if member.name in ticket.masks and member.side != "in":
                for root, kept in zip(member.root.tolist(), ticket.masks[member.name][member.local].tolist()):
                    assert seen.setdefault(root, kept) == kept
    change = eb.shrink(model, ticket, images())
    if name not in ("sigmoid", "preact", "concatenation"):
        assert not change.silenced


def test_residual_channels_stay_whole_when_asked():
    model = make("residual")
    ticket = eb.draw(model, 0.4, example_inputs=images(), coupled="whole")
    whole = {name for name, (kept, total) in ticket.widths.items() if kept == total}
    assert whole == {"1", "3.norm2", "4.norm2", "4.shortcut.1"}
    assert ticket.widths["3.norm1"][0] + ticket.widths["4.norm1"][0] == round(0.4 * 20)


def wide() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*stem(32), conv(32, 64), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), conv(64, 96),
                          nn.BatchNorm2d(96), nn.ReLU(), *tail(96))  # fmt: skip
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    return model


def test_macs_share_is_a_bound_on_the_real_cost():
    dense = count(wide(), images()).forward_macs
    for bound in (0.3, 0.25):
        model = wide()
        free = eb.draw(model, 0.6, example_inputs=images())
        bounded = eb.draw(model, 0.6, example_inputs=images(), macs_share=bound)
        assert bounded != free
        assert all(kept >= 0.3 * total - 0.5 for kept, total in bounded.widths.values())  # no layer starves
        eb.shrink(model, bounded, images())
        assert count(model, images()).forward_macs <= bound * dense * 1.001


def test_macs_share_holds_after_rounding_up():
    dense = count(wide(), images()).forward_macs
    for round_to in (1, 4, 16):
        model = wide()
        groups = find_groups(model, images())
        masks = draw_coupled(bn_scale(model), groups, 0.5, coupled="group", macs_share=0.3, round_to=round_to)
        eb.shrink(model, eb.Ticket(masks), images(), round_to=round_to)
        assert count(model, images()).forward_macs <= 0.3 * dense * 1.001


def test_macs_share_that_cannot_be_met():
    with pytest.raises(InputError, match="cannot be met"):
        eb.draw(make("plain"), 1.0, example_inputs=images(), macs_share=0.3)
    with pytest.raises(InputError, match="cannot be met"):
        eb.draw(make("plain"), 0.9, example_inputs=images(), macs_share=0.01)


def test_counted_share_equals_the_shrunk_model():
    for name in ("plain", "flatten", "residual", "depthwise", "squeeze_excite"):
        model = make(name)
        groups = find_groups(model, images())
        ticket = eb.draw(model, 0.5, example_inputs=images(), coupled="group")
        chosen = {}
        for group in groups:
            mask = torch.ones(group.size, dtype=torch.bool)
            for member in group.members:
                if member.name in ticket.masks and member.side != "in":
                    mask[member.root] = ticket.masks[member.name][member.local]
            chosen[group.producers[0]] = mask
        dense = count(model, images()).forward_macs
        eb.shrink(model, ticket, images())
        assert macs_share_of(chosen, groups) == pytest.approx(count(model, images()).forward_macs / dense, rel=1e-3)


def test_strict_is_over_the_whole_network():
    with pytest.raises(InputError, match="scope='network'"):
        eb.draw(make("plain"), 0.5, scope="layer", strict=True)
    with pytest.raises(InputError, match="scope='network'"):
        eb.EarlyBird(scope="layer", strict=True)
    # 1 - 0.9 is a little less than 0.1 in floating point; the threshold is the score at place N / 10 all the same
    ticket = eb.draw(two_norms([0.1, 0.2, 0.3, 0.4, 0.5], [0.6, 0.7, 0.8, 0.9, 1.0]), keep=0.9, strict=True)
    assert ticket.masks["1"].tolist() == [False, False, True, True, True]


def test_each_layer_by_itself():
    ticket = eb.draw(two_norms([0.1, 0.9, 0.2, 0.3], [8.0, 3.0, 7.0, 9.0]), keep=0.5, scope="layer")
    assert ticket.masks["1"].tolist() == [False, True, False, True]
    assert ticket.masks["3"].tolist() == [True, False, False, True]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_shuffled_ticket_has_the_same_widths_and_other_channels(name):
    model = make(name)
    groups = find_groups(model, images())
    ticket = eb.draw(model, 0.5, example_inputs=images(), coupled="group")
    masks, scores = shuffle(ticket.masks, groups, torch.Generator().manual_seed(0))
    shuffled = eb.Ticket(masks)
    assert shuffled.widths == ticket.widths
    assert eb.Ticket(shuffle(ticket.masks, groups, torch.Generator().manual_seed(0))[0]) == shuffled
    other = [eb.Ticket(shuffle(ticket.masks, groups, torch.Generator().manual_seed(s))[0]) for s in range(1, 6)]
    assert any(one != shuffled for one in other)
    for group in groups:  # coupled layers still get one mask, and it is the best of the random scores
        for member in group.members:
            if member.name in masks and member.side != "in" and not group.blocks:
                kept, score = masks[member.name][member.local], scores[member.name][member.local]
                if len(member.local) == group.size and not kept.all():
                    assert score[kept].min() > score[~kept].max()
    change = eb.shrink(model, shuffled, images())
    assert change.parameters_after < change.parameters_before or name == "sigmoid"


def test_scores_that_do_not_fit_are_refused():
    model = make("plain")
    for scores in ({}, {"nowhere": torch.ones(3)}, {"1": torch.ones(3)}):
        with pytest.raises(InputError, match="scores"):
            eb.draw(model, 0.5, scores=scores)


def test_nothing_free_to_go_is_said():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(InputError, match="none of the ranked channels is free"):
        eb.draw(model, 0.5, example_inputs=images())


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0.15, 1.0), round_to=st.sampled_from([1, 4]), seed=st.integers(0, 99))
def test_keep_for_macs_is_the_nearest_there_is(share, round_to, seed):
    model = wide()
    groups = find_groups(model, images())
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(value.shape, generator=generator) for name, value in bn_scale(model).items()}

    def found(keep):
        return macs_share_of(group_masks(draw_coupled(scores, groups, keep), groups), groups, round_to)

    keep = keep_for_macs(scores, groups, share, round_to=round_to, tolerance=0.3)
    every = [found(kept / 192) for kept in range(1, 193)]  # 32 + 64 + 96 channels
    assert every == sorted(every)
    assert abs(found(keep) - share) == pytest.approx(min(abs(other - share) for other in every), abs=1e-12)


def test_keep_for_macs_gives_the_real_cost():
    for round_to in (1, 4):
        model = wide()
        dense = count(model, images()).forward_macs
        groups = find_groups(model, images())
        keep = keep_for_macs(bn_scale(model), groups, 0.5, round_to=round_to)
        ticket = eb.draw(model, keep, example_inputs=images())
        eb.shrink(model, ticket, images(), round_to=round_to)
        assert count(model, images()).forward_macs / dense == pytest.approx(0.5, rel=0.05)


def test_a_share_that_no_keep_gives_names_the_nearest():
    model = make("plain")
    groups = find_groups(model, images())
    with pytest.raises(InputError, match=r"macs_share=0.001 cannot be met; .* nearest of which is 0\.\d+"):
        keep_for_macs(bn_scale(model), groups, 0.001)
    with pytest.raises(InputError, match="macs_share is 2"):
        keep_for_macs(bn_scale(model), groups, 2)
