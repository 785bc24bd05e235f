"""What came out of a run: the value that `train` returns, and its file."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from earlybird.cost.bill import Bill
from earlybird.errors import InputError
from earlybird.files import read_json


@dataclass(frozen=True)
class Result:
    """What came out of a run.

    Attributes:
        folder: Run folder.
        accuracy: On the test images, 0 to 1.
        loss: On the test images, without label smoothing.
        epochs: Of the recipe.
        steps: Optimizer steps.
        seconds: Measured wall time, set-up included.
        parameters: Weights of the network at the end.
        drawn_at: Optimizer step after which the ticket was drawn, or None.
        bill: What it cost.
        judged_by: What the accuracy is that of; empty: the network's own classifier.
        resumed: Whether it was put together from more than one process.
        nonzero: Those of the parameters that are not zero, or None in results of older versions.
    """

    folder: Path
    accuracy: float
    loss: float
    epochs: float
    steps: int
    seconds: float
    parameters: int
    drawn_at: int | None
    bill: Bill
    judged_by: str = ""
    resumed: bool = False
    nonzero: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all but the folder and the bill, which has a file of its own, as plain numbers."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _ELSEWHERE}
        seconds = {name: spent.seconds.value for name, spent in self.bill.phases.items() if spent.seconds is not None}
        return {**values, "loss": self.loss if math.isfinite(self.loss) else None, "phase_seconds": seconds}

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """Read ``result.json`` and ``bill.json`` of a finished run; of any other run, None.

        Raises:
            InputError: A file is damaged, or the bill is missing.
        """
        done = read_json(folder / "result.json")
        if done is None:
            return None
        bill = read_json(folder / "bill.json")
        if bill is None:
            raise InputError(f"{folder} has a result, but no bill.json", hint="delete result.json and resume")
        known = {field.name for field in fields(cls)} - _ELSEWHERE
        values = {name: value for name, value in done.items() if name in known}
        values["loss"] = math.nan if values["loss"] is None else values["loss"]
        return cls(folder=folder, bill=Bill.from_json(bill), **values)


_ELSEWHERE = {"folder", "bill"}
