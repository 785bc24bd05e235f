"""What a person sees while a run goes on: a bar on a terminal, else one plain line an evaluation, or nothing."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from earlybird.objective import measure

_EVERY_S = 0.2


class Display:
    """Shows steps, rows and messages of one run.

    Args:
        total: Optimizer steps of the run.
        steps_per_epoch: Of them.
        step: Steps that are done already.
        quiet: Show only warnings.
        mute: Show nothing at all; for all ranks but the first.
        bar: Draw a bar on a terminal; without, lines.
    """

    def __init__(
        self,
        total: int,
        steps_per_epoch: int,
        step: int = 0,
        *,
        quiet: bool = False,
        mute: bool = False,
        bar: bool = True,
    ) -> None:
        self._total, self._steps_per_epoch = total, steps_per_epoch
        self._quiet, self._mute = quiet or mute, mute
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._accuracy = ""
        self._shown = (time.perf_counter(), step)
        self._rate = 0.0
        self._bar: Progress | None = None
        if self._console.is_terminal and bar and not self._quiet:
            # drawn when a step says so: a thread that redraws would take time from the training
            self._bar = Progress(
                TextColumn("{task.fields[where]}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                console=self._console,
                auto_refresh=False,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=step, where="", text="")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def due(self) -> bool:
        """Tell whether `step` would show anything now; call it at every step."""
        return self._bar is not None and time.perf_counter() - self._shown[0] > _EVERY_S

    def step(self, step: int, loss: float, images_per_step: int, status: Mapping[str, float | str]) -> None:
        """Redraw the bar."""
        if self._bar is None:
            return
        now = time.perf_counter()
        before, last = self._shown
        if step > last:
            rate = (step - last) / (now - before)
            self._rate = rate if not self._rate else 0.7 * self._rate + 0.3 * rate
        self._shown = (now, step)
        left = (self._total - step) / self._rate if self._rate else 0.0
        parts = [f"loss {loss:.3f}", self._accuracy, *(_field(name, value) for name, value in status.items())]
        parts += [f"{self._rate * images_per_step:,.0f} images/s", f"{_duration(left)} left"]
        where = f"epoch {step / self._steps_per_epoch:.1f}/{self._total / self._steps_per_epoch:.4g}"
        self._bar.update(self._task, completed=step, where=where, text="  ".join(part for part in parts if part))
        self._bar.refresh()

    def row(self, row: Mapping[str, Any], status: Mapping[str, float | str]) -> None:
        """Show a row of ``metrics.jsonl``."""
        self._accuracy = f"{measure(row.get('judged_by', ''))} {row['accuracy']:.2%}"
        if not self._quiet and self._bar is None:
            extra = "".join(f"  {_field(name, value)}" for name, value in status.items())
            self._console.print(
                f"epoch {row['epoch']:g}/{self._total / self._steps_per_epoch:.4g}  loss {row['loss']:.4f}  "
                f"{self._accuracy}  {row['images_per_s']:,.0f} images/s  {_duration(row['seconds'])}{extra}",
                markup=False,
            )

    def say(self, text: str) -> None:
        """Show a line of text, unless quiet."""
        if not self._quiet:
            self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Show a warning, quiet or not."""
        if not self._mute:
            self._console.print(f"warning: {text}", markup=False)


@contextlib.contextmanager
def warnings_shown(warn: Callable[[str], None]) -> Iterator[None]:
    """Send our own warnings to ``warn``, as one line; all others go where they always go."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if Path(__file__).parents[1] in Path(filename).parents:
                warn(str(message))
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _field(name: str, value: float | str) -> str:
    return f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{seconds:.1f} s"
