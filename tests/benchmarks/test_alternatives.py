import alternatives
import pytest
import torch
from alternatives import (
    check,
    forward,
    forward_as_products,
    input_gradient_by_forward,
    weight_gradient_as_products,
    weight_gradient_of_2x2,
    with_products,
)
from torch.nn import functional

from earlybird.models import build


def operands(side, inputs=3, outputs=5):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, inputs, side, side), (2, outputs, side, side), (outputs, inputs, 3, 3)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(memory_format=torch.channels_last)
        for shape in shapes
    ]


def by_autograd(x, y, weight):
    """Gradients of input and weight where that of the output is ``y``."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    return torch.autograd.grad(functional.conv2d(x, weight, padding=1), (x, weight), y)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7])
def test_products_are_the_convolution_and_its_gradients(side):
    x, y, weight = operands(side)
    of_input, of_weight = by_autograd(x, y, weight)
    torch.testing.assert_close(forward_as_products(x, weight), functional.conv2d(x, weight, padding=1))
    torch.testing.assert_close(input_gradient_by_forward(x, y, weight), of_input)
    torch.testing.assert_close(weight_gradient_as_products(x, y), of_weight)


def test_on_2x2_maps_one_product_holds_all_taps():
    x, y, weight = operands(2)
    torch.testing.assert_close(weight_gradient_of_2x2(x, y), by_autograd(x, y, weight)[1])


def test_a_network_with_products_trains_alike():
    """Every map of a 4x4 image is small; bf16 has 8 bits."""
    images, gradients = torch.randn(8, 3, 4, 4), []
    for most in (0, 4):
        model = with_products(build("vgg11", classes=10, image_size=4, width=0.125), most)
        with torch.autocast("cpu", torch.bfloat16):
            model(images).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for own, other in zip(*gradients):
        assert float((own - other).norm() / own.norm()) < 0.05


def test_only_small_maps_are_changed(monkeypatch):
    sides = []
    monkeypatch.setattr(alternatives, "forward", lambda x, weight: sides.append(x.shape[-1]) or forward(x, weight))
    model = with_products(build("vgg11", classes=10, image_size=8, width=0.125), 2)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 8, 8))
    assert set(sides) == {1, 2}


def test_a_way_that_computes_something_else_is_found_out():
    ones = torch.ones(2, 2)
    check({("forward", ""): lambda: ones, ("forward", "same"): lambda: ones * 1.001})
    with pytest.raises(RuntimeError, match="other computes another forward"):
        check({("forward", ""): lambda: ones, ("forward", "other"): lambda: ones * 1.1})
