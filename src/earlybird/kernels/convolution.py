"""Convolutions on small maps as matrix products.

Where the map of a convolution is small, the kernels that PyTorch calls on a CPU (oneDNN 3.12) spend their time on
something else than arithmetic, above all in the gradient of the weight: on maps of 2x2 to 8x8 positions it takes 3 to
12 times as long as one matrix product that holds the same sums,

    dW (O, K) = dY (N P, O)^T  U(X) (N P, K)

with N images, P positions of the output, O outputs, and K = kernel x inputs numbers that one position sees, laid out
as rows by U. The other two passes gain less, the forward one on U(X), and the gradient of the input as the forward pass
of dY with the kernel turned. Where each position of the input meets each of the output (3x3 kernels on maps of at most
2x2), the convolution *is* a linear layer from all numbers of an image's input to all of its output, and these two are
products with that layer's weight.

What is computed stays the same; sums are added in another order, so results differ from PyTorch's in their last bits.
It saves seconds alone; MACs, bytes and accuracy are what they were. Which sizes of map gain depends on processor,
number format and PyTorch, and where maps are large it loses. So `gains` times the convolutions of a model, `chosen`
says up to which maps products are faster, and `SmallMaps` lets a model use them. There is nothing for a GPU.

A training step of VGG-16 (batch 128, bf16) is 1.9 times as fast on a CPU with AMX, 1.1 times on one with AVX-512 alone
(2 cores each, PyTorch 2.13, 2026-11-29; ``benchmarks/alternatives.py``).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from earlybird.calls import Hook, as_call, as_in_training, tensors_in
from earlybird.kernels.eager import is_eager
from earlybird.kernels.window import Window

__all__ = ["Gain", "SmallMaps", "chosen", "convolve", "gains", "is_overridden"]

BUDGET_BYTES = 64 * 2**20
"""Memory that unfolded images may take at a time."""

LARGEST_MAP = 256
"""Positions of the largest output map that is tried: on larger ones, unfolding costs more than it brings."""

_ROUNDS = 3


def convolve(x: Tensor, weight: Tensor, window: Window, *, passes: bool = True) -> Tensor:
    """Convolve, like `torch.nn.functional.conv2d` without groups, with matrix products.

    Args:
        x: ``(N, I, H, W)``, bfloat16 or float32; fastest in channels_last.
        weight: ``(O, I, kh, kw)``, of the same type.
        window: Its kernel is that of ``weight``; outside of the image are zeros.
        passes: Compute the output and the gradient of the input so, too, and not that of the weight alone.

    Returns:
        ``(N, O, H', W')``. Its gradients cannot be differentiated once more.
    """
    return _Products.apply(x, weight, window, passes)  # type: ignore[no-any-return]


def output(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Return the output ``(N, O, H', W')`` of a convolution as products, in channels_last; arguments as `convolve`."""
    taps = _taps(x.shape[2], x.shape[3], window)
    if taps is not None:
        y = x.permute(0, 2, 3, 1).reshape(len(x), -1) @ _as_linear(weight, taps).t()  # (N, O * P')
        return y.view(len(x), len(weight), *x.shape[2:]).contiguous(memory_format=torch.channels_last)
    rows = weight.permute(0, 2, 3, 1).reshape(len(weight), -1).t()  # (K, O)
    size = (*window.map_of((x.shape[2], x.shape[3])), len(weight))
    parts = [(unfolded(part, window) @ rows).view(len(part), *size) for part in x.split(_images(x, window))]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).permute(0, 3, 1, 2)


def input_gradient(x: Tensor, weight: Tensor, gradient: Tensor, window: Window) -> Tensor:
    """Return the gradient ``(N, I, H, W)`` of the input as products; without them, where a step skips positions.

    Args:
        x: Input of the convolution.
        weight: Its weight.
        gradient: That of the output, ``(N, O, H', W')``.
        window: How the kernel moves.
    """
    taps = _taps(x.shape[2], x.shape[3], window)
    if taps is not None:
        rows = gradient.reshape(len(x), -1) @ _as_linear(weight, taps)  # (N, P * I)
        return rows.view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    back = window.turned()
    if back is None:
        return _input_gradient(x, weight, gradient, window)
    # the convolution of the output's gradient with the weight turned by half a turn, inputs and outputs exchanged
    turned = weight.flip(2, 3).transpose(0, 1)  # (I, O, kh, kw)
    return output(gradient, turned, back)


