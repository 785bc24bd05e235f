"""Errors that say what was found, what was needed and what to type next.

Every error a user can cause is an `EarlybirdError`; the command line prints it on one line, without a traceback,
and ends with its exit code. Anything else that escapes is our own failure (exit code 1, with traceback).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EarlybirdError(Exception):
    """An error a user can act on.

    Args:
        found: What was met, with the name of the thing (file, key, layer).
        needed: What would have been right.
        hint: What to type or change next.
    """

    exit_code = 2

    def __init__(self, found: str, *, needed: str = "", hint: str = "") -> None:
        self.found, self.needed, self.hint = found, needed, hint
        super().__init__("; ".join(part for part in (found, needed, hint) if part))


class InputError(EarlybirdError, ValueError):
    """Wrong input: recipe, flag, argument or ticket."""


class DataError(EarlybirdError):
    """A data set that is missing, short, corrupt or does not fit."""


class ShrinkError(EarlybirdError):
    """A model that cannot be shrunk; raised before anything was changed."""


class CheckpointError(EarlybirdError):
    """A checkpoint that is damaged or belongs to another recipe."""


class DivergedError(EarlybirdError):
    """The loss became NaN or infinite."""


class Interrupted(EarlybirdError):
    """The run was stopped by a signal, and its state is saved."""

    exit_code = 3


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return a hint with the known name that looks most like ``name``, or ``otherwise`` where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else otherwise
