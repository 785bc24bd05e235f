"""Faster training of the whole network: methods of MosaicML's library Composer, at the settings its pages recommend.

github.com/mosaicml/composer, ``composer/algorithms/*/README.md``; own code. They leave the network as it is, so
``--macs-share`` says nothing to them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.rivals.loop import Contest, fit, schedule

INITIAL_SCALE, DELAY, FULL_SIZE, INCREMENT = 0.5, 0.5, 0.2, 4
FREEZE_START, FREEZE_LEVEL = 0.5, 1.0
SELECT_START, SELECT_END, SELECT_KEEP, SELECT_SCALE, INTERRUPT = 0.5, 0.9, 0.5, 0.5, 2


def progressive_resizing(contest: Contest) -> tuple[nn.Module, float]:
    """Train on small images first, on larger ones later, on whole ones at last.

    Recommended: ``initial_scale=0.5``, ``delay_fraction=0.5`` (half of the training at that size, then a straight line
    up), ``finetune_fraction=0.2`` (the last fifth at full size), ``size_increment=4`` pixels. ``mode='crop'`` is what
    its page found better on CIFAR-10; ``--resize resize`` shrinks the whole image instead (nearest pixel, as its code
    does). The same crop for a whole batch, as there; the size changes from step to step.
    """
    model = contest.build()
    generator = torch.Generator().manual_seed(contest.recipe.seed)
    sizes: dict[int, int] = {}

    def prepare(images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        whole = images.shape[-1]
        side = side_at(step / total, whole)
        if side < whole:
            if contest.options.resize == "crop":
                top, left = torch.randint(0, whole - side + 1, (2,), generator=generator).tolist()
                images = images[:, :, top : top + side, left : left + side]
            else:
                images = functional.interpolate(images, size=(side, side), mode="nearest")
            images = images.contiguous(memory_format=torch.channels_last)
        sizes[side] = sizes.get(side, 0) + 1
        return images, labels

    total = contest.recipe.epochs * contest.steps_per_epoch
    accuracy = fit(contest, model, schedule(contest), prepare=prepare)
    contest.notes["steps_by_side"] = sizes
    return model, accuracy


def side_at(done: float, whole: int) -> int:
    """Return the side of the images, in pixels, when a share ``done`` of the training has passed."""
    ramp = min(max((done - DELAY) / (1 - FULL_SIZE - DELAY), 0.0), 1.0)
    scale = INITIAL_SCALE + (1 - INITIAL_SCALE) * ramp
    return min(max(round(whole * scale / INCREMENT), 1) * INCREMENT, whole)


def layer_freezing(contest: Contest) -> tuple[nn.Module, float]:
    """From the middle of the training on, freeze more layers after each epoch, the first ones first.

    Defaults: ``freeze_start=0.5``, ``freeze_level=1.0`` (all but the last layer, were there an epoch after the last). A
    frozen layer is one without gradients: autograd stops behind the last layer that still learns, and what it does not
    compute is not counted, since the network is counted anew each time. Running statistics of frozen batch norms go on
    moving, as in Composer.
    """
    model = contest.build()
    layers = freezable(model)
    depths: list[int] = []

    def freeze(epoch: int) -> None:
        done = epoch / contest.recipe.epochs
        depth = int(FREEZE_LEVEL * max(done - FREEZE_START, 0.0) / (1 - FREEZE_START) * len(layers))
        for layer in layers[:depth]:
            layer.requires_grad_(False)
        depths.append(depth)
        if epoch < contest.recipe.epochs:  # after the last epoch nothing is trained any more
            contest.ledger.price_as(contest.count(model))

    accuracy = fit(contest, model, schedule(contest), after_epoch=freeze)
    contest.notes["frozen_layers"], contest.notes["layers"] = depths, len(layers)
    return model, accuracy


def freezable(model: nn.Module) -> list[nn.Module]:
    """Return the layers with weights in order of definition, without the last."""
    leaves = [module for module in model.modules() if not list(module.children())]
    return [module for module in leaves if list(module.parameters())][:-1]


def selective_backprop(contest: Contest) -> tuple[nn.Module, float]:
    """In every other step of the later training, learn only from half of the batch, images of high loss first.

    Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest Losers", arXiv 1910.00762. Recommended:
    ``start=0.5``, ``end=0.9``, ``keep=0.5``, ``interrupt=2``, ``scale_factor=0.5``: the forward pass that finds the
    losses sees images of half the side. It is made in train mode, as there, and so moves the running statistics of
    batch norm; it is counted for what it is, at that size.
    """
    model = contest.build()
    generator = torch.Generator().manual_seed(contest.recipe.seed)
    skipped = 0

    def prepare(images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        nonlocal skipped
        if not selects(step, contest.steps_per_epoch, total):
            return images, labels
        small = functional.interpolate(images, scale_factor=SELECT_SCALE, mode="bilinear", align_corners=False)
        small = small.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), contest.autocast():
            logits = model.forward(small)  # below the hooks of the ledger, which is told
        losses = functional.cross_entropy(
            logits.float(), labels, reduction="none", label_smoothing=contest.recipe.label_smoothing
        )
        contest.ledger.passes(len(images), inputs=small)
        chosen = choose(losses, generator)
        skipped += len(images) - len(chosen)
        return images[chosen].contiguous(memory_format=torch.channels_last), labels[chosen]

    total = contest.recipe.epochs * contest.steps_per_epoch
    accuracy = fit(contest, model, schedule(contest), prepare=prepare)
    contest.notes["images_without_backward"] = skipped
    return model, accuracy


def selects(step: int, steps_per_epoch: int, total: int) -> bool:
    """Tell whether the step after ``step`` others learns from a selection."""
    within = SELECT_START <= step / total < SELECT_END
    return within and (step % steps_per_epoch + 1) % INTERRUPT != 0


def choose(losses: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a share of the batch without replacement: the image at quantile q of the losses with weight q^(1/keep - 1).

    Args:
        losses: Of each image, (N,).
        generator: On the CPU.

    Returns:
        Indices, (int(keep * N),).
    """
    count = len(losses)
    quantiles = (torch.arange(count) + 0.5) / count
    picks = torch.multinomial(quantiles ** (1 / SELECT_KEEP - 1), int(SELECT_KEEP * count), generator=generator)
    return losses.argsort()[picks.to(losses.device)]
