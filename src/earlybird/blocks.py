"""Residual blocks: the parts of a network that it can do without for a while, since a shortcut leads around them.

Which modules are blocks, in any model:

- those whose output is a sum with their own input, an activation function after it at most, and nothing else between
  (the innermost one, where modules are nested); they are found in the autograd graph of one pass in eval mode;
- beside them, modules of the same classes that do something else: those that change the size or the channels, with a
  layer in their shortcut.

Or those that the user names. Only a block whose output has the shape of its input can be left out: its input takes the
output's place. The published code of SkipNet, E2-Train and stochastic depth leaves out the others, too, down to the
layer in their shortcut.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from earlybird.calls import Call, arounds, as_call, first_sample, undisturbed, unwrapped
from earlybird.cost.count import ModelCost, count
from earlybird.errors import InputError
from earlybird.tickets.layers import layer_of

__all__ = [
    "TIMED_PASSES", "Block", "block_seconds", "channels_of", "check_free", "counted", "find_blocks", "forward_macs",
    "found_again", "patterns_from",
]  # fmt: skip

TIMED_PASSES = 4
"""Of each block in `block_seconds`, forward and backward; the first one warms up."""

# names of autograd's nodes: what may stand between a block's sum and its output
_ACTIVATIONS = (
    "Relu", "Hardtanh", "LeakyRelu", "PreluKernel", "Elu", "Celu", "Silu", "Gelu", "Mish", "Hardswish", "Softplus",
    "Threshold",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One residual block.

    Attributes:
        name: Of its module.
        module: What is called once in a pass of the model, with one tensor.
        skippable: Whether its input can take the place of its output.
        channels: Of its input.
        layers: Names of the modules in it that execute counted operations, as a ledger knows them.
        reader: Name of the layer in it that reads its input as it is, or '' where something is done to it first.
        branch: Name of the module whose output is added to its input, or '' where it is no module's output.
    """

    name: str
    module: nn.Module
    skippable: bool
    channels: int
    layers: tuple[str, ...]
    reader: str
    branch: str


def channels_of(x: Tensor) -> int:
    """Return the channels of a batch: of maps (N, C, H, W) the second dimension, of tokens (N, T, C) the last."""
    return x.shape[1] if x.ndim > 3 else x.shape[-1]


def patterns_from(name: str, value: Any) -> tuple[str, ...]:
    """Return patterns of module names from text such as ``'stages.*.blocks.*,head'`` or a sequence of it.

    Raises:
        InputError: ``value`` is neither.
    """
    found = value.split(",") if isinstance(value, str) else value
    if not isinstance(found, Iterable) or not all(isinstance(item, str) and item.strip() for item in found):
        raise InputError(f"{name} is {value!r}", needed="names of modules, such as 'layers.*.blocks.*'")
    return tuple(item.strip() for item in found)


def find_blocks(model: nn.Module, example_inputs: Any, patterns: Sequence[str] = ()) -> list[Block]:
    """Return the residual blocks of ``model`` in the order in which they run.

    Args:
        model: Any module; it is run once on one sample, and left as found.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments that the model runs on.
        patterns: Names of the blocks instead, where ``*`` and ``?`` stand for any text between two dots.

    Raises:
        InputError: Nothing is found, no block can be left out, or a named one is not called once with one tensor.
    """
    model = unwrapped(model)
    cost = counted(model, example_inputs)
    calls = _watch(model, example_inputs)
    names = _named(model, calls, patterns) if patterns else _residual(model, calls)
    modules = dict(model.named_modules())
    blocks = []
    for name in sorted(names, key=list(calls).index):
        layers = tuple(layer for layer in cost.layers if _inside(layer, name))
        call = calls[name]
        skippable = call.same_shape and bool(layers) and (call.adds_input or bool(patterns))
        blocks.append(Block(name, modules[name], skippable, call.channels, layers, call.reader, call.branch))
    if not any(block.skippable for block in blocks):
        if patterns:
            raise InputError(
                f"no block named by {', '.join(patterns)} puts out the shape that it gets",
                needed="blocks whose input can take the place of their output",
            )
        raise InputError(
            f"{type(model).__name__} has no residual block: no module puts out a sum with its own input",
            hint="name the blocks by a pattern such as 'layers.*.blocks.*', or leave this method out",
        )
    return blocks


