"""A run: everything one training consists of, put together from a recipe, saved whole and resumed to the last bit.

    result = train(Recipe.from_values({"data": "digits", "keep": 0.5}), Path("runs/first"))

What a run needs to go on is one nested value (`Run.state_dict`): weights, buffers, optimizer state (momentum and the
moving average of the weights among it), the method's state, the ledger, every random generator, and the step. Learning
rate, order of images and augmentation are functions of seed and step, so nothing else has to be saved. A resumed run
builds the dense model again, lets the method shrink it, and puts the weights into the shapes that this leaves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from earlybird.cost.bill import Spending
from earlybird.data import DataSet
from earlybird.data.loader import Loader, Sample
from earlybird.errors import CheckpointError, DivergedError, InputError, Interrupted
from earlybird.files import write_tensors, write_text
from earlybird.kernels.install import install
from earlybird.ledger import Ledger
from earlybird.models.blueprint import Blueprint
from earlybird.objective import Judging, Objective
from earlybird.settings import accepted
from earlybird.sparse.masks import non_zeros
from earlybird.start import load_start, read_start
from earlybird.tickets.refit import estimate_batch_norms
from earlybird.tickets.ticket import Ticket
from earlybird.traces import Ranking, Tracing, rank_inputs
from earlybird.train import checkpoint, ema
from earlybird.train.folder import RunFolder
from earlybird.train.launch import agreed, environment, launch, precision, shared_path, started_again
from earlybird.train.loop import StopSignal, evaluate, fit
from earlybird.train.parts import (
    free_folder,
    load_data,
    located,
    make_board,
    make_loaders,
    make_optimizer,
    read_data,
    require_board,
)
from earlybird.train.progress import Display, warnings_shown
from earlybird.train.recipe import Recipe
from earlybird.train.result import Result
from earlybird.train.schedule import Schedule
from earlybird.train.tune import Choice, tune

if TYPE_CHECKING:
    from lightning_fabric import Fabric

OnEvent = Callable[[str, Mapping[str, Any]], None]
"""Called with 'tuned', 'step', 'drawn', 'row', 'checkpoint' or 'done', and what belongs to it."""

_OTHER_WEIGHTS = 2**31
"""Added to a run's seed for weights that are drawn anew, so that they are not the ones it began with."""

INITIAL_IMAGES = 5000
"""Training images from which a model that asks for it takes its first weights."""

CALIBRATION_IMAGES = 2048
"""Training images from which batch-norm statistics are estimated anew, and layers are refitted."""


class Attached(Protocol):
    """What the run asks of a method that has been attached to model and optimizer."""

    def status(self) -> dict[str, float | str]: ...  # noqa: D102
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...  # noqa: D102
    def detach(self) -> None: ...  # noqa: D102


@runtime_checkable
class Drawing(Attached, Protocol):
    """What the run asks of a method that draws a ticket, beside that."""

    drawn_at: int | None
    ticket: Any
    change: Any
    history: list[dict[str, Any]]

    @property
    def drawn(self) -> bool: ...  # noqa: D102
    def distance_matrix(self) -> tuple[list[int], Tensor]: ...  # noqa: D102


@runtime_checkable
class Observing(Attached, Protocol):
    """What the run asks of a method that goes by the training loss, beside that."""

    def observe(self, loss: Tensor) -> None: ...  # noqa: D102


@runtime_checkable
class Repeating(Protocol):
    """What the run asks of a method that trains more than once in a run, before it is attached."""

    def total_steps(self, training: int, steps_per_epoch: int | None = None) -> int: ...  # noqa: D102


@runtime_checkable
class Clocked(Attached, Protocol):
    """What the run asks of it when it is attached: where in the schedule it is, and where a training ends."""

    def clock(self, step: int) -> int: ...  # noqa: D102
    def due(self) -> bool: ...  # noqa: D102
    def row(self) -> dict[str, Any]: ...  # noqa: D102


@runtime_checkable
class Filing(Attached, Protocol):
    """What the run asks of a method that leaves tickets or weights for later runs: them, by file name."""

    def files(self) -> Mapping[str, Any]: ...  # noqa: D102


@runtime_checkable
class Converting(Protocol):
    """What the run asks of a method that replaces layers of the model, before others hang on them."""

    def convert(self, model: nn.Module, example_inputs: Any = None, *, seed: int = 0) -> Any: ...  # noqa: D102


