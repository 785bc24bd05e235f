"""Networks of well-known shapes that no package here has, written out small: what `architectures.py` cuts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class DenseNet(nn.Module):
    """Huang et al., arXiv 1608.06993: every layer reads all layers of its stage before it."""

    class Layer(nn.Module):
        """A bottleneck layer, whose outputs are laid beside its inputs."""

        def __init__(self, inputs: int, growth: int) -> None:
            super().__init__()
            self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(4 * growth)
            self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(functional.relu(self.norm1(x)))
            return torch.cat([x, self.conv2(functional.relu(self.norm2(y)))], 1)

    def __init__(self, growth: int = 8, depths: tuple[int, ...] = (3, 4, 3), classes: int = 10) -> None:
        super().__init__()
        width, layers = 2 * growth, [block(3, 2 * growth)]
        for stage, depth in enumerate(depths):
            for _ in range(depth):
                layers.append(self.Layer(width, growth))
                width += growth
            if stage < len(depths) - 1:
                layers += [
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                    nn.Conv2d(width, width // 2, 1, bias=False),
                    nn.AvgPool2d(2),
                ]
                width //= 2
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class MobileNetV3(nn.Module):
    """Howard et al., arXiv 1905.02244: inverted residuals with squeeze-and-excite and hard swish."""

    class Gate(nn.Module):
        """Squeeze and excite."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(width, max(width // 4, 8), 1), nn.Conv2d(max(width // 4, 8), width, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * functional.hardsigmoid(self.up(functional.relu(self.down(functional.adaptive_avg_pool2d(x, 1)))))

    class Block(nn.Module):
        """An inverted residual."""

        def __init__(self, inputs: int, inner: int, outputs: int, kernel: int, stride: int, gated: bool) -> None:
            super().__init__()
            act = nn.Hardswish() if stride == 1 else nn.ReLU()
            self.layers = nn.Sequential(
                nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), act,
                nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False), nn.BatchNorm2d(inner),
                act, MobileNetV3.Gate(inner) if gated else nn.Identity(),
                nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
            )  # fmt: skip
            self.skips = stride == 1 and inputs == outputs

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layers(x) if self.skips else self.layers(x)

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(),
            self.Block(16, 48, 24, 3, 2, False), self.Block(24, 72, 24, 3, 1, False),
            self.Block(24, 96, 40, 5, 2, True), self.Block(40, 120, 40, 5, 1, True),
            self.Block(40, 120, 40, 5, 1, True),
            nn.Conv2d(40, 160, 1, bias=False), nn.BatchNorm2d(160), nn.Hardswish(), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(160, 128), nn.Hardswish(), nn.Linear(128, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class ShuffleNetV2(nn.Module):
    """Ma et al., arXiv 1807.11164: half of the channels pass by, then all are shuffled."""

    class Block(nn.Module):
        """A basic unit."""

        def __init__(self, width: int) -> None:
            super().__init__()
            half = width // 2
            self.branch = nn.Sequential(
                block(half, half, 1), nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False), nn.BatchNorm2d(half),
                block(half, half, 1),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            kept, changed = x.chunk(2, 1)
            x = torch.cat([kept, self.branch(changed)], 1)
            count, width, height, breadth = x.shape
            return x.view(count, 2, width // 2, height, breadth).transpose(1, 2).reshape(count, width, height, breadth)

    def __init__(self, width: int = 48, classes: int = 10) -> None:
        super().__init__()
        self.stem = block(3, width, 3, 2)
        self.stages = nn.Sequential(
            self.Block(width), self.Block(width), block(width, 2 * width, 3, 2), self.Block(2 * width),
            self.Block(2 * width), block(2 * width, 4 * width, 1),
        )  # fmt: skip
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.stages(self.stem(x)).mean((2, 3)))


class UNet(nn.Module):
    """Ronneberger et al., arXiv 1505.04597: what the way down has seen is laid beside what comes back up."""

    def __init__(self, width: int = 24, classes: int = 4) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(self._pair(i, o) for i, o in zip([3, *widths], widths))
        self.bottom = self._pair(widths[-1], 8 * width)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths))
        self.merge = nn.ModuleList(self._pair(2 * w, w) for w in reversed(widths))
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(block(inputs, outputs), block(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for layer in self.down:
            seen.append(layer(x))
            x = functional.max_pool2d(seen[-1], 2)
        x = self.bottom(x)
        for up, merge, side in zip(self.up, self.merge, reversed(seen)):
            x = merge(torch.cat([side, up(x)], 1))
        return self.head(x)


class Generator(nn.Module):
    """Radford et al., arXiv 1511.06434: an image from noise, by transposed convolutions."""

    def __init__(self, noise: int = 32, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.project = nn.Linear(noise, 4 * width * 16)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(4 * width), nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(self.project(noise).view(len(noise), -1, 4, 4))


class LargeKernelAttention(nn.Module):
    """Guo et al., arXiv 2202.09741 (VAN): a map of products that large depthwise convolutions make."""

    class Block(nn.Module):
        """Attention and a convolutional feed-forward part, each scaled and added."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
            self.enter, self.leave = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
            self.near = nn.Conv2d(width, width, 5, padding=2, groups=width)
            self.far = nn.Conv2d(width, width, 7, padding=9, dilation=3, groups=width)
            self.mix = nn.Conv2d(width, width, 1)
            self.grow, self.shrink = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)
            self.local = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
            self.scale1 = nn.Parameter(torch.full((width,), 0.5))
            self.scale2 = nn.Parameter(torch.full((width,), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            y = functional.gelu(self.enter(self.norm1(x)))
            x = x + self.scale1[:, None, None] * self.leave(y * self.mix(self.far(self.near(y))))
            y = self.shrink(functional.gelu(self.local(self.grow(self.norm2(x)))))
            return x + self.scale2[:, None, None] * y

    def __init__(self, widths: tuple[int, ...] = (16, 32, 48), classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *widths), widths):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), self.Block(outputs)]
        self.stages, self.classifier = nn.Sequential(*layers), nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.stages(x).mean((2, 3)))


def audio(width: int = 32, classes: int = 12) -> nn.Module:
    """Return a network on waves: Dai et al., arXiv 1610.00087 (M5)."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in (
        (1, width, 80, 8), (width, width, 3, 1), (width, 2 * width, 3, 1), (2 * width, 4 * width, 3, 1),
    ):  # fmt: skip
        layers += [nn.Conv1d(inputs, outputs, kernel, stride), nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(4)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def perceptron(classes: int = 10) -> nn.Module:
    """Return a multi-layer perceptron."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, classes)
    )


class Recurrent(nn.Module):
    """A recurrent network with a head of two layers: the recurrent part cannot be cut, the head can."""

    def __init__(self, inputs: int = 24, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Linear(inputs, 32), nn.LSTM(32, width, num_layers=2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0][:, -1])


class Mixer(nn.Module):
    """Tolstikhin et al., arXiv 2105.01601: linear layers over the positions and over the channels, in turns."""

    class Block(nn.Module):
        """Both, each added to what comes in."""

        def __init__(self, positions: int, width: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.positions = nn.Sequential(nn.Linear(positions, 48), nn.GELU(), nn.Linear(48, positions))
            self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.positions(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.norm2(x))

    def __init__(self, width: int = 48, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*(self.Block(64, width) for _ in range(3)), nn.LayerNorm(width))
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x).flatten(2).transpose(1, 2)).mean(1))
