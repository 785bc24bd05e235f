"""Lottery tickets: what the dense training finds is trained once more from (near) the beginning.

Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, arXiv 1803.03635; rewinding to an early epoch: Frankle
et al., arXiv 1903.01611. Both are for single weights; here whole channels go, as in the comparison of You et al., arXiv
1909.11957, since only these save anything. ``--score`` ranks by the size of the filters (`earlybird.tickets.scores`) or
by the scales of batch norm, over the whole network. Every training takes the whole recipe, with a fresh optimizer.
"""

from __future__ import annotations

import copy

from torch import nn

from benchmarks.rivals.loop import Contest, cut_to_cost, dense_network, fit, schedule
from earlybird.errors import InputError
from earlybird.tickets.scores import score_channels

ROUNDS = 3


def one_shot(contest: Contest) -> tuple[nn.Module, float]:
    """Train dense to the end, cut once, rewind what is left to its first values, train it to the end."""
    first = contest.build()
    model = dense_network(contest)
    with contest.ledger.during("draw"):
        _cut(contest, model, first, contest.macs_share)
    return first, fit(contest, first, schedule(contest))


def iterative(contest: Contest) -> tuple[nn.Module, float]:
    """Train, cut a part, rewind, three times over, and train what is left: iterative magnitude pruning.

    Each round leaves the same share of the MACs, so that the last one has the cost that was asked for. What is left is
    rewound to the first values, or with ``--rewind-epochs K`` to those after epoch K, from where the trainings go on.
    """
    epoch = contest.options.rewind_epochs
    if epoch and contest.options.dense is not None:
        raise InputError(f"rewinding to epoch {epoch} needs the weights of that time", hint="leave --dense out")
    if epoch >= contest.recipe.epochs:
        raise InputError(f"rewinding to epoch {epoch} of {contest.recipe.epochs}", needed="an earlier one")
    kept = [contest.build()]
    if epoch:
        model = contest.build()

        def keep(done: int) -> None:
            if done == epoch:
                kept[0] = copy.deepcopy(model)

        fit(contest, model, schedule(contest), phase="search", after_epoch=keep)
    else:
        model = dense_network(contest)
    rewound = kept[0]
    for number in range(1, ROUNDS + 1):
        with contest.ledger.during("draw"):
            _cut(contest, model, rewound, contest.macs_share ** (number / ROUNDS))
        if number < ROUNDS:
            model = copy.deepcopy(rewound)
            fit(contest, model, schedule(contest), first=epoch, phase="search")
    return rewound, fit(contest, rewound, schedule(contest), first=epoch)


def _cut(contest: Contest, trained: nn.Module, rewound: nn.Module, share: float) -> None:
    """Cut ``rewound``, which has the shape of ``trained``, to what the trained weights say is worth most."""
    scores = score_channels(trained, contest.options.score)
    cut_to_cost(contest, trained, scores, share * contest.dense_macs, target=rewound)
