"""Convolutions whose forward pass really is in int8, by oneDNN's kernels: what 8 bits save on a CPU that has them.

With ``x`` the input, from 0 (as after a ReLU) or, with a zero point in the middle, of both signs,

    code_x = round(x / step_x) + zero   in 0 .. 254       step_x: one for the batch
    code_w = round(w / step_w)          in -127 .. 127    step_w: one an output channel
    y = step_x * step_w * sum of (code_x - zero) * code_w,  summed in 32 bits

The backward pass is in bf16: straight through to the input, and with the rounded weight to the layer before. Nothing
is kept from batch to batch; evaluation takes the range of each batch, as training does.

What it saves: seconds of forward passes of wide layers. An instruction multiplies twice as many int8 as bf16 numbers
(AVX-512 VNNI), but codes of the input cost four passes over it, and those of the weight, which moves at each step, a
packing. So layers with fewer than `LEAST` channels stay in bf16, and two thirds of a training step always do: VGG-16
takes a step 1.12 times as fast at full width, 1.03 times at half (``benchmarks/int8_forward.py``; one thread of an
AMD EPYC, 2026-11). CPUs without VNNI add such products up in 16 bits, which overflow: they are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from earlybird.calls import around
from earlybird.cost.arithmetic import Arithmetic
from earlybird.errors import InputError
from earlybird.precision.quantize import check_free, declare

__all__ = ["ARITHMETIC", "LEAST", "Int8Layer", "check_device", "convolve", "wide"]

LEAST = 64
"""Input and output channels from which on int8 was found to be faster (AMD EPYC with AVX-512 VNNI, 2026-11)."""

ARITHMETIC = Arithmetic(activation=8, weight=8, gradient=16, whole=("forward",), weight_pass=(16, 16))
"""Of such a layer: the gradient of the weight is a product of the input as it came and the gradient, both in bf16."""

_HALF = torch.tensor(-128.0)


def check_device(device: torch.device) -> None:
    """Raise an `InputError` unless ``device`` has the kernels."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.cpu._is_vnni_supported():
        raise InputError(
            f"rung int8 on {device if device.type != 'cpu' else 'a CPU without VNNI or oneDNN'}",
            needed="a CPU with int8 instructions (AVX-512 VNNI)",
            hint="begin the ladder with bf16",
        )


def wide(model: nn.Module) -> dict[str, nn.Module]:
    """Return by name the convolutions for which int8 is faster.

    Raises:
        InputError: There is none, or another method decides how one computes.
    """
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and min(module.in_channels, module.out_channels) >= LEAST
    }
    if not found:
        raise InputError(
            f"{type(model).__name__} has no plain convolution from {LEAST} channels to {LEAST}",
            hint="leave rung int8 out: narrower ones are faster in bf16",
        )
    for name, module in found.items():
        check_free(name, module)
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
        low, high = (float(bound) for bound in torch.aminmax(x.movedim(1, -1)))  # contiguous where x is channels_last
        signed = low < 0
        # one code less than there are: bf16 rounds what is next to the last one up to 128, which int8 takes for -128
        x_step = max(-low, high) / (126 if signed else 254) or 1.0
        # conversion to int8 is several times as fast as to uint8: codes less 128, whose first bit is then turned
        codes = torch.add(torch.zeros((), dtype=x.dtype) if signed else _HALF.to(x.dtype), x, alpha=1 / x_step)
        codes = codes.round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)
        steps = torch.maximum(weight.amax((1, 2, 3), keepdim=True), -weight.amin((1, 2, 3), keepdim=True)) / 127
        steps.clamp_min_(torch.finfo(torch.float32).tiny)
        weights = weight.mul(1 / steps).round_().to(torch.int8)
        ctx.save_for_backward(x, weights, steps)
        ctx.geometry, ctx.bias_shape = geometry, None if bias is None else bias.shape
        scales, zero = steps.flatten(), 128 if signed else 0
        packed = torch.ops.onednn.qconv_prepack(weights, scales, x_step, zero, *geometry, x.shape)
        zeros = torch.zeros(len(scales), dtype=torch.int32)
        output: Tensor = torch.ops.onednn.qconv2d_pointwise(
            codes, x_step, zero, packed, scales, zeros, bias, *geometry, 1.0, 0, torch.bfloat16,
            "none", [], "",
        )  # fmt: skip
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weights, steps = ctx.saved_tensors
        gradient, needs = gradients[0], ctx.needs_input_grad
        stride, padding, dilation, groups = ctx.geometry
        weight = weights.to(gradient.dtype).mul_(steps.to(gradient.dtype))  # of mixed types it takes ten times as long
        of_input, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient, x.to(gradient.dtype), weight, ctx.bias_shape, stride, padding, dilation, False, (0, 0), groups,
            needs[:3],
        )  # fmt: skip
        return (
            of_input.to(x.dtype) if needs[0] else None,
            of_weight.float() if needs[1] else None,
            of_bias.float() if needs[2] else None,
            None,
        )


def convolve(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Return what ``layer`` makes of ``x``, in bf16, with the forward pass in int8.

    Args:
        x: ``(N, C, H, W)``, not empty; channels_last is fastest.
        layer: A convolution that is not grouped, padded with zeros, float32.
    """
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    output: Tensor = _Convolution.apply(x, layer.weight, layer.bias, geometry)
    return output


class Int8Layer:
    """A convolution of `wide`, whose forward pass is in int8 while it is `active`.

    Attributes:
        active: Whether the next pass is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.active = module, False
        self._around = around(module, self._run, self)

    def remove(self) -> None:
        """Give the module its plain forward back."""
        self._around.remove()
        declare(self.module, None)

    def _run(self, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        if not self.active or not x.numel():
            return forward(x)
        return convolve(x, self.module)  # type: ignore[arg-type]
