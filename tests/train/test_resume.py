"""SIGKILL anywhere, then resume: the final weights are those of an undisturbed run, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from earlybird.tickets.ticket import Ticket
from tests.train.conftest import SMALL

ROOT = Path(__file__).parents[2]
KILLED = -signal.SIGKILL

Serve = Callable[..., int]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.train.server"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def do(**job: Any) -> int:
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()
            return int(stdout.readline())

        yield do
        stdin.close()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: Path, two: Path) -> None:
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert Ticket.load(one / "ticket.safetensors") == Ticket.load(two / "ticket.safetensors")
    steps = [json.loads(line)["step"] for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


RECIPES: dict[str, dict[str, Any]] = {
    "sgd": {**SMALL, "checkpoint_every": "5it", "ema": 0.9},
    "adamw-bf16": {
        **SMALL, "checkpoint_every": "3it", "exact": False, "tune": False, "precision": "bf16", "channels_last": True,
        "optimizer": "adamw", "nesterov": False, "accumulate": 2, "batch_size": 32, "refit": "least_squares",
    },
    "stages": {**SMALL, "stages": [0.8], "tolerance": 0.0, "checkpoint_every": "3it", "ema": 0.9},
    "published": {**SMALL, "preset": "published", "deadline": "1ep", "checkpoint_every": "4it"},
    "muon": {
        **SMALL, "checkpoint_every": "4it", "model": "speedrun", "width": 0.25, "optimizer": "muon", "ema": 0.9,
        "flip": "alternating", "pad": "reflect", "lr_warmup": "0it", "stem_until": "1.5ep", "test_time": "mirror",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    """Folder of an undisturbed run and the step of its draw, by recipe."""
    made = {}
    for name, recipe in RECIPES.items():
        folder = tmp_path_factory.mktemp("whole") / name
        assert serve(do="train", folder=str(folder), recipe=recipe) == 0
        drawn_at = json.loads((folder / "result.json").read_text())["drawn_at"]
        assert 4 <= drawn_at <= 22
        made[name] = folder, drawn_at
    return made


# by name: how far from the draw the kill falls, or a place in the code
KILLS: list[tuple[str, list[Any]]] = [
    ("sgd", ["begin", 0]),
    ("sgd", ["before", 3]),
    ("sgd", ["cut", 1]),
    ("sgd", ["cut", 9]),
    ("sgd", ["refit", 1]),
    ("sgd", ["after", 0]),
    ("sgd", ["after", 9]),
    ("sgd", ["tensors", 2]),
    ("sgd", ["tensors", 6]),
    ("sgd", ["step", 66]),
    ("adamw-bf16", ["before", 2]),
    ("adamw-bf16", ["cut", 5]),
    ("adamw-bf16", ["after", 5]),
    ("stages", ["before", 12]),
    ("stages", ["before", 4]),
    ("stages", ["cut", 5]),
    ("stages", ["after", 4]),
    ("published", ["before", 1]),
    ("published", ["cut", 2]),
    ("published", ["after", 11]),
    ("muon", ["before", 2]),
    ("muon", ["cut", 5]),
    ("muon", ["after", 9]),
    ("muon", ["step", 30]),
    ("muon", ["step", 42]),
]


@pytest.mark.parametrize(
    ("name", "kill"), KILLS, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value))
)
def test_killed_before_in_or_after_the_draw(
    name: str, kill: list[Any], serve: Serve, undisturbed: dict[str, tuple[Path, int]], tmp_path: Path
) -> None:
    whole, drawn_at = undisturbed[name]
    where, count = kill
    if where in ("before", "after"):
        where, count = "step", drawn_at + (count if where == "after" else -count)
    folder = str(tmp_path / "run")
    assert serve(do="train", folder=folder, recipe=RECIPES[name], kill=[where, count]) == KILLED
    assert serve(do="resume", folder=folder) == 0
    assert_same(Path(folder), whole)


def test_killed_again_and_again_at_random_steps(
    serve: Serve, undisturbed: dict[str, tuple[Path, int]], tmp_path: Path
) -> None:
    whole, _ = undisturbed["sgd"]
    folder, generator = str(tmp_path / "run"), random.Random(0)
    job: dict[str, Any] = {"do": "train", "recipe": RECIPES["sgd"]}
    for step in sorted(generator.sample(range(1, 66), 4)):
        assert serve(**job, folder=folder, kill=["step", step]) == KILLED
        job = {"do": "resume"}
    assert serve(do="resume", folder=folder) == 0
    assert_same(Path(folder), whole)


def test_killed_by_the_clock_from_outside(undisturbed: dict[str, tuple[Path, int]], tmp_path: Path) -> None:
    """The command line, in a process of its own, killed whenever the clock says so."""
    whole, _ = undisturbed["sgd"]
    folder, recipe = tmp_path / "run", whole / "recipe.toml"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "earlybird"]
    with subprocess.Popen(
        [*command, "train", str(recipe), "--out", str(folder), "--quiet"], cwd=ROOT, env=environment
    ) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob("checkpoint-*.json")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        time.sleep(random.Random(1).random() * 0.2)
        process.kill()
    assert process.returncode == KILLED
    done = subprocess.run(
        [*command, "resume", str(folder), "--quiet"], cwd=ROOT, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0
    assert_same(folder, whole)
