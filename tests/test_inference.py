import pytest
import torch
from torch import nn

from earlybird import inference
from earlybird.arithmetic.convert import convert
from earlybird.errors import InputError
from earlybird.inference import Inference, Timed, describe, for_inference, time_in_turns, time_run
from earlybird.models import build
from earlybird.sparse import blocks
from earlybird.sparse.blocks import BlockConv2d
from earlybird.train.recipe import Recipe
from earlybird.train.run import train


def images(number=4):
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def in_blocks(model):
    """Zeros that leave two dense blocks in each convolution but the first."""
    with torch.no_grad():
        for layer in list(model.modules()):
            if isinstance(layer, nn.Conv2d) and layer.in_channels > 3:
                half = len(layer.weight) // 2
                layer.weight[:half, : layer.in_channels // 2] = 0
                layer.weight[half:, layer.in_channels // 2 :] = 0
    return model.eval()


@pytest.mark.parametrize("name", ["vgg11", "resnet20", "mobilenet_v2"])
def test_it_computes_the_same(name):
    model = in_blocks(build(name, classes=10, image_size=16, width=0.25))
    fast = for_inference(model, images())
    with torch.no_grad():
        torch.testing.assert_close(fast(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_layers_of_blocks_that_are_faster_run_as_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_timed", lambda layers, x: [2.0, 1.0])
    model = in_blocks(build("vgg11", classes=10, image_size=16, width=0.25))
    found = [layer for layer in for_inference(model, images()).modules() if isinstance(layer, BlockConv2d)]
    assert len(found) == sum(isinstance(layer, nn.Conv2d) for layer in model.modules()) - 1


def test_layers_that_do_not_multiply_stay():
    model = build("small_cnn", classes=10, image_size=16, width=0.25)
    convert(model, "shift", example_inputs=images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[:1] = 0
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(for_inference(model, images())(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_what_is_not_on_the_cpu_is_refused():
    with pytest.raises(InputError, match="meta"):
        for_inference(nn.Conv2d(3, 3, 1, device="meta"), images())


class Counted(nn.Module):
    def __init__(self, order, name):
        super().__init__()
        self.order, self.name = order, name

    def forward(self, x):
        assert x.is_contiguous(memory_format=torch.channels_last)
        self.order.append(self.name)
        return x


def test_networks_take_turns_after_a_warm_up():
    order = []
    taken = time_in_turns({name: Counted(order, name) for name in "ab"}, images(), turns=2)
    assert sorted(order) == ["a"] * (2 + inference.WARM_UP) + ["b"] * (2 + inference.WARM_UP)
    assert order[-4:] in (["a", "b", "b", "a"], ["b", "a", "a", "b"])
    assert [len(seconds) for seconds in taken.values()] == [2, 2]


def timed(*shares, in_blocks=0):
    dense = Inference(0.02, 0.01, 0.03, 1000, 0)
    return Timed(64, 1, dense, dense._replace(in_blocks=in_blocks), shares)


def test_a_loss_is_called_a_loss():
    assert "50.0% less time" in describe(timed(0.4, 0.5, 0.6))
    assert "50.0% more time: a loss" in describe(timed(1.1, 1.5, 1.6))


def test_what_turns_differ_by_is_no_difference():
    said = describe(timed(0.9, 0.95, 1.01))
    assert "no difference" in said
    assert "less" not in said


def test_layers_of_blocks_are_told():
    assert "3 layers as dense blocks" in describe(timed(0.4, 0.5, 0.6, in_blocks=3))
    assert "blocks" not in describe(timed(0.4, 0.5, 0.6))


def test_a_run_is_timed_beside_its_dense_network(tmp_path):
    values = {"data": "digits", "model": "small_cnn", "width": 0.25, "epochs": 2, "deadline": "10it", "tune": False}
    train(Recipe.from_values(values), tmp_path / "run", quiet=True)
    threads = torch.get_num_threads()
    found = time_run(tmp_path / "run", batch=3, turns=2, threads=1)
    assert torch.get_num_threads() == threads
    assert found.own.nonzero < found.dense.nonzero
    assert (found.batch, found.threads) == (3, 1)
    assert 0 < found.own.least <= found.own.seconds <= found.own.most
    assert found.shares == tuple(sorted(found.shares))
    for wrong in ({"batch": 0}, {"threads": 0}, {"turns": 1}):
        with pytest.raises(InputError):
            time_run(tmp_path / "run", **wrong)
