"""Draw a ticket: rank all channels of a network against each other and keep the best.

You et al., Drawing Early-Bird Tickets, ICLR 2020, arXiv 1909.11957
(reference code: github.com/RICE-EIC/Early-Bird-Tickets):
``mask = score > threshold`` with one threshold for the whole network, the ``int(N * (1 - keep))``-th smallest score.

Deviations, each with the published behaviour as an option:

- ``round(keep * N)`` channels stay (more where a layer would lose all, or blocks must keep equally many), ties broken
  by order; ``strict=True`` is the published comparison, which
  keeps one less and, where all scores are equal (an untrained network), none;
- at least one channel stays in each layer, also with ``strict=True``;
- with ``example_inputs`` the coupling of channels is known: channels of a residual sum stay whole, as published
  (there by hand, layer by layer), or go as one group;
- ``scope='layer'`` ranks each layer by itself, so that every layer keeps the same share;
- ``macs_share`` bounds what the ticket costs: each score is divided by a power of what its channel costs, the smallest
  power that fits the bound, and no layer keeps less than half of ``keep`` (without that floor, a bound on a short run
  starves single layers: VGG-16 at half width kept 32 of 256 channels in one, and lost two points).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from earlybird.calls import unwrapped
from earlybird.errors import InputError, nearest
from earlybird.settings import check_choice, check_count, check_share
from earlybird.tickets.coupling import Group, Member, find_groups
from earlybird.tickets.layers import width
from earlybird.tickets.scores import score_channels
from earlybird.tickets.ticket import Ticket
from earlybird.tickets.units import Units, find_units, score_units

Coupled = Literal["whole", "group"]
Scope = Literal["network", "layer"]
# The score of a channel that is gone already: below all others, none of which is negative.
ABSENT = -1.0
# With a bound on MACs, no layer keeps less than this share of `keep`.
_FLOOR = 0.5


def draw(
    model: nn.Module,
    keep: float = 0.5,
    *,
    score: str = "bn_scale",
    scores: Mapping[str, Tensor] | None = None,
    example_inputs: Any = None,
    coupled: Coupled = "whole",
    scope: Scope = "network",
    macs_share: float | None = None,
    strict: bool = False,
) -> Ticket:
    """Draw a ticket over the channels of every batch norm. Pure: the model is not changed.

    Args:
        model: Any module with batch norms (or, for ``score='magnitude'``, convolutions and linear layers).
        keep: Share of the ranked channels that stay, in (0, 1].
        score: ``'bn_scale'`` (published), ``'taylor'`` (needs gradients) or ``'magnitude'``.
        scores: Layer name to scores ``(channels,)``, instead of ``score``; larger stays.
        example_inputs: Lets the coupling of channels be traced (see `earlybird.shrink`). Without it, each layer's mask
            stands for itself, and `earlybird.shrink` cuts what the masks of coupled layers agree on.
        coupled: What happens to channels of a residual sum when the coupling is known: ``'whole'`` leaves them all
            (``keep`` then counts among the others), ``'group'`` ranks each as one channel.
        scope: Rank the ``'network'`` as a whole, or each ``'layer'`` by itself.
        macs_share: Upper bound on the ticket's forward MACs as a share of the dense model's; needs ``example_inputs``.
        strict: Compare with the published ``score > threshold``, which is over the whole network.

    Returns:
        The ticket; its provenance holds score, keep ratio and options.

    Raises:
        InputError: ``keep`` outside (0, 1], no layer to rank, scores that do not fit, or a bound that cannot be met.
    """
    keep = check_share("keep", keep)
    if coupled not in ("whole", "group"):
        raise InputError(f"coupled is {coupled!r}", needed="'whole' or 'group'")
    if scope not in ("network", "layer"):
        raise InputError(f"scope is {scope!r}", needed="'network' or 'layer'")
    if strict and scope == "layer":
        raise InputError("strict is the published threshold over the whole network", hint="use scope='network'")
    model = unwrapped(model)
    values = dict(scores) if scores is not None else score_channels(model, score)
    _check_scores(values, model)
    if macs_share is not None:
        macs_share = check_share("macs_share", macs_share)
    if example_inputs is None:
        if macs_share is not None:
            raise InputError("macs_share needs the model's graph", hint="pass example_inputs")
        alone = {name: value.detach().float().cpu() for name, value in values.items()}
        masks = _rank(alone, keep, scope=scope, strict=strict)
    else:
        groups = find_groups(model, example_inputs)
        masks = draw_coupled(values, groups, keep, coupled=coupled, scope=scope, macs_share=macs_share, strict=strict)
    provenance = {"score": score if scores is None else "given", "keep": keep, "coupled": coupled, "scope": scope}
    if strict:
        provenance["strict"] = True
    if macs_share is not None:
        provenance["macs_share"] = macs_share
    return Ticket(masks, provenance=provenance)


def draw_units(
    model: nn.Module,
    *,
    keep_heads: float = 2 / 3,
    keep_neurons: float = 0.6,
    score: str = "magnitude",
    scores: Mapping[str, Tensor] | None = None,
    head_scope: Scope = "layer",
    neuron_scope: Scope = "network",
    round_to: int = 1,
    generator: torch.Generator | None = None,
) -> Ticket:
    """Draw a ticket over the attention heads and feed-forward neurons of a transformer. Pure: nothing is changed.

    Chen et al., EarlyBERT, ACL 2021, arXiv 2101.00063: heads are ranked layer by layer, neurons over the network.
    Deviation: of n ranked ones exactly ``round(keep * n)`` stay, ties broken by order; published, those above the
    quantile, one less. At least one head and one neuron stay in each layer.

    Args:
        model: See `earlybird.tickets.units.find_units`.
        keep_heads: Share of the heads that stay, in (0, 1]; 1 leaves them out of the ticket.
        keep_neurons: The same of neurons.
        score: ``'magnitude'``, ``'taylor'`` (needs gradients) or ``'random'`` (needs ``generator``).
        scores: Name to scores ``(units,)``, instead of ``score``; larger stays. Learned coefficients, say.
        head_scope: Rank each ``'layer'`` by itself, or the ``'network'`` as a whole.
        neuron_scope: The same for neurons.
        round_to: Neurons of a layer are rounded up to a multiple of this.
        generator: For random scores.

    Returns:
        The ticket; its kinds are ``'head'`` and ``'neuron'``.

    Raises:
        InputError: No heads and neurons, an option or a score out of its range.
    """
    shares = {"head": check_share("keep_heads", keep_heads), "neuron": check_share("keep_neurons", keep_neurons)}
    scopes: dict[str, Scope] = {"head": head_scope, "neuron": neuron_scope}
    for name, scope in scopes.items():
        check_choice(f"{name}_scope", scope, ("network", "layer"))
    check_count("round_to", round_to, "64", optional=False)
    model = unwrapped(model)
    values = score_units(model, score, generator) if scores is None else scores
    found = find_units(model)
    _check_unit_scores(values, found)
    masks: dict[str, Tensor] = {}
    for kind, scope in scopes.items():
        ranked = {
            name: value.detach().float().cpu() for name, value in values.items()
            if found[name].kind == kind and shares[kind] < 1
        }  # fmt: skip
        if ranked:
            masks |= _rank(ranked, shares[kind], scope=scope, round_to=round_to if kind == "neuron" else 1)
    if not masks:  # everything stays
        masks = {name: torch.ones(found[name].count, dtype=torch.bool) for name in values}
    return Ticket(
        masks,
        {name: found[name].kind for name in masks},
        {
            "score": score if scores is None else "given", "keep_heads": keep_heads, "keep_neurons": keep_neurons,
            "head_scope": head_scope, "neuron_scope": neuron_scope,
        },
    )  # fmt: skip


def _check_unit_scores(scores: Mapping[str, Tensor], found: Mapping[str, Units]) -> None:
    if not scores:
        raise InputError("no scores to rank", needed="scores of at least one layer")
    for name, value in scores.items():
        if name not in found:
            raise InputError(f"scores of '{name}', which has no heads or neurons", hint=nearest(name, found))
        if value.shape != (found[name].count,):
            raise InputError(
                f"scores of '{name}' have shape {tuple(value.shape)}",
                needed=f"({found[name].count},), one a {found[name].kind}",
            )
        if not torch.isfinite(value).all():
            raise InputError(f"scores of '{name}' are not finite", needed="finite scores")


def _check_scores(scores: Mapping[str, Tensor], model: nn.Module) -> None:
    modules = dict(model.named_modules())
    if not scores:
        raise InputError("no scores to rank", needed="scores of at least one layer")
    for name, value in scores.items():
        found = width(modules[name]) if name in modules else None
        if found is None or value.shape != (found,):
            raise InputError(
                f"scores of '{name}' have shape {tuple(value.shape)}", needed=f"({found},), one a channel of a layer"
            )
        if not torch.isfinite(value).all():
            raise InputError(f"scores of layer '{name}' are not finite", needed="finite scores")


def draw_coupled(
    scores: Mapping[str, Tensor],
    groups: list[Group],
    keep: float,
    *,
    coupled: Coupled = "whole",
    scope: Scope = "network",
    macs_share: float | None = None,
    round_to: int = 1,
    strict: bool = False,
) -> dict[str, Tensor]:
    """Rank channels in their coupled groups and return a mask for each scored layer.

    Args:
        scores: Layer name to scores ``(channels,)``.
        groups: From `earlybird.tickets.coupling.find_groups`.
        keep: Share of the free channels that stay.
        coupled: See `draw`.
        scope: See `draw`.
        macs_share: See `draw`.
        round_to: Multiple to which `shrink` will round widths up; the bound holds for what it leaves.
        strict: See `draw`.

    Returns:
        Layer name to boolean mask ``(channels,)``; layers in no free group stay whole.
    """
    cpu = {name: value.detach().float().cpu() for name, value in scores.items()}
    free = {group.producers[0]: group for group in groups if _is_free(group, cpu, coupled)}
    pooled: dict[str, Tensor] = {}
    for name, group in free.items():
        total, votes = torch.zeros(group.size), torch.zeros(group.size)
        for member in _scored(group, cpu):
            total.index_add_(0, member.root, cpu[member.name][member.local])
            votes.index_add_(0, member.root, torch.ones(len(member.root)))
        pooled[name] = total / votes.clamp_min(1)
    masks = {name: torch.ones(value.numel(), dtype=torch.bool) for name, value in cpu.items()}
    if keep == 1 and macs_share is None:
        return masks
    if not free:
        raise InputError(
            "none of the ranked channels is free to go: they are outputs of the model, parts of residual sums that "
            "stay whole, or read by functions that the graph cannot follow",
            hint="use coupled='group', or train this model dense",
        )
    prices = {name: max(group.macs_per_channel, 1.0) for name, group in free.items()}

    def pick(power: float) -> dict[str, Tensor]:
        weighed = {name: score / prices[name] ** power for name, score in pooled.items()} if power else pooled
        least = 0.0 if macs_share is None else _FLOOR * keep
        best = _rank(weighed, keep, scope=scope, strict=strict, least=least)
        return {name: _balanced(mask, weighed[name], free[name]) for name, mask in best.items()}

    chosen = pick(0.0) if macs_share is None else _within(macs_share, pick, groups, keep, round_to)
    for name, group in free.items():
        for member in _scored(group, masks):
            masks[member.name][member.local] = chosen[name][member.root]
    return masks


def ranked(sizes: Mapping[str, int], groups: list[Group], *, coupled: Coupled) -> dict[str, Tensor]:
    """Return which channels `draw_coupled` ranks: layer name to mask ``(channels,)``; the others always stay.

    Args:
        sizes: Layer name to the number of its channels, for all scored layers.
        groups: From `earlybird.tickets.coupling.find_groups`.
        coupled: See `draw`.
    """
    masks = {name: torch.zeros(size, dtype=torch.bool) for name, size in sizes.items()}
    for group in groups:
        if _is_free(group, masks, coupled):
            for member in _scored(group, masks):
                masks[member.name][member.local] = True
    return masks


def _scored(group: Group, scores: Mapping[str, Tensor]) -> list[Member]:
    return [member for member in group.members if member.name in scores and member.side != "in"]


def _is_free(group: Group, scores: Mapping[str, Tensor], coupled: Coupled) -> bool:
    """Tell whether channels of a group may go: scored, written by a layer, read by one, and not tied by blocks."""
    whole = group.output or group.uneven or not group.producers or (coupled == "whole" and group.residual)
    return not whole and bool(_scored(group, scores))


def shuffle(
    masks: Mapping[str, Tensor],
    groups: list[Group],
    generator: torch.Generator,
    among: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Replace a ticket's channels by as many random ones in each coupled group: the control experiment for a score.

    What the ticket is worth beyond the widths it found is what it gains over this (Su et al., arXiv 2009.11094).

    Args:
        masks: Layer name to mask ``(channels,)``, as `draw_coupled` returns them.
        groups: From `earlybird.tickets.coupling.find_groups`.
        generator: On the CPU.
        among: Masks like them, of the channels that there are to choose among; by default all.

    Returns:
        The new masks, and the random scores they rank by, both by layer name.
    """
    shuffled = dict(masks)
    scores = {name: torch.zeros(mask.numel()) for name, mask in masks.items()}
    for group in groups:
        members = _scored(group, masks)
        whole = _over_group(masks, group)
        score = torch.rand(group.size, generator=generator)
        if among is not None:
            score[~_over_group(among, group)] = ABSENT
        chosen = torch.zeros_like(whole)
        chosen[score.argsort(descending=True)[: int(whole.sum())]] = True
        chosen = _balanced(chosen, score, group)
        for member in members:
            shuffled[member.name] = shuffled[member.name].clone()
            shuffled[member.name][member.local] = chosen[member.root]
            scores[member.name][member.local] = score[member.root]
    return shuffled, scores


