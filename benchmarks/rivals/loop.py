"""The ground that all rivals stand on: data, network, schedule, clock and counters are those of the product.

A rival is a short function on top of `fit`. It computes in bf16 autocast with channels_last and the product's kernels
from the first step on, which is what tuning chooses for the networks here; it pays nothing for choosing, where a run of
the product does. Its seconds begin before the data is loaded, as those of a product's run do, and its widths are
rounded alike.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from earlybird.cost.bill import Bill
from earlybird.cost.count import ModelCost, count
from earlybird.data import Loader
from earlybird.errors import DivergedError, InputError
from earlybird.export import load as load_network
from earlybird.files import read_rows
from earlybird.kernels.install import Installed, use_kernels
from earlybird.ledger import PHASES, Ledger
from earlybird.models.blueprint import Blueprint
from earlybird.tickets.coupling import find_groups
from earlybird.tickets.draw import Scope, draw, keep_for_macs
from earlybird.tickets.layers import fitting_multiple, width
from earlybird.tickets.refit import estimate_batch_norms
from earlybird.tickets.scores import hidden_layers, magnitude
from earlybird.tickets.shrink import shrink
from earlybird.tickets.ticket import Ticket
from earlybird.train.launch import launch
from earlybird.train.parts import make_loaders, make_optimizer, read_data
from earlybird.train.recipe import Recipe
from earlybird.train.result import Result
from earlybird.train.run import CALIBRATION_IMAGES
from earlybird.train.schedule import Schedule

FINETUNE_LR = 0.1
"""Of the recipe's peak: where fine-tuning begins. It goes down to 0 in a straight line."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a rival may be told; each uses what concerns it.

    Attributes:
        macs_share: Forward MACs of the small network, as a share of the dense one's.
        dense: Run folder of a finished dense training to take over, or None to train.
        finetune_epochs: Epochs after the cut; by default a third of the recipe's.
        score: What lottery tickets rank by: ``magnitude`` or ``bn_scale``.
        rewind_epochs: Point to which `lottery-iterative` rewinds.
        resize: How `progressive-resizing` makes images smaller: ``crop`` or ``resize``.
        sparsity: Factor of the L1 term of `slimming`.
    """

    macs_share: float | None = None
    dense: Path | None = None
    finetune_epochs: int | None = None
    score: str = "magnitude"
    rewind_epochs: int = 0
    resize: str = "crop"
    sparsity: float = 1e-4


@dataclass(kw_only=True)
class Contest:
    """What a rival works with.

    Attributes:
        recipe: What the product's run would do.
        options: What the rival was told.
        loader: Training images.
        test: Test images.
        blueprint: What the dense network is built from.
        ledger: Of this process; in a phase from the beginning on.
        example: Two training images, for tracing and counting.
        dense_macs: Forward MACs of the dense network, one image.
        round_to: Multiple to which widths are rounded up, as a run of the product would.
        curve: Seconds and accuracy after each epoch.
        taken: Bill of the dense training that was taken over, or None.
        notes: What else belongs in the row.
    """

    recipe: Recipe
    options: Options
    loader: Loader
    test: Loader
    blueprint: Blueprint
    ledger: Ledger
    example: Tensor
    dense_macs: int = 0
    round_to: int = 1
    curve: list[list[float]] = field(default_factory=list)
    taken: Bill | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader)

    @property
    def macs_share(self) -> float:
        assert self.options.macs_share is not None  # `run` has seen to it
        return self.options.macs_share

    @property
    def finetune_epochs(self) -> int:
        epochs = self.options.finetune_epochs
        return max(1, round(self.recipe.epochs / 3)) if epochs is None else epochs

    @property
    def seconds(self) -> float:
        """Seconds so far, those of a training that was taken over among them."""
        return self.ledger.seconds + (0.0 if self.taken is None else self.taken.total.seconds.value)

    def build(self) -> nn.Module:
        """Return the dense network with the weights that any run of this seed begins with."""
        return self.blueprint.build(self.recipe.seed).to(self.loader.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.loader.device.type, torch.bfloat16)

    def count(self, model: nn.Module, images: Tensor | None = None) -> ModelCost:
        """Count what a sample costs. The time this takes is not the rival's."""
        self.ledger.pause()
        try:
            return count(model, self.example if images is None else images)
        finally:
            self.ledger.resume()