def found_again(blocks: Sequence[Block], model: nn.Module, example_inputs: Any, patterns: Sequence[str]) -> list[Block]:
    """Return the same blocks as they are now: other methods may have changed the layers inside since.

    Raises:
        InputError: They are others.
    """
    now = find_blocks(model, example_inputs, patterns)
    if [(block.module, block.skippable) for block in now] != [(block.module, block.skippable) for block in blocks]:
        raise InputError(
            f"the residual blocks are {', '.join(block.name for block in now)}, and were "
            f"{', '.join(block.name for block in blocks)}",
            hint="attach what runs blocks after what changes the model",
        )
    return now


def counted(model: nn.Module, example_inputs: Any) -> ModelCost:
    """Count ``model`` on one sample, below everybody's hooks."""
    with undisturbed(model):
        return count(model, example_inputs)


def forward_macs(blocks: Sequence[Block], cost: ModelCost) -> list[int]:
    """Return the multiply-accumulates of each block for one sample, forward, from a count of its model."""
    return [sum(cost.layers[name].macs for name in block.layers if name in cost.layers) for block in blocks]


def block_seconds(model: nn.Module, blocks: Sequence[Block], call: Call) -> list[float]:
    """Return the seconds that each block takes for one sample of a batch, forward and backward.

    Blocks run in turns, on what they get in this call, in the mode and under the autocast of the caller, each by
    itself, `TIMED_PASSES` times; the fastest pass but the first counts. The model is left as found, and hooks on it, on
    its modules and on its parameters do not run.

    Args:
        model: Of the blocks, without wrappers.
        blocks: In the order in which they run.
        call: A batch that the model runs on, of one sample or more.
    """
    first = next(model.parameters())
    device = first.device
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    modes = [(module, module.training) for module in model.modules()]
    inputs: dict[int, Tensor] = {}
    taken: list[list[float]] = [[] for _ in blocks]
    # without the cache, which would hold on to weights that are made here until the caller's own autocast ends
    with undisturbed(model), torch.autocast(device.type, autocast[1], enabled=autocast[0], cache_enabled=False):
        for module, training in modes:
            module.training = training
        for index, block in enumerate(blocks):
            block.module.register_forward_pre_hook(lambda _, args, index=index: inputs.update({index: args[0]}))
        with torch.no_grad():
            model(*call.args, **call.kwargs)
        for _ in range(TIMED_PASSES):
            for index, block in enumerate(blocks):
                x = inputs[index].detach().requires_grad_()
                weights = {  # others than the user's, which may have hooks
                    name: parameter.detach().requires_grad_(parameter.requires_grad)
                    for name, parameter in block.module.named_parameters()
                }
                learning = [weight for weight in weights.values() if weight.requires_grad]
                _wait(device)
                begun = time.perf_counter()
                out = torch.func.functional_call(block.module, weights, (x,))
                torch.autograd.grad(out, [x, *learning], torch.ones_like(out), allow_unused=True)
                _wait(device)
                taken[index].append((time.perf_counter() - begun) / len(x))
    return [min(rounds[1:]) for rounds in taken]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_free(blocks: Iterable[Block]) -> None:
    """Raise an `InputError` where another method decides already how a block is run."""
    for block in blocks:
        for owner in arounds(block.module, object):
            raise InputError(
                f"block '{block.name}' is run by {type(owner).__name__} already",
                hint="leave one of the two methods out, or call detach() of the other one first",
            )


@dataclass
class _Call:
    """What was seen of one module."""

    times: int = 0
    one_tensor: bool = False
    same_shape: bool = False
    adds_input: bool = False
    branch: str = ""
    reader: str = ""
    channels: int = 0


