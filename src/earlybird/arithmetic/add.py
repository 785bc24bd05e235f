"""Add layers: outputs are distances between inputs and filters, so that nothing is multiplied.

Chen et al., "AdderNet: Do We Really Need Multiplications in Deep Learning?", CVPR 2020,
https://arxiv.org/abs/1912.13200; reference code github.com/huawei-noah/AdderNet. With patches X, filters F of k numbers
each layer, and the gradient g of the output:

    Y   = -sum |X - F|
    dF  =  sum over positions of (X - F) g                 full precision, where the true gradient is a sign
    dX  =  sum over outputs of clip(F - X, -1, 1) g        HardTanh
    dF <-  eta * sqrt(k) / ||dF|| * dF                     when the optimizer steps, eta = 0.2: the RMS is then eta

What is padded is zeros, which count: |0 - F|. Outputs are large and negative, so that a batch norm has to follow.

What it saves: energy, of a chip that has adders only; the bill counts two additions for a multiplication and an
addition. It does *not* save time: the machines there are multiply and add in one instruction, of which a distance needs
three. The gradients are products, so that training multiplies still.

``dF = X^T g - F sum(g)`` is the weight gradient of a convolution and a sum, so that only Y and dX need a kernel of
their own (`earlybird.arithmetic.add_kernel`); both are operators, ``earlybird::add_conv2d`` and
``earlybird::add_conv2d_input_gradient``, which tracing and `torch.compile` know.

Deviations: half types are computed, and with filters of float32 also returned, in float32, since a sum of hundreds of
distances would lose its differences in eight bits; a layer may have a bias, as the convolution that it replaces.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from earlybird.arithmetic import add_kernel
from earlybird.arithmetic.fixed_point import check_fraction_bits, floor_to
from earlybird.calls import Hook, after_gradients
from earlybird.cost.arithmetic import Arithmetic
from earlybird.errors import InputError
from earlybird.kernels.window import Window

__all__ = ["ETA", "AddConv2d", "AddLinear", "adapt_gradients", "add_conv2d", "rescale_gradients"]

ETA = 0.2
"""Published root mean square of a layer's gradient when the optimizer steps."""

_OPERATOR = "earlybird::add_conv2d"
_GRADIENT = "earlybird::add_conv2d_input_gradient"
_WINDOW = "int[2] stride, int[2] padding, int[2] dilation"

torch.library.define(_OPERATOR, f"(Tensor x, Tensor filters, {_WINDOW}) -> Tensor")
torch.library.define(_GRADIENT, f"(Tensor x, Tensor filters, Tensor gradient, {_WINDOW}) -> Tensor")


def add_conv2d(
    x: Tensor,
    filters: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """Return the negative sums of distances between patches and filters, with the gradients of AdderNet.

    Args:
        x: Images (N, C, H, W), or rows (N, C).
        filters: (O, C, kh, kw), or (O, C), on the same device.
        stride: Vertical and horizontal.
        padding: Rows and columns of zeros on either side; they count like any other input.
        dilation: Vertical and horizontal.

    Returns:
        (N, O, H', W') in the order of memory of ``x``, or (N, O), of the type that the two promote to.

    Raises:
        InputError: The shapes do not fit.
    """
    if torch.compiler.is_exporting():
        return _written_out(x, filters, stride, padding, dilation)
    found: Tensor = torch.ops.earlybird.add_conv2d(x, filters, stride, padding, dilation)
    return found


def _written_out(x: Tensor, filters: Tensor, *sizes: Sequence[int]) -> Tensor:
    """Return the same in operations that every runtime has, tap by tap: tensors of (N, O, C, H', W')."""
    images, own, window, shape = _checked(x, filters, *sizes)
    (rows, columns), (down, right), (top, left), (far, wide) = window
    height, width = window.map_of((images.shape[2], images.shape[3]))
    padded = functional.pad(images, (left, left, top, top))
    total: Tensor | None = None
    for i in range(rows):
        for j in range(columns):
            lines = slice(i * far, i * far + (height - 1) * down + 1, down)
            pixels = padded[:, :, lines, slice(j * wide, j * wide + (width - 1) * right + 1, right)]
            distance = (pixels[:, None] - own[:, :, i, j][:, :, None, None]).abs().sum(2)
            total = distance if total is None else total + distance
    assert total is not None
    return total.neg().view(shape)


def _window(filters: Tensor, *sizes: Sequence[int]) -> Window:
    height, width = filters.shape[2:]
    return Window((height, width), *((size[0], size[-1]) for size in sizes))


def _as_images(x: Tensor) -> Tensor:
    return x[..., None, None] if x.ndim == 2 else x


def _checked(x: Tensor, filters: Tensor, *sizes: Sequence[int]) -> tuple[Tensor, Tensor, Window, tuple[int, ...]]:
    """Return images, filters (O, C, kh, kw), how they move, and the shape of the output."""
    if x.ndim not in (2, 4) or x.ndim != filters.ndim or x.shape[1] != filters.shape[1]:
        raise InputError(
            f"an add layer with filters {tuple(filters.shape)} was given {tuple(x.shape)}",
            needed="images (N, C, H, W) and filters (O, C, kh, kw), or rows (N, C) and filters (O, C)",
        )
    if not (x.is_floating_point() and filters.is_floating_point()):
        raise InputError(f"an add layer was given {x.dtype} and {filters.dtype}", needed="floating point")
    images, filters = _as_images(x), _as_images(filters)
    window = _window(filters, *sizes)
    size = window.map_of((images.shape[2], images.shape[3]))
    if min(size) < 1:
        raise InputError(f"images of {tuple(x.shape[2:])} are smaller than filters of {tuple(filters.shape[2:])}")
    return images, filters, window, (x.shape[0], filters.shape[0], *(size if x.ndim == 4 else ()))


def _accumulator(x: Tensor, filters: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, filters.dtype), torch.float32)


