"""earlybird as a callback of Lightning 2.6.

    trainer = lightning.Trainer(max_epochs=10, callbacks=[EarlyBirdCallback(eb.EarlyBird(keep=0.5))])
    trainer.fit(module, loader)                          # the ticket is drawn, and the model shrinks, in here
    trainer.fit(module, loader, ckpt_path="last.ckpt")   # of a fresh, full-size module: it is shrunk before it loads

Methods are attached when the training starts, and act by hooks of PyTorch from then on. Their state is the callback's
in Lightning's checkpoint. Lightning loads weights before it makes optimizers: the module is cut in its own hook
`on_load_checkpoint`, which comes before the weights, and the optimizer is made of the small parameters. Averaged copies
of the module (`WeightAveraging`, `EMAWeightAveraging`, `StochasticWeightAveraging`) are cut with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from earlybird.errors import InputError
from earlybird.integrations.running import Running, require

require("lightning", "2.6", "lightning")  # first, since other versions may lack what is imported
import lightning.pytorch as pl  # noqa: E402

__all__ = ["EarlyBirdCallback"]


class EarlyBirdCallback(pl.Callback):
    """Runs one or several methods of earlybird in a Lightning training.

    Args:
        methods: `earlybird.EarlyBird(keep=0.5)`, say, or a list of methods.
        module: Name of the submodule that is trained ('net' for ``self.net``). Default: the only submodule that has
            parameters, or the LightningModule itself, whose ``forward`` must be called in ``training_step`` then.
        example_inputs: What that module is called with, or a function that makes it of a batch. Default: what it is
            called with in training, as far as a method can wait for that.
        seed: Of the methods' own randomness.

    Attributes:
        running: The running methods; ``running.methods['EarlyBird'].drawn``, for one.

    Raises:
        InputError: A method cannot work in this loop.
    """

    def __init__(self, methods: Any, *, module: str | None = None, example_inputs: Any = None, seed: int = 0) -> None:
        self.running = Running(methods, example_inputs, seed)
        own = "use it in a loop of your own"
        self.running.refuse("selection", "thins a loader, which is the Trainer's", f"thin it yourself, or {own}")
        self.running.refuse("convert", "replaces layers, before Lightning loads weights into them", own)
        self._name = module
        self._state: dict[str, Any] = {}
        self._attached = False
        self._losses: list[Tensor] = []

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self.running.bill()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the module be cut before weights are loaded into it."""
        load = pl_module.on_load_checkpoint

        def cut_and_load(checkpoint: dict[str, Any]) -> None:
            del pl_module.on_load_checkpoint  # the class's own is seen again
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state:
                self.running.cut(self._module(pl_module), state, self._averaged(trainer))
            load(checkpoint)

        pl_module.on_load_checkpoint = cut_and_load  # type: ignore[method-assign]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach: the optimizers are made, and saved weights are loaded."""
        if not self.running.wants_batch:
            self._attach(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Attach when the first batch comes, where example inputs are made of it."""
        if not self._attached:
            self._attach(trainer, pl_module, batch)

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any = None) -> None:
        trainer.fit_loop.setup_data()  # before this, the length of an epoch is unknown
        total = trainer.estimated_stepping_batches
        batches = trainer.num_training_batches
        self.running.attach(
            self._module(pl_module),
            trainer.optimizers,
            batch,
            steps_per_epoch=math.ceil(batches / trainer.accumulate_grad_batches) if batches != math.inf else None,
            total_steps=int(total) if 0 < total < math.inf else None,
            averaged=self._averaged(trainer),
        )
        self._attached = True
        if self._state:
            self.running.load_state_dict(self._state)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note the loss; of accumulated batches, Lightning has divided each by their number."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Tell methods that go by the loss."""
        if self._losses:
            self.running.observe(torch.stack(self._losses).sum())
            self._losses.clear()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take all hooks off; a further ``fit`` goes on from here."""
        pl_module.__dict__.pop("on_load_checkpoint", None)
        if self._attached:
            self._state = self.running.state_dict()
            self.running.detach()
            self._attached = False

    def state_dict(self) -> dict[str, Any]:
        """Return what goes into Lightning's checkpoint."""
        return self.running.state_dict() if self._attached else self._state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep what lay in Lightning's checkpoint until the methods are attached."""
        self.running.check(state_dict)
        self._state = dict(state_dict)

    def _module(self, pl_module: nn.Module) -> nn.Module:
        if self._name is not None:
            if self._name not in dict(pl_module.named_modules()):
                raise InputError(f"the {type(pl_module).__name__} has no submodule '{self._name}'")
            return pl_module.get_submodule(self._name)
        trained = [child for child in pl_module.children() if any(True for _ in child.parameters())]
        return trained[0] if len(trained) == 1 and not list(pl_module.parameters(recurse=False)) else pl_module

    def _averaged(self, trainer: pl.Trainer) -> list[nn.Module]:
        """Return the copies that Lightning's averaging callbacks keep."""
        copies = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
        modules = [copy.module if isinstance(copy, AveragedModel) else copy for copy in copies]
        return [self._module(module) for module in modules if isinstance(module, nn.Module)]
