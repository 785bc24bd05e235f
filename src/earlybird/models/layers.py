"""What several model families share: the width rule, the 3x3 convolution and the initial values."""

from __future__ import annotations

import math

from torch import nn

from earlybird.errors import InputError


def scaled(channels: int, width: float) -> int:
    """Return ``channels`` times ``width``, as a multiple of 8 (at least 8); exactly ``channels`` when ``width`` is 1.

    Raises:
        InputError: ``width`` is not a positive finite number.
    """
    if not (math.isfinite(width) and width > 0):
        raise InputError(f"width {width}", needed="a positive number", hint="width=0.5 halves every layer")
    return channels if width == 1 else max(8, round(channels * width / 8) * 8)


def conv3x3(inputs: int, outputs: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """3x3 convolution, padding 1, no bias (a BatchNorm follows): weight ``(outputs, inputs/groups, 3, 3)``."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, groups=groups, bias=False)


def conv1x1(inputs: int, outputs: int, *, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias: weight ``(outputs, inputs, 1, 1)``."""
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


def initialise(model: nn.Module, *, gamma: float = 1.0) -> None:
    """Set the initial values of the papers, in place, from PyTorch's global generator.

    Convolutions: normal with variance ``2 / (k * k * outputs)`` (He et al. 2015, fan out). BatchNorm: scale
    ``gamma``, shift 0. Linear layers: normal with standard deviation 0.01, bias 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, gamma)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
