"""One type for points in training time: ``'3ep'``, ``'0.25ep'``, ``'2000it'``, ``'1ep50it'``.

A bare number is refused, because nobody remembers whether it meant epochs or iterations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from earlybird.errors import InputError

_PATTERN = re.compile(r"(?:(?P<epochs>\d+(?:\.\d+)?)ep)?(?:(?P<iterations>\d+)it)?")


@dataclass(frozen=True)
class Step:
    """A duration or a point in training, in epochs plus iterations (optimizer steps).

    Attributes:
        epochs: Exact number of epochs, possibly a fraction of one.
        iterations: Optimizer steps on top.
    """

    epochs: Fraction = Fraction(0)
    iterations: int = 0

    @classmethod
    def parse(cls, text: Step | str) -> Step:
        """Read ``'3ep'``, ``'0.25ep'``, ``'2000it'`` or ``'1ep50it'``; anything else is an `InputError`."""
        if isinstance(text, Step):
            return text
        match = _PATTERN.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None or not any(match.groups()):
            raise InputError(
                f"step {text!r} has no unit or cannot be read", hint="write epochs as '3ep' or iterations as '2000it'"
            )
        return cls(Fraction(match["epochs"] or 0), int(match["iterations"] or 0))

    def in_iterations(self, steps_per_epoch: int | None) -> int:
        """Return the number of optimizer steps, rounded to the nearest.

        Args:
            steps_per_epoch: Optimizer steps in an epoch; needed only when the step has an epoch part.

        Raises:
            InputError: The step counts epochs and ``steps_per_epoch`` is unknown.
        """
        if self.epochs and not steps_per_epoch:
            raise InputError(
                f"step '{self}' counts epochs, but the length of an epoch is unknown",
                hint="pass steps_per_epoch=len(loader) to attach, or write the step in iterations ('500it')",
            )
        return round(self.epochs * (steps_per_epoch or 0)) + self.iterations

    def __str__(self) -> str:
        epochs = f"{_decimal(self.epochs)}ep" if self.epochs else ""
        return epochs + (f"{self.iterations}it" if self.iterations or not epochs else "")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Let recipes hold steps: read from text, write as text."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )


def _decimal(value: Fraction) -> str:
    """Write a fraction so that `Step.parse` reads the same one; what no decimal equals is cut after 12 places."""
    whole, rest = divmod(round(value * 10**12), 10**12)
    digits = f"{rest:012d}".rstrip("0")
    return f"{whole}.{digits}" if digits else str(whole)
