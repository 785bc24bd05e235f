"""Structural tickets: an unstructured ticket made into one that ordinary hardware runs faster.

Chen, Chen, Ma, Wang, Wang, Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets, ICML 2022,
https://arxiv.org/abs/2202.04736 (reference code: github.com/VITA-Group/Structure-LTH).

- `refill`: of a layer whose mask m keeps nnz(m) of C_out x C_in k k weights, the n best channels stay, whole,

      n = floor(nnz(m) / (C_in k k)),        with fill-back rate r:  n + floor((C_out - n) r)

  by one of `CRITERIA`. That is a ticket over channels, which `earlybird.shrink` cuts.
- `regroup`: rows of the mask (outputs) that share columns (inputs x kernel) are put into one part; of its columns, the
  i fullest become dense, with the least i for which each of its rows j has

      t1 * (weights of row j outside of these columns) < i,

  and all other weights of these rows go. That is a ticket over weights made of dense blocks, which
  `earlybird.sparse.blocks` multiplies one by one.

The ticket is then trained from the rewound weights (`earlybird.tickets.fixed`), not from the trained ones that ranked
the channels. What it saves: measured seconds and bytes; refilling in training and inference, regrouping in inference.
It does *not* pay at low sparsity, where a dense layer is as fast. Measured on a small VGG (``benchmarks/tickets.py``):
blocks are as accurate as dense and save more than half of the time, refilled channels are no better than random ones.
Both change how many weights stay; the share in the provenance is counted anew, after the cut.

Deviations:

- channels of residual sums, and those that the model does not show a way for, stay whole (published: masked, which
  saves nothing); so do layers without a mask. They are named in the provenance;
- parts are found by k-means with parts of equal size, instead of by hMETIS' hypergraph cut with an imbalance of 10;
- a layer is cut into at most one part per ``2 * least_rows`` outputs, since smaller parts would all be thrown away;
- of a part that is cut into blocks of ``block_rows`` and a rest that is too small to stay, the rows with the fewest
  weights in the dense columns are the rest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from earlybird.calls import as_call, first_sample, tensors_in, undisturbed, unwrapped
from earlybird.errors import InputError
from earlybird.settings import check_choice, check_count, check_number
from earlybird.sparse.block_kernel import Block
from earlybird.sparse.blocks import from_matrix, to_matrix
from earlybird.sparse.masks import check_fits, ticket_of
from earlybird.tickets.coupling import Group, find_groups
from earlybird.tickets.draw import ranked
from earlybird.tickets.shrink import shrink
from earlybird.tickets.ticket import Ticket

__all__ = ["CRITERIA", "budget", "cluster", "dense_columns", "feature_scores", "refill", "regroup", "regrouped"]

Criterion = Literal["remain", "magnitude", "l1", "l2", "saliency"]
CRITERIA = ("remain", "magnitude", "l1", "l2", "saliency")

PARTS = 8
T1 = 1.5
BLOCK_ROWS = 32
LEAST_ROWS = 16


def budget(mask: Tensor, fill_back: float = 0.0) -> int:
    """Return how many whole channels have as many weights as a mask keeps, at least one.

    Args:
        mask: Boolean, ``(O, I)`` or ``(O, I, kh, kw)``.
        fill_back: Share of the others that are given back, 0 to 1.
    """
    whole = int(mask.sum()) // math.prod(mask.shape[1:])
    return max(whole + math.floor((len(mask) - whole) * fill_back), 1)


def best(scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return a mask of exactly the ``count`` largest scores, ties broken by chance; shape ``(O,)``."""
    order = torch.randperm(len(scores), generator=generator)
    order = order[scores.cpu()[order].argsort(descending=True, stable=True)]
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen


def feature_scores(
    model: nn.Module, layers: Iterable[str], inputs: Any, criterion: Criterion, labels: Tensor | None = None
) -> dict[str, Tensor]:
    """Return what the feature maps of each layer come to on one batch, summed over samples and positions: name to (O,).

    Args:
        model: Trained and masked; it is left as found, and runs in eval mode.
        layers: Convolutions and linear layers.
        inputs: The batch.
        criterion: ``'l1'``: ``|a|``; ``'l2'``: ``a ** 2``; ``'saliency'``: ``|a dL/da|`` with the cross-entropy L.
        labels: Classes of the batch, int64 (N,), for the saliency.

    Raises:
        InputError: Labels are missing, or a layer does not run.
    """
    check_choice("criterion", criterion, CRITERIA[2:])
    slopes = criterion == "saliency"
    if slopes and labels is None:
        raise InputError("saliency needs the classes of the batch", hint="pass labels")
    model = unwrapped(model)
    maps: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> None:
        def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            maps[name] = output if output.requires_grad or not slopes else output.requires_grad_()
            return output.clone()  # what comes after may work in place

        module.register_forward_hook(keep)

    args, kwargs = as_call(inputs)
    with undisturbed(model), torch.set_grad_enabled(slopes):
        model.eval()
        for name in layers:
            watch(name, model.get_submodule(name))
        outputs = tensors_in(model(*args, **kwargs))
        missing = [name for name in layers if name not in maps]
        if missing:
            raise InputError(f"layer '{missing[0]}' is not called", hint="rank by magnitude, which needs no batch")
        if slopes:
            assert labels is not None
            found = torch.autograd.grad(functional.cross_entropy(outputs[0], labels), list(maps.values()))
            products = [(value.detach() * slope).abs() for value, slope in zip(maps.values(), found)]
        else:
            products = [value.abs() if criterion == "l1" else value.square() for value in maps.values()]
    weights = {name: model.get_submodule(name) for name in maps}
    return {
        name: product.sum([dim for dim in range(product.dim()) if dim != _channels(weights[name], product)])
        for name, product in zip(maps, products)
    }


