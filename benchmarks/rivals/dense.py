"""What a user has without any method: a narrower network."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from benchmarks.rivals.loop import Contest, fit, schedule
from earlybird.cost.count import count
from earlybird.errors import InputError


def small_dense(contest: Contest) -> tuple[nn.Module, float]:
    """Train a network that is narrower everywhere and costs what the ticket costs, for the whole recipe.

    Zoo models have layers of a multiple of 8 channels, so the cost comes in steps; the nearest one is taken.
    """
    wanted = contest.macs_share * contest.dense_macs
    contest.blueprint = replace(contest.blueprint, width=_width(contest, wanted))
    contest.notes["width"] = contest.blueprint.width
    model = contest.build()
    return model, fit(contest, model, schedule(contest))


def _width(contest: Contest, wanted: float) -> float:
    """Return the width whose network has nearest to ``wanted`` forward MACs."""

    def macs(width: float) -> int:
        return count(replace(contest.blueprint, width=width).build(), contest.example).forward_macs

    contest.ledger.pause()  # a user would know the width
    try:
        low, high = 0.0, contest.blueprint.width
        for _ in range(12):
            middle = round((low + high) / 2, 5)
            low, high = (low, middle) if macs(middle) > wanted else (middle, high)
        found = min((width for width in (low, high) if width), key=lambda width: abs(macs(width) - wanted))
        share = macs(found) / contest.dense_macs
    finally:
        contest.ledger.resume()
    if abs(share / contest.macs_share - 1) > 0.05:
        raise InputError(
            f"no width gives {contest.macs_share:g} of the MACs", needed=f"{share:.3f}, the nearest",
            hint=f"--macs-share {share:.3f}",
        )  # fmt: skip
    return found
