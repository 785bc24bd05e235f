import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from earlybird.errors import InputError
from earlybird.models import build
from earlybird.models.resnet_cifar import CifarResNet
from earlybird.sparse.masks import Masks, prunable, ticket_of
from earlybird.tickets.elastic import elastic, names_for, stages, unit_map
from earlybird.tickets.ticket import Ticket


def resnet(depth, **options):
    with torch.random.fork_rng():
        torch.manual_seed(depth)
        return CifarResNet(depth, width=0.5, **options)


def numbered(model):
    """A state dict in which every tensor holds a number of its own."""
    state = {}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        state[name] = torch.full_like(tensor, number)
    return state


def random_ticket(model, keep=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = prunable(model, leave=("last",))
    return ticket_of({n: torch.rand(w.shape, generator=generator) < keep for n, w in weights.items()}, method="test")


def mlp(depth, width=6):
    layers = [nn.Linear(4, width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def test_the_orders_by_hand():
    assert unit_map(4, 8) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert unit_map(4, 8, stretch="append") == [0, 1, 2, 3, 0, 1, 2, 3]
    assert unit_map(2, 3) == [0, 0, 1]
    assert unit_map(8, 2) == [0, 4]
    assert unit_map(8, 2, squeeze="consecutive") == [0, 1]
    assert unit_map(3, 3) == unit_map(3, 3, stretch="append", squeeze="consecutive") == [0, 1, 2]
    assert unit_map(3, 0) == unit_map(0, 0) == []
    with pytest.raises(InputError, match="no unit to copy"):
        unit_map(0, 1)
    with pytest.raises(InputError, match="stretch is 'twice'"):
        unit_map(1, 2, stretch="twice")


@given(source=st.integers(1, 20), target=st.integers(1, 20), append=st.booleans(), consecutive=st.booleans())
def test_as_many_distinct_units_as_there_can_be_and_each_about_equally_often(source, target, append, consecutive):
    stretch, squeeze = "append" if append else "interpolate", "consecutive" if consecutive else "interleaved"
    found = unit_map(source, target, stretch=stretch, squeeze=squeeze)
    times = [found.count(unit) for unit in range(source)]
    assert len(found) == target
    assert len(set(found)) == min(source, target)
    assert max(times) - min(times) <= 1
    if not append or target <= source:
        assert found == sorted(found)


def test_stages_of_the_families():
    def shape(spec, **options):
        found, alone = stages(build(spec, classes=10, **options).state_dict())
        return [(stage.first.name, stage.depth) for stage in found], alone

    found, alone = shape("resnet20")
    assert found == [("blocks.0", 3), ("blocks.3", 3), ("blocks.6", 3)]
    assert alone[0] == "conv.weight"
    assert alone[-1] == "classifier.bias"
    found, _ = shape("vgg16")  # the fourth and the fifth stage have the same width, and a pooling between them
    assert found == [(f"features.{n}", depth) for n, depth in ((0, 2), (7, 2), (14, 3), (24, 3), (34, 3))]
    found, _ = shape("resnet18")
    assert found == [("stem.0", 1), ("blocks.0", 2), ("blocks.2", 2), ("blocks.4", 2), ("blocks.6", 2)]
    found, _ = shape("resnet14", width=0.25)  # 8 channels in the first two stages
    assert found == [("blocks.0", 2), ("blocks.2", 2), ("blocks.4", 2)]
    found, alone = stages(mlp(3).state_dict())
    assert [(stage.first.name, stage.depth) for stage in found] == [("0", 4), ("8", 1)]
    assert alone == []


def test_resnet_20_becomes_resnet_32_by_hand():
    source, target = resnet(20), resnet(32)
    names = names_for(source.state_dict(), target.state_dict())
    assert set(names) == set(target.state_dict())
    blocks = {n.split(".")[1]: s.split(".")[1] for n, s in names.items() if n.startswith("blocks.")}
    # three blocks a stage become five; the first one is copied once
    assert [int(blocks[str(number)]) for number in range(15)] == [0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 7, 7, 8, 8]
    for name in ("conv.weight", "bn.running_var", "bn.num_batches_tracked", "classifier.bias"):
        assert names[name] == name
    names = names_for(source.state_dict(), target.state_dict(), stretch="append")
    assert [names[f"blocks.{n}.bn2.weight"].split(".")[1] for n in range(5)] == ["0", "1", "2", "1", "2"]


@pytest.mark.parametrize(("one", "other"), [("vgg16", "vgg19"), ("vgg19", "vgg11"), ("resnet18", "resnet34")])
def test_masks_and_state_go_along_together(one, other):
    source, target = (build(name, classes=10, width=0.125) for name in (one, other))
    state = numbered(source)
    ticket, weights = elastic(random_ticket(source), state, target.state_dict())
    target.load_state_dict(weights)  # every tensor is there, in its shape
    weights = {name: int(tensor.flatten()[0]) for name, tensor in weights.items()}
    place = dict(enumerate(source.state_dict()))
    before = random_ticket(source).masks
    assert set(ticket.masks) == set(prunable(target, leave=("last",)))
    for name, mask in ticket.masks.items():
        came_from = place[weights[f"{name}.weight"]].removesuffix(".weight")
        assert torch.equal(mask, before[came_from])
        assert ticket.provenance["map"][name] == came_from


def test_the_ticket_can_be_held_on_the_target_and_says_where_it_came_from():
    source, target = resnet(14), resnet(26)
    ticket, weights = elastic(random_ticket(source), source.state_dict(), target.state_dict())
    target.load_state_dict(weights)
    Masks(target, torch.optim.SGD(target.parameters(), lr=0.1), ticket)
    kept = sum(int(target.get_submodule(name).weight.count_nonzero()) for name in ticket.masks)
    total = sum(mask.numel() for mask in ticket.masks.values())
    assert ticket.provenance["keep"] == pytest.approx(kept / total)
    assert ticket.provenance["keep"] == ticket.keep
    assert ticket.provenance["source_keep"] == random_ticket(source).keep
    assert ticket.provenance["source"] == {"method": "test"}
    assert ticket.provenance["stretch"] == "interpolate"


def test_the_share_that_stays_is_the_targets_own():
    """What is copied once weighs less in the deeper network."""
    source, target = resnet(14), resnet(26)
    masks = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in prunable(source).items()}
    masks["conv"].fill_(True)
    ticket, _ = elastic(ticket_of(masks), source.state_dict(), target.state_dict())
    assert ticket.keep == masks["conv"].numel() / sum(w.numel() for w in prunable(target).values())
    assert ticket.keep < ticket_of(masks).keep / 1.8


def test_there_and_back_is_the_identity():
    source, target = resnet(14), resnet(26)
    ticket, state = random_ticket(source), source.state_dict()
    longer, weights = elastic(ticket, state, target.state_dict())
    back, again = elastic(longer, weights, state)
    assert back == ticket
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_the_result_shares_no_memory_with_the_source():
    source, target = resnet(14), resnet(26)
    state = source.state_dict()
    _, weights = elastic(random_ticket(source), state, target.state_dict())
    before = weights["conv.weight"].clone()
    state["conv.weight"].zero_()
    assert torch.equal(weights["conv.weight"], before)
    assert weights["blocks.1.conv1.weight"].data_ptr() != weights["blocks.2.conv1.weight"].data_ptr()


def test_an_mlp_of_equal_widths_stretches():
    source, target = mlp(2), mlp(5)
    names = names_for(source.state_dict(), target.state_dict())
    assert [names[f"{n}.weight"] for n in (0, 2, 4, 6, 8, 10, 12)] == [
        f"{n}.weight" for n in (0, 2, 2, 2, 4, 4, 6)
    ]  # fmt: skip


def test_what_cannot_be_stretched_says_what_would_fit():
    with pytest.raises(InputError, match=r"stage of 'blocks.0' has 2 units .* and 1 in the source.*deeper member"):
        names_for(resnet(8).state_dict(), resnet(14).state_dict())
    with pytest.raises(InputError, match=r"'blocks.0.conv1.weight' of shape \(8, 8, 3, 3\) cannot be copied from"):
        names_for(CifarResNet(14, width=1.0).state_dict(), resnet(14).state_dict())
    with pytest.raises(InputError, match=r"'classifier.weight' is \(10, 32\) in the source and \(7, 32\)"):
        names_for(resnet(14).state_dict(), resnet(14, classes=7).state_dict())
    with pytest.raises(InputError, match="2 stages of widths 6, 3 in the source, 3 of 8, 16, 32"):
        names_for(mlp(2).state_dict(), resnet(14).state_dict())
    with pytest.raises(InputError, match=r"'b\.weight' is not in the source"):
        names_for({"a.weight": torch.ones(1)}, {"b.weight": torch.ones(1)})
    with pytest.raises(InputError, match=r"'0' without such a tensor cannot be copied from '0\.bias'"):
        names_for(mlp(2).state_dict(), nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3)).state_dict())


def test_a_ticket_of_another_network_or_over_channels_is_refused():
    source = resnet(14)
    with pytest.raises(InputError, match=r"for 'conv', which has a weight of shape"):
        elastic(ticket_of({"conv": torch.ones(2, 2, dtype=torch.bool)}), source.state_dict(), source.state_dict())
    with pytest.raises(InputError, match="kind 'channel'"):
        elastic(Ticket({"conv": torch.ones(8, dtype=torch.bool)}), source.state_dict(), source.state_dict())
