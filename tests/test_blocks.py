import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from earlybird.blocks import block_seconds, check_free, find_blocks, forward_macs
from earlybird.calls import Call, around
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.models import build
from tests.tickets.topologies import images, make


def names(blocks, *, skippable):
    return [block.name for block in blocks if block.skippable == skippable]


@pytest.mark.parametrize(
    ("model", "blocks", "skippable"),
    [
        ("resnet20", 9, 7),  # the first of the second and of the third stage change the shape
        ("preact_resnet29", 9, 6),  # so does the first one, which widens the stream
        ("resnet18", 8, 5),
        ("resnet50", 16, 12),
        ("mobilenet_v2", 17, 10),
    ],
)
def test_the_blocks_of_the_zoo_are_found_by_themselves(model, blocks, skippable):
    network = build(model, classes=10, image_size=16, width=1.0 if model == "mobilenet_v2" else 0.25)
    found = find_blocks(network, torch.zeros(2, 3, 16, 16))
    assert len(found) == blocks
    assert len(names(found, skippable=True)) == skippable
    assert all(block.module is network.get_submodule(block.name) for block in found)
    assert all(block.branch and block.reader for block in found if block.skippable)
    assert [block.name for block in found] == [
        name for name, _ in network.named_modules() if name in {block.name for block in found}
    ]


def test_blocks_are_timed_by_themselves_and_the_model_is_left_as_found():
    model = build("resnet20", classes=10, image_size=8, width=0.25).train()
    blocks = find_blocks(model, images(2))
    slow, pause = blocks[4].module.conv2, 0.02

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(pause)
            return gradient

    plain = slow.forward
    slow.forward = lambda x: plain(Slow.apply(x))
    seen = []
    model.conv.register_forward_hook(lambda *_: seen.append(1))  # somebody else's
    blocks[1].module.register_full_backward_hook(lambda *_: seen.append(1))
    blocks[1].module.register_full_backward_pre_hook(lambda *_: seen.append(1))
    next(blocks[1].module.parameters()).register_hook(lambda _: seen.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seconds = block_seconds(model, blocks, Call((images(4),), {}))
    assert len(seconds) == len(blocks)
    assert min(seconds) > 0
    assert seconds[4] > pause / 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert not seen


def test_a_block_knows_its_layers_and_what_it_reads():
    first, second = find_blocks(make("residual"), images(2))
    assert (first.name, first.skippable, first.channels) == ("3", True, 8)
    assert first.layers == ("3.conv1", "3.conv2")
    assert (first.branch, first.reader) == ("3.norm2", "3.conv1")
    assert (second.skippable, second.layers) == (False, ("4.conv1", "4.conv2", "4.shortcut.0"))
    assert (second.branch, second.reader) == ("", "4.conv1")


def test_multiply_accumulates_of_blocks_by_hand():
    model = make("residual")
    blocks = find_blocks(model, images(2))
    strided = (8 * 12 * 9 + 12 * 12 * 9 + 8 * 12) * 4 * 4
    assert forward_macs(blocks, count(model, images(2))) == [2 * 8 * 8 * 9 * 8 * 8, strided]


class Transformer(nn.Module):
    """A layer whose input goes through two sums."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = x + self.first(x)
        return x + functional.gelu(self.second(x))


class Scaled(nn.Module):
    """Not a block: its input is multiplied on the way."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return 0.5 * x + self.layer(x)


class Inplace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        y = self.layer(x)
        y += x
        return functional.relu_(y)


def test_what_counts_as_a_sum_with_the_own_input():
    model = nn.Sequential(nn.Sequential(Transformer()), Scaled(), Inplace(), nn.Linear(6, 2))
    found = find_blocks(model, torch.zeros(3, 6))
    assert names(found, skippable=True) == ["0.0", "2"]  # the innermost, not the wrapper
    assert [block.branch for block in found] == ["", "2.layer"]
    assert [block.reader for block in found] == ["0.0.first", "2.layer"]


def test_tokens_have_their_channels_last_and_frozen_networks_have_blocks_too():
    model = nn.Sequential(Transformer(), nn.Linear(6, 2)).requires_grad_(False)
    (block,) = find_blocks(model, torch.zeros(3, 5, 6))
    assert block.channels == 6


def test_what_runs_twice_in_a_pass_is_no_block():
    shared = Inplace()
    with pytest.raises(InputError, match="has no residual block"):
        find_blocks(nn.Sequential(shared, shared), torch.zeros(2, 6))
    with pytest.raises(InputError, match="block '0' is called 2 times"):
        find_blocks(nn.Sequential(shared, shared), torch.zeros(2, 6), ["0"])


def test_the_model_is_left_as_found():
    model = make("residual").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[3].register_forward_hook(lambda *_: None)
    random = torch.get_rng_state()
    find_blocks(model, images(2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert len(model[3]._forward_hooks) == 1
    assert all(parameter.grad is None for parameter in model.parameters())


class Named(nn.Module):
    """Blocks that are no sums, and so are found by name only."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            [nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), nn.ModuleList([nn.Linear(6, 4)])]
        )
        self.two = nn.Bilinear(6, 6, 6)

    def forward(self, x):
        x = self.two(x, x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return x


def test_patterns_name_blocks_part_by_part():
    found = find_blocks(Named(), torch.zeros(2, 6), ["stages.*.*"])
    assert names(found, skippable=True) == ["stages.0.0", "stages.0.1"]
    assert names(found, skippable=False) == ["stages.1.0"]  # of another shape
    assert found[0].layers == ("stages.0.0",)
    model = build("resnet20", classes=10, image_size=16, width=0.25)
    found = find_blocks(model, torch.zeros(1, 3, 16, 16), ["blocks.[12]"])
    assert names(found, skippable=True) == ["blocks.1", "blocks.2"]


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["nothing.*"], "no module of Named is named by 'nothing"),
        (["stages.*"], "block 'stages.0' is called 0 times"),  # a list is not called
        (["two"], "block 'two' is not called with one tensor alone"),
        (["stages.1.*"], "no block named by stages.1.. puts out the shape that it gets"),
    ],
)
def test_patterns_that_name_no_blocks_are_refused(patterns, said):
    with pytest.raises(InputError, match=said):
        find_blocks(Named(), torch.zeros(2, 6), patterns)


def test_named_blocks_must_not_hold_each_other():
    model = nn.Sequential(nn.Sequential(Inplace()), nn.Linear(6, 2))
    with pytest.raises(InputError, match="block '0' holds another one"):
        find_blocks(model, torch.zeros(2, 6), ["0", "0.0"])


def test_a_network_without_blocks_is_refused_with_a_hint():
    with pytest.raises(InputError, match=r"Sequential has no residual block.*name the blocks by a pattern"):
        find_blocks(make("plain"), images(2))


def test_only_one_method_decides_how_a_block_is_run():
    class Owner:
        pass

    blocks = find_blocks(make("residual"), images(2))
    check_free(blocks)
    handle = around(blocks[0].module, lambda forward, x: forward(x), Owner())
    with pytest.raises(InputError, match="block '3' is run by Owner already"):
        check_free(blocks)
    handle.remove()
    check_free(blocks)