def group_masks(masks: Mapping[str, Tensor], groups: list[Group]) -> dict[str, Tensor]:
    """Return masks of layers as masks of the groups whose channels they are.

    Args:
        masks: Layer name to mask ``(channels,)``, as `draw_coupled` returns them.
        groups: From `earlybird.tickets.coupling.find_groups`.

    Returns:
        First producer of each group that has one to the mask over the group's channels.
    """
    return {group.producers[0]: _over_group(masks, group) for group in groups if group.producers}


def _over_group(masks: Mapping[str, Tensor], group: Group) -> Tensor:
    whole = torch.ones(group.size, dtype=torch.bool)
    for member in _scored(group, masks):
        whole[member.root] = masks[member.name][member.local]
    return whole


def keep_for_macs(
    scores: Mapping[str, Tensor],
    groups: list[Group],
    macs_share: float,
    *,
    coupled: Coupled = "whole",
    scope: Scope = "network",
    round_to: int = 1,
    tolerance: float = 0.05,
) -> float:
    """Find the ``keep`` with which the ticket's forward MACs are nearest to a share of the dense model's, by bisection.

    With a larger ``keep`` no layer gets narrower, so the share only rises. It rises in steps, one channel's cost (or
    that of ``round_to`` channels) at a time.

    Args:
        scores: Layer name to scores ``(channels,)``.
        groups: From `earlybird.tickets.coupling.find_groups`.
        macs_share: What is wanted, in (0, 1].
        coupled: See `draw`.
        scope: See `draw`.
        round_to: Multiple to which `shrink` will round widths up.
        tolerance: How far the ticket's share may lie from ``macs_share``, as a share of it.

    Returns:
        ``keep``, in (0, 1].

    Raises:
        InputError: No ``keep`` comes that near.
    """
    macs_share = check_share("macs_share", macs_share)

    def share(keep: float) -> float:
        masks = draw_coupled(scores, groups, keep, coupled=coupled, scope=scope)
        return macs_share_of(group_masks(masks, groups), groups, round_to)

    low, high = 1e-9, 1.0
    for _ in range(32):  # finer than one channel in any network
        middle = (low + high) / 2
        low, high = (low, middle) if share(middle) > macs_share else (middle, high)
    keep = min((low, high), key=lambda keep: abs(share(keep) - macs_share))
    found = share(keep)
    if abs(found - macs_share) > tolerance * macs_share:
        raise InputError(
            f"macs_share={macs_share:g} cannot be met",
            needed=f"one that the model can have, the nearest of which is {found:.3f}",
        )
    return keep


