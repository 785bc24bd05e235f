"""MobileNetV2: inverted residuals with linear bottlenecks and depthwise convolutions.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, https://arxiv.org/abs/1801.04381.

At 224x224 and 1000 classes: 3.50 M parameters, 0.30 GMAC. Images of at most 64 pixels are halved three times
instead of five (the stem and the first stage that halves have stride 1, as usual on CIFAR; 94 MMAC at 32x32).
Depthwise convolutions have few operations for the memory they touch, so their time falls less than their MACs.
Deviation: no dropout before the classifier unless asked for.
"""

from __future__ import annotations

from torch import Tensor, nn

from earlybird.models.layers import conv1x1, conv3x3, initialise, scaled

_SMALL_IMAGE = 64
# expansion, output channels, blocks, stride of the first block (table 2 of the paper)
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 depthwise, 1x1 down: ``(N, inputs, H, W)`` to ``(N, outputs, H/stride, W/stride)``."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [conv1x1(inputs, inner), nn.BatchNorm2d(inner), nn.ReLU6(inplace=True)]
        layers += [conv3x3(inner, inner, stride=stride, groups=inner), nn.BatchNorm2d(inner), nn.ReLU6(inplace=True)]
        layers += [conv1x1(inner, outputs), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """MobileNetV2: images ``(N, in_channels, H, W)`` to logits ``(N, classes)``.

    Args:
        classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, pixels; 64 or less selects the strides for small images.
        width: Factor on the channels; as in the paper, the last layer never gets narrower than 1280.
        gamma_init: Initial scale of every BatchNorm.
        dropout: Probability of dropping a feature before the classifier.
    """

    def __init__(
        self,
        *,
        classes: int = 1000,
        in_channels: int = 3,
        image_size: int = 224,
        width: float = 1.0,
        gamma_init: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        small = image_size <= _SMALL_IMAGE
        channels = scaled(32, width)
        layers: list[nn.Module] = [
            conv3x3(in_channels, channels, stride=1 if small else 2),
            nn.BatchNorm2d(channels),
            nn.ReLU6(inplace=True),
        ]
        for stage, (expansion, base, blocks, first_stride) in enumerate(_STAGES):
            outputs = scaled(base, width)
            for index in range(blocks):
                stride = first_stride if index == 0 and not (small and stage == 1) else 1
                layers.append(InvertedResidual(channels, outputs, stride=stride, expansion=expansion))
                channels = outputs
        last = scaled(1280, max(1.0, width))
        layers += [conv1x1(channels, last), nn.BatchNorm2d(last), nn.ReLU6(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        self.classifier = nn.Linear(last, classes)
        initialise(self, gamma=gamma_init)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, classes)`` of ``images``."""
        features = self.pool(self.features(images))  # (N, 1280, 1, 1)
        return self.classifier(self.dropout(features.flatten(1)))  # type: ignore[no-any-return]


mobilenet_v2 = MobileNetV2
