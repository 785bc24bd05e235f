"""The folder of a run: claimed by one run at a time, its rows never written twice.

The lock is an advisory one on ``run.lock``; the system lifts it when the process ends, however it ends. The file's text
is a heartbeat: the seconds the run had taken when it was last seen alive. After a SIGKILL it tells how much time was
lost since the last checkpoint, which belongs on the bill.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from earlybird.errors import EarlybirdError, InputError
from earlybird.files import is_disk_full, read_json, read_rows, write_json, write_text

_BEAT_EVERY_S = 0.5
_LEFTOVER = re.compile(
    r"\.(recipe\.toml|metrics\.jsonl|(model|ticket|ticket-round\d+|first|start|checkpoint-\d+)\.safetensors"
    r"|(comparison|verification)\.(toml|json)"
    r"|(tune|environment|change|history|bill|result|side-by-side|checkpoint-\d+)\.json)\.[a-z0-9_]+\.tmp"
)
"""Temporary files that a kill can leave behind, by the names of what a run writes."""


class RunFolder:
    """A locked run folder; close it, or use it in a ``with`` statement.

    Until `check_unused` or `accept` has found that the folder is the run's own, nothing in it is changed but the lock,
    and `close` takes a lock away that was not there before.

    Args:
        path: Made if it is not there.
        writer: False on all ranks but the first of a distributed run: nothing is locked or written.

    Raises:
        InputError: Another run uses the folder.
    """

    def __init__(self, path: Path, *, writer: bool = True) -> None:
        self.path, self.writer = path, writer
        self._lock: int | None = None
        self._accepted = False
        self._beaten = 0.0
        if not writer:
            return
        self._made = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock_is_new = not (path / "run.lock").exists()
            self._lock = os.open(path / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise InputError(f"cannot write to {path} ({error.strerror})", hint="choose another --out") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            self._lock = None
            if isinstance(error, BlockingIOError):
                raise InputError(
                    f"{path} is in use by another run", hint="wait until it ends, or choose another --out"
                ) from error
            raise InputError(
                f"{path} cannot be locked ({error.strerror})", hint="choose an --out on a file system with locks"
            ) from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lift the lock."""
        if self._lock is not None:
            if self._lock_is_new and not self._accepted:
                (self.path / "run.lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def accept(self) -> None:
        """Take the folder as the run's own, and remove what writes left behind that a kill cut short."""
        if not self.writer:
            return
        self._accepted = True
        for left in self.path.glob(".*.tmp"):
            if _LEFTOVER.fullmatch(left.name):
                left.unlink(missing_ok=True)

    def check_unused(self) -> None:
        """Make sure that a new run would write over nothing, and take the folder.

        Raises:
            InputError: The folder holds a run, or anything else.
        """
        if not self.writer:
            return
        if (self.path / "recipe.toml").exists():
            if (self.path / "result.json").exists():
                raise InputError(f"{self.path} holds a finished run", hint="choose another --out")
            raise InputError(
                f"{self.path} holds an unfinished run",
                hint=f"go on with 'earlybird resume {self.path}', or choose another --out",
            )
        names = sorted(entry.name for entry in self.path.iterdir())
        # a run that was killed at its very beginning leaves a lock and a half-written recipe
        others = [name for name in names if name != "run.lock" and not _LEFTOVER.fullmatch(name)]
        if others:
            raise InputError(
                f"{self.path} is not empty (it holds {others[0]})", needed="a new folder", hint="choose another --out"
            )
        self.accept()
        if self._lock is not None:
            os.ftruncate(self._lock, 0)  # another run's heartbeat

    @property
    def begun(self) -> bool:
        """Whether the run got as far as its first step."""
        return (self.path / "environment.json").exists()

    def discard_unless_begun(self) -> None:
        """Leave no trace of a run that failed before its first step, so that the next try finds the folder free."""
        if not self.writer or self.begun:
            return
        for name in ("recipe.toml", "tune.json", "run.lock"):
            (self.path / name).unlink(missing_ok=True)
        if self._made:
            with contextlib.suppress(OSError):  # it holds something else
                self.path.rmdir()

    def beat(self, seconds: float) -> None:
        """Leave word that the run has taken ``seconds`` so far and lives; costs nothing if called at every step."""
        now = time.perf_counter()
        if self._lock is not None and now - self._beaten > _BEAT_EVERY_S:
            self._beaten = now
            with contextlib.suppress(OSError):  # a full disk is found out by what matters more
                os.pwrite(self._lock, f"{seconds:.3f}\n".encode().ljust(32), 0)

    def last_beat(self) -> float:
        """Return the seconds that the run had taken when it was last seen alive; 0 if never."""
        try:
            return float((self.path / "run.lock").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return 0.0

    def write_json(self, name: str, value: Any) -> None:
        """Write one of the folder's JSON files, atomically."""
        if self.writer:
            write_json(self.path / name, value)

    def read_json(self, name: str) -> Any:
        """Read one of the folder's JSON files, or return None where it is not there.

        Raises:
            InputError: The file is not JSON.
        """
        return read_json(self.path / name)

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``.

        Raises:
            EarlybirdError: The disk is full.
        """
        if not self.writer:
            return
        try:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise self._explained(error) from error

    def sync_rows(self) -> None:
        """Wait until the rows are on the disk; a checkpoint makes them final.

        Raises:
            EarlybirdError: The disk is full.
        """
        if not self.writer or not (self.path / "metrics.jsonl").exists():
            return
        try:
            with open(self.path / "metrics.jsonl", "rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> Exception:
        if not is_disk_full(error):
            return error
        return EarlybirdError(
            f"no space left on the disk of {self.path}",
            needed="the last checkpoint is whole",
            hint=f"free some space and go on with 'earlybird resume {self.path}'",
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of ``metrics.jsonl``; a last line that a kill cut short is left out."""
        return read_rows(self.path / "metrics.jsonl")

    def cut_rows(self, step: int) -> None:
        """Drop the rows after ``step``: the run goes on from there and will write them again."""
        if self.writer and (self.path / "metrics.jsonl").exists():
            kept = [row for row in self.rows() if row["step"] <= step]
            write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
