"""Which channels live and die together: the dependency graph of a model, read as groups of coupled channels.

A residual sum ties the channels of all its branches, a depthwise convolution ties its input to its output, a
concatenation lays channels side by side, a flatten turns one channel into many columns. torch-pruning follows the
autograd graph to find all that (Fang et al., DepGraph, arXiv 2301.12900); here its result becomes plain values.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from earlybird.errors import ShrinkError

Side = Literal["out", "in", "both"]
ConvNd = nn.modules.conv._ConvNd
ConvTransposeNd = nn.modules.conv._ConvTransposeNd
BatchNorm = nn.modules.batchnorm._NormBase  # batch and instance norms


@dataclass(frozen=True)
class Member:
    """One layer's part in a group.

    Attributes:
        name: Module (or bare parameter) name.
        side: Which channels of the layer: what it writes, what it reads, or both at once (norms, depthwise).
        local: Channel indices in the layer, shape (n,).
        root: For each of them the channel index in the group, shape (n,).
        dim: For a bare parameter, the dimension that holds the channels; -1 for modules.
    """

    name: str
    side: Side
    local: Tensor
    root: Tensor
    dim: int = -1


@dataclass(frozen=True)
class Group:
    """Channels that can only be removed together.

    Attributes:
        size: Number of channels in the group.
        members: Every layer that writes, scales or reads them.
        producers: Layers that write them; more than one means a residual sum (or another elementwise join).
        output: They are outputs of the model, and must stay.
        macs_of: Multiply-accumulates for one sample, forward, of each convolution and linear layer among the members.
        covers: For each layer that reads the group, the share of its inputs that the group makes up.
        blocks: For each member that works in blocks of channels (grouped convolution, group norm), the block of each
            of the group's channels, shape (size,), -1 for none. Each block must keep equally many.
    """

    size: int
    members: tuple[Member, ...]
    producers: tuple[str, ...]
    output: bool
    macs_of: Mapping[str, int]
    covers: Mapping[str, float]
    blocks: tuple[Tensor, ...] = ()

    @property
    def macs_per_channel(self) -> float:
        """Forward MACs for one sample that one channel costs in all layers that write or read it."""
        return sum(macs * self.covers.get(name, 1.0) for name, macs in self.macs_of.items()) / self.size

    @property
    def residual(self) -> bool:
        """Whether several layers write the same channels."""
        return len(self.producers) > 1


def as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``(args, kwargs)`` for a call of the model: a tensor, a tuple or list, or a dict of keyword arguments."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model in eval mode, without anybody's hooks, and leave modes, buffers and generators as they were.

    Forward hooks belong to the user's loop and to the ledger; a call made here is none of theirs.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in modules]
    try:
        for module in modules:
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        model.eval()
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode, (after, before) in zip(modules, modes, hooks):
            module.training = mode
            module._forward_hooks, module._forward_pre_hooks = after, before


def is_depthwise(module: nn.Module) -> bool:
    """Whether every channel is convolved on its own."""
    return (
        isinstance(module, ConvNd) and module.groups > 1 and module.groups == module.in_channels == module.out_channels
    )


def find_groups(model: nn.Module, example_inputs: Any) -> list[Group]:
    """Trace ``model`` and return its groups of coupled channels, in the order of the producing layers.

    Args:
        model: Any module that autograd can trace; it is left as found.
        example_inputs: A tensor, a tuple of arguments, or a dict of keyword arguments; a batch of one is enough.

    Raises:
        ShrinkError: The model cannot run on ``example_inputs``, or its graph cannot be followed.
    """
    args, kwargs = as_arguments(example_inputs)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    macs: dict[str, int] = {}
    last: list[str] = []
    with undisturbed(model), torch.enable_grad():
        handles = []
        for name, module in model.named_modules():
            if not list(module.children()):
                handles.append(module.register_forward_pre_hook(lambda m, i, name=name: last.append(name)))
            if isinstance(module, (ConvNd, nn.Linear)):
                handles.append(module.register_forward_hook(lambda m, i, o, name=name: _add_macs(macs, name, m, i, o)))
        graph = tp.DependencyGraph()
        try:
            for parameter in frozen:  # without a gradient a layer is invisible to the trace
                parameter.requires_grad_(True)
            graph.build_dependency(
                model, example_inputs, forward_fn=lambda m, _: m(*args, **kwargs), verbose=False,
                output_transform=_tensors_with_graph,
            )  # fmt: skip
        except Exception as error:
            where = f" at layer '{last[-1]}'" if last else ""
            raise ShrinkError(
                f"{type(model).__name__} cannot be traced{where}: {type(error).__name__}: {error}",
                needed="a model that runs on example_inputs",
                hint="pass example_inputs as a batch the model accepts; nothing was changed",
            ) from error
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for handle in handles:
                handle.remove()
        return _read_groups(graph, model, macs)


def _read_groups(graph: Any, model: nn.Module, macs: dict[str, int]) -> list[Group]:
    names = {module: name for name, module in model.named_modules()}
    parameter_names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[Group] = []
    for traced in graph.get_all_groups():
        members: dict[tuple[str, Side], Member] = {}
        producers: list[str] = []
        output = False
        macs_of: dict[str, int] = {}
        covers: dict[str, float] = {}
        blocks: list[Tensor] = []
        size = len(traced[0].idxs)
        name: str
        side: Side
        for item in traced:
            module = item.dep.target.module
            if isinstance(module, tp.ops._OutputOp):
                output = True
                continue
            dim = -1
            if isinstance(module, nn.Parameter):
                name, side, dim = parameter_names[id(module)], "both", int(item.dep.target.pruning_dim)
            elif module in names:
                name, side = names[module], _side(module, graph.is_out_channel_pruning_fn(item.dep.handler))
            else:  # the graph's own bookkeeping nodes: concat, split, reshape, elementwise
                continue
            if item.root_idxs is None or any(root is None for root in item.root_idxs):
                raise ShrinkError(
                    f"channels of layer '{name}' cannot be followed through the graph; nothing was changed"
                )
            members[name, side] = Member(name, side, torch.tensor(item.idxs), torch.tensor(item.root_idxs), dim)
            blocks.extend(_blocks_of(module, members[name, side], size))
            if isinstance(module, (ConvNd, nn.Linear)):
                macs_of[name] = macs.get(name, 0)
                if side == "out":
                    producers.append(name)
                elif side == "in":
                    covers[name] = len(item.idxs) / _inputs(module)
        output = output or not any(side == "in" for _, side in members)  # nothing in the model reads them
        groups.append(Group(size, tuple(members.values()), tuple(producers), output, macs_of, covers, tuple(blocks)))
    return groups


def _side(module: nn.Module, writes: bool) -> Side:
    if isinstance(module, (ConvNd, nn.Linear)) and not is_depthwise(module):
        return "out" if writes else "in"
    if isinstance(module, nn.Embedding):
        return "out"
    return "both"


def _blocks_of(module: nn.Module, member: Member, size: int) -> list[Tensor]:
    count, width = 1, 0
    if isinstance(module, ConvNd) and not is_depthwise(module):
        count, width = module.groups, module.in_channels if member.side == "in" else module.out_channels
    elif isinstance(module, nn.GroupNorm):
        count, width = module.num_groups, module.num_channels
    if count == 1:
        return []
    block = torch.full((size,), -1)
    block[member.root] = member.local // (width // count)
    return [block]


def _inputs(module: nn.Module) -> int:
    return int(module.in_features if isinstance(module, nn.Linear) else module.in_channels)  # type: ignore[arg-type]


def _add_macs(macs: dict[str, int], name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    if isinstance(module, nn.Linear):
        count = output.numel() * module.in_features
    else:
        assert isinstance(module, ConvNd)
        taps = module.weight[0, 0].numel()
        moved = inputs[0] if isinstance(module, ConvTransposeNd) else output
        others = module.out_channels if isinstance(module, ConvTransposeNd) else module.in_channels
        count = moved.numel() * taps * others // module.groups
    macs[name] = macs.get(name, 0) + count // max(output.shape[0], 1)


def _tensors_with_graph(output: Any) -> list[Tensor]:
    """Flatten whatever a model returns into the tensors that autograd knows."""
    if isinstance(output, Tensor):
        return [output] if output.grad_fn is not None else []
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in _tensors_with_graph(value)]
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in _tensors_with_graph(value)]
    return []
