"""What torchrun starts, and starts again: a loop of one's own and a shipped run, first whole, then cut short.

In the first attempt both loops are stopped on the way: the first one by an exception that no one expects, the second
one by a SIGKILL to rank 1, at which torchrun starts all processes again. The second attempt goes on with both.
"""

import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.optim.optimizer import register_optimizer_step_post_hook

from earlybird.cli import main as earlybird
from earlybird.ranks import leave_group

ROOT = Path(__file__).parents[2]
STOPPED_AT = 37


def bare_loop(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "torchrun.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder.mkdir(exist_ok=True)
    example.train(folder, epochs=2)


def shipped(folder: Path) -> None:
    code = earlybird(["train", str(folder.parent / "recipe.toml"), "--out", str(folder), "--quiet"])
    assert code == 0, code


class Crash(Exception):
    pass


def after(steps: int, act: Callable[[], None]) -> Any:
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        if done == steps:
            act()

    return register_optimizer_step_post_hook(count)


def crash() -> None:
    raise Crash


def kill_one_rank() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        bare_loop(folder / "bare-whole")
        shipped(folder / "shipped-whole")
        handle = after(STOPPED_AT, crash)
        with contextlib.suppress(Crash):
            bare_loop(folder / "bare-stopped")
        handle.remove()
        after(STOPPED_AT, kill_one_rank)
    else:
        bare_loop(folder / "bare-stopped")
    shipped(folder / "shipped-stopped")
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
