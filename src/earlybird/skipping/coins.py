"""Random numbers for the passes of a model, made anew from where the run stands."""

from __future__ import annotations

import torch
from torch import Tensor

from earlybird.calls import processes

__all__ = ["Coins"]


class Coins:
    """Uniform random numbers for the passes of a model, which need no place in a checkpoint.

    They begin anew with each pass, from seed, optimizer step, pass and process. Evaluation has its own, so that it does
    not matter to the training when and how often there is one.

    Args:
        seed: Of the run.
        alike: The same numbers on all processes.
    """

    def __init__(self, seed: int, *, alike: bool = False) -> None:
        self.step = 0
        self._seed = seed
        self._rank = torch.distributed.get_rank() if processes() > 1 and not alike else 0
        self._passes = {True: 0, False: 0}  # since the last optimizer step, in training and in evaluation
        self._generator = torch.Generator()

    def begin(self, *, training: bool) -> None:
        """Begin a pass."""
        number = 2 * self._passes[training] + training
        self._passes[training] += 1
        seed = ((self._seed * 1_000_003 + self.step) * 4099 + number) * 4099 + self._rank
        self._generator.manual_seed(seed % 2**63)

    def draw(self, count: int) -> Tensor:
        """Return the next numbers of this pass, from 0 to below 1, shape (count,), on the CPU."""
        return torch.rand(count, generator=self._generator)

    def after_step(self, steps: int) -> None:
        """Say that ``steps`` optimizer steps are done."""
        self.step = steps
        self._passes = {True: 0, False: 0}