def _watch(model: nn.Module, example_inputs: Any) -> dict[str, _Call]:
    """Run ``model`` once; return what was seen of each module with parameters, in the order of the calls' ends."""
    args, kwargs = as_call(first_sample(example_inputs))
    calls: dict[str, _Call] = {}
    modules = dict(model.named_modules())
    marks: dict[str, Tensor] = {}  # inputs of the modules that are being called
    readers: dict[str, str] = {}
    makers: dict[Any, str] = {}  # autograd's node to the innermost module whose output it makes

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return None
        x = args[0]
        for outer, mark in marks.items() if layer_of(modules[name]) is not None else ():
            if mark.grad_fn is not None and _without_copies(x.grad_fn, mark.grad_fn) is mark.grad_fn:
                readers.setdefault(outer, name)
        # where nothing learns there is no graph yet
        marks[name] = (x if x.requires_grad or not x.is_floating_point() else x.detach().requires_grad_()).clone()
        return (marks[name],), kwargs

    def after(name: str, output: Any) -> None:
        call = calls.setdefault(name, _Call())
        call.times += 1
        mark = marks.pop(name, None)
        if not isinstance(output, Tensor) or output.ndim < 2:
            return
        if mark is not None and mark.ndim > 1:
            call.one_tensor, call.same_shape = True, output.shape == mark.shape
            call.channels = channels_of(mark)
            call.adds_input, other = _sum_with(mark.grad_fn, output.grad_fn)
            call.branch, call.reader = makers.get(other, ""), readers.get(name, "")
        makers.setdefault(output.grad_fn, name)

    with undisturbed(model):
        for name, module in model.named_modules():
            if next(module.parameters(), None) is not None:
                module.register_forward_pre_hook(lambda m, a, k, name=name: before(name, a, k), with_kwargs=True)
                module.register_forward_hook(lambda m, a, output, name=name: after(name, output))
        model(*args, **kwargs)
    return calls


def _sum_with(start: Any, output: Any) -> tuple[bool, Any]:
    """Tell whether additions alone, and after them an activation function, lead from node ``start`` to ``output``.

    Returns:
        That; and of a single addition, the node of what is added, else None.
    """
    while output is not None and output.name().removesuffix("Backward0") in _ACTIVATIONS:
        output = output.next_functions[0][0]
    if start is None or output is None or output.name() != "AddBackward0":
        return False, None
    terms = [_without_copies(term, start) for term, _ in output.next_functions]
    if start in terms:
        return True, next((term for term in terms if term is not start), None)
    seen = list(terms)
    for term in seen:
        if term is not None and term.name() == "AddBackward0":
            seen += [_without_copies(inner, start) for inner, _ in term.next_functions]
    return start in seen, None


def _without_copies(node: Any, start: Any) -> Any:
    """Go back from ``node`` over the copies that `_watch` makes of inputs, but not over ``start``."""
    while node is not None and node is not start and node.name() == "CloneBackward0":
        node = node.next_functions[0][0]
    return node


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _residual(model: nn.Module, calls: dict[str, _Call]) -> list[str]:
    """Return the innermost modules that add their input to what they put out, and others of their classes."""
    sums = [name for name, call in calls.items() if call.times == 1 and call.one_tensor and call.adds_input]
    sums = [name for name in sums if not any(other != name and _inside(other, name) for other in sums)]
    modules = dict(model.named_modules())
    kinds = {type(modules[name]) for name in sums}
    alike = [
        name
        for name, call in calls.items()
        if type(modules[name]) in kinds and call.times == 1 and call.one_tensor
        and not any(_inside(name, block) or _inside(block, name) for block in sums)
    ]  # fmt: skip
    return sums + alike


def _named(model: nn.Module, calls: dict[str, _Call], patterns: Sequence[str]) -> list[str]:
    """Return the modules that the user's patterns name, having checked that they are called as blocks are."""
    found = []
    for pattern in patterns:
        parts = pattern.split(".")
        names = [
            name
            for name, _ in model.named_modules()
            if len(parts) == name.count(".") + 1 and all(map(fnmatchcase, name.split("."), parts))
        ]
        if not names:
            raise InputError(
                f"no module of {type(model).__name__} is named by '{pattern}'",
                hint="'*' stands for one part of a name; named_modules() shows them",
            )
        found += names
    found = list(dict.fromkeys(found))
    for name in found:
        call = calls.get(name, _Call())
        if call.times != 1 or not call.one_tensor:
            how = f"called {call.times} times in a pass" if call.times != 1 else "not called with one tensor alone"
            raise InputError(f"block '{name}' is {how}", needed="blocks that map one tensor to another, once in a pass")
        if any(other != name and _inside(other, name) for other in found):
            raise InputError(f"block '{name}' holds another one that is named", needed="blocks beside each other")
    return found
