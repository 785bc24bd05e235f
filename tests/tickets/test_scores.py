import copy

import pytest
import torch
from torch import nn

import earlybird as eb
from earlybird.errors import InputError
from earlybird.tickets.scores import magnitude, score_channels
from tests.tickets.topologies import conv, images, make, tail


def group_normed() -> nn.Sequential:
    return nn.Sequential(
        conv(3, 8), nn.GroupNorm(2, 8), nn.ReLU(), conv(8, 12), nn.GroupNorm(4, 12), nn.ReLU(), *tail(12)
    )


def test_magnitude_is_the_root_mean_square_over_the_layers_mean():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3))
    model[0].weight.data = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    norms = torch.tensor([(25 / 2) ** 0.5, (1 / 2) ** 0.5])
    scores = magnitude(model)
    assert list(scores) == ["0"]  # the last layer writes the outputs
    torch.testing.assert_close(scores["0"], norms / norms.mean())


def test_magnitude_ranks_transposed_convolutions_by_their_outputs():
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.Linear(4, 4))
    assert magnitude(model)["0"].shape == (5,)


def test_depthwise_layers_are_left_to_those_that_feed_them():
    assert "4.depthwise" not in magnitude(make("depthwise"))
    assert "4.expand" not in magnitude(make("plain"))


def test_magnitude_leaves_frozen_filters_out():
    model = make("plain")
    ranked = list(magnitude(model))
    model[0].weight.requires_grad_(False)
    assert list(magnitude(model)) == ranked[1:]


def test_models_without_batch_norm_shrink_by_magnitude():
    """Group norm keeps its groups: each loses equally many channels."""
    model = group_normed()
    ticket = eb.draw(model, 0.5, score="magnitude", example_inputs=images(1))
    optimizer = torch.optim.AdamW(model.parameters())
    model(images()).square().mean().backward()
    optimizer.step()
    change = eb.shrink(model, ticket, images(1), optimizer=optimizer)
    assert change.parameters_after < 0.6 * change.parameters_before
    assert not change.silenced
    assert model[1].num_channels == model[1].weight.numel() == model[0].out_channels
    assert model[1].num_channels % 2 == 0
    assert model[4].num_channels % 4 == 0
    model(images()).square().mean().backward()
    optimizer.step()


def test_early_bird_without_batch_norm():
    model = group_normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    search = eb.EarlyBird(score="magnitude", look_every="1it", skip="1it", deadline="5it", window=2).attach(
        model, optimizer, example_inputs=images(1)
    )
    before = copy.deepcopy(model[0].weight)
    for seed in range(6):
        optimizer.zero_grad()
        model(images(seed=seed)).square().mean().backward()
        optimizer.step()
    assert search.drawn
    assert model[0].weight.shape[0] < before.shape[0]


def test_unknown_scores_name_the_known():
    with pytest.raises(InputError, match="bn_scale, taylor, magnitude"):
        score_channels(make("plain"), "l2")


def test_one_layer_has_nothing_to_rank():
    with pytest.raises(InputError, match="no hidden"):
        eb.draw(nn.Linear(3, 2), 0.5, score="magnitude")


def test_scores_that_are_not_finite_are_refused():
    model = make("plain")
    model[1].weight.data[0] = float("nan")
    with pytest.raises(InputError, match="'1' are not finite"):
        eb.draw(model, 0.5)
