"""Batch norm in training mode, with or without a ReLU behind it, by a kernel of our own for images in channels_last.

    y = relu?((x - mean) / sqrt(variance + eps) * weight + bias)

It is what `torch.nn.functional.batch_norm` with ``training=True`` and `torch.relu` compute, up to rounding, in a
fraction of the time: both directions read memory twice and write it once, the ReLU costs nothing, and what backward
needs of the forward pass is the input alone, with four numbers a channel. Statistics are summed in chunks of rows and
put together in float64; no result depends on the number of threads.

Where `supports` says no, PyTorch's own operators have to do it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earlybird.kernels import compiled
from earlybird.kernels.eager import is_eager

__all__ = ["available", "batch_norm", "supports"]

SOURCE = Path(__file__).with_suffix(".cpp")
_TYPES = (torch.bfloat16, torch.float32)


def supports(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None
) -> bool:
    """Tell whether `batch_norm` takes these: a dense image in channels_last on a CPU, and float32 vectors.

    The first call compiles the kernel, if this machine has not done so before.

    Args:
        x: (N, C, H, W), bfloat16 or float32.
        weight: (C,); there must be one.
        bias: (C,); there must be one.
        running_mean: (C,); may be None, if both are.
        running_var: (C,).
    """
    if weight is None or bias is None or (running_mean is None) != (running_var is None):
        return False
    vectors = [weight, bias, *(own for own in (running_mean, running_var) if own is not None)]
    return (
        is_eager(x)
        and x.dtype in _TYPES
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(
            own.dtype == torch.float32 and own.device.type == "cpu" and own.is_contiguous() and len(own) == x.shape[1]
            for own in vectors
        )
        and _kernel() is not None
    )


def available() -> bool:
    """Tell whether the kernel is there; the first call compiles it, if this machine has not done so before."""
    return _kernel() is not None


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool = False,
) -> Tensor:
    """Return the input, normalised over N, H and W, scaled and shifted; negative numbers are 0 if ``relu``.

    The running statistics move in place. Gradients are those of the first order.

    Args:
        x: (N, C, H, W), of which `supports` says yes.
        weight: (C,).
        bias: (C,).
        running_mean: (C,), or None.
        running_var: (C,), or None; it gets the unbiased variance.
        momentum: Share of the new in the running statistics.
        eps: Added to the variance.
        relu: Clamp the result.

    Returns:
        (N, C, H, W), of the type and order of memory of ``x``.

    Raises:
        ValueError: There is but one value for a channel.
    """
    if x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    y: Tensor = _BatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps, relu)
    return y


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
        momentum: float, eps: float, relu: bool,
    ) -> Tensor:  # fmt: skip
        channels = x.shape[1]
        y = torch.empty_like(x)
        saved = x.new_empty(4, channels, dtype=torch.float64)  # mean, 1 / standard deviation, scale, shift
        kernel = _kernel()
        assert kernel is not None
        kernel.earlybird_batch_norm(
            x.data_ptr(), y.data_ptr(), x.numel() // channels, channels, weight.data_ptr(), bias.data_ptr(),
            None if running_mean is None else running_mean.data_ptr(),
            None if running_var is None else running_var.data_ptr(),
            saved.data_ptr(), momentum, eps, relu, x.dtype == torch.bfloat16, torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(x, saved)
        ctx.relu = relu
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, saved = ctx.saved_tensors
        channels = x.shape[1]
        gradient = gradient.to(x.dtype).contiguous(memory_format=torch.channels_last)
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weight, of_bias = x.new_empty(2, channels, dtype=torch.float32).unbind()
        kernel = _kernel()
        assert kernel is not None
        kernel.earlybird_batch_norm_backward(
            x.data_ptr(), gradient.data_ptr(), None if of_x is None else of_x.data_ptr(), x.numel() // channels,
            channels, saved.data_ptr(), of_weight.data_ptr(), of_bias.data_ptr(), ctx.relu, x.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )  # fmt: skip
        return of_x, of_weight, of_bias, None, None, None, None, None


@functools.cache
def _kernel() -> ctypes.CDLL | None:
    library = compiled.load(SOURCE, "batch norms")
    if library is not None:
        pointer, size, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
        library.earlybird_batch_norm.argtypes = [
            pointer, pointer, size, size, *[pointer] * 5, number, number, flag, flag, flag,
        ]  # fmt: skip
        library.earlybird_batch_norm.restype = None
        library.earlybird_batch_norm_backward.argtypes = [
            pointer, pointer, pointer, size, size, *[pointer] * 3, flag, flag, flag,
        ]  # fmt: skip
        library.earlybird_batch_norm_backward.restype = None
    return library
