"""Fixed point: numbers floored to a grid, as the inputs of shift layers are in DeepShift.

Elhoushi et al., "DeepShift: Towards Multiplication-Less Neural Networks", 2019, https://arxiv.org/abs/1905.13298;
reference code github.com/mostafaelhoushi/DeepShift (``utils.py``): 16 bits before the point, the sign among them, and
16 after it. This is simulated on floats: a float32 has 24 bits, so that of numbers above 256 the last ones are gone
already. Half types have fewer still, so that layers in fixed point compute in float32 under autocast, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from earlybird.errors import InputError

__all__ = ["WHOLE_BITS", "check_fraction_bits", "floor_to"]

WHOLE_BITS = 16
"""Bits before the point, the sign included."""


def check_fraction_bits(bits: int | None) -> int:
    """Return how many bits a number has with so many after the point: 32 in floating point (None).

    Raises:
        InputError: Not a whole number from 1 to 16.
    """
    if bits is None:
        return 32
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
        raise InputError(f"fixed point of {bits!r} bits after the point", needed="a whole number from 1 to 16, or none")
    return WHOLE_BITS + bits


class _Floor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fraction_bits: int) -> Tensor:
        unit, bound = 2.0**-fraction_bits, 2.0 ** (WHOLE_BITS - 1)
        return x.div(unit).floor_().mul_(unit).clamp_(-bound, bound - unit)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def floor_to(x: Tensor, fraction_bits: int = 16) -> Tensor:
    """Return ``x`` floored to multiples of ``2 ** -fraction_bits``, and clipped to what `WHOLE_BITS` hold.

    The gradient passes straight through. Half types become float32.
    """
    floored: Tensor = _Floor.apply(x.to(torch.promote_types(x.dtype, torch.float32)), fraction_bits)
    return floored
