import pytest
import torch
from torch import nn

import earlybird as eb
from earlybird.errors import InputError
from earlybird.kernels import batch_norm
from earlybird.kernels.install import Kernels, install

PRODUCTS = Kernels(products_for_weights=64, products_for_all=64)


def images():
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def traces(model):
    return [name for name, module in model.named_modules() if {"forward", "_conv_forward"} & vars(module).keys()]


def test_they_compute_the_same_and_leave_no_trace():
    model, plain = network(), network()
    handle = eb.use_kernels(model, images())
    assert [gain.positions for gain in handle.gains] == [16, 36]
    assert handle.kernels.batch_norms == batch_norm.available()
    for own in (model, plain):
        own(images()).square().mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    handle.remove()
    assert traces(model) == []


def test_a_model_that_has_them_already_is_refused():
    """The second ones were put around the first, which then fused no ReLU."""
    model = network()
    handle = install(model, PRODUCTS, images())
    with pytest.raises(InputError, match=r"already; call remove\(\)"):
        install(model, PRODUCTS, images())
    handle.remove()
    install(model, PRODUCTS, images())


@pytest.mark.skipif(batch_norm._kernel() is None, reason="the kernel cannot be compiled here")
def test_an_example_that_the_model_cannot_take_leaves_no_trace():
    """Convolutions kept their products, and nobody had a handle to remove them."""
    model = network()
    with pytest.raises(RuntimeError, match="channels"):
        install(model, Kernels(products_for_weights=64, batch_norms=True), torch.zeros(2, 5, 8, 8))
    assert traces(model) == []
