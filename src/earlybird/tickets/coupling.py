"""Which channels live and die together: the dependency graph of a model, read as groups of coupled channels.

A residual sum ties the channels of all its branches, a depthwise convolution ties its input to its output, a
concatenation lays channels side by side, a flatten turns one channel into many columns. torch-pruning follows the
autograd graph to find all that (Fang et al., DepGraph, arXiv 2301.12900); here its result becomes plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from earlybird.calls import as_call, tensors_in, undisturbed, unwrapped
from earlybird.errors import ShrinkError
from earlybird.tickets.layers import Conv, Side, TransposedConv, blocks, layer_of, mixes_channels, width


@dataclass(frozen=True)
class Member:
    """One layer's part in a group.

    Attributes:
        name: Module (or bare parameter) name.
        side: Which channels of the layer: what it writes, what it reads, or both at once (norms, depthwise).
        local: Channel indices in the layer, shape (n,).
        root: For each of them the channel index in the group, shape (n,).
        dim: For a bare parameter, the dimension that holds the channels; None for modules.
    """

    name: str
    side: Side
    local: Tensor
    root: Tensor
    dim: int | None = None


@dataclass(frozen=True)
class Group:
    """Channels that can only be removed together.

    Attributes:
        size: Number of channels in the group.
        members: Every layer that writes, scales or reads them.
        producers: Layers that write them; more than one means a residual sum (or another elementwise join).
        output: No layer is seen to read them: they are outputs of the model, or go where the graph cannot follow.
        macs_of: Multiply-accumulates for one sample, forward, of each convolution and linear layer among the members.
        covers: For each layer that reads the group, the share of its inputs that the group makes up.
        blocks: For each member that works in blocks of channels (grouped convolution, group norm), the block of each
            of the group's channels, shape (size,), -1 for none. Each block must keep equally many.
        uneven: Some such member has more of the group's channels in one block than in another (a concatenation feeds
            it), so that no channel can go without moving the others to another block.
    """

    size: int
    members: tuple[Member, ...]
    producers: tuple[str, ...]
    output: bool
    macs_of: Mapping[str, int]
    covers: Mapping[str, float]
    blocks: tuple[Tensor, ...] = ()
    uneven: bool = False

    @property
    def macs_per_channel(self) -> float:
        """Forward MACs for one sample that one channel costs in all layers that write or read it."""
        return sum(macs * self.covers.get(name, 1.0) for name, macs in self.macs_of.items()) / self.size

    @property
    def residual(self) -> bool:
        """Whether several layers write the same channels."""
        return len(self.producers) > 1


def find_groups(model: nn.Module, example_inputs: Any) -> list[Group]:
    """Trace ``model`` and return its groups of coupled channels, in the order of the producing layers.

    Args:
        model: Any module that autograd can trace; it is left as found.
        example_inputs: A tensor, a tuple of arguments, or a dict of keyword arguments; a batch of one is enough.

    Raises:
        ShrinkError: The model cannot run on ``example_inputs``, or its graph cannot be followed.
    """
    model = unwrapped(model)
    args, kwargs = as_call(example_inputs)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    macs: dict[str, int] = {}
    last = ""

    def enter(name: str) -> None:
        nonlocal last
        last = name

    with undisturbed(model):
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_pre_hook(lambda m, i, name=name: enter(name))
            if isinstance(module, (Conv, nn.Linear)):
                module.register_forward_hook(
                    lambda m, i, k, o, name=name: _add_macs(macs, name, m, (*i, *k.values()), o), with_kwargs=True
                )
        graph = tp.DependencyGraph()
        try:
            for parameter in frozen:  # without a gradient a layer is invisible to the trace
                parameter.requires_grad_(True)
            # nobody goes backward through this graph, so it need not hold any activation
            nothing = torch.empty(0)
            with torch.autograd.graph.saved_tensors_hooks(lambda _: nothing, lambda _: nothing):
                graph.build_dependency(
                    model, example_inputs, forward_fn=lambda m, _: m(*args, **kwargs), verbose=False,
                    output_transform=lambda output: [t for t in tensors_in(output) if t.grad_fn is not None],
                )  # fmt: skip
            return _read_groups(graph, model, macs)
        except ShrinkError:
            raise
        except Exception as error:
            where = f" at layer '{last}'" if last else ""
            raise ShrinkError(
                f"{type(model).__name__} cannot be traced{where}: {type(error).__name__}: {error}",
                needed="a model that runs on example_inputs, in eval mode and without forward hooks",
                hint="pass example_inputs as a batch the model accepts; nothing was changed",
            ) from error
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


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
        in_blocks: list[Tensor] = []
        uneven = False
        size = len(traced[0].idxs)
        name: str
        side: Side
        for item in traced:
            module = item.dep.target.module
            if isinstance(module, tp.ops._OutputOp):
                output = True
                continue
            dim = None
            if isinstance(module, nn.Parameter):
                name, side, dim = parameter_names[id(module)], "both", int(item.dep.target.pruning_dim)
                extent: int | None = module.shape[dim]
            elif module in names:
                name = names[module]
                side = _side(module, graph.is_out_channel_pruning_fn(item.dep.handler))
                extent = width(module, side)
            else:  # the graph's own bookkeeping nodes: concat, split, reshape, elementwise
                continue
            local, root = item.idxs, item.root_idxs
            if root is None or any(r is None for r in root) or (extent is not None and max(local) >= extent):
                raise ShrinkError(
                    f"channels of layer '{name}' cannot be followed through the graph (a reshape that mixes them?)",
                    hint="nothing was changed; train this model dense, or cut it by hand",
                )
            member = members[name, side] = Member(name, side, torch.tensor(local), torch.tensor(root), dim)
            if dim is None and blocks(module) > 1 and extent is not None:
                block = torch.full((size,), -1)
                block[member.root] = member.local // (extent // blocks(module))
                in_blocks.append(block)
                counts = torch.bincount(block[block >= 0], minlength=blocks(module))
                uneven = uneven or int(counts.min()) < int(counts.max())
            if isinstance(module, (Conv, nn.Linear)):
                macs_of[name] = macs.get(name, 0)
                if side == "out":
                    producers.append(name)
                elif side == "in" and extent:
                    covers[name] = len(local) / extent
        output = output or not any(side == "in" for _, side in members)
        groups.append(
            Group(
                size, tuple(members.values()), tuple(producers), output, macs_of, covers, tuple(in_blocks), uneven
            )
        )  # fmt: skip
    return groups


def _side(module: nn.Module, writes: bool) -> Side:
    layer = layer_of(module)
    if mixes_channels(module) or layer is None:
        return "out" if writes else "in"
    return "both"


def _add_macs(macs: dict[str, int], name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    if isinstance(module, nn.Linear):
        count = output.numel() * module.in_features
    else:
        assert isinstance(module, Conv)
        taps = module.weight[0, 0].numel()
        moved = inputs[0] if isinstance(module, TransposedConv) else output
        others = module.out_channels if isinstance(module, TransposedConv) else module.in_channels
        count = moved.numel() * taps * others // module.groups
    macs[name] = macs.get(name, 0) + count // max(output.shape[0], 1)
