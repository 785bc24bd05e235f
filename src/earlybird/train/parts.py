"""The parts of a run that a recipe alone decides: folder, data, batches, optimizer, TensorBoard."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from earlybird.data import CATALOGUE, Augment, DataSet, Loader, load
from earlybird.data.parts import base_of
from earlybird.errors import InputError
from earlybird.optimizers.muon import Muon, by_role
from earlybird.train.recipe import Recipe

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from earlybird.data.download import Progress
    from earlybird.train.progress import Display

_TEST_BATCH = 256
"""Images of an evaluation batch on each process."""


def free_folder(recipe: Recipe) -> Path:
    """Return the first path of ``runs/NAME``, ``runs/NAME-2``, ... that is not there."""
    base = Path("runs") / recipe.name
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def located(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths, of data and of files, which hold in whatever folder the run goes on."""
    recipe = recipe.with_absolute_paths()
    base = base_of(recipe.data)
    path = Path(base).expanduser()
    if base in CATALOGUE or not path.exists():
        return recipe
    return recipe.replace(data=f"{path.absolute()}{recipe.data[len(base) :]}")


def read_data(recipe: Recipe, progress: Progress | None = None) -> DataSet:
    """Return the recipe's data: whole, or with as many training images as it asks for."""
    data = load(recipe.data, image_size=recipe.image_size, progress=progress)
    return data if recipe.train_images is None else data.with_training_images(recipe.train_images)


def load_data(recipe: Recipe, fabric: Fabric, display: Display) -> DataSet:
    """Load the recipe's data; what takes longer than a second says what it does."""
    begun, shown = time.perf_counter(), ""

    def progress(what: str, done: int, total: int) -> None:
        nonlocal shown
        if what != shown and time.perf_counter() - begun > 1:
            shown = what
            display.say(f"loading {recipe.data}: {what}")

    if fabric.world_size > 1 and fabric.local_rank != 0:
        fabric.barrier()  # the first rank of each machine downloads, the others find the files
    data = read_data(recipe, progress)
    if fabric.world_size > 1 and fabric.local_rank == 0:
        fabric.barrier()
    height, width = data.train_images.shape[2:]
    if height != width:
        raise InputError(
            f"the images of {recipe.data} are {height} x {width} pixels", needed="square images",
            hint=f"--image-size {min(height, width)} makes them so",
        )  # fmt: skip
    return data


def make_loaders(recipe: Recipe, data: DataSet, fabric: Fabric) -> tuple[Loader, Loader]:
    """Return the batches of the training images, augmented, and those of the test images."""
    shared: dict[str, Any] = {
        "mean": data.mean,
        "std": data.std,
        "device": fabric.device,
        "rank": fabric.global_rank,
        "world_size": fabric.world_size,
    }
    augment = Augment(crop=recipe.crop, flip=recipe.flip, cutout=recipe.cutout, pad=recipe.pad)
    training = Loader(
        data.train_images,
        data.train_labels,
        batch_size=recipe.batch_size,
        augment=augment,
        seed=recipe.seed,
        **shared,
    )
    test = Loader(
        data.test_images,
        data.test_labels,
        batch_size=min(_TEST_BATCH * fabric.world_size, len(data.test_images)),
        shuffle=False,
        drop_last=False,
        **shared,
    )
    training.targets, test.targets = data.train_targets, data.test_targets
    return training, test


def make_optimizer(
    recipe: Recipe, model: nn.Module, steps_per_epoch: int, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over the parameters that learn; the schedule sets its rate at each step.

    A group's rate is ``lr_scale`` times that of the run (by default once), and comes to 0 at step ``lr_end`` (by
    default at the end). ``dtype`` is that of the run's matrix products.
    """
    if recipe.optimizer == "muon":
        return _make_muon(recipe, model, steps_per_epoch, dtype)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )
    betas = (recipe.momentum, 0.999)
    return torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=betas, weight_decay=recipe.weight_decay)


def _make_muon(recipe: Recipe, model: nn.Module, steps_per_epoch: int, dtype: torch.dtype) -> Muon:
    """Return Muon over the filters, with SGD over head, biases and stem; scales of norms keep their values.

    Published rates and penalties are for a loss that is summed over the n images of a step; the loop's is their mean,
    whose gradients are n times smaller. SGD is linear in the gradient: with n times the rate and an n-th of the L2
    penalty it makes the same step. Muon's step does not depend on the size of the gradient.
    """
    images = recipe.batch_size * recipe.accumulate
    roles = by_role(model)

    def by_sgd(role: str, rate: float, **more: int) -> dict[str, Any]:
        return {
            "params": roles[role],
            "orthogonal": False,
            "momentum": recipe.sgd_momentum,
            # published as n * weight_decay / rate, so that all lose the same share at their peak; an n-th of that
            "weight_decay": recipe.weight_decay / rate if rate else 0.0,
            "lr_scale": images * rate / recipe.lr,
            **more,
        }

    if recipe.stem_until is not None and not roles["stem"]:
        raise InputError(
            f"stem_until = {recipe.stem_until}, but the first layer of {recipe.model} has no bias",
            hint="leave stem_until out",
        )
    end = (
        {}
        if recipe.stem_until is None
        else {"lr_end": recipe.stem_until.in_iterations(steps_per_epoch, recipe.steps(steps_per_epoch))}
    )
    groups = [
        {"params": roles["filters"]},
        by_sgd("head", recipe.lr_head),
        by_sgd("biases", recipe.lr_bias),
        by_sgd("stem", recipe.lr_bias, **end),
        by_sgd("scales", 0.0),  # they get gradients, by which a ticket ranks, but stay where they are
    ]
    return Muon(
        [group for group in groups if group["params"]],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        dtype=dtype,
    )


def require_board() -> None:
    """Raise an `InputError` where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("tensorboard is not installed", hint="pip install tensorboard, or leave --tensorboard out")


def make_board(folder: Path, step: int) -> Any:
    """Return a TensorBoard writer that goes on after ``step``."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
