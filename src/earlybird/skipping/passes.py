"""The passes of a model, as its blocks see them: random numbers for each, and the ledgers that count it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from earlybird.calls import Hook, hook_owners, processes
from earlybird.ledger import Ledger

__all__ = ["Passes"]


class Passes:
    """What belongs to one pass; the first block of a model begins it.

    Random numbers begin anew with each pass, from seed, optimizer step, pass and process, so that they need no place in
    a checkpoint. Evaluation has its own, so that it does not matter to training when and how often there is one.

    Args:
        model: Whose passes they are, without wrappers.
        ledger: The method's own, or the one that it shares.
        seed: Of the run.
        alike: The same numbers on all processes.

    Attributes:
        ledgers: Those that count the pass under way. One below the model's hooks (a caller of ``model.forward``, such
            as the refit after a cut) has none: whoever makes it counts it as it likes, every layer on every sample.
    """

    def __init__(self, model: nn.Module, ledger: Ledger, seed: int, *, alike: bool = False) -> None:
        self.ledgers: set[Ledger] = set()
        self._model, self._ledger, self._seed = model, ledger, seed
        self._rank = torch.distributed.get_rank() if processes() > 1 and not alike else 0
        self._step = 0
        self._made = {True: 0, False: 0}  # since the last optimizer step, in training and in evaluation
        self._generator = torch.Generator()
        self._counted = False  # the model was called, and no block has run since
        self._handle = model.register_forward_pre_hook(Hook(self._on_call, self))

    def begin(self, *, training: bool) -> None:
        """Begin a pass."""
        self.ledgers = {self._ledger, *hook_owners(self._model, Ledger)} if self._counted else set()
        self._counted = False
        number = 2 * self._made[training] + training
        self._made[training] += 1
        seed = ((self._seed * 1_000_003 + self._step) * 4099 + number) * 4099 + self._rank
        self._generator.manual_seed(seed % 2**63)

    def draw(self, count: int) -> Tensor:
        """Return the next numbers of this pass, from 0 to below 1, shape (count,), on the CPU."""
        return torch.rand(count, generator=self._generator)

    def after_step(self, steps: int) -> None:
        """Say that ``steps`` optimizer steps are done."""
        self._step = steps
        self._made = {True: 0, False: 0}

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    def _on_call(self, module: nn.Module, args: Any) -> None:
        self._counted = True
