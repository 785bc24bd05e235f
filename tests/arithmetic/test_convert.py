import pytest
import torch
from torch import nn

from earlybird.arithmetic.add import AddConv2d, AddLinear
from earlybird.arithmetic.convert import convert
from earlybird.arithmetic.shift import ShiftConv2d, ShiftLinear
from earlybird.calls import around
from earlybird.errors import InputError
from earlybird.models import build
from tests.tickets.topologies import conv, images, make, stem, tail


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def kinds(model):
    names = {ShiftConv2d: "shift", ShiftLinear: "shift", AddConv2d: "add", AddLinear: "add", nn.Conv2d: "conv",
             nn.Linear: "conv"}  # fmt: skip
    return {name: names[type(module)] for name, module in model.named_modules() if type(module) in names}


class TestOperations:
    def test_shift_converts_every_layer(self):
        model = make("residual")
        replaced = convert(model, "shift", generator=generator())
        assert set(kinds(model).values()) == {"shift"}
        assert set(kinds(model)) == set(replaced) == set(kinds(make("residual")))

    def test_add_leaves_the_ends_alone(self):
        model = make("residual")
        replaced = convert(model, "add", example_inputs=images(1), generator=generator())
        found = kinds(model)
        assert (found.pop("0"), found.pop("7")) == ("conv", "conv")
        assert set(found.values()) == {"add"}
        assert set(found) == set(replaced)

    def test_a_chain_shifts_with_the_stride_and_then_adds_with_none(self):
        model = make("residual")
        convert(model, "shift_add", example_inputs=images(1), generator=generator())
        assert (type(model[0]), type(model[7])) == (ShiftConv2d, ShiftLinear)
        chain = model[4].conv1
        shift, add = chain.shift, chain.add
        assert list(chain) == [shift, add]
        assert (shift.in_channels, shift.out_channels, shift.kernel_size, shift.stride) == (8, 12, (3, 3), (2, 2))
        assert (add.in_channels, add.out_channels, add.kernel_size, add.stride, add.padding) == (
            12, 12, (3, 3), (1, 1), (1, 1),
        )  # fmt: skip
        short = model[4].shortcut[0]  # the 1x1 convolution of the shortcut likewise
        assert (short.shift.kernel_size, short.shift.stride, short.add.kernel_size) == ((1, 1), (2, 2), (1, 1))

    def test_hidden_linear_layers_are_converted_too(self):
        for operation, name in (("add", "5"), ("shift_add", "5.add")):
            model = make("flatten")
            convert(model, operation, example_inputs=images(1), generator=generator())
            assert type(model.get_submodule(name)) is AddLinear
            model(images(3)).sum().backward()

    def test_a_filter_of_even_size_keeps_the_map(self):
        model = nn.Sequential(
            *stem(4), nn.Conv2d(4, 6, 2, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), *tail(6)
        )
        convert(model, "shift_add", example_inputs=images(1), generator=generator())
        assert model[3](torch.zeros(1, 4, 8, 8)).shape == (1, 6, 4, 4)

    @pytest.mark.parametrize("operation", ["shift", "add", "shift_add"])
    @pytest.mark.parametrize(
        ("spec", "settings"),
        [
            ("small_cnn", {"in_channels": 1, "image_size": 8, "width": 0.125}),
            ("resnet20", {"in_channels": 3, "image_size": 8, "width": 0.5}),
            ("vgg11", {"in_channels": 3, "image_size": 8, "width": 0.125}),
        ],
    )
    def test_networks_of_the_zoo_train(self, operation, spec, settings):
        model = build(spec, classes=10, **settings)
        x = torch.randn(2, settings["in_channels"], 8, 8, generator=generator())
        convert(model, operation, example_inputs=x, generator=generator())
        out = model(x)
        out.square().sum().backward()
        assert out.shape == (2, 10)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name

    def test_options_reach_the_layers(self):
        model = make("plain")
        convert(
            model, "shift_add", example_inputs=images(1), generator=generator(), form="frozen", bits=3, threshold=0.7,
            fraction_bits=15,
        )  # fmt: skip
        for layer in (model[0], model[3].shift, model[8]):
            assert (layer.form, layer.bits, layer.threshold, layer.fraction_bits) == ("frozen", 3, 0.7, 15)
        assert model[3].add.fraction_bits == 15


