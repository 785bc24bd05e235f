"""What a method tells the report about its run: numbers over the steps, and inputs that stood out.

A running method may have ``traces()``, a list of `Trace`, and ``executed_per_input()``, a number for each input of the
last evaluation, in its order. The shipped loop writes both into the run folder.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Ranking", "Trace", "Tracing", "png", "rank_inputs"]

SHOWN = 10
"""Inputs at either end of a ranking."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Numbers over the steps of a run.

    Attributes:
        title: What they are.
        unit: Of a number, for the axis: ``'bits'``, ``'share'``.
        series: By name (a layer, say), pairs of step and number.
        note: A sentence below the title.
        steps_hold: A number holds until the next one comes, as bits do, and not only at its step.
    """

    title: str
    unit: str
    series: Mapping[str, Sequence[tuple[int, float]]]
    note: str = ""
    steps_hold: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain text and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Trace:
        """Rebuild what `to_json` wrote."""
        series = {name: [(int(step), float(value)) for step, value in pairs] for name, pairs in state["series"].items()}
        return cls(**{**state, "series": series})


@runtime_checkable
class Tracing(Protocol):
    """What is asked of a running method."""

    def traces(self) -> list[Trace]: ...  # noqa: D102


@runtime_checkable
class Ranking(Protocol):
    """What is asked of a running method that spends more on some inputs than on others."""

    def executed_per_input(self) -> Tensor | None: ...  # noqa: D102


def rank_inputs(amounts: Tensor, images: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Return the inputs with the smallest and the largest amounts, as plain text and numbers.

    Args:
        amounts: Of each input, ``(N,)``.
        images: uint8 ``(N, C, H, W)``.
        labels: int64 ``(N,)``.
        classes: Names by label.

    Returns:
        ``mean``; and ``least`` and ``most``, up to `SHOWN` each, with ``amount``, ``label`` and ``png`` (base64).
    """
    order = amounts.argsort(stable=True).tolist()

    def show(index: int) -> dict[str, Any]:
        name = classes[int(labels[index])]
        return {"amount": float(amounts[index]), "label": name, "png": png(images[index])}

    count = min(SHOWN, len(order) // 2)
    return {
        "mean": float(amounts.double().mean()),
        "least": [show(index) for index in order[:count]],
        "most": [show(index) for index in order[::-1][:count]],
    }


def png(image: Tensor) -> str:
    """Return a uint8 image ``(C, H, W)`` of 1 or 3 channels as a PNG in base64."""
    from PIL import Image

    array = image.cpu().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array[..., :3]).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
