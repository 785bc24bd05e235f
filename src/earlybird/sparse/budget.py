"""How many weights each layer keeps, and which: budgets and rankings over single weights.

For a share ``d`` of all ``N = sum n_l`` weights, layer ``l`` of shape ``(out, in, k_h, k_w)`` keeps

    uniform   d n_l
    erk       eps (out + in + k_h + k_w) / (out in k_h k_w) n_l,    at most n_l

with ``eps`` such that the sum is ``d N``; layers that would keep more than they have are whole, and the others share
what is left (Erdos-Renyi-Kernel: Evci et al., Rigging the Lottery, ICML 2020, arXiv 1911.11134, after Mocanu et al.,
arXiv 1707.04780). Under a budget over the whole ``network``, the largest scores stay wherever they are.

Ties are broken by position, so that equal scores give equal masks everywhere. No layer is emptied: one that would keep
nothing keeps its best weight, and gives the excess back where the budget is by layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from earlybird.errors import InputError

__all__ = ["BUDGETS", "best", "counts_for", "erk", "largest", "largest_by_layer", "uniform"]

BUDGETS = ("network", "erk", "uniform")


def uniform(shapes: Mapping[str, torch.Size], density: float) -> dict[str, int]:
    """Return how many weights each layer keeps if all keep the same share, in (0, 1]."""
    return _whole({name: density * math.prod(shape) for name, shape in shapes.items()}, shapes)


def erk(shapes: Mapping[str, torch.Size], density: float) -> dict[str, int]:
    """Return how many weights each layer keeps under Erdos-Renyi-Kernel; see the module for the equation.

    Args:
        shapes: Of the weights, by layer name.
        density: Share of all of them that stays, in (0, 1].
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    whole: set[str] = set()
    while True:
        free = [name for name in shapes if name not in whole]
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in whole)
        if not free:
            break
        scale = budget / sum(raw[name] * sizes[name] for name in free)
        over = {name for name in free if scale * raw[name] > 1}
        if not over:
            break
        whole |= over
    kept = {name: float(sizes[name]) if name in whole else scale * raw[name] * sizes[name] for name in shapes}
    return _whole(kept, shapes)


def counts_for(shapes: Mapping[str, torch.Size], density: float, budget: str) -> dict[str, int]:
    """Return `uniform` or `erk` counts."""
    return (erk if budget == "erk" else uniform)(shapes, density)


def _whole(kept: Mapping[str, float], shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """Round so that the sum is that of the budget: the largest remainders are rounded up. Every layer keeps one."""
    found = {name: max(math.floor(value), 1) for name, value in kept.items()}
    missing = round(sum(kept.values())) - sum(found.values())
    by_remainder = sorted(kept, key=lambda name: found[name] - kept[name])
    for name in by_remainder[: max(missing, 0)]:
        found[name] = min(found[name] + 1, math.prod(shapes[name]))
    return found


def largest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return masks of the ``count`` largest scores over all layers, and at least one a layer.

    Args:
        scores: By layer name, any shapes; ``-inf`` never stays.
        count: How many stay. A layer that would be emptied keeps its best one on top of them.

    Raises:
        InputError: All scores of a layer are ``-inf``, a score is not a number, or fewer than ``count`` may stay.
    """
    flat = _flat(scores)
    if count > int(torch.isfinite(flat).sum()):
        raise InputError(f"{count} weights are to stay, but only {int(torch.isfinite(flat).sum())} may")
    chosen = best(flat, count)
    masks = {}
    for (name, score), part in zip(scores.items(), chosen.split([score.numel() for score in scores.values()])):
        if not part.any():
            part[score.flatten().argmax()] = True
        masks[name] = part.reshape(score.shape).to(score.device)
    return masks


def best(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the ``count`` largest of ``scores``, shaped as they are; ties go to the first position."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[scores.flatten().argsort(descending=True, stable=True)[:count]] = True
    return chosen.reshape(scores.shape)


def largest_by_layer(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Return masks of the largest scores of each layer, ``counts[name]`` of them, at least one.

    Raises:
        InputError: As `largest`.
    """
    return {name: largest({name: score}, max(counts[name], 1))[name] for name, score in scores.items()}


def _flat(scores: Mapping[str, Tensor]) -> Tensor:
    for name, score in scores.items():
        if bool(score.isnan().any()):
            raise InputError(f"scores of layer '{name}' are not numbers", hint="lower lr, or prune earlier")
        if not bool(torch.isfinite(score).any()):
            raise InputError(f"no weight of layer '{name}' may stay", needed="at least one a layer")
    first = next(iter(scores.values())).device
    return torch.cat([score.detach().flatten().float().to(first) for score in scores.values()])
