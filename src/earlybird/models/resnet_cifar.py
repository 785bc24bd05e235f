"""Residual networks for small images: three stages of basic blocks, depth 6n + 2.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, https://arxiv.org/abs/1512.03385, section 4.2.
Depths 38, 74 and 110 are the subjects of the efficient-training papers (SkipNet, E2-Train, FracTrain); 20, 32, 44 and
56 those of elastic tickets.

ResNet-20 at 32x32: 0.27 M parameters, 41 MMAC; ResNet-110: 1.7 M, 0.25 GMAC. Deviation: where the size changes, the
shortcut is a 1x1 convolution with BatchNorm (the paper's option B, as in the SkipNet code), because zero padding of
channels (option A) cannot be followed by a dependency graph; it costs 2752 parameters.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from earlybird.errors import InputError
from earlybird.models.layers import conv1x1, conv3x3, initialise, scaled


class BasicBlock(nn.Module):
    """Two 3x3 convolutions plus shortcut: ``(N, inputs, H, W)`` to ``(N, outputs, H/stride, W/stride)``."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv1x1(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.shortcut(x))  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """ResNet for small images: images ``(N, in_channels, H, W)`` to logits ``(N, classes)``.

    Args:
        depth: 6n + 2 (20, 38, 74, 110, ...).
        classes: Number of classes.
        in_channels: Channels of the images.
        width: Factor on the channels (16, 32, 64) of the three stages.
        gamma_init: Initial scale of every BatchNorm.
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
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"depth {depth}", needed="6n + 2 for basic blocks: 20, 38, 74, 110, ...")
        channels = scaled(16, width)
        self.conv = conv3x3(in_channels, channels)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        blocks: list[nn.Module] = []
        for outputs, first_stride in ((scaled(16, width), 1), (scaled(32, width), 2), (scaled(64, width), 2)):
            for index in range((depth - 2) // 6):
                blocks.append(BasicBlock(channels, outputs, first_stride if index == 0 else 1))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        initialise(self, gamma=gamma_init)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, classes)`` of ``images``."""
        features = self.pool(self.blocks(self.relu(self.bn(self.conv(images)))))  # (N, C, 1, 1)
        return self.classifier(features.flatten(1))  # type: ignore[no-any-return]


resnet14 = partial(CifarResNet, 14)
resnet20 = partial(CifarResNet, 20)
resnet26 = partial(CifarResNet, 26)
resnet32 = partial(CifarResNet, 32)
resnet38 = partial(CifarResNet, 38)
resnet44 = partial(CifarResNet, 44)
resnet56 = partial(CifarResNet, 56)
resnet74 = partial(CifarResNet, 74)
resnet110 = partial(CifarResNet, 110)
