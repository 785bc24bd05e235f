"""What the hyper-parameters of methods have in common: a help text beside each, and checks that name the value."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any

from earlybird.errors import InputError


def option(default: Any, help: str, *, path: bool = False) -> Any:
    """Return the field of a method's dataclass, with the text that its flag shows.

    Args:
        default: Value where nothing is said.
        help: One line.
        path: Whether the value names a file or a folder, which a run must find again from another folder.
    """
    return field(default=default, metadata={"help": help, "path": path})


def check_share(name: str, value: Any) -> float:
    """Return ``value`` as a float in (0, 1], or raise an `InputError` that names it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) <= 1:
        raise InputError(f"{name} is {value!r}", needed="a share greater than 0 and at most 1")
    return float(value)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise an `InputError` that names ``value`` where it is not one of ``allowed``."""
    if value not in allowed:
        raise InputError(f"{name} is {value!r}", needed=f"one of {', '.join(allowed)}")


def check_number(name: str, value: Any, fits: Callable[[float], bool], needed: str) -> None:
    """Raise an `InputError` that names ``value`` where it is no number that ``fits``, and says what is ``needed``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise InputError(f"{name} is {value!r}", needed=needed)


def check_count(name: str, value: Any, example: str, *, optional: bool = True) -> int | None:
    """Return a whole number of at least 1, or None where it may be left out; else raise an `InputError`."""
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is {value!r}", needed=f"a whole number of at least 1, such as {example}")
    return value


def accepted(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``offered`` that ``function`` names as parameters and takes by keyword."""
    by_keyword = {
        name
        for name, item in inspect.signature(function).parameters.items()
        if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
    }
    return {name: value for name, value in offered.items() if name in by_keyword}
