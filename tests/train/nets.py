"""Models of one's own, for the tests: with dropout (random numbers in the forward pass), and some that are wrong."""

import torch
from torch import Tensor, nn


class Net(nn.Sequential):
    pass


def with_dropout(classes: int, in_channels: int, image_size: int) -> nn.Module:
    return Net(
        nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(16, 24, 1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(96, classes),
    )


def without_batch_norm(classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    )


def wrong_classes(in_channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, 1000))


class _Explodes(nn.Module):
    """Fine for some steps, then infinite."""

    def __init__(self, classes: int, in_channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3),
            nn.BatchNorm2d(8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, classes),
        )
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        logits: Tensor = self.net(images)
        return logits * torch.where(self.calls > 9, torch.nan, 1.0)


def explodes(classes: int, in_channels: int) -> nn.Module:
    return _Explodes(classes, in_channels)


class _Breaks(nn.Sequential):
    """Fine for some steps, then of a failure that nobody foresaw."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 9:
            print("printed by the model")
        if self.calls == 10:
            raise ValueError("the tenth pass")
        logits: Tensor = super().forward(images)
        return logits


def breaks(classes: int, in_channels: int) -> nn.Module:
    return _Breaks(
        nn.Conv2d(in_channels, 8, 3),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def masked(classes: int, in_channels: int) -> nn.Module:
    net = without_batch_norm(classes, in_channels)
    net.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    return net


class _Initialised(nn.Module):
    """Takes a buffer, and a weight with noise on it, from the images that it begins with."""

    seen: list[Tensor] = []

    def __init__(self, classes: int, in_channels: int) -> None:
        super().__init__()
        self.net = without_batch_norm(classes, in_channels)
        self.norm = nn.BatchNorm2d(in_channels)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(self.norm(images))
        return logits

    def initialise_from_images(self, images: Tensor) -> None:
        self.seen.append(images)
        self.norm.weight /= images.std() + torch.rand(())


def initialised(classes: int, in_channels: int) -> nn.Module:
    return _Initialised(classes, in_channels)


class _Patches(nn.Module):
    """A small vision transformer of torch's own layers."""

    def __init__(self, classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 16, 2, 2)
        self.norm = nn.BatchNorm2d(16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(self.norm(self.stem(images)).flatten(2).transpose(1, 2)).mean(1))
        return logits


def patches(classes: int, in_channels: int) -> nn.Module:
    return _Patches(classes, in_channels)
