"""earlybird in a loop with Accelerate 1.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    bird = attach(accelerator, eb.EarlyBird(keep=0.5), model, optimizer, steps_per_epoch=len(loader))
    ...                               # the loop as it was; the ticket is drawn inside optimizer.step()
    accelerator.save_state(folder)    # with a file of ours in it
    accelerator.load_state(folder)    # of a fresh, full-size model: model and optimizer are shrunk before they load

Accelerate calls hooks before it saves and before it loads: there the methods' state is written and read.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from earlybird.files import read_state, write_state
from earlybird.integrations.running import STATE_FILE, Running, require

require("accelerate", "1", "hf")  # first, since other versions may lack what is imported
from accelerate.accelerator import Accelerator  # noqa: E402

__all__ = ["attach"]


def attach(
    accelerator: Accelerator,
    methods: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    *,
    example_inputs: Any = None,
    steps_per_epoch: int | None = None,
    total_steps: int | None = None,
    averaged: nn.Module | Iterable[nn.Module] = (),
    seed: int = 0,
) -> Running:
    """Attach methods to what ``accelerator.prepare`` returned, and let its checkpoints hold their state.

    Args:
        accelerator: Its ``save_state`` and ``load_state`` take the methods along from now on.
        methods: `earlybird.EarlyBird(keep=0.5)`, say, or a list of methods.
        model: As prepared.
        optimizer: As prepared, or several.
        example_inputs: What the model is called with. Default: what it is called with in training, as far as a method
            can wait for that.
        steps_per_epoch: Optimizer steps in an epoch: the length of the prepared loader, over the batches accumulated.
        total_steps: Optimizer steps of the whole training.
        averaged: A moving average of the model, cut with it; see `earlybird.EarlyBird.attach`.
        seed: Of the methods' own randomness.

    Returns:
        The running methods: ``.methods['EarlyBird'].drawn``, ``.bill()``, and ``.observe(loss)``, to be called before
        each step for `earlybird.ProgressivePrecision`.

    Raises:
        InputError: What a method's ``attach`` raises. On loading: the checkpoint was written with other methods, or
            is from before the draw and the model is shrunk already; then nothing was loaded.
    """
    running = Running(methods, example_inputs, seed)
    running.attach(model, optimizer, steps_per_epoch=steps_per_epoch, total_steps=total_steps, averaged=averaged)

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        state = running.state_dict()  # on all ranks
        if accelerator.is_main_process:
            write_state(Path(folder) / STATE_FILE, state)

    def load(models: list[nn.Module], folder: str) -> None:
        running.load_state_dict(read_state(Path(folder) / STATE_FILE))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return running
