import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from earlybird.arithmetic import add, add_kernel
from earlybird.arithmetic.add import AddConv2d, AddLinear, adapt_gradients, add_conv2d, rescale_gradients
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.kernels.window import Window
from tests.arithmetic import naive


def seeded(*shape, seed=0, **kwargs):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **kwargs)


@pytest.mark.parametrize(
    ("x", "f", "y", "of_x", "of_f"),
    [
        (2.0, 0.5, -1.5, -1.0, 1.5),  # the distance is 1.5: the gradient of x is clipped, that of f is not
        (0.7, 0.5, -0.2, -0.2, 0.2),
        (-3.0, 0.5, -3.5, 1.0, -3.5),
        (0.5, 0.5, 0.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("rank", [2, 4])
def test_one_weight_by_hand(x, f, y, of_x, of_f, rank):
    shape = (1, 1, 1, 1)[:rank]
    image, filters = torch.tensor(x).view(shape).requires_grad_(), torch.tensor(f).view(shape).requires_grad_()
    found = add_conv2d(image, filters)
    (2 * found).sum().backward()
    assert found.item() == pytest.approx(y)
    assert image.grad.item() == pytest.approx(2 * of_x)
    assert filters.grad.item() == pytest.approx(2 * of_f)


def test_padding_counts_as_zeros():
    filters = seeded(1, 1, 3, 3)
    x = torch.full((1, 1, 1, 1), 0.3)
    expected = (x - filters[0, 0, 1, 1]).abs().item() + filters.abs().sum().item() - filters[0, 0, 1, 1].abs().item()
    assert add_conv2d(x, filters, padding=(1, 1)).item() == pytest.approx(-expected)


@pytest.mark.parametrize(
    "window",
    [
        Window((3, 3), (1, 1), (1, 1), (1, 1)),
        Window((3, 2), (2, 3), (2, 1), (2, 1)),
        Window((1, 1), (2, 2), (0, 0), (1, 1)),
    ],
)
@pytest.mark.parametrize("kernel", [True, False])
def test_gradients_are_those_of_the_definition(window, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(add_kernel, "_kernel", lambda: None)
    x, filters = (seeded(*shape, dtype=torch.float64) for shape in ((2, 3, 7, 6), (5, 3, *window.kernel)))
    x, filters = x.requires_grad_(), filters.requires_grad_()
    y = add_conv2d(x, filters, window.stride, window.padding, window.dilation)
    gradient = seeded(*y.shape, seed=1, dtype=torch.float64)
    y.backward(gradient)
    torch.testing.assert_close(y, naive.distances(x, filters, window))
    of_x, of_filters = naive.gradients(x, filters, gradient, window)
    torch.testing.assert_close(x.grad, of_x)
    torch.testing.assert_close(filters.grad, of_filters)


def test_only_the_gradients_that_are_asked_for_are_computed():
    x, filters = seeded(1, 2, 3, 3), seeded(2, 2, 1, 1)
    add_conv2d(x, filters.requires_grad_()).sum().backward()
    assert filters.grad is not None
    filters.grad = None
    filters.requires_grad_(False)
    add_conv2d(x.requires_grad_(), filters).sum().backward()
    assert x.grad is not None
    assert filters.grad is None


def test_half_types_are_summed_in_float32():
    x, filters = seeded(2, 64, 4, 4).bfloat16(), seeded(8, 64, 3, 3)
    wide = add_conv2d(x.float(), filters, padding=(1, 1))
    found = add_conv2d(x, filters, padding=(1, 1))  # as under autocast: half an image, whole filters
    assert found.dtype == torch.float32
    assert torch.equal(found, wide)
    assert torch.equal(add_conv2d(x, filters.bfloat16(), padding=(1, 1)).float(), add_conv2d(
        x.float(), filters.bfloat16().float(), padding=(1, 1)).bfloat16().float())  # fmt: skip
    image, own = x.clone().requires_grad_(), filters.bfloat16().requires_grad_()
    add_conv2d(image, own, padding=(1, 1)).sum().backward()
    assert image.grad.dtype == own.grad.dtype == torch.bfloat16


def test_pytorch_knows_the_operators():
    """Schema, fake tensors, autograd registration and tracing by AOT autograd."""
    x, filters = seeded(2, 3, 5, 4).requires_grad_(), seeded(4, 3, 3, 3).requires_grad_()
    operators = torch.ops.earlybird
    torch.library.opcheck(operators.add_conv2d.default, (x, filters, [1, 1], [1, 1], [1, 1]))
    plain = x.detach().contiguous(memory_format=torch.channels_last), filters.detach()
    torch.library.opcheck(operators.add_conv2d.default, (*plain, [2, 1], [1, 0], [1, 1]), test_utils="test_faketensor")
    torch.library.opcheck(
        operators.add_conv2d_input_gradient.default, (*plain, seeded(2, 4, 5, 4), [1, 1], [1, 1], [1, 1]),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    torch.library.opcheck(
        operators.add_conv2d.default, (seeded(5, 3), seeded(4, 3), [1, 1], [0, 0], [1, 1]), test_utils="test_faketensor"
    )


@pytest.mark.parametrize(("shape", "window"), [((2, 3, 7, 6), Window((3, 2), (2, 3), (2, 1), (2, 1))), ((5, 3), None)])
def test_for_other_runtimes_it_can_be_written_out(shape, window):
    x, filters = seeded(*shape), seeded(4, 3, *(window.kernel if window else ()))
    sizes = window[1:] if window else ((1, 1), (0, 0), (1, 1))
    torch.testing.assert_close(add._written_out(x, filters, *sizes), add_conv2d(x, filters, *sizes))


def test_a_distance_counts_as_one_mac():
    layer = AddConv2d(3, 8, 3, stride=2, padding=1)
    cost = count(nn.Sequential(nn.Conv2d(3, 3, 1), layer), seeded(2, 3, 8, 8)).layers["1"]
    assert (cost.macs, cost.error_macs, cost.weight_macs) == (16 * 8 * 27,) * 3
    assert layer.arithmetic.operations("forward") == {"add fp32": 2}
    assert count(nn.Sequential(AddLinear(6, 5)), seeded(2, 6)).layers["0"].macs == 30


@pytest.mark.parametrize(
    ("x", "filters", "message"),
    [
        ((2, 3, 4, 4), (5, 4, 3, 3), r"filters \(5, 4, 3, 3\) was given \(2, 3, 4, 4\)"),
        ((2, 3), (5, 3, 1, 1), "rows"),
        ((2, 3, 2, 2), (5, 3, 3, 3), r"images of \(2, 2\) are smaller than filters of \(3, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(x, filters, message):
    with pytest.raises(InputError, match=message):
        add_conv2d(torch.zeros(x), torch.zeros(filters))


def test_whole_numbers_are_refused():
    with pytest.raises(InputError, match="int64"):
        add_conv2d(torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 1))


class TestLayer:
    def test_filters_are_drawn_from_a_normal_distribution_by_its_generator(self):
        layer, other = AddConv2d(32, 64, 3), AddConv2d(32, 64, 3)
        for one in (layer, other):
            one.reset_parameters(torch.Generator().manual_seed(3))
        assert torch.equal(layer.weight, other.weight)
        weight = layer.weight.detach()
        assert float(weight.mean()) == pytest.approx(0, abs=0.03)
        assert float(weight.std()) == pytest.approx(1, abs=0.03)
        assert layer.bias is None

    @pytest.mark.parametrize("padding", ["same", "valid", 2, (1, 0)])
    @pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
    def test_it_moves_like_a_convolution(self, padding, mode):
        layer = AddConv2d(2, 3, (2, 3), padding=padding, padding_mode=mode)
        x = seeded(2, 2, 6, 7)
        size = {"same": (6, 7), "valid": (5, 5), 2: (9, 9), (1, 0): (7, 5)}[padding]
        assert layer(x).shape == (2, 3, *size)
        if padding == "same":
            padded = functional.pad(x, (1, 1, 0, 1), mode="constant" if mode == "zeros" else mode)
            torch.testing.assert_close(layer(x), add_conv2d(padded, layer.weight))

    def test_groups_are_refused(self):
        with pytest.raises(InputError, match="2 groups"):
            AddConv2d(4, 4, 3, groups=2)

    def test_of_more_dimensions_the_last_one_is_read(self):
        layer, x = AddLinear(6, 4, bias=True), seeded(2, 3, 6)
        nn.init.ones_(layer.bias)
        torch.testing.assert_close(layer(x), 1 - torch.cdist(x.view(6, 6), layer.weight, p=1).view(2, 3, 4))

    def test_copies_and_saved_states_are_the_same_layer(self):
        layer, x = AddConv2d(2, 3, 3, bias=True), seeded(1, 2, 4, 4)
        layer.silence(torch.tensor([True, False]))
        other = copy.deepcopy(layer)
        assert torch.equal(layer(x), other(x))
        assert set(layer.state_dict()) == {"weight", "bias", "constant"}
        assert set(AddConv2d(2, 3, 3).state_dict()) == {"weight"}

    def test_fixed_point_floors_both_operands(self):
        layer, x = AddConv2d(1, 1, 1, fraction_bits=2), torch.tensor([0.6, -0.1]).view(2, 1, 1, 1)
        nn.init.constant_(layer.weight, 0.3)  # 0.25
        assert layer(x).flatten().tolist() == [-0.25, -0.5]
        assert layer.arithmetic.operations("forward") == {"add 18": 2}
        with pytest.raises(InputError, match="fixed point of 17 bits after the point"):
            AddLinear(1, 1, fraction_bits=17)

    @pytest.mark.parametrize("fraction_bits", [None, 3])
    def test_channels_that_are_always_zero_can_go(self, fraction_bits):
        gone = torch.tensor([False, True, False, True])
        x = seeded(2, 4, 5, 5)
        x[:, gone] = 0
        whole = AddConv2d(4, 3, 3, padding=1, fraction_bits=fraction_bits)
        cut = AddConv2d(2, 3, 3, padding=1, fraction_bits=fraction_bits)
        cut.weight.data = whole.weight.data[:, ~gone]
        for first in (torch.tensor([False, True, False, False]), torch.tensor([False, False, False, True])):
            whole.silence(first)  # one after the other, as by two tickets
        cut.constant, whole.constant = whole.constant, None
        torch.testing.assert_close(cut(x[:, ~gone]), whole(x))


class TestAdaptiveGradient:
    def network(self):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 1), AddConv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), AddLinear(20, 3), nn.BatchNorm1d(3)
        )

    def gradients(self, model, scale=1.0):
        (scale * model(seeded(6, 3, 4, 4)).square().sum(0)[0]).backward()

    def test_its_root_mean_square_is_eta(self):
        model = self.network()
        self.gradients(model)
        before = [parameter.grad.clone() for parameter in model.parameters()]
        rescale_gradients([model[1].weight, model[4].weight], 0.05)
        for layer, old in ((model[1], before[2]), (model[4], before[5])):
            assert float(layer.weight.grad.square().mean().sqrt()) == pytest.approx(0.05)
            assert torch.allclose(layer.weight.grad, old * (0.05 * math.sqrt(old.numel()) / old.norm()))
        assert torch.equal(model[0].weight.grad, before[0])

    def test_zeros_stay_and_nothing_is_left_alone(self):
        weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        weight.grad = torch.zeros(3)
        rescale_gradients([weight, other])
        assert weight.grad.tolist() == [0, 0, 0]
        assert other.grad is None

    def test_a_fused_step_that_still_divides_gets_them_multiplied(self):
        weight = nn.Parameter(torch.ones(4))
        weight.grad = seeded(4)
        rescale_gradients([weight], 0.2, torch.tensor(1024.0))
        assert float(weight.grad.square().mean().sqrt()) == pytest.approx(0.2 * 1024)

    @pytest.mark.parametrize("scale", [1.0, 1e-3])
    def test_it_happens_in_the_step_whatever_clipping_and_accumulation_did_before(self, scale):
        model = self.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        handle = adapt_gradients(model, optimizer, 0.2)
        for _ in range(2):
            self.gradients(model, scale)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-4)
        before = model[1].weight.detach().clone()
        optimizer.step()
        step = (before - model[1].weight.detach()) / 0.5
        assert float(step.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-4)
        handle.remove()
        clipped = model[1].weight.grad.mul_(1e-3).clone()
        optimizer.step()
        assert torch.equal(model[1].weight.grad, clipped)

    def test_with_a_closure_it_happens_after_the_gradients(self):
        losses = []
        for positional in (True, False):
            model = self.network()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            adapt_gradients(model, optimizer, 0.2)
            before = model[1].weight.detach().clone()

            def closure(model=model, optimizer=optimizer):
                optimizer.zero_grad()
                self.gradients(model)
                return 7.0

            losses.append(optimizer.step(closure) if positional else optimizer.step(closure=closure))
            step = (before - model[1].weight.detach()) / 0.5
            assert float(step.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-4)
        assert losses == [7.0, 7.0]

    def test_each_optimizer_scales_what_it_holds(self):
        model = self.network()
        first = torch.optim.SGD([model[1].weight], lr=0.1)
        second = torch.optim.SGD([model[4].weight], lr=0.1)
        for one in (first, second):
            adapt_gradients(model, one, 0.2)
        self.gradients(model)
        untouched = model[4].weight.grad.clone()
        first.step()
        assert torch.equal(model[4].weight.grad, untouched)
        assert float(model[1].weight.grad.square().mean().sqrt()) == pytest.approx(0.2)
