"""How a layer computes: which operation, with how many bits, in each of the three passes of training.

    pass        operands                   bit-MACs of one MAC
    forward     activations, weights       a * w / 32**2
    error       gradients, weights         g * w / 32**2
    weight      activations, gradients     a * g / 32**2

(Fu et al., FracTrain, NeurIPS 2020, https://arxiv.org/abs/2012.13113: each operand's share of 32 bits.) A layer says
how it computes in an attribute ``arithmetic``; one without computes in the run's floating point.

What stands for one MAC, by kind (You et al., ShiftAddNet, NeurIPS 2020, https://arxiv.org/abs/2010.12785):

    mac      a multiplication and an addition
    shift    a bit shift and an addition
    add      two additions: the distance of an input to a weight, and its sum

The gradients of an add layer are products, (X - F) g and clip(F - X) g, so that its backward passes are charged as what
they are: a multiplication and two additions each.
"""

from __future__ import annotations

from dataclasses import dataclass

from earlybird.errors import InputError

__all__ = ["KINDS", "PASSES", "Arithmetic"]

KINDS = ("mac", "shift", "add")
PASSES = ("forward", "error", "weight")
"""Of training: forward, gradient of the input (error), gradient of the weight."""


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How a layer computes.

    Attributes:
        kind: Of `KINDS`.
        activation: Bits of its inputs.
        weight: Bits of its weights.
        gradient: Bits of the gradient of its outputs.
        whole: Which of `PASSES` compute in whole numbers times a scale; the others do in floating point.
        weight_pass: Bits of inputs and gradients in the weight pass, where they are others than above.

    Raises:
        InputError: An unknown kind, or bits below 1 or above 32.
    """

    kind: str = "mac"
    activation: int = 32
    weight: int = 32
    gradient: int = 32
    whole: tuple[str, ...] = ()
    weight_pass: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"arithmetic of kind {self.kind!r}", needed=f"one of {', '.join(KINDS)}")
        for bits in (self.activation, self.weight, self.gradient, *(self.weight_pass or ())):
            if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 32:
                raise InputError(f"arithmetic of {bits!r} bits", needed="a whole number from 1 to 32")

    @classmethod
    def of_floats(cls, bits: int) -> Arithmetic:
        """Return that of a run in floating point of ``bits`` bits."""
        return cls(activation=bits, weight=bits, gradient=bits)

    def operands(self, pass_: str) -> tuple[int, int]:
        """Return the bits of both operands in one of `PASSES`."""
        if pass_ == "forward":
            return self.activation, self.weight
        if pass_ == "error":
            return self.gradient, self.weight
        return self.weight_pass or (self.activation, self.gradient)

    def bit_macs(self, pass_: str) -> float:
        """Return what one MAC of this pass weighs: 1 for two operands of 32 bits."""
        left, right = self.operands(pass_)
        return left * right / 1024

    def operations(self, pass_: str) -> dict[str, int]:
        """Return what stands for one MAC of this pass, by name: ``'mult 8x8'``, ``'add fp32'``, ``'shift 16'``.

        Sums are taken as wide as the wider operand. A shift of a float, which adds to its exponent, has no published
        price, and is charged as one of a fixed-point number as wide.
        """
        left, right = sorted(self.operands(pass_), reverse=True)
        multiply = f"mult {left}x{right}" if pass_ in self.whole else f"mult fp{left}"
        add = f"add {left}" if pass_ in self.whole else f"add fp{left}"
        if self.kind == "mac":
            return {multiply: 1, add: 1}
        if self.kind == "add":
            return {add: 2} if pass_ == "forward" else {multiply: 1, add: 2}
        # a shift by the weight where the weight is an operand; its own gradient is a product like any other
        return {multiply: 1, add: 1} if pass_ == "weight" else {f"shift {left}": 1, add: 1}
