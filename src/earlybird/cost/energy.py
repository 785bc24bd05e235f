"""Modelled energy: counted operations and moved bytes times a published price each.

Prices: M. Horowitz, "Computing's Energy Problem (and What We Can Do About It)", ISSCC 2014, pp. 10-14, figure 1.1.9
(45 nm, 0.9 V), https://doi.org/10.1109/ISSCC.2014.6757323, as given by two independent transcriptions that agree.

    compute joules = sum over operations of their number times the price of one
    movement joules = bits moved / 64 * (1300 .. 2600 pJ, one 64-bit DRAM access)

The two are reported apart, and movement as a range. Every tensor is taken to cross the chip's edge once each time it
is read or written, as if nothing stayed in a cache between two layers and nothing was fetched twice within one. Prices
of 45 nm are old: ratios mean something, absolute joules do not, and none of them is measured. bfloat16 is priced as
fp16, which the table has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from earlybird.errors import InputError

__all__ = ["ASIC", "CITATION", "FPGA", "PRICES", "Energy", "Price", "joules", "picojoules"]

CITATION = "Horowitz, ISSCC 2014, 45 nm"


@dataclass(frozen=True)
class Price:
    """Energy of one operation.

    Attributes:
        low: Picojoules.
        high: Picojoules; equal to ``low`` unless the source gives a range.
        source: Where the figure is from, and how far to trust it.
    """

    low: float
    high: float
    source: str


def _prices(source: str, table: dict[str, float]) -> dict[str, Price]:
    return {key: Price(value, value, source) for key, value in table.items()}


_HOROWITZ = f"{CITATION}, from transcriptions"
_HAN = "Han et al., 2015 version of the Horowitz table, unverified; per 32-bit access"
_SHIFT_ADD = "ShiftAddNet (You et al., NeurIPS 2020), ASIC, unverified"
_FPGA = "ShiftAddNet (You et al., NeurIPS 2020), table 1, FPGA ZC706, unverified"

PRICES: dict[str, Price] = {
    **_prices(
        _HOROWITZ,
        {
            "int8_add": 0.03,
            "int32_add": 0.1,
            "int8_mult": 0.2,
            "int32_mult": 3.1,
            "fp16_add": 0.4,
            "fp32_add": 0.9,
            "fp16_mult": 1.1,
            "fp32_mult": 3.7,
            "sram_8KB_64bit": 10.0,
            "sram_32KB_64bit": 20.0,
            "sram_1MB_64bit": 100.0,
            "cpu_instruction": 70.0,
        },
    ),
    "dram_64bit": Price(1300.0, 2600.0, _HOROWITZ),
    # the table has no 16-bit integers: additions are taken as linear in the bits, multiplications as quadratic
    **_prices("estimated from the 8-bit entries of the Horowitz table", {"int16_add": 0.05, "int16_mult": 0.8}),
    **_prices(_HAN, {"sram_32KB_32bit": 5.0, "dram_32bit": 640.0}),
    **_prices(_SHIFT_ADD, {"shift_fix32": 0.13, "shift_fix16": 0.057, "shift_fix8": 0.024}),
    **_prices(
        _FPGA,
        {
            "fpga_mult_fp32": 18.8,
            "fpga_mult_fix32": 19.6,
            "fpga_mult_fix8": 0.2,
            "fpga_add_fp32": 0.4,
            "fpga_add_fix32": 0.1,
            "fpga_add_fix8": 0.1,
            "fpga_shift_fix32": 0.1,
            "fpga_shift_fix8": 0.025,
        },
    ),
}
"""Prices by operation; keys end with the access width where one access moves many bits."""

ASIC, FPGA = "45nm", "fpga"
"""Tables: a chip of 45 nm, and the FPGA on which ShiftAddNet was measured."""

# by table and operation, the entries that prices of other widths are read off, by the product of the operands' bits
_ENTRIES: dict[tuple[str, str], dict[int, str]] = {
    (ASIC, "mult"): {8 * 8: "int8_mult", 16 * 16: "int16_mult", 32 * 32: "int32_mult"},
    (ASIC, "add"): {8: "int8_add", 16: "int16_add", 32: "int32_add"},
    (ASIC, "shift"): {8: "shift_fix8", 16: "shift_fix16", 32: "shift_fix32"},
    (ASIC, "mult fp"): {16: "fp16_mult", 32: "fp32_mult"},
    (ASIC, "add fp"): {16: "fp16_add", 32: "fp32_add"},
    (FPGA, "mult"): {8 * 8: "fpga_mult_fix8", 32 * 32: "fpga_mult_fix32"},
    (FPGA, "add"): {8: "fpga_add_fix8", 32: "fpga_add_fix32"},
    (FPGA, "shift"): {8: "fpga_shift_fix8", 32: "fpga_shift_fix32"},
    (FPGA, "mult fp"): {32: "fpga_mult_fp32"},
    (FPGA, "add fp"): {32: "fpga_add_fp32"},
}


def picojoules(operation: str, table: str = ASIC) -> float:
    """Return the price of one operation: ``'mult fp32'``, ``'mult 8x4'``, ``'add 8'``, ``'shift 16'``.

    Whole numbers of a width that the table lacks lie on a power law through its two nearest entries: on a chip, a
    multiplication is about proportional to the product of its operands' bits, an addition to the bits.

    Raises:
        InputError: No such operation or table, or a floating point that the table lacks.
    """
    kind, _, width = operation.partition(" ")
    floating = width.startswith("fp")
    entries = _ENTRIES.get((table, f"{kind} fp" if floating else kind))
    if entries is None:
        raise InputError(f"no price for '{operation}' in table '{table}'", needed="mult, add or shift; 45nm or fpga")
    if floating:
        if int(width[2:]) not in entries:
            known = ", ".join(f"fp{bits}" for bits in entries)
            raise InputError(f"no price for '{operation}' in table '{table}'", needed=f"one of {known}")
        return PRICES[entries[int(width[2:])]].low
    bits = math.prod(int(part) for part in width.split("x"))
    if bits in entries:
        return PRICES[entries[bits]].low
    low, high = sorted(sorted(entries, key=lambda known: abs(math.log(known / bits)))[:2])
    cheap, dear = PRICES[entries[low]].low, PRICES[entries[high]].low
    return cheap * math.exp(math.log(bits / low) * math.log(dear / cheap) / math.log(high / low))


@dataclass(frozen=True)
class Energy:
    """Modelled energy of some work.

    Attributes:
        compute_joules: Arithmetic.
        movement_joules_low: Data movement at the cheap end of the DRAM price.
        movement_joules_high: Data movement at the dear end.
    """

    compute_joules: float
    movement_joules_low: float
    movement_joules_high: float

    @property
    def low(self) -> float:
        """Compute plus movement, joules, cheap DRAM."""
        return self.compute_joules + self.movement_joules_low

    @property
    def high(self) -> float:
        """Compute plus movement, joules, dear DRAM."""
        return self.compute_joules + self.movement_joules_high

    def __add__(self, other: Energy) -> Energy:
        return Energy(
            self.compute_joules + other.compute_joules,
            self.movement_joules_low + other.movement_joules_low,
            self.movement_joules_high + other.movement_joules_high,
        )


def joules(operations: Mapping[str, float], moved_bytes: float, table: str = ASIC) -> Energy:
    """Price counted operations and moved bytes.

    Args:
        operations: How many by name, as `picojoules` knows them.
        moved_bytes: At the price of DRAM.
        table: ``'45nm'`` or ``'fpga'``; decides about the operations only.

    Raises:
        InputError: An operation that the table has no price for.
    """
    compute = sum(amount * picojoules(name, table) for name, amount in operations.items())
    dram = PRICES["dram_64bit"]
    accesses = moved_bytes * 8 / 64
    return Energy(compute * 1e-12, accesses * dram.low * 1e-12, accesses * dram.high * 1e-12)
