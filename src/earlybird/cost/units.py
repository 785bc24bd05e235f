"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"

_DECIMAL = tuple((10.0 ** (3 * power), prefix) for power, prefix in enumerate(("n", "u", "m", "", *"kMGTPE"), start=-3))
_BINARY = tuple((1024.0**power, prefix) for power, prefix in enumerate(("", "Ki", "Mi", "Gi", "Ti")))


def text(value: float, unit: str) -> str:
    """Return a number with its unit: ``s`` as a duration, ``B`` in powers of 1024, all else with decimal prefixes."""
    known = {"s": seconds, "B": size, "J": joules}
    return known[unit](value) if unit in known else count(value, unit)


def seconds(value: float) -> str:
    """Return a duration: ``420 ms``, ``38.1 s``, ``12 min 05 s``, ``3 h 20 min``."""
    if value < 0.9995:
        return f"{1000 * value:.3g} ms" if value else "0 s"
    if value < 99.95:
        return f"{value:.3g} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: float, unit: str = "") -> str:
    """Return a count with a decimal prefix: ``1.26 TMAC``."""
    return _scaled(value, unit, _DECIMAL[3:])


def size(value: float) -> str:
    """Return bytes with a binary prefix: ``1.5 GiB``."""
    return _scaled(value, "B", _BINARY)


def joules(value: float) -> str:
    """Return energy: ``16.3 uJ``, ``310 mJ``, ``4.2 kJ``."""
    return _scaled(value, "J", _DECIMAL)


def points(difference: float) -> str:
    """Return a difference of two accuracies (0 to 1) in percentage points: ``+0.20 points``."""
    return f"{100 * difference:+.2f} points".replace("-", MINUS)


def _scaled(value: float, unit: str, scale: tuple[tuple[float, str], ...]) -> str:
    # 0.9995: what would print as 1000 gets the next prefix
    factor, prefix = next((entry for entry in reversed(scale) if value >= 0.9995 * entry[0]), scale[0])
    number = value / factor
    digits = f"{number:.0f}" if number >= 100 else f"{number:.3g}"
    return f"{digits} {prefix if value else ''}{unit}".rstrip()
