"""Processes and devices: one process, or those that torchrun started; Lightning Fabric connects them."""

from __future__ import annotations

import atexit
import datetime
import importlib.metadata
import logging
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from earlybird import __version__, allocator, ranks
from earlybird.errors import InputError
from earlybird.train.recipe import Recipe
from earlybird.train.tune import Choice

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def launch(recipe: Recipe) -> Fabric:
    """Return a launched Fabric: one process, or those that torchrun started."""
    from lightning_fabric import Fabric  # as slow to import as torch, and half of it is needed by no one else

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    elastic = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    world = int(os.environ["WORLD_SIZE"]) if elastic else 1
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if elastic else 1
    if recipe.devices is not None and recipe.devices != world:
        raise InputError(
            f"devices = {recipe.devices}, but {world} process{'' if world == 1 else 'es'} started",
            hint=f"start it with: torchrun --nproc-per-node {recipe.devices} -m earlybird ..."
            if recipe.devices > 1
            else "start it without torchrun",
        )
    if recipe.accelerator == "cuda" and not torch.cuda.is_available():
        raise InputError("accelerator = 'cuda', but PyTorch sees no CUDA device", hint="use accelerator = 'auto'")
    cuda = recipe.accelerator != "cpu" and torch.cuda.is_available()
    if cuda and local > torch.cuda.device_count():
        raise InputError(
            f"{local} processes on {torch.cuda.device_count()} CUDA devices",
            hint=f"start {torch.cuda.device_count()}, or use accelerator = 'cpu'",
        )
    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=local,
        num_nodes=world // local,
        strategy="ddp" if world > 1 else "auto",
    )
    fabric.launch()
    if not cuda:
        allocator.keep_freed()
        if world > 1:
            atexit.unregister(ranks.leave_group)  # once, however many runs this process makes
            atexit.register(ranks.leave_group)  # for CUDA, Fabric does it
    return fabric


def precision(choice: Choice, device: torch.device) -> Any:
    """Return Fabric's precision plugin: bf16 autocast over fp32 weights, or fp32."""
    from lightning_fabric.plugins import MixedPrecision
    from lightning_fabric.plugins.precision import Precision

    return MixedPrecision("bf16-mixed", device.type) if choice.precision == "bf16" else Precision()


def shared_path(fabric: Fabric, choose: Callable[[], Path]) -> Path:
    """Let the first rank choose a path, and tell it to all."""
    if fabric.world_size == 1:
        return choose()
    text = torch.zeros(4096, dtype=torch.uint8)
    if fabric.is_global_zero:
        raw = os.fsencode(choose().absolute())
        text[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    text = text.to(fabric.device)
    torch.distributed.broadcast(text, 0)
    return Path(os.fsdecode(bytes(text.cpu().tolist()).rstrip(b"\0")))


def started_again() -> bool:
    """Whether torchrun has started these processes anew (``--max-restarts``), because one of them had ended."""
    elastic = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    return elastic and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def agreed(fabric: Fabric, decide: Callable[[], bool]) -> bool:
    """Let the first rank decide, and tell it to all."""
    flag = torch.tensor(int(fabric.is_global_zero and decide()), device=fabric.device)
    if fabric.world_size > 1:
        torch.distributed.broadcast(flag, 0)
    return bool(flag)


def environment(fabric: Fabric) -> dict[str, Any]:
    """Return what a number depends on besides the recipe: versions, processor, device, threads."""
    cuda = fabric.device.type == "cuda"
    return {
        "earlybird": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "lightning_fabric": importlib.metadata.version("lightning-fabric"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(fabric.device) if cuda else "cpu",
        "processes": fabric.world_size,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
