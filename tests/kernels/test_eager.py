import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

from earlybird.kernels.eager import is_eager
from earlybird.kernels.install import Kernels, install

ALL = Kernels(products_for_weights=64, products_for_all=64, batch_norms=True)


def images():
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), nn.Conv2d(8, 8, 3),
    ).to(memory_format=torch.channels_last)  # fmt: skip


def test_what_has_no_numbers_in_memory_is_not_eager():
    x = images()
    assert is_eager(x)
    assert not any(map(is_eager, (nn.Parameter(x), x.to("meta"), x.to_sparse(), x[:0])))


def gradient_by_func(model):
    parameters = dict(model.named_parameters())
    found = torch.func.grad(lambda own: functional_call(model, own, (images(),)).square().mean())(parameters)
    return tuple(found.values())


def over_samples(model):
    return (torch.vmap(lambda x: model[0](x[None])[0])(images()),)


def forward_gradient(model):
    with forward_ad.dual_level():
        return (forward_ad.unpack_dual(model(forward_ad.make_dual(images(), torch.ones_like(images())))).tangent,)


def traced(model):
    return (torch.jit.trace(model, images(), check_trace=False)(images()),)


def exported(model):
    return (torch.export.export(model, (images(),), strict=True).module()(images()),)


@pytest.mark.parametrize("way", [gradient_by_func, over_samples, forward_gradient, traced, exported])
def test_transforms_of_pytorch_go_through_its_own_operators(way):
    """They failed: our autograd functions have no rule for them, and `torch.export` saw a forbidden function."""
    model = network()
    expected = way(model)
    install(model, ALL, images())
    for one, other in zip(way(model), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_under_dynamo_kernels_are_idle_and_graphs_whole():
    model = network()
    expected = model(images())
    install(model, ALL, images())
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    torch.testing.assert_close(compiled(images()), expected)
    assert len(graphs) == 1
    names = {str(node.target) for node in graphs[0].graph.nodes}
    assert not any("earlybird" in name or "Products" in name for name in names)
