"""Do tickets of pre-trained weights serve other tasks? How alike two masks are, and up to which sparsity one matches.

Chen, Frankle, Chang, Liu, Zhang, Carbin, Wang, "The Lottery Tickets Hypothesis for Supervised and Self-supervised
Pre-training in Computer Vision Models", CVPR 2021, https://arxiv.org/abs/2012.06908; reference code
https://github.com/VITA-Group/CV_LTH_Pre-training. Let theta_p be pre-trained weights and m a mask that iterative
pruning has found on the pre-training task, rewound to theta_p after each round (`earlybird.tickets.iterative` with
``start``). Trained on a task T with a head of its own, m * theta_p is *matching* at sparsity 1 - |m| / n if

    mean over seeds of T(m * theta_p)  >=  mean of T(theta_p) - d * (standard deviation of T(theta_p))

with d = 1, and *universal* if it is so for all tasks. Masks of two pre-trainings are compared by the Jaccard index
|m1 and m2| / |m1 or m2| of what they keep. Beside the ticket stand what it has to beat (`CONTROLS`).

What it saves: one search for many tasks; in the bill, as for all masks over single weights, bit-MACs and modelled
joules, and no measured second. It does *not* pay for one task alone, nor where the tasks are far from what was
pre-trained on: then the full weights gain little over random ones themselves, and anything matches them.

Deviations: the tolerance is stated, where the paper compares numbers; the tasks are small.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from earlybird.errors import InputError, nearest
from earlybird.sparse.masks import ticket_of
from earlybird.tickets.iterative import prune
from earlybird.tickets.ticket import Ticket

__all__ = ["CONTROLS", "bound", "expected_jaccard", "jaccard", "largest_matching", "matching", "one_shot", "universal"]

CONTROLS: dict[str, str] = {
    "random_init": "the ticket's mask on random weights",
    "shuffled": "a mask of as many weights of each layer, at random, on the pre-trained weights",
    "one_shot": "the largest pre-trained weights of the network, without any training",
    "reversed": "the pre-trained weights that the ticket removes",
}
"""What a ticket is compared with, beside the full pre-trained weights, and what each is."""


def jaccard(one: Ticket, other: Ticket) -> tuple[float, dict[str, float]]:
    """Return the Jaccard index of what two tickets keep, 0 to 1: of all layers together, and layer by layer.

    Raises:
        InputError: The tickets are not over the same units.
    """
    one.distance(other)  # checks the units
    mine, theirs = one.masks, other.masks
    shared = {name: int((mask & theirs[name]).sum()) for name, mask in mine.items()}
    either = {name: int((mask | theirs[name]).sum()) for name, mask in mine.items()}
    layers = {name: shared[name] / either[name] if either[name] else 1.0 for name in mine}
    total = sum(either.values())
    return (sum(shared.values()) / total if total else 1.0), layers


def expected_jaccard(one: float, other: float) -> float:
    """Return the Jaccard index to expect of independent random masks that keep the shares ``one`` and ``other``."""
    either = one + other - one * other
    return one * other / either if either else 1.0


def one_shot(weights: Mapping[str, Tensor], like: Ticket) -> Ticket:
    """Return the ticket of the largest weights, of the layers and of as many as ``like`` keeps.

    Args:
        weights: Weights and buffers by name, as of ``state_dict()``.
        like: A ticket over single weights.

    Raises:
        InputError: A layer is not among the weights, has another shape, or the ticket is over other units.
    """
    found: dict[str, Tensor] = {}
    for name, mask in like.masks.items():
        key = f"{name}.weight"
        if like.kinds[name] != "weight":
            raise InputError(f"units of '{name}' are of kind '{like.kinds[name]}'", needed="single weights")
        if key not in weights or weights[key].shape != mask.shape:
            shape = tuple(weights[key].shape) if key in weights else "not there"
            raise InputError(
                f"the weights of layer '{name}' are {shape}, the ticket's mask {tuple(mask.shape)}",
                hint="" if key in weights else nearest(key, weights),
            )
        found[name] = weights[key]
    every = {name: torch.ones_like(mask) for name, mask in like.masks.items()}
    return ticket_of(prune(found, every, like.keep), method="one_shot", keep=like.keep)


def bound(full: Sequence[float], deviations: float = 1.0) -> float:
    """Return what a matching ticket reaches at least: the mean of ``full`` less so many standard deviations.

    The deviation is that of a sample; one value has none, so that its own value is the bound.

    Raises:
        InputError: There are no values, or ``deviations`` is negative.
    """
    if not full:
        raise InputError("no result of the full weights", needed="one seed at least")
    if not deviations >= 0:
        raise InputError(f"a tolerance of {deviations} standard deviations", needed="a number of at least 0")
    return statistics.fmean(full) - deviations * (statistics.stdev(full) if len(full) > 1 else 0.0)


def matching(
    full: Sequence[float], tickets: Mapping[float, Sequence[float]], deviations: float = 1.0
) -> dict[float, bool]:  # fmt: skip
    """Tell for each sparsity whether the tickets match the full weights: mean against `bound`.

    Args:
        full: What the full weights reach, over seeds; the larger, the better.
        tickets: Sparsity, 0 to 1, to what tickets reach, over seeds.
        deviations: Standard deviations of ``full`` that may be lost.
    """
    least = bound(full, deviations)
    return {sparsity: statistics.fmean(reached) >= least for sparsity, reached in sorted(tickets.items())}


def largest_matching(
    full: Sequence[float], tickets: Mapping[float, Sequence[float]], deviations: float = 1.0
) -> float | None:
    """Return the largest sparsity that is `matching`, whatever smaller ones are; None where none is."""
    return max((sparsity for sparsity, good in matching(full, tickets, deviations).items() if good), default=None)


def universal(tasks: Iterable[Mapping[float, bool]]) -> float | None:
    """Return the largest sparsity that matches in every task (see `matching`), or None."""
    found = [{sparsity for sparsity, good in task.items() if good} for task in tasks]
    return max(set.intersection(*found), default=None) if found else None
