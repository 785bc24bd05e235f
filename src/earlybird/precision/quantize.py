"""Uniform quantisers, their straight-through gradients, and layers that compute with quantised operands.

A tensor becomes whole numbers of ``bits`` bits, times a step, plus the value of code 0:

    code = round((x - zero) / step)                     x ~ zero + step * code
    affine      zero = low,  step = (high - low) / (2**bits - 1)              codes 0 .. 2**bits - 1
    symmetric   zero = 0,    step = max(|low|, |high|) / (2**(bits - 1) - 1)  codes of both signs

Where a symmetric range has no negative values, the sign's bit serves, too: codes 0 .. 2**bits - 1. Rounding is to the
nearest code, or stochastic: up with the fractional part as probability, so that the mean over many is ``x`` itself.

Affine, with ranges over the batch, is what FracTrain does (Fu et al., NeurIPS 2020,
https://arxiv.org/abs/2012.13113; reference code github.com/RICE-EIC/FracTrain); symmetric ranges and codes of which the
most significant bits are taken are those of E2-Train (Wang et al., NeurIPS 2019, https://arxiv.org/abs/1910.13349).
The gradient passes a quantiser as if it were not there (Bengio et al. 2013, https://arxiv.org/abs/1308.3432), or is
quantised itself on its way back.

This is simulation: codes are turned back into numbers before anything is multiplied. It shows what fewer bits do to
accuracy and what they would cost, and takes longer than to compute without. Everything is done in float32 and handed
back in the type that came, so that under autocast products are of rounded bf16 numbers.

Deviations from the reference code: steps have no floor but the smallest float32 (published: 1e-8, which is above the
step of 16-bit gradients); running ranges begin with the first batch's (published: with zeros).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from earlybird.calls import around, arounds, processes
from earlybird.cost.arithmetic import PASSES, Arithmetic
from earlybird.errors import InputError
from earlybird.tickets.layers import Conv, TransposedConv

__all__ = [
    "Bits", "Encoded", "LayerRanges", "QuantisedLayer", "Range", "averaged", "check_bits", "check_free", "declare",
    "encode", "forward_with", "gradient_through", "most_significant", "over_batch", "quantisable", "quantise",
    "range_of", "round_", "seed_of_step", "straight_through",
]  # fmt: skip

MOST_BITS = 16
_TINY = torch.finfo(torch.float32).tiny


class Range(NamedTuple):
    """Smallest and largest value, float32, in a shape that broadcasts to the tensor's."""

    low: Tensor
    high: Tensor


class Encoded(NamedTuple):
    """What `encode` returns.

    Attributes:
        codes: Whole numbers in float32, in the shape of the tensor.
        step: Distance of two codes' values; broadcasts.
        zero: Value of code 0; broadcasts.
        bits: Of a code.
    """

    codes: Tensor
    step: Tensor
    zero: Tensor
    bits: int

    def values(self) -> Tensor:
        """Return the numbers for which the codes stand, float32."""
        return self.codes.mul(self.step).add_(self.zero)


