"""The loop: steps on an absolute clock, evaluations, checkpoints, and a stop that loses nothing.

It knows no method. A method hangs on model and optimizer and acts inside ``optimizer.step()``; all that the loop does
about it is to look afterwards whether the model has changed its shape (`Run.after_draw`).
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from earlybird.errors import DivergedError, Interrupted
from earlybird.train import ema
from earlybird.train.views import mean_logits

if TYPE_CHECKING:
    from earlybird.train.run import Run

CHECKPOINT_SHARE = 0.01
"""Unless told otherwise, checkpoints take at most this share of the time."""
_AGREE_EVERY = 10
"""Optimizer steps between two looks at the loss on a device that would have to wait for it, and between ranks."""


class StopSignal:
    """Catches SIGINT and SIGTERM, so that the loop can save; the second one works as usual."""

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def caught(self) -> bool:
        """Whether a signal came."""
        return bool(self.name)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._before.get(signal.Signals(number), signal.SIG_DFL))


def fit(run: Run, stop: StopSignal) -> None:
    """Train ``run`` from where it stands to its last step.

    Raises:
        DivergedError: The loss is not finite any more. Nothing is saved.
        Interrupted: A signal came; the state is saved.
    """
    recipe, spe = run.recipe, run.steps_per_epoch
    evaluate_every = max(recipe.evaluate_every.in_iterations(spe, run.total), 1)
    saves = recipe.checkpoint_every
    checkpoint_every = None if saves is None else max(saves.in_iterations(spe, run.total), 1)
    waits = _waits(run)
    saver = _Saver()
    run.model.train()
    while run.step < run.total:
        epoch, done = divmod(run.step, spe)
        batches = run.loader.epoch(epoch, start=done * recipe.accumulate)
        for _ in range(done, min(spe, done + run.total - run.step)):
            loss = _step(run, batches)
            run.step += 1
            row = run.step % evaluate_every == 0 or run.step == run.total or run.training_ends
            due = checkpoint_every is not None and run.step % checkpoint_every == 0
            look = not waits or row or due or run.step % _AGREE_EVERY == 0 or run.step % spe == 0
            if look:
                _check_loss(run, loss)
            if run.needs_rebuild:
                run.after_draw()
            if row:
                run.add_row()
            due = due or (checkpoint_every is None and run.step % spe == 0 and saver.pays())
            stopped, due = run.agree(stop.caught(), due) if look else (False, False)
            if due or stopped:
                saver.save(run)
            run.beat(loss)
            if stopped and run.step < run.total:
                raise Interrupted(
                    f"stopped by {stop.name or 'a signal to another rank'} after step {run.step} of {run.total}",
                    needed="everything is saved",
                    hint=f"go on with: earlybird resume {run.folder.path}",
                )


def _waits(run: Run) -> bool:
    """Whether a look at the loss has to wait for a device or for other ranks."""
    return run.fabric.device.type != "cpu" or run.fabric.world_size > 1


def _step(run: Run, batches: Iterator[tuple[Tensor, ...]]) -> Tensor:
    """Take one optimizer step and return the sum of the losses of its batches, shape ()."""
    recipe = run.recipe
    for group in run.optimizer.param_groups:
        group["lr"] = group.get("lr_scale", 1.0) * run.lr(run.step, group.get("lr_end"))
    run.freeze_ended()
    total: Tensor | None = None
    for batch in range(recipe.accumulate):
        images, labels, *beside = next(batches)
        with run.gradients_stay_local(batch < recipe.accumulate - 1):
            if run.objective is not None:
                with run.autocast():
                    loss = run.objective.loss(run.forward, images, labels, *beside)
            else:
                with run.autocast():
                    logits = run.forward(images)
                loss = functional.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
            run.fabric.backward(loss / recipe.accumulate if recipe.accumulate > 1 else loss)
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    if recipe.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_norm)
    for method in run.observers:
        method.observe(total / recipe.accumulate)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if recipe.ema is not None:
        ema.average(run.optimizer, recipe.ema, run.clock(run.step))
    run.loss_sum += total / recipe.accumulate
    run.loss_steps += 1
    return total


def _check_loss(run: Run, loss: Tensor) -> None:
    # The sum remembers every loss since the last row, so no step between two looks escapes.
    value = float(run.loss_sum)
    if math.isfinite(value):
        return
    newest = max(run.folder.path.glob("checkpoint-*.json"), default=None)
    raise DivergedError(
        f"the loss became {float(loss):g} at step {run.step} (epoch {run.step / run.steps_per_epoch:.2f})",
        needed=f"last good checkpoint: {newest}" if newest else "no checkpoint had been written yet",
        hint=f"lower lr (now {run.recipe.lr:g}), raise lr_warmup, or set clip_norm = 1",
    )


class _Saver:
    """Saves checkpoints and knows what they cost."""

    def __init__(self) -> None:
        self._ended = time.perf_counter()
        self._cost = 0.0

    def pays(self) -> bool:
        """Tell whether one more checkpoint would stay within its share of the time."""
        return self._cost < CHECKPOINT_SHARE * (time.perf_counter() - self._ended)

    def save(self, run: Run) -> None:
        start = time.perf_counter()
        run.save()
        self._ended = time.perf_counter()
        self._cost = self._ended - start


def evaluate(run: Run) -> tuple[float, float]:
    """Return loss and accuracy (0 to 1) on the test images, with the averaged weights where there are any.

    The evaluation at the end of a training averages over the recipe's views of an image; those before see the image
    alone. A network whose classifier is not trained is judged by the method that trains it; there is no loss then
    (NaN).
    """
    run.share_buffers()
    sums = torch.zeros(3, dtype=torch.float64, device=run.fabric.device)  # loss, right answers, images
    with run.ledger.during("evaluate"), run.averaged_weights(), torch.no_grad():
        run.model.eval()
        try:
            if run.judge is not None:
                with run.autocast():
                    sums[1], sums[2] = run.judge.judge(run.test.epoch(0))
                sums[0] = math.nan
            for images, labels in run.test.epoch(0) if run.judge is None else ():
                if not len(labels):
                    continue  # another rank has all of a short last batch
                with run.autocast():
                    logits = mean_logits(run.model, images, run.test_time)
                sums[0] += functional.cross_entropy(logits, labels, reduction="sum").double()
                sums[1] += (logits.argmax(1) == labels).sum()
                sums[2] += len(labels)
        finally:
            run.model.train()
        if run.fabric.world_size > 1:
            torch.distributed.all_reduce(sums)
    loss, right, images_seen = sums.tolist()
    return loss / images_seen, right / images_seen
