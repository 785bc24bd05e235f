"""Residual networks for photographs: ResNet-18 and 34 (basic blocks), ResNet-50 (bottlenecks).

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, https://arxiv.org/abs/1512.03385. In the
bottleneck the stride is in the 3x3 convolution ("v1.5", Goyal et al., https://arxiv.org/abs/1706.02677, section 5.1),
as in torchvision.

At 224x224 and 1000 classes: ResNet-18 11.69 M parameters, 1.82 GMAC; ResNet-50 25.56 M, 4.09 GMAC. Images of at most
64 pixels get the usual small stem: one 3x3 convolution with stride 1 and no pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from earlybird.models.layers import conv1x1, conv3x3, initialise, scaled
from earlybird.models.resnet_cifar import BasicBlock

_EXPANSION = 4
_SMALL_IMAGE = 64


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolution, plus shortcut: ``(N, inputs, H, W)`` to ``(N, 4 * inner, H/stride, W/stride)``."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * inner
        self.conv1 = conv1x1(inputs, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride=stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv1x1(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """ResNet of four stages: images ``(N, in_channels, H, W)`` to logits ``(N, classes)``.

    Args:
        depths: Blocks in each of the four stages.
        bottleneck: Bottleneck blocks (four times as wide outside) instead of basic ones.
        classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, pixels; 64 or less selects the small stem.
        width: Factor on the channels (64, 128, 256, 512) of the stages.
        gamma_init: Initial scale of every BatchNorm.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        bottleneck: bool,
        classes: int = 1000,
        in_channels: int = 3,
        image_size: int = 224,
        width: float = 1.0,
        gamma_init: float = 1.0,
    ) -> None:
        super().__init__()
        channels = scaled(64, width)
        if image_size <= _SMALL_IMAGE:
            stem: list[nn.Module] = [conv3x3(in_channels, channels)]
        else:
            stem = [nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)]
        stem += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        if image_size > _SMALL_IMAGE:
            stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        self.stem = nn.Sequential(*stem)
        blocks: list[nn.Module] = []
        for stage, (depth, base) in enumerate(zip(depths, (64, 128, 256, 512), strict=True)):
            inner = scaled(base, width)
            for index in range(depth):
                stride = 2 if stage and index == 0 else 1
                blocks.append((Bottleneck if bottleneck else BasicBlock)(channels, inner, stride))
                channels = _EXPANSION * inner if bottleneck else inner
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        initialise(self, gamma=gamma_init)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, classes)`` of ``images``."""
        features = self.pool(self.blocks(self.stem(images)))  # (N, C, 1, 1)
        return self.classifier(features.flatten(1))  # type: ignore[no-any-return]


resnet18 = partial(ResNet, (2, 2, 2, 2), bottleneck=False)
resnet34 = partial(ResNet, (3, 4, 6, 3), bottleneck=False)
resnet50 = partial(ResNet, (3, 4, 6, 3), bottleneck=True)
