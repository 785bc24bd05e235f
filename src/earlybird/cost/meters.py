"""Meters: peak memory and energy, where the machine has them; where not, they say so by returning None.

Memory on a CUDA device is the allocator's peak. On a CPU it is the process's resident high-water mark: Linux lets a
process reset its own mark (``5`` into ``/proc/self/clear_refs``), so every phase has its own peak; elsewhere the mark
only grows, and a phase that did not raise it has no measured peak.

Energy on an NVIDIA GPU comes from NVML through zeus (the extra ``energy``) and covers the board only. Energy of the
processor comes from RAPL's counters in sysfs, for all its packages and memory channels, other processes included. They
are read directly: zeus starts a helper process for them, which would run a script without a ``__main__`` guard twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["EnergyMeter", "PeakMemory", "energy_meter"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_POWERCAP = Path("/sys/class/powercap")


class PeakMemory:
    """Peak memory since the last `reset`.

    Resetting also resets what ``VmHWM`` or ``torch.cuda.max_memory_allocated`` report to anybody else in the process.

    Attributes:
        name: What is read, for the bill.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._floor = 0
        if self._device.type == "cuda":
            self.name = "torch.cuda.max_memory_allocated"
        elif _resets_high_water():
            self.name = "VmHWM"
        else:
            self.name = "ru_maxrss"
        self.reset()

    def reset(self) -> None:
        """Start a new measurement."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self.name == "VmHWM":
            _resets_high_water()
        else:
            self._floor = _lifetime_peak() or 0

    def read(self) -> int | None:
        """Return the peak in bytes since the last reset, or None where it cannot be known."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self.name == "VmHWM":
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
            return None
        peak = _lifetime_peak()
        return peak if peak is not None and peak > self._floor else None


class EnergyMeter:
    """Joules since the meter was made: a sum over counters, each of which may start again from 0 at its own range.

    Args:
        name: What is read, for the bill.
        counters: Pairs of a function that returns joules, and the range in joules after which it wraps (0: never).
    """

    def __init__(self, name: str, counters: list[tuple[Callable[[], float], float]]) -> None:
        self.name = name
        self._counters = counters
        self._last = [read() for read, _ in counters]
        self._sum = 0.0

    def read(self) -> float:
        """Return the joules so far.

        Has to be called at least once in the time that a counter takes to wrap (RAPL: some 20 minutes).
        """
        for index, (read, wraps_at) in enumerate(self._counters):
            now = read()
            used = now - self._last[index]
            self._sum += used + wraps_at if used < 0 else used
            self._last[index] = now
        return self._sum


def energy_meter(device: torch.device | str = "cpu") -> EnergyMeter | None:
    """Return the energy meter of ``device``, or None where there is none that this process may read."""
    device = torch.device(device)
    return _gpu_meter(device) if device.type == "cuda" else _processor_meter(_POWERCAP)


def _gpu_meter(device: torch.device) -> EnergyMeter | None:
    try:
        from zeus.device import get_gpus

        gpus = get_gpus()
        index = torch.cuda.current_device() if device.index is None else device.index
        return EnergyMeter("NVML, GPU board only", [(lambda: gpus.get_total_energy_consumption(index) / 1e3, 0.0)])
    except Exception:
        # no zeus, no driver, a GPU without the counter, no permission: all mean the same here, there is no meter
        return None


def _processor_meter(powercap: Path) -> EnergyMeter | None:
    zones = [
        zone
        for zone in sorted(powercap.glob("intel-rapl:*"))
        # sub-zones (intel-rapl:0:1) are part of their package, except memory; psys, on laptops, is all of it once more
        if _text(zone / "name").startswith(("package", "dram"))
    ]
    try:
        counters = [_rapl_counter(zone) for zone in zones]
        return EnergyMeter("RAPL, all packages and memory", counters) if counters else None
    except (OSError, ValueError):  # on most systems only root may read them
        return None


def _rapl_counter(zone: Path) -> tuple[Callable[[], float], float]:
    source = zone / "energy_uj"
    return (lambda: int(source.read_text()) / 1e6), int((zone / "max_energy_range_uj").read_text()) / 1e6


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _resets_high_water() -> bool:
    """Reset the process's resident high-water mark; False where that is not possible."""
    try:
        _CLEAR_REFS.write_text("5")
        return "VmHWM:" in _STATUS.read_text()
    except OSError:
        return False


def _lifetime_peak() -> int | None:
    """Return the resident high-water mark of the process's whole life, bytes."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
