"""Prices and the anchors that papers publish."""

from __future__ import annotations

import pytest
import torch
import torch_pruning
from torch import nn

from earlybird.cost.count import count
from earlybird.cost.energy import MAC_PICOJOULES, PRICES, joules
from earlybird.errors import InputError
from earlybird.models import build


def test_prices_are_the_published_ones_and_every_one_names_its_source() -> None:
    """Picojoules as in the tables that the sources name; the two 16-bit integers are our own estimate."""
    published = {
        "Horowitz, ISSCC 2014": {
            "int8_add": 0.03, "int32_add": 0.1, "int8_mult": 0.2, "int32_mult": 3.1, "fp16_add": 0.4, "fp32_add": 0.9,
            "fp16_mult": 1.1, "fp32_mult": 3.7, "sram_8KB_64bit": 10, "sram_32KB_64bit": 20, "sram_1MB_64bit": 100,
            "cpu_instruction": 70, "dram_64bit": (1300, 2600),
        },
        "estimated from": {"int16_add": 0.05, "int16_mult": 0.8},
        "Han et al.": {"sram_32KB_32bit": 5, "dram_32bit": 640},
        "ShiftAddNet (You et al., NeurIPS 2020), ASIC": {
            "shift_fix32": 0.13, "shift_fix16": 0.057, "shift_fix8": 0.024
        },
        "ShiftAddNet (You et al., NeurIPS 2020), table 1": {
            "fpga_mult_fp32": 18.8, "fpga_mult_fix32": 19.6, "fpga_mult_fix8": 0.2, "fpga_add_fp32": 0.4,
            "fpga_add_fix32": 0.1, "fpga_add_fix8": 0.1, "fpga_shift_fix32": 0.1, "fpga_shift_fix8": 0.025,
        },
    }  # fmt: skip
    assert {key for table in published.values() for key in table} == set(PRICES)
    for source, table in published.items():
        for key, value in table.items():
            low, high = value if isinstance(value, tuple) else (value, value)
            assert (PRICES[key].low, PRICES[key].high) == (low, high)
            assert PRICES[key].source.startswith(source)


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


def test_a_training_step_of_a_convolution_at_the_prices_of_horowitz() -> None:
    """3 x 3 kernel, 16 to 32 channels, 16 x 16 positions, 3 passes, 3.7 + 0.9 pJ a MAC: 16.3 uJ."""
    assert joules(3 * (3 * 3 * 16 * 32 * 16 * 16), 0).compute_joules == pytest.approx(16.3e-6, rel=2e-3)


def test_movement_is_priced_per_64_bits_and_as_a_range() -> None:
    moved = joules(0, 8_000)
    assert moved.movement_joules_low == pytest.approx(1000 * 1300e-12)
    assert moved.movement_joules_high == pytest.approx(1000 * 2600e-12)
    assert moved.compute_joules == 0
    assert (moved.low, moved.high) == (moved.movement_joules_low, moved.movement_joules_high)


def test_energy_of_a_step_by_hand() -> None:
    cost = count(nn.Linear(10, 5, bias=False), torch.zeros(2, 10))
    step = joules(8 * cost.training_macs, cost.moved_bytes(8, 1, 32, training=True) + cost.update_bytes)
    assert step.compute_joules == pytest.approx(8 * 2 * 50 * 4.6e-12)
    moved = 4 * (8 * (10 + 5 + 10 + 5) + 3 * 50) + 16 * 50
    assert step.movement_joules_low == pytest.approx(moved / 8 * 1300e-12)
    forward = joules(8 * cost.forward_macs, cost.moved_bytes(8, 1, 16, training=False), bits=16)
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
