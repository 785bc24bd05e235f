"""Tickets drawn before the first step: every step of the training is one of the small network.

What each score is, and where from: `earlybird.tickets.at_init`. Settings as published: a hundred images for SNIP and
GraSP (ten of each class), temperature 200, 100 rounds for SynFlow. The ticket is drawn over the whole network at the
cost that was asked for, and the small network takes the whole recipe.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.rivals.loop import Contest, cut_to_cost, fit, schedule
from earlybird.data.augment import normalise
from earlybird.tickets import at_init
from earlybird.tickets.coupling import find_groups
from earlybird.tickets.draw import Scope, keep_for_macs


def snip(contest: Contest) -> tuple[nn.Module, float]:
    """Rank by connection sensitivity."""

    def score(model: nn.Module) -> dict[str, Tensor]:
        images, labels = samples(contest)
        contest.ledger.passes(len(images), training=True)
        return at_init.snip(model, images, labels)

    return _train_ticket(contest, score)


def grasp(contest: Contest) -> tuple[nn.Module, float]:
    """Rank by what gradient flow loses.

    Counted as three training passes: forward and backward, and the backward pass through both (twice their MACs).
    """

    def score(model: nn.Module) -> dict[str, Tensor]:
        images, labels = samples(contest)
        contest.ledger.passes(3 * len(images), batches=3, training=True)
        return at_init.grasp(model, images, labels)

    return _train_ticket(contest, score)


def synflow(contest: Contest) -> tuple[nn.Module, float]:
    """Rank by synaptic flow.

    The rounds need to know how many channels are to stay. A first ranking, of one round, says how many that are at
    this cost; where the last ticket needs a few more or less, it goes back to an earlier round or further.
    """

    def score(model: nn.Module) -> dict[str, Tensor]:
        inputs = contest.example[:1]
        first = at_init.synflow(model, inputs, keep=1.0, rounds=1, coupled="group")
        keep = keep_for_macs(first, find_groups(model, inputs), contest.macs_share, coupled="group")
        contest.ledger.passes(101, batches=101, training=True)
        return at_init.synflow(model, inputs, keep=keep, rounds=100, coupled="group")

    return _train_ticket(contest, score)


def random_ticket(contest: Contest) -> tuple[nn.Module, float]:
    """Keep channels at random, the same share of each layer: what a ranking has to be better than."""
    generator = torch.Generator().manual_seed(contest.recipe.seed)
    return _train_ticket(contest, lambda model: at_init.random(model, generator), scope="layer")


def samples(contest: Contest) -> tuple[Tensor, Tensor]:
    """Return ten training images of each class, normalised but not augmented, and their labels."""
    loader = contest.loader
    chosen = at_init.pick_samples(
        loader.labels, at_init.SAMPLES_PER_CLASS, torch.Generator().manual_seed(contest.recipe.seed)
    )
    images = normalise(loader.images[chosen], loader.mean, loader.std, loader.dtype, loader.channels_last)
    return images.to(loader.device), loader.labels[chosen].to(loader.device)


def _train_ticket(
    contest: Contest, score: Callable[[nn.Module], dict[str, Tensor]], *, scope: Scope = "network"
) -> tuple[nn.Module, float]:
    model = contest.build()
    contest.ledger.price_as(contest.count(model))
    with contest.ledger.during("draw"):
        scores = score(model)
        ticket = cut_to_cost(contest, model, scores, contest.macs_share * contest.dense_macs, scope=scope)
    contest.notes["collapsed"] = at_init.collapsed(ticket)
    return model, fit(contest, model, schedule(contest))
