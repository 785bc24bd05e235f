import pytest
import torch
from torch import nn

from earlybird.kernels.fold import fold_batch_norms
from earlybird.models import build


def lived(model, inputs):
    """Running statistics and weights of batch norms as after some training."""
    torch.manual_seed(0)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        model(inputs)
    return model.eval()


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def images(size=8, channels=3):
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))


def test_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1)).eval()
    with torch.no_grad():
        model[0].weight.fill_(3.0)
        model[1].running_mean.fill_(2.0)
        model[1].running_var.fill_(4.0 - model[1].eps)
        model[1].weight.fill_(5.0)
        model[1].bias.fill_(1.0)
    folded = fold_batch_norms(model, torch.ones(1, 1, 1, 1))
    assert isinstance(folded[1], nn.Identity)
    assert folded[0].weight.item() == pytest.approx(3.0 * 5 / 2)
    assert folded[0].bias.item() == pytest.approx(1 - 2.0 * 5 / 2)


@pytest.mark.parametrize(("name", "left"), [
    ("vgg11", 0), ("resnet20", 0), ("mobilenet_v2", 0), ("preact_resnet29", 10),
])  # fmt: skip
def test_networks_compute_the_same_and_stay_as_they_are(name, left):
    model = lived(build(name, classes=10, width=0.25), images(32))
    before, state = norms(model), {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batch_norms(model, images(32))
    assert norms(folded) == left < before == norms(model)
    assert not folded.training
    with torch.no_grad():
        torch.testing.assert_close(folded(images(32)), model(images(32)), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Wired(nn.Module):
    """A convolution and a batch norm, wired by a function."""

    def __init__(self, wire, **settings):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, **settings), nn.Conv2d(3, 3, 1)
        self.alias = self.norm if settings.get("affine") is False else None
        self.wire = wire

    def forward(self, x):
        return self.wire(self, x)


@pytest.mark.parametrize(("wire", "settings"), [
    (lambda m, x: (y := m.conv(x)) + m.norm(y), {}),  # somebody else reads it
    (lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)), {}),  # a norm of two
    (lambda m, x: m.norm(m.conv(m.conv(x))), {}),  # a convolution called twice
    (lambda m, x: m.norm(m.conv(x).relu()), {}),  # something between
    (lambda m, x: m.norm(m.conv(x)), {"track_running_stats": False}),  # statistics of the batch
    (lambda m, x: m.alias(m.conv(x)), {"affine": False}),  # a norm by another name
])  # fmt: skip
def test_what_cannot_be_folded_stays(wire, settings):
    model = lived(Wired(wire, **settings), images())
    folded = fold_batch_norms(model, images())
    assert norms(folded) == 1
    with torch.no_grad():
        assert torch.equal(folded(images()), model(images()))


def test_convolutions_that_share_a_weight_get_their_own():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    lived(model, images())
    folded = fold_batch_norms(model, images())
    assert norms(folded) == 0
    with torch.no_grad():
        torch.testing.assert_close(folded(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_it_stays_in_channels_last():
    model = lived(build("vgg11", classes=10, width=0.25), images(32)).to(memory_format=torch.channels_last)
    folded = fold_batch_norms(model, images(32))
    weights = [module.weight for module in folded.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
