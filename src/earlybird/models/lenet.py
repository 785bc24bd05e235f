"""LeNet-300-100, the multilayer perceptron in which lottery tickets were found first.

LeCun et al., "Gradient-Based Learning Applied to Document Recognition", Proceedings of the IEEE 1998; as used by
Frankle and Carbin, ICLR 2019, https://arxiv.org/abs/1803.03635: two hidden layers of 300 and 100 units with ReLU, no
norms, Glorot normal weights. 0.27 M parameters and MACs at 28x28.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from earlybird.models.layers import scaled


class LeNet300(nn.Module):
    """LeNet-300-100: images ``(N, in_channels, H, W)`` to logits ``(N, classes)``.

    Args:
        classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, pixels.
        width: Factor on the units (300, 100) of the hidden layers.
    """

    def __init__(self, *, classes: int = 10, in_channels: int = 1, image_size: int = 28, width: float = 1.0) -> None:
        super().__init__()
        sizes = (in_channels * image_size**2, scaled(300, width), scaled(100, width), classes)
        self.first, self.second, self.head = (nn.Linear(i, o) for i, o in pairwise(sizes))
        self.activation = nn.ReLU()
        for layer in (self.first, self.second, self.head):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, classes)`` of ``images``."""
        hidden = self.activation(self.first(images.flatten(1)))
        return self.head(self.activation(self.second(hidden)))  # type: ignore[no-any-return]


lenet300 = LeNet300
