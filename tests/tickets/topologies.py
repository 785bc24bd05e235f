"""Small networks, one for each way in which channels are tied together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv(i: int, o: int, kernel: int = 3, stride: int = 1, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=kwargs.pop("bias", False), **kwargs)


class BasicBlock(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = (
            conv(i, o, 3, stride),
            nn.BatchNorm2d(o),
            conv(o, o),
            nn.BatchNorm2d(o),
        )
        same = stride == 1 and i == o
        self.shortcut = nn.Identity() if same else nn.Sequential(conv(i, o, 1, stride), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class PreActBlock(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = (
            nn.BatchNorm2d(width), conv(width, inner, 1), nn.BatchNorm2d(inner), conv(inner, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(functional.relu(self.norm2(self.conv1(functional.relu(self.norm1(x))))))


class DenseLayer(nn.Module):
    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(i), conv(i, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(functional.relu(self.norm(x)))], dim=1)


class InvertedResidual(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand, self.norm1 = conv(width, inner, 1), nn.BatchNorm2d(inner)
        self.depthwise, self.norm2 = conv(inner, inner, groups=inner), nn.BatchNorm2d(inner)
        self.project, self.norm3 = conv(inner, width, 1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self.norm1(self.expand(x)))
        return x + self.norm3(self.project(functional.relu6(self.norm2(self.depthwise(y)))))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.up(functional.relu(self.down(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


def stem(width: int) -> list[nn.Module]:
    return [conv(3, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


def tail(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]


TOPOLOGIES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(*stem(8), conv(8, 12, bias=True), nn.BatchNorm2d(12), nn.ReLU(), *tail(12)),
    "flatten": lambda: nn.Sequential(
        *stem(6), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(24, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 5)
    ),
    "residual": lambda: nn.Sequential(*stem(8), BasicBlock(8, 8, 1), BasicBlock(8, 12, 2), *tail(12)),
    "preact": lambda: nn.Sequential(
        conv(3, 8), PreActBlock(8, 4), PreActBlock(8, 6), nn.BatchNorm2d(8), nn.ReLU(), *tail(8)
    ),
    "concatenation": lambda: nn.Sequential(
        *stem(6), DenseLayer(6, 4), DenseLayer(10, 4), nn.BatchNorm2d(14), nn.ReLU(), *tail(14)
    ),
    "depthwise": lambda: nn.Sequential(*stem(6), InvertedResidual(6, 12), InvertedResidual(6, 12), *tail(6)),
    "grouped": lambda: nn.Sequential(
        *stem(8), conv(8, 12, groups=2), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 6), nn.BatchNorm2d(6), *tail(6)
    ),
    "squeeze_excite": lambda: nn.Sequential(
        *stem(8), SqueezeExcite(8), conv(8, 6), nn.BatchNorm2d(6), nn.Hardswish(), *tail(6)
    ),
    "sigmoid": lambda: nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.Sigmoid(), conv(8, 6), nn.BatchNorm2d(6), *tail(6)
    ),
    "transposed": lambda: nn.Sequential(
        *stem(6), nn.ConvTranspose2d(6, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.BatchNorm2d(6), *tail(6)
    ),
}


class Patches(nn.Module):
    """A small vision transformer of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, 2)
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True) for _ in range(2))
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {"patches": Patches}


def make(name: str, seed: int = 0) -> nn.Module:
    """Build a topology whose norms have lively scales, shifts and statistics, so that nothing agrees by accident."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (TOPOLOGIES | TRANSFORMERS)[name]()
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.uniform_(module.weight, 0.2, 2.0)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def images(count: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """Zero scale and shift of removed channels: what shrinking must not differ from."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, mask in masks.items():
            modules[name].weight[~mask] = 0
            modules[name].bias[~mask] = 0
    return model
