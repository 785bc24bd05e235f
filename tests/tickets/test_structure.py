import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import earlybird as eb
from earlybird.errors import InputError
from earlybird.models import build
from earlybird.sparse.blocks import find_blocks, to_matrix
from earlybird.sparse.masks import prunable, ticket_of
from earlybird.tickets.structure import (
    CRITERIA,
    best,
    budget,
    cluster,
    dense_columns,
    feature_scores,
    refill,
    regroup,
    regrouped,
)
from earlybird.tickets.ticket import Ticket
from tests.tickets.topologies import images, make


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(text):
    return torch.tensor([[letter == "1" for letter in line] for line in text.split()])


def random_masks(model, keep=0.4, seed=0):
    draws = generator(seed)
    weights = prunable(model, leave=("last",))
    return {name: torch.rand(weight.shape, generator=draws) < keep for name, weight in weights.items()}


def test_the_budget_by_hand():
    mask = torch.zeros(4, 2, 3, 3, dtype=torch.bool)  # 18 weights a channel
    mask.view(-1)[:55] = True
    assert budget(mask) == 3
    mask.view(-1)[54:] = False
    assert budget(mask) == 3
    mask.view(-1)[53] = False
    assert budget(mask) == 2
    assert budget(mask, 0.5) == 3
    assert budget(mask, 1.0) == 4
    assert budget(torch.zeros_like(mask)) == 1


@given(seed=st.integers(0, 2**16), size=st.integers(1, 30), levels=st.integers(1, 4), data=st.data())
def test_exactly_as_many_stay_as_asked_and_none_is_worse_than_one_that_goes(seed, size, levels, data):
    scores = torch.randint(levels, (size,), generator=generator(seed)).float()  # full of ties
    count = data.draw(st.integers(1, size))
    chosen = best(scores, count, generator(seed))
    assert int(chosen.sum()) == count
    if count < size:
        assert scores[chosen].min() >= scores[~chosen].max()


def test_ties_are_broken_by_chance():
    found = {tuple(best(torch.ones(6), 3, generator(seed)).tolist()) for seed in range(20)}
    assert len(found) > 5


def test_remain_keeps_the_channels_with_most_weights():
    model = make("plain")
    masks = random_masks(model)
    free = next(iter(masks))
    masks[free] = torch.zeros_like(masks[free])
    masks[free][3] = True  # one whole channel's worth, and one weight elsewhere
    masks[free][0, 0, 0, 0] = True
    ticket = refill(ticket_of(masks), model, images(2), criterion="remain")
    assert ticket.masks[free].nonzero().flatten().tolist() == [3]
    assert ticket.kinds[free] == "channel"


def test_magnitude_ranks_what_the_mask_leaves_of_the_trained_weights():
    model = make("plain")
    masks = random_masks(model)
    name = next(iter(masks))
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        weight.fill_(0.1)
        weight[1] = -0.2
        weight[2] = 100
    masks[name] = torch.zeros_like(masks[name])
    masks[name][:2] = True  # that of channel 2 is gone
    ticket = refill(ticket_of(masks), model, images(2), criterion="magnitude")
    assert ticket.masks[name].nonzero().flatten().tolist() == [0, 1]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.relu(self.conv(x)).mean((2, 3)))


def test_feature_maps_are_summed_over_samples_and_positions_by_hand():
    model = Two()
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1))
    x = torch.tensor([[[[1.0, 2.0]]], [[[3.0, -1.0]]]])  # two samples of two positions
    assert feature_scores(model, ["conv"], x, "l1")["conv"].tolist() == [14.0, 7.0]  # before the ReLU
    assert feature_scores(model, ["conv"], x, "l2")["conv"].tolist() == [60.0, 15.0]
    labels = torch.tensor([0, 1])
    maps = model.conv(x).detach().requires_grad_()
    loss = functional.cross_entropy(model.head(maps.relu().mean((2, 3))), labels)
    expected = (maps * torch.autograd.grad(loss, maps)[0]).abs().sum((0, 2, 3))
    found = feature_scores(model, ["conv", "head"], x, "saliency", labels)
    torch.testing.assert_close(found["conv"], expected)
    assert found["head"].shape == (2,)
    assert not model.conv._forward_hooks
    assert model.conv.weight.grad is None
    with pytest.raises(InputError, match="pass labels"):
        feature_scores(model, ["conv"], x, "saliency")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_refilled_networks_are_cut_and_compute_what_the_masked_ones_compute(criterion):
    model = build("vgg11", classes=10, width=0.125).eval()
    x = torch.randn(4, 3, 32, 32, generator=generator())
    masks = random_masks(model, 0.3)
    ticket = refill(ticket_of(masks), model, x, criterion=criterion, labels=torch.arange(4))
    assert set(ticket.masks) == set(masks)
    for name, mask in ticket.masks.items():
        assert int(mask.sum()) == budget(masks[name])
    change = eb.shrink(model, ticket, x[:1])
    assert not change.whole
    for name, mask in ticket.masks.items():
        assert model.get_submodule(name).out_channels == int(mask.sum())
    assert model(x).shape == (4, 10)


