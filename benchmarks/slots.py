"""Several runs at a time, each on cores of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import IO


class Children:
    """Processes in sessions of their own, which `kill` ends with all that they started."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self.killed = False

    def run(self, command: Sequence[str], output: IO[str], environment: Mapping[str, str], limit_s: float) -> int:
        """Return the exit code of ``command``.

        Raises:
            subprocess.TimeoutExpired: It took longer than ``limit_s`` and was killed.
        """
        with self._lock:
            if self.killed:
                return -signal.SIGKILL
            process = subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True, env=dict(environment), text=True
            )
            self._running.add(process)
        try:
            return process.wait(limit_s)
        finally:
            with self._lock:
                self._running.remove(process)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def kill(self) -> None:
        """Kill all that run, and let nothing begin any more."""
        with self._lock:
            self.killed = True
            for process in self._running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


def cores_of_slots(slots: int) -> list[set[int]]:
    """Return the cores of each of ``slots`` equal shares of those that this process may use.

    Raises:
        ValueError: More slots than cores, or a system (not Linux) that does not pin processes.
    """
    if slots == 1 and not hasattr(os, "sched_getaffinity"):
        return [set(range(os.cpu_count() or 1))]
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError(f"runs side by side need pinned processes, which {sys.platform} has not; use one at a time")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= slots <= len(cores):
        raise ValueError(f"{slots} runs side by side on {len(cores)} cores: each needs one of its own")
    each = len(cores) // slots
    return [set(cores[slot * each : (slot + 1) * each]) for slot in range(slots)]


def in_slots(slots: Sequence[set[int]], work: Callable[[int], None], stop: Callable[[], None]) -> None:
    """Call ``work(slot)`` for all slots at once; processes that it starts stay on the slot's cores.

    With one slot, nothing is pinned and no thread is begun.

    Args:
        slots: Of `cores_of_slots`.
        work: Does what there is to do, until nothing is left.
        stop: Makes all ``work`` return soon; called when this process is interrupted or a ``work`` fails.
    """
    if len(slots) == 1:
        work(0)
        return

    def pinned(slot: int) -> None:
        os.sched_setaffinity(0, slots[slot])  # of this thread alone; processes inherit it
        work(slot)

    with ThreadPoolExecutor(len(slots)) as pool:
        try:
            for done in as_completed([pool.submit(pinned, slot) for slot in range(len(slots))]):
                done.result()
        except BaseException:
            stop()
            raise