def _input_gradient(x: Tensor, weight: Tensor, gradient: Tensor, window: Window) -> Tensor:
    """Return what `input_gradient` does, by PyTorch's own kernel."""
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, window.stride, window.padding, window.dilation, False, (0, 0), 1,
        (True, False, False),
    )[0]  # fmt: skip
    return found


def weight_gradient(x: Tensor, gradient: Tensor, window: Window) -> Tensor:
    """Return the gradient ``(O, I, kh, kw)`` of the weight as products, in channels_last.

    What `BUDGET_BYTES` holds of the images is summed up by one product, and the sums of several in float32.

    Args:
        x: Input of the convolution, ``(N, I, H, W)``.
        gradient: That of the output, ``(N, O, H', W')``, of the same type.
        window: How the kernel moves.
    """
    images = _images(x, window)
    rows = gradient.permute(0, 2, 3, 1)  # (N, H', W', O)
    products = (
        part.reshape(-1, part.shape[-1]).t() @ unfolded(seen, window)
        for part, seen in zip(rows.split(images), x.split(images))
    )
    total: Tensor = next(products)
    if images < len(x):
        total = sum((product.float() for product in products), total.float()).to(x.dtype)
    return total.view(gradient.shape[1], *window.kernel, x.shape[1]).permute(0, 3, 1, 2)


def _images(x: Tensor, window: Window) -> int:
    """Return how many images of ``x`` may be unfolded at a time, at least one."""
    numbers = math.prod(window.map_of((x.shape[2], x.shape[3]))) * math.prod(window.kernel) * x.shape[1]
    return max(BUDGET_BYTES // max(numbers * x.element_size(), 1), 1)


def unfolded(x: Tensor, window: Window) -> Tensor:
    """Return what each position of the output sees: ``(N * H' * W', kh * kw * I)``."""
    (top, left), (stride_y, stride_x), (gap_y, gap_x) = window.padding, window.stride, window.dilation
    rows = functional.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top))  # (N, H + 2 top, W + 2 left, I)
    image, row, column, channel = rows.stride()
    windows = rows.as_strided(
        (len(x), *window.map_of((x.shape[2], x.shape[3])), *window.kernel, x.shape[1]),
        (image, stride_y * row, stride_x * column, gap_y * row, gap_x * column, channel),
    )
    return windows.reshape(-1, math.prod(window.kernel) * x.shape[1])


@functools.cache
def _taps(height: int, width: int, window: Window) -> Tensor | None:
    """Return which number of the kernel joins each position of the output to each of the input: ``(P', P)``.

    None where some pair does not meet, so that the convolution is no full linear layer, or where the map changes size.
    """
    if (height, width) != window.map_of((height, width)) or window.stride != (1, 1) or window.dilation != (1, 1):
        return None
    tall, wide = (
        torch.arange(side, device="cpu") + padding - torch.arange(side, device="cpu")[:, None]  # (output, input)
        for side, padding in zip((height, width), window.padding)
    )
    for tap, kernel in zip((tall, wide), window.kernel):
        if not 0 <= int(tap.min()) <= int(tap.max()) < kernel:
            return None
    taps = tall[:, None, :, None] * window.kernel[1] + wide[None, :, None, :]  # (H', W', H, W)
    return taps.reshape(height * width, height * width)


def _as_linear(weight: Tensor, taps: Tensor) -> Tensor:
    """Return the weight of the linear layer that a convolution is: ``(O * P', P * I)``."""
    outputs, inputs = weight.shape[:2]
    rows = weight.permute(0, 2, 3, 1).reshape(outputs, -1, inputs)  # (O, kh * kw, I)
    return rows.index_select(1, taps.flatten()).view(outputs * len(taps), -1)