def check_bits(name: str, value: Any, least: int = 1) -> int:
    """Return ``value`` as a number of bits from ``least`` to 16, or raise an `InputError` that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST_BITS:
        raise InputError(f"{name} is {value!r}", needed=f"a whole number of bits from {least} to {MOST_BITS}")
    return value


# ---- ranges ----


def range_of(x: Tensor, per: int | None = None) -> Range:
    """Return the range of a whole tensor, or of each index of dimension ``per``.

    Args:
        x: Floating point, not empty.
        per: 0 for the output channels of a weight ``(out, in, ...)`` or the samples of a batch ``(N, C, ...)``, 1 for
            the channels of a batch; None for one range.

    Returns:
        Scalars, or tensors of size 1 in all dimensions but ``per``.
    """
    x = x.detach()
    if per is None:
        low, high = x.amin(), x.amax()  # aminmax copies what is not contiguous
    else:
        others = [dim for dim in range(x.ndim) if dim != per % x.ndim]
        low, high = (x.amin(others, keepdim=True), x.amax(others, keepdim=True)) if others else (x, x)
    return Range(low.float(), high.float())


def over_batch(each: Range, how: Literal["extreme", "mean"]) -> Range:
    """Return one range for all samples from that of each: their 'extreme', or the 'mean', which cuts off the largest.

    Args:
        each: Of each sample, as `range_of` returns it with ``per=0``.
        how: 'extreme' is the range of the whole batch.
    """
    if how == "extreme":
        return Range(each.low.amin(), each.high.amax())
    return Range(each.low.mean(), each.high.mean())


def averaged(running: Range | None, seen: Range, memory: float) -> Range:
    """Return the running range after one more was seen; ``memory`` is the share of the old one that stays, 0 to 1."""
    if running is None:
        return seen
    return Range(running.low.lerp(seen.low, 1 - memory), running.high.lerp(seen.high, 1 - memory))


# ---- codes ----


def round_(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Round in place to whole numbers: the nearest, or stochastically, up with the fractional part as probability.

    The noise has 16 bits, four of them from one draw, which on a CPU takes a third of the time of a draw for each.

    Args:
        x: float32, dense in memory (as what has just been computed is), any shape.
        generator: Of the noise, on the device of ``x``; None rounds to the nearest.
    """
    if generator is None:
        return x.round_()
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    noise = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
    # -2**15 .. 2**15 - 1 becomes the middles of 2**16 equal parts of 0 .. 1
    return x.add_(noise.as_strided(x.shape, x.stride()), alpha=2**-16).add_(0.5 + 2**-17).floor_()


def encode(
    x: Tensor, bits: int, bounds: Range, *, symmetric: bool = False, generator: torch.Generator | None = None
) -> Encoded:
    """Return the codes of ``x``; what lies outside of ``bounds`` gets the nearest code.

    Args:
        x: Floating point, any shape.
        bits: 1 to 16; 2 to 16 for symmetric ones.
        bounds: Which numbers have codes; see `range_of`.
        symmetric: Code 0 stands for 0.
        generator: Of stochastic rounding, on the device of ``x``; None rounds to the nearest.

    Raises:
        InputError: ``bits`` is out of its range.
    """
    check_bits("bits", bits, 2 if symmetric else 1)
    low, high = bounds
    top: Any = 2**bits - 1
    bottom: Any = 0
    with torch.no_grad():
        if symmetric:
            signed = (low < 0).any()  # stays on its device: nobody waits for it
            top = torch.where(signed, 2 ** (bits - 1) - 1, top)
            bottom = torch.where(signed, -top, 0)
            zero = torch.zeros_like(low)
            step = torch.maximum(low.abs(), high.abs()) / top
        else:
            zero = low
            step = (high - low) / top
        step = step.clamp_min(_TINY)
        codes = round_(torch.sub(x.float(), zero).div_(step), generator)
        return Encoded(codes.clamp_min_(bottom).clamp_max_(top), step, zero, bits)


def most_significant(encoded: Encoded, bits: int) -> Encoded:
    """Return the nearest codes of which only the first ``bits`` bits are set, with the step as it was.

    They are rounded from the codes, not from the numbers, so that hardware has them at hand. The highest code may be
    rounded up to one that needs a carry.

    Raises:
        InputError: The codes have fewer bits.
    """
    check_bits("bits", bits)
    if bits > encoded.bits:
        raise InputError(f"the {bits} most significant bits were asked for", needed=f"at most {encoded.bits}")
    unit = 2 ** (encoded.bits - bits)
    return encoded._replace(codes=(encoded.codes / unit).round_().mul_(unit))


# ---- gradients ----


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _GradientThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.change(gradients[0]), None


def straight_through(x: Tensor, values: Tensor) -> Tensor:
    """Return ``values``, whose gradient is that of ``x``, of the same shape and type."""
    through: Tensor = _StraightThrough.apply(x, values)
    return through


