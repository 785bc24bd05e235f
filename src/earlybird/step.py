"""One type for points in training time: ``'3ep'``, ``'0.25ep'``, ``'2000it'``, ``'1ep50it'``, ``'80%'``.

A bare number is refused, because nobody remembers whether it meant epochs or iterations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from earlybird.errors import InputError

_PATTERN = re.compile(r"(?:(?P<percent>\d+(?:\.\d+)?)%)?(?:(?P<epochs>\d+(?:\.\d+)?)ep)?(?:(?P<iterations>\d+)it)?")


@dataclass(frozen=True)
class Step:
    """A duration or a point in training: epochs, plus iterations (optimizer steps), plus a share of the whole run.

    Attributes:
        epochs: Exact number of epochs, possibly a fraction of one.
        iterations: Optimizer steps on top.
        share: Of all optimizer steps of the run, on top; 1 is the whole run.
    """

    epochs: Fraction = Fraction(0)
    iterations: int = 0
    share: Fraction = Fraction(0)

    @classmethod
    def parse(cls, text: Step | str) -> Step:
        """Read ``'3ep'``, ``'0.25ep'``, ``'2000it'``, ``'1ep50it'`` or ``'80%'``; anything else is an `InputError`."""
        if isinstance(text, Step):
            return text
        match = _PATTERN.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None or not any(match.groups()):
            raise InputError(
                f"step {text!r} has no unit or cannot be read",
                hint="write epochs as '3ep', iterations as '2000it', or a share of the run as '80%'",
            )
        return cls(Fraction(match["epochs"] or 0), int(match["iterations"] or 0), Fraction(match["percent"] or 0) / 100)

    def in_iterations(self, steps_per_epoch: int | None, total_steps: int | None = None) -> int:
        """Return the number of optimizer steps, rounded to the nearest.

        Args:
            steps_per_epoch: Optimizer steps in an epoch; needed only when the step has an epoch part.
            total_steps: Optimizer steps of the run; needed only when the step is a share of it.

        Raises:
            InputError: The step counts epochs, or is a share of the run, and their length is unknown.
        """
        if self.epochs and not steps_per_epoch:
            raise InputError(
                f"step '{self}' counts epochs, but the length of an epoch is unknown",
                hint="pass steps_per_epoch=len(loader) to attach, or write the step in iterations ('500it')",
            )
        if self.share and not total_steps:
            raise InputError(
                f"step '{self}' is a share of the run, whose length is unknown",
                hint="pass total_steps=epochs * len(loader) to attach, or write the step in iterations ('500it')",
            )
        return round(self.epochs * (steps_per_epoch or 0) + self.share * (total_steps or 0)) + self.iterations

    def later(self, iterations: int) -> Step:
        """Return the step that is so many optimizer steps after this one."""
        return replace(self, iterations=self.iterations + iterations)

    def __str__(self) -> str:
        text = f"{_decimal(100 * self.share)}%" if self.share else ""
        text += f"{_decimal(self.epochs)}ep" if self.epochs else ""
        return text + (f"{self.iterations}it" if self.iterations or not text else "")

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