def start(recipe: Recipe, options: Options) -> Contest:
    """Load the data and define the network; the clock runs from here on.

    Raises:
        InputError: The recipe asks for what rivals do not do, or does not fit the data.
    """
    for key, plain in (("accumulate", 1), ("clip_norm", None), ("ema", None)):
        if getattr(recipe, key) != plain:
            raise InputError(f"the recipe has {key} = {getattr(recipe, key)}", needed="one without, for rivals")
    fabric = launch(recipe)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    ledger = Ledger(device=fabric.device)
    ledger.enter("setup")
    data = read_data(recipe)
    loader, test = make_loaders(recipe, data, fabric)
    loader.channels_last = test.channels_last = True
    channels, size = data.train_images.shape[1:3]
    blueprint = Blueprint(recipe.model, len(data.classes), channels, size, recipe.width)
    contest = Contest(
        recipe=recipe, options=options, loader=loader, test=test, blueprint=blueprint, ledger=ledger,
        example=loader.sample(2, recipe.seed),
    )  # fmt: skip
    network = contest.build()
    widest = max(width(layer) or 0 for layer in hidden_layers(network).values())
    contest.round_to = fitting_multiple(widest, fabric.device)
    contest.dense_macs = contest.count(network).forward_macs
    return contest


def check_macs_share(contest: Contest) -> None:
    """Find out before hours of training whether the network can be cut to the share that is asked for.

    Raises:
        InputError: Not even with layers of any width.
    """
    contest.ledger.pause()
    network = contest.build()
    groups = find_groups(network, contest.example[:1])
    keep_for_macs(magnitude(network), groups, contest.macs_share, coupled="group", scope="layer")
    contest.ledger.resume()


