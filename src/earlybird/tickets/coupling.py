"""Which channels live and die together: the dependency graph of a model, read as groups of coupled channels.

A residual sum ties the channels of all its branches, a depthwise convolution ties its input to its output, a
concatenation lays channels side by side, a flatten turns one channel into many columns (Fang et al., DepGraph,
arXiv 2301.12900). `earlybird.tickets.labels` follows all that while the model runs; here what it found becomes plain
values. What cannot be followed makes a group that stays whole and says why; the rest of the model can be cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from earlybird.calls import as_call, tensors_in, undisturbed, unwrapped
from earlybird.errors import ShrinkError
from earlybird.tickets.labels import Labels
from earlybird.tickets.layers import (
    Conv,
    Side,
    TransposedConv,
    blocks,
    channel_dim,
    is_dense,
    layer_of,
    mixes_channels,
    width,
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """One layer's part in a group.

    Attributes:
        name: Module (or bare parameter) name.
        side: Which channels of the layer: what it writes, what it reads, or both at once (norms, depthwise).
        local: Channel indices in the layer, shape (n,).
        root: For each of them the channel index in the group, shape (n,).
        dim: For a bare parameter or buffer, the dimension that holds the channels; None for modules.
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
        producers: Layers that write them; more than one means that an elementwise operation joins them.
        output: They stay whole: outputs of the model, or read where nothing can be cut, or by no layer at all.
        macs_of: Multiply-accumulates for one sample, forward, of each convolution and linear layer among the members.
        covers: For each layer that reads the group, the share of its inputs that the group makes up.
        blocks: For each member that works in blocks of channels (grouped convolution, group norm), and for each split
            into equal parts, the block of each of the group's channels, shape (size,), -1 for none. Each block must
            keep equally many.
        uneven: Some such member has more of the group's channels in one block than in another (a concatenation feeds
            it), so that no channel can go without moving the others to another block.
        residual: What several layers write is summed, or joined in another way than by a product.
        why: Of an output, what reads its channels and cannot be cut.
    """

    size: int
    members: tuple[Member, ...]
    producers: tuple[str, ...]
    output: bool
    macs_of: Mapping[str, int]
    covers: Mapping[str, float]
    blocks: tuple[Tensor, ...] = ()
    uneven: bool = False
    residual: bool = False
    why: str = ""

    @property
    def macs_per_channel(self) -> float:
        """Forward MACs for one sample that one channel costs in all layers that write or read it."""
        return sum(macs * self.covers.get(name, 1.0) for name, macs in self.macs_of.items()) / self.size


def groups_to_state(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Return groups as nested dicts and lists of tensors, numbers and text."""
    return [
        {
            **asdict(group),
            "members": [asdict(member) for member in group.members],
            "producers": list(group.producers),
            "blocks": list(group.blocks),
        }
        for group in groups
    ]


