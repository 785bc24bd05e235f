"""The ledger: what a run spends, by phase, while it runs.

Seconds are those of one monotonic clock, handed from phase to phase without a gap, so the phases add up to the time
between the first `Ledger.enter` and the last `Ledger.stop`, pauses left out. Samples are counted where they enter
the model, steps where the optimizer has made one; MACs and bytes moved follow from them and from a count of the
model (`earlybird.cost.count`), which is made anew after a shrink and for each size of images (of many sizes, the
first ones; the others are priced like the nearest one, in proportion to their pixels).

    ledger = Ledger()
    ledger.watch(model, optimizer)     # two hooks; any loop, accumulation and evaluation in between included
    ledger.enter("train")
    ...
    print(ledger.bill())

A forward pass in training mode with autograd on is charged as training (forward and backward); any other as forward
only. A forward pass in eval mode moves the clock from 'search' or 'train' to 'evaluate', and the next one in training
mode moves it back; what the loop does in between (loading the next batch, say) belongs to 'evaluate'.

The device is waited for where one phase hands over to the next, not at every step, so on an accelerator the seconds of
a phase are exact and those of a single step are the host's. Cost: some 5 us per step on a CPU (2026-11).
"""

from __future__ import annotations

import copy
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from earlybird import allocator
from earlybird.calls import (
    Call,
    Hook,
    as_optimizers,
    batch_size,
    first_sample,
    hook_owners,
    processes,
    tensors_in,
    unwrapped,
)
from earlybird.cost.arithmetic import Arithmetic
from earlybird.cost.bill import Bill, Counted, Estimated, Measured, Modelled, Spending
from earlybird.cost.count import Amount, ModelCost, count
from earlybird.cost.energy import CITATION, Energy, joules
from earlybird.cost.meters import PeakMemory, energy_meter
from earlybird.errors import InputError
from earlybird.sharded import is_sharded

__all__ = ["PHASES", "Ledger", "PhaseRecord", "Work", "ledger_for", "ledger_of", "ledgers_on"]

PHASES = ("setup", "search", "draw", "train", "evaluate", "lost")
"""The phases, in the order of the bill; 'lost' is time of a killed process that no checkpoint has (`Ledger.charge`)."""

_LOOP_PHASES = ("search", "train")
_WARM_UP_STEPS = 3  # compilation and first use of kernels happen here, once, however long the run
_COUNTED_SIZES = 16  # of images; loops whose every batch has another size must not be counted at every step
_METER_EVERY_S = 60.0  # the fastest energy counter wraps after some 20 minutes


@dataclass
class Work:
    """What went through the model at one width of arithmetic.

    Attributes:
        train_images: Samples of training passes (forward and backward), of all processes.
        train_batches: Batches they came in.
        forward_images: Samples of forward passes only.
        forward_batches: Batches they came in.
        updates: Optimizer steps, a batch seen by several optimizers being one; of all processes.
        left_images: Samples that a dense run would have trained on, and this one left out.
        left_batches: Batches they would have come in.
        left_forward_images: The same of forward passes only; below zero: those that a dense run would not have made.
        left_forward_batches: Batches they would have come in.
        macs: Multiply-accumulates of all that was done, by pass (`earlybird.cost.arithmetic.PASSES`).
        bit_macs: The same, weighted with the bits of both operands.
        operations: Primitive operations by name.
        moved_bytes: Bytes moved, each tensor once per pass.
    """

    train_images: int = 0
    train_batches: int = 0
    forward_images: int = 0
    forward_batches: int = 0
    updates: int = 0
    left_images: float = 0
    left_batches: float = 0
    left_forward_images: float = 0
    left_forward_batches: float = 0
    macs: dict[str, float] = field(default_factory=dict)
    bit_macs: dict[str, float] = field(default_factory=dict)
    operations: dict[str, float] = field(default_factory=dict)
    moved_bytes: float = 0

    def priced(self, cost: ModelCost, bits: int, routes: Mapping[Route, float] | None = None) -> Work:
        """Return the same passes with the operations and bytes of ``cost``.

        Args:
            cost: Of one sample.
            bits: Of the run's floating point.
            routes: Samples that passed some layers otherwise.
        """
        training = cost.amount(self.train_images, self.train_batches, bits, training=True)
        forward = cost.amount(self.forward_images, self.forward_batches, bits, training=False)
        for route, images in (routes or {}).items():
            amount = training if route.training else forward
            cost.exchange(amount, route.layers, images, bits, route.arithmetic, training=route.training)
        moved = (training.moved_bits + forward.moved_bits) / 8 + self.updates * cost.update_bytes
        return replace(
            self,
            macs=_sum(training.macs, forward.macs),
            bit_macs=_sum(training.bit_macs, forward.bit_macs),
            operations=_sum(training.operations, forward.operations),
            moved_bytes=int(moved) if moved == int(moved) else moved,
        )

    @classmethod
    def of(cls, amount: Amount) -> Work:
        """Return what passes of another model cost; their samples are not counted."""
        return cls(
            macs=dict(amount.macs),
            bit_macs=dict(amount.bit_macs),
            operations=dict(amount.operations),
            moved_bytes=amount.moved_bits / 8,
        )

    def add(self, other: Work) -> None:
        """Add ``other``, field by field."""
        for key in fields(self):
            ours, theirs = getattr(self, key.name), getattr(other, key.name)
            setattr(self, key.name, _sum(ours, theirs) if isinstance(ours, dict) else ours + theirs)

    def as_dense(self) -> Work:
        """Return the passes that a dense run would have made: those that were left out are done, no others."""
        images, batches = round(self.train_images + self.left_images), round(self.train_batches + self.left_batches)
        updates = round(self.updates * batches / max(self.train_batches, 1))  # as many batches a step
        return replace(
            self, train_images=images, train_batches=batches, updates=updates, left_images=0, left_batches=0,
            forward_images=round(self.forward_images + self.left_forward_images), left_forward_images=0,
            forward_batches=round(self.forward_batches + self.left_forward_batches), left_forward_batches=0,
        )  # fmt: skip


