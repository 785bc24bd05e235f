"""A small plain CNN for small images (8x8 digits, 28x28 MNIST): five convolutions with BatchNorm.

The VGG pattern (Simonyan and Zisserman, ICLR 2015, https://arxiv.org/abs/1409.1556) cut to three stages: big enough
that a ticket makes it faster, small enough to train in seconds.

0.56 M parameters; 7 MMAC at 8x8, 21 MMAC at 28x28: images of 16 pixels and more are pooled once more, after the first
convolution.
"""

from __future__ import annotations

from torch import Tensor, nn

from earlybird.models.layers import conv3x3, initialise, scaled


class SmallCNN(nn.Module):
    """Small CNN: images ``(N, in_channels, H, W)``, at least 4x4, to logits ``(N, classes)``.

    Args:
        classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, pixels.
        width: Factor on the channels (64, 128, 256) of the three stages.
        gamma_init: Initial scale of every BatchNorm.
    """

    def __init__(
        self,
        *,
        classes: int = 10,
        in_channels: int = 1,
        image_size: int = 8,
        width: float = 1.0,
        gamma_init: float = 1.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        stages = ((64,), (64,), (128, 128), (256,)) if image_size >= 16 else ((64, 64), (128, 128), (256,))
        for index, outputs in enumerate(stages):
            if index:
                layers.append(nn.MaxPool2d(2))
            for output in outputs:
                kept = scaled(output, width)
                layers += [conv3x3(channels, kept), nn.BatchNorm2d(kept), nn.ReLU(inplace=True)]
                channels = kept
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        initialise(self, gamma=gamma_init)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, classes)`` of ``images``."""
        features = self.pool(self.features(images))  # (N, C, 1, 1)
        return self.classifier(features.flatten(1))  # type: ignore[no-any-return]


small_cnn = SmallCNN
