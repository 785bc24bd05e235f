"""Take the trained small network out: as a module, as one safetensors file, as checked ONNX.

    model = load("runs/first")                                # in eval mode, in a fresh process, no pickle
    export_weights("runs/first", "model.safetensors")         # weights + ticket + model's name in one file
    export_onnx("runs/first", "model.onnx")                   # refused if onnxruntime does not agree with PyTorch

The network is rebuilt from its original definition: build it dense, shrink it to the ticket, put the weights in. What
the definition was given (classes, size of the images) lies beside the weights, so the data set is not needed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import tomllib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from earlybird.errors import EarlybirdError, InputError
from earlybird.files import read_tensors, write_atomically, write_tensors
from earlybird.methods import METHODS
from earlybird.models.blueprint import Blueprint
from earlybird.start import read_trained
from earlybird.tickets.shrink import shrink
from earlybird.tickets.ticket import Ticket

__all__ = ["export_onnx", "export_weights", "load", "rebuild"]

FORMAT = "earlybird-network-1"
_MASK = "ticket/"
_PRODUCER = "earlybird"
_WEIGHTS = "model.safetensors"

TOLERANCE = 1e-3
"""Largest difference of two outputs that ONNX may show against PyTorch, relative to the largest output."""


def load(run: str | Path, *, model: str | None = None) -> nn.Module:
    """Rebuild the trained network of a run, or of a file that `export_weights` wrote.

    A file may come from anywhere, so what it names is imported and called only if it is a model of our own table, or
    if ``model`` confirms it.

    Args:
        run: Run folder or file.
        model: The ``'package.module:function'`` that the file may name, and no other.

    Returns:
        A plain module in eval mode, on the CPU.

    Raises:
        InputError: The run is not finished, a file is missing or damaged, its weights do not fit the definition, or it
            names another model than ``model``, or one from outside without it.
    """
    return _rebuild(*_parts(Path(run), model), source=Path(run))


def rebuild(run: str | Path, *, model: str | None = None) -> tuple[nn.Module, Blueprint]:
    """Return what `load` returns, and what it was built from; ``run`` may also be the weights in a run folder."""
    path = Path(run)
    if path.name == _WEIGHTS and (path.parent / "recipe.toml").is_file():
        path = path.parent
    parts = _parts(path, model)
    return _rebuild(*parts, source=path), parts[0]


def export_weights(run: str | Path, path: str | Path, *, model: str | None = None, force: bool = False) -> Path:
    """Write weights, ticket and the name of the model as one safetensors file that `load` reads.

    Args:
        run: Run folder, or a file that this function wrote.
        path: The file; an older export is replaced, anything else is not.
        model: As for `load`.
        force: Replace whatever is there.

    Raises:
        InputError: As for `load`; or ``path`` is something else than an export.
    """
    _check_target(Path(path), _is_weights, force=force)
    blueprint, ticket, weights = _parts(Path(run), model)
    _rebuild(blueprint, ticket, weights, source=Path(run))  # what is written can be read
    masks = {} if ticket is None else {_MASK + name: mask.to(torch.uint8) for name, mask in ticket.masks.items()}
    metadata = {
        "format": FORMAT,
        "blueprint": blueprint.to_json(),
        "order": json.dumps(list(ticket.masks) if ticket else []),
        "kinds": json.dumps(dict(ticket.kinds) if ticket else {}),
        "provenance": json.dumps(dict(ticket.provenance) if ticket else {}),
    }
    return write_tensors(path, {**weights, **masks}, metadata)


def export_onnx(
    run: str | Path, path: str | Path, *, model: str | None = None, force: bool = False
) -> tuple[Path, float]:
    """Write the trained network as ONNX with a free batch size, after checking it against PyTorch.

    The input ``images`` takes normalised images, float32 of shape (batch, channels, height, width); the output
    ``logits`` is of shape (batch, classes). The file's metadata holds ``mean`` and ``std`` (of pixels in 0 to 1) and
    ``class_names`` as JSON. The check runs onnxruntime on batches of two sizes.

    Args:
        run: Run folder, or a file that `export_weights` wrote.
        path: The file; an older export is replaced once the new one passed the check, anything else is not.
        model: As for `load`.
        force: Replace whatever is there.

    Returns:
        ``path`` and the largest difference that was seen, relative to the largest output.

    Raises:
        InputError: As for `load`; or the packages of the extra ``onnx`` are missing, or ``path`` is something else than
            an export.
        EarlybirdError: The exporter cannot express the model, or onnxruntime does not agree with PyTorch. Nothing was
            written.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"ONNX export needs {', '.join(missing)}, not installed here",
            hint="pip install onnx onnxscript onnxruntime",
        )
    _check_target(Path(path), _is_onnx, force=force)
    blueprint, ticket, weights = _parts(Path(run), model)
    network = _rebuild(blueprint, ticket, weights, source=Path(run))
    difference = 0.0

    def write(temporary: Path) -> None:
        nonlocal difference
        _to_onnx(network, blueprint, temporary)
        difference = _difference(network, blueprint, temporary)
        if not difference <= TOLERANCE:
            raise EarlybirdError(
                f"onnxruntime differs from PyTorch by {difference:.1e} of the largest output",
                needed=f"at most {TOLERANCE:.0e}; nothing was written",
                hint="report the model: some operator was exported wrongly",
            )

    return write_atomically(path, write), difference


