"""Train, prune, fine-tune: what most people do who want a small network, with the library Torch-Pruning 1.6.

Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, arXiv 2301.12900; github.com/VainF/Torch-Pruning.

Settings are those of the library's own CIFAR experiments (reproduce/main.py and readme.md there): one ranking over the
network (``--global-pruning``), ``pruning_ratio=1.0`` in ``iterative_steps=400`` small steps which end as soon as the
MACs are those asked for, the classifier left alone. Its importance classes are used as they are:
`GroupMagnitudeImportance` with ``p=2``, `GroupTaylorImportance` on the gradients of 10 batches (``--taylor_batchs`` of
its examples) and `BNScaleImportance`. As there, widths are not rounded.

Deviations: fine-tuning takes a third of the epochs (``--finetune-epochs``), from a tenth of the peak rate to 0. The
library's scripts fine-tune for 100 epochs after 200 of training, from a tenth of the rate of these, in steps.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch_pruning as tp
from torch import nn
from torch.nn import functional

from benchmarks.rivals.loop import Contest, dense_network, finetune, finetune_rate, fit
from earlybird.cost.count import count
from earlybird.errors import InputError

STEPS = 400
TAYLOR_BATCHES = 10


def magnitude(contest: Contest) -> tuple[nn.Module, float]:
    """Prune once by the L2 norm of the coupled weights, then fine-tune."""
    return _once(contest, tp.importance.GroupMagnitudeImportance(p=2))


def bn_scale(contest: Contest) -> tuple[nn.Module, float]:
    """Prune once by the scales of batch norm, without the sparse training that they were meant for, then fine-tune."""
    return _once(contest, tp.importance.BNScaleImportance())


def taylor(contest: Contest) -> tuple[nn.Module, float]:
    """Prune once by the first-order Taylor term |w g| of the coupled weights, then fine-tune."""
    return _once(contest, tp.importance.GroupTaylorImportance())


def gradual(contest: Contest) -> tuple[nn.Module, float]:
    """Prune a part by the L2 norm, fine-tune an epoch, and so on: as many parts as there are epochs of fine-tuning.

    The loop of the library's README (``for i in range(iterative_steps): pruner.step(); finetune(model)``). Each part
    takes away equally many MACs. The optimizer starts anew after each, since the library replaces the parameters.
    """
    model = dense_network(contest)
    rate, begin, parts = finetune_rate(contest), contest.recipe.epochs, contest.finetune_epochs
    accuracy = 0.0
    for part in range(1, parts + 1):
        share = 1 - (1 - contest.macs_share) * part / parts
        with contest.ledger.during("draw"):
            model = prune(contest, model, tp.importance.GroupMagnitudeImportance(p=2), share)
        accuracy = fit(contest, model, rate, first=begin + part - 1, last=begin + part)
    return model, accuracy


def _once(contest: Contest, importance: Any) -> tuple[nn.Module, float]:
    model = dense_network(contest)
    with contest.ledger.during("draw"):
        if isinstance(importance, tp.importance.GroupTaylorImportance):
            _accumulate_gradients(contest, model)
        model = prune(contest, model, importance, contest.macs_share)
        model.zero_grad()
    return model, finetune(contest, model)


def prune(contest: Contest, model: nn.Module, importance: Any, share: float) -> nn.Module:
    """Return a copy of ``model`` that the library has pruned to ``share`` of the dense network's forward MACs.

    The last step or the one before it, whichever comes nearer. The rival pays for the library's steps alone, not for
    the counts and copies with which the right one is found.

    Raises:
        InputError: The steps leave no network within 5 % of that.
    """
    ledger, wanted = contest.ledger, share * contest.dense_macs
    ledger.pause()
    model = _copy(model)
    macs = count(model, contest.example).forward_macs
    ledger.resume()
    pruner = tp.pruner.BasePruner(
        model.eval(),
        contest.example[:1],
        importance=importance,
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        ignored_layers=[
            m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == contest.blueprint.classes
        ],
    )
    before, macs_before = model, math.inf
    while macs > wanted and pruner.current_step < STEPS:
        ledger.pause()
        before, macs_before = _copy(model), macs
        ledger.resume()
        pruner.step()
        ledger.pause()
        macs = count(model, contest.example).forward_macs
        ledger.resume()
    if abs(macs_before - wanted) < abs(macs - wanted):
        model, macs = before, int(macs_before)
    if abs(macs - wanted) > 0.05 * wanted:
        raise InputError(
            f"Torch-Pruning's steps leave {macs / contest.dense_macs:.3f} of the MACs", needed=f"{share:.3f}",
            hint="choose another --macs-share",
        )  # fmt: skip
    return model


def _copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model with its gradients, which the Taylor importance reads."""
    twin = copy.deepcopy(model)
    for own, other in zip(twin.parameters(), model.parameters()):
        own.grad = None if other.grad is None else other.grad.clone()
    return twin


def _accumulate_gradients(contest: Contest, model: nn.Module) -> None:
    """Leave the summed gradients of some batches, in eval mode, as the library's examples do."""
    model.eval()
    contest.ledger.bits = 16
    contest.ledger.price_as(contest.count(model))
    for _, (images, labels) in zip(range(TAYLOR_BATCHES), contest.loader.epoch(contest.recipe.epochs)):
        with contest.autocast():
            logits = model.forward(images)
        functional.cross_entropy(logits.float(), labels).backward()
        contest.ledger.passes(len(images), training=True)
