"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

import math

TIMES, MINUS, MICRO = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}", "\N{MICRO SIGN}"

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def seconds(value: float) -> str:
    """Return a duration: ``0.42 s``, ``38.1 s``, ``12 min 05 s``, ``3 h 20 min``."""
    if value < 99.95:
        return f"{_three(value)} s"
    minutes = value / 60
    if minutes < 60:
        whole = round(value)
        return f"{whole // 60} min {whole % 60:02d} s"
    whole = round(minutes)
    return f"{whole // 60} h {whole % 60:02d} min"


def count(value: float, unit: str = "") -> str:
    """Return a count with a decimal prefix: ``1.26 TMAC``."""
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor:
            return f"{_three(value / factor)} {prefix}{unit}"
    return f"{_three(value)} {unit}".rstrip()


def size(value: float) -> str:
    """Return bytes with a binary prefix: ``1.5 GiB``."""
    for factor, prefix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= factor:
            return f"{_three(value / factor)} {prefix}"
    return f"{value:.0f} B"


def joules(value: float) -> str:
    """Return energy: ``0.31 J``, ``4.2 kJ``; below a millijoule in microjoules."""
    if 0 < abs(value) < 1e-3:
        return f"{_three(value * 1e6)} {MICRO}J"
    if 0 < abs(value) < 1:
        return f"{_three(value * 1e3)} mJ"
    return count(value, "J")


def ratio(cost: float, reference: float) -> str:
    """Say how ``cost`` compares with ``reference``: ``2.40x less``, ``1.20x MORE``, ``the same``."""
    if not cost or not reference or not math.isfinite(reference / cost):
        return "not comparable"
    factor = reference / cost
    if abs(factor - 1) < 0.005:
        return "the same"
    return f"{_times(factor)}{TIMES} less" if factor > 1 else f"{_times(1 / factor)}{TIMES} MORE"


def points(difference: float) -> str:
    """Return a difference of two accuracies (0 to 1) in percentage points: ``+0.20 points``."""
    return f"{100 * difference:+.2f} points".replace("-", MINUS)


def _times(factor: float) -> str:
    return f"{factor:.2f}" if factor < 10 else f"{factor:.0f}"


def _three(value: float) -> str:
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 4)}f}"
