"""Files that are either whole or not there: temporary file, fsync, rename."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from earlybird.errors import EarlybirdError, InputError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Call ``write`` on a temporary file beside ``path``, sync it to disk and rename it over ``path``.

    Raises:
        EarlybirdError: The disk is full; the old file, if any, is untouched.
        InputError: The folder cannot be made or written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        if is_disk_full(error):
            raise _full(path) from error
        raise InputError(f"cannot write {path} ({error.strerror})", hint="choose another place") from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp lets nobody else read
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise _full(path) from error
        raise
    return path


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def _full(path: Path) -> EarlybirdError:
    return EarlybirdError(
        f"no space left on the disk of {path.parent}",
        needed=f"{path.name} was not written; an older version, if there was one, is untouched",
        hint="free some space and run the same command again",
    )


def is_disk_full(error: BaseException) -> bool:
    """Tell whether a write failed because the disk, or the user's share of it, is full."""
    # safetensors reports it as its own error, with the system's text in it
    return getattr(error, "errno", None) in _FULL or (
        isinstance(error, SafetensorError) and any(os.strerror(number) in str(error) for number in _FULL)
    )


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` as UTF-8, atomically."""
    return write_atomically(path, lambda temporary: _ignore(temporary.write_text(text, encoding="utf-8")))


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON, atomically; NaN and infinity are refused."""
    return write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file, or return None where it is not there.

    Raises:
        InputError: The file is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error})", hint="delete it and resume the run") from error


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; without a file, none. A last line that a kill cut short is left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write ``tensors`` and string ``metadata`` as one safetensors file, atomically.

    Tensors that share memory, which the format does not have, are written one by one.
    """
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous().cpu()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in storages else tensor
        if tensor.numel():
            storages.add(storage)
    return write_atomically(path, lambda temporary: save_file(plain, temporary, metadata=dict(metadata)))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file as ``(tensors, metadata)``.

    Raises:
        InputError: The file is missing or is not a whole safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {path}", hint="check the path")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or is not a safetensors file ({error})") from error


def write_state(path: str | Path, state: Mapping[str, Any]) -> Path:
    """Write what a ``state_dict()`` of ours returned (see `pack`) as one safetensors file, atomically."""
    tensors: dict[str, Tensor] = {}
    tree = pack(state, "", tensors)
    return write_tensors(path, tensors, {"state": json.dumps(tree)})


def read_state(path: str | Path) -> Any:
    """Read what `write_state` wrote.

    Raises:
        InputError: The file is missing or is not a whole file of that kind.
    """
    tensors, metadata = read_tensors(path)
    if "state" not in metadata:
        raise InputError(f"{path} holds no state", needed="a file that earlybird wrote beside a checkpoint")
    return unpack(json.loads(metadata["state"]), tensors)


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move tensors out of a nested value into ``tensors``; what is left can be written as JSON.

    Args:
        value: Nested dicts (text keys) and lists of tensors, numbers, text, True/False, None.
        name: Begins the names of the tensors.
        tensors: Gets them.
    """
    if isinstance(value, Tensor):
        strides = value.stride() if value.stride() != _contiguous_stride(value) and _is_dense(value) else None
        tensors[name] = value
        return {"$tensor": name} if strides is None else {"$tensor": name, "stride": list(strides)}
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) or key.startswith("$") for key in value):
            raise TypeError(f"keys of '{name}' must be text that does not begin with '$'")
        return {key: pack(item, f"{name}/{key}" if name else key, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"'{name}' is a {type(value).__name__}, which a checkpoint cannot hold")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `pack` was given, lists in place of tuples; tensors have the strides they had."""
    if isinstance(value, dict):
        if "$tensor" in value:
            tensor = tensors[value["$tensor"]]
            if "stride" not in value:
                return tensor
            return torch.empty_strided(tensor.shape, value["stride"], dtype=tensor.dtype).copy_(tensor)
        if "$float" in value:
            return float(value["$float"])
        return {key: unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    return value


def _contiguous_stride(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty(tensor.shape, device="meta").stride()


def _is_dense(tensor: Tensor) -> bool:
    # preserve_format keeps the strides of dense, non-overlapping tensors, and of no others
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride() == tensor.stride()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ignore(_: object) -> None:
    return None
