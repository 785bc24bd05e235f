from xml.etree import ElementTree

import pytest
import roofline
import torch
from roofline import BATCH, Machine, Operation, operations

from earlybird.cost.count import count
from earlybird.models import build

CONVOLUTION = Operation("convolution", "forward", 4, 8, 16)


def test_the_operations_of_a_network_add_up_to_its_training_macs():
    model, images = build("vgg16", classes=10, width=0.125), torch.randn(2, 3, 32, 32)
    cost = count(model, images)
    classifier = 3 * model.classifier.weight.numel()
    found = [one for many in operations(model, images).values() for one in many]
    assert sum(one.counted_macs for one in found) == BATCH * (cost.training_macs - classifier)
    assert sum(one.counted_macs for one in found if one.phase == "forward") == BATCH * (
        cost.forward_macs - classifier // 3
    )


@pytest.mark.parametrize("side", [1, 2, 4, 32])
def test_flops_leave_out_what_multiplies_with_padding(side):
    """Counted by a convolution of ones: each output is the number of taps that fall on the image."""
    taps = torch.nn.functional.conv2d(torch.ones(1, 1, side, side), torch.ones(1, 1, 3, 3), padding=1)
    assert Operation("convolution", "forward", side, 8, 16).flops == 2 * BATCH * 8 * 16 * int(taps.sum())


def test_bytes_by_hand():
    """Batch 128 of 4 x 4 positions: 2048; bf16."""
    assert CONVOLUTION.moved == 2 * (2048 * (8 + 16) + 9 * 8 * 16)
    assert Operation("norm", "forward", 4, 8, 8).moved == 3 * 2 * 2048 * 8
    assert Operation("norm", "backward", 4, 8, 8).moved == 5 * 2 * 2048 * 8
    assert Operation("relu", "forward", 4, 8, 8).moved == 2 * 2 * 2048 * 8
    assert Operation("relu", "backward", 4, 8, 8).moved == 3 * 2 * 2048 * 8
    assert Operation("pool", "forward", 4, 8, 8).moved == 2048 * 8 * 2 + 512 * 8 * (2 + 8)


@pytest.mark.parametrize("phase", ["forward", "input", "weight"])
def test_a_convolutions_parts_have_the_shapes_of_what_they_stand_for(phase):
    result = Operation("convolution", phase, 2, 3, 5).make()()
    result = result if phase == "forward" else result[phase == "weight"]
    shape = {"forward": (BATCH, 5, 2, 2), "input": (BATCH, 3, 2, 2), "weight": (5, 3, 3, 3)}[phase]
    assert tuple(result.shape) == shape


@pytest.mark.parametrize(("kind", "phase", "side"), [
    ("norm", "forward", 4), ("norm", "backward", 4), ("relu", "forward", 4), ("relu", "backward", 4),
    ("pool", "forward", 2), ("pool", "backward", 4),
])  # fmt: skip
def test_elementwise_operations_run(kind, phase, side):
    result = Operation(kind, phase, 4, 8, 8).make()()
    result = result if isinstance(result, torch.Tensor) else result[0]
    assert tuple(result.shape) == (BATCH, 8, side, side)
    assert result.dtype == torch.bfloat16


def test_the_roof_is_bandwidth_at_low_and_peak_at_high_intensity():
    able_to = Machine(peak=100.0, copies={10: 8.0, 1000: 2.0})
    assert able_to.attainable(flops=1000, moved=10) == 10.0  # 1000 FLOPs at the peak
    assert able_to.attainable(flops=1, moved=100) == 50.0  # the copy that holds 100 bytes
    assert able_to.bandwidth(10) == 8.0
    assert able_to.bandwidth(10_000) == 2.0  # larger than any that was measured


def test_figures_of_made_up_rows_are_well_formed(head):
    entry = ["features.0", "convolution", "forward", 4, 8, 16, 1e-4]
    row = {"operations": [entry], "copies": {"100": 1e10}, "peak": 4e11, **head()}
    svg = ElementTree.fromstring(roofline.roofline_figure([{**row, "network": name} for name in ("dense", "ticket")]))
    assert len(svg.findall(".//{*}circle")) == 2
    seconds = {phase: {"8": 1e-4, "16": 2e-4} for phase in ("forward", "input", "weight")}
    svg = ElementTree.fromstring(roofline.channels_figure([{"side": 8, "seconds": seconds, "peak": 4e11, **head()}]))
    assert len(svg.findall(".//{*}circle")) == 6