@runtime_checkable
class Selecting(Protocol):
    """What the run asks of a method that leaves batches out, before it is attached."""

    def selection(self, seed: int) -> Any: ...  # noqa: D102


def train(
    recipe: Recipe, out: str | Path | None = None, *, quiet: bool = False, on_event: OnEvent | None = None
) -> Result:
    """Train what ``recipe`` says, into a new run folder.

    Started again by torchrun because a rank had ended, it goes on with the run that it had begun in ``out``.

    Args:
        recipe: See `Recipe.from_toml` and `Recipe.from_values`.
        out: Run folder; by default the recipe's ``out``, else a new one under ``runs/``.
        quiet: Show nothing but warnings.
        on_event: Called as the run goes on.

    Returns:
        Accuracy, cost and where everything lies.

    Raises:
        InputError: The recipe does not fit data, model or device; the folder is taken.
        DivergedError: The loss became infinite or NaN.
        Interrupted: SIGINT or SIGTERM came; `resume` goes on.
        EarlybirdError: The disk is full.
    """
    recipe = located(recipe)  # a resume may start from another folder
    fabric = launch(recipe)
    path = shared_path(fabric, lambda: Path(out or recipe.out or free_folder(recipe)))
    with RunFolder(path, writer=fabric.is_global_zero) as folder:
        if started_again() and agreed(fabric, lambda: _is_begun(path, recipe)):
            folder.accept()
            return Result.read(path) or _execute(recipe, folder, fabric, quiet=quiet, on_event=on_event)
        folder.check_unused()
        if folder.writer:
            write_text(path / "recipe.toml", recipe.to_toml())
        try:
            return _execute(recipe, folder, fabric, quiet=quiet, on_event=on_event)
        except BaseException:
            folder.discard_unless_begun()
            raise


def _is_begun(path: Path, recipe: Recipe) -> bool:
    """Whether a folder holds a run of ``recipe``."""
    return (path / "recipe.toml").is_file() and Recipe.from_toml(path / "recipe.toml").hash() == recipe.hash()


def resume(out: str | Path, *, quiet: bool = False, on_event: OnEvent | None = None) -> Result:
    """Go on with a run that was stopped, however it was stopped; the final weights are those of an undisturbed run.

    Args:
        out: Run folder.
        quiet: Show nothing but warnings.
        on_event: Called as the run goes on.

    Returns:
        As `train`; of a run that is finished already, its result.

    Raises:
        InputError: There is no run in the folder, or another process works on it.
        CheckpointError: Checkpoints belong to another recipe, or none is whole.
        DivergedError, Interrupted, EarlybirdError: As for `train`.
    """
    path = Path(out)
    if not (path / "recipe.toml").is_file():
        raise InputError(f"no run in {path} (no recipe.toml)", hint="name the folder that 'earlybird train' made")
    recipe = Recipe.from_toml(path / "recipe.toml")
    fabric = launch(recipe)
    with RunFolder(path, writer=fabric.is_global_zero) as folder:
        done = Result.read(path)
        if done is not None:
            return done
        folder.accept()
        return _execute(recipe, folder, fabric, quiet=quiet, on_event=on_event)


def _execute(recipe: Recipe, folder: RunFolder, fabric: Fabric, *, quiet: bool, on_event: OnEvent | None) -> Result:
    try:
        return _train(recipe, folder, fabric, quiet=quiet, on_event=on_event)
    except KeyboardInterrupt as error:  # the second one: it did not wait for a checkpoint
        if not folder.begun:
            raise
        raise Interrupted(
            f"stopped at once in {folder.path}",
            needed="what had been saved before is whole",
            hint=f"go on from it with: earlybird resume {folder.path}",
        ) from error


