"""The bill: what a run spent, by phase, and how that compares with a dense run.

Four kinds of numbers are kept apart, in types and in print:

    12.3 s          measured    a clock or a meter of this machine said so
    ~12.3 s         estimate    derived from something measured, and from what is said
    #1.2 T          counted     exact for the computation that was asked for; says nothing about time
    [3.1 .. 4.4 J]  modelled    counted amounts times published prices

What is not there prints as 'not measured' or 'not counted'. A ratio is dense / this run, and its kind is the weaker one
of both; below 1 it is a loss and is printed as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from earlybird.cost import units
from earlybird.cost.energy import CITATION
from earlybird.errors import InputError

__all__ = ["Bill", "Counted", "Estimated", "Measured", "Modelled", "Quantity", "Ratio", "Spending"]


@dataclass(frozen=True)
class Measured:
    """A number that a clock or meter gave. ``meter`` names it."""

    value: float
    unit: str
    meter: str

    def __str__(self) -> str:
        return units.text(self.value, self.unit)


@dataclass(frozen=True)
class Estimated:
    """A number derived from a measured one. ``basis`` says from which."""

    value: float
    unit: str
    basis: str

    def __str__(self) -> str:
        return "~" + units.text(self.value, self.unit)


@dataclass(frozen=True)
class Counted:
    """A number that was counted."""

    value: float
    unit: str

    def __str__(self) -> str:
        return "#" + units.text(self.value, self.unit)


@dataclass(frozen=True)
class Modelled:
    """A range that follows from counted numbers and a table of prices. ``source`` is the table's citation."""

    low: float
    high: float
    unit: str
    source: str

    def __str__(self) -> str:
        low, high = units.text(self.low, self.unit), units.text(self.high, self.unit)
        if low.partition(" ")[2] == high.partition(" ")[2]:
            low = low.partition(" ")[0]
        return f"[{low} .. {high}]"


Quantity = Measured | Estimated | Counted | Modelled
_KINDS: dict[str, type[Quantity]] = {  # the strongest first
    "measured": Measured,
    "estimated": Estimated,
    "counted": Counted,
    "modelled": Modelled,
}


@dataclass(frozen=True)
class Ratio:
    """Dense divided by this run: above 1 this run spent less.

    Attributes:
        low: Ratio at the low end of the model's prices; equal to ``high`` for anything not modelled.
        high: Ratio at the high end.
        kind: 'measured', 'estimated', 'counted' or 'modelled': the weaker kind of the two numbers.
    """

    low: float
    high: float
    kind: str

    @property
    def gain(self) -> bool:
        """Whether this run spent less, to the precision printed and at either end of the prices."""
        return round(self.low, 2) > 1 and round(self.high, 2) > 1

    @property
    def loss(self) -> bool:
        """Whether this run spent more, to the precision printed and at either end of the prices."""
        return round(self.low, 2) < 1 and round(self.high, 2) < 1

    def __str__(self) -> str:
        low, high = sorted((self.low, self.high))
        if self.gain:
            return f"x{low:.2f} less" if f"{low:.2f}" == f"{high:.2f}" else f"x{low:.2f} .. x{high:.2f} less"
        if self.loss:
            more = sorted((1 / self.low, 1 / self.high))
            text = f"x{more[0]:.2f}" if f"{more[0]:.2f}" == f"{more[1]:.2f}" else f"x{more[0]:.2f} .. x{more[1]:.2f}"
            return f"{text} MORE than dense"
        return "the same" if round(low, 2) == round(high, 2) == 1 else f"x{low:.2f} .. x{high:.2f}: less or MORE"