def test_channels_of_residual_sums_stay_whole_and_are_named():
    model = build("resnet20", classes=10, width=0.5)
    x = torch.randn(2, 3, 16, 16, generator=generator())
    ticket = refill(ticket_of(random_masks(model)), model, x, fill_back=0.25)
    assert set(ticket.masks) == {f"blocks.{number}.conv1" for number in range(9)}
    whole = ticket.provenance["whole"]
    assert "blocks.0.conv2" in whole
    assert "conv" in whole
    eb.shrink(model, ticket, x[:1])
    assert model(x).shape == (2, 10)


def test_the_share_of_weights_is_counted_anew():
    model = build("vgg11", classes=10, width=0.125)
    source = ticket_of(random_masks(model, 0.5), round=3)
    ticket = refill(source, model, torch.zeros(1, 3, 32, 32), fill_back=0.0)
    eb.shrink(model, ticket, torch.zeros(1, 3, 32, 32))
    left = sum(model.get_submodule(name).weight.numel() for name in source.masks)
    assert ticket.provenance["weights_kept"] == left / sum(mask.numel() for mask in source.masks.values())
    assert ticket.provenance["weights_kept"] < source.keep
    assert ticket.provenance["source_keep"] == source.keep
    assert ticket.provenance["source"] == {"round": 3}


def test_what_cannot_be_refilled_is_refused():
    model = make("plain")
    masks = random_masks(model)
    with pytest.raises(InputError, match="criterion is 'luck'"):
        refill(ticket_of(masks), model, images(2), criterion="luck")
    with pytest.raises(InputError, match="fill_back is 2"):
        refill(ticket_of(masks), model, images(2), fill_back=2)
    with pytest.raises(InputError, match="kind 'channel'"):
        refill(Ticket({next(iter(masks)): torch.ones(4, dtype=torch.bool)}), model, images(2))
    head = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    mask = ticket_of({"1": torch.ones(2, 4, dtype=torch.bool)})
    with pytest.raises(InputError, match="none of the ticket's layers has channels that are free"):
        refill(mask, head, torch.zeros(1, 4))


def test_dense_columns_by_hand():
    # one column alone leaves two of the first row's weights outside: 1.5 * 2 < i asks for four columns
    rows = rows_of("11100 10000 10000")
    assert dense_columns(rows, 1.5).tolist() == [0, 1]  # with two: 1.5 * 1 < 2
    assert dense_columns(rows, 3.0).tolist() == [0, 1, 2]
    assert dense_columns(rows, 0.4).tolist() == [0]
    assert dense_columns(rows_of("00100 00100")).tolist() == [2]


@given(seed=st.integers(0, 2**16), height=st.integers(1, 12), width=st.integers(1, 20), t1=st.floats(0.2, 4))
def test_the_rule_of_dense_columns_holds_and_one_less_would_break_it(seed, height, width, t1):
    rows = torch.rand(height, width, generator=generator(seed)) < 0.4
    rows[0, 0] = True
    columns = dense_columns(rows, t1)

    def worst(chosen):
        outside = rows.clone()
        outside[:, chosen] = False
        return int(outside.sum(1).max())

    assert t1 * worst(columns) < len(columns)
    fullest = rows.sum(0).argsort(descending=True, stable=True)
    assert set(columns.tolist()) == set(fullest[: len(columns)].tolist())
    for fewer in range(1, len(columns)):
        assert t1 * worst(fullest[:fewer]) >= fewer


