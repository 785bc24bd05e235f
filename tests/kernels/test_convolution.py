import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import earlybird as eb
from earlybird.kernels import convolution
from earlybird.kernels.convolution import Gain, SmallMaps, chosen, convolve, gains
from earlybird.kernels.window import Window

CL = torch.channels_last


def window(kernel: int = 3, stride: int = 1, padding: int = 1, dilation: int = 1) -> Window:
    return Window(*((side, side) for side in (kernel, stride, padding, dilation)))


def results(y: Tensor, x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return an output and the gradients of what it was computed from."""
    return y.detach(), *torch.autograd.grad(y, (x, weight), gradient)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 7), width=st.integers(1, 7), kernel=st.integers(1, 4), stride=st.integers(1, 2),
    padding=st.integers(0, 3), dilation=st.integers(1, 2), passes=st.booleans(), last=st.booleans(),
    inputs=st.integers(1, 5), outputs=st.integers(1, 5), batch=st.integers(1, 4),
)  # fmt: skip
def test_products_are_the_convolution(
    height: int, width: int, kernel: int, stride: int, padding: int, dilation: int, passes: bool, last: bool,
    inputs: int, outputs: int, batch: int,
) -> None:  # fmt: skip
    how = window(kernel, stride, padding, dilation)
    if min(how.map_of((height, width))) < 1 or dilation * (kernel - 1) + 1 > min(height, width) + 2 * padding:
        return
    torch.manual_seed(0)
    layout = CL if last else torch.contiguous_format
    # whole numbers, so that no order of additions rounds
    x = torch.randint(-4, 5, (batch, inputs, height, width)).float().contiguous(memory_format=layout)
    weight = torch.randint(-4, 5, (outputs, inputs, kernel, kernel)).float().contiguous(memory_format=layout)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    theirs = functional.conv2d(x, weight, None, stride, padding, dilation)
    ours = convolve(x, weight, how, passes=passes)
    gradient = torch.randint(-4, 5, theirs.shape).float()
    for one, other in zip(results(ours, x, weight, gradient), results(theirs, x, weight, gradient)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("side", [1, 2, 4, 8])
@pytest.mark.parametrize("passes", [False, True])
def test_bf16_is_as_near_to_the_truth_as_pytorch_is(side: int, passes: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 24, side, side).bfloat16().contiguous(memory_format=CL).requires_grad_()
    weight = torch.randn(40, 24, 3, 3).bfloat16().contiguous(memory_format=CL).requires_grad_()
    gradient = torch.randn(16, 40, side, side).bfloat16()
    ours = results(convolve(x, weight, window(), passes=passes), x, weight, gradient)
    theirs = results(functional.conv2d(x, weight, None, 1, 1), x, weight, gradient)
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    truth = results(functional.conv2d(x, weight, None, 1, 1), x, weight, gradient.double())
    for own, other, true in zip(ours, theirs, truth):
        assert own.dtype == torch.bfloat16
        assert (own - true).abs().mean() <= 1.05 * (other - true).abs().mean()


def test_many_images_are_unfolded_in_parts(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, 4, 4).contiguous(memory_format=CL).requires_grad_()
    weight, gradient = torch.randn(5, 3, 3, 3, requires_grad=True), torch.randn(7, 5, 4, 4)
    whole = results(convolve(x, weight, window()), x, weight, gradient)
    seen: list[int] = []
    plain = convolution.unfolded

    def watched(images: Tensor, how: Window) -> Tensor:
        seen.append(len(images))
        return plain(images, how)

    monkeypatch.setattr(convolution, "unfolded", watched)
    monkeypatch.setattr(convolution, "BUDGET_BYTES", 2 * 16 * 9 * 5 * 4)  # two images of five channels, three of three
    parts = results(convolve(x, weight, window()), x, weight, gradient)
    assert max(seen) == 3
    for one, other in zip(parts, whole):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gradients_cannot_be_differentiated_again() -> None:
    x, weight = torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(3, 3, 3, 3, requires_grad=True)
    (first,) = torch.autograd.grad(convolve(x, weight, window()).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 3, padding="same"),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5, bf16: bool = False) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(images)
        loss = functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_trains_alike(bf16: bool, monkeypatch: Any) -> None:
    calls: list[tuple[int, bool]] = []
    plain = convolution.convolve

    def watched(x: Tensor, weight: Tensor, how: Window, *, passes: bool = True) -> Tensor:
        calls.append((math.prod(how.map_of(tuple(x.shape[2:]))), passes))
        return plain(x, weight, how, passes=passes)

    models = [network(), network()]
    maps = SmallMaps(models[0], weights=64, passes=16)
    monkeypatch.setattr(convolution, "convolve", watched)
    assert maps.layers == ("0", "4")  # one is in groups, one pads by name
    losses = [train(model, torch.optim.SGD(model.parameters(), 0.1), bf16=bf16) for model in models]
    assert set(calls) == {(64, False), (16, True)}
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-2 if bf16 else 1e-5, atol=0)
    seen = len(calls)
    models[0].eval()(torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        models[0].train()(torch.randn(2, 3, 8, 8))
    models[0].double()(torch.randn(2, 3, 8, 8).double())
    assert len(calls) == seen
    maps.remove()
    train(models[0].float(), torch.optim.SGD(models[0].parameters(), 0.1))
    assert len(calls) == seen
    assert not any("_conv_forward" in vars(module) for module in models[0].modules())


def test_no_positions_change_nothing() -> None:
    model = network()
    assert SmallMaps(model, weights=0, passes=0).layers == ()
    assert not any("_conv_forward" in vars(module) for module in model.modules())


def test_what_somebody_else_has_overridden_is_left_alone() -> None:
    model = network()
    model[0]._conv_forward = lambda x, weight, bias: functional.conv2d(x, weight, bias, padding=1)
    first = SmallMaps(model, weights=64, passes=0)
    second = SmallMaps(model, weights=64, passes=0)
    assert (first.layers, second.layers) == (("4",), ())


def test_removed_it_leaves_what_somebody_has_overridden_since() -> None:
    layer = nn.Conv2d(3, 4, 3)
    maps = SmallMaps(layer, weights=64, passes=0)
    layer._conv_forward = theirs = lambda x, weight, bias: x  # type: ignore[method-assign, assignment, misc]
    maps.remove()
    assert layer._conv_forward is theirs


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_plain_and_use_their_own_weights(copied: Any) -> None:
    """They kept what nobody could remove, and were not read without this library."""
    model = network()
    SmallMaps(model, weights=64, passes=64)
    assert b"earlybird" not in pickle.dumps(model)
    twin = copied(model)
    assert SmallMaps(twin, weights=64, passes=64).layers == ("0", "4")
    twin = copied(model)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.fill_(2.0)
    assert torch.equal(twin[0](torch.randn(1, 3, 8, 8)), torch.full((1, 8, 8, 8), 2.0))
    assert model.state_dict().keys() == twin.state_dict().keys() == network().state_dict().keys()


def test_channels_may_be_cut_under_it() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    SmallMaps(model, weights=64, passes=16)
    bird = eb.EarlyBird(keep=0.5, look_every="1it", skip="1it", deadline="3it", round_to=1).attach(
        model, optimizer, example_inputs=torch.randn(2, 3, 8, 8), steps_per_epoch=4
    )
    train(model, optimizer, steps=6)
    assert bird.drawn
    assert model[0].out_channels + model[4].out_channels == 8
    assert "_conv_forward" in vars(model[0])


def test_gains_are_of_the_layers_there_are_and_leave_no_trace() -> None:
    model = network().eval()
    before = copy.deepcopy(model.state_dict())
    found = gains(model, torch.randn(4, 3, 8, 8))
    assert [(gain.positions, gain.layers) for gain in found] == [(16, 1), (64, 1)]
    assert all(seconds > 0 for gain in found for seconds in gain[2:])
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_looking_for_gains_runs_no_hooks_and_draws_no_random_numbers() -> None:
    model = nn.Sequential(network(), nn.Dropout(0.5))
    calls: list[Any] = []
    model.register_forward_hook(lambda *args: calls.append(args))
    before = torch.get_rng_state()
    gains(model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)
    assert calls == []


def test_gains_can_be_looked_for_with_one_image_and_arguments_by_name() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(input=x))  # type: ignore[no-any-return]

    assert [gain.positions for gain in gains(ByName(), torch.randn(1, 3, 3, 3))] == [1]


def layer(**kwargs: Any) -> nn.Conv2d:
    found = nn.Conv2d(3, 4, 3, **kwargs)
    SmallMaps(found, weights=64, passes=64)
    return found


def test_autocast_leaves_float64_alone_as_pytorch_does() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert layer().double()(torch.randn(2, 3, 4, 4).double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), "should be the same"),
        (torch.zeros(2, 5, 4, 4), "to have 3 channels, but got 5"),
        (torch.zeros(2, 3, 1, 1), "Kernel size can't be greater"),
    ],
)
def test_what_pytorch_refuses_is_refused_by_it(x: Tensor, message: str) -> None:
    """Types were mended silently, and other errors were those of a product that nobody had asked for."""
    with pytest.raises(RuntimeError, match=message):
        layer(bias=False)(x)


@pytest.mark.parametrize("side", [2, 8])
def test_no_images_are_no_error(side: int) -> None:
    assert layer(padding=1)(torch.zeros(0, 3, side, side)).shape == (0, 4, side, side)


def test_gradients_keep_their_precision_where_backward_is_called_under_autocast() -> None:
    ours = layer(padding=1)
    plain = copy.deepcopy(ours)
    x, gradient = torch.randn(8, 3, 8, 8), torch.randn(8, 4, 8, 8)
    for own in (ours, plain):
        y = own(x)
        with torch.autocast("cpu", torch.bfloat16):
            y.backward(gradient)
    assert ours.weight.grad is not None
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)


@pytest.mark.parametrize(
    ("timed", "weights", "passes"),
    [
        ([], 0, 0),
        ([(4, 1.0, 0.5, 0.2), (16, 1.0, 0.5, 0.6), (64, 1.0, 0.99, 0.5)], 64, 4),
        ([(4, 1.0, 0.97, 1.2), (16, 1.0, 0.1, 0.1)], 0, 0),  # what lies beyond a size that loses is not taken
        ([(16, 1.0, 0.8, 0.7), (256, 1.0, 1.5, 2.0)], 16, 16),
    ],
)
def test_products_are_taken_up_to_the_first_size_that_does_not_gain(
    timed: list[tuple[int, float, float, float]], weights: int, passes: int
) -> None:
    found = [Gain(positions, 1, *times) for positions, *times in timed]
    assert chosen(found) == {"weights": weights, "passes": passes}
