"""Counts against hand calculation, published figures and real shrinks; the model is left as found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch_pruning
from torch import nn
from torch.nn import functional

from earlybird.cost.count import ModelCost, count
from earlybird.errors import InputError
from earlybird.ledger import Ledger
from earlybird.models import build


def test_convolution_by_hand_costs_three_passes_in_training() -> None:
    """3x3 convolution 16 -> 32 on 16x16: 1 179 648 MACs forward, three times that for a step."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, padding=1))
    cost = count(model, torch.zeros(4, 3, 16, 16))
    layer = cost.layers["1"]
    assert layer.macs == 1_179_648
    assert layer.backward_macs == 2 * 1_179_648
    assert (layer.input_elements, layer.output_elements, layer.weight_elements) == (16 * 256, 32 * 256, 32 * 16 * 9)
    assert layer.backward_elements == 2 * 16 * 256 + 32 * 256


def test_first_layer_has_no_input_gradient() -> None:
    cost = count(nn.Conv2d(3, 8, 3), torch.zeros(2, 3, 10, 10))
    assert cost.forward_macs == 8 * 3 * 9 * 64
    assert cost.backward_macs == cost.forward_macs
    assert cost.training_macs == 2 * cost.forward_macs


def test_frozen_layers_cost_no_weight_gradient() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)).requires_grad_(False)
    assert count(model, torch.zeros(2, 8)).backward_macs == 0
    model[1].weight.requires_grad_()
    assert count(model, torch.zeros(2, 8)).backward_macs == 32
    model[0].weight.requires_grad_()
    assert count(model, torch.zeros(2, 8)).backward_macs == 64 + 2 * 32


@pytest.mark.parametrize(
    ("layer", "inputs", "macs"),
    [
        (nn.Conv2d(8, 16, 3, groups=4, stride=2, padding=1), (3, 8, 10, 10), 16 * 2 * 9 * 25),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), (3, 8, 10, 10), 8 * 9 * 100),
        (nn.Conv2d(4, 4, 3, dilation=2), (3, 4, 10, 10), 16 * 9 * 36),
        (nn.ConvTranspose2d(8, 4, 2, stride=2), (3, 8, 5, 5), 8 * 4 * 4 * 25),
        (nn.Conv1d(4, 6, 5), (3, 4, 20), 6 * 4 * 5 * 16),
        (nn.Conv3d(2, 3, 2), (3, 2, 4, 4, 4), 3 * 2 * 8 * 27),
        (nn.Linear(7, 5), (3, 7), 35),
        (nn.Linear(7, 5), (3, 11, 7), 11 * 35),
        (nn.LSTM(8, 16, batch_first=True), (3, 5, 8), 5 * 4 * 16 * (8 + 16)),
        (nn.GRU(8, 16, batch_first=True), (3, 5, 8), 5 * 3 * 16 * (8 + 16)),
        (nn.BatchNorm2d(8), (3, 8, 4, 4), 0),
    ],
)
def test_layers_by_hand(layer: nn.Module, inputs: tuple[int, ...], macs: int) -> None:
    cost = count(layer, torch.zeros(inputs))
    assert cost.forward_macs == macs
    assert cost.parameters == sum(parameter.numel() for parameter in layer.parameters())


class Functional(nn.Module):
    """Products outside any layer, a layer used twice, and einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 6))
        self.twice = nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(x))
        x = functional.linear(x, self.weight)
        return torch.einsum("ni,ij->nj", x, self.weight) @ self.weight


def test_functional_calls_and_shared_layers_count_too() -> None:
    cost = count(Functional(), torch.zeros(4, 6))
    assert cost.forward_macs == 5 * 36
    assert cost.layers["twice"].macs == 2 * 36
    assert cost.layers[""].macs == 3 * 36
    assert cost.layers[""].weight_elements == 3 * 36
    assert cost.parameters == 72


def test_a_frozen_transformer_layer_is_counted_too() -> None:
    """In evaluation, PyTorch has one operation for all of it where nothing learns."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    macs = 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8
    assert count(layer, torch.randn(1, 5, 8)).forward_macs == macs
    assert count(layer.requires_grad_(False), torch.randn(1, 5, 8)).forward_macs == macs


def test_attention_by_hand() -> None:
    length, width = 5, 16
    cost = count(nn.MultiheadAttention(width, 4, batch_first=True), (torch.randn(2, length, width),) * 3)
    projections, products = 4 * length * width**2, 2 * length**2 * width
    assert cost.forward_macs == projections + products
    # query, key and value come from data: their projections have no input gradient
    assert cost.backward_macs == 3 * length * width**2 + 2 * length * width**2 + 2 * products


def test_training_macs_agree_with_a_real_backward_pass() -> None:
    """torch counts both passes itself, at 2 FLOPs a MAC (but wrongly in the backward of grouped convolutions)."""
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("resnet20", "resnet50"):
        model, images = build(name, classes=10, width=0.5).train(), torch.zeros(2, 3, 32, 32)
        with FlopCounterMode(display=False) as counter:
            model(images).sum().backward()
        assert count(model, images).training_macs == counter.get_total_flops() / 2 / 2