def macs_share_of(chosen: Mapping[str, Tensor], groups: list[Group], round_to: int = 1) -> float:
    """Return the forward MACs of a ticket as a share of the dense model's: a layer costs written times read channels.

    Args:
        chosen: First producer of a group to the mask over the group's channels; groups left out stay whole.
        groups: All groups of the model.
        round_to: Multiple to which widths are rounded up.
    """
    written: dict[str, float] = {}
    read: dict[str, float] = {}
    dense: dict[str, float] = {}
    for group in groups:
        mask = chosen.get(group.producers[0]) if group.producers else None
        kept = group.size if mask is None else min(-(-int(mask.sum()) // round_to) * round_to, group.size)
        share = kept / group.size
        for member in group.members:
            if member.name in group.macs_of:
                dense[member.name] = group.macs_of[member.name]
                side = read if member.side == "in" else written
                # a concatenation feeds one layer from several groups: shares add up by the channels they cover
                weight = 1.0 if member.side != "in" else group.covers[member.name]
                side[member.name] = side.get(member.name, 0.0) + share * weight
    total = sum(dense.values())
    left = sum(macs * written.get(name, 1.0) * min(read.get(name, 1.0), 1.0) for name, macs in dense.items())
    return left / total if total else 1.0


def _balanced(mask: Tensor, score: Tensor, group: Group) -> Tensor:
    """Let each block of a grouped convolution or group norm keep equally many, as near as can be to what was chosen."""
    for block in group.blocks:
        count = int(block.max()) + 1
        inside = block >= 0
        each = max(round(int(mask[inside].sum()) / count), 1)
        mask = mask.clone()
        mask[inside] = False
        for b in range(count):
            members = (block == b).nonzero().flatten()
            mask[members[score[members].argsort(descending=True, stable=True)[:each]]] = True
    return mask


def _within(
    bound: float, pick: Callable[[float], dict[str, Tensor]], groups: list[Group], keep: float, round_to: int
) -> dict[str, Tensor]:
    """Find the smallest power of the price that brings the ticket under the bound, by bisection."""
    low, high = 0.0, 4.0
    if macs_share_of(pick(low), groups, round_to) <= bound:
        return pick(low)
    least = macs_share_of(pick(high), groups, round_to)
    if least > bound:
        raise InputError(
            f"macs_share={bound} cannot be met with keep={keep}", needed=f"at least {least:.3f} for this model",
            hint="raise macs_share or lower keep",
        )  # fmt: skip
    for _ in range(24):
        middle = (low + high) / 2
        if macs_share_of(pick(middle), groups, round_to) > bound:
            low = middle
        else:
            high = middle
    return pick(high)


def _rank(
    scores: Mapping[str, Tensor],
    keep: float,
    *,
    scope: Scope = "network",
    strict: bool = False,
    least: float = 0.0,
    round_to: int = 1,
) -> dict[str, Tensor]:
    """Keep the best of all, or of each layer; every layer keeps one at least, its share ``least``, and a multiple."""
    sizes = [value.numel() for value in scores.values()]
    if scope == "layer":
        counts = [round(keep * size) for size in sizes]
    else:
        everything = torch.cat(list(scores.values()))
        total = everything.numel()
        if strict:
            dropped = int(round(total * (1 - keep), 6))  # 1 - 0.9 is a little less than 0.1
            flat = everything > everything.sort().values[dropped] if dropped else torch.ones(total, dtype=torch.bool)
        else:
            flat = torch.zeros(total, dtype=torch.bool)
            flat[everything.argsort(descending=True, stable=True)[: max(round(keep * total), 1)]] = True
        counts = [int(mask.sum()) for mask in flat.split(sizes)]
    masks: dict[str, Tensor] = {}
    for (name, score), count, size in zip(scores.items(), counts, sizes):
        count = max(count, round(least * size), 1)
        count = min(-(-count // round_to) * round_to, size)
        masks[name] = torch.zeros(size, dtype=torch.bool)
        masks[name][score.argsort(descending=True, stable=True)[:count]] = True
    return masks
