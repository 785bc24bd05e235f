"""What a ticket saves on this device: timed training steps of one model, whole and shrunk, in turns.

    print(measure("resnet20", keep=0.5))

The shrunk network is the same model cut to a ticket of weight magnitudes; which channels it keeps does not matter for
the time of a step, how many does. Noise images, plain SGD, fp32. The first step of each is warm-up and not counted; the
fastest of the rest stands for it, since nothing makes a step faster than it is. The search before the draw is not in
this number; a bill has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from earlybird.cost.bill import Measured
from earlybird.cost.count import count
from earlybird.models import build
from earlybird.tickets.draw import draw
from earlybird.tickets.shrink import shrink

__all__ = ["Gain", "measure"]


@dataclass(frozen=True)
class Gain:
    """Two networks, side by side.

    Attributes:
        model: Name of the model.
        keep: Share of the channels that stayed.
        device: Where it was timed.
        batch: Images in a step.
        dense, ticket: Time of a training step.
        dense_macs, ticket_macs: Counted multiply-accumulates of a training step, per image.
    """

    model: str
    keep: float
    device: str
    batch: int
    dense: Measured
    ticket: Measured
    dense_macs: int
    ticket_macs: int

    def __str__(self) -> str:
        seconds, macs = self.dense.value / self.ticket.value, self.dense_macs / self.ticket_macs
        verdict = f"x{seconds:.2f} less time" if seconds > 1 else f"x{1 / seconds:.2f} MORE time"
        return (
            f"{self.model} at keep {self.keep:g}, batch {self.batch}, fp32, {self.device}: {self.dense} a step dense, "
            f"{self.ticket} shrunk: {verdict} (measured), x{macs:.2f} fewer MACs (counted)"
        )


def measure(
    model: str = "resnet20", *, keep: float = 0.5, batch: int = 128, image_size: int = 32, steps: int = 5
) -> Gain:
    """Time training steps of ``model``, dense and shrunk.

    Args:
        model: See `earlybird.models.build`.
        keep: Share of the channels that stay, in (0, 1].
        batch: Images in a step.
        image_size: Height and width of the images, pixels.
        steps: Timed steps of each.

    Raises:
        InputError: Unknown model, or ``keep`` out of range.
        ShrinkError: The model cannot be cut.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, image_size, image_size, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    networks = [build(model, classes=10, image_size=image_size) for _ in range(2)]
    ticket = draw(networks[1], keep, score="magnitude", example_inputs=images[:1], coupled="group")
    shrink(networks[1], ticket, images[:1], round_to=8)
    macs = [count(network, images[:1]).training_macs for network in networks]
    images, labels = images.to(device), labels.to(device)
    takes = [_step(network.to(device).train(), images, labels) for network in networks]
    times: list[list[float]] = [[], []]
    for _ in range(steps + 1):
        for step, own in zip(takes, times):
            start = time.perf_counter()
            step()
            own.append(time.perf_counter() - start)
    dense, small = (Measured(min(own[1:]), "s", "clock") for own in times)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    return Gain(model, keep, name, batch, dense, small, *macs)


def _step(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize(images.device)

    return step
