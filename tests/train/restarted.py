"""What torchrun starts, and starts again: two runs that nothing disturbs, then two in which a rank is killed.

The first attempt makes all runs but the last one, of which rank 1 is killed; and so does the second with the one after.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.optim.optimizer import register_optimizer_step_post_hook

from earlybird.cli import main as earlybird

ROOT = Path(__file__).parents[2]
KILLED_AT = 37


def bare_loop(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "torchrun.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder.mkdir(exist_ok=True)
    example.train(folder, epochs=2)


def shipped(folder: Path) -> None:
    code = earlybird(["train", str(folder.parent / "recipe.toml"), "--out", str(folder), "--quiet"])
    assert code == 0, code


def kill_one_after(steps: int) -> None:
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        if done == steps and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(count)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    distributed.init_process_group("gloo")
    if attempt == 0:
        bare_loop(folder / "bare-whole")
        shipped(folder / "shipped-whole")
        kill_one_after(KILLED_AT)
    if attempt <= 1:
        bare_loop(folder / "bare-killed")
        kill_one_after(KILLED_AT)
    shipped(folder / "shipped-killed")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