@dataclass(frozen=True, kw_only=True)
class Spending:
    """One row of the bill.

    Attributes:
        seconds: Wall time, or None for a run that was not run and that nothing is known to take as long as.
        steps: Optimizer steps.
        images: Samples that went through the model.
        macs: Multiply-accumulates, or None if the model could not be counted.
        bit_macs: MACs weighted with the share of 32 bits of both operands, or None.
        moved_bytes: Bytes moved, each tensor once per pass, or None.
        peak_bytes: Peak memory, an estimate in a dense run that was not run, or None if not measured.
        joules: Energy of a meter, or None if there was none.
        modelled_joules: Energy of the price table, low and high with the DRAM price, or None.
        passes: Counted bit-MACs by pass (`earlybird.cost.arithmetic.PASSES`), or None.
        operations: Counted primitive operations by name (``'mult fp32'``), or None.
    """

    seconds: Measured | Estimated | None
    steps: Counted
    images: Counted
    macs: Counted | None
    bit_macs: Counted | None
    moved_bytes: Counted | None
    peak_bytes: Measured | Estimated | None
    joules: Measured | None
    modelled_joules: Modelled | None
    passes: Mapping[str, float] | None = None
    operations: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain text and numbers, each quantity with its kind."""
        counts = {name: None if (found := getattr(self, name)) is None else dict(found) for name in _COUNTS}
        return {**{name: _quantity_to_json(getattr(self, name)) for name in _quantities()}, **counts}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Spending:
        """Rebuild what `to_json` wrote."""
        counts = {name: state.get(name) for name in _COUNTS}  # bills of older versions lack them
        return cls(**{**{name: _quantity_from_json(state[name]) for name in _quantities()}, **counts})


_COUNTS = ("passes", "operations")


def _quantities() -> list[str]:
    return [key.name for key in fields(Spending) if key.name not in _COUNTS]


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What a run spent.

    Attributes:
        phases: Rows by phase, in order.
        device: Where the run was.
        parameters: Parameters of the model at the end, or None if not counted.
        dense: The bill to compare with; measured if its seconds are `Measured`, else an estimate. Or None.
    """

    phases: Mapping[str, Spending] = field(default_factory=dict)
    device: str = "cpu"
    parameters: int | None = None
    dense: Bill | None = None

    @property
    def total(self) -> Spending:
        """The sum of all phases; the highest of the peaks. What one phase lacks, the total lacks.

        A phase without a peak in which no image and no step was done ('lost': what was done twice) hides no peak.
        """
        rows = list(self.phases.values())
        took_time = [row for row in rows if row.seconds is None or row.seconds.value > 0]
        had_memory = [row for row in took_time if row.peak_bytes or row.images.value or row.steps.value]
        return Spending(
            seconds=_metered([row.seconds for row in rows], sum) if rows else Measured(0.0, "s", "clock"),
            steps=Counted(sum(row.steps.value for row in rows), "steps"),
            images=Counted(sum(row.images.value for row in rows), "images"),
            macs=_counted_sum([row.macs for row in rows], "MAC"),
            bit_macs=_counted_sum([row.bit_macs for row in rows], "MAC"),
            moved_bytes=_counted_sum([row.moved_bytes for row in rows], "B"),
            peak_bytes=_metered([row.peak_bytes for row in had_memory], max),
            joules=_metered([row.joules for row in took_time], sum),
            modelled_joules=_modelled_sum([row.modelled_joules for row in rows]),
            passes=_sum_by_name([row.passes for row in rows]),
            operations=_sum_by_name([row.operations for row in rows]),
        )

    @property
    def was_run(self) -> bool:
        """Whether the time of all phases was measured; else it is an estimate, or there is none."""
        return isinstance(self.total.seconds, Measured)

    def against(self, dense: Bill) -> Bill:
        """Return this bill with ``dense`` as the one to compare with."""
        return replace(self, dense=replace(dense, dense=None))

    @property
    def ratios(self) -> dict[str, Ratio]:
        """Dense divided by this run, for each quantity that both totals have; empty without a dense bill."""
        if self.dense is None:
            return {}
        ours, theirs = self.total, self.dense.total
        names = ("seconds", "peak_bytes", "joules", "macs", "bit_macs", "modelled_joules")
        found = {name: _ratio(getattr(ours, name), getattr(theirs, name)) for name in names}
        return {name: ratio for name, ratio in found.items() if ratio is not None}

    @property
    def remarks(self) -> list[str]:
        """What has to be said about the numbers, in whole sentences."""
        ratios, remarks = self.ratios, []
        if self.phases and self.total.seconds is None:
            return ["Nothing was run: all of this is counted or modelled, and says nothing about time."]
        if self.dense is not None and not self.dense.was_run:
            seconds = self.dense.total.seconds
            told = f"is an estimate from {seconds.basis}" if isinstance(seconds, Estimated) else "is not known"
            remarks.append(f"Dense was not run: its time {told}.")
        names = {key: label for key, label in _LABELS.items() if key in ratios}
        losses = [f"{label} {ratios[key]} ({ratios[key].kind})" for key, label in names.items() if ratios[key].loss]
        if losses:
            remarks.append(f"A loss: {', '.join(losses)}.")
        on_paper = [
            f"{label} {ratios[key]} ({ratios[key].kind})"
            for key, label in names.items()
            if ratios[key].kind in ("counted", "modelled") and ratios[key].gain
        ]
        on_the_machine = [key for key in ("seconds", "joules", "peak_bytes") if key in ratios and ratios[key].gain]
        if on_paper and not on_the_machine:
            remarks.append(
                f"Only counted or modelled numbers improved: {', '.join(on_paper)}. "
                "On this device nothing that was measured did."
            )
        elif on_paper and "seconds" in ratios and not ratios["seconds"].gain:
            remarks.append(f"Time did not improve, although {', '.join(on_paper)}.")
        energy = ratios.get("modelled_joules")
        if energy is not None and not energy.gain and not energy.loss and round(energy.low, 2) != round(energy.high, 2):
            remarks.append("Whether modelled energy is a gain depends on the price of a DRAM access.")
        return remarks

    def to_json(self) -> dict[str, Any]:
        """Return the bill as plain text and numbers; `from_json` reads them."""
        return {
            "phases": {name: row.to_json() for name, row in self.phases.items()},
            "total": self.total.to_json(),
            "device": self.device,
            "parameters": self.parameters,
            "dense": None if self.dense is None else self.dense.to_json(),
            "ratios": {
                name: {"low": ratio.low, "high": ratio.high, "kind": ratio.kind} for name, ratio in self.ratios.items()
            },
            "remarks": self.remarks,
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Bill:
        """Rebuild what `to_json` wrote; total, ratios and remarks are worked out anew.

        Raises:
            InputError: ``state`` is not a bill.
        """
        try:
            return cls(
                phases={name: Spending.from_json(row) for name, row in state["phases"].items()},
                device=state["device"],
                parameters=state["parameters"],
                dense=None if state["dense"] is None else cls.from_json(state["dense"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a bill: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        lines = [f"Training bill ({self.device})", ""]
        rows = [(name, row) for name, row in self.phases.items()] + [("total", self.total)]
        if self.dense is not None:
            rows.append(("dense" if self.dense.was_run else "dense (estimate)", self.dense.total))
        cells = [[name, *_cells(row)] for name, row in rows]
        if self.dense is not None:
            cells.append(["against dense", *(_saved(self.ratios.get(key)) for key in _COLUMNS)])
        lines += _table([["", *_COLUMNS.values()], *cells], rules=(1, 1 + len(self.phases)))
        lines += ["", _LEGEND]
        if self.parameters is not None:
            before = "" if self.dense is None or self.dense.parameters is None else f" of {self.dense.parameters:,}"
            lines.append(f"Parameters at the end: {self.parameters:,}{before}.")
        lines += _operations(self)
        return "\n".join(lines + self.remarks)


_COLUMNS = {
    "seconds": "time",
    "peak_bytes": "peak memory",
    "joules": "measured energy",
    "steps": "steps",
    "images": "images",
    "macs": "MACs",
    "bit_macs": "bit-MACs",
    "modelled_joules": "modelled energy",
}
_LABELS = {
    "seconds": "time",
    "peak_bytes": "peak memory",
    "joules": "measured energy",
    "macs": "MACs",
    "bit_macs": "bit-MACs",
    "modelled_joules": "modelled energy",
}
_LEGEND = (
    "Plain: measured.  ~ estimate.  # counted (bit-MACs: MACs times the share of 32 bits of each operand).  "
    f"[..] modelled ({CITATION}; low and high DRAM price)."
)


def _cells(row: Spending) -> list[str]:
    return [
        "not measured" if row.seconds is None else str(row.seconds),
        "not measured" if row.peak_bytes is None else str(row.peak_bytes),
        "not measured" if row.joules is None else str(row.joules),
        _amount(row.steps),
        _amount(row.images),
        "not counted" if row.macs is None else _amount(row.macs),
        "not counted" if row.bit_macs is None else _amount(row.bit_macs),
        "not counted" if row.modelled_joules is None else str(row.modelled_joules) if row.modelled_joules.high else "-",
    ]


def _operations(bill: Bill) -> list[str]:
    """Say which operations were counted, where they are more than those of one floating point."""
    total = bill.total
    if not total.operations or not total.passes or len(total.operations) <= 2:
        return []
    named = [
        ("Operations", {name: amount for name, amount in total.operations.items() if amount}),
        ("Bit-MACs by pass", total.passes),
    ]
    return [
        f"{title}: " + ", ".join(f"{name} {Counted(amount, '')}" for name, amount in amounts.items()) + "."
        for title, amounts in named
    ]


def _amount(quantity: Counted) -> str:
    """Write a count under a column that names its unit."""
    return str(replace(quantity, unit="")) if quantity.value else "-"


def _saved(ratio: Ratio | None) -> str:
    return "" if ratio is None else str(ratio).replace(" than dense", "")


def _table(rows: Sequence[Sequence[str]], rules: Sequence[int]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for index, row in enumerate(rows):
        if index in rules:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
        padded = [
            cell.ljust(width) if n == 0 else cell.rjust(width) for n, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _ratio(ours: Quantity | None, theirs: Quantity | None) -> Ratio | None:
    if ours is None or theirs is None:
        return None
    kind = max(_kind(ours), _kind(theirs), key=list(_KINDS).index)
    (our_low, our_high), (their_low, their_high) = _range(ours), _range(theirs)
    if min(our_low, our_high, their_low, their_high) <= 0:
        return None
    return Ratio(their_low / our_low, their_high / our_high, kind)


def _kind(quantity: Quantity) -> str:
    return next(name for name, type_ in _KINDS.items() if isinstance(quantity, type_))


def _range(quantity: Quantity) -> tuple[float, float]:
    if isinstance(quantity, Modelled):
        return quantity.low, quantity.high
    return quantity.value, quantity.value


def _counted_sum(parts: Sequence[Counted | None], unit: str) -> Counted | None:
    known = [part for part in parts if part is not None]
    return Counted(sum(part.value for part in known), unit) if len(known) == len(parts) else None


def _sum_by_name(parts: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    names = dict.fromkeys(name for part in known for name in part)
    return {name: sum(part.get(name, 0) for part in known) for name in names}


def _modelled_sum(parts: Sequence[Modelled | None]) -> Modelled | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return Modelled(sum(part.low for part in known), sum(part.high for part in known), "J", CITATION)


def _metered(parts: Sequence[Measured | Estimated | None], combine: Callable[[list[float]], float]) -> Any:
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    return replace(known[0], value=combine([part.value for part in known]))


def _quantity_to_json(quantity: Quantity | None) -> dict[str, Any] | None:
    if quantity is None:
        return None
    return {"kind": _kind(quantity), **{key.name: getattr(quantity, key.name) for key in fields(quantity)}}


def _quantity_from_json(state: Mapping[str, Any] | None) -> Any:
    if state is None:
        return None
    return _KINDS[state["kind"]](**{key: value for key, value in state.items() if key != "kind"})
