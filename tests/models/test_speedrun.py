"""The speed-run network against its definition: whitening, first weights, pooling, and the cut."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import earlybird as eb
from earlybird.cost.count import count
from earlybird.models.speedrun import SpeedRun
from earlybird.optimizers.muon import Muon, by_role
from earlybird.tickets.scores import magnitude
from tests.tickets.test_shrink import random_ticket
from tests.tickets.topologies import masked


def noise(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def smooth(count: int, size: int = 32) -> torch.Tensor:
    """Images whose neighbouring pixels and channels are correlated, with a mean that is not 0."""
    x = functional.avg_pool2d(noise(count, size + 2), 3, stride=1)
    return 3 * x + 0.5 * x.roll(1, dims=1) + 0.2


def build(size: int = 32, width: float = 1.0) -> SpeedRun:
    torch.manual_seed(0)
    return SpeedRun(image_size=size, width=width)


def test_size_by_hand() -> None:
    cost = count(build(), noise(1))
    filters = 24 * 64 * 9, 64 * 64 * 9, 64 * 256 * 9, 256 * 256 * 9, 256 * 256 * 9, 256 * 256 * 9
    places = 31**2, 15**2, 15**2, 7**2, 7**2, 3**2
    assert cost.parameters == sum(filters) + 24 * 12 + 24 + 2 * 2 * (64 + 256 + 256) + 2560
    assert cost.forward_macs == sum(a * b for a, b in zip(filters, places)) + 24 * 12 * 31**2 + 2560


def test_the_whitened_patches_have_the_identity_as_second_moment() -> None:
    model, images = build(), smooth(1100)  # more than are taken at once, and not a multiple
    model.initialise_from_images(images)
    patches = functional.unfold(images, 2).transpose(0, 1).flatten(1).double()  # (12, patches)
    moment = patches @ patches.T / patches.shape[1]
    values = torch.linalg.eigvalsh(moment)
    assert values[-1] > 40 * values[0]  # there is something to whiten
    whitened = model.whiten.weight.double().flatten(1) @ patches
    found = whitened[:12] @ whitened[:12].T / patches.shape[1]
    torch.testing.assert_close(found, torch.diag(values / (values + 5e-4)), atol=1e-4, rtol=1e-4)
    assert torch.equal(model.whiten.weight[12:], -model.whiten.weight[:12])


def test_the_whitening_is_frozen_and_its_bias_is_not() -> None:
    model = build()
    model(noise(2)).square().sum().backward()
    frozen = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert frozen == ["whiten.weight"]


def test_convolutions_begin_with_the_identity() -> None:
    model = build()
    first, second = model.blocks[1].conv1, model.blocks[1].conv2  # 64 to 256, 256 to 256
    x = noise(2, 9)[:, :1].expand(-1, 256, -1, -1) * torch.randn(256, 1, 1)
    torch.testing.assert_close(second(x), x)
    torch.testing.assert_close(first(x[:, :64])[:, :64], x[:, :64])
    rest = first.weight[64:]
    assert rest.std().item() == pytest.approx(
        (1 / 3 / (64 * 9)) ** 0.5, rel=0.02
    )  # PyTorch's own: uniform, a = sqrt(5)


def test_the_head_begins_at_1_and_its_logits_are_divided_by_the_features() -> None:
    model = build().eval()
    assert model.head.weight.std().item() == pytest.approx(1)
    features = model.pool(model.blocks(model.gelu(model.whiten(noise(2))))).flatten(1)
    torch.testing.assert_close(model(noise(2)), features @ model.head.weight.T / 256)


def test_batch_norms_are_the_published_ones() -> None:
    norms = [module for module in build().modules() if isinstance(module, nn.BatchNorm2d)]
    assert [(norm.num_features, norm.eps, norm.momentum) for norm in norms] == [
        (width, 1e-12, 0.4) for width in (64, 64, 256, 256, 256, 256)
    ]


def test_what_is_pooled_last_is_3x3_at_32_pixels() -> None:
    model = build().eval()
    maps = model.blocks(model.gelu(model.whiten(noise(2))))
    assert maps.shape[2:] == (3, 3)
    assert torch.equal(model.pool(maps), functional.max_pool2d(maps, 3))


@pytest.mark.parametrize("size", [16, 20, 24, 28, 40])
def test_one_network_takes_images_of_other_sizes(size: int) -> None:
    assert build()(noise(2, size)).shape == (2, 10)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_small_images_are_pooled_as_often_as_they_can_be(size: int) -> None:
    assert build(size)(noise(2, size)).shape == (2, 10)


def trained(width: float = 0.25) -> tuple[SpeedRun, Muon]:
    """A network after three steps, with statistics and shifts of its own."""
    model = build(16, width)
    model.initialise_from_images(smooth(200, 16))
    roles = by_role(model)
    vectors = [roles[role] for role in ("head", "biases", "stem", "scales")]
    optimizer = Muon([{"params": roles["filters"]}, *({"params": v, "orthogonal": False, "lr": 0.01} for v in vectors)])
    for seed in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(noise(16, 16, seed)), torch.arange(16) % 10).backward()
        optimizer.step()
    return model, optimizer


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.sampled_from([0.1, 0.5, 0.9]))
def test_the_cut_network_computes_what_the_masked_one_does(seed: int, keep: float) -> None:
    model, optimizer = trained()
    ticket = random_ticket(model, seed, keep)
    reference = masked(copy.deepcopy(model), ticket.masks)
    change = eb.shrink(model, ticket, noise(1, 16), optimizer=optimizer)
    assert change.parameters_after < change.parameters_before
    assert not change.silenced
    assert model.whiten.out_channels == 24
    for parameter, state in optimizer.state.items():
        assert state["momentum_buffer"].shape == parameter.shape
    x = noise(5, 16, seed=7)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x), rtol=1e-4, atol=1e-5)
    model.train()(x).square().sum().backward()
    optimizer.step()


def test_every_score_leaves_the_whitening_whole() -> None:
    model, _ = trained()
    assert "whiten" not in magnitude(model)
    assert len(magnitude(model)) == 6
    for score in ("taylor", "bn_scale", "magnitude"):
        assert "whiten" not in eb.draw(model, 0.5, score=score, example_inputs=noise(1, 16)).masks


def test_a_new_network_has_the_same_weights_for_the_same_seed() -> None:
    one, two = (eb_model.state_dict() for eb_model in (trained()[0], trained()[0]))
    assert all(torch.equal(one[name], two[name]) for name in one)
