"""Weights of a finished run, and those that a run begins from instead of random ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from earlybird.errors import InputError
from earlybird.files import read_tensors
from earlybird.models.blueprint import Blueprint
from earlybird.sparse.masks import prunable

__all__ = ["head_of", "load_start", "read_start", "read_trained"]


def head_of(model: nn.Module) -> str:
    """Return the name of the last convolution or linear layer, which tells the classes apart."""
    return list(prunable(model))[-1]


def read_trained(run: Path) -> tuple[Blueprint, dict[str, Tensor]]:
    """Read what the network of a finished run was built from, and its final weights and buffers.

    Raises:
        InputError: The folder holds no run, or none that is finished, or its weights are gone.
    """
    if not (run / "recipe.toml").is_file():
        raise InputError(f"no run in {run} (no recipe.toml)", hint="name the folder that 'earlybird train' wrote")
    path = run / "model.safetensors"
    if not path.is_file():
        if (run / "result.json").exists():
            raise InputError(
                f"the run in {run} is finished, but its model.safetensors is gone",
                hint=f"put it back, or delete result.json and train the end again with 'earlybird resume {run}'",
            )
        raise InputError(f"{run} is not finished", hint=f"go on with 'earlybird resume {run}'")
    weights, metadata = read_tensors(path)
    if "blueprint" not in metadata:
        raise InputError(f"{path} does not say what it was built from", needed="one of a run")
    return Blueprint.from_json(metadata["blueprint"]), weights


def read_start(path: str | Path) -> dict[str, Tensor]:
    """Read weights and buffers by name.

    Args:
        path: A safetensors file; or the folder of a run: of one that trains in rounds, the weights that these begin
            from, of any other, its trained ones.

    Raises:
        InputError: The file is missing or damaged, or the folder holds no finished run.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = next((path / name for name in _OF_A_RUN if (path / name).is_file()), None)
        if found is None:
            raise InputError(f"{path} has no weights to begin from", needed="the folder of a finished run, or a file")
        path = found
    return read_tensors(path)[0]


_OF_A_RUN = ("rewind.safetensors", "model.safetensors")


@torch.no_grad()
def load_start(model: nn.Module, weights: Mapping[str, Tensor], *, fresh_head: bool = False) -> None:
    """Give ``model`` weights and buffers by name, all of them.

    Args:
        model: Dense.
        weights: As of ``state_dict()``.
        fresh_head: The last layer keeps its own.

    Raises:
        InputError: A name or a shape differs; nothing is changed then.
    """
    head, own = head_of(model), model.state_dict()
    leave = head if fresh_head else None
    mine, given = ({name for name in names if name.rpartition(".")[0] != leave} for names in (own, weights))
    wrong = sorted(mine ^ given) or [name for name in own if name in mine and own[name].shape != weights[name].shape]
    if wrong:
        name = wrong[0]
        if name not in weights:
            found = f"the start has no '{name}'"
        elif name not in own:
            found = f"the model has no '{name}', which the start has"
        else:
            shapes = tuple(weights[name].shape), tuple(own[name].shape)
            found = f"'{name}' of the start has shape {shapes[0]}, of the model {shapes[1]}"
        more = f" (and {len(wrong) - 1} more of {len(own.keys() | weights.keys())} entries)" if len(wrong) > 1 else ""
        hint = f"fresh_head = true keeps the model's own '{head}'" if name.rpartition(".")[0] == head else ""
        raise InputError(found + more, needed="weights of this model: same architecture, width and channels", hint=hint)
    for name in mine:
        own[name].copy_(weights[name])