def gradient_through(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``x``; in the backward pass its gradient is ``change`` of the one that arrives."""
    through: Tensor = _GradientThrough.apply(x, change)
    return through


def quantise(
    x: Tensor,
    bits: int,
    bounds: Range | None = None,
    *,
    symmetric: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return ``x`` rounded to ``bits`` bits, straight-through: its gradient passes as it is.

    Args:
        x: Floating point, any shape and memory format, which stay.
        bits: As for `encode`; 32 returns ``x`` itself.
        bounds: As for `encode`; by default the range of the whole tensor.
        symmetric: As for `encode`.
        generator: As for `encode`.
    """
    if bits == 32 or not x.numel():
        return x
    bounds = range_of(x) if bounds is None else bounds
    codes, step, zero, _ = encode(x.detach(), bits, bounds, symmetric=symmetric, generator=generator)
    return straight_through(x, codes.mul_(step).add_(zero).to(x.dtype))


def seed_of_step(seed: int, step: int, stream: int = 0) -> int:
    """Return the seed of the noise of one optimizer step on this process, of several streams of noise one's.

    Noise that begins anew at each step needs no place in a checkpoint, and each of several processes has its own. The
    factors are odd: a CPU's generator takes the last 32 bits only, in which no two steps may be alike.
    """
    rank = torch.distributed.get_rank() if processes() > 1 else 0
    return (((seed * 1_000_003 + step) * 4099 + rank) * 61 + stream) % 2**63


# ---- layers ----


@dataclass(frozen=True)
class Bits:
    """Bits of a layer's operands: 1 to 16, or 32 for an operand that is left as it is.

    Attributes:
        activation: Of its input.
        weight: Of its weight.
        gradient: Of the gradient of its output, which both backward passes share.
    """

    activation: int = 32
    weight: int = 32
    gradient: int = 32

    def __post_init__(self) -> None:
        for name in ("activation", "weight", "gradient"):
            if getattr(self, name) != 32:
                check_bits(name, getattr(self, name))

    def arithmetic(self) -> Arithmetic | None:
        """Return how a layer of these bits computes; None for one that is left as it is."""
        if self == Bits():
            return None
        return Arithmetic(activation=self.activation, weight=self.weight, gradient=self.gradient, whole=PASSES)


def quantisable(model: nn.Module) -> dict[str, nn.Module]:
    """Return by name the layers whose operands are quantised: convolutions and linear layers but the classifier.

    The classifier, the last linear layer, stays in full precision, as published. So do the projections of
    `torch.nn.MultiheadAttention`, whose weights it uses without calling them.

    Raises:
        InputError: There is none, or one of them is quantised already, or has its weight computed by a
            parametrization.
    """
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    inside = {id(part) for module in attentions for part in module.modules()}
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (Conv, nn.Linear)) and id(module) not in inside
    }
    linear = [name for name, module in found.items() if isinstance(module, nn.Linear)]
    if linear:
        del found[linear[-1]]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no convolution, and no linear layer but the last one",
            hint="leave this method out: there is nothing to quantise",
        )
    for name, module in found.items():
        check_free(name, module)
    return found


def check_free(name: str, module: nn.Module) -> None:
    """Raise an `InputError` where somebody else decides already how the layer ``name`` computes."""
    if hasattr(module, "arithmetic") or arounds(module, object):
        raise InputError(f"another method decides how layer '{name}' computes", hint="leave one of the two methods out")
    if "weight" not in module._parameters:
        raise InputError(
            f"the weight of layer '{name}' is computed by a parametrization",
            hint="remove it (torch.nn.utils.parametrize.remove_parametrizations)",
        )


def declare(module: nn.Module, arithmetic: Arithmetic | None) -> None:
    """Let a layer say how it computes; None: as the run does. A ledger reads it when it counts, or is told to anew."""
    if arithmetic is not None:
        module.arithmetic = arithmetic  # type: ignore[assignment]
    else:
        module.__dict__.pop("arithmetic", None)


