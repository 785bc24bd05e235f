"""earlybird as a callback of the Trainer of transformers 5.

    trainer = Trainer(model, args, train_dataset=data)
    bird = EarlyBirdCallback(eb.EarlyBird(keep=0.5)).attach(trainer)
    trainer.train()                               # the ticket is drawn, and the model shrinks, in here
    trainer.train(resume_from_checkpoint=True)    # of a fresh, full-size model: it is shrunk before it loads

The methods' state is a file in each checkpoint's folder. Trainer loads weights before it makes the optimizer and tells
callbacks neither when nor from where, so `attach` stands before its `_load_from_checkpoint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from earlybird.errors import InputError
from earlybird.files import read_state, write_state
from earlybird.integrations.running import STATE_FILE, Running, require

require("transformers", "5", "hf")  # first, since other versions may lack what is imported
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402

__all__ = ["EarlyBirdCallback"]


class EarlyBirdCallback(TrainerCallback):
    """Runs one or several methods of earlybird in a Trainer, once `attach` has been called.

    Args:
        methods: `earlybird.EarlyBird(keep=0.5)`, say, or a list of methods.
        example_inputs: What the model is called with, or a function that makes it of a batch. Default: what it is
            called with in training, as far as a method can wait for that.
        seed: Of the methods' own randomness.

    Attributes:
        running: The running methods; ``running.methods['EarlyBird'].drawn``, for one.

    Raises:
        InputError: A method cannot work in this loop.
    """

    def __init__(self, methods: Any, *, example_inputs: Any = None, seed: int = 0) -> None:
        self.running = Running(methods, example_inputs, seed)
        own = "use it in a loop of your own, with Accelerate for one"
        self.running.refuse("selection", "thins a loader, which is the Trainer's", own)
        self.running.refuse("convert", "replaces layers, before Trainer loads weights into them", own)
        self._trainer: Trainer | None = None
        self._state: dict[str, Any] = {}

    def attach(self, trainer: Trainer) -> EarlyBirdCallback:
        """Take part in the trainer's training, and in its loading of checkpoints; return this callback."""
        if trainer.is_deepspeed_enabled:
            raise InputError("DeepSpeed keeps the weights in flat vectors", hint="use DistributedDataParallel or FSDP2")
        self._trainer = trainer
        trainer.add_callback(self)

        def cut_before(load: Callable[..., None], folder: Callable[..., Any]) -> Callable[..., None]:
            def cut_and_load(*args: Any, **kwargs: Any) -> None:
                self._cut(folder(*args, **kwargs), trainer)
                load(*args, **kwargs)

            return cut_and_load

        trainer._load_from_checkpoint = cut_before(  # type: ignore[method-assign]
            trainer._load_from_checkpoint, lambda resume_from_checkpoint, model=None: resume_from_checkpoint
        )
        trainer._load_best_model = cut_before(  # type: ignore[method-assign]
            trainer._load_best_model, lambda: trainer.state.best_model_checkpoint
        )
        return self

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self.running.bill()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the methods: model and optimizer are made, their saved states are loaded."""
        if self._trainer is None:
            raise InputError(
                "the callback was given to Trainer(callbacks=...), which does not let it load checkpoints",
                hint="EarlyBirdCallback(...).attach(trainer)",
            )
        loader = kwargs["train_dataloader"]
        batches = len(loader) if hasattr(loader, "__len__") else None
        self.running.attach(
            kwargs["model"],
            kwargs["optimizer"],
            self._first_batch() if self.running.wants_batch else None,
            steps_per_epoch=None if batches is None else math.ceil(batches / args.gradient_accumulation_steps),
            total_steps=state.max_steps,
        )
        self.running.refuse("observe", "goes by the loss, which Trainer does not tell", "use Accelerate or Lightning")
        if self._state:
            self.running.load_state_dict(self._state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the methods' state into the checkpoint's folder."""
        assert self._trainer is not None
        held = self.running.state_dict()  # on all ranks
        if args.should_save:
            run = Path(self._trainer._get_output_dir(trial=None))
            write_state(run / f"checkpoint-{state.global_step}" / STATE_FILE, held)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take all hooks off; a further ``train`` goes on from here."""
        self._state = self.running.state_dict()
        self.running.detach()

    def _first_batch(self) -> Any:
        assert self._trainer is not None
        with torch.random.fork_rng():  # the training's own batches come in the order in which they would have
            return self._trainer._prepare_inputs(next(iter(self._trainer.get_train_dataloader())))

    def _cut(self, folder: str, trainer: Trainer) -> None:
        """Shrink a dense model to what lies in a checkpoint's folder; one from before earlybird has nothing."""
        path = Path(folder) / STATE_FILE
        if path.exists():
            state = read_state(path)
            assert trainer.model is not None
            self.running.cut(trainer.model, state)
            self._state = state
