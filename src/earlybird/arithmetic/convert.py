"""Turn the convolutions and linear layers of a network into shift layers, add layers, or chains of both.

You et al., "ShiftAddNet: A Hardware-Inspired Deep Network", NeurIPS 2020, https://arxiv.org/abs/2010.12785; reference
code github.com/RICE-EIC/ShiftAddNet. What becomes of a layer:

                first and last      all others
    shift       shift               shift
    add         stay                add                                        (as AdderNet)
    shift_add   shift               shift, inputs to outputs with the stride,  (as ShiftAddNet)
                                    then add, outputs to outputs with stride 1

The filters of both layers of a chain are as large as those of the convolution, and nothing stands between the two.
Layers keep their names; a chain's are ``NAME.shift`` and ``NAME.add``. Biases stay, behind the last layer of a chain.
Weights are drawn anew: those of a convolution say nothing about distances. Frozen layers stay as they are.

Outputs of an add layer are large, negative and far apart, so that a batch norm must follow; where none does, the layer
is refused by name, as are add layers with groups.

Deviations: hidden linear layers are converted, too; the classifier has a bias instead of a batch norm behind it.
"""

from __future__ import annotations

import fnmatch
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from earlybird.arithmetic.add import AddConv2d, AddLinear
from earlybird.arithmetic.shift import Form, ShiftConv2d, ShiftLayer, ShiftLinear
from earlybird.calls import Around, as_call, first_sample, hook_owners, undisturbed, unwrapped
from earlybird.errors import InputError, nearest
from earlybird.objective import reader_of
from earlybird.tickets.claim import Claim
from earlybird.tickets.layers import BatchNorm, Conv

__all__ = ["Operation", "Replaced", "convert", "plan"]

