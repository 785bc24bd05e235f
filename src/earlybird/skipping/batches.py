"""Stochastic mini-batch dropping (SMD): leave batches out at random, and never touch what is left out.

Wang et al., "E2-Train: Training State-of-the-art CNNs with Over 80% Energy Savings", NeurIPS 2019,
https://arxiv.org/abs/1910.13349, section 3.1. Of the T batches that dense training would see,

    bernoulli (published)   each is left out with probability drop, by itself
    fixed (default)         of every epoch exactly round((1 - drop) * batches) are trained on, chosen at random

and both go through (1 - drop) * T steps. The choice hangs on (seed, epoch) alone, so a stopped run goes on anywhere. A
batch that is left out is not decoded, not augmented and not moved.

What it saves: steps, and with them seconds, MACs and joules in proportion, of any loop. The honest comparison is not
the whole run but one with as many steps: fewer epochs, the schedule shortened alike. It does *not* pay where that one
is as accurate, which is common when every epoch still sees new augmentations of all images.

Deviations: the number of steps is fixed, where the published one stops after T attempts; a batch that is left out makes
no optimizer step, where the published code lets momentum and weight decay move the weights on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler

from earlybird import ranks
from earlybird.calls import Call, Hook, as_optimizers, batch_size, unwrapped
from earlybird.data.loader import Loader
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_for, ledgers_on
from earlybird.settings import check_choice, check_number, option
from earlybird.stretches import Plan, Stretch

Batches = TypeVar("Batches", bound="Iterable[Any]")

_DROPPING = 4  # what a generator is for, beside those of `earlybird.data.loader`


@dataclass(frozen=True, kw_only=True)
class BatchDropping:
    """Hyper-parameters of stochastic mini-batch dropping; `attach` starts it, `Dropping.wrap` thins a loader.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    drop: float = option(0.5, "Share of the batches that are left out, from 0 to below 1.")
    drop_rule: str = option(
        "fixed", "'fixed': exactly that share of every epoch; 'bernoulli': each batch by itself (published)."
    )
    drop_clock: str = option(
        "executed", "Learning rate by the batches 'executed' or by those 'attempted'; both end at the same step."
    )

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "published": {"drop_rule": "bernoulli", "drop_clock": "attempted"},
    }

    def __post_init__(self) -> None:
        needed = "a share from 0 to below 1: some batches have to stay"
        check_number("drop", self.drop, lambda share: 0 <= share < 1, needed)
        check_choice("drop_rule", self.drop_rule, ("fixed", "bernoulli"))
        check_choice("drop_clock", self.drop_clock, ("executed", "attempted"))

    def selection(self, seed: int = 0) -> Selection:
        """Return which batches are trained on."""
        return Selection(self.drop, self.drop_rule, seed, by_attempts=self.drop_clock == "attempted")

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of a run with fewer steps, for `earlybird.forecast`."""
        keep = self.selection().length(plan.steps_per_epoch) / plan.steps_per_epoch
        return [replace(stretch, steps=keep * stretch.steps) for stretch in stretches]

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        loader: Any = None,
        ledger: Ledger | None = None,
        seed: int = 0,
    ) -> Dropping:
        """Start dropping. In a loop of your own, `Dropping.wrap` then thins its loader.

        Args:
            model: The module that is trained.
            optimizer: Its optimizer, or several.
            loader: A `Loader` that has this method's `selection` already, as in the shipped loop.
            ledger: Where to record; by default an own one, which `Dropping.bill` reads.
            seed: Of the choice of batches.
        """
        return Dropping(self, model, optimizer, loader, ledger, seed)


class Selection:
    """Which batches of which epochs are trained on: a function of (seed, epoch) alone.

    Args:
        drop: Share that is left out.
        rule: ``'fixed'`` or ``'bernoulli'``.
        seed: From 0.
        by_attempts: Whether schedules go by the batches attempted.
    """

    def __init__(self, drop: float, rule: str, seed: int, *, by_attempts: bool = False) -> None:
        self.drop, self.rule, self.seed, self.by_attempts = drop, rule, seed, by_attempts
        self._ends: dict[int, list[int]] = {}

    def length(self, batches: int) -> int:
        """Return how many of an epoch's batches are trained on, in the mean; at least one."""
        return max(round((1 - self.drop) * batches), 1)

    def kept(self, epoch: int, batches: int) -> Tensor:
        """Return whether each of an epoch's batches is trained on, bool (batches,)."""
        entropy = (_DROPPING, self.seed, epoch)
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        drawn = torch.rand(batches, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if self.rule == "bernoulli":
            return drawn >= self.drop
        chosen = torch.zeros(batches, dtype=torch.bool)
        chosen[drawn.topk(self.length(batches)).indices] = True
        return chosen

    def positions(self, first: int, batches: int) -> Iterator[tuple[int, int]]:
        """Return (epoch, batch) of each batch that is trained on, without end, from the ``first`` of all, from 0."""
        epoch, skipped = self._find(first, batches)
        for number in count(epoch):
            kept = self.kept(number, batches).nonzero().flatten().tolist()
            yield from ((number, batch) for batch in kept[skipped:])
            skipped = max(skipped - len(kept), 0)

    def _find(self, first: int, batches: int) -> tuple[int, int]:
        """Return the epoch in which the batch after ``first`` ones lies, and how many of that epoch's come before."""
        if self.rule == "fixed":
            return divmod(first, self.length(batches))
        ends = self._ends.setdefault(batches, [])  # how many are trained on up to the end of each epoch
        while not ends or ends[-1] <= first:
            ends.append((ends[-1] if ends else 0) + int(self.kept(len(ends), batches).sum()))
        epoch = bisect_right(ends, first)
        return epoch, first - (ends[epoch - 1] if epoch else 0)

    def attempt(self, executed: int, batches: int) -> int:
        """Return how many batches had been attempted before the one that comes after ``executed`` ones."""
        epoch, batch = next(self.positions(executed, batches))
        return epoch * batches + batch


class Dropping:
    """Running stochastic mini-batch dropping, made by `BatchDropping.attach`."""

    def __init__(
        self,
        settings: BatchDropping,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        loader: Any,
        ledger: Ledger | None,
        seed: int,
    ) -> None:
        self.settings = settings
        ranks.check_alike(ranks.of_settings(settings, seed=seed), "all ranks leave out the same batches")
        self._selection = settings.selection(seed)
        self._samplers: list[_Thinned] = []
        self._left_out = 0.0  # batches, for each that is trained on
        if isinstance(loader, Loader) and loader.selection is not None:
            self._left_out = loader.whole_length / len(loader) - 1
        model = unwrapped(model)
        self._own_ledger = ledger is None
        self._ledger = ledger_for(model, as_optimizers(optimizer), ledger)
        self._handle = model.register_forward_pre_hook(Hook(self._before_forward, self), with_kwargs=True)

    def wrap(self, loader: Batches) -> Batches:
        """Return a loader of the same kind that passes over what is left out; use it in place of ``loader``.

        Each walk through it is the next epoch. Several loaders may be wrapped; the bill takes them to be thinned alike.

        Args:
            loader: A `torch.utils.data.DataLoader` over a data set with an index, a `Loader`, or a sequence of batches.

        Raises:
            InputError: A loader that cannot leave a batch out without making it first, or one with more batches than
                another rank's.
        """
        whole = _length(loader)
        ranks.check_alike([(str(whole), "batches")], "a DistributedSampler gives each rank as many")
        self._left_out = whole / self._selection.length(whole) - 1
        if isinstance(loader, Loader):
            loader.selection = self._selection
            return loader
        if isinstance(loader, DataLoader):
            sampler = _Thinned(loader.batch_sampler, self._selection)
            self._samplers.append(sampler)
            return _with_batch_sampler(loader, sampler)  # type: ignore[return-value]
        thinned = _Thinned(loader, self._selection)
        self._samplers.append(thinned)
        return thinned  # type: ignore[return-value]

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return nothing: how many batches are left out does not change."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state: in which epoch each wrapped loader is, and what the own ledger holds."""
        return {
            "epochs": [sampler.epoch for sampler in self._samplers],
            "ledger": self._ledger.state_dict() if self._own_ledger else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; loaders are wrapped before, in the same order.

        Raises:
            InputError: Another number of loaders is wrapped.
        """
        if len(state["epochs"]) != len(self._samplers):
            raise InputError(
                f"{len(self._samplers)} loaders are wrapped, {len(state['epochs'])} were",
                hint="call wrap(loader) before load_state_dict",
            )
        for sampler, epoch in zip(self._samplers, state["epochs"]):
            sampler.epoch = int(epoch)
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Take the hook off the model; wrapped loaders stay thinned."""
        self._handle.remove()
        if self._own_ledger:
            self._ledger.stop()

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training and torch.is_grad_enabled() and self._left_out:
            images = batch_size(Call(tuple(args), dict(kwargs)))
            for ledger in ledgers_on(module, self._ledger):
                ledger.leave_out(images * self._left_out, self._left_out)


class _Thinned(Sampler[Any]):
    """A sampler of batches (or a sequence of them) that passes over some; each walk is the next epoch."""

    def __init__(self, batches: Any, selection: Selection) -> None:
        self.batches, self.selection = batches, selection
        self.epoch = 0

    def __len__(self) -> int:
        return self.selection.length(len(self.batches))

    def __iter__(self) -> Iterator[Any]:
        # a walk begins with its first batch: a DataLoader with workers makes two iterators and throws one away
        epoch, self.epoch = self.epoch, self.epoch + 1
        kept = self.selection.kept(epoch, len(self.batches)).tolist()
        if isinstance(self.batches, Sequence):
            yield from (self.batches[index] for index, stays in enumerate(kept) if stays)
            return
        # of a sampler, the numbers of the samples that are left out are drawn, so that the others stay the same
        yield from (batch for batch, stays in zip(islice(self.batches, len(kept)), kept) if stays)


def _length(loader: Any) -> int:
    """Return the number of batches, or refuse a loader that cannot leave one out."""
    if isinstance(loader, Loader):
        return loader.whole_length
    if isinstance(loader, DataLoader):
        if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            raise InputError(
                "this DataLoader makes its batches one after the other, without an index",
                needed="a data set with __getitem__, and a batch size",
            )
        return len(loader.batch_sampler)  # type: ignore[arg-type]
    if isinstance(loader, Sequence):
        return len(loader)
    raise InputError(
        f"a {type(loader).__name__} cannot leave batches out without making them",
        needed="a torch.utils.data.DataLoader, an earlybird Loader, or a sequence of batches",
    )


def _with_batch_sampler(loader: DataLoader[Any], sampler: _Thinned) -> DataLoader[Any]:
    return type(loader)(
        loader.dataset,
        batch_sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
        prefetch_factor=loader.prefetch_factor,
    )
