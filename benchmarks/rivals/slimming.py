"""Pruning that is prepared during the training: network slimming and soft filter pruning."""

from __future__ import annotations

import torch
from torch import nn

import earlybird as eb
from benchmarks.rivals.loop import Contest, cut_to_cost, evaluate, finetune, fit, reestimate, schedule
from earlybird.tickets.coupling import find_groups
from earlybird.tickets.draw import draw_coupled, keep_for_macs
from earlybird.tickets.layers import TransposedConv
from earlybird.tickets.scores import batch_norms, bn_scale, filters, hidden_layers
from earlybird.tickets.ticket import Ticket

SCALE_AT_FIRST = 0.5


def network_slimming(contest: Contest) -> tuple[nn.Module, float]:
    """Train with an L1 term on the scales of batch norm, cut at one threshold over all of them, fine-tune.

    Liu et al., ICCV 2017, arXiv 1708.06519; github.com/Eric-mingjie/network-slimming. Settings of its README for VGG
    on CIFAR-10: ``--s 0.0001``, added to the gradient as ``s * sign(gamma)``; all scales begin at 0.5. That is for 160
    epochs: over a tenth of them the term pulls a tenth as far, so ``--sparsity`` can make it stronger.

    Deviations: fine-tuning takes a third of the epochs from a tenth of the rate (``--finetune-epochs``), there the
    whole recipe once more; channels of a residual sum go together, there an index layer picks them.
    """
    model = contest.build()
    norms = list(batch_norms(model).values())
    with torch.no_grad():
        for norm in norms:
            norm.weight.fill_(SCALE_AT_FIRST)

    def add_l1(_: nn.Module) -> None:
        for norm in norms:
            norm.weight.grad.add_(norm.weight.detach().sign(), alpha=contest.options.sparsity)

    fit(contest, model, schedule(contest), phase="search", regularise=add_l1)
    with contest.ledger.during("draw"):
        cut_to_cost(contest, model, bn_scale(model), contest.macs_share * contest.dense_macs)
    return model, finetune(contest, model)


def soft_filter_pruning(contest: Contest) -> tuple[nn.Module, float]:
    """After each epoch, zero the filters of each layer with the smallest L2 norm, but go on training them; cut at last.

    He et al., "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks", IJCAI 2018, arXiv 1808.06866;
    github.com/he-y/soft-filter-pruning. Settings of its scripts: one rate for all layers, from scratch, after every
    epoch (``--epoch_prune 1``). Only the weights are zeroed; their momentum, which brings them back, and batch norm
    are left.

    Nothing is saved before the cut, which comes after the last epoch; so widths are not rounded. Deviations: channels
    of a residual sum go together; the code, but not the paper's algorithm 1, zeroes before the first epoch as well,
    where ReLU and a shift of 0 would leave those filters without a gradient for ever; batch-norm statistics are
    estimated anew after the cut, since the cut takes away the constants that zeroed channels still put out. The last
    two favour the rival.
    """
    model = contest.build()
    groups = find_groups(model, contest.example[:1])
    keep = keep_for_macs(norms_of_filters(model), groups, contest.macs_share, coupled="group", scope="layer")
    masks: dict[str, torch.Tensor] = {}

    def zero(_: int) -> None:
        with contest.ledger.during("draw"):
            masks.update(draw_coupled(norms_of_filters(model), groups, keep, coupled="group", scope="layer"))
            zero_filters(model, masks)

    fit(contest, model, schedule(contest), after_epoch=zero)
    with contest.ledger.during("draw"):
        eb.shrink(model, Ticket(masks), contest.example[:1], groups=groups)
        contest.ledger.price_as(contest.count(model))
        reestimate(contest, model)
    contest.ledger.watch(model)
    contest.notes["keep"] = keep
    return model, evaluate(contest, model)


def norms_of_filters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the L2 norm of each filter: layer name to ``(channels,)``."""
    return {
        name: filters(name, layer, layer.weight.detach()).norm(dim=1) for name, layer in hidden_layers(model).items()
    }


@torch.no_grad()
def zero_filters(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    """Set the weights of the filters to zero that ``masks`` leaves out."""
    for name, layer in hidden_layers(model).items():
        dim = 1 if isinstance(layer, TransposedConv) else 0
        layer.weight.index_fill_(dim, (~masks[name]).nonzero().flatten().to(layer.weight.device), 0.0)