def groups_from_state(state: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Rebuild what `groups_to_state` was given."""
    return [
        Group(
            **{
                **group,
                "members": tuple(Member(**member) for member in group["members"]),
                "producers": tuple(group["producers"]),
                "blocks": tuple(group["blocks"]),
            }
        )
        for group in state
    ]


def find_groups(model: nn.Module, example_inputs: Any) -> list[Group]:
    """Trace ``model`` and return its groups of coupled channels, in the order of the layers that write them.

    Args:
        model: Any module; it is left as found.
        example_inputs: A tensor, a tuple of arguments, or a dict of keyword arguments; a batch of one is enough.

    Raises:
        ShrinkError: The model cannot run on ``example_inputs``.
    """
    model = unwrapped(model)
    args, kwargs = as_call(example_inputs)
    trace = _Trace(model)
    with undisturbed(model), torch.no_grad(), _written_out():
        trace.listen(model)
        try:
            with trace.labels:
                output = model(*args, **kwargs)
        except Exception as error:
            where = f" at layer '{trace.labels.where}'" if trace.labels.where else ""
            raise ShrinkError(
                f"{type(model).__name__} cannot be traced{where}: {type(error).__name__}: {error}",
                needed="a model that runs on example_inputs, in eval mode and without forward hooks",
                hint="pass example_inputs as a batch the model accepts; nothing was changed",
            ) from error
    for tensor in tensors_in(output):
        trace.labels.fix(trace.labels.of(tensor), "outputs of the model itself")
    return trace.groups()


@contextmanager
def _written_out() -> Iterator[None]:
    """Let attention layers run their own layers, which the fused kernels of inference would not."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass(frozen=True)
class _Use:
    """What a layer does with units: those of each of its channels on one side."""

    name: str
    side: Side
    units: Tensor
    dim: int | None = None


class _Trace:
    """What the layers of a model write and read while it runs once."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.macs: dict[str, int] = {}
        layers = {id(tensor) for module in self.modules.values() if _is_layer(module) for tensor in _own(module)}
        named = (*model.named_parameters(), *model.named_buffers())
        self.bare = {name: t for name, t in named if id(t) not in layers and t.is_floating_point()}
        self.labels = Labels(self.bare)
        self._uses: dict[tuple[str, Side], Tensor] = {}
        self._inside = 0

    def listen(self, model: nn.Module) -> None:
        """Hook onto every layer."""
        for name, module in self.modules.items():
            if not list(module.children()):
                module.register_forward_pre_hook(lambda m, i, name=name: setattr(self.labels, "where", name))
            if _is_layer(module):
                module.register_forward_pre_hook(
                    lambda m, a, k, name=name: self._enter(name, m, (*a, *k.values())), with_kwargs=True
                )
                module.register_forward_hook(
                    lambda m, a, k, o, name=name: self._leave(name, m, (*a, *k.values()), o), with_kwargs=True
                )

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        self._inside += 1
        self.labels.paused = True
        if self._inside > 1:
            return
        if layer_of(module) is None:
            for tensor in tensors_in(list(inputs)):
                self.labels.fix(self.labels.of(tensor), f"read by layer '{name}' ({type(module).__name__})")
        elif not isinstance(module, nn.Embedding):
            tensor = tensors_in(list(inputs))[0]
            side: Side = "in" if mixes_channels(module) else "both"
            size, dim = width(module, side), channel_dim(module, tensor.shape)
            why = f"layer '{name}', which reads its channels across several dimensions"
            units = self.labels.along(tensor, dim, why)
            if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
                self.labels.fix(units, f"read by layer '{name}', a norm over several dimensions")
            self._note(name, side, torch.zeros(tensor.shape[dim]).double() if units is None else units, size)

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._inside -= 1
        if self._inside:
            return
        self.labels.paused = False
        if layer_of(module) is None:
            return
        if is_dense(module) or isinstance(module, Conv):
            self.macs[name] = self.macs.get(name, 0) + _macs(module, tensors_in(list(inputs))[0], output)
        side: Side = "out" if mixes_channels(module) else "both"
        size = width(module, side) or 1
        if (name, side) not in self._uses:  # both sides of a layer that only passes channels on are known by now
            # a single channel is never cut, and would tie whatever it is multiplied with
            self._uses[name, side] = self.labels.new(size) if size > 1 else torch.zeros(1).double()
        units, dim = self._uses[name, side], channel_dim(module, output.shape)
        if side == "both" and not isinstance(module, nn.Embedding):
            read = tensors_in(list(inputs))[0]
            units = self.labels.along(read, channel_dim(module, read.shape), "")  # type: ignore[assignment]
        if units is not None:
            self.labels.put(output, units.view([-1 if d == dim else 1 for d in range(output.dim())]))

    def _note(self, name: str, side: Side, units: Tensor, size: int | None) -> None:
        """Keep what a layer reads; all its calls read the same channels."""
        if size != len(units):  # one slope for all channels
            return
        before = self._uses.get((name, side))
        if before is not None:
            units = self.labels.join(before, units, f"layer '{name}', which runs on several inputs")
        self._uses[name, side] = units

    def groups(self) -> list[Group]:
        """Return what was found as groups."""
        self._tie_shared()
        self.labels.settle()
        uses = [_Use(name, side, self.labels.find(units)) for (name, side), units in self._uses.items()]
        uses += [use for name, units in self.labels.bare.items() for use in self._bare_use(name, units)]
        fixed, summed = self.labels.fixed(), self.labels.summed()
        group_of: dict[int, int] = {}
        members: dict[int, list[int]] = {}
        for use in uses:
            if use.side == "out":
                units = [unit for unit in dict.fromkeys(use.units.tolist()) if unit > 0]
                number = min((group_of[unit] for unit in units if unit in group_of), default=len(members))
                for other in sorted({group_of[unit] for unit in units if unit in group_of} - {number}):
                    members[number] += members.pop(other)
                    members[other] = []
                members.setdefault(number, []).extend(unit for unit in units if unit not in group_of)
                group_of |= dict.fromkeys(members[number], number)
        return [self._group(units, uses, fixed, summed) for units in members.values() if units]

    def _tie_shared(self) -> None:
        """Tie the channels of layers that hold one and the same parameter: it can only be cut once."""
        holders: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            for parameter in module.parameters(recurse=False):
                holders.setdefault(id(parameter), []).append(name)
        used = {name for name, _ in self._uses}
        known: dict[tuple[int, int], Tensor] = {}
        for (name, side), units in self._uses.items():
            layer = layer_of(self.modules[name])
            assert layer is not None
            for attribute, at in layer.places(side):
                parameter = getattr(self.modules[name], attribute, None)
                names = holders.get(id(parameter), [])
                if parameter is None or len(names) < 2:
                    continue
                why = f"'{attribute}', which the layers '{names[0]}' and '{names[1]}' share"
                before = known.setdefault((id(parameter), at % parameter.dim()), units)
                if len(before) == len(units) and used.issuperset(names):
                    self.labels.join(before, units, why, product=True)
                else:  # one of them works in blocks, or is never called
                    self.labels.fix(before, why)
                    self.labels.fix(units, why)

    def _bare_use(self, name: str, units: Tensor) -> list[_Use]:
        """Return the dimension of a bare parameter along which its units differ; more than one cannot be cut."""
        units = self.labels.find(units)
        shared = torch.unique(units, return_counts=True)
        alone = not bool((shared[1] > 1).any())
        dims = [d for d, size in enumerate(units.shape) if size > 1 and bool((units != units.narrow(d, 0, 1)).any())]
        if len(dims) == 1:
            dim = dims[0]
            return [_Use(name, "both", units.movedim(dim, 0).flatten(1)[:, 0] if units.dim() > 1 else units, dim)]
        if len(dims) > 1 and not alone:
            self.labels.fix(units.double(), f"'{name}', which has channels along several dimensions")
        return []

    def _group(self, units: list[int], uses: list[_Use], fixed: Mapping[int, str], summed: set[int]) -> Group:
        order = torch.tensor(units).sort()
        members: list[Member] = []
        covers: dict[str, float] = {}
        in_blocks: list[Tensor] = []
        uneven = False
        for use in uses:
            place = torch.searchsorted(order.values, use.units).clamp_max(len(units) - 1)
            local = (order.values[place] == use.units).nonzero().flatten()
            if not len(local):
                continue
            member = Member(use.name, use.side, local, order.indices[place[local]], use.dim)
            members.append(member)
            if use.dim is not None:
                continue
            module, extent = self.modules[use.name], len(use.units)
            if blocks(module) > 1:
                block = torch.full((len(units),), -1)
                block[member.root] = member.local // (extent // blocks(module))
                in_blocks.append(block)
                counts = torch.bincount(block[block >= 0], minlength=blocks(module))
                uneven = uneven or int(counts.min()) < int(counts.max())
            if use.side == "in":
                covers[use.name] = len(local) / extent
        for parts in self.labels.even:
            block = torch.full((len(units),), -1)
            for number, part in enumerate(map(self.labels.find, parts)):
                block[torch.isin(torch.tensor(units), part)] = number
            counts = torch.bincount(block[block >= 0], minlength=len(parts))
            if len(set(counts.tolist())) == 1 and int(counts[0]):  # what is in two parts at once is tied anyway
                in_blocks.append(block)
        why = next((fixed[unit] for unit in units if unit in fixed), "")
        return Group(
            len(units), tuple(members), tuple(member.name for member in members if member.side == "out"),
            bool(why) or not any(member.side == "in" for member in members),
            {m.name: self.macs[m.name] for m in members if m.dim is None and m.name in self.macs},
            covers, tuple(in_blocks), uneven, not summed.isdisjoint(units), why,
        )  # fmt: skip


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is known, or one of PyTorch's own with weights, which nothing can look into."""
    own = type(module).__module__.startswith("torch.nn.modules") and any(True for _ in module.parameters())
    return layer_of(module) is not None or (own and any(True for _ in module.parameters(recurse=False)))


def _macs(module: nn.Module, entered: Tensor, output: Tensor) -> int:
    """Return the forward multiply-accumulates of a convolution or linear layer for one sample."""
    if is_dense(module):
        count = output.numel() * (width(module, "in") or 0)
    else:
        assert isinstance(module, Conv)
        moved = entered if isinstance(module, TransposedConv) else output
        others = module.out_channels if isinstance(module, TransposedConv) else module.in_channels
        count = moved.numel() * math.prod(module.kernel_size) * others // module.groups
    return count // max(output.shape[0], 1)