def caveats(run: str | Path) -> list[str]:
    """Return what the exported network of a run folder lacks of what was evaluated, in whole sentences."""
    recipe = Path(run) / "recipe.toml"
    if not recipe.is_file():
        return []
    values = tomllib.loads(recipe.read_text(encoding="utf-8"))
    named = [] if values.get("dense") else values.get("method", [])
    names = [named] if isinstance(named, str) else named
    return [METHODS[name].exported for name in names if name in METHODS and METHODS[name].exported]


def _to_onnx(model: nn.Module, blueprint: Blueprint, path: Path) -> None:
    # batch of 2: a batch of 1 would be taken for a constant
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own internals
        try:
            program = torch.onnx.export(
                model,
                (blueprint.example(2),),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except Exception as error:  # the exporter has dozens of its own
            raise EarlybirdError(
                f"{blueprint.model} cannot be written as ONNX ({_first_line(error)})",
                needed="a forward pass without data-dependent control flow; nothing was written",
            ) from error
    assert program is not None
    program.model.producer_name = _PRODUCER
    for name in ("mean", "std", "class_names"):
        program.model.metadata_props[name] = json.dumps(getattr(blueprint, name))
    program.save(str(path))


def _difference(model: nn.Module, blueprint: Blueprint, path: Path) -> float:
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=providers)  # type: ignore[attr-defined]
    except Exception as error:  # it has an exception of its own for each way to refuse a graph
        raise EarlybirdError(
            f"onnxruntime refuses what the exporter wrote of {blueprint.model} ({_first_line(error)})",
            needed="operators that this onnxruntime has; nothing was written",
        ) from error
    worst = 0.0
    for batch in (1, 5):
        images = blueprint.example(batch)
        with torch.no_grad():
            expected = model(images)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        scale = max(float(expected.abs().max()), 1e-6)
        worst = max(worst, float((torch.from_numpy(found) - expected).abs().max()) / scale)
    return worst


def _check_target(path: Path, ours: Callable[[Path], bool], *, force: bool) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder", needed="a file name")
    if path.exists() and not force and not ours(path):
        raise InputError(f"{path} exists and is no export of this kind", hint="choose another name, or add --force")


def _is_weights(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def _is_onnx(path: Path) -> bool:
    with open(path, "rb") as file:  # an ONNX file begins with its version and its producer
        return _PRODUCER.encode() in file.read(64)


def _parts(run: Path, model: str | None) -> tuple[Blueprint, Ticket | None, dict[str, Tensor]]:
    """Return blueprint, ticket (None for a dense run) and final weights."""
    from_file = run.is_file()
    parts = _from_file(run) if from_file else _from_folder(run)
    named = parts[0].model
    if model is not None and model != named:
        raise InputError(f"{run} was built from {named}, not from {model}", hint="name the model that was trained")
    if from_file and model is None and not parts[0].in_zoo:
        raise InputError(
            f"{run} asks to import and call {named}, which is none of our own models",
            hint=f"if you trust that code and this file, confirm it with --model {named} (in Python: model='{named}')",
        )
    return parts


def _from_folder(run: Path) -> tuple[Blueprint, Ticket | None, dict[str, Tensor]]:
    blueprint, weights = read_trained(run)
    path = run / "ticket.safetensors"
    ticket = Ticket.load(path) if path.is_file() else None
    if ticket is not None and ticket.over_weights:
        ticket = None  # cuts nothing: what it removes is zero in the weights
    return blueprint, ticket, weights


def _from_file(path: Path) -> tuple[Blueprint, Ticket | None, dict[str, Tensor]]:
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path} is not an exported network (format {metadata.get('format')!r})",
            needed=f"a file of format {FORMAT}",
        )
    try:
        blueprint = Blueprint.from_json(metadata["blueprint"])
        masks = {name: tensors.pop(_MASK + name).to(torch.bool) for name in json.loads(metadata["order"])}
        kinds = json.loads(metadata.get("kinds", "{}"))  # older exports have channels alone
        ticket = Ticket(masks, kinds, json.loads(metadata["provenance"])) if masks else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is a damaged export ({type(error).__name__}: {error})", hint="export the run again"
        ) from error
    return blueprint, ticket, tensors


def _rebuild(blueprint: Blueprint, ticket: Ticket | None, weights: Mapping[str, Tensor], *, source: Path) -> nn.Module:
    model = blueprint.build()
    if ticket is not None:
        shrink(model, ticket, blueprint.example())
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise InputError(
            f"the weights of {source} do not fit {blueprint.model} ({_first_line(error)})",
            needed="the definition that was trained",
        ) from error
    return model.eval()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__
