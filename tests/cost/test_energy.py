"""Prices and the anchors that papers publish."""

from __future__ import annotations

import math

import pytest
import torch
import torch_pruning
from torch import nn

from earlybird.cost.arithmetic import PASSES, Arithmetic
from earlybird.cost.count import count
from earlybird.cost.energy import FPGA, PRICES, joules, picojoules
from earlybird.errors import InputError
from earlybird.models import build
from earlybird.precision.int8 import ARITHMETIC


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


def mac(multiply: str, add: str) -> float:
    return picojoules(multiply) + picojoules(add)


@pytest.mark.parametrize(
    ("multiply", "add", "expected"),
    [
        ("mult fp32", "add fp32", 4.6), ("mult fp16", "add fp16", 1.5), ("mult 32x32", "add 32", 3.2),
        ("mult 8x8", "add 8", 0.23), ("mult 8x8", "add 32", 0.3), ("mult 16x16", "add 16", 0.85),
        ("shift 32", "add 32", 0.23), ("shift 8", "add 8", 0.054),
    ],
)  # fmt: skip
def test_price_of_a_mac(multiply: str, add: str, expected: float) -> None:
    assert mac(multiply, add) == pytest.approx(expected)


def test_published_ratios() -> None:
    assert mac("mult fp32", "add fp32") / mac("mult 8x8", "add 8") == pytest.approx(20)
    assert picojoules("mult 32x32") / picojoules("add 32") == pytest.approx(31)
    assert picojoules("mult 32x32", FPGA) / picojoules("add 32", FPGA) == pytest.approx(196)


def test_widths_that_the_table_lacks_lie_on_a_power_law_through_its_entries() -> None:
    """Below 8 bits it goes on as between 8 and 16: a product of 4 x 8 bits is about half of one of 8 x 8."""
    assert picojoules("mult 4x8") == pytest.approx(0.2 * 0.5)
    assert picojoules("add 4") == pytest.approx(0.03 * 0.5 ** (math.log(0.05 / 0.03) / math.log(2)))
    assert 0.2 < picojoules("mult 16x8") < 0.8 < picojoules("mult 24x16") < 3.1
    assert picojoules("mult 8x8", FPGA) < picojoules("mult 16x16", FPGA) < picojoules("mult 32x32", FPGA)


@pytest.mark.parametrize(
    ("operation", "table"), [("mult fp8", "45nm"), ("mult fp16", "fpga"), ("divide 8", "45nm"), ("add 8", "7nm")]
)
def test_what_has_no_price_is_refused_by_name(operation: str, table: str) -> None:
    with pytest.raises(InputError, match=operation):
        picojoules(operation, table)


def test_a_training_step_of_a_convolution_at_the_prices_of_horowitz() -> None:
    """3 x 3 kernel, 16 to 32 channels, 16 x 16 positions, 3 passes, 3.7 + 0.9 pJ a MAC: 16.3 uJ."""
    macs = 3 * (3 * 3 * 16 * 32 * 16 * 16)
    assert joules({"mult fp32": macs, "add fp32": macs}, 0).compute_joules == pytest.approx(16.3e-6, rel=2e-3)


def test_movement_is_priced_per_64_bits_and_as_a_range() -> None:
    moved = joules({}, 8_000)
    assert moved.movement_joules_low == pytest.approx(1000 * 1300e-12)
    assert moved.movement_joules_high == pytest.approx(1000 * 2600e-12)
    assert moved.compute_joules == 0
    assert (moved.low, moved.high) == (moved.movement_joules_low, moved.movement_joules_high)