def forward_with(module: nn.Module, weight: Tensor, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what ``forward`` computes while ``weight`` stands in for the module's own."""
    own = module._parameters["weight"]
    module._parameters["weight"] = weight  # type: ignore[assignment]
    try:
        return forward(*args, **kwargs)
    finally:
        module._parameters["weight"] = own


class LayerRanges:
    """Ranges of what one layer gets and of the gradients that it is given: one for a batch, or one for each sample.

    Where one serves all samples, evaluation has a running one of inputs. Where each has its own, it has it in
    evaluation, too: one with large values does not make those of all others coarse.

    Args:
        module: The layer.
        how: The range of the 'batch', the 'mean' of its samples' ranges, which cuts off the largest, or one for each
            'sample'.
        memory: Share of the running range that stays at each training pass, 0 to 1.

    Attributes:
        running: Running range of the inputs (scalars), or None before the first training pass.
    """

    def __init__(self, module: nn.Module, how: Literal["batch", "mean", "sample"], memory: float) -> None:
        self.running: Range | None = None
        self._module, self._how, self._memory = module, how, memory

    def of(self, x: Tensor) -> Range:
        """Return the range of a batch (N, ...), or those of its samples; of a vector, which has none, the whole's."""
        if self._how == "batch" or x.ndim < 2:
            return range_of(x)
        each = range_of(x, 0)
        return each if self._how == "sample" else over_batch(each, "mean")

    def of_inputs(self, x: Tensor) -> Range:
        """Return in what range inputs (N, ...) are to be quantised, and take note of theirs where they train."""
        if self._how == "sample":
            return self.of(x)
        if not self._module.training and self.running is not None:
            return self.running
        seen = self.of(x)
        if self._module.training and torch.is_grad_enabled():
            self.running = averaged(self.running, seen, self._memory)
        return seen

    def state(self) -> Tensor | None:
        """Return the running range, low and high, shape (2,), or None."""
        return None if self.running is None else torch.stack(self.running)

    def load(self, state: Tensor | None) -> None:
        """Take over what `state` returned."""
        device = next(self._module.parameters()).device
        self.running = None if state is None else Range(*state.to(device))


class QuantisedLayer:
    """A convolution or linear layer that computes with quantised operands, as FracTrain does, until `remove`.

    Input: affine, to the nearest. Weight: affine, one range an output channel, to the nearest. Gradient of the output:
    affine, stochastic.

    Args:
        module: Of `quantisable`. Its parameters stay the same objects in float32.
        bits: To begin with.
        generator: Of stochastic rounding, on the module's device.
        memory: Of a running range; see `LayerRanges`.
        ranges: Of inputs and gradients: one for the 'batch', or one for each 'sample'.

    Attributes:
        bits: Of what is computed from now on; a pass that is under way ends with those it began with.
        ranges: Of inputs and gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        bits: Bits = Bits(),
        *,
        generator: torch.Generator,
        memory: float = 0.9,
        ranges: Literal["batch", "sample"] = "batch",
    ) -> None:
        self.module, self.bits = module, bits
        self.ranges = LayerRanges(module, ranges, memory)
        self._generator = generator
        self._per = 1 if isinstance(module, TransposedConv) else 0  # dimension of the weight's output channels
        self._around = around(module, self._run, self)

    def state_dict(self) -> dict[str, Any]:
        """Return the running range, low and high, shape (2,), or None."""
        return {"running": self.ranges.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.ranges.load(state["running"])

    def remove(self) -> None:
        """Give the module its plain forward back."""
        self._around.remove()
        declare(self.module, None)

    def _run(self, forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bits = self.bits
        if bits == Bits() or not x.numel():
            return forward(x, *args, **kwargs)
        if bits.activation != 32:
            x = quantise(x, bits.activation, self.ranges.of_inputs(x))
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        if bits.weight != 32:
            weight = quantise(weight, bits.weight, range_of(weight, self._per))
        output: Tensor = forward_with(self.module, weight, forward, x, *args, **kwargs)
        if bits.gradient == 32:
            return output
        return gradient_through(output, lambda gradient: quantise(
            gradient, bits.gradient, self.ranges.of(gradient), generator=self._generator
        ))  # fmt: skip
