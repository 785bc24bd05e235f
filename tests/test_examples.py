"""The examples run as they stand; a second run, in a process of its own, goes on from the first one's checkpoint."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOOPS = ("bare", "lightning_loop", "huggingface_trainer", "accelerate_loop")


def run(name, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(printed):
    """What is left of the network, and how well it does."""
    parameters = re.search(r"Parameters at the end: ([\d,]+) of ([\d,]+)\.", printed).groups()
    layers = re.findall(r"^  \S+: (?:out|in) \d+ -> \d+.*$", printed, flags=re.MULTILINE)
    accuracy = re.search(r"^accuracy ([\d.]+)%", printed, flags=re.MULTILINE).group(1)
    return [int(number.replace(",", "")) for number in parameters], layers, accuracy


@pytest.mark.parametrize("name", LOOPS)
def test_it_trains_shrinks_and_goes_on_in_another_process(name, tmp_path):
    printed = run(name, tmp_path)
    (after, before), layers, accuracy = told(printed)
    assert after < 0.6 * before
    assert layers
    assert float(accuracy) > 50
    assert all(f"\n{phase}" in printed for phase in ("search", "draw", "train", "total", "dense (estimate)"))
    assert told(run(name, tmp_path)) == ([after, before], layers, accuracy)  # nothing was left to train


@pytest.mark.parametrize("name", LOOPS)
def test_it_is_short(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 60