class _Products(torch.autograd.Function):
    """See `convolve`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, window: Window, passes: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.window, ctx.passes = window, passes
        if passes:
            return output(x, weight, window)
        return torch.conv2d(x, weight, None, window.stride, window.padding, window.dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        of_input, of_weight = ctx.needs_input_grad[:2]
        backwards = input_gradient if ctx.passes else _input_gradient
        with torch.autocast("cpu", enabled=False):  # types are those of the forward pass, wherever backward is called
            return (
                backwards(x, weight, gradient, ctx.window) if of_input else None,
                weight_gradient(x, gradient, ctx.window) if of_weight else None,
                None,
                None,
            )


def _eligible(module: nn.Module) -> bool:
    """Whether a module is a plain convolution in one group whose surroundings are zeros, not overridden by anybody."""
    return (
        type(module) is nn.Conv2d
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and getattr(module._conv_forward, "__func__", None) is nn.Conv2d._conv_forward
    )


def _window(module: nn.Conv2d) -> Window:
    return Window(module.kernel_size, module.stride, module.padding, module.dilation)  # type: ignore[arg-type]


class SmallMaps:
    """Convolutions of a model on small maps, computed as matrix products while it trains.

        maps = SmallMaps(model, weights=64, passes=16)     # up to 8 x 8, and up to 4 x 4
        ...
        maps.remove()

    The modules stay the same objects with the same parameters; channels may be cut from them at any time. Where nothing
    learns (evaluation, tracing, export), under `torch.compile`, on other devices and for larger maps they compute as
    before. Convolutions in groups, subclasses of `torch.nn.Conv2d`, and those that somebody else has overridden, are
    left alone.

    Args:
        model: Changed in place: its convolutions get a ``_conv_forward`` of their own.
        weights: Positions of the largest output map for which the gradient of the weight is a product; see `chosen`.
        passes: The same for all three passes.

    Attributes:
        layers: Names of the convolutions that may be computed so.
    """

    def __init__(self, model: nn.Module, *, weights: int, passes: int) -> None:
        found = {name: module for name, module in model.named_modules() if max(weights, passes) and _eligible(module)}
        self._overrides = [_Override(module, weights, passes) for module in found.values()]
        self.layers = tuple(found)

    def remove(self) -> None:
        """Let all convolutions compute as they did before."""
        for override in self._overrides:
            override.remove()


class _Override:
    """Stands in for a module's ``_conv_forward``. Copies and pickles of the module have their plain one."""

    def __init__(self, module: nn.Conv2d, weights: int, passes: int) -> None:
        self.module, self.weights, self.passes = module, weights, passes
        module._conv_forward = self  # type: ignore[method-assign, assignment]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        cast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if cast else x.dtype
        window = _window(self.module)
        positions = self._positions(x, weight, dtype, window) if cast or x.dtype == weight.dtype else 0
        if not 0 < positions <= max(self.weights, self.passes):
            theirs: Tensor = nn.Conv2d._conv_forward(self.module, x, weight, bias)
            return theirs
        y = convolve(x.to(dtype), weight.to(dtype), window, passes=positions <= self.passes)
        return y if bias is None else y + bias.to(dtype).view(-1, 1, 1)

    def _positions(self, x: Tensor, weight: Tensor, dtype: torch.dtype, window: Window) -> int:
        """Return how many positions the output's map has; 0 outside of training, and for what PyTorch refuses."""
        if (
            not self.module.training
            or Hook.idle  # the library itself looks at the model, operator by operator
            or not torch.is_grad_enabled()
            or not is_eager(x)
            or not {x.dtype, weight.dtype, dtype} <= {torch.bfloat16, torch.float32}
            or x.ndim != 4
            or x.shape[1] != weight.shape[1]
        ):
            return 0
        size = window.map_of((x.shape[2], x.shape[3]))
        return math.prod(size) if min(size) > 0 else 0

    def remove(self) -> None:
        """Give the module its own back, unless somebody else has overridden it since."""
        if vars(self.module).get("_conv_forward") is self:
            del self.module._conv_forward

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, "_conv_forward")


def is_overridden(module: nn.Module) -> bool:
    """Whether a module is one of `SmallMaps`."""
    return isinstance(vars(module).get("_conv_forward"), _Override)


class Gain(NamedTuple):
    """What the convolutions on maps of one size take in a training step, forward and backward.

    Attributes:
        positions: Of the output's map.
        layers: How many convolutions of the model have it.
        pytorch_s: Seconds by PyTorch's own kernels.
        weights_s: Seconds with the gradient of the weight as products.
        passes_s: Seconds with all three passes as products.
    """

    positions: int
    layers: int
    pytorch_s: float
    weights_s: float
    passes_s: float


MARGIN = 0.05
"""Share by which products must be faster: less is within what timings of single layers differ by."""


