"""What every benchmark shares: rows with the machine, the versions and the source revision they came from."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = Path(os.environ.get("EARLYBIRD_BENCH_RESULTS", HERE / "results"))
WORK = Path(os.environ.get("EARLYBIRD_BENCH_WORK", HERE.parent / "runs" / "benchmarks"))
CONDITION = ("device", "threads", "torch", "side_by_side")
"""Of a row: what two have to have in common to stand in one ratio."""
STATISTIC = Path("/proc/stat")
DISTURBED = 0.02  # share of the processors that others may take in a timed round
PATIENCE = 4


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(threads: int | None = None, side_by_side: int = 1, accelerator: str = "cpu") -> dict[str, Any]:
    """Return device, threads, versions, date and revision: the head of every row.

    Args:
        threads: Of the run; default: of this process.
        side_by_side: How many runs share the machine, each on cores of its own.
        accelerator: ``cpu`` or ``cuda``: which device the row is of.
    """
    import torch

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    # rows, plots and the page are what benchmarks write themselves
    dirty = bool(git("status", "--porcelain", "--", "../src", "../recipes", ".", ":!results", ":!images", ":!*.md"))
    cores = f"{cpu_name()}, {os.cpu_count()} cores"
    return {
        "date": datetime.date.today().isoformat(),
        "device": cores if accelerator == "cpu" else f"{torch.cuda.get_device_name()}; {cores}",
        "threads": threads or torch.get_num_threads(),
        "side_by_side": side_by_side,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "revision": git("rev-parse", "--short", "HEAD") + ("+" if dirty else ""),
        "load_before": load(),
    }


def check_known(parser: argparse.ArgumentParser, what: str, asked: Iterable[str], known: Iterable[str]) -> None:
    """End with an error of ``parser`` where something was asked for that there is not."""
    unknown = sorted(set(asked) - set(known))
    if unknown:
        parser.error(f"unknown {what} {', '.join(unknown)}; there are {', '.join(known)}")


def read_rounds(doc: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line of a script that times shapes in rounds: ``rounds``, ``quick`` (three) and ``table``."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="few shapes, networks and rounds; nothing is recorded")
    parser.add_argument("--table", action="store_true", help="print the tables of the newest rows and stop")
    options = parser.parse_args(words)
    if options.quick:
        options.rounds = 3
    return options


def load() -> float:
    """Return how many processes have waited for a processor in the last minute."""
    return round(os.getloadavg()[0], 2)


def condition(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return on what a row was measured; rows from before runs could stand side by side stood alone."""
    return tuple({"side_by_side": 1, **row}[key] for key in CONDITION)


def comparable(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two rows may stand in one ratio: same device, threads, PyTorch and number of neighbours."""
    return condition(one) == condition(other)


def digest(*parts: str | bytes | Path) -> str:
    """Return eight digits that change when a text or the content of a file does."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part)
    return found.hexdigest()[:8]


def environment() -> dict[str, str]:
    """Return an environment in which children import this checkout, not whatever is installed."""
    path = os.pathsep.join(filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def yardstick(threads: int) -> float:
    """Time a fixed piece of work, in seconds: what the machine gives at the moment, beside each row.

    One training step of two convolutions in bf16 (batch 64, 128 channels, 16 x 16); the median of 9.
    """
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    model = nn.Sequential(*(nn.Conv2d(128, 128, 3, padding=1) for _ in range(2))).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(64, 128, 16, 16).contiguous(memory_format=torch.channels_last)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            model(images).sum().backward()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times[1:]), 5)


def append(name: str, row: Mapping[str, Any]) -> None:
    """Append a row to ``results/NAME.jsonl``, whole or not at all."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row) + "\n").encode()
    file = os.open(RESULTS / f"{name}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(file, line) != len(line):
            raise OSError(f"the disk took only a part of a row of {name}: its last line has to go")
        os.fsync(file)
    finally:
        os.close(file)


def rows(name: str) -> list[dict[str, Any]]:
    """Return all rows of ``results/NAME.jsonl``."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def spread(values: list[float], digits: int = 2) -> str:
    """Return mean and sample standard deviation as text; a single value stands alone."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def interleaved(
    actions: Mapping[Any, Callable[[], object]],
    rounds: int,
    least_s: float = 0.0,
    others: Callable[[], float] | None = None,
) -> tuple[dict[Any, list[float]], float]:
    """Time every action once a round, in turn, so that a busy machine slows all of them alike.

    Two calls of each come first and are not counted. An action that takes less than ``least_s`` seconds is repeated
    within a round until it takes that long. Rounds in which other processes took more than `DISTURBED` of the
    processors are done again, up to `PATIENCE` times as many in all; the least disturbed count.

    Args:
        actions: Name to what is called.
        rounds: How many count.
        least_s: Of an action within a round.
        others: Returns the processor seconds of all that does not belong to the actions; default: of other processes.

    Returns:
        Name to seconds a call, one entry a round; and the share of the processors that others took in the worst of
        these rounds.
    """

    def seconds(action: Callable[[], object], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            action()
        return (time.perf_counter() - start) / times

    others = others or others_s
    repeats: dict[Any, int] = {}
    for name, action in actions.items():
        action()
        repeats[name] = max(1, math.ceil(least_s / max(seconds(action, 1), 1e-7)))
    taken: list[tuple[float, dict[Any, float]]] = []
    while sum(share <= DISTURBED for share, _ in taken) < rounds and len(taken) < PATIENCE * rounds:
        start, before = time.perf_counter(), others()
        found = {name: seconds(action, repeats[name]) for name, action in actions.items()}
        share = (others() - before) / (time.perf_counter() - start) / (os.cpu_count() or 1)
        taken.append((share, found))
    best = sorted(taken, key=lambda one: one[0])[:rounds]
    worst = round(max(best[-1][0], 0.0), 3)
    if worst > DISTURBED:
        print(f"other processes took {worst:.0%} of the processors in some rounds", file=sys.stderr)
    return {name: [found[name] for _, found in best] for name in actions}, worst


def others_s() -> float:
    """Return the processor seconds that other processes have used so far, where Linux tells; else 0."""
    if not STATISTIC.exists():
        return 0.0
    user, nice, system, _, _, interrupts, soft, stolen = map(int, STATISTIC.read_text().split()[1:9])
    everything = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
    return everything - sum(os.times()[:2])
