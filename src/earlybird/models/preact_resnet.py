"""Pre-activation residual networks with bottlenecks for small images: depth 9n + 2.

He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, https://arxiv.org/abs/1603.05027. Depth 101 is
the second network of the Early-Bird paper, 164 that of Network Slimming.

PreActResNet-164 at 32x32: 1.7 M parameters, 0.25 GMAC. The order is BN, ReLU, convolution throughout; the shortcut is
a 1x1 convolution without BatchNorm on the block's raw input. Deviation from the pruning papers' code: no selection
layer (an index gather between the first BatchNorm of a block and its first convolution). The residual stream's channels
are therefore kept or pruned as one group.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from earlybird.errors import InputError
from earlybird.models.layers import conv1x1, conv3x3, initialise, scaled

_EXPANSION = 4


class PreActBottleneck(nn.Module):
    """BN-ReLU-conv three times, plus shortcut: ``(N, inputs, H, W)`` to ``(N, 4 * inner, H/stride, W/stride)``."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * inner
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv1x1(inputs, inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride=stride)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = conv1x1(inputs, outputs, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.conv1(self.relu(self.bn1(x)))
        y = self.conv2(self.relu(self.bn2(y)))
        y = self.conv3(self.relu(self.bn3(y)))
        return y + self.shortcut(x)  # type: ignore[no-any-return]


class PreActResNet(nn.Module):
    """Pre-activation bottleneck ResNet: images ``(N, in_channels, H, W)`` to logits ``(N, classes)``.

    Args:
        depth: 9n + 2 (29, 56, 101, 164, ...).
        classes: Number of classes.
        in_channels: Channels of the images.
        width: Factor on the inner channels (16, 32, 64) of the three stages; the stream is four times as wide.
        gamma_init: Initial scale of every BatchNorm; published for the pruning papers: 0.5.
    """

    def __init__(
        self,
        depth: int,
        *,
        classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        gamma_init: float = 1.0,
    ) -> None:
        super().__init__()
        if depth < 11 or (depth - 2) % 9:
            raise InputError(f"depth {depth}", needed="9n + 2 for bottleneck blocks: 29, 56, 101, 164, ...")
        channels = scaled(16, width)
        self.conv = conv3x3(in_channels, channels)
        blocks: list[nn.Module] = []
        for inner, first_stride in ((scaled(16, width), 1), (scaled(32, width), 2), (scaled(64, width), 2)):
            for index in range((depth - 2) // 9):
                blocks.append(PreActBottleneck(channels, inner, first_stride if index == 0 else 1))
                channels = _EXPANSION * inner
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        initialise(self, gamma=gamma_init)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, classes)`` of ``images``."""
        features = self.pool(self.relu(self.bn(self.blocks(self.conv(images)))))  # (N, C, 1, 1)
        return self.classifier(features.flatten(1))  # type: ignore[no-any-return]


preact_resnet29 = partial(PreActResNet, 29)
preact_resnet56 = partial(PreActResNet, 56)
preact_resnet101 = partial(PreActResNet, 101)
preact_resnet164 = partial(PreActResNet, 164)