def chosen(gains: Sequence[Gain]) -> dict[str, int]:
    """Return ``weights`` and ``passes`` for `SmallMaps`: the largest maps up to which products are the faster way."""
    worth = takewhile(lambda gain: (1 + MARGIN) * min(gain.weights_s, gain.passes_s) < gain.pytorch_s, gains)
    faster = list(worth)
    all_three = list(takewhile(lambda gain: gain.passes_s < gain.weights_s, faster))
    return {
        "weights": faster[-1].positions if faster else 0,
        "passes": all_three[-1].positions if all_three else 0,
    }


def gains(model: nn.Module, example_inputs: Any, dtype: torch.dtype = torch.float32) -> list[Gain]:
    """Time the convolutions of a model on maps of up to `LARGEST_MAP` positions in each way, in turns.

    Layers of one shape are timed once, on random numbers; the fastest of some rounds counts.

    Args:
        model: On a CPU. It is called once, see `earlybird.calls.as_in_training`.
        example_inputs: What it is called with: a batch as in training.
        dtype: In which its convolutions compute: bfloat16 is that of autocast.

    Returns:
        One `Gain` a size of map, smallest first.
    """
    layers = _shapes_of(model, example_inputs, dtype)
    sums: dict[int, Gain] = {}
    for shape, number in layers.items():
        before = sums.get(shape.positions, Gain(shape.positions, 0, 0.0, 0.0, 0.0))
        times = [old + number * new for old, new in zip(before[2:], shape.timed(dtype))]
        sums[shape.positions] = Gain(shape.positions, before.layers + number, *times)
    return [sums[size] for size in sorted(sums)]


class _Shape(NamedTuple):
    """A convolution as far as its time depends on it."""

    image: tuple[int, ...]  # (N, I, H, W)
    outputs: int
    window: Window
    last: bool  # channels_last
    needs_input: bool  # whether anybody wants the gradient of its input

    @property
    def positions(self) -> int:
        return math.prod(self.window.map_of((self.image[2], self.image[3])))

    def timed(self, dtype: torch.dtype) -> list[float]:
        """Return the seconds of a forward and backward pass: by PyTorch, with products for the weight, and for all."""
        generator = torch.Generator("cpu").manual_seed(0)
        layout = torch.channels_last if self.last else torch.contiguous_format

        def numbers(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device="cpu").to(dtype).contiguous(memory_format=layout)

        x = numbers(*self.image).requires_grad_(self.needs_input)
        weight = numbers(self.outputs, self.image[1], *self.window.kernel).requires_grad_()
        gradient = numbers(len(x), self.outputs, *self.window.map_of((self.image[2], self.image[3])))
        _, stride, padding, gap = self.window
        ways: tuple[Callable[[], Tensor], ...] = (
            lambda: torch.conv2d(x, weight, None, stride, padding, gap),
            lambda: convolve(x, weight, self.window, passes=False),
            lambda: convolve(x, weight, self.window),
        )
        wanted = (x, weight) if self.needs_input else (weight,)
        times: list[list[float]] = [[] for _ in ways]
        for _ in range(1 + _ROUNDS):
            for way, taken in zip(ways, times):
                start = time.perf_counter()
                with torch.enable_grad():
                    torch.autograd.grad(way(), wanted, gradient)
                taken.append(time.perf_counter() - start)
        return [min(taken[1:]) for taken in times]  # the first round warms up


def _shapes_of(model: nn.Module, example_inputs: Any, dtype: torch.dtype) -> dict[_Shape, int]:
    """Count the shapes of convolutions that run in a call of the model."""
    layers: dict[_Shape, int] = {}
    seen: list[nn.Module] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, nn.Conv2d)
        x = tensors_in((args, kwargs))[0]
        if x.ndim != 4:
            return
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        # nobody asks for the gradient of the images
        shape = _Shape(tuple(x.shape), module.out_channels, _window(module), last, needs_input=bool(seen))
        seen.append(module)
        if shape.positions <= LARGEST_MAP:
            layers[shape] = layers.get(shape, 0) + 1

    call = as_call(example_inputs)
    with ExitStack() as stack:
        stack.enter_context(as_in_training(model))
        for module in filter(_eligible, model.modules()):
            stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(*call.args, **call.kwargs)
    return layers