def test_vgg_before_and_after_a_real_shrink_follows_the_widths() -> None:
    model, images = build("vgg11", classes=10, width=0.25), torch.zeros(2, 3, 32, 32)
    before = count(model, images)
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=images)
    for layer in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
        half = list(range(layer.out_channels // 2))
        graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, idxs=half).prune()
    after = count(model, images)
    for name in before.layers:
        both_sides = 2 if name in ("features.0", "classifier") else 4  # image channels and classes stay
        assert before.layers[name].macs == both_sides * after.layers[name].macs


def test_a_count_of_an_older_version_is_still_read() -> None:
    cost = count(nn.Linear(7, 5), torch.zeros(3, 7))
    older = {**cost.to_json(), "batch": 3, "activation_bytes": 28, "parameter_bytes": 160}
    assert ModelCost.from_json(older) == replace(cost, layers={})


def test_parametrised_weights_count_as_weights() -> None:
    plain = nn.Linear(6, 4)
    wrapped = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    assert count(wrapped, torch.zeros(2, 6)).layers[""] == count(plain, torch.zeros(2, 6)).layers[""]


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_found(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten(), nn.Linear(288, 2))
    model.train(training)
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    images = torch.randn(4, 3, 8, 8)
    modes = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    generator, before = torch.get_rng_state(), images.clone()
    count(model, images)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(images, before)
    assert (model[0].weight.grad == 1).all()
    assert model[4].weight.grad is None


class Restless(nn.Module):
    """Changes a buffer and draws random numbers even in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x + torch.rand_like(x))


def test_restless_model_is_left_as_found_too() -> None:
    model, generator = Restless(), torch.get_rng_state()
    assert count(model, torch.zeros(2, 4)).forward_macs == 16
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), generator)


def test_failure_names_the_cure_and_leaves_no_hooks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    with pytest.raises(InputError, match=r"does not run on one sample.*pass example_inputs=x"):
        count(model, torch.zeros(2, 5))
    assert model.training
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_modes_of_the_caller_do_not_change_the_count() -> None:
    model, images = build("resnet20", classes=10), torch.zeros(2, 3, 32, 32)
    expected = count(model, images)
    with torch.no_grad():
        assert count(model, images) == expected
    with torch.inference_mode():
        assert count(model, torch.zeros(2, 3, 32, 32)) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert count(model, images) == expected


def test_compiled_and_wrapped_models_are_counted_inside() -> None:
    model, images = build("small_cnn", classes=10, image_size=8), torch.zeros(2, 3, 8, 8)
    expected = count(model, images)
    compiled = torch.compile(model, backend="eager")
    compiled(images)
    assert count(compiled, images) == expected
    assert count(nn.DataParallel(model), images) == expected


def test_inputs_by_keyword_and_by_position() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(5, 4, bias=False)

        def forward(self, x: torch.Tensor, y: torch.Tensor, flag: bool = True) -> torch.Tensor:
            return self.a(x) + self.b(y) if flag else self.a(x)

    x, y = torch.zeros(6, 3), torch.zeros(6, 5)
    by_position, by_keyword = count(Two(), (x, y)), count(Two(), {"x": x, "y": y, "flag": True})
    assert by_position.forward_macs == by_keyword.forward_macs == 32
    assert count(Two(), {"x": x, "y": y, "flag": False}).forward_macs == 12


def test_moved_bytes_by_hand() -> None:
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.Linear(20, 5, bias=False))
    cost = count(model, torch.zeros(2, 10))
    forward, weights = 10 + 20 + 20 + 5, 200 + 100
    # backward: both inputs again, both output gradients, and the gradient of the second input
    backward = (10 + 20) + (20 + 5) + 20
    assert cost.moved_bytes(8, 2, 32, training=False) == 4 * (8 * forward + 2 * weights)
    assert cost.moved_bytes(8, 2, 16, training=True) == 2 * (8 * (forward + backward) + 3 * 2 * weights)
    assert cost.update_bytes == 16 * 300


def test_totals_survive_json() -> None:
    cost = count(build("small_cnn", classes=10, image_size=8), torch.zeros(2, 3, 8, 8))
    again = ModelCost.from_json(cost.to_json())
    assert again.to_json() == cost.to_json()
    assert again.training_macs == cost.training_macs


def test_a_watched_model_is_counted_once_and_the_ledger_sees_none_of_it() -> None:
    """The ledger's hook would count the new size itself, inside this count."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(1))
    alone = count(model, torch.zeros(1, 1, 8, 8))
    ledger = Ledger()
    ledger.watch(model, example_inputs=torch.zeros(1, 1, 16, 16))
    ledger.enter("train")
    assert count(model, torch.zeros(1, 1, 8, 8)) == alone
    assert ledger.phases["train"].images == 0