def fit(
    contest: Contest,
    model: nn.Module,
    rate: Callable[[int], float],
    *,
    first: int = 0,
    last: int | None = None,
    phase: str = "train",
    prepare: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None,
    regularise: Callable[[nn.Module], None] | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> float:
    """Train ``model`` with a fresh optimizer and evaluate it after each epoch.

    Args:
        contest: See `Contest`.
        model: Trained in place.
        rate: Optimizer steps done, from the start of epoch 0, to the learning rate of the next one.
        first: First epoch, from 0; decides the order of images and their augmentation.
        last: Epoch before which to stop; by default that of the recipe.
        phase: Of the bill: ``search`` for a network that is cut later, ``train`` for the final one.
        prepare: Images, labels and steps done to what the step is to be made with.
        regularise: Changes the gradients of the model.
        after_epoch: Called with the epochs done, before the evaluation.

    Returns:
        Accuracy on the test images after the last epoch, 0 to 1.

    Raises:
        DivergedError: The loss is not finite any more.
    """
    recipe, ledger, spe = contest.recipe, contest.ledger, contest.steps_per_epoch
    last = recipe.epochs if last is None else last
    ledger.enter(phase)
    model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(recipe, model, contest.steps_per_epoch)
    ledger.bits = 16
    ledger.pause()
    ledger.watch(model, optimizer, contest.example)
    kernels = own_kernels(contest, model)
    ledger.resume()
    model.train()
    accuracy = math.nan
    for epoch in range(first, last):
        losses = torch.zeros((), dtype=torch.float64, device=contest.loader.device)
        for batch, (images, labels) in enumerate(contest.loader.epoch(epoch)):
            step = epoch * spe + batch
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            if prepare is not None:
                images, labels = prepare(images, labels, step)
            with contest.autocast():
                logits = model(images)
            loss = functional.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
            loss.backward()
            if regularise is not None:
                regularise(model)
            optimizer.step()
            optimizer.zero_grad()
            losses += loss.detach()
        if not math.isfinite(float(losses)):
            raise DivergedError(f"the loss became {float(losses):g} in epoch {epoch}", hint=f"lower lr ({recipe.lr:g})")
        if after_epoch is not None:
            after_epoch(epoch + 1)
        accuracy = evaluate(contest, model)
        print(f"{phase} epoch {epoch + 1}: {accuracy:.2%} after {contest.seconds:.0f} s", file=sys.stderr, flush=True)
    ledger.unwatch()
    if kernels is not None:
        kernels.remove()
    return accuracy


def own_kernels(contest: Contest, model: nn.Module) -> Installed | None:
    """Let a rival compute with the product's kernels, as tuning would choose them, without the time that takes."""
    if contest.recipe.kernels is False or contest.loader.device.type != "cpu":
        return None
    images = contest.loader.sample(contest.recipe.batch_size, contest.recipe.seed)
    return use_kernels(model, images, dtype=torch.bfloat16)


def evaluate(contest: Contest, model: nn.Module) -> float:
    """Return the accuracy on the test images, 0 to 1, and add it to the curve."""
    right = seen = 0
    with contest.ledger.during("evaluate"), torch.no_grad():
        model.eval()
        for images, labels in contest.test.epoch(0):
            with contest.autocast():
                logits = model(images)
            right += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
        model.train()
    contest.curve.append([round(contest.seconds, 1), right / seen])
    return right / seen


def schedule(contest: Contest) -> Schedule:
    """Return the recipe's learning rate."""
    return Schedule.from_recipe(contest.recipe, contest.steps_per_epoch)


def finetune_rate(contest: Contest) -> Callable[[int], float]:
    """Return the rate of the epochs after those of the recipe: from a tenth of its peak to 0."""
    before = contest.recipe.epochs * contest.steps_per_epoch
    total = contest.finetune_epochs * contest.steps_per_epoch
    falling = Schedule(kind="one_cycle", lr=FINETUNE_LR * contest.recipe.lr, total=total)
    return lambda step: falling(step - before)


def finetune(contest: Contest, model: nn.Module) -> float:
    """Train the small network for the epochs that are set aside for it, and return its accuracy."""
    begin = contest.recipe.epochs
    return fit(contest, model, finetune_rate(contest), first=begin, last=begin + contest.finetune_epochs)


def dense_network(contest: Contest) -> nn.Module:
    """Return the dense network, trained to the end: here, or by the run that is to be taken over.

    Raises:
        InputError: The run is missing or unfinished, or trained something else.
    """
    folder = contest.options.dense
    if folder is None:
        model = contest.build()
        fit(contest, model, schedule(contest), phase="search")
        return model
    network = load_network(folder).to(contest.loader.device)
    result = Result.read(folder)
    if result is None:
        raise InputError(f"{folder} is not finished", hint=f"go on with 'earlybird resume {folder}'")
    ours, theirs = contest.recipe, Recipe.from_toml(folder / "recipe.toml")
    # where it was computed is no part of what was trained; that its seconds are comparable is the caller's matter
    how = {key: getattr(ours, key) for key in ("threads", "accelerator", "kernels")}
    if ours.hash() != theirs.replace(**how).hash():
        said = theirs.values()
        other = [key for key, value in ours.values().items() if key not in ("out", *how) and said.get(key) != value]
        raise InputError(f"{folder} is another training ({', '.join(other)} differ)", needed="the same recipe, dense")
    spent = result.bill.phases
    # its setup is left out: this process has its own
    taken = {"search": spent["train"], **{name: spent[name] for name in ("evaluate", "lost") if name in spent}}
    later = contest.seconds - spent["setup"].seconds.value
    for row in read_rows(folder / "metrics.jsonl"):
        contest.curve.append([round(row["seconds"] + later, 1), row["accuracy"]])
    contest.taken = Bill(phases=taken)
    return network


def whole_bill(contest: Contest) -> Bill:
    """Return what this process and a training that was taken over have spent together."""
    own = contest.ledger.bill()
    if contest.taken is None:
        return own
    parts = {"own": own.phases, "taken": contest.taken.phases}
    sums = {
        name: Bill(phases={part: phases[name] for part, phases in parts.items() if name in phases}).total
        for name in PHASES
        if any(name in phases for phases in parts.values())
    }
    return replace(own, phases=sums)


def cut_to_cost(
    contest: Contest,
    model: nn.Module,
    scores: dict[str, Tensor],
    macs: float,
    *,
    scope: Scope = "network",
    target: nn.Module | None = None,
) -> Ticket:
    """Draw the ticket whose network costs nearest to ``macs`` forward MACs, and cut to it.

    Widths are rounded as the product would, or, where no ticket comes within 5 % that way, to half of that multiple,
    a quarter, and so on.

    Args:
        contest: See `Contest`.
        model: What the scores are of.
        scores: Layer name to scores ``(channels,)``.
        macs: Of the network that is left.
        scope: See `earlybird.draw`.
        target: What is cut, of the shape of ``model``; by default ``model``.

    Raises:
        InputError: No ticket comes within 5 %, however it is rounded.
    """
    inputs = contest.example[:1]
    share = macs / contest.count(model).forward_macs
    contest.ledger.pause()  # to meet a cost is the contest's wish: the rival pays for one draw and the cut
    groups = find_groups(model, inputs)
    for round_to in multiples(contest):
        try:
            keep = keep_for_macs(scores, groups, share, coupled="group", scope=scope, round_to=round_to)
            break
        except InputError:
            if round_to == 1:
                raise
    contest.ledger.resume()
    ticket = draw(model, keep, scores=scores, example_inputs=inputs, coupled="group", scope=scope)
    shrink(model if target is None else target, ticket, inputs, round_to=round_to, scores=scores, groups=groups)
    contest.notes.update(keep=keep, round_to=round_to)
    return ticket


def multiples(contest: Contest) -> list[int]:
    """Return the multiple that widths are rounded to, half of it, and so on down to 1."""
    return [contest.round_to >> halved for halved in range(contest.round_to.bit_length())]


def reestimate(contest: Contest, model: nn.Module) -> None:
    """Estimate the statistics of batch norm anew, as the product does after a cut."""
    size = max(2, min(contest.recipe.batch_size, 256))
    images = min(CALIBRATION_IMAGES, len(contest.loader.images))
    batches = contest.loader.sample_in_batches(images, size, contest.recipe.seed)
    with contest.autocast():
        estimate_batch_norms(model, contest.ledger.passing(batches))
