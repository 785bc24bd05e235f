"""Fractional precision: gates choose the bits of each residual block for each sample (DFQ), and FracTrain.

The spatial half of Fu et al., FracTrain: Fractionally Squeezing Bit Savings Both Temporally and Spatially for Efficient
DNN Training, NeurIPS 2020, https://arxiv.org/abs/2012.13113; reference code github.com/RICE-EIC/FracTrain. Before each
residual block a recurrent gate (`earlybird.skipping.gates`) chooses, for each sample, one of K candidates: bits a of
the inputs of the block's convolutions and bits g of the gradients of their outputs. Weights have w bits throughout.
What a candidate costs, of computation in 32 bits, is the mean over the three passes of training:

    cost = (a w + g w + a g) / (3 * 32**2)

A price on that cost is moved after each step so that the mean over blocks (by MACs) and samples comes to
``fractional_target``. With several targets, the next one begins whenever the loss has stopped falling
(`earlybird.precision.turning_points`): FracTrain. A candidate of 0 bits leaves the block out, as
`earlybird.skipping.layers` does.

What it saves: bit-MACs and modelled joules of hardware that has such arithmetic. It is *simulated*, and takes longer
than to compute without (but for candidate 0). It does not pay where hardware cannot change its bits from sample to
sample.

Each sample is computed once: it is rounded by its own bits, and one convolution takes the whole batch. The published
code computes the block K times and adds up what a mask of zeros and ones leaves. There, the gradient of choice k is the
inner product of the output's gradient with the output in k bits. Here the choice is made at the inputs of the
convolutions, and gets its gradient there,

    dL/dchoice_k = sum over the block's convolutions of  <dL/dQ(x), Q_k(x) - x>

for all candidates, since rounding K times costs little: to first order in the rounding errors it is the same.

Deviations of the default, each with the published behaviour under ``PRESETS['published']``:

- ``fractional_choice``: published, the candidate with the highest score; here one is drawn by the softmax of scores
  less prices, so that the price has something to act on while all scores are alike. Evaluation takes the highest;
- ``fractional_control``: published, a penalty in the loss whose sign flips with the cost of the last batch;
- ``fractional_target``: the first one that was published for FracTrain, 1.5 %, is below what the cheapest candidate
  costs with weights of 4 bits, 1.76 %, and such a target is refused; the preset begins with 1.8 %;
- ``fractional_outside_bits``: layers outside of the blocks, such as the first convolution, compute in 8 bits
  (published: they are left as they are, and then take a tenth of the bit-MACs of a ResNet-20);
- ``fractional_ranges``: each sample has a range of its own, in evaluation, too, so that one with large values does not
  make those of all others coarse (published: one range over the batch, and a running one in evaluation, with
  ``fractional_range_memory``).

And without an option: the gates' gradient ends at their inputs; they have an Adam of their own; a cap on the penalty
and a band without one are left out. Depthwise convolutions keep 8 bits of values and 16 of gradients, as published.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from earlybird.blocks import Block, check_free, counted, find_blocks, patterns_from
from earlybird.calls import Hook, after_gradients, around, first_sample, given_optimizers, unwrapped
from earlybird.cost.arithmetic import PASSES, Arithmetic
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_for
from earlybird.precision.quantize import (
    MOST_BITS,
    Bits,
    LayerRanges,
    QuantisedLayer,
    Range,
    check_bits,
    declare,
    forward_with,
    gradient_through,
    quantisable,
    quantise,
    range_of,
    round_,
    seed_of_step,
)
from earlybird.precision.turning_points import Stages, TurningPoints, foreseen
from earlybird.settings import check_choice, check_count, check_number, option
from earlybird.skipping.gates import LearnedGate, Multiplier, Price, charge, summed
from earlybird.skipping.gather import Choice, check_norms, run_on
from earlybird.skipping.passes import Passes
from earlybird.step import Step
from earlybird.stretches import BLOCKS, LAYERS, Plan, Stretch, after, computing
from earlybird.tickets.layers import TransposedConv, is_depthwise
from earlybird.tickets.shrink import Change
from earlybird.traces import Trace

__all__ = ["FractionalBits", "FractionalPrecision", "cost_of", "rounded"]

_WIDTHS = (32, 16)  # of the gate: its projection, of which the last is the LSTM's, too, as published
_DEPTHWISE = Bits(8, 8, 16)  # whatever the gate says
_WINDOW, _DECAY = 5, 0.3  # of the turning points, as published
_PROBE = 0.1  # share of the samples that skip a block which run it forward all the same, to tell its gate
_RECORDS = 100  # entries of the history in a run whose length is known
_RECORD_EVERY = 50  # steps, where it is not
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class FractionalPrecision:
    """Hyper-parameters of fractional precision; `attach` starts it.

    Raises:
        InputError: A value is out of its range, or a target cannot be reached; the message names it.
    """

    fractional_target: float | tuple[float, ...] = option(
        0.03, "Cost of the blocks as a share of 32-bit computation; of several, the next begins at a turning point."
    )
    fractional_bits: tuple[int, ...] = option(
        (3, 4, 4, 6, 6), "Bits of inputs, by candidate, 1 to 16; 0 skips a block."
    )
    fractional_gradient_bits: tuple[int, ...] = option((6, 6, 8, 8, 12), "Bits of gradients, by candidate.")
    fractional_weight_bits: int = option(4, "Bits of weights, 1 to 16.")
    fractional_outside_bits: int = option(
        8, "Bits of all operands of layers outside of the blocks but the classifier; 32 leaves them as they are."
    )
    fractional_choice: Literal["drawn", "highest", "random"] = option(
        "drawn", "By chance and score, or the highest score; 'random' is the control experiment: chance alone."
    )
    fractional_control: Literal["price", "penalty"] = option(
        "price", "What holds the cost: a price that moves smoothly, or a penalty whose sign flips."
    )
    fractional_penalty: float = option(1e-3, "Size of that penalty in the loss, for each block's cost in 32 bits.")
    fractional_at: tuple[Step, ...] = option((), "When each target but the first begins, instead of at turning points.")
    fractional_every: Step = option(Step.parse("2.5%"), "How often the mean loss is looked at for a turning point.")
    fractional_from: Step = option(
        Step.parse("10%"), "Warm-up: a loss that stands still before this point has not begun to fall."
    )
    fractional_threshold: float = option(0.05, "Largest difference of losses that is a standstill, of the early loss.")
    fractional_last_by: Step | None = option(
        Step.parse("75%"), "When the last target begins, turning points or not; 'none' waits for them."
    )
    fractional_blocks: tuple[str, ...] = option((), "Names of the blocks, such as 'layers.*.blocks.*'; default: found.")
    fractional_gate_rate: float = option(1e-2, "Learning rate of the gates.")
    fractional_ranges: Literal["batch", "sample"] = option(
        "sample", "Ranges of inputs and gradients: one for the batch, or one for each sample."
    )
    fractional_range_memory: float = option(
        0.9, "Share of a running range of inputs that stays at each step, in [0, 1)."
    )

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "published": {
            "fractional_target": (0.018, 0.02, 0.025, 0.03), "fractional_outside_bits": 32,
            "fractional_choice": "highest", "fractional_control": "penalty",
            "fractional_every": Step.parse("400it"), "fractional_from": Step(),
            "fractional_last_by": None, "fractional_ranges": "batch", "fractional_range_memory": 0.1,
        },
        "fast": {},
    }  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("fractional_every", "fractional_from", "fractional_last_by"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value in (None, "none") else Step.parse(value))
        if self.fractional_every in (None, Step()) or self.fractional_from is None:
            raise InputError(
                f"fractional_every is {self.fractional_every} and fractional_from {self.fractional_from}",
                needed="a positive step such as '0.5ep' or '400it', and one such as '10%' or '0it'",
            )
        object.__setattr__(self, "fractional_blocks", patterns_from("fractional_blocks", self.fractional_blocks))
        object.__setattr__(self, "fractional_at", tuple(Step.parse(point) for point in self.fractional_at))
        for name in ("fractional_bits", "fractional_gradient_bits"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_bits("fractional_weight_bits", self.fractional_weight_bits)
        if self.fractional_outside_bits != 32:
            outside = self.fractional_outside_bits
            if isinstance(outside, bool) or not isinstance(outside, int) or not 1 <= outside <= MOST_BITS:
                raise InputError(
                    f"fractional_outside_bits is {outside!r}",
                    needed=f"bits from 1 to {MOST_BITS}, or 32 for layers that stay as they are",
                )
        if len(self.fractional_bits) != len(self.fractional_gradient_bits) or len(self.fractional_bits) < 2:
            raise InputError(
                f"fractional_bits names {len(self.fractional_bits)} candidates, fractional_gradient_bits "
                f"{len(self.fractional_gradient_bits)}",
                needed="as many, and at least 2",
            )
        for values, gradients in zip(self.fractional_bits, self.fractional_gradient_bits):
            check_bits("a candidate of fractional_bits", values, 0)
            check_bits("a candidate of fractional_gradient_bits", gradients, 0)
            if (values == 0) != (gradients == 0):
                raise InputError(f"a candidate has bits {values}/{gradients}", needed="0 for both, which skips a block")
        if not any(self.fractional_bits):
            raise InputError("fractional_bits names 0 alone", needed="a candidate that computes")
        check_choice("fractional_choice", self.fractional_choice, ("drawn", "highest", "random"))
        check_choice("fractional_ranges", self.fractional_ranges, ("batch", "sample"))
        check_choice("fractional_control", self.fractional_control, ("price", "penalty"))
        if self.fractional_choice == "random" and self.fractional_control == "penalty":
            raise InputError("a penalty has no effect on fractional_choice = 'random'", hint="use control by 'price'")
        for name in ("fractional_penalty", "fractional_gate_rate"):
            check_number(name, getattr(self, name), lambda value: 0 < value < math.inf, "a number above 0")
        check_number("fractional_threshold", self.fractional_threshold, lambda value: value >= 0, "at least 0")
        memory = self.fractional_range_memory
        check_number("fractional_range_memory", memory, lambda share: 0 <= share < 1, "a number from 0 to below 1")
        targets = self.targets
        for target in targets:
            check_number("fractional_target", target, lambda share: 0 < share <= 1, "shares above 0 and at most 1")
        if not targets or any(later <= earlier for earlier, later in pairwise(targets)):
            raise InputError(
                f"fractional_target is {self.fractional_target!r}", needed="one share, or several that rise"
            )
        if len(targets) > 1 and targets[-1] == 1:
            raise InputError(
                f"fractional_target is {self.fractional_target!r}",
                needed="1 alone, which leaves the model as it is, or targets below it",
            )
        if self.fractional_at and len(self.fractional_at) != len(targets) - 1:
            raise InputError(
                f"fractional_at names {len(self.fractional_at)} points, and there are {len(targets)} targets",
                needed="one point for each target but the first",
            )

    @property
    def targets(self) -> tuple[float, ...]:
        """All targets, from the first stage to the last."""
        target = self.fractional_target
        return tuple(target) if isinstance(target, (tuple, list)) else (target,)

    @property
    def outside(self) -> Bits:
        """Bits of the layers outside of the blocks."""
        return Bits(*[self.fractional_outside_bits] * 3)

    @property
    def candidates(self) -> tuple[Bits | None, ...]:
        """The bits of each candidate; None leaves a block out."""
        weight = self.fractional_weight_bits
        pairs = zip(self.fractional_bits, self.fractional_gradient_bits)
        return tuple(Bits(values, weight, gradients) if values else None for values, gradients in pairs)

    def forecast(self, stretches: list[Stretch], plan: Plan) -> list[Stretch]:
        """Return the stretches of a run whose cost is at its targets, for `earlybird.forecast`; without the gates.

        Each target is met by the two candidates whose costs are nearest to it; turning points are taken to lie evenly
        up to the last target's deadline, or to the end where there is none.
        """
        total = round(sum(stretch.steps for stretch in stretches))
        per_epoch = round(plan.steps_per_epoch * total / plan.total_steps)
        targets = self.targets
        points = foreseen(len(targets), self.fractional_at, None, self.fractional_last_by, per_epoch, total)

        def outside(model: nn.Module) -> dict[nn.Module, Arithmetic | None]:
            blocks = find_blocks(model, plan.images(), self.fractional_blocks)
            inside = {name for block in blocks for name in block.layers}
            return {
                layer: (_DEPTHWISE if is_depthwise(layer) else self.outside).arithmetic()
                for name, layer in quantisable(model).items()
                if name not in inside and self.outside != Bits()
            }

        if targets[-1] < 1:
            stretches = [computing(one, "fractional_precision", outside) for one in stretches]
        prices = sorted({0.0 if bits is None else cost_of(bits): bits for bits in self.candidates}.items())
        before = stretches
        for target, point in zip(targets, points):
            if target == 1:
                continue

            def chosen(stretch: Stretch, target: float = target) -> Stretch:
                whole = next(one for one in before if one.model is stretch.model)  # without an earlier target's choice
                blocks = find_blocks(stretch.model, plan.images(), self.fractional_blocks)
                layers = tuple(name for block in blocks for name in block.layers)
                low, high = prices[0], prices[-1]
                for pair in pairwise(prices):
                    if pair[0][0] <= target <= pair[1][0]:
                        low, high = pair
                share = (target - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 1.0
                mixed = ((low[1], 1 - min(max(share, 0.0), 1.0)), (high[1], min(max(share, 0.0), 1.0)))
                routes = tuple(
                    (layers, part, None if bits is None else bits.arithmetic()) for bits, part in mixed if part
                )
                stretch = stretch.decided("fractional_precision", LAYERS, BLOCKS)
                return replace(stretch, routes=(*whole.routes, *routes))

            stretches = after(stretches, point, chosen)
        return stretches

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        example_inputs: Any = None,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        ledger: Ledger | None = None,
        seed: int = 0,
    ) -> FractionalBits:
        """Let gates choose the bits of the residual blocks from now on.

        Args:
            model: The module that is trained, on the device where it will be. With ``fractional_target=1`` it is left
                alone.
            optimizer: Its ``step`` is the clock, and when the gates learn; of several, the first one's.
            example_inputs: A batch that the model runs on; blocks are found and counted on one sample of it.
            steps_per_epoch: Optimizer steps in an epoch; needed when a point is given in epochs.
            total_steps: Optimizer steps of the training; needed when a point is a share of it, as by default where
                there are several targets.
            ledger: Where to record; by default an own one, which `FractionalBits.bill` reads.
            seed: Of the gates' first weights, of their choices and of stochastic rounding.

        Returns:
            The running method. Where there are several targets and no points, tell it each batch's loss by its
            ``observe`` before ``optimizer.step()``; the shipped loop does so.

        Raises:
            InputError: The model has no residual blocks, a target cannot be reached (the message says what can), a
                length is not known, or another method decides how blocks or layers are computed.
        """
        return FractionalBits(self, model, optimizer, example_inputs, steps_per_epoch, total_steps, ledger, seed)


# ---- pure functions ----


def cost_of(bits: Bits) -> float:
    """Return what a MAC costs in these bits, of one in 32 bits: the mean over the three passes of training."""
    arithmetic = bits.arithmetic() or Arithmetic()
    return sum(arithmetic.bit_macs(pass_) for pass_ in PASSES) / len(PASSES)


def rounded(x: Tensor, bits: Tensor, bounds: Range, generator: torch.Generator | None = None) -> Tensor:
    """Return ``x`` with each sample rounded to bits of its own, affine, within one range.

    Args:
        x: Floating point (n, ...).
        bits: Of each sample, 1 to 16, shape (n,).
        bounds: Of all of them, scalars, or of each, as `range_of` returns them with ``per=0``.
        generator: Of stochastic rounding, on the device of ``x``; None rounds to the nearest.

    Returns:
        As `earlybird.precision.quantize.quantise` would for a batch of equal bits, without a gradient.
    """
    with torch.no_grad():
        top = (2.0 ** bits.float() - 1).view(-1, *[1] * (x.ndim - 1))
        step = ((bounds.high - bounds.low) / top).clamp_min(_TINY)
        codes = round_(torch.sub(x.float(), bounds.low).div_(step), generator)
        codes = torch.minimum(codes.clamp_min_(0), top)
        return torch.addcmul(bounds.low, codes, step).to(x.dtype)


class _Choose(torch.autograd.Function):
    """Inputs rounded to each sample's bits; the choices get what each candidate's rounding would have changed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, choice: Tensor | None, bits: Tensor, bounds: Range, candidates: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(x, *bounds)
        ctx.candidates = candidates
        return rounded(x, bits, bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if not ctx.needs_input_grad[1]:
            return gradient, None, None, None, None
        x, *bounds = ctx.saved_tensors
        x = x.float()
        credit = x.new_zeros(len(x), len(ctx.candidates))
        for bits in set(ctx.candidates) - {0}:
            change = rounded(x, torch.full((len(x),), bits, device=x.device), Range(*bounds)).sub_(x)
            worth = change.mul_(gradient).sum(tuple(range(1, x.ndim)))
            credit[:, [at for at, other in enumerate(ctx.candidates) if other == bits]] = worth[:, None]
        return gradient, credit, None, None, None


# ---- layers ----


@dataclass(frozen=True)
class _Chosen:
    """What was chosen for the samples that are about to run a block.

    Attributes:
        index: Candidate of each, shape (n,).
        weights: One-hot of it, by which the gates learn, shape (n, K), or None where they do not.
        bits: Of their inputs, shape (n,).
        gradient: Bits of their gradients, shape (n,).
    """

    index: Tensor
    weights: Tensor | None
    bits: Tensor
    gradient: Tensor

    def of(self, rows: Tensor) -> _Chosen:
        """Return the same for some of the samples."""
        weights = None if self.weights is None else self.weights[rows]
        return _Chosen(self.index[rows], weights, self.bits[rows], self.gradient[rows])


class _Layer:
    """A convolution or linear layer in a block, which computes each sample in the bits that were chosen for it.

    Attributes:
        choice: For the pass that is under way, or None outside of its block.
        ranges: Of inputs and gradients.
    """

    def __init__(self, name: str, module: nn.Module, run: FractionalBits) -> None:
        self.module, self.name = module, name
        self.choice: _Chosen | None = None
        settings = run.settings
        self.ranges = LayerRanges(module, settings.fractional_ranges, settings.fractional_range_memory)
        self._settings, self._generator = settings, run.generator
        self._per = 1 if isinstance(module, TransposedConv) else 0  # dimension of the weight's output channels
        self._around = around(module, self._run, run)

    def remove(self) -> None:
        """Give the module its plain forward back."""
        self._around.remove()

    def _run(self, forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        choice, settings = self.choice, self._settings
        if choice is None:
            return forward(x, *args, **kwargs)
        if len(x) != len(choice.index):
            raise InputError(
                f"layer '{self.name}' gets {len(x)} samples, and its block {len(choice.index)}",
                hint="leave its block out of fractional_blocks",
            )
        if is_depthwise(self.module):
            weight_bits, gradient_bits = _DEPTHWISE.weight, torch.full_like(choice.gradient, _DEPTHWISE.gradient)
            x = quantise(x, _DEPTHWISE.activation, self.ranges.of_inputs(x))
        else:
            weight_bits, gradient_bits = settings.fractional_weight_bits, choice.gradient
            bounds = self.ranges.of_inputs(x)
            x = _Choose.apply(x, choice.weights, choice.bits, bounds, settings.fractional_bits)
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        weight = quantise(weight, weight_bits, range_of(weight, self._per))
        output = forward_with(self.module, weight, forward, x, *args, **kwargs)
        return gradient_through(output, lambda g: rounded(g, gradient_bits, self.ranges.of(g), self._generator))


# ---- the running method ----


class FractionalBits:
    """Running fractional precision, made by `FractionalPrecision.attach`; all its state is in `state_dict`.

    Attributes:
        settings: The hyper-parameters.
        blocks: The residual blocks, in the order in which they run.
        rung: Number of the target that holds now, from 0.
        turning: The indicator of turning points.
        generator: Of stochastic rounding.
        history: One entry every few steps, ``{'step', 'target', 'cost', 'blocks'}``: the cost of training since the
            entry before, and for each block the share of samples that got each candidate; ``'reason'`` where a target
            begins.
    """

    def __init__(
        self,
        settings: FractionalPrecision,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        example_inputs: Any,
        steps_per_epoch: int | None,
        total_steps: int | None,
        ledger: Ledger | None,
        seed: int,
    ) -> None:
        check_count("steps_per_epoch", steps_per_epoch, "len(loader)")
        check_count("total_steps", total_steps, "epochs * len(loader)")
        self.settings, self.rung = settings, 0
        self.history: list[dict[str, Any]] = []
        self.turning = TurningPoints(_WINDOW, settings.fractional_threshold, _DECAY)
        self._stages = Stages(
            "fractional_at", len(settings.targets), points=settings.fractional_at, every=settings.fractional_every,
            warm_up=settings.fractional_from, last_by=settings.fractional_last_by, turning=self.turning,
            steps_per_epoch=steps_per_epoch, total_steps=total_steps,
        )  # fmt: skip
        self._model = model = unwrapped(model)
        optimizers = given_optimizers(optimizer)
        self._steps, self._seed = 0, seed
        self._record_every = _RECORD_EVERY if total_steps is None else max(total_steps // _RECORDS, 1)
        self._price, self._multiplier = Price(), Multiplier()
        self.generator = torch.Generator(next(model.parameters()).device)
        self.generator.manual_seed(seed_of_step(seed, 0))
        self.blocks: list[Block] = []
        self._layers: list[list[_Layer]] = []
        self._outside: dict[str, QuantisedLayer] = {}
        if settings.targets[-1] < 1:
            self._find(example_inputs, seed)
        self._begin_step()
        self._begin_record()
        self._own_ledger = ledger is None
        self._ledger = ledger_for(model, optimizers, ledger, example_inputs)
        self._ledger.reread_arithmetic()
        self._passes = Passes(model, self._ledger, seed)
        # before the step, whose gradients have come: what runs the model in its course, such as the refit after a cut,
        # shall find the same gates in whatever order methods were attached
        before = optimizers[0].register_step_pre_hook(Hook(self._before_step, self))
        self._handles: list[Any] = [before, self._passes]
        for index, block in enumerate(self.blocks):
            call = lambda forward, x, index=index: self._run(index, forward, x)  # noqa: E731
            self._handles.append(around(block.module, call, self))

    def _find(self, example_inputs: Any, seed: int) -> None:
        if example_inputs is None:
            raise InputError("no inputs to find the blocks with", hint="pass example_inputs=x to attach")
        settings = self.settings
        self._sample = first_sample(example_inputs)
        found_blocks = find_blocks(self._model, self._sample, settings.fractional_blocks)
        self.blocks = [block for block in found_blocks if block.layers]
        check_free(self.blocks)
        if 0 in settings.fractional_bits:
            check_norms(self.blocks)
        found = quantisable(self._model)
        inside = [[name for name in block.layers if name in found] for block in self.blocks]
        device = next(self._model.parameters()).device
        self._bits = torch.tensor(settings.fractional_bits, device=device)
        self._gradient_bits = torch.tensor(settings.fractional_gradient_bits, device=device)
        self._count(inside)
        low, high = self._reach()
        for target in settings.targets:
            if not low < target < high:
                raise InputError(
                    f"fractional_target is {target:g}, but the cheapest candidates cost {low:.3g} of 32-bit "
                    f"computation, the dearest {high:.3g}",
                    needed="targets between them, or 1, which leaves the model alone",
                )
        self._gate = LearnedGate(
            self.blocks, _WIDTHS, len(self._bits), rate=settings.fractional_gate_rate, seed=seed, device=device,
        )  # fmt: skip
        self._layers = [[_Layer(name, found[name], self) for name in names] for names in inside]
        in_blocks = {name for names in inside for name in names}
        for name, module in found.items() if settings.outside != Bits() else ():
            if name not in in_blocks:
                bits = _DEPTHWISE if is_depthwise(module) else settings.outside
                declare(module, bits.arithmetic())
                self._outside[name] = QuantisedLayer(
                    module, bits, generator=self.generator, memory=settings.fractional_range_memory,
                    ranges=settings.fractional_ranges,
                )  # fmt: skip

    def _count(self, inside: Sequence[Sequence[str]]) -> None:
        """Count the blocks as they are now, and what each of them costs by candidate."""
        cost = counted(self._model, self._sample)
        modules = dict(self._model.named_modules())
        self._inside = inside
        self._macs: list[float] = []  # of each block
        self._spent: list[list[float]] = []  # of each block and candidate, in MACs of 32 bits
        for names, block in zip(inside, self.blocks):
            chosen = sum(cost.layers[name].macs for name in names if not is_depthwise(modules[name]))
            fixed = sum(cost.layers[name].macs for name in names if is_depthwise(modules[name]))
            others = sum(cost.layers[name].macs for name in block.layers if name not in names)
            self._macs.append(chosen + fixed + others)
            self._spent.append(
                [
                    0.0 if bits is None else chosen * cost_of(bits) + fixed * cost_of(_DEPTHWISE) + others
                    for bits in self.settings.candidates
                ]
            )
        # what a choice pays is in units of the mean candidate of the mean block
        self._unit = sum(map(sum, self._spent)) / (len(self.blocks) * len(self.settings.candidates))
        self._prices = torch.tensor(self._spent, device=self._bits.device) / self._unit  # (blocks, K)
        # published penalties are on the sum over the three passes, relative to the mean block
        self._in_penalty = len(PASSES) * self._unit / (sum(self._macs) / len(self._macs))

    def _reach(self) -> tuple[float, float]:
        """Return the lowest and the highest cost that choices can come to."""
        low = high = 0.0
        for block, spent in zip(self.blocks, self._spent):
            open_ = [s for s, bits in zip(spent, self.settings.fractional_bits) if bits or block.skippable]
            low, high = low + min(open_), high + max(open_)
        return low / sum(self._macs), high / sum(self._macs)

    def observe(self, loss: Tensor | float) -> None:
        """Take note of the loss of one batch, a scalar; call it before ``optimizer.step()``."""
        self._stages.observe(self.rung, loss)

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return what a progress bar may show: the cost of the blocks lately, of 32-bit computation."""
        costs = [entry["cost"] for entry in self.history if "cost" in entry]
        return {"cost": f"{costs[-1]:.2%}"} if costs else {}

    def traces(self) -> list[Trace]:
        """Return what the report shows: the mean bits of each block's inputs, and the cost, over the steps."""
        entries = [entry for entry in self.history if "cost" in entry]
        bits = {
            block.name: [
                (entry["step"], sum(map(operator.mul, entry["blocks"][index], self.settings.fractional_bits)))
                for entry in entries
            ]
            for index, block in enumerate(self.blocks)
        }
        cost = {key: [(entry["step"], entry[key]) for entry in entries] for key in ("cost", "target")}
        note = "The mean of the three passes of training, of computation in 32 bits."
        return [
            Trace(title="bits of a block's inputs", unit="bits", series=bits),
            Trace(title="cost of the blocks", unit="share", series=cost, note=note),
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a nested dict of tensors, numbers, strings and lists."""
        return {
            "steps": self._steps,
            "rung": self.rung,
            "turning": self.turning.state_dict(),
            "price": self._price.value,
            "multiplier": self._multiplier.state_dict(),
            "gate": self._gate.state_dict() if self.blocks else {},
            "ranges": {layer.name: layer.ranges.state() for layers in self._layers for layer in layers},
            "outside": {name: layer.state_dict() for name, layer in self._outside.items()},
            "history": [dict(entry) for entry in self.history],
            "record": [list(self._record), [list(counts) for counts in self._counts]],
            "ledger": self._ledger.state_dict() if self._own_ledger else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._steps, self.rung = int(state["steps"]), int(state["rung"])
        self.generator.manual_seed(seed_of_step(self._seed, self._steps))
        self.turning.load_state_dict(state["turning"])
        self._price.value = state["price"]
        self._multiplier.load_state_dict(state["multiplier"])
        if self.blocks:
            self._gate.load_state_dict(state["gate"])
        self._passes.after_step(self._steps)
        for layer in (layer for layers in self._layers for layer in layers):
            layer.ranges.load(state["ranges"][layer.name])
        for name, outside in self._outside.items():
            outside.load_state_dict(state["outside"][name])
        self.history = [dict(entry) for entry in state["history"]]
        record, counts = state["record"]
        self._record, self._counts = list(record), [list(row) for row in counts]
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Give blocks and layers their plain forward back; full precision from here on."""
        inside = (layer for layers in self._layers for layer in layers)
        for handle in (*self._handles, *inside, *self._outside.values()):
            handle.remove()
        self._handles.clear()
        self._layers.clear()
        self._outside.clear()
        self._ledger.reread_arithmetic()
        if self._own_ledger:
            self._ledger.stop()

    def follow(self, change: Change) -> None:
        """Go on with a model that `earlybird.shrink` has just cut; it calls this."""
        for index, block in enumerate(self.blocks):
            if block.reader in change.read:
                self._gate.follow(index, change.read[block.reader])
        self._count(self._inside)

    # ---- what hooks call ----

    def _begin_step(self) -> None:
        self._spent_now, self._whole_now = 0.0, 0.0  # MACs of 32 bits: what was spent, and what 32 bits would have
        self._slopes: list[Tensor] = []  # by how much the mean falls with the price, in the unit of prices

    def _begin_record(self) -> None:
        self._record = [0.0, 0.0]  # the same since the last entry of the history
        self._counts = [[0.0] * len(self.settings.candidates) for _ in self.blocks]  # samples by block and candidate

    def _run(self, index: int, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        block, settings = self.blocks[index], self.settings
        training = block.module.training
        learns = training and torch.is_grad_enabled()
        self._passes.enter(index, block, training=training)
        chances, chosen, computing = self._choose(index, x, training=training, learns=learns)
        runs = self._bits[chosen] > 0
        gated = learns and settings.fractional_choice != "random"
        weights = None
        if gated:  # straight through
            weights = nn.functional.one_hot(chosen, len(self._bits)) - chances.detach() + chances
        choice = _Chosen(computing, weights, self._bits[computing], self._gradient_bits[computing])
        left_out, probes = None, runs[:0].nonzero().flatten()
        if gated and block.skippable and 0 in settings.fractional_bits:
            probes = self._passes.choose(_PROBE * (~runs).float()).nonzero().flatten().to(x.device)
            left_out = Choice(chances[:, self._bits > 0].sum(1), probes, _PROBE)
        self._note(index, chosen, computing[probes], learns=learns)

        def compute(inputs: Tensor, rows: Tensor) -> Tensor:
            with self._chosen(index, choice.of(rows)):
                return forward(inputs)

        return run_on(block.module, compute, x, runs.nonzero().flatten(), left_out)

    def _choose(self, index: int, x: Tensor, *, training: bool, learns: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the chances of each candidate, (N, K), what was chosen, (N,), and what of those that compute, (N,)."""
        settings = self.settings
        gated = settings.fractional_choice != "random"
        scores = self._gate.scores(index, x) if gated else torch.zeros(len(x), len(self._bits), device=x.device)
        scores = scores - self._price.value * self._prices[index]
        if not self.blocks[index].skippable:
            scores = scores.masked_fill(self._bits == 0, -math.inf)
        chances = scores.softmax(1)
        if learns:
            seen = chances.detach()  # a hook that held on to its own tensor would keep all graphs of the run
            mean = (seen * self._prices[index]).sum(1, keepdim=True)
            self._slopes.append((seen * (self._prices[index] - mean).square()).sum())
            if gated:
                chances.register_hook(lambda gradient: self._less_cost(gradient, seen, index))
        decides = scores.detach()
        if not gated or (settings.fractional_choice == "drawn" and training):
            coins = self._passes.draw(decides.numel()).view(decides.shape).to(x.device)
            decides = decides - (-coins.log()).log()  # Gumbel noise: its highest is a draw from the softmax
        return chances, decides.argmax(1), decides.masked_fill(self._bits == 0, -math.inf).argmax(1)

    def _less_cost(self, gradient: Tensor, chances: Tensor, index: int) -> Tensor:
        """Return the gradient of the chances before one block, shape (N, K), less that of what candidates cost."""
        costs = self._prices[index]
        if (
            self.settings.fractional_control == "penalty"
        ):  # by the batches of this step, known by the time gradients come
            sign = 1.0 if self._spent_now > self._whole_now * self.settings.targets[self.rung] else -1.0
            return gradient + sign * self.settings.fractional_penalty * self._in_penalty * costs

        def by_score(by_chance: Tensor) -> Tensor:
            return chances * (by_chance - (chances * by_chance).sum(1, keepdim=True))

        self._multiplier.see(by_score(gradient), by_score(costs.expand_as(chances)))
        return gradient - self._multiplier.value * costs

    @contextlib.contextmanager
    def _chosen(self, index: int, choice: _Chosen) -> Iterator[None]:
        """Let the layers of a block know what was chosen for the samples that they are about to get."""
        for layer in self._layers[index]:
            layer.choice = choice
        try:
            yield
        finally:
            for layer in self._layers[index]:
                layer.choice = None

    def _note(self, index: int, chosen: Tensor, probes: Tensor, *, learns: bool) -> None:
        """Count the candidates that were chosen for a batch, shape (N,), and those of probes, shape (k,)."""
        block = self.blocks[index]
        counts, probed = (torch.bincount(found, minlength=len(self._bits)).tolist() for found in (chosen, probes))
        for ledger in self._passes.ledgers:
            for number, extra, bits in zip(counts, probed, self.settings.candidates):
                if number:
                    self._reroute(ledger, index, number, bits, training=learns)
                if extra:  # forward passes more
                    ledger.reroute(block.layers, -extra, None, training=False)
                    self._reroute(ledger, index, extra, bits, training=False)
        gate = len(chosen) * self._gate.macs(index) / self._macs[index]  # in samples of the block
        if self.settings.fractional_choice != "random":
            charge(self._passes.ledgers, block.layers, gate, training=learns)
        if learns:
            self._spent_now += sum(number * spent for number, spent in zip(counts, self._spent[index]))
            self._whole_now += len(chosen) * self._macs[index]
            self._counts[index] = [before + number for before, number in zip(self._counts[index], counts)]

    def _reroute(self, ledger: Ledger, index: int, images: int, bits: Bits | None, *, training: bool) -> None:
        if bits is None:
            ledger.reroute(self.blocks[index].layers, images, None, training=training)
            return
        for depthwise, arithmetic in ((False, bits.arithmetic()), (True, _DEPTHWISE.arithmetic())):
            names = [layer.name for layer in self._layers[index] if is_depthwise(layer.module) == depthwise]
            if names:
                ledger.reroute(names, images, arithmetic, training=training)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        return after_gradients(args, kwargs, self._on_gradients)

    def _on_gradients(self) -> None:
        self._steps += 1
        if not self.blocks:
            return
        device = self.generator.device
        self.generator.manual_seed(seed_of_step(self._seed, self._steps))
        slope = self._unit * float(torch.stack(self._slopes).sum()) if self._slopes else 0.0
        spent, whole, slope = summed([self._spent_now, self._whole_now, slope], device)
        self._record = [self._record[0] + self._spent_now, self._record[1] + self._whole_now]
        if whole:
            target = whole * self.settings.targets[self.rung]
            if self.settings.fractional_control == "price":
                self._price.move(spent / target - 1, slope / target)
                self._multiplier.after_step(device)
        self._begin_step()
        self._gate.step()
        self._passes.after_step(self._steps)
        if self._steps % self._record_every == 0:
            self._add_to_history(device)
        self._climb()

    def _add_to_history(self, device: torch.device) -> None:
        flat = summed([*self._record, *(number for row in self._counts for number in row)], device)
        spent, whole, flat = flat[0], flat[1], flat[2:]
        self._begin_record()
        if not whole:
            return
        size = len(self.settings.candidates)
        rows = [flat[at : at + size] for at in range(0, len(flat), size)]
        self.history.append(
            {
                "step": self._steps,
                "target": self.settings.targets[self.rung],
                "cost": spent / whole,
                "blocks": [[number / max(sum(row), 1) for number in row] for row in rows],
            }
        )

    def _climb(self) -> None:
        number, reason = self._stages.after(self.rung, self._steps)
        if number != self.rung:
            self.rung = number
            target = self.settings.targets[number]
            self.history.append({"step": self._steps, "target": target, "reason": reason})
