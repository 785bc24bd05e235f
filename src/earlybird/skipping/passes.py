"""The passes of a model, as its blocks see them: random numbers for each, and the ledgers that count it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from earlybird import ranks
from earlybird.blocks import Block
from earlybird.calls import Hook, processes
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledgers_on

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

    Raises:
        InputError: Processes that train together have different seeds.

    Attributes:
        ledgers: Those that count the pass under way. One below the model's hooks (a caller of ``model.forward``, such
            as the refit after a cut) has none: whoever makes it counts it as it likes, every layer on every sample.
    """

    def __init__(self, model: nn.Module, ledger: Ledger, seed: int, *, alike: bool = False) -> None:
        ranks.check_alike([("seed", f"= {seed}")], "attach with the same seed on all ranks")
        self.ledgers: list[Ledger] = []
        self._model, self._ledger, self._seed = model, ledger, seed
        self._rank = torch.distributed.get_rank() if processes() > 1 and not alike else 0
        self._step = 0
        self._made = {True: 0, False: 0}  # since the last optimizer step, in training and in evaluation
        self._generator = torch.Generator()
        self._next = 0  # number of the block whose turn it is
        self._counted = False  # the model was called, and no block has run since
        self._handle = model.register_forward_pre_hook(Hook(self._on_call, self))

    def enter(self, index: int, block: Block, *, training: bool) -> None:
        """Say that ``block`` is called, number ``index`` of those that are chosen; the first one begins a pass.

        Raises:
            InputError: It is not its turn, or a backward pass is under way, which would get other random numbers.
        """
        if index not in (0, self._next) or torch._C._current_graph_task_id() != -1:
            raise InputError(
                f"block '{block.name}' was called out of its turn",
                needed="blocks that run once in each pass, in the order in which they were found",
                hint="switch gradient checkpointing, which runs them again, off for this model",
            )
        if index == 0:
            self._begin(training=training)
        self._next = index + 1

    def _begin(self, *, training: bool) -> None:
        self.ledgers = ledgers_on(self._model, self._ledger) if self._counted else []
        self._counted = False
        number = 2 * self._made[training] + training
        self._made[training] += 1
        seed = ((self._seed * 1_000_003 + self._step) * 4099 + number) * 4099 + self._rank
        self._generator.manual_seed(seed % 2**63)

    def draw(self, count: int) -> Tensor:
        """Return the next numbers of this pass, from 0 to below 1, shape (count,), on the CPU."""
        return torch.rand(count, generator=self._generator)

    def choose(self, chances: Tensor) -> Tensor:
        """Choose each sample with its own probability, so that as many are chosen as the sum of them, but for rounding.

        One random number decides for all (systematic sampling): every sample's probability is exactly its own, and the
        number of samples hardly changes from batch to batch, as kernels that are made for one number like it.

        Args:
            chances: Shape (N,), 0 to 1.

        Returns:
            Boolean, shape (N,), on the CPU.
        """
        reached = chances.detach().double().cpu().cumsum(0) + self.draw(1).double()
        return reached.floor().diff(prepend=torch.zeros(1, dtype=torch.float64)) > 0

    def after_step(self, steps: int) -> None:
        """Say that ``steps`` optimizer steps are done."""
        self._step = steps
        self._made = {True: 0, False: 0}

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    def _on_call(self, module: nn.Module, args: Any) -> None:
        self._counted = True
