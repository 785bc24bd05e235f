"""Two real processes under torchrun, talking through gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from earlybird.train.checkpoint import load_newest
from earlybird.train.recipe import Recipe
from tests.train.conftest import SMALL

ROOT = Path(__file__).parents[2]
RECIPE = {**SMALL, "checkpoint_every": "10it", "ema": 0.9, "accumulate": 2, "batch_size": 32}
# a part is frozen on the way, and what it was wrapped in has to know
MUON = {
    "model": "speedrun", "width": 0.25, "optimizer": "muon", "stem_until": "30it", "flip": "alternating",
    "pad": "reflect", "test_time": "mirror_shift",
}  # fmt: skip


def torchrun(folder: Path, *options: str, worker: str = "tests.train.worker") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", worker, str(folder)]
    # without the second one, processes that are started again may read addresses of those that have ended
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
@pytest.mark.parametrize("changes", [{}, MUON], ids=["sgd", "muon"])
def test_two_processes_agree_write_once_and_resume(changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(Recipe.from_values({**RECIPE, **changes}).to_toml())
    with torchrun(tmp_path) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors.count("warning: no agreement") <= 2  # once a run, not once a rank

    first, second = (load_file(tmp_path / f"whole-rank{rank}.safetensors") for rank in (0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    ]
    for one, two in zip(*rows):  # of the row in which it was stopped, too
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["steps"] == 66
    assert result["drawn_at"] <= 22
    assert result["accuracy"] > 0.3
    assert len((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()) == 3
    bill = json.loads((tmp_path / "whole" / "bill.json").read_text())
    assert bill["phases"]["train"]["images"]["value"] == (66 - result["drawn_at"]) * 64  # of both processes
    for rank in (0, 1):  # a thread of gloo that is left may abort the process at its end
        threads = (tmp_path / f"threads-rank{rank}.txt").read_text()
        assert threads
        assert "gloo" not in threads


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_a_signal_stops_all_ranks_at_the_same_step(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(Recipe.from_values({**RECIPE, "epochs": 5000}).to_toml())
    with torchrun(tmp_path) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("whole/checkpoint-*.json")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    told = [(tmp_path / f"whole-rank{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0].split(";")[-1] == told[1].split(";")[-1]
    steps = {text.split("after step ")[1].split()[0] for text in told}
    assert len(steps) == 1
    assert (tmp_path / "whole" / f"checkpoint-{int(steps.pop()):08d}.json").exists()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_runs_whose_rank_is_killed_are_started_again_and_end_in_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        Recipe.from_values({**RECIPE, "accumulate": 1, "epochs": 1, "deadline": "20it"}).to_toml()
    )
    with torchrun(tmp_path, "--max-restarts", "1", worker="tests.train.restarted") as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "exitcode: -9" in errors

    (step, whole), (its_step, again) = (
        load_newest(tmp_path / name, "torchrun", print) for name in ("bare-whole", "bare-stopped")
    )
    assert step == its_step == 44
    assert whole["bird"]["drawn_at"] == again["bird"]["drawn_at"] < 37
    for kind in ("parameters", "buffers"):
        for name, tensor in whole["model"][kind].items():
            assert torch.equal(tensor, again["model"][kind][name]), name
    shipped = [tmp_path / name for name in ("shipped-whole", "shipped-stopped")]
    weights, its_weights = (load_file(folder / "model.safetensors") for folder in shipped)
    for name, tensor in weights.items():
        assert torch.equal(tensor, its_weights[name]), name
    assert [json.loads((folder / "result.json").read_text())["resumed"] for folder in shipped] == [False, True]
