"""The network of the CIFAR-10 speed-runs: six 3x3 convolutions behind a frozen whitening of 2x2 patches.

Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024, https://arxiv.org/abs/2404.00498; here in the form that
is trained with Muon (`earlybird.optimizers.muon`) to 94 % in 8 epochs, github.com/KellerJordan/cifar10-airbench,
``airbench94_muon.py``. It descends from Page, "How to Train Your ResNet", and from tysam-code/hlb-CIFAR10.

A block is conv, max pooling, BN, GELU, conv, BN, GELU; the first filters of a convolution begin as the identity, those
of the whitening come from the training images. The logits are divided by the number of features: the head's weights
begin with a standard deviation of 1.

At 32x32: 1.97 M parameters, 0.118 GMAC. Published constants throughout. Deviations:

- what is pooled last is the whole map, not 3x3 of it: the same at 32x32, and other sizes work (at 20, the map is 2x2);
- images too small for three poolings are pooled as often as they can be;
- the whitening is computed from images drawn by the run's seed, not from the first 5000: folders are sorted by class;
- weights lie in float32 (published: float16, batch norms in float32), the arithmetic is what the run chooses;
- scales of batch norms can learn, and stay at 1 because Muon's groups leave them there: a ticket reads their gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from earlybird.models.layers import conv3x3, scaled

_PATCH = 2
_WHITENING_EPS = 5e-4
_IMAGES_AT_ONCE = 500


class Block(nn.Module):
    """Two 3x3 convolutions, pooled after the first: ``(N, inputs, H, W)`` to ``(N, outputs, H/2, W/2)``."""

    def __init__(self, inputs: int, outputs: int, *, pooled: bool) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs)
        self.pool = nn.MaxPool2d(2) if pooled else nn.Identity()
        self.norm1 = _batch_norm(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.norm2 = _batch_norm(outputs)
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        x = self.gelu(self.norm1(self.pool(self.conv1(x))))
        return self.gelu(self.norm2(self.conv2(x)))  # type: ignore[no-any-return]


class SpeedRun(nn.Module):
    """Speed-run network: images ``(N, in_channels, H, W)`` to logits ``(N, classes)``.

    Args:
        classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, pixels; decides only how often they are pooled.
        width: Factor on the channels (64, 256, 256) of the three blocks.
    """

    def __init__(self, *, classes: int = 10, in_channels: int = 3, image_size: int = 32, width: float = 1.0) -> None:
        super().__init__()
        channels = 2 * in_channels * _PATCH**2  # each direction of the patches, and its negative
        self.whiten = nn.Conv2d(in_channels, channels, _PATCH)
        self.whiten.weight.requires_grad_(False)
        side = image_size - _PATCH + 1
        blocks: list[nn.Module] = []
        for outputs in (scaled(64, width), scaled(256, width), scaled(256, width)):
            blocks.append(Block(channels, outputs, pooled=side >= 2))
            channels, side = outputs, max(side // 2, 1)
        self.gelu = nn.GELU()
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(channels, classes, bias=False)
        self.features = channels  # of the dense network: a cut must not make the logits larger
        with torch.no_grad():
            for module in self.blocks.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.dirac_(module.weight[: module.in_channels])
            self.head.weight /= self.head.weight.std()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, classes)`` of ``images``."""
        features = self.pool(self.blocks(self.gelu(self.whiten(images))))  # (N, C, 1, 1)
        return self.head(features.flatten(1)) / self.features  # type: ignore[no-any-return]

    @torch.no_grad()
    def initialise_from_images(self, images: Tensor) -> None:
        """Set the filters that whiten 2x2 patches.

        They are ``+-E diag(lambda + eps)^(-1/2)``, with E the eigenvectors and lambda the eigenvalues of the patches'
        second moment (their mean is not taken off), ascending.

        Args:
            images: Training images as the network gets them, but not augmented, ``(N, in_channels, H, W)``.
        """
        size = self.whiten.weight[0].numel()
        moment = torch.zeros(size, size, dtype=torch.float64)
        count = 0
        for part in images.split(_IMAGES_AT_ONCE):
            patches = functional.unfold(part.float(), _PATCH).transpose(0, 1).flatten(1)  # (size, patches)
            moment += (patches @ patches.T).cpu()
            count += patches.shape[1]
        values, vectors = torch.linalg.eigh(moment / count)
        filters = (vectors / (values + _WHITENING_EPS).sqrt()).T.reshape(-1, *self.whiten.weight.shape[1:])
        self.whiten.weight.copy_(torch.cat((filters, -filters)))


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    # its statistics follow fast, since a run has few steps; published as 0.6, in the opposite sense
    return nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)


speedrun = SpeedRun