def _channels(module: nn.Module, output: Tensor) -> int:
    return output.dim() - 1 if isinstance(module, nn.Linear) else 1


def refill(
    ticket: Ticket,
    model: nn.Module,
    example_inputs: Any,
    *,
    criterion: Criterion = "magnitude",
    fill_back: float = 0.0,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Ticket:
    """Return a ticket over whole channels that keeps as many weights of each layer as one over single weights.

    Layers whose channels cannot go (see `earlybird.tickets.coupling`) stay whole and are named in its provenance.

    Args:
        ticket: Over weights of ``model``.
        model: With the trained weights, for all criteria but ``'remain'``. It is left as found.
        example_inputs: A batch: one sample traces the model, and feature maps are those of all.
        criterion: ``'remain'``: surviving weights; ``'magnitude'``: sum of their absolute trained values; or see
            `feature_scores`.
        fill_back: See `budget`; published: 0 for IMP-Refill, above for IMP-Refill+.
        labels: Classes of the batch, for ``'saliency'``.
        generator: Breaks ties; by default one with seed 0.

    Raises:
        InputError: The ticket is not the model's, an option is out of its range, or no channel may go.
    """
    check_choice("criterion", criterion, CRITERIA)
    check_number("fill_back", fill_back, lambda value: 0 <= value <= 1, "0 to 1")
    model = unwrapped(model)
    weights = check_fits(ticket, model)
    masks = ticket.masks
    free = _free(masks, find_groups(model, first_sample(example_inputs)))
    if not free:
        raise InputError(
            "none of the ticket's layers has channels that are free to go",
            hint="'earlybird ticket regroup' makes blocks, which need no free channels",
        )
    if criterion == "remain":
        scores = {name: masks[name].flatten(1).sum(1) for name in free}
    elif criterion == "magnitude":
        held = {name: (weights[name].detach().cpu() * masks[name]).abs() for name in free}
        scores = {name: value.flatten(1).sum(1) for name, value in held.items()}
    else:
        scores = feature_scores(model, free, example_inputs, criterion, labels)
    generator = generator or torch.Generator().manual_seed(0)
    chosen = {name: best(scores[name], budget(masks[name], fill_back), generator) for name in free}
    whole = [name for name in masks if name not in chosen]
    smaller = copy.deepcopy(model)
    shrink(smaller, Ticket(chosen), first_sample(example_inputs))
    left = sum(smaller.get_parameter(f"{name}.weight").numel() for name in masks)
    provenance = {
        "method": "refill", "criterion": criterion, "fill_back": fill_back, "whole": whole, "source_keep": ticket.keep,
        "weights_kept": left / sum(mask.numel() for mask in masks.values()), "source": dict(ticket.provenance),
    }  # fmt: skip
    return Ticket(chosen, provenance=provenance)


def _free(masks: Mapping[str, Tensor], groups: list[Group]) -> list[str]:
    """Return the layers with a mask all of whose channels may go, without those of any other layer."""
    alone = {
        group.producers[0]: group
        for group in groups
        if len(group.producers) == 1 and not group.blocks and group.producers[0] in masks
    }
    may_go = ranked({name: len(mask) for name, mask in masks.items()}, list(alone.values()), coupled="whole")
    return [name for name, mask in may_go.items() if bool(mask.all())]


def cluster(rows: Tensor, parts: int, generator: torch.Generator, *, rounds: int = 20) -> Tensor:
    """Put rows of a mask that share columns into parts of equal size (up to one): the part of each row, int64 (R,).

    K-means by cosine, with rows that lose most by going elsewhere placed first.

    Args:
        rows: Boolean ``(R, K)``, none empty.
        parts: At most R.
        generator: Chooses the first row.
        rounds: At most; it ends when no row moves.
    """
    points = functional.normalize(rows.float())
    chosen = [int(torch.randint(len(rows), (), generator=generator))]
    while len(chosen) < parts:  # the row that is least like all those that parts begin with
        likest = (points @ points[chosen].t()).amax(1)
        likest[chosen] = torch.inf
        chosen.append(int(likest.argmin()))
    centres = points[chosen]
    found = torch.full((len(rows),), -1)
    for _ in range(rounds):
        likeness = points @ centres.t()  # (R, parts)
        placed = _placed(likeness)
        if torch.equal(placed, found):
            break
        found = placed
        centres = functional.normalize(torch.stack([points[found == part].sum(0) for part in range(parts)]))
    return found


def _placed(likeness: Tensor) -> Tensor:
    """Return the part of each row: in order of what a row loses by its second choice, the best that has room left."""
    rows, parts = likeness.shape
    room = [rows // parts + (part < rows % parts) for part in range(parts)]
    choices = likeness.argsort(dim=1, descending=True, stable=True)
    top = likeness.topk(min(2, parts), 1).values
    found = torch.full((rows,), -1)
    for row in (top[:, 0] - top[:, -1]).argsort(descending=True, stable=True).tolist():
        part = next(part for part in choices[row].tolist() if room[part])
        found[row] = part
        room[part] -= 1
    return found


def dense_columns(rows: Tensor, t1: float = T1) -> Tensor:
    """Return the columns of a part that become dense, ascending: the rule of the module's docstring.

    Args:
        rows: The part's rows of the mask, boolean ``(R, K)``, not all empty.
        t1: The larger, the more columns.
    """
    order = rows.sum(0).argsort(descending=True, stable=True)
    inside = rows[:, order].cumsum(1)
    outside = rows.sum(1, keepdim=True) - inside  # (R, K): of row j, with k + 1 columns
    enough = (t1 * outside < torch.arange(1, rows.shape[1] + 1)).all(0)
    return order[: int(enough.int().argmax()) + 1].sort().values


def regrouped(
    mask: Tensor,
    *,
    parts: int = PARTS,
    t1: float = T1,
    block_rows: int = BLOCK_ROWS,
    least_rows: int = LEAST_ROWS,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, list[Block]]:
    """Return a mask made of dense blocks, and these; or the mask itself and none, where no block is large enough.

    Args:
        mask: Boolean, ``(O, I)`` or ``(O, I, kh, kw)``.
        parts: See `regroup`.
        t1: See `regroup`.
        block_rows: See `regroup`.
        least_rows: See `regroup`.
        generator: See `cluster`; by default one with seed 0.
    """
    matrix = to_matrix(mask)
    alive = matrix.any(1).nonzero().flatten()
    number = min(parts, len(alive) // max(2 * least_rows, 1))
    number = max(number, 1)
    blocks: list[Block] = []
    if len(alive) > least_rows:
        part_of = cluster(matrix[alive], number, generator or torch.Generator().manual_seed(0))
        for part in range(number):
            rows = alive[part_of == part]
            columns = dense_columns(matrix[rows], t1)
            fullest = matrix[rows][:, columns].sum(1).argsort(descending=True, stable=True)
            whole = len(rows) // block_rows * block_rows
            for piece in (*fullest[:whole].split(block_rows), fullest[whole:]):
                if len(piece) > least_rows or len(piece) == block_rows:
                    blocks.append(Block(rows[piece].sort().values, columns))
    if not blocks:
        return mask.clone(), []
    new = torch.zeros_like(matrix)
    for block in blocks:
        new[block.rows[:, None], block.columns] = True
    return from_matrix(new, mask.shape), blocks


def regroup(
    ticket: Ticket,
    *,
    parts: int = PARTS,
    t1: float = T1,
    block_rows: int = BLOCK_ROWS,
    least_rows: int = LEAST_ROWS,
    generator: torch.Generator | None = None,
) -> Ticket:
    """Return a ticket whose masks are made of dense blocks; layers in which none is found keep theirs.

    `earlybird.sparse.blocks.find_blocks` reads the blocks off a mask. The provenance has their number in each layer.

    Args:
        ticket: Over single weights.
        parts: Into how many the outputs of a layer are put at most; published: 8.
        t1: Weights of a row that may go for each dense column; published: 1.5.
        block_rows: Blocks of more rows are cut into such ones and a rest; published: 32.
        least_rows: Parts, and rests, of at most so many rows are thrown away; published: 16.
        generator: See `cluster`; by default one with seed 0.

    Raises:
        InputError: Units are not single weights, or an option is out of its range.
    """
    for name, value in (("parts", parts), ("block_rows", block_rows)):
        check_count(name, value, "8", optional=False)
    check_number("least_rows", least_rows, lambda value: value >= 0 and value == int(value), "a whole number from 0")
    check_number("t1", t1, lambda value: value > 0, "a number above 0")
    other = next((kind for kind in ticket.kinds.values() if kind != "weight"), None)
    if other is not None:
        raise InputError(f"the ticket's units are of kind '{other}'", needed="a ticket over single weights")
    generator = generator or torch.Generator().manual_seed(0)
    masks, found = {}, {}
    for name, mask in ticket.masks.items():
        masks[name], blocks = regrouped(
            mask, parts=parts, t1=t1, block_rows=block_rows, least_rows=least_rows, generator=generator
        )
        found[name] = len(blocks)
    new = ticket_of(masks)
    settings = {"parts": parts, "t1": t1, "block_rows": block_rows, "least_rows": least_rows}
    about = {"blocks": found, "source_keep": ticket.keep, "weights_kept": new.keep, "source": dict(ticket.provenance)}
    return ticket_of(masks, method="regroup", **settings, **about)