@torch.library.impl(_OPERATOR, "default")
def _forward(x: Tensor, filters: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    images, own, window, shape = _checked(x, filters, stride, padding, dilation)
    dtype = _accumulator(x, filters)
    found = add_kernel.distances(images.to(dtype), own.to(dtype), window)
    return found.to(torch.promote_types(x.dtype, filters.dtype)).view(shape)


@torch.library.impl(_GRADIENT, "default")
def _input_gradient(x: Tensor, filters: Tensor, gradient: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    images, own, window, _ = _checked(x, filters, stride, padding, dilation)
    dtype = _accumulator(x, filters)
    found = add_kernel.input_gradient(images.to(dtype), own.to(dtype), _as_images(gradient).to(dtype), window)
    return found.to(x.dtype).view(x.shape)


def _fake(x: Tensor, filters: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    *_, shape = _checked(x, filters, stride, padding, dilation)
    return _empty(x, shape, torch.promote_types(x.dtype, filters.dtype))


def _fake_gradient(x: Tensor, filters: Tensor, gradient: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    return _empty(x, x.shape, x.dtype)


def _empty(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    layout = add_kernel.layout(x) if x.ndim == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, filters, *ctx.window = inputs
    ctx.save_for_backward(x, filters)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    x, filters = ctx.saved_tensors
    of_x = of_filters = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.earlybird.add_conv2d_input_gradient(x, filters, gradient, *ctx.window)
    if ctx.needs_input_grad[1]:
        dtype = _accumulator(x, filters)
        images, own, outputs = (_as_images(tensor).to(dtype) for tensor in (x, filters, gradient))
        products = torch.ops.aten.convolution_backward(
            outputs, images, own, None, *ctx.window, False, (0, 0), 1, (False, True, False)
        )[1]  # X^T g
        found = products - own * outputs.sum((0, 2, 3)).view(-1, 1, 1, 1)
        of_filters = found.to(filters.dtype).view(filters.shape)
    return of_x, of_filters, None, None, None


torch.library.register_fake(_OPERATOR, _fake)
torch.library.register_fake(_GRADIENT, _fake_gradient)
torch.library.register_autograd(_OPERATOR, _backward, setup_context=_setup)


class AddConv2d(nn.modules.conv._ConvNd):
    """The add layer in the place of a convolution: images (N, C, H, W) to (N, O, H', W').

    Filters are drawn from N(0, 1). It is no `nn.Conv2d`, so that nobody convolves with its ``weight``.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: Of the filters.
        stride: As in `nn.Conv2d`.
        padding: As in `nn.Conv2d`.
        dilation: As in `nn.Conv2d`.
        groups: 1; distances over groups of channels are not defined by the paper.
        bias: Published: none.
        padding_mode: As in `nn.Conv2d`.
        fraction_bits: Inputs and filters are floored to this many bits after the point; by default they are not.

    Attributes:
        constant: What channels that were cut, and only ever were zero, had added to each output, (O,), or None.

    Raises:
        InputError: More than one group, or ``fraction_bits`` outside 1 to 16.
    """

    constant: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        fraction_bits: int | None = None,
    ) -> None:
        if groups != 1:
            raise InputError(f"an add layer with {groups} groups", needed="groups=1")
        super().__init__(
            in_channels, out_channels, _pair(kernel_size), _pair(stride),
            padding if isinstance(padding, str) else _pair(padding), _pair(dilation), False, (0, 0), groups, bias,
            padding_mode,  # type: ignore[arg-type]
        )  # fmt: skip
        self.fraction_bits = fraction_bits
        self.register_buffer("constant", None)
        self.arithmetic = _arithmetic(fraction_bits)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the filters anew, from a CPU generator (default: PyTorch's own)."""
        _draw(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return the negative distances."""
        padding: Sequence[int]
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            padding = self.padding
        else:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = functional.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        x, filters = _on_grid(x, self.weight, self.fraction_bits)
        y = add_conv2d(x, filters, self.stride, padding, self.dilation)
        for added in (self.bias, self.constant):
            y = y if added is None else y + added.view(-1, 1, 1)
        return y

    def silence(self, gone: Tensor) -> None:
        """Note what inputs that will be cut, and only ever are zero, add to each output: -sum |0 - F|.

        Args:
            gone: Mask of input channels, (C,).
        """
        _silence(self, gone)


class AddLinear(nn.Linear):
    """The add layer in the place of a linear layer: (..., C) to (..., O).

    Args:
        in_features: C.
        out_features: O.
        bias: Published: none.
        fraction_bits: As in `AddConv2d`.

    Attributes:
        constant: As in `AddConv2d`.
    """

    constant: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, *, fraction_bits: int | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.fraction_bits = fraction_bits
        self.register_buffer("constant", None)
        self.arithmetic = _arithmetic(fraction_bits)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the filters anew, from a CPU generator (default: PyTorch's own)."""
        _draw(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return the negative distances."""
        rows, filters = _on_grid(x if x.ndim == 2 else x.flatten(0, -2), self.weight, self.fraction_bits)
        y = add_conv2d(rows, filters)
        y = y if x.ndim == 2 else y.view(*x.shape[:-1], -1)
        for added in (self.bias, self.constant):
            y = y if added is None else y + added
        return y

    def silence(self, gone: Tensor) -> None:
        """As in `AddConv2d`."""
        _silence(self, gone)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _arithmetic(fraction_bits: int | None) -> Arithmetic:
    bits = check_fraction_bits(fraction_bits)
    return Arithmetic(kind="add", activation=bits, weight=bits, whole=() if fraction_bits is None else ("forward",))


@torch.no_grad()
def _draw(layer: AddConv2d | AddLinear, generator: torch.Generator | None) -> None:
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    if layer.bias is not None:
        layer.bias.zero_()


def _on_grid(x: Tensor, filters: Tensor, fraction_bits: int | None) -> tuple[Tensor, Tensor]:
    return (x, filters) if fraction_bits is None else (floor_to(x, fraction_bits), floor_to(filters, fraction_bits))


@torch.no_grad()
def _silence(layer: AddConv2d | AddLinear, gone: Tensor) -> None:
    weight = layer.weight if layer.fraction_bits is None else floor_to(layer.weight, layer.fraction_bits)
    added = weight[:, gone.to(weight.device)].flatten(1).abs().sum(1).neg()
    layer.constant = added if layer.constant is None else layer.constant + added


def rescale_gradients(filters: Iterable[Tensor], eta: float = ETA, scale: Tensor | None = None) -> None:
    """Bring the root mean square of each layer's gradient to ``eta``, in place; a gradient of zeros stays.

    Args:
        filters: Weights of add layers; those without a gradient are left out.
        eta: What their gradients' root mean square shall be.
        scale: What a fused optimizer will divide gradients by, shape ().
    """
    for weight in filters:
        if weight.grad is not None:
            norm = torch.linalg.vector_norm(weight.grad, dtype=torch.float32).clamp_min(1e-12)
            factor = eta * math.sqrt(weight.numel()) / norm
            weight.grad.mul_(factor if scale is None else factor * scale.to(factor.device))


def adapt_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, eta: float = ETA) -> RemovableHandle:
    """Let every step of ``optimizer`` begin with `rescale_gradients` of the add layers of ``model`` that it trains.

    That is after accumulation, clipping and the mean over processes, which the rescaling would undo. With
    ``step(closure)`` it happens whenever the closure has computed gradients.

    Returns:
        A handle whose ``remove()`` ends it.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    filters = [
        layer.weight for layer in model.modules()
        if isinstance(layer, (AddConv2d, AddLinear)) and id(layer.weight) in held
    ]  # fmt: skip

    def before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # a fused optimizer under GradScaler unscales in its own kernel
        return after_gradients(
            args, kwargs, lambda: rescale_gradients(filters, eta, getattr(optimizer, "grad_scale", None))
        )

    return optimizer.register_step_pre_hook(Hook(before_step))
