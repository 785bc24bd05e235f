"""Shift layers: weights are powers of two with a sign, so that a product is a shift of the input's bits.

Elhoushi et al., "DeepShift: Towards Multiplication-Less Neural Networks", 2019, https://arxiv.org/abs/1905.13298;
reference code github.com/mostafaelhoushi/DeepShift. There in two forms; with ``b`` bits and the gradient g of W:

    'q'    one real w is learned; W = sign(w) 2^round(log2 |w|), |w| clipped to [2^-(2^(b-1) - 1), 1];  dw = g
    'ps'   P in [-(2^(b-1) - 2), 0] and S are learned; W = S_t 2^round(P), S_t = sign(S) where |S| > 0.5, else 0
           dP = g W ln 2;  dS = g

and in a third one, 'frozen', which is 'ps' with weights that are drawn once and never trained, so that what comes
behind has to do with them (You et al., ShiftAddNet, NeurIPS 2020, https://arxiv.org/abs/2010.12785; reference code
github.com/RICE-EIC/ShiftAddNet): P ~ N(-3.5, 1) clipped to [-7, 0], S ~ U(-1, 1), half of the weights zero; a higher
threshold prunes more.

What it saves: energy, of a chip that has shifters, and the bits of stored weights (`earlybird.arithmetic.packed`). It
does *not* save time: here the weight is written out as floats and an ordinary convolution runs. The gradient of the
weight is a product like any other.

P and S want no weight decay, as published; `earlybird.arithmetic.shift_add` sees to it. P is clipped to its range in
place whenever the layer runs in training, as published. ShiftAddNet uses 'ps', which learns slowly from random values:
the gradient of P is as small as the weight. The default is 'q'.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from earlybird.arithmetic.fixed_point import check_fraction_bits, floor_to
from earlybird.cost.arithmetic import Arithmetic
from earlybird.errors import InputError

__all__ = [
    "Form", "ShiftConv2d", "ShiftLayer", "ShiftLinear", "check_shift", "nearest_power_of_two", "power_of_two",
    "signed_power_of_two", "weight_parameters",
]  # fmt: skip

Form = Literal["q", "ps", "frozen"]

_FROZEN_MEAN, _FROZEN_LEAST = -3.5, -7


def power_of_two(exponent: Tensor) -> Tensor:
    """Return ``2 ** exponent`` exactly, as float32; exponents are whole numbers from -126 to 127."""
    if torch.compiler.is_exporting():  # ONNX cannot look into a number's bits
        return torch.pow(2.0, exponent.float())
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


class _SignedPowerOfTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shift: Tensor, sign: Tensor, least: int, threshold: float) -> Tensor:
        signs = sign.sign() * (sign.abs() > threshold)
        weight = power_of_two(shift.clamp(least, 0).round()).to(shift.dtype) * signs
        ctx.save_for_backward(weight)
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient * weight * math.log(2), gradient, None, None


class _NearestPowerOfTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, real: Tensor, least: int) -> Tensor:
        exponent = real.abs().clamp(2.0**least, 1.0).log2().round()
        return power_of_two(exponent).to(real.dtype) * real.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def signed_power_of_two(shift: Tensor, sign: Tensor, *, bits: int = 5, threshold: float = 0.5) -> Tensor:
    """Return the weights of form 'ps', with their gradients.

    Args:
        shift: P, of any shape.
        sign: S, of the same shape.
        bits: b.
        threshold: Weights whose ``|S|`` is not above it are zero.
    """
    weight: Tensor = _SignedPowerOfTwo.apply(shift, sign, _least("ps", bits), threshold)
    return weight


def nearest_power_of_two(real: Tensor, *, bits: int = 5) -> Tensor:
    """Return the weights of form 'q', with the gradient passed straight through; zeros stay zero."""
    weight: Tensor = _NearestPowerOfTwo.apply(real, _least("q", bits))
    return weight


def _least(form: Form, bits: int) -> int:
    """Return the smallest exponent; the forms that have zeros give one code to them."""
    codes: int = 2 ** (bits - 1)
    return (1 if form == "q" else 2) - codes


class ShiftConv2d(nn.modules.conv._ConvNd):
    """The shift layer in the place of a convolution: images (N, C, H, W) to (N, O, H', W').

    It is no `nn.Conv2d`: its ``weight`` is computed, from ``shift`` and ``sign`` or from ``real``, and cannot be set.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: Of the filters.
        stride: As in `nn.Conv2d`.
        padding: As in `nn.Conv2d`.
        dilation: As in `nn.Conv2d`.
        groups: As in `nn.Conv2d`.
        bias: As in `nn.Conv2d`; it is an ordinary number.
        padding_mode: As in `nn.Conv2d`.
        form: 'q', 'ps' or 'frozen'.
        bits: Of a weight, 2 to 7; published: 5 in ShiftAddNet, 3 in DeepShift alone.
        threshold: Of 'ps' and 'frozen': signs up to this are zero, in [0, 1).
        fraction_bits: Inputs are floored to this many bits after the point (published: 16; frozen: 15); by default
            they are not.

    Raises:
        InputError: A value is out of its range.
    """

    form: Form
    bits: int
    threshold: float
    fraction_bits: int | None
    real: nn.Parameter  # of form 'q'
    shift: nn.Parameter  # of the others
    sign: nn.Parameter
    arithmetic: Arithmetic

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        form: Form = "q",
        bits: int = 5,
        threshold: float = 0.5,
        fraction_bits: int | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, _pair(kernel_size), _pair(stride),
            padding if isinstance(padding, str) else _pair(padding), _pair(dilation), False, (0, 0), groups, bias,
            padding_mode,  # type: ignore[arg-type]
        )  # fmt: skip
        _begin(self, form, bits, threshold, fraction_bits)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the layer convolves with, (O, C / groups, kh, kw)."""
        return _weight(self)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew, from a CPU generator (default: PyTorch's own)."""
        _draw(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        with _precision(self, x):
            return functional.conv2d(
                _input(self, x), self.weight, self.bias, self.stride, padding, self.dilation, self.groups
            )

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, {_described(self)}"


class ShiftLinear(nn.Linear):
    """The shift layer in the place of a linear layer: (..., C) to (..., O).

    Args:
        in_features: C.
        out_features: O.
        bias: As in `nn.Linear`.
        form: As in `ShiftConv2d`; so are all that follow.
        bits: Of a weight.
        threshold: Of signs.
        fraction_bits: Of inputs.
    """

    form: Form
    bits: int
    threshold: float
    fraction_bits: int | None
    real: nn.Parameter  # of form 'q'
    shift: nn.Parameter  # of the others
    sign: nn.Parameter
    arithmetic: Arithmetic

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        form: Form = "q",
        bits: int = 5,
        threshold: float = 0.5,
        fraction_bits: int | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        _begin(self, form, bits, threshold, fraction_bits)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the layer multiplies by, (O, C)."""
        return _weight(self)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew, from a CPU generator (default: PyTorch's own)."""
        _draw(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        with _precision(self, x):
            return functional.linear(_input(self, x), self.weight, self.bias)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, {_described(self)}"


ShiftLayer = ShiftConv2d | ShiftLinear


def weight_parameters(layer: ShiftLayer) -> tuple[str, ...]:
    """Return the names of the parameters that ``weight`` is computed from; they have its shape."""
    return ("real",) if layer.form == "q" else ("shift", "sign")


def check_shift(form: Any, bits: Any, threshold: Any) -> None:
    """Raise an `InputError` where a shift layer cannot be made with these settings."""
    if form not in get_args(Form):
        raise InputError(f"shift layers of form {form!r}", needed=f"one of {', '.join(get_args(Form))}")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 7:
        raise InputError(f"shift weights of {bits!r} bits", needed="a whole number from 2 to 7")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
        raise InputError(
            f"shift layers with threshold {threshold!r}", needed="at least 0 and less than 1: signs are drawn below 1"
        )


def _begin(layer: ShiftLayer, form: Form, bits: int, threshold: float, fraction_bits: int | None) -> None:
    """Give the layer the parameters of its form in the place of its weight."""
    check_shift(form, bits, threshold)
    shape = layer._parameters["weight"]
    assert shape is not None
    del layer.weight
    layer.form, layer.bits, layer.threshold, layer.fraction_bits = form, bits, threshold, fraction_bits
    for name in weight_parameters(layer):
        setattr(layer, name, nn.Parameter(torch.empty_like(shape), requires_grad=form != "frozen"))
    whole = () if fraction_bits is None else ("forward",)
    layer.arithmetic = Arithmetic(kind="shift", activation=check_fraction_bits(fraction_bits), weight=bits, whole=whole)
    layer.reset_parameters()


def _weight(layer: ShiftLayer) -> Tensor:
    if layer.form == "q":
        return nearest_power_of_two(layer.real, bits=layer.bits)
    return signed_power_of_two(layer.shift, layer.sign, bits=layer.bits, threshold=layer.threshold)


def _precision(layer: ShiftLayer, x: Tensor) -> AbstractContextManager[Any]:
    """Return in what to compute: autocast would take the bits of fixed point away again."""
    return nullcontext() if layer.fraction_bits is None else torch.autocast(x.device.type, enabled=False)


def _input(layer: ShiftLayer, x: Tensor) -> Tensor:
    if layer.form == "ps" and layer.training:
        with torch.no_grad():
            layer.shift.clamp_(_least("ps", layer.bits), 0)
    return x if layer.fraction_bits is None else floor_to(x, layer.fraction_bits)


@torch.no_grad()
def _draw(layer: ShiftLayer, generator: torch.Generator | None) -> None:
    if not hasattr(layer, "form"):
        return  # the base class draws a weight, which is about to be replaced
    if layer.form == "q":
        real = nn.init.kaiming_uniform_(torch.empty(layer.real.shape), math.sqrt(5), generator=generator)
        layer.real.copy_(real)
    else:
        least, shape = _least("ps", layer.bits), layer.shift.shape
        if layer.form == "frozen":
            drawn = torch.empty(shape).normal_(_FROZEN_MEAN, 1, generator=generator).clamp_(_FROZEN_LEAST, 0).round_()
        else:
            low, high = (-10, -1) if isinstance(layer, ShiftConv2d) else (least, 0)
            drawn = torch.empty(shape).uniform_(low, high, generator=generator)
        layer.shift.copy_(drawn.clamp_(least, 0))
        layer.sign.copy_(torch.empty(shape).uniform_(-1, 1, generator=generator))
    if layer.bias is not None:
        bound = 1 / math.sqrt(max(layer.weight[0].numel(), 1))
        layer.bias.copy_(torch.empty(layer.bias.shape).uniform_(-bound, bound, generator=generator))


def _described(layer: ShiftLayer) -> str:
    return f"form={layer.form}, bits={layer.bits}"


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)
