"""What every benchmark shares: rows with the machine, the versions and the source revision they came from."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(threads: int | None = None) -> dict[str, Any]:
    """Return device, threads, versions, date and revision: the head of every row."""
    import torch

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    dirty = bool(git("status", "--porcelain", "--", "../src"))
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{cpu_name()}, {os.cpu_count()} cores",
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "revision": git("rev-parse", "--short", "HEAD") + ("+" if dirty else ""),
        "load_before": round(os.getloadavg()[0], 2),
    }


def comparable(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two rows may stand in one ratio: same device, threads and PyTorch."""
    return all(one[key] == other[key] for key in ("device", "threads", "torch"))


def source(script: str) -> str:
    """Return eight digits that change when the script, what it shares with others, or a rival changes."""
    files = [
        HERE / f"{script}.py",
        HERE / "contest.py",
        HERE / "plain_pytorch.py",
        *sorted((HERE / "rivals").glob("*.py")),
    ]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()[:8]


def yardstick() -> float:
    """Time a fixed piece of work, in seconds: what the machine gives at the moment, beside each row.

    One training step of two convolutions in bf16 (batch 64, 128 channels, 16 x 16); the median of 9.
    """
    import torch
    from torch import nn

    model = nn.Sequential(*(nn.Conv2d(128, 128, 3, padding=1) for _ in range(2))).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(64, 128, 16, 16).contiguous(memory_format=torch.channels_last)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            model(images).sum().backward()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times[1:]), 5)


def append(name: str, row: dict[str, Any]) -> None:
    """Append a row to ``results/NAME.jsonl``."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rows(name: str) -> list[dict[str, Any]]:
    """Return all rows of ``results/NAME.jsonl``."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def spread(values: list[float], digits: int = 2) -> str:
    """Return mean and sample standard deviation as text; a single value stands alone."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def interleaved(
    actions: Mapping[Any, Callable[[], object]], rounds: int, least_s: float = 0.0
) -> dict[Any, list[float]]:
    """Time every action once a round, in turn, so that a busy machine slows all of them alike.

    Two calls of each come first and are not counted. An action that takes less than ``least_s`` seconds is repeated
    within a round until it takes that long.

    Returns:
        Name to seconds a call, one entry a round.
    """

    def seconds(action: Callable[[], object], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            action()
        return (time.perf_counter() - start) / times

    repeats: dict[Any, int] = {}
    for name, action in actions.items():
        action()
        repeats[name] = max(1, math.ceil(least_s / max(seconds(action, 1), 1e-7)))
    taken: dict[Any, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            taken[name].append(seconds(action, repeats[name]))
    return taken