def test_energy_of_a_step_by_hand() -> None:
    cost = count(nn.Linear(10, 5, bias=False), torch.zeros(2, 10))
    amount = cost.amount(8, 1, 32, training=True)
    assert amount.operations == {"mult fp32": 8 * 2 * 50, "add fp32": 8 * 2 * 50}
    step = joules(amount.operations, amount.moved_bits / 8 + cost.update_bytes)
    assert step.compute_joules == pytest.approx(8 * 2 * 50 * 4.6e-12)
    moved = 4 * (8 * (10 + 5 + 10 + 5) + 3 * 50) + 16 * 50
    assert step.movement_joules_low == pytest.approx(moved / 8 * 1300e-12)
    half = cost.amount(8, 1, 16, training=False)
    forward = joules(half.operations, half.moved_bits / 8)
    assert forward.compute_joules == pytest.approx(8 * 50 * 1.5e-12)
    assert forward.movement_joules_low == pytest.approx(2 * (8 * 15 + 50) / 8 * 1300e-12)


@pytest.mark.parametrize(
    ("arithmetic", "percent"),
    [
        (Arithmetic(activation=8, weight=8, gradient=8, whole=PASSES), 6.25),
        (Arithmetic(activation=6, weight=6, gradient=8, whole=PASSES), 4.3),
        (Arithmetic(activation=3, weight=3, gradient=6, whole=PASSES), 1.46),
        (Arithmetic(), 100),
    ],
)
def test_published_shares_of_full_compute(arithmetic: Arithmetic, percent: float) -> None:
    """FracTrain's static recipes: mean over the three passes of the product of both operands' shares of 32 bits."""
    share = sum(arithmetic.bit_macs(pass_) for pass_ in ("forward", "error", "weight")) / 3
    assert 100 * share == pytest.approx(percent, rel=5e-3)


def test_published_bit_macs_of_a_run_at_8_bits() -> None:
    """ResNet-38, CIFAR-10, 64,000 steps of 128 images, FW-8/BW-8: some 1.27e14, of which the paper counted 1.18e14."""
    model = build("resnet38", classes=10, image_size=32)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.arithmetic = Arithmetic(activation=8, weight=8, gradient=8, whole=PASSES)  # type: ignore[assignment]
    cost = count(model, torch.zeros(1, 3, 32, 32))
    spent = sum(cost.amount(64_000 * 128, 0, 32, training=True).bit_macs.values())
    assert spent == pytest.approx(1.27e14, rel=0.03)


def test_a_step_of_shift_and_add_layers_counts_what_its_passes_really_are() -> None:
    layer = nn.Linear(10, 5, bias=False)
    layer.arithmetic = Arithmetic(kind="shift", activation=8, weight=5, gradient=8, whole=PASSES)  # type: ignore[assignment]
    x = torch.zeros(2, 10, requires_grad=True)
    model = nn.Sequential(nn.Linear(10, 10, bias=False), layer)
    found = count(model, x).amount(1, 0, 32, training=True).operations
    # forward and error pass shift by the weight; the weight's own gradient is a product
    assert found == {"mult fp32": 200, "add fp32": 200, "shift 8": 100, "add 8": 150, "mult 8x8": 50}
    layer.arithmetic = Arithmetic(kind="add")  # type: ignore[assignment]
    found = count(model, x).amount(1, 0, 32, training=False).operations
    assert found == {"mult fp32": 100, "add fp32": 100 + 2 * 50}


def test_passes_in_floating_point_are_charged_as_such() -> None:
    """Fixed point holds forward alone: the backward passes of shift, add and int8 layers compute in floats."""
    fixed = Arithmetic(kind="shift", activation=24, weight=5, whole=("forward",))
    assert fixed.operations("forward") == {"shift 24": 1, "add 24": 1}
    assert fixed.operations("error") == {"shift 32": 1, "add fp32": 1}
    assert fixed.operations("weight") == {"mult fp32": 1, "add fp32": 1}
    assert ARITHMETIC.operations("forward") == {"mult 8x8": 1, "add 8": 1}
    assert ARITHMETIC.operations("error") == {"mult fp16": 1, "add fp16": 1}
    assert ARITHMETIC.operations("weight") == {"mult fp16": 1, "add fp16": 1}


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