class Route(NamedTuple):
    """Layers that some samples pass in another arithmetic than the layers' own, or not at all (None)."""

    layers: tuple[str, ...]
    arithmetic: Arithmetic | None
    training: bool


def _total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        total = _sum(total, part)
    return total


def _sum(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    names = dict.fromkeys((*ours, *theirs))
    return {name: ours.get(name, 0) + theirs.get(name, 0) for name in names}


@dataclass
class PhaseRecord:
    """What one phase has spent.

    Attributes:
        seconds: Wall time.
        steps: Optimizer steps (a batch seen by several optimizers is one).
        work: What went through the model, by bits of arithmetic.
        peak_bytes: Peak memory, or None where it was not measured.
        joules: Measured energy, or None where there is no meter.
    """

    seconds: float = 0.0
    steps: int = 0
    work: dict[int, Work] = field(default_factory=dict)
    peak_bytes: int | None = None
    joules: float | None = None

    @property
    def images(self) -> int:
        """Samples that went through the model, in whatever kind of pass."""
        return sum(work.train_images + work.forward_images for work in self.work.values())

    @property
    def train_images(self) -> int:
        """Samples of training passes."""
        return sum(work.train_images for work in self.work.values())

    @property
    def macs(self) -> float:
        """Multiply-accumulates at whatever width."""
        return sum(sum(work.macs.values()) for work in self.work.values())

    @property
    def bit_macs(self) -> float:
        """MACs weighted with the share of 32 bits of both operands: 1 for fp32, 0.25 for bf16."""
        return sum(self.bit_macs_by_pass.values())

    @property
    def bit_macs_by_pass(self) -> dict[str, float]:
        """Bit-MACs of the forward, the error and the weight pass."""
        return _total(work.bit_macs for work in self.work.values())

    @property
    def operations(self) -> dict[str, float]:
        """Primitive operations by name, such as ``'mult fp32'``."""
        return _total(work.operations for work in self.work.values())

    @property
    def moved_bytes(self) -> float:
        """Bytes moved, each tensor once per pass."""
        return sum(work.moved_bytes for work in self.work.values())

    @property
    def energy(self) -> Energy:
        """Modelled energy of the work."""
        return joules(self.operations, self.moved_bytes)

    def spending(self) -> Spending:
        """Return a row of a bill with what is counted and modelled; nothing in it is measured."""
        energy = self.energy
        return Spending(
            seconds=None,
            steps=Counted(self.steps, "steps"),
            images=Counted(self.images, "images"),
            macs=Counted(self.macs, "MAC"),
            bit_macs=Counted(self.bit_macs, "MAC"),
            moved_bytes=Counted(self.moved_bytes, "B"),
            peak_bytes=None,
            joules=None,
            modelled_joules=Modelled(energy.low, energy.high, "J", CITATION),
            passes=self.bit_macs_by_pass,
            operations=self.operations,
        )

    def priced(self, cost: ModelCost) -> PhaseRecord:
        """Return the same passes, in the same time, at the price of ``cost``."""
        work = {bits: item.priced(cost, bits) for bits, item in self.work.items()}
        return replace(self, work=work)

    def as_dense(self) -> PhaseRecord:
        """Return the passes of a dense run, which leaves no batch out; their price and time are yet to be found."""
        work = {bits: item.as_dense() for bits, item in self.work.items()}
        more = sum(item.train_images for item in work.values()) / max(self.train_images, 1)
        return PhaseRecord(steps=round(self.steps * more), work=work)

    def add(self, other: PhaseRecord) -> None:
        """Add ``other``; the higher peak stays."""
        self.seconds += other.seconds
        self.steps += other.steps
        for bits, work in other.work.items():
            self.work.setdefault(bits, Work()).add(work)
        self.peak_bytes = _fold(max, self.peak_bytes, other.peak_bytes)
        self.joules = _fold(lambda a, b: a + b, self.joules, other.joules)

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers; `from_json` reads them."""
        return {**asdict(self), "work": {str(bits): asdict(work) for bits, work in self.work.items()}}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> PhaseRecord:
        """Rebuild what `to_json` wrote."""
        work = {int(bits): Work(**item) for bits, item in state["work"].items()}
        return cls(**{**state, "work": work})


class Ledger:
    """Record of a run's time, work, memory and energy, by phase.

    Args:
        device: Where the model runs; decides which meters are read.
        world_size: Processes that train together and see equally many samples; counts are for all of them, seconds,
            memory and joules for this one.
        clock: Monotonic clock, seconds.

    Attributes:
        cost: Count of the model as it is now, or None before the first.
        dense_cost: Count of the model as it was first seen, or None.
    """

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        world_size: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device = torch.device(device)
        self.cost: ModelCost | None = None
        self.dense_cost: ModelCost | None = None
        self._world_size = world_size
        self._clock = clock
        self._records: dict[str, PhaseRecord] = {}
        self._bits = 32
        self._declared: str | None = None  # phase as entered
        self._current: str | None = None  # phase of the clock: the declared one, or for a while 'evaluate'
        self._since: float | None = None  # None: the clock stands
        self._routes: dict[Route, float] = {}  # samples of them that passed some layers otherwise
        self._pending = Work()  # passes of the current phase, width and model that are not priced yet
        self._open: str | None = None  # phase in which the training pass that awaits its optimizer step was made
        self._size: tuple[int, ...] | None = None  # of the images that `cost` was counted on, without the batch
        self._costs: dict[tuple[int, ...], ModelCost] = {}  # the model as it is now, by that size
        self._told = False  # `cost` was given by `price_as` before the first images, whose size it is for
        self._counted_model: weakref.ref[nn.Module] | None = None  # that of `cost`
        self._uncounted = ""  # why there is no count
        self._shrunk = False
        self._resized = False  # training images are smaller than they came
        self._dense_over = False  # a dense run would have ended by now
        self._altered = False  # layers compute otherwise than a dense run's, or not on all samples
        self._beyond_s: float | None = None  # seconds of set-up that a dense run does not need; None: nothing was so
        self._warm_up = (0.0, 0, 0)  # seconds, steps and training samples of the first steps of the loop
        self._evaluation_begin = (0.0, 0)  # seconds and samples of 'evaluate' when the clock came there
        self._dense_search: PhaseRecord | None = None  # the search as far as the model was whole
        self._dense_evaluation: float | None = None  # seconds a sample in the fastest evaluation before the shrink
        self._model: nn.Module | None = None  # without the wrappers of DDP and torch.compile
        self._sample: Any = None
        self._dense_sample: Any = None  # what `dense_cost` was counted on: whole images, where they are resized later
        self._handles: list[Any] = []
        self._peak = PeakMemory(self.device)
        self._energy = energy_meter(self.device)
        self._joules_before = 0.0
        self._energy_read_at = 0.0

    # ---- phases ----

    def enter(self, phase: str) -> None:
        """Start the clock, or hand it over: from now on everything belongs to ``phase``.

        Raises:
            InputError: ``phase`` is not one of `PHASES`.
        """
        self._switch(phase)
        self._declared = phase

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Charge a block to ``phase`` and go back to the phase before (or stand still again) after it."""
        declared, current, running = self._declared, self._current, self._since is not None
        self.enter(phase)
        try:
            yield
        finally:
            if running and current is not None:
                self._switch(current)
            else:
                self.pause()
                self._current = current
            self._declared = declared

    @contextmanager
    def beyond_dense(self) -> Iterator[None]:
        """Let a block, such as passes of a teacher, be something that a dense run would not do.

        In set-up, its seconds are left out of the dense estimate. In the loop, its steps are not like dense ones, so
        that no time of a dense run is known.
        """
        begun = {ledger: (ledger._clock(), ledger._current) for ledger in self._watching() if ledger._since is not None}
        yield
        for ledger, (since, phase) in begun.items():
            more = ledger._clock() - since if phase == "setup" else 0.0
            ledger._beyond_s = (ledger._beyond_s or 0.0) + more
            ledger._altered = ledger._altered or phase in _LOOP_PHASES

    def pause(self) -> None:
        """Stop the clock and the counters until `resume` or `enter`."""
        self._close()
        self._since = None

    def resume(self) -> None:
        """Let the clock run on in the phase in which it was paused."""
        if self._since is None and self._current is not None:
            self._switch(self._current)

    def stop(self) -> None:
        """Stop the clock and remove the hooks; the records stay."""
        self.pause()
        self.unwatch()

    def charge(self, phase: str, seconds: float) -> None:
        """Add ``seconds`` that this ledger's clock has not seen, such as time lost between a checkpoint and a kill."""
        self._record(phase).seconds += seconds

    @property
    def phase(self) -> str | None:
        """The phase to which the clock belongs now, or None before the first `enter`."""
        return self._current

    @property
    def phases(self) -> dict[str, PhaseRecord]:
        """The records up to this moment, in the order of `PHASES`."""
        self._settle()
        self._price()
        return {name: self._records[name] for name in PHASES if name in self._records}

    @property
    def seconds(self) -> float:
        """Seconds of all phases up to this moment."""
        self._settle()
        return sum(record.seconds for record in self._records.values())

    @property
    def bits(self) -> int:
        """Width of the arithmetic of what follows, 32 or 16; assign it when the precision changes."""
        return self._bits

    @bits.setter
    def bits(self, value: int) -> None:
        if value not in (16, 32):
            raise InputError(f"arithmetic of {value!r} bits", needed="32 or 16")
        self._price()
        self._bits = value

    # ---- the model ----

    def watch(
        self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None, example_inputs: Any = None
    ) -> None:
        """Count samples and steps from now on, by hooks on ``model`` and ``optimizer``; hooks set before are removed.

        The hooks work under `torch.compile`, before or after it (dynamo leaves them out of its graphs).

        Args:
            model: The model that the loop calls.
            optimizer: Its optimizer, or several. A batch that several of them step for is one step.
            example_inputs: A batch to count the model on; by default the first one that passes through it.

        Raises:
            InputError: The model does not run on ``example_inputs``.
        """
        self.unwatch()
        self._model = unwrapped(model)
        if self._counted_model is not None and self._counted_model() is not self._model:
            self._price()
            self.cost, self._size, self._told = None, None, False
            self._costs.clear()
        self._counted_model = weakref.ref(self._model)
        if example_inputs is not None:
            self._count(self._model, example_inputs)
        on_forward, on_step = Hook(self._on_forward, self), Hook(self._on_step, self)
        # before FSDP2's, which may cast the inputs for the layers it shards
        first = is_sharded(self._model)
        self._handles.append(self._model.register_forward_pre_hook(on_forward, with_kwargs=True, prepend=first))
        for one in as_optimizers(optimizer):
            self._handles.append(one.register_step_post_hook(on_step))

    def unwatch(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._model = None

    def passes(self, images: int, *, batches: int = 1, training: bool = False, inputs: Any = None) -> None:
        """Count samples that go through the model without its hooks (a caller that runs ``model.forward`` itself).

        Other ledgers that watch the model count them, too.

        Args:
            images: Samples, of this process.
            batches: Batches they come in.
            training: Forward and backward, or forward only.
            inputs: Some of them, where their size decides the price; by default it is that of the batch before.
        """
        for ledger in self._watching():
            if inputs is not None and ledger._model is not None:
                ledger._price_for(ledger._model, inputs)
            ledger._add_passes(images * ledger._world_size, batches * ledger._world_size, training=training)

    def _add_passes(self, images: int, batches: int, *, training: bool) -> None:
        """Count samples of all processes; what comes after the end of a dense run was none of it."""
        pending, over = self._pending, self._dense_over
        if training:
            pending.train_images += images
            pending.train_batches += batches
            pending.left_images -= images if over else 0
            pending.left_batches -= batches if over else 0
        else:
            pending.forward_images += images
            pending.forward_batches += batches
            pending.left_forward_images -= images if over else 0
            pending.left_forward_batches -= batches if over else 0

    def passes_of(self, cost: ModelCost, images: int, *, batches: int = 1, training: bool = False) -> None:
        """Charge passes of another model, such as a teacher, at its own price.

        Its samples are not counted: those are the watched model's, and a dense run would not need the other one.

        Args:
            cost: Of one sample.
            images: Samples, of this process.
            batches: Batches they come in.
            training: Forward and backward, or forward only.
        """
        for ledger in self._watching():
            if ledger._since is not None and ledger._current is not None:
                amount = cost.amount(
                    images * ledger._world_size, batches * ledger._world_size, ledger._bits, training=training
                )
                ledger._records[ledger._current].work.setdefault(ledger._bits, Work()).add(Work.of(amount))

    def _watching(self) -> list[Ledger]:
        """Return this ledger, and all others that watch its model."""
        return [self] if self._model is None else ledgers_on(self._model, self)

    def reroute(
        self, layers: Sequence[str], images: float, arithmetic: Arithmetic | None, *, training: bool
    ) -> None:  # fmt: skip
        """Say that samples of the passes just counted went through some layers otherwise than the model does.

        Args:
            layers: Module names, as in ``named_modules`` of the watched model; those that execute operations.
            images: Samples, of this process; a fraction where only a part of the layers' work is meant.
            arithmetic: What the layers computed these samples in, instead of their own; None: not at all.
            training: Whether they were training passes.
        """
        if self._since is None:  # nor were the passes counted
            return
        route = Route(tuple(layers), arithmetic, training)
        self._routes[route] = self._routes.get(route, 0) + images * self._world_size
        self._altered = True

    def leave_out(self, images: float, batches: float = 1) -> None:
        """Count samples, of this process, that dense training would have seen and this run never touches."""
        if self._since is None or self._dense_over:
            return
        self._pending.left_images += images * self._world_size
        self._pending.left_batches += batches * self._world_size

    def end_dense(self) -> None:
        """Say that a dense run would be over by now: it makes none of the passes that follow, evaluations included."""
        self._dense_over = True

    def reread_arithmetic(self) -> None:
        """Let all ledgers ask the layers of the watched model how they compute now; before, they keep their price."""
        for ledger in self._watching():
            ledger._settle()
            ledger._price()
            if ledger._model is not None:
                model = ledger._model
                ledger._costs = {size: cost.computing_as(model) for size, cost in ledger._costs.items()}
                ledger.cost = None if ledger.cost is None else ledger.cost.computing_as(model)
                ledger._altered = ledger._altered or (ledger.cost is not None and ledger.cost.altered)

    def passing(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield ``batches``, each counted as a forward pass below the hooks, at the price of its size."""
        for batch in batches:
            self.passes(batch_size(batch), inputs=batch)
            yield batch

    def count_whole(self, inputs: Any) -> None:
        """Count the model on images that are about to be made smaller, unless it was counted before.

        So that the dense run is priced at whole images, whatever the search saw.
        """
        self._resized = True
        if self.cost is None and self._model is not None and not self._uncounted:
            self._count_or_explain(self._model, inputs)

    def recount(self, model: nn.Module | None = None, example_inputs: Any = None) -> ModelCost | None:
        """Count the model again after its shape has changed; what came before keeps its price.

        Args:
            model: The model; the watched one by default.
            example_inputs: A batch; by default a sample of the one that the last count was made on.

        Returns:
            The new count, or None where nothing is known to run the model on: it is then counted on the next batch.
        """
        self._settle()
        self._price()
        self._shrunk = True
        search = self._records.get("search")
        if self._dense_search is None and search is not None and search.train_images:
            self._dense_search = copy.deepcopy(search)
        self._costs.clear()
        model = self._model if model is None else model
        inputs = self._sample if example_inputs is None else example_inputs
        self.cost = None
        if model is not None and inputs is not None and not self._uncounted:
            self._count_or_explain(model, inputs)
        return self.cost

    def reprice(self, dense: nn.Module) -> None:
        """Count the model again after a part of it was frozen, whose gradients cost nothing any more.

        What came before keeps its price; of a dense run that is only estimated, all is priced as if that part had been
        frozen from the beginning, which favours dense.

        Args:
            dense: The dense model with the same part frozen; the watched model itself where it was not shrunk.
        """
        self._settle()
        self._price()
        self._costs.clear()
        if self._model is not None and self._sample is not None and self.cost is not None:
            self._count(self._model, self._sample)
            self.dense_cost = _as_dense(count(dense, self._dense_sample))

    def price_as(self, cost: ModelCost) -> None:
        """Charge what follows at ``cost`` a sample, until the next count; what came before keeps its price.

        For a model whose cost changes to and fro, such as one whose layers are frozen for a while: counting it each
        time would take longer than the step. Images of another size are counted by themselves.
        """
        self._settle()
        self._price()
        self._costs.clear()
        self.cost, self._told = cost, not self._size
        if self._size:
            self._costs[self._size] = cost

    def _count(self, model: nn.Module, inputs: Any) -> None:
        self.cost = count(model, inputs)
        self._altered = self._altered or self.cost.altered
        self._sample = first_sample(inputs)
        self._size, self._told = _image_size(inputs), False
        self._counted_model = weakref.ref(unwrapped(model))
        if self._size is not None:
            self._costs[self._size] = self.cost
        if self.dense_cost is None and not self._shrunk:
            self.dense_cost = _as_dense(self.cost)
            self._dense_sample = self._sample

    def _on_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._since is None or self._model is None:
            return
        inputs = Call(tuple(args), dict(kwargs))
        self._price_for(self._model, inputs)
        samples = batch_size(inputs) * self._world_size
        training = self._model.training
        if training and self._current == "evaluate" and self._declared in _LOOP_PHASES:
            self._switch(self._declared)
        elif not training and self._current in _LOOP_PHASES:
            self._switch("evaluate")
        if training and torch.is_grad_enabled():
            self._open = self._current
        self._add_passes(samples, self._world_size, training=training and torch.is_grad_enabled())

    def _price_for(self, model: nn.Module, inputs: Any) -> None:
        """Let `cost` be that of the size of ``inputs``; what came before keeps its price."""
        size = _image_size(inputs)
        if self._told:
            self._size, self._told = size, False
            if size is not None and self.cost is not None:
                self._costs[size] = self.cost
        if self.cost is not None and size != self._size:
            self._price()
            self.cost, self._size = None if size is None else self._cost_of(size), size
        if self.cost is None and not self._uncounted:
            self._count_or_explain(model, inputs)

    def _cost_of(self, size: tuple[int, ...]) -> ModelCost | None:
        """Return the cost of images of this size, as counted or like the nearest one's; None: it is to be counted."""
        if size in self._costs or len(self._costs) < _COUNTED_SIZES:
            return self._costs.get(size)
        pixels = math.prod(size)
        nearest = min(self._costs, key=lambda known: abs(math.prod(known) - pixels))
        return self._costs[nearest].scaled(pixels / math.prod(nearest))

    def _count_or_explain(self, model: nn.Module, inputs: Any) -> None:
        """Count on the first batch that comes along; a model that cannot be counted must not stop its training."""
        try:
            self._count(model, inputs)
        except InputError as error:
            self._uncounted = str(error)
            warnings.warn(f"MACs are not counted: {error}", stacklevel=2)

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._since is None:
            return
        self._settle()
        if self._open is None:  # another optimizer has stepped for this batch: together they hold the parameters once
            return
        self._pending.updates += self._world_size
        record = self._records[self._open]
        record.steps += 1
        if self._open in _LOOP_PHASES and record.steps == _WARM_UP_STEPS and not self._warm_up[1]:
            self._price()
            self._warm_up = (record.seconds, record.steps, record.train_images)
        self._open = None
        if self._energy is not None and self._since - self._energy_read_at > _METER_EVERY_S:
            self._energy_read_at = self._since
            self._energy.read()

    # ---- the clock ----

    def _record(self, phase: str) -> PhaseRecord:
        if phase not in PHASES:
            raise InputError(f"unknown phase {phase!r}", needed=f"one of {', '.join(PHASES)}")
        return self._records.setdefault(phase, PhaseRecord())

    def _switch(self, phase: str) -> None:
        """Hand the clock over to ``phase``, or start it."""
        record = self._record(phase)
        if self._since is not None and phase == self._current:
            return
        self._close()
        if self._current == "evaluate" != phase and not self._shrunk:
            self._note_evaluation()
        if phase == "evaluate" != self._current:
            self._evaluation_begin = (record.seconds, record.images)
        if "evaluate" not in (phase, self._current):  # there and back, every epoch: the same memory serves both
            allocator.give_back()
        self._current = phase
        self._peak.reset()
        self._joules_before = self._energy.read() if self._energy else 0.0
        if self._since is None:
            self._since = self._clock()

    def _close(self) -> None:
        """Bring the current phase's record up to date, meters included; the clock runs on in it."""
        if self._since is None or self._current is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._settle()
        self._price()
        record = self._records[self._current]
        record.peak_bytes = _fold(max, record.peak_bytes, self._peak.read())
        if self._energy is not None:
            now = self._energy.read()
            record.joules = (record.joules or 0.0) + now - self._joules_before
            self._joules_before = now

    def _note_evaluation(self) -> None:
        """Keep the speed of the fastest evaluation of the dense model: the first one may include a compilation."""
        seconds, images = self._evaluation_begin
        record = self._records["evaluate"]
        if record.images > images:
            rate = (record.seconds - seconds) / (record.images - images)
            self._dense_evaluation = _fold(min, self._dense_evaluation, rate)

    def _settle(self) -> None:
        """Add the time since the last call to the current phase."""
        if self._since is None or self._current is None:
            return
        now = self._clock()
        self._records[self._current].seconds += now - self._since
        self._since = now

    def _price(self) -> None:
        """Move the pending passes into the current record, at the current model's and width's price."""
        if self._current is None or self._pending == Work():
            return
        work = self._pending if self.cost is None else self._pending.priced(self.cost, self._bits, self._routes)
        self._records[self._current].work.setdefault(self._bits, Work()).add(work)
        self._pending = Work()
        self._routes.clear()

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """Return everything recorded so far as plain numbers and text (JSON-able)."""
        self._close()
        return {
            "phases": {name: record.to_json() for name, record in self.phases.items()},
            "bits": self._bits,
            "cost": None if self.cost is None else self.cost.to_json(),
            "dense_cost": None if self.dense_cost is None else self.dense_cost.to_json(),
            "differs": [self._shrunk, self._resized, self._altered],
            "dense_over": self._dense_over,
            "beyond_s": self._beyond_s,
            "warm_up": list(self._warm_up),
            "dense_search": None if self._dense_search is None else self._dense_search.to_json(),
            "dense_evaluation": self._dense_evaluation,
            "uncounted": self._uncounted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Add the records of ``state`` to this ledger's, so that the time a resuming process has spent so far stays.

        Phase, clock and hooks stay as they are, as does a count that was already made of the model as it is now.
        """
        for name, record in state["phases"].items():
            self._record(name).add(PhaseRecord.from_json(record))
        self.bits = state["bits"]
        if self.cost is None and state["cost"] is not None:
            # sums only, until the next batch is counted layer by layer: no image has this size
            self.cost, self._size = ModelCost.from_json(state["cost"]), ()
        if state["dense_cost"] is not None:
            self.dense_cost = ModelCost.from_json(state["dense_cost"])
        self._shrunk, self._resized, self._altered = state["differs"]
        self._dense_over = bool(state.get("dense_over"))  # checkpoints of before lack it, and the next one
        self._beyond_s = _fold(lambda a, b: a + b, self._beyond_s, state.get("beyond_s"))
        seconds, steps, images = state["warm_up"]
        self._warm_up = (seconds, steps, images)
        self._dense_search = None if state["dense_search"] is None else PhaseRecord.from_json(state["dense_search"])
        self._dense_evaluation = state["dense_evaluation"]
        self._uncounted = state["uncounted"]

    # ---- the bill ----

    def bill(self, dense: Bill | None = None) -> Bill:
        """Return what was spent so far, against a dense run.

        Args:
            dense: The bill of a dense run that was measured. Without it, dense is estimated from this run's own search
                phase, once a ticket is drawn.
        """
        self._close()
        if dense is None:
            dense = self._dense_estimate()
        return Bill(
            phases={name: self._spending(record) for name, record in self.phases.items()},
            device=str(self.device),
            parameters=None if self.cost is None else self.cost.parameters,
            dense=dense,
        )

    @property
    def total(self) -> Spending:
        """What was spent so far, all phases together."""
        self._close()
        return Bill(phases={name: self._spending(record) for name, record in self.phases.items()}).total

    def _spending(self, record: PhaseRecord, *, basis: str = "") -> Spending:
        row = record.spending()
        if record.images and self._uncounted:
            row = replace(
                row, macs=None, bit_macs=None, moved_bytes=None, modelled_joules=None, passes=None, operations=None
            )
        return replace(
            row,
            seconds=Estimated(record.seconds, "s", basis) if basis else Measured(record.seconds, "s", "clock"),
            peak_bytes=self._peak_spent(record, estimated=bool(basis)),
            joules=None
            if record.joules is None or self._energy is None or basis
            else Measured(record.joules, "J", self._energy.name),
        )

    def _peak_spent(self, record: PhaseRecord, *, estimated: bool) -> Measured | Estimated | None:
        if record.peak_bytes is None:
            return None
        if estimated:  # dense was not run: what it would have needed is taken from the phases that this run had
            return Estimated(record.peak_bytes, "B", "this run's own peak")
        return Measured(record.peak_bytes, "B", self._peak.name)

    def _dense_estimate(self) -> Bill | None:
        """Bill of a dense run over the same epochs, where this run did not do the same: its work as first counted.

        Its time is known only where this run had steps that were like dense ones: in the search, or, with batches left
        out, all of them.
        """
        spent = PhaseRecord()
        for record in (self._records[name] for name in _LOOP_PHASES if name in self._records):
            spent.add(record)
        left = any(work.left_images for work in spent.work.values())
        beyond = self._beyond_s is not None
        if self.dense_cost is None or not (self._shrunk or self._resized or self._altered or left or beyond):
            return None
        if not spent.train_images:
            return None
        training = spent.as_dense()
        like_dense, basis = self._like_dense()
        seconds: float | None = None
        if like_dense is not None:
            # warming up is paid once, the rest at the same pace; a very short phase has only its mean
            warm = self._warm_up if like_dense.steps > 2 * _WARM_UP_STEPS else (0.0, 0, 0)
            pace = (like_dense.seconds - warm[0]) / (like_dense.train_images - warm[2])
            # a search on smaller images than dense would have seen is faster than dense, in proportion to the MACs
            whole = like_dense.priced(self.dense_cost).macs / like_dense.macs if like_dense.macs else 1.0
            seconds = warm[0] + pace * whole * (training.train_images - warm[2])
            basis += f" {1e3 * (like_dense.seconds - warm[0]) / max(1, like_dense.steps - warm[1]):.4g} ms a step"
            if abs(whole - 1) > 0.005:
                basis += f", times {whole:.3g} for the MACs of whole images"
            training.peak_bytes = like_dense.peak_bytes
        training.seconds = seconds or 0.0
        setup = self._records.get("setup")
        if setup is not None and self._beyond_s:
            setup = replace(setup, seconds=setup.seconds - self._beyond_s)
        rows = {"setup": setup, "train": training, "evaluate": self._dense_evaluate()}
        phases = {
            name: self._spending(record.priced(self.dense_cost), basis=basis or "nothing that was measured")
            for name, record in rows.items()
            if record is not None
        }
        if seconds is None:
            phases = {name: replace(row, seconds=None, peak_bytes=None) for name, row in phases.items()}
        return Bill(phases=phases, device=str(self.device), parameters=self.dense_cost.parameters)

    def _like_dense(self) -> tuple[PhaseRecord | None, str]:
        """Return the phase whose steps took what dense ones take, but for the size of their images; and its name."""
        search, train = self._records.get("search"), self._records.get("train")
        if self._altered:
            return None, ""  # steps with gates or rounding are neither as fast nor as slow as dense ones
        if self._dense_search is not None:
            return self._dense_search, "the search phase's own"
        if search is not None and search.train_images:
            return search, "the search phase's own"
        if train is not None and train.train_images and not self._shrunk and not self._resized:
            return train, "this run's own"
        return None, ""

    def _dense_evaluate(self) -> PhaseRecord | None:
        record = self._records.get("evaluate")
        if record is None:
            return None
        # without an evaluation before the draw, take the shrunk model's time, which favours dense
        pace, dense = self._dense_evaluation, record.as_dense()
        if pace is None:
            pace = record.seconds / max(record.images, 1)
        return PhaseRecord(pace * dense.images, record.steps, dense.work, record.peak_bytes)


def _as_dense(cost: ModelCost) -> ModelCost:
    """Return a cost in the run's floating point and with all weights, whatever the layers say by now."""
    return replace(cost, arithmetics={}, densities={}, gradient_densities={})


def ledgers_on(model: nn.Module, own: Ledger) -> list[Ledger]:
    """Return ``own``, which may watch nothing, and those that watch ``model``: all have to hear of a change."""
    return list(dict.fromkeys((own, *hook_owners(model, Ledger))))


def ledger_of(model: nn.Module) -> Ledger:
    """Return a new ledger for the device of ``model`` and all processes, as wide as those that watch it already."""
    ledger = Ledger(device=next(model.parameters()).device, world_size=processes())
    for other in hook_owners(model, Ledger):
        ledger.bits = other.bits
    return ledger


def ledger_for(
    model: nn.Module, optimizers: Iterable[Optimizer], given: Ledger | None, example_inputs: Any = None
) -> Ledger:  # fmt: skip
    """Return the ledger that a method was given, or else one of its own, which watches ``model`` in phase 'train'."""
    if given is not None:
        return given
    ledger = ledger_of(model)
    ledger.watch(model, optimizers, example_inputs)
    ledger.enter("train")
    return ledger


def _image_size(inputs: Any) -> tuple[int, ...] | None:
    """Return the shape of a sample if it is an image (or a volume), whose size decides what the model costs.

    Sequences are left out: their lengths differ from batch to batch, and all are priced like the first.
    """
    first = next((tensor for tensor in tensors_in(inputs) if tensor.ndim), None)
    return tuple(first.shape[1:]) if first is not None and first.ndim >= 4 else None


def _fold(operation: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """Combine two numbers of which either may be unknown."""
    return b if a is None else a if b is None else operation(a, b)