def _train(recipe: Recipe, folder: RunFolder, fabric: Fabric, *, quiet: bool, on_event: OnEvent | None) -> Result:
    threads = torch.get_num_threads()
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    ledger = Ledger(device=fabric.device, world_size=fabric.world_size)
    ledger.enter("setup")
    # Dropout and the like draw from the global generators. The run seeds and saves them, and gives them back.
    outer = checkpoint.generators(fabric.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.callback(checkpoint.set_generators, outer, fabric.device)
        stack.callback(torch.set_num_threads, threads)
        run = Run(recipe, folder, fabric, ledger, quiet=quiet, on_event=on_event)
        stack.callback(run.close)
        stack.enter_context(warnings_shown(lambda text: run.display.warn(text)))
        stop = stack.enter_context(StopSignal())  # before that, a signal ends the process: there is nothing to save
        run.restore()
        fit(run, stop)
        return run.finish()


class Run:
    """The state of one training, put together from a recipe.

    Args:
        recipe: What to do.
        folder: Where everything is written; locked.
        fabric: Launched.
        ledger: In phase 'setup'.
        quiet: Show nothing but warnings.
        on_event: See `train`.

    Attributes:
        blueprint: What the dense model was built from.
        model: The module that is trained, unwrapped.
        forward: What to call for a training step: the model, compiled or wrapped for several processes as need be.
        step: Optimizer steps done.
        total: Optimizer steps of the whole run.
        steps_per_epoch: Of them.
        methods: The attached methods by name, in the order of the recipe.
        search: The one of them that draws a ticket, or None.
        observers: Those of them that go by the training loss.
        objective: The one of them that decides it, or None.
        judge: The one of them that evaluates, in place of the classifier, or None.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        fabric: Fabric,
        ledger: Ledger,
        *,
        quiet: bool,
        on_event: OnEvent | None,
    ) -> None:
        self.recipe, self.folder, self.fabric, self.ledger = recipe, folder, fabric, ledger
        self._selection: Any = None
        self._on_event = on_event
        self.display = Display(1, 1, quiet=quiet, mute=not folder.writer, bar=False)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        if recipe.tensorboard:
            require_board()
        data = load_data(recipe, fabric, self.display)
        self.loader, self.test = make_loaders(recipe, data, fabric)
        methods = dict(sorted(recipe.build_methods().items(), key=lambda item: not isinstance(item[1], Converting)))
        for method in methods.values():
            if isinstance(method, Selecting):
                self.loader.selection = self._selection = method.selection(recipe.seed)
        self.steps_per_epoch = len(self.loader) // recipe.accumulate
        if not self.steps_per_epoch:
            raise InputError(
                f"an epoch has {len(self.loader)} batches, fewer than accumulate = {recipe.accumulate}",
                hint="lower batch_size or accumulate",
            )
        self._training = self.total = recipe.steps(self.steps_per_epoch)
        self._began_at = 0  # of the schedule
        if recipe.start_at is not None:
            self._began_at = recipe.start_at.in_iterations(self.steps_per_epoch, self.total)
            if self._began_at >= self.total:
                raise InputError(f"start_at is {recipe.start_at}, but the run has {recipe.epochs} epochs",
                                 needed="an earlier step")  # fmt: skip
            self._training = self.total = self.total - self._began_at
        for name, method in methods.items():
            if isinstance(method, Repeating):
                self.total = method.total_steps(self._training, self.steps_per_epoch)
                if recipe.stem_until is not None and self.total > self._training:
                    raise InputError(f"stem_until freezes the first layer for good, and {name} trains it again",
                                     hint="leave stem_until out")  # fmt: skip
        self._clock_per_epoch = self.steps_per_epoch
        if self._selection is not None and self._selection.by_attempts:
            self._clock_per_epoch = self.loader.whole_length // recipe.accumulate
        self.schedule = Schedule.from_recipe(recipe, self._clock_per_epoch)
        self.blueprint = _blueprint(recipe, data)

        def build_model() -> nn.Module:
            return self.blueprint.build(recipe.seed)

        self._notes: list[str] = []
        self._found = checkpoint.load_newest(folder.path, recipe.hash(), self._notes.append)
        # weights of a checkpoint need no images to begin from
        self.model = self._begun(build_model()) if self._found is None else build_model().to(fabric.device)
        if recipe.start is not None and self._found is None:
            load_start(self.model, read_start(recipe.start), fresh_head=recipe.fresh_head)
        # a mask of -inf is fine
        self._infinite = {name for name, buffer in self.model.named_buffers() if not bool(buffer.isfinite().all())}
        example = self.loader.sample(2, recipe.seed)
        self.choice = self._choose(build_model)
        torch.set_num_threads(self.choice.threads)
        self.loader.channels_last = self.test.channels_last = self.choice.channels_last
        ledger.bits = 16 if self.choice.precision == "bf16" else 32
        self._precision = precision(self.choice, fabric.device)
        self._layout()
        dtype = torch.bfloat16 if self.choice.precision == "bf16" else torch.float32
        self.optimizer = make_optimizer(recipe, self.model, self.steps_per_epoch, dtype)
        ledger.watch(self.model, self.optimizer, example)
        context = {
            "example_inputs": example,
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total,
            "calibration": self.calibration,
            "fresh": lambda: self._begun(self.blueprint.build(recipe.seed + _OTHER_WEIGHTS)),
            "loader": self.loader,
            "test": self.test,
            "samples": lambda count: self.loader.of_each_class(count, recipe.seed),
            "ledger": ledger,
            "seed": recipe.seed,
            "resumed": self._found is not None,
            "fresh_head": recipe.fresh_head,
            "training_steps": self._began_at + self._training,
            "clock": self.clock,
            "class_names": self.blueprint.class_names,
            "label_smoothing": recipe.label_smoothing,
            "folder": folder.path,
            "autocast": self.autocast,
        }
        self.methods: dict[str, Attached] = {
            name: method.attach(self.model, self.optimizer, **accepted(method.attach, context))
            for name, method in methods.items()
        }
        self.methods = {name: self.methods[name] for name in recipe.build_methods()}  # in the order of the recipe again
        # what is built from here on is built as the model is by now
        self.blueprint = dataclasses.replace(
            self.blueprint,
            conversions=tuple(
                (name, json.dumps(dataclasses.asdict(method)))  # type: ignore[call-overload]
                for name, method in methods.items()
                if isinstance(method, Converting)
            ),
        )
        self._kernels = install(self.model, self.choice.kernels, example)
        self.search = next((method for method in self.methods.values() if isinstance(method, Drawing)), None)
        self.objective = next((method for method in self.methods.values() if isinstance(method, Objective)), None)
        self.judge = next((method for method in self.methods.values() if isinstance(method, Judging)), None)
        self.observers = [method for method in self.methods.values() if isinstance(method, Observing)]
        self._clocked = next((method for method in self.methods.values() if isinstance(method, Clocked)), None)
        self._followed: Any = None  # of the search's changes, the one that `after_draw` was called for
        self.forward: Callable[[Tensor], Tensor] = self._wrap()
        self.step = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=fabric.device)
        self.loss_steps = 0
        self._steps_before = 0  # of them, those of the process that was stopped: this one's clock has not seen them
        self.accuracy, self.test_loss = 0.0, math.nan
        self.resumed = False
        self._saved_s = 0.0
        self._row_begun = ledger.seconds
        self._board: Any = None
        self._quiet = quiet
        ledger.enter("setup")

    # ---- putting together ----

    def _begun(self, model: nn.Module) -> nn.Module:
        return begun(model, self.loader, self.recipe.seed, self.fabric.device)

    def _choose(self, build_model: Callable[[], nn.Module]) -> Choice:
        """Take the choice that was written down, in the checkpoint before the file, else make one.

        The first rank's holds for all. A file that is damaged is written anew: before a checkpoint nothing hangs on it.
        """
        choice = None if self._found is None else Choice.read(self._found[1]["choice"])
        if self.fabric.is_global_zero:
            written = self._written_choice()
            if choice is not None and written is None:
                record = {"choice": dataclasses.asdict(choice), "reason": "as in the checkpoint", "candidates": []}
                self.folder.write_json("tune.json", {**record, "seconds": 0.0})
            elif choice is None and written is None:
                images, labels, *_ = next(self.loader.epoch(0))
                _, record = tune(self.recipe, build_model, images, labels, steps=self.total)
                self.folder.write_json("tune.json", record)
                self.emit("tuned", record)
        self.fabric.barrier()
        choice = choice or self._written_choice()
        assert choice is not None
        if choice.device != self.fabric.device.type:
            raise InputError(
                f"{self.folder.path} was begun on {choice.device}, but this is {self.fabric.device.type}",
                hint="resume it where it was begun; another device computes other bits",
            )
        return choice

    def _written_choice(self) -> Choice | None:
        try:
            record = self.folder.read_json("tune.json")
        except InputError as error:
            self._notes.append(f"{error.found}; it is written anew")
            return None
        choice = Choice.read(record.get("choice")) if isinstance(record, dict) else None
        if choice is None and record is not None:
            self._notes.append(f"{self.folder.path / 'tune.json'} holds no choice; it is written anew")
        return choice

    def _layout(self) -> None:
        if self.choice.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _wrap(self) -> Callable[[Tensor], Tensor]:
        model = self.model
        if self.choice.compile:
            torch.compiler.reset()
            model = torch.compile(model)  # type: ignore[assignment]
        # One process needs no wrapper, and Fabric's costs 40 us a call.
        return self.fabric.setup_module(model) if self.fabric.world_size > 1 else model

    @property
    def needs_rebuild(self) -> bool:
        """Whether the model has changed its shape since `after_draw` was last called."""
        return self.search is not None and self.search.change is not self._followed

    def after_draw(self) -> None:
        """Wrap and compile the model anew, and write down what was drawn."""
        assert self.search is not None
        self._followed = self.search.change
        self._layout()
        self.forward = self._wrap()
        if self.folder.writer:
            self.search.ticket.save(self.folder.path / "ticket.safetensors")
        self.folder.write_json("change.json", self.search.change.to_json())
        self._write_history()
        self.emit("drawn", {"step": self.step, **self.search.status()})
        what = "ticket drawn" if self.search.drawn else "cut on the way to the ticket"
        self.display.say(f"{what} at step {self.search.drawn_at}: {str(self.search.change).splitlines()[0]}")

    def calibration(self) -> Sample:
        """Return batches of augmented training inputs, the same ones at each call and on each rank."""
        count = min(CALIBRATION_IMAGES, len(self.loader.images))
        size = max(2, min(self.recipe.batch_size, 256))
        return self.loader.sample_in_batches(count, size, self.recipe.seed)

    # ---- what the loop calls ----

    def clock(self, step: int) -> int:
        """Return where in the schedule the step after ``step`` finished ones is; the run may train repeatedly."""
        return self._began_at + (step if self._clocked is None else self._clocked.clock(step))

    @property
    def _as_said(self) -> bool:
        """Whether the run takes as many epochs as its recipe says: it is neither repeated nor the rest of another."""
        return self.total == self._training and not self._began_at

    @property
    def training_ends(self) -> bool:
        """Whether one of several trainings is over: the model is never again what it is now."""
        return self._clocked is not None and self._clocked.due()

    def lr(self, step: int, end: int | None = None) -> float:
        """Return the learning rate of the step that follows ``step`` finished ones; ``end`` as for `Schedule`."""
        step = self.clock(step)
        if self._clock_per_epoch == self.steps_per_epoch:
            return self.schedule(step, end)
        attempts = self._selection.attempt(step * self.recipe.accumulate, self.loader.whole_length)
        share = self._clock_per_epoch / self.steps_per_epoch
        attempted = min(attempts // self.recipe.accumulate, self.schedule.total - 1)
        return self.schedule(attempted, None if end is None else round(end * share))

    @property
    def test_time(self) -> str:
        """Which views of an image an evaluation after this step averages over."""
        return self.recipe.test_time if self.step == self.total or self.training_ends else "none"

    def freeze_ended(self) -> None:
        """Freeze what has come to the end of its learning rate: nobody needs to compute its gradients any more."""
        ended = {
            id(parameter)
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and self.clock(self.step) >= group.get("lr_end", math.inf)
        }
        if not ended:
            return
        names = {name for name, parameter in self.model.named_parameters() if id(parameter) in ended}
        dense = self.model
        if self.search is not None and self.search.ticket is not None:
            dense = self.blueprint.build(self.recipe.seed).to(self.fabric.device)
        for model in (self.model, dense):
            for name, parameter in model.named_parameters():
                if name in names:
                    parameter.requires_grad_(False)
        self.ledger.reprice(dense)
        self.forward = self._wrap()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward pass: bf16 or nothing."""
        return self._precision.forward_context()  # type: ignore[no-any-return]

    def gradients_stay_local(self, yes: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a batch whose gradients need not be shared among processes yet."""
        if not yes or self.fabric.world_size == 1:
            return contextlib.nullcontext()
        return self.fabric.no_backward_sync(self.forward)  # type: ignore[arg-type]

    def share_buffers(self) -> None:
        """Give all ranks the first one's running statistics, as DDP does before each training step."""
        if self.fabric.world_size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def agree(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """Return whether any rank wants to stop, and whether the first rank wants to save."""
        if self.fabric.world_size == 1:
            return stop, save
        flags = torch.tensor([stop, save and self.fabric.is_global_zero], dtype=torch.int32, device=self.fabric.device)
        torch.distributed.all_reduce(flags)
        return bool(flags[0]), bool(flags[1])

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Let the model hold the averaged weights, with batch-norm statistics to match, for a while."""
        pairs = ema.averages(self.optimizer)
        if not pairs:
            yield
            return
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with ema.swapped(pairs):
            # said, not left to the hooks: they would charge what follows (writing the weights, say) to 'evaluate' too
            with self.ledger.during("evaluate"), self.autocast():
                estimate_batch_norms(self.model, self.ledger.passing(self.calibration()))
            try:
                yield
            finally:
                for buffer, before in buffers:
                    buffer.copy_(before)

    def add_row(self) -> None:
        """Evaluate, and write and show a row of ``metrics.jsonl``."""
        images = (self.loss_steps - self._steps_before) * self.recipe.accumulate * self.recipe.batch_size
        elapsed = self.ledger.seconds - self._row_begun
        self.test_loss, self.accuracy = evaluate(self)
        train_loss = self._mean_loss()
        row = {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "seconds": self.ledger.seconds,
            "phase": self.ledger.phase,
            "loss": train_loss,
            "test_loss": self.test_loss if math.isfinite(self.test_loss) else None,
            "accuracy": self.accuracy,
            **({} if self.judge is None else {"judged_by": self.judge.judged_by}),
            "test_time": self.test_time,
            "lr": self.lr(self.step - 1),
            "images_per_s": images / elapsed if elapsed > 0 else 0.0,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            **({} if self._clocked is None else self._clocked.row()),
            "nonzero": non_zeros(self.model)[0],
            **_so_far(self.ledger.total),
        }
        self.folder.append_row(row)
        self._write_traces()
        if self._board is not None:
            for name in ("loss", "test_loss", "accuracy", "lr", "images_per_s", "parameters"):
                if row[name] is not None:
                    self._board.add_scalar(name, row[name], self.step)
        self.display.row(row, self._status())
        self.emit("row", row)
        self.loss_sum.zero_()
        self.loss_steps = self._steps_before = 0
        self._row_begun = self.ledger.seconds

    def _mean_loss(self) -> float:
        return self._loss_over_ranks() / max(self.loss_steps, 1)

    def _loss_over_ranks(self) -> float:
        """Return the sum of losses since the last row, as the mean over ranks."""
        total = self.loss_sum.clone()
        if self.fabric.world_size > 1:
            torch.distributed.all_reduce(total)
        return float(total) / self.fabric.world_size

    def beat(self, loss: Tensor) -> None:
        """Say that a step is done: heartbeat, progress bar, event."""
        self.folder.beat(self.ledger.seconds)
        if self.display.due():
            value = float(loss) / self.recipe.accumulate
            self.display.step(self.step, value, self.recipe.batch_size * self.recipe.accumulate, self._status())
        if self._on_event is not None:
            self.emit("step", {"step": self.step})

    def _status(self) -> dict[str, float | str]:
        return {key: value for method in self.methods.values() for key, value in method.status().items()}

    def emit(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Tell ``on_event``."""
        if self._on_event is not None:
            self._on_event(kind, fields)

    # ---- saving and going on ----

    def state_dict(self) -> dict[str, Any]:
        """Return all that the run needs to go on; every rank has to call it."""
        self.share_buffers()
        return {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "world_size": self.fabric.world_size,
            "choice": dataclasses.asdict(self.choice),
            "loss": [self._loss_over_ranks(), self.loss_steps],
            "last_row": [self.accuracy, self.test_loss],
            "model": checkpoint.capture(self.model, self.optimizer),
            "methods": {name: method.state_dict() for name, method in self.methods.items()},
            "ledger": self.ledger.state_dict(),
            "generators": self._gather_generators(),
        }

    def save(self) -> None:
        """Write a checkpoint of this step.

        Raises:
            DivergedError: A weight or a buffer is not finite.
            EarlybirdError: The disk is full.
        """
        state = self.state_dict()
        self._check_weights()
        if self.folder.writer:
            self.folder.sync_rows()
            path = checkpoint.save(self.folder.path, self.step, self.recipe.hash(), state)
            self.emit("checkpoint", {"step": self.step, "path": path})

    def _check_weights(self) -> None:
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if name not in self._infinite and not bool(torch.isfinite(tensor).all()):
                newest = max(self.folder.path.glob("checkpoint-*.json"), default=None)
                what = "weights" if isinstance(tensor, nn.Parameter) else "numbers"
                raise DivergedError(
                    f"{what} of '{name}' are not finite at step {self.step}",
                    needed=f"last good checkpoint: {newest}" if newest else "no checkpoint had been written yet",
                    hint=f"lower lr (now {self.recipe.lr:g}), raise lr_warmup, or set clip_norm = 1",
                )

    def _gather_generators(self) -> dict[str, Any]:
        own = checkpoint.generators(self.fabric.device)
        if self.fabric.world_size == 1:
            return {"0": own}
        ranks: dict[str, Any] = {str(rank): {} for rank in range(self.fabric.world_size)}
        for name, state in own.items():
            gathered = [torch.empty_like(state, device=self.fabric.device) for _ in ranks]
            torch.distributed.all_gather(gathered, state.to(self.fabric.device))
            for rank, states in ranks.items():
                states[name] = gathered[int(rank)].cpu()
        return ranks

    def restore(self) -> None:
        """Take over the newest whole checkpoint; without one, begin."""
        found, self._found = self._found, None
        if found is None:
            self._seed()
            self.folder.write_json("environment.json", environment(self.fabric))
        else:
            self.load_state_dict(found[1])
            self.resumed = True
        lost = self.folder.last_beat() - self._saved_s if self.folder.writer else 0.0
        self.folder.cut_rows(self.step)
        self.display = Display(
            self.total, self.steps_per_epoch, self.step, quiet=self._quiet, mute=not self.folder.writer
        )
        for note in self._notes:
            self.display.warn(note)
        if self.recipe.tensorboard and self.folder.writer:
            self._board = make_board(self.folder.path, self.step)
        if lost > 0:
            # What was computed since the checkpoint and is computed again was paid for, too.
            self.ledger.charge("lost", lost)
        if self.resumed:
            self.display.say(f"going on after step {self.step} of {self.total}")
        else:
            written = self.folder.read_json("tune.json") or {}
            self.display.say(f"{self.recipe.name}: {written.get('reason', self.choice)}")
        if not self.resumed and self.needs_rebuild:  # drawn before the first step
            self.after_draw()
        drawn = self.search is None or self.search.drawn
        self._row_begun = self.ledger.seconds
        self.ledger.enter("train" if drawn else "search")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; the model is shrunk first if it was.

        Raises:
            CheckpointError: The state is of another number of processes, another model, or other data.
        """
        for name, now in (("world_size", self.fabric.world_size), ("steps_per_epoch", self.steps_per_epoch)):
            if state[name] != now:
                raise CheckpointError(
                    f"the checkpoint has {name} = {state[name]}, this run {now}",
                    hint="resume with as many processes, and with the data unchanged",
                )
        for name, method in self.methods.items():
            method.load_state_dict(state["methods"][name])
        if self.search is not None and self.needs_rebuild:
            self._followed = self.search.change
            self._layout()
        checkpoint.restore(self.model, self.optimizer, state["model"])
        self.forward = self._wrap()
        self.ledger.load_state_dict(state["ledger"])
        self._saved_s = sum(phase["seconds"] for phase in state["ledger"]["phases"].values())
        self.step = int(state["step"])
        total, self.loss_steps = state["loss"]
        self._steps_before = self.loss_steps
        self.loss_sum.fill_(total)
        self.accuracy, self.test_loss = state["last_row"]
        checkpoint.set_generators(state["generators"][str(self.fabric.global_rank)], self.fabric.device)

    def _seed(self) -> None:
        """Seed the global generators, on each rank otherwise: their dropout must differ."""
        seed = self.recipe.seed + 1_000_003 * self.fabric.global_rank
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    # ---- the end ----

    def finish(self) -> Result:
        """Write the final weights, the bill and the result.

        Raises:
            DivergedError: A weight or a buffer is not finite; nothing is written.
        """
        self.share_buffers()
        self._check_weights()
        with self.averaged_weights():
            if self.folder.writer:
                # one key only: safetensors writes several in random order, and equal runs should give equal files
                metadata = {"blueprint": self.blueprint.to_json()}
                write_tensors(self.folder.path / "model.safetensors", self.model.state_dict(), metadata)
            nonzero = non_zeros(self.model)[0]
        if self.search is not None:
            self._write_history()
            if not self.search.drawn:
                self.display.warn(
                    "the run ended before a ticket was drawn; it was dense to the end"
                    if self.search.ticket is None
                    else f"the run ended before its last cut; what is left is that of step {self.search.drawn_at}"
                )
        self._write_files()
        self.ledger.stop()
        bill = self.ledger.bill()
        self.folder.write_json("bill.json", bill.to_json())
        result = Result(
            folder=self.folder.path,
            accuracy=self.accuracy,
            loss=self.test_loss,
            epochs=self.recipe.epochs if self._as_said else self.total / self.steps_per_epoch,
            steps=self.step,
            seconds=self.ledger.seconds,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            drawn_at=None if self.search is None else self.search.drawn_at,
            bill=bill,
            judged_by="" if self.judge is None else self.judge.judged_by,
            resumed=self.resumed,
            nonzero=nonzero,
        )
        # Written last: a folder with it is a finished run.
        self.folder.write_json("result.json", result.to_json())
        self.emit("done", result.to_json())
        return result

    def _write_traces(self) -> None:
        """Write what the methods tell about themselves, for the report."""
        told = {
            name: [trace.to_json() for trace in method.traces()]
            for name, method in self.methods.items()
            if isinstance(method, Tracing)
        }
        if told:
            self.folder.write_json("traces.json", told)
        ranked = {
            name: rank_inputs(amounts.cpu(), self.test.images, self.test.labels, self.blueprint.class_names)
            for name, method in self.methods.items()
            if isinstance(method, Ranking)
            and (amounts := method.executed_per_input()) is not None
            and len(amounts) == len(self.test.images)  # not of several processes, nor of several views of an image
        }
        if ranked:
            self.folder.write_json("inputs.json", ranked)

    def _write_files(self) -> None:
        """Write the tickets and weights that the methods leave."""
        for method in self.methods.values() if self.folder.writer else ():
            for name, content in (method.files() if isinstance(method, Filing) else {}).items():
                path = self.folder.path / name
                path.parent.mkdir(exist_ok=True)
                content.save(path) if isinstance(content, Ticket) else write_tensors(path, content, {})

    def _write_history(self) -> None:
        assert self.search is not None
        steps, matrix = self.search.distance_matrix()
        self.folder.write_json(
            "history.json",
            {"history": self.search.history, "steps": steps, "matrix": matrix.double().round(decimals=6).tolist()},
        )

    def close(self) -> None:
        """Take hooks, bar and writers away."""
        self.display.close()
        if self._board is not None:
            self._board.close()
        self._kernels.remove()
        for method in self.methods.values():
            method.detach()
        self.ledger.unwatch()


def first_model(recipe: Recipe) -> tuple[Blueprint, nn.Module]:
    """Return the blueprint of a recipe's network, and the network with the weights that its seed begins with.

    Raises:
        InputError: Data or model cannot be had.
    """
    fabric = launch(recipe)
    data = read_data(recipe)
    loader, _ = make_loaders(recipe, data, fabric)
    blueprint = _blueprint(recipe, data)
    return blueprint, begun(blueprint.build(recipe.seed), loader, recipe.seed, fabric.device)


def _blueprint(recipe: Recipe, data: DataSet) -> Blueprint:
    channels, size = data.train_images.shape[1:3]
    return Blueprint(
        recipe.model, len(data.classes), channels, size, recipe.width, tuple(data.mean), tuple(data.std),
        tuple(data.classes),
    )  # fmt: skip


def begun(model: nn.Module, loader: Loader, seed: int, device: torch.device) -> nn.Module:
    """Move a new model to the device; one with a method ``initialise_from_images`` takes weights from the data."""
    model.to(device)
    if hasattr(model, "initialise_from_images"):
        images = loader.sample(INITIAL_IMAGES, seed, augmented=False)
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model.initialise_from_images(images)  # type: ignore[operator]
    return model


def _so_far(spent: Spending) -> dict[str, Any]:
    """Return what a row tells of the bill up to it."""
    energy = spent.modelled_joules
    return {
        "macs": None if spent.macs is None else spent.macs.value,
        "bit_macs": None if spent.bit_macs is None else spent.bit_macs.value,
        "modelled_joules": None if energy is None else [energy.low, energy.high],
    }