def test_rows_that_share_columns_come_together():
    patterns = rows_of("111000000 000111000 000000111")
    which = torch.randperm(12, generator=generator(3)) % 3
    found = cluster(patterns[which], 3, generator())
    assert [len(set(which[found == part].tolist())) for part in range(3)] == [1, 1, 1]


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 30), data=st.data())
@settings(deadline=None, max_examples=40)
def test_parts_are_of_equal_size(seed, rows, data):
    parts = data.draw(st.integers(1, rows))
    mask = torch.rand(rows, 15, generator=generator(seed)) < 0.4
    mask[:, 0] = True
    sizes = torch.bincount(cluster(mask, parts, generator(seed)), minlength=parts)
    assert int(sizes.max()) - int(sizes.min()) <= 1
    assert int(sizes.sum()) == rows


def test_regrouping_finds_the_blocks_that_are_there_and_fills_their_gaps():
    draws = generator(1)
    patterns = torch.zeros(2, 40, dtype=torch.bool)
    patterns[0, :20] = patterns[1, 20:] = True
    which = torch.randperm(8, generator=draws) % 2
    mask = patterns[which] & (torch.rand(8, 40, generator=draws) < 0.9)
    # with a large t1, no weight of a row may lie outside
    new, blocks = regrouped(mask, parts=2, t1=50, block_rows=4, least_rows=2, generator=generator())
    assert torch.equal(new, patterns[which])
    assert sorted(len(block.rows) for block in blocks) == [4, 4]


@given(seed=st.integers(0, 2**16), outputs=st.integers(1, 40), keep=st.floats(0.05, 0.9), data=st.data())
@settings(deadline=None, max_examples=40)
def test_the_new_mask_is_the_union_of_its_blocks(seed, outputs, keep, data):
    mask = torch.rand(outputs, 3, 3, 3, generator=generator(seed)) < keep
    block_rows, least_rows = data.draw(st.integers(1, 8)), data.draw(st.integers(0, 6))
    new, blocks = regrouped(mask, parts=4, block_rows=block_rows, least_rows=least_rows)
    if not blocks:
        assert torch.equal(new, mask)
        return
    union = torch.zeros_like(to_matrix(mask))
    for block in blocks:
        assert not union[block.rows].any()
        assert len(block.rows) == block_rows or least_rows < len(block.rows) < block_rows
        union[block.rows[:, None], block.columns] = True
    assert torch.equal(to_matrix(new), union)
    assert new.shape == mask.shape
    assert len(find_blocks(new)) <= len(blocks)


def test_small_rests_are_thrown_away_emptiest_rows_first():
    mask = torch.zeros(7, 10, dtype=torch.bool)
    mask[:, :4] = True
    mask[2, 1:4] = False
    mask[2, 9] = True
    new, blocks = regrouped(mask, parts=1, block_rows=3, least_rows=1)
    assert [len(block.rows) for block in blocks] == [3, 3]
    assert not new[2].any()


def test_layers_without_a_block_keep_their_mask_and_the_ticket_is_counted_anew():
    masks = {
        "small": torch.rand(16, 3, 3, 3, generator=generator()) < 0.3,
        "wide": torch.rand(128, 16, 3, 3, generator=generator()) < 0.3,
    }
    source = ticket_of(masks, round=4)
    ticket = regroup(source)
    assert torch.equal(ticket.masks["small"], masks["small"])
    assert ticket.provenance["blocks"] == {"small": 0, "wide": 4}
    assert len(find_blocks(ticket.masks["wide"])) == 4
    assert ticket.provenance["weights_kept"] == ticket.keep
    assert ticket.provenance["source_keep"] == source.keep
    assert ticket.provenance["source"] == {"round": 4}
    assert regroup(source) == ticket


def test_what_cannot_be_regrouped_is_refused():
    with pytest.raises(InputError, match="kind 'channel'"):
        regroup(Ticket({"a": torch.ones(4, dtype=torch.bool)}))
    ticket = ticket_of({"a": torch.ones(4, 4, dtype=torch.bool)})
    for options in ({"parts": 0}, {"t1": 0}, {"block_rows": -1}, {"least_rows": 1.5}):
        with pytest.raises(InputError, match=f"{next(iter(options))} is"):
            regroup(ticket, **options)
