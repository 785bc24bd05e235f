"""Prices and the anchors that papers publish."""

from __future__ import annotations

import pytest
import torch
import torch_pruning
from torch import nn

from earlybird.cost.count import count
from earlybird.cost.energy import MAC_PICOJOULES, PRICES, energy, joules
from earlybird.errors import InputError
from earlybird.models import build


def test_every_price_names_its_source() -> None:
    assert all(price.source and 0 < price.low <= price.high for price in PRICES.values())


@pytest.mark.parametrize(
    ("kind", "picojoules"),
    [("fp32", 4.6), ("fp16", 1.5), ("int32", 3.2), ("int8", 0.23), ("int8_into_int32", 0.3), ("int16", 0.85)],
)
def test_price_of_a_mac(kind: str, picojoules: float) -> None:
    assert MAC_PICOJOULES[kind] == pytest.approx(picojoules)


def test_published_ratios() -> None:
    assert MAC_PICOJOULES["fp32"] / MAC_PICOJOULES["int8"] == pytest.approx(20)
    assert PRICES["int32_mult"].low / PRICES["int32_add"].low == pytest.approx(31)
    assert PRICES["fpga_mult_fix32"].low / PRICES["fpga_add_fix32"].low == pytest.approx(196)


def test_convolution_of_the_card_example() -> None:
    """3 x 1 179 648 MACs at 4.6 pJ: 16.3 uJ."""
    assert joules(3 * 1_179_648, 0).compute_joules == pytest.approx(16.3e-6, rel=2e-3)


def test_movement_is_priced_per_64_bits_and_as_a_range() -> None:
    moved = joules(0, 8_000)
    assert moved.movement_joules_low == pytest.approx(1000 * 1300e-12)
    assert moved.movement_joules_high == pytest.approx(1000 * 2600e-12)
    assert moved.compute_joules == 0
    assert (moved.low, moved.high) == (moved.movement_joules_low, moved.movement_joules_high)


def test_energy_of_a_step_by_hand() -> None:
    cost = count(nn.Linear(10, 5, bias=False), torch.zeros(2, 10))
    step = energy(cost, images=8, batches=1)
    assert step.compute_joules == pytest.approx(8 * 2 * 50 * 4.6e-12)
    moved = 4 * (8 * (10 + 5 + 10 + 5) + 3 * 50) + 16 * 50
    assert step.movement_joules_low == pytest.approx(moved / 8 * 1300e-12)
    forward = energy(cost, images=8, bits=16, batches=1, training=False)
    assert forward.compute_joules == pytest.approx(8 * 50 * 1.5e-12)
    assert forward.movement_joules_low == pytest.approx(2 * (8 * 15 + 50) / 8 * 1300e-12)


def test_width_without_price_is_refused() -> None:
    with pytest.raises(InputError, match="8-bit floating point"):
        joules(1, 1, bits=8)


# published as 3 x forward for a step and 2 FLOPs for a MAC; the true count lacks the first layer's input gradient
@pytest.mark.parametrize(
    ("name", "image_size", "classes", "images", "petaflops"),
    [
        ("resnet18", 224, 1000, 1_281_167 * 90, 1259.13),
        ("vgg16", 32, 100, 50_000 * 160, 15.1),
    ],
)
def test_published_training_totals(name: str, image_size: int, classes: int, images: int, petaflops: float) -> None:
    cost = count(build(name, classes=classes, image_size=image_size), torch.zeros(1, 3, image_size, image_size))
    assert 2 * 3 * cost.forward_macs * images / 1e15 == pytest.approx(petaflops, rel=0.005)
    assert 2 * cost.training_macs * images / 1e15 == pytest.approx(petaflops, rel=0.03)


def test_published_total_of_an_early_bird_run() -> None:
    """Early-Bird ResNet-18 at 30 %: 952.46 PFLOP, of which the epochs before the draw (11 of 90) are dense.

    The ticket's widths are not published; here 30 % go evenly from the first convolution of every block, since
    the others are held by the residual sums.
    """
    model, image = build("resnet18", classes=1000, image_size=224), torch.zeros(1, 3, 224, 224)
    dense = count(model, image)
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=image)
    for block in model.blocks:
        dropped = list(range(round(0.3 * block.conv1.out_channels)))
        graph.get_pruning_group(block.conv1, torch_pruning.prune_conv_out_channels, idxs=dropped).prune()
    ticket = count(model, image)
    macs = 3 * 1_281_167 * (11 * dense.forward_macs + 79 * ticket.forward_macs)
    assert 2 * macs / 1e15 == pytest.approx(952.46, rel=0.01)
