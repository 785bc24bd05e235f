"""Checkpoints: two files a step, whole or absent, never pickle.

``checkpoint-<step>.safetensors`` holds every tensor; ``checkpoint-<step>.json`` holds the tree they hang in, every
number beside them, the recipe's hash, the SHA-256 of the tensor file and one of its own content. The JSON is written
last and names the tensor file by its content, so a crash between the two leaves a pair that does not match and is not
taken.

Tensors come back with the strides they had: kernels are chosen by memory layout, and another layout would mean other
last bits after a resume.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from earlybird.errors import CheckpointError, EarlybirdError
from earlybird.files import pack, read_tensors, unpack, write_json, write_tensors

FORMAT = 5
KEPT = 2


def save(folder: Path, step: int, recipe: str, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint and delete all but the two newest; those of later steps, too: the run fell back behind them.

    Args:
        folder: Run folder.
        step: Optimizer steps done.
        recipe: Hash of the recipe.
        state: Nested dicts (text keys) and lists of tensors, numbers, text, True/False, None.

    Returns:
        The JSON file.

    Raises:
        EarlybirdError: The disk is full; older checkpoints are untouched.
    """
    tensors: dict[str, Tensor] = {}
    tree = pack(state, "", tensors)
    for path in _records(folder):
        if _step(path) > step:
            path.unlink(missing_ok=True)
    stem = f"checkpoint-{step:08d}"
    data = write_tensors(folder / f"{stem}.safetensors", tensors, {"step": str(step), "recipe": recipe})
    record = {"format": FORMAT, "step": step, "recipe": recipe, "sha256": _digest(data), "state": tree}
    path = write_json(folder / f"{stem}.json", {**record, "checksum": _checksum(record)})
    for old in _records(folder)[KEPT:]:
        old.unlink(missing_ok=True)  # first what makes it a checkpoint
    kept = {path.stem for path in _records(folder)}
    for data in folder.glob("checkpoint-*.safetensors"):
        if data.stem not in kept:
            data.unlink(missing_ok=True)
    return path


def load_newest(folder: Path, recipe: str, warn: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
    """Read the newest checkpoint that is whole.

    Args:
        folder: Run folder.
        recipe: Hash that the checkpoint must carry.
        warn: Told about every checkpoint that is passed over.

    Returns:
        ``(step, state)``, or None where there is no checkpoint at all.

    Raises:
        CheckpointError: A checkpoint belongs to another recipe, or none is whole.
    """
    paths = _records(folder)
    for path in paths:
        try:
            return _read(path, recipe)
        except _Damaged as error:
            warn(f"{path} is damaged ({error}); falling back to the one before")
    if paths:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged", hint="start again with 'earlybird train' and another --out"
        )
    return None


class _Damaged(Exception):
    """A checkpoint that cannot be read or does not match its own checksum."""


# What reading may raise where bytes are not those that were written
_UNREADABLE = (OSError, KeyError, AttributeError, RuntimeError, TypeError, ValueError)


def _read(path: Path, recipe: str) -> tuple[int, dict[str, Any]]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, checksum = record["format"], record.pop("checksum", None)
        intact = checksum == _checksum(record)
        if version != FORMAT and (intact or checksum is None):
            raise CheckpointError(
                f"{path} has format {version}", needed=f"format {FORMAT}", hint="resume with the version that wrote it"
            )
        if not intact:
            raise _Damaged("it does not match its own checksum")
        step, digest, tree, theirs = record["step"], record["sha256"], record["state"], record["recipe"]
    except _UNREADABLE as error:
        raise _Damaged(f"not a checkpoint record: {_line(error)}") from error
    if theirs != recipe:
        raise CheckpointError(
            f"{path} belongs to another recipe ({theirs})",
            needed=f"the recipe in {path.parent / 'recipe.toml'} ({recipe})",
            hint="put the recipe back as it was, or train into another --out",
        )
    data = path.with_suffix(".safetensors")
    try:
        if _digest(data) != digest:
            raise _Damaged(f"{data.name} does not match its checksum")
        tensors, _ = read_tensors(data)
        return step, unpack(tree, tensors)
    except (*_UNREADABLE, EarlybirdError) as error:
        raise _Damaged(_line(error)) from error


def _records(folder: Path) -> list[Path]:
    """Return the JSON files of a folder's checkpoints, newest first."""
    paths = (path for path in folder.glob("checkpoint-*.json") if re.fullmatch(r"checkpoint-[0-9]+", path.stem))
    return sorted(paths, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def capture(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return parameters, buffers and optimizer state by name; tensors are not copied."""
    state: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            state[name] = dict(optimizer.state[parameter])
    return {
        "parameters": {name: parameter.detach() for name, parameter in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
        "optimizer": state,
    }


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put back what `capture` returned, into a model of the same shapes; strides come back, too.

    Raises:
        CheckpointError: Names or shapes differ; nothing was changed.
    """
    own: dict[str, dict[str, Tensor]] = {
        "parameters": dict(model.named_parameters()),
        "buffers": dict(model.named_buffers()),
    }
    for kind, tensors in own.items():
        if tensors.keys() != state[kind].keys():
            names = ", ".join(sorted(tensors.keys() ^ state[kind].keys())[:3])
            raise CheckpointError(f"{kind} of the model and of the checkpoint differ ({names}); has the model changed?")
        for name, tensor in tensors.items():
            if tensor.shape != state[kind][name].shape:
                found, needed = tuple(state[kind][name].shape), tuple(tensor.shape)
                raise CheckpointError(f"'{name}' has shape {found} in the checkpoint", needed=f"{needed}, as the model")
    for kind, tensors in own.items():
        for name, tensor in tensors.items():
            tensor.data = state[kind][name].to(tensor.device)
    for parameter in own["parameters"].values():  # those of others, such as a method's own, are theirs to restore
        optimizer.state.pop(parameter, None)
    for name, entries in state["optimizer"].items():
        parameter = own["parameters"][name]
        optimizer.state[parameter] = {
            key: _like_parameter(value, parameter) if isinstance(value, Tensor) else value
            for key, value in entries.items()
        }


def _like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    # Scalars such as Adam's step count live on the CPU whatever the device.
    return value.to(parameter.device) if value.dim() else value


def generators(device: torch.device) -> dict[str, Tensor]:
    """Return the state of every global random generator a model may draw from, as tensors of fixed size."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor(
            [*numpy["state"]["key"].tolist(), numpy["state"]["pos"], numpy["has_gauss"]], dtype=torch.int64
        ),
        "numpy_gauss": torch.tensor([numpy["gauss"]], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_generators(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `generators` returned."""
    torch.set_rng_state(state["torch"].cpu())
    version, *words = state["python"].tolist()
    gauss = float(state["python_gauss"])
    random.setstate((version, tuple(words), None if math.isnan(gauss) else gauss))
    *key, position, has_gauss = state["numpy"].tolist()
    numpy = {"key": np.array(key, dtype=np.uint32), "pos": position}
    np.random.set_state(
        {"bit_generator": "MT19937", "state": numpy, "has_gauss": has_gauss, "gauss": float(state["numpy_gauss"])}
    )
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