Operation = Literal["shift", "add", "shift_add"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Replaced(NamedTuple):
    """One layer that was converted: it was ``old`` and is ``new`` now."""

    old: nn.Conv2d | nn.Linear
    new: nn.Module


def convert(
    model: nn.Module,
    operation: Operation,
    *,
    example_inputs: Any = None,
    generator: torch.Generator | None = None,
    leave: Sequence[str] = (),
    form: Form = "q",
    bits: int = 5,
    threshold: float = 0.5,
    fraction_bits: int | None = None,
) -> dict[str, Replaced]:
    """Convert ``model``, in place.

    Args:
        model: Any module of ``Conv2d`` and ``Linear`` layers, and others without weights of that kind.
        operation: What its layers become.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments that the model runs on; needed for
            add layers, to see that a batch norm follows each.
        generator: On the CPU, for the new weights; by default PyTorch's own.
        leave: Names or patterns (``'blocks.0.*'``) of layers that stay as they are.
        form: As in `earlybird.arithmetic.shift.ShiftConv2d`; so are all that follow.
        bits: Of a shift weight.
        threshold: Of signs.
        fraction_bits: Inputs, and filters of add layers, are floored to this many bits after the point.

    Returns:
        Layer name to what was replaced. A layer that the model holds under several names is there once.

    Raises:
        InputError: Some layer cannot be converted; the message names it, and nothing was changed.
    """
    model = unwrapped(model)
    kinds = plan(model, operation, example_inputs=example_inputs, leave=leave)
    modules = dict(model.named_modules())
    options: dict[str, Any] = {
        "form": form, "bits": bits, "threshold": threshold, "fraction_bits": fraction_bits
    }  # fmt: skip
    replaced = {
        name: Replaced(modules[name], _new(modules[name], kind, options, generator)) for name, kind in kinds.items()
    }
    news = {found.old: found.new for found in replaced.values()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in news:
                parent._modules[name] = news[child]
    return replaced


def plan(
    model: nn.Module, operation: Operation, *, example_inputs: Any = None, leave: Sequence[str] = ()
) -> dict[str, Operation]:  # fmt: skip
    """Return what `convert` would make of each layer, by name, or raise what it would raise."""
    if operation not in get_args(Operation):
        raise InputError(f"operation is {operation!r}", needed=f"one of {', '.join(get_args(Operation))}")
    model = unwrapped(model)
    kinds = _kinds(model, operation, leave)
    modules = dict(model.named_modules())
    adding = [name for name, kind in kinds.items() if kind != "shift"]
    for name in adding:
        if getattr(modules[name], "groups", 1) != 1:
            raise InputError(
                f"layer '{name}' has {modules[name].groups} groups, over which distances are not defined",
                hint=f"use operation 'shift', or leave=('{name}',)",
            )
    if adding:
        _check_norms(model, adding, example_inputs)
    return kinds


def _kinds(model: nn.Module, operation: Operation, leave: Sequence[str]) -> dict[str, Operation]:
    """Return what each layer becomes, by name; those that stay are left out."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (Conv, nn.Linear))}
    for pattern in leave:
        if not fnmatch.filter(layers, pattern):
            raise InputError(f"leave names '{pattern}', which is no layer", hint=nearest(pattern, layers))
    for claim in hook_owners(model, Claim):
        raise InputError(
            f"{claim.method} decides already which units of the model stay",
            hint="convert the model before other methods",
        )
    if reader := reader_of(model):
        raise InputError(f"{reader} reads the model's features", hint="convert the model before other methods")
    for name, module in model.named_modules():
        if name and name not in layers and isinstance(module.__dict__.get("forward"), Around):
            raise InputError(
                f"another method decides how block '{name}' is run", hint="convert the model before other methods"
            )
    ends = [*layers][:1] + [*layers][-1:]
    kinds: dict[str, Operation] = {}
    for name, module in layers.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in leave):
            continue
        if isinstance(module, (ShiftConv2d, ShiftLinear, AddConv2d, AddLinear)):
            raise InputError(f"layer '{name}' is converted already")
        if (name in ends and operation == "add") or not all(p.requires_grad for p in module.parameters()):
            continue
        if type(module) not in (nn.Conv2d, nn.Linear):
            raise InputError(
                f"layer '{name}' is a {type(module).__name__}", needed="Conv2d and Linear layers",
                hint=f"leave=('{name}',) leaves it as it is",
            )  # fmt: skip
        if any(getattr(module, hooks) for hooks in _HOOKS) or isinstance(module.__dict__.get("forward"), Around):
            raise InputError(
                f"layer '{name}' has hooks, which would be lost with it", hint="convert the model before other methods"
            )
        kinds[name] = "shift" if name in ends and operation == "shift_add" else operation
    if not kinds:
        raise InputError(f"{type(model).__name__} has no layer to convert", needed="trained Conv2d or Linear layers")
    if "" in kinds:
        raise InputError(f"the model is a {type(model).__name__} itself", needed="a model that has layers")
    users: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layer = name.rpartition(".")[0]
        first = users.setdefault(id(parameter), layer)
        same = model.get_submodule(first) is model.get_submodule(layer)
        if not same and {first, layer} & set(kinds):
            raise InputError(f"layers '{first}' and '{layer}' share a weight", hint=f"leave=('{first}', '{layer}')")
    return kinds


def _check_norms(model: nn.Module, adding: Sequence[str], example_inputs: Any) -> None:
    """Raise an `InputError` that names a layer of ``adding`` whose output does not go straight to a batch norm."""
    if example_inputs is None:
        raise InputError("add layers need batch norms behind them", hint="pass example_inputs, to follow the model")
    args, kwargs = as_call(first_sample(example_inputs))
    outputs: list[tuple[str, Tensor]] = []  # held, so that no other tensor takes their place
    followed: set[str] = set()

    def note(name: str, output: Tensor) -> None:
        outputs.append((name, output))

    def follow(x: Tensor) -> None:
        followed.update(name for name, output in outputs if output is x)

    with undisturbed(model), torch.no_grad():
        for name, module in model.named_modules():
            if name in adding:
                module.register_forward_hook(lambda m, i, output, name=name: note(name, output))
            elif isinstance(module, BatchNorm):
                module.register_forward_pre_hook(lambda m, inputs: follow(inputs[0]))
        try:
            model(*args, **kwargs)
        except Exception as error:
            raise InputError(
                f"the model does not run on one sample of example_inputs: {type(error).__name__}: {error}"
            ) from error
    for name in adding:
        if name not in followed:
            raise InputError(
                f"no batch norm takes the output of layer '{name}'", needed="one behind each add layer",
                hint=f"use operation 'shift', or leave=('{name}',)",
            )  # fmt: skip


def _new(
    old: nn.Conv2d | nn.Linear, kind: Operation, options: dict[str, Any], generator: torch.Generator | None
) -> nn.Module:  # fmt: skip
    """Return what takes the place of a layer, on its device, with its bias and in its mode."""
    with torch.random.fork_rng(devices=()):  # of the layers' own draw, which the next one replaces
        parts = _parts(old, kind, options)
    for part in parts.values():
        part.reset_parameters(generator)
        part.to(device=old.weight.device, dtype=old.weight.dtype)
    last = parts["shift" if kind == "shift" else "add"]
    last.bias = old.bias
    if old.weight.ndim == 4 and old.weight.is_contiguous(memory_format=torch.channels_last):
        for part in parts.values():
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return (last if len(parts) == 1 else nn.Sequential(OrderedDict(parts))).train(old.training)


def _parts(
    old: nn.Conv2d | nn.Linear, kind: Operation, options: dict[str, Any]
) -> dict[str, ShiftLayer | AddConv2d | AddLinear]:  # fmt: skip
    bare: dict[str, Any] = {"bias": False, "fraction_bits": options["fraction_bits"]}
    options = {**options, **bare}
    if isinstance(old, nn.Linear):
        inputs, outputs = old.in_features, old.out_features
        if kind == "add":
            return {"add": AddLinear(inputs, outputs, **bare)}
        linear: dict[str, ShiftLayer | AddConv2d | AddLinear] = {"shift": ShiftLinear(inputs, outputs, **options)}
        return linear if kind == "shift" else {**linear, "add": AddLinear(outputs, outputs, **bare)}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    shape: dict[str, Any] = {name: getattr(old, name) for name in names}
    if kind == "add":
        return {"add": AddConv2d(**shape, **bare)}
    shift = ShiftConv2d(**shape, **options)
    if kind == "shift":
        return {"shift": shift}
    height, width = old.kernel_size
    same = (height // 2, width // 2) if height % 2 and width % 2 else "same"
    add = AddConv2d(old.out_channels, old.out_channels, (height, width), padding=same, **bare)
    return {"shift": shift, "add": add}