class TestWhatStays:
    def test_biases_stay_the_same_parameters_behind_the_last_layer(self):
        for operation, place in (("shift", "3"), ("add", "3"), ("shift_add", "3.add")):
            model = make("plain")
            bias = model[3].bias
            convert(model, operation, example_inputs=images(1), generator=generator())
            assert model.get_submodule(place).bias is bias
            assert "3.shift.bias" not in model.state_dict()

    def test_type_device_mode_and_order_of_memory(self):
        model = make("plain").double().to(memory_format=torch.channels_last).eval()
        convert(model, "shift_add", example_inputs=images(1).double(), generator=generator())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
        assert not any(module.training for module in model.modules())
        for weight in (model[3].shift.real, model[3].add.weight):
            assert weight.is_contiguous(memory_format=torch.channels_last)

    def test_the_weights_hang_on_the_generator_alone(self):
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            model = make("residual")
            state = torch.get_rng_state()
            convert(model, "shift_add", example_inputs=images(1), generator=generator(7))
            assert torch.equal(state, torch.get_rng_state())
            found.append(model.state_dict())
        assert all(torch.equal(one, two) for one, two in zip(*(state.values() for state in found), strict=True))

    def test_names_and_patterns_can_be_left_out(self):
        model = make("residual")
        convert(model, "shift", generator=generator(), leave=("0", "4.*"))
        found = kinds(model)
        assert {name for name, kind in found.items() if kind == "conv"} == {"0", "4.conv1", "4.conv2", "4.shortcut.0"}
        with pytest.raises(InputError, match=r"leave names 'conv9', which is no layer"):
            convert(make("residual"), "shift", leave=("conv9",))

    def test_frozen_layers_stay(self):
        model = make("plain")
        model[3].requires_grad_(False)
        convert(model, "shift", generator=generator())
        assert kinds(model) == {"0": "shift", "3": "conv", "8": "shift"}

    def test_a_layer_with_several_names_is_converted_once(self):
        model = make("plain")
        model.again = model[3]
        convert(model, "shift", generator=generator())
        assert model.again is model[3]
        assert type(model[3]) is ShiftConv2d


class TestRefusals:
    def check(self, model, operation, message, **kwargs):
        before = {name: type(module) for name, module in model.named_modules()}
        kwargs.setdefault("example_inputs", images(1))
        with pytest.raises(InputError, match=message):
            convert(model, operation, generator=generator(), **kwargs)
        assert {name: type(module) for name, module in model.named_modules()} == before

    def test_unknown_operation(self):
        self.check(make("plain"), "multiply", "operation is 'multiply'; one of shift, add, shift_add")

    @pytest.mark.parametrize("operation", ["add", "shift_add"])
    def test_distances_over_groups(self, operation):
        self.check(make("depthwise"), operation, r"layer '3.depthwise' has 12 groups.*leave=\('3.depthwise',\)")
        self.check(make("grouped"), operation, "layer '3' has 2 groups")

    def test_shifts_have_groups(self):
        model = make("depthwise")
        convert(model, "shift", generator=generator())
        assert model[3].depthwise.groups == 12
        model(images(2)).sum().backward()

    @pytest.mark.parametrize("operation", ["add", "shift_add"])
    def test_no_batch_norm_behind(self, operation):
        self.check(make("preact"), operation, "no batch norm takes the output of layer '1.conv2'")
        model = make("preact")
        convert(model, operation, example_inputs=images(1), generator=generator(), leave=("*.conv2",))
        assert "shift" not in kinds(model) if operation == "add" else "1.conv1.add" in kinds(model)

    def test_without_example_inputs_norms_cannot_be_found(self):
        self.check(make("plain"), "add", "pass example_inputs", example_inputs=None)

    def test_example_inputs_that_do_not_fit(self):
        self.check(make("plain"), "add", "does not run on one sample", example_inputs=torch.zeros(1, 7, 8, 8))

    def test_other_types_of_layers(self):
        self.check(make("transposed"), "shift", r"layer '3' is a ConvTranspose2d.*leave=\('3',\)")

    def test_converted_already(self):
        model = make("plain")
        convert(model, "shift", generator=generator())
        self.check(model, "shift", "layer '0' is converted already")

    def test_layers_with_hooks(self):
        model = make("plain")
        model[3].register_forward_hook(lambda *args: None)
        self.check(model, "shift", "layer '3' has hooks")
        model = make("plain")
        around(model[3], lambda forward, x: forward(x))
        self.check(model, "shift", "layer '3' has hooks")

    def test_shared_weights(self):
        model = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), conv(3, 3), nn.BatchNorm2d(3))
        model[2].weight = model[0].weight
        self.check(model, "shift", "layers '0' and '2' share a weight")

    def test_nothing_to_convert(self):
        self.check(nn.Sequential(nn.BatchNorm2d(3)), "shift", "Sequential has no layer to convert")
        self.check(conv(3, 3), "shift", "the model is a Conv2d itself")
