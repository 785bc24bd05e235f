"""VGG with batch normalisation, in the CIFAR form that the pruning papers use: one linear layer instead of three.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
https://arxiv.org/abs/1409.1556. CIFAR form: Liu et al., "Learning Efficient Convolutional Networks through Network
Slimming", ICCV 2017, https://arxiv.org/abs/1708.06519; the Early-Bird reference code trains this one with
``gamma_init=0.5``.

VGG-16 at 32x32: 14.7 M parameters, 0.314 GMAC. Deviation: convolutions have no bias (the BatchNorm behind them cancels
it), and images too small for four poolings are pooled as often as they can be.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from earlybird.errors import InputError
from earlybird.models.layers import conv3x3, initialise, scaled

_STAGES = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(nn.Module):
    """VGG-11, 16 or 19: images ``(N, in_channels, H, W)`` to logits ``(N, classes)``.

    Args:
        depth: 11, 16 or 19.
        classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, pixels; decides only how often they are pooled.
        width: Factor on the channels of every layer.
        gamma_init: Initial scale of every BatchNorm; published for the pruning papers: 0.5.
    """

    def __init__(
        self,
        depth: int,
        *,
        classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        width: float = 1.0,
        gamma_init: float = 1.0,
    ) -> None:
        super().__init__()
        if depth not in _STAGES:
            raise InputError(f"depth {depth}", needed="11, 16 or 19")
        layers: list[nn.Module] = []
        channels, side = in_channels, image_size
        for stage, outputs in enumerate(_STAGES[depth]):
            if stage and side >= 2:
                layers.append(nn.MaxPool2d(2))
                side //= 2
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


vgg11 = partial(VGG, 11)
vgg16 = partial(VGG, 16)
vgg19 = partial(VGG, 19)
