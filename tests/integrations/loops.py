"""What the tests of all integrations train: a small residual network on a few images, and the same in a bare loop."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import earlybird as eb
from tests.tickets.topologies import make

BATCHES = 4  # an epoch
EPOCHS = 4
QUICK = {"look_every": "1it", "skip": "2it", "window": 2, "deadline": "6it", "tolerance": 0.0, "round_to": 1}
"""Draws in the second epoch."""


def bird(**settings) -> eb.EarlyBird:
    return eb.EarlyBird(**{**QUICK, "keep": 0.5, **settings})


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(16 * BATCHES, 3, 8, 8, generator=generator)
    return TensorDataset(images, torch.randint(0, 5, (16 * BATCHES,), generator=generator))


def loader(batch_size: int = 16) -> DataLoader:
    return DataLoader(data(), batch_size=batch_size)


def network() -> nn.Module:
    return make("residual")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.8)  # a step is an optimizer step


def bare(*methods, epochs: int = EPOCHS) -> tuple[nn.Module, torch.optim.Optimizer, list]:
    """Train in a loop of one's own; the reference for all others."""
    model = network()
    optimizer = sgd(model)
    scheduler = schedule(optimizer)
    running = [method.attach(model, optimizer) for method in methods]
    model.train()
    for _ in range(epochs):
        for x, y in loader():
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return model, optimizer, running


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Weights and buffers are equal to the bit."""
    for (key, first), second in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(first, second), key


def width(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
