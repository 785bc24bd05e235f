"""Shrink a model to its ticket: physically, in place, in any model, with the optimizer taken along.

The rule: *a channel is cut when, with the ticket's removed units silent, nothing but zeros would reach any layer that
reads it*. A removed unit is silent when its scale and shift (or its filter) are zero, and it takes with it what it
alone feeds: every norm and depthwise convolution that the ticket does not name itself, and its part of parameters that
belong to no layer. Where a removed channel cannot be cut (a residual sum whose other branch still writes it, a grouped
convolution that would become lopsided), it is silenced instead. So in eval mode the shrunk model computes what the
masked one computes, for every ticket. Group and layer norms are the exception that has no way out: their statistics are
taken over the channels that remain. Channels that something else works across (a softmax, a mean over channels, a
product of two activations), or whose way the model does not show, are left whole, alive, and are named in
``Change.whole``; the rest is cut. An add layer, which a zero does not leave alone, keeps what its cut channels added as
a constant.

Attention heads and feed-forward neurons (`earlybird.tickets.units`) are cut in the same way, but what reads them is
known by name, and the hidden width stays.

Groups of coupled channels come from `earlybird.tickets.coupling`. Which of them read only zeros is found by running
the model with every layer's output replaced: zeros where it is silent, random numbers elsewhere. The cut is then made,
its outputs are compared layer by layer with those of the masked model, and it is taken back if they differ: then the
groups that are to blame are found by halving, and left whole.

What is saved: seconds, MACs, bytes, in training and inference alike. The parameters stay the same objects, so
optimizers, hooks and references of the user's loop go on working; momentum and every other optimizer state of a
parameter's shape is sliced with it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from earlybird import data_parallel
from earlybird.arithmetic.add import AddConv2d, AddLinear
from earlybird.calls import Call, arounds, as_call, as_optimizers, unwrapped
from earlybird.errors import InputError, ShrinkError, nearest
from earlybird.ranks import all_or_none, check_alike, of_masks
from earlybird.sharded import Shards, gathered, is_sharded, spread, whole
from earlybird.tickets.coupling import Group, find_groups
from earlybird.tickets.layers import layer_of, set_width, width
from earlybird.tickets.plan import IN_BLOCKS, Plan, Slices, check_optimizers, make_plan, stay
from earlybird.tickets.proof import compare, outputs, probe, training_error
from earlybird.tickets.ticket import Ticket
from earlybird.tickets.units import KINDS, units_of


@dataclass(frozen=True)
class Change:
    """What `shrink` did.

    Attributes:
        layers: Layer name to ``{'out': (before, after), 'in': (before, after)}``, for every layer that changed.
        silenced: Layer name to channels that the ticket removes but that could not be cut; their scale and shift
            (or filter) are zero. Indices are those of the layer before the cut.
        rounded: Layer name to channels that stayed only because of ``round_to``. Indices as in the ticket.
        kept: Layer name to the output channels that stayed, shape (n,), for every layer whose outputs changed.
        read: Layer name to which of its input channels stayed, boolean, for every layer whose inputs changed.
        whole: Layer name to the reason why none of the channels in (a part of) it could go; they are as they were.
        parameters_before: Number of weights before.
        parameters_after: Number of weights after.
        seconds: Measured wall time.
    """

    layers: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    silenced: Mapping[str, list[int]] = field(default_factory=dict)
    rounded: Mapping[str, list[int]] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    read: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    whole: Mapping[str, str] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the change as plain numbers and lists."""
        return {
            "layers": {
                name: {side: list(widths) for side, widths in sides.items()} for name, sides in self.layers.items()
            },
            "silenced": {name: list(channels) for name, channels in self.silenced.items()},
            "rounded": {name: list(channels) for name, channels in self.rounded.items()},
            "kept": {name: channels.tolist() for name, channels in self.kept.items()},
            "whole": dict(self.whole),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Change:
        """Rebuild what `to_json` wrote; ``read`` stays empty."""
        layers = {
            name: {side: (int(before), int(after)) for side, (before, after) in sides.items()}
            for name, sides in state["layers"].items()
        }
        kept = {name: torch.tensor(channels, dtype=torch.int64) for name, channels in state["kept"].items()}
        return cls(**{**state, "layers": layers, "kept": kept})

    def then(self, later: Change) -> Change:
        """Return what this cut and a ``later`` one of what it left have changed together.

        All indices are those before this one; ``read`` stays empty. What was silenced, kept by rounding or left whole
        is what the later one says.
        """

        def before(name: str, channels: Tensor) -> Tensor:
            return self.kept[name][channels] if name in self.kept else channels

        layers = {name: dict(sides) for name, sides in self.layers.items()}
        for name, sides in later.layers.items():
            own = layers.setdefault(name, {})
            for side, (found, left) in sides.items():
                own[side] = (own[side][0] if side in own else found, left)
        silenced, rounded = (
            {name: before(name, torch.tensor(channels, dtype=torch.int64)).tolist() for name, channels in rows.items()}
            for rows in (later.silenced, later.rounded)
        )
        kept = {**self.kept, **{name: before(name, channels) for name, channels in later.kept.items()}}
        return Change(
            layers, silenced, rounded, kept, {}, later.whole, self.parameters_before, later.parameters_after,
            self.seconds + later.seconds,
        )  # fmt: skip

    def left(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return of values of layers' channels before the cut, each of shape (channels,), those of what stayed."""
        return {name: value[self.kept[name]] if name in self.kept else value for name, value in values.items()}

    def __str__(self) -> str:
        lines = [
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters "
            f"({self.parameters_after / max(self.parameters_before, 1):.1%}) in {self.seconds:.2f} s"
        ]
        for name, sides in self.layers.items():
            lines.append(f"  {name}: " + ", ".join(f"{side} {old} -> {new}" for side, (old, new) in sides.items()))
        for title, rows in (("not cut, but silent", self.silenced), ("kept by rounding", self.rounded)):
            lines.extend(f"  {name}: {len(channels)} {title}" for name, channels in rows.items() if channels)
        lines.extend(f"  {name}: left whole: {why}" for name, why in self.whole.items())
        return "\n".join(lines)


@runtime_checkable
class Follower(Protocol):
    """What runs around a module (`earlybird.calls.around`) and has tensors of its own along the model's channels."""

    def follow(self, change: Change) -> None:
        """Slice them as the model was: it has just been cut."""


def shrink(
    model: nn.Module,
    ticket: Ticket,
    example_inputs: Any,
    *,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    round_to: int = 1,
    scores: Mapping[str, Tensor] | None = None,
    groups: list[Group] | None = None,
) -> Change:
    """Cut ``model`` down to ``ticket``, in place, and its optimizer's state with it.

    In a distributed run, a model wrapped in DistributedDataParallel has its buckets made anew, and parameters sharded
    by ``fully_shard`` (FSDP2) are gathered, cut and sharded again; all ranks call it then, and all cut or none does.

    Args:
        model: Any module. Its parameters stay the same objects; their contents, gradients and buffers are sliced.
        ticket: Masks over output channels, by module name; `earlybird.draw` makes one. Or over heads and neurons, from
            `earlybird.draw_units`; or both.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments the model can run on (a batch
            of one is enough); used to follow the graph, never trained on.
        optimizer: One or several optimizers over the model's parameters. Every state tensor of a parameter's shape
            is sliced like the parameter; scalars stay; any other shape is an error.
        round_to: Keep as many further channels (not heads, not neurons) as make each cut layer's width a multiple of
            this. What stayed
            because of it is in ``Change.rounded``; those channels are live, not silenced.
        scores: Layer name to scores ``(channels,)`` by which the channels to keep further are chosen; by default the
            scales of the norms, else the size of the filters.
        groups: The model's groups from `find_groups`, where they are already at hand.

    Returns:
        What changed.

    Raises:
        InputError: The ticket does not belong to this model, or would remove every channel of a layer.
        ShrinkError: Some layer cannot be cut, or the cut model would compute something else than the masked one.
            The message names the layer. Nothing was changed.
    """
    start = time.perf_counter()
    wrapper, model = data_parallel.wrapper_of(model), unwrapped(model)
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise InputError(f"round_to is {round_to!r}", needed="a whole number of at least 1")
    optimizers = as_optimizers(optimizer)
    check_supported(model, optimizers, wrapper)
    removed = _check_ticket(ticket, model)
    chosen = units_of(ticket, model)
    before = sum(parameter.numel() for parameter in model.parameters())
    if not any(bool(mask.any()) for mask in (*removed.values(), *(gone for _, gone in chosen.values()))):
        return Change(parameters_before=before, parameters_after=before, seconds=time.perf_counter() - start)

    call = as_call(example_inputs)
    together = wrapper is not None or is_sharded(model)
    done: _Applied | None = None
    with gathered(model) as shards:
        try:
            with all_or_none(together):
                silent: dict[str, Tensor] = {}
                carried: dict[str, Tensor] = {}
                bare: dict[str, tuple[int, Tensor]] = {}
                if not removed:  # heads and neurons are found by name
                    groups = []
                else:
                    groups = find_groups(model, call) if groups is None else groups
                    bare = _bare(groups, removed)
                    silent, carried = probe(model, call, removed, bare)
                shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

                def applied(spared: Mapping[int, str]) -> _Applied:
                    plan = make_plan(model, groups, removed, silent, carried, chosen, round_to, scores or {}, spared)
                    check_optimizers(model, plan.slices, optimizers, shards)
                    return _cut_and_check(model, call, plan, removed | carried, bare)

                try:
                    done = applied({})
                except ShrinkError as error:
                    asked = [index for index, group in enumerate(groups) if not group.output and _asks(group, removed)]
                    done = _without_culprits(applied, asked, error)
                sliced = done.plan.slices
                shards.check({name: parameter.shape for name, parameter in model.named_parameters() if name in sliced})
            if together:
                cut = {f"{name} ({side})": ~gone for (name, side, _), gone in done.plan.cuts.items()}
                check_alike(
                    of_masks(cut), hint="give all ranks the same ticket and example_inputs; nothing was changed"
                )
        except BaseException:
            if done is not None:
                _take_back(done.undo)
            raise
        plan = done.plan
        _follow(model, plan, shapes, optimizers, shards)
    if wrapper is not None:
        data_parallel.refresh(wrapper)
    after = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - start
    rounded = {name: mask & ~plan.whole.get(name, ~mask) for name, mask in plan.alive.items() if name in removed}
    rounded = {name: mask for name, mask in rounded.items() if mask.any()}
    read = {name: ~cut for (name, side, _), cut in plan.cuts.items() if side != "out"}
    silenced = _as_lists(plan.silenced)
    change = Change(done.layers, silenced, _as_lists(rounded), _kept(plan), read, plan.why, before, after, seconds)
    followers = {id(owner): owner for module in model.modules() for owner in arounds(module, Follower)}  # type: ignore[type-abstract]
    for follower in followers.values():
        follower.follow(change)
    if chosen:
        describe(model, ticket)
    return change


def with_rounded(ticket: Ticket, rounded: Mapping[str, list[int]]) -> Ticket:
    """Return the ticket of what really stays: with the channels that rounding kept."""
    masks = dict(ticket.masks)
    for name, channels in rounded.items():
        masks[name][channels] = True
    return Ticket(masks, ticket.kinds, {**ticket.provenance, "rounded": sum(map(len, rounded.values()))})


def check_supported(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    wrapper: torch.nn.parallel.DistributedDataParallel | None,
) -> None:
    """Raise an `InputError` for a way of distributing that no cut can follow."""
    if wrapper is not None:
        data_parallel.check(wrapper)
    records = is_sharded(model)
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise InputError(
                f"FullyShardedDataParallel around '{name or 'the model'}' keeps weights in flat vectors",
                hint="use torch.distributed.fsdp.fully_shard (FSDP2)",
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor") and not records:
            raise InputError(
                f"parameter '{name}' is split by tensor parallelism",
                needed="whole parameters, or ones that fully_shard has sharded",
                hint="draw the ticket before the model is parallelised",
            )
    for optimizer in optimizers:
        if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
            raise InputError(
                "ZeroRedundancyOptimizer divides its state among the ranks by the old sizes",
                hint="use torch.distributed.fsdp.fully_shard with an ordinary optimizer",
            )


def _kept(plan: Plan) -> dict[str, Tensor]:
    return {name: stay(cut) for (name, side, _), cut in plan.cuts.items() if side != "in"}


def describe(model: nn.Module, ticket: Ticket) -> None:
    """Let the configs of Hugging Face models in ``model``, which was cut to ``ticket``, say so."""
    if "transformers" in sys.modules:  # importing it here would take seconds
        from earlybird.integrations.hf_files import record

        record(model, ticket)


def cut_to_shape(model: nn.Module, ticket: Ticket) -> None:
    """Cut heads and neurons of a model whose weights are yet to be loaded: nothing is proven, and nothing need run.

    Args:
        model: May be on the meta device.
        ticket: Over heads and neurons alone.

    Raises:
        InputError: The ticket does not belong to this model, or has channels, which need inputs to be followed with.
        ShrinkError: Some layer cannot be cut; nothing was changed.
    """
    channels = _check_ticket(ticket, model)
    if channels:
        raise InputError(f"the ticket has channels, of layer '{next(iter(channels))}'", hint="use earlybird.shrink")
    _cut(model, make_plan(model, [], {}, {}, {}, units_of(ticket, model), 1, {}, {}), [])


def _check_ticket(ticket: Ticket, model: nn.Module) -> dict[str, Tensor]:
    """Return the mask of removed channels of each layer whose channels the ticket names."""
    if not isinstance(ticket, Ticket):
        raise InputError(f"ticket is a {type(ticket).__name__}", needed="an earlybird.Ticket")
    modules = dict(model.named_modules())
    removed = {}
    for name, mask in ticket.masks.items():
        if name not in modules:
            raise InputError(
                f"the ticket names layer '{name}', which the model does not have",
                hint=nearest(name, modules, "use the ticket's own model"),
            )
        if ticket.kinds[name] in KINDS:
            continue
        if ticket.kinds[name] == "weight":
            raise InputError(
                f"the ticket is over single weights of '{name}', and nothing can be shrunk to those",
                hint="mask them (earlybird.sparse.masks.Masks), or refill the ticket to whole channels",
            )
        if ticket.kinds[name] != "channel":
            raise InputError(
                f"units of '{name}' are of kind '{ticket.kinds[name]}'", needed="kind 'channel', 'head' or 'neuron'"
            )
        channels = width(modules[name])
        if channels is None:
            raise InputError(f"layer '{name}' ({type(modules[name]).__name__}) has no output channels to mask")
        if channels != mask.numel():
            raise InputError(f"the ticket has {mask.numel()} channels for layer '{name}', the model {channels}")
        removed[name] = ~mask
    return removed


def _asks(group: Group, removed: Mapping[str, Tensor]) -> bool:
    return any(m.side != "in" and m.name in removed and bool(removed[m.name][m.local].any()) for m in group.members)


def _bare(groups: list[Group], removed: Mapping[str, Tensor]) -> dict[str, tuple[int, Tensor]]:
    """Return which channels of bare parameters belong to removed units alone: all layers that write them are asked."""
    found: dict[str, tuple[int, Tensor]] = {}
    for group in groups:
        left = torch.zeros(group.size, dtype=torch.bool)
        for member in group.members:
            if member.side == "out":
                gone = removed.get(member.name)
                left[member.root if gone is None else member.root[~gone[member.local]]] = True
        for member in group.members:
            if member.dim is not None:
                size = 1 + int(member.local.max())
                dim, mask = found.get(member.name, (member.dim, torch.zeros(size, dtype=torch.bool)))
                mask = torch.nn.functional.pad(mask, (0, max(size - len(mask), 0)))
                mask[member.local] |= ~left[member.root]
                found[member.name] = dim, mask
    return {name: (dim, mask) for name, (dim, mask) in found.items() if mask.any()}


class _Applied(NamedTuple):
    """A cut that was made and found right: what was cut, the new widths, and what would take it back."""

    plan: Plan
    layers: dict[str, dict[str, tuple[int, int]]]
    undo: list[Callable[[], None]]


def _cut_and_check(
    model: nn.Module, call: Call, plan: Plan, removed: Mapping[str, Tensor], bare: Mapping[str, tuple[int, Tensor]]
) -> _Applied:
    """Cut, and compare with the masked model; whatever is wrong is raised, and the cut taken back."""
    unheard = {name: gone & ~plan.alive.get(name, torch.zeros_like(gone)) for name, gone in removed.items()}
    gone = {name: (dim, cut) for (name, _, dim), cut in plan.cuts.items() if dim is not None and name in bare}
    normed = {
        name: stay(plan.cuts[name, "both", None])
        for name, module in model.named_modules()
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and (name, "both", None) in plan.cuts
    }
    wanted = outputs(model, call, unheard, plan.unread, gone, normed)
    undo: list[Callable[[], None]] = []
    try:
        layers = _cut(model, plan, undo)
        compare(model, call, wanted, _kept(plan))
        broken = training_error(model, call)
        if broken is not None:
            _take_back(undo)
            if training_error(model, call) is None:  # some models cannot train on a batch of one, cut or not
                raise ShrinkError(
                    f"{type(model).__name__} does not train after the cut: {type(broken).__name__}: {broken}",
                    needed="a ticket that leaves alone what feeds branches which only training enters",
                    hint="nothing was changed",
                ) from broken
            layers = _cut(model, plan, undo)
    except BaseException:
        _take_back(undo)
        raise
    return _Applied(plan, layers, undo)


def _without_culprits(
    applied: Callable[[Mapping[int, str]], _Applied], asked: list[int], error: ShrinkError
) -> _Applied:
    """Cut all groups but those that cannot be cut, which are found by halving; raise ``error`` where none is left."""

    def culprits(some: list[int], error: ShrinkError) -> dict[int, str]:
        if len(some) == 1:
            return {some[0]: error.found}
        found: dict[int, str] = {}
        for part in (some[: len(some) // 2], some[len(some) // 2 :]):
            try:
                _take_back(applied({index: "" for index in asked if index not in part}).undo)
            except ShrinkError as own:
                found |= culprits(part, own)
        return found or dict.fromkeys(some[len(some) // 2 :], error.found)  # only together do they break it

    if not asked:
        raise error
    spared = culprits(asked, error)
    if len(spared) == len(asked):
        raise error
    done = applied(spared)
    if not done.plan.cuts:
        _take_back(done.undo)
        raise error
    return done


def _cut(model: nn.Module, plan: Plan, undo: list[Callable[[], None]]) -> dict[str, dict[str, tuple[int, int]]]:
    """Cut weights, buffers and sizes; what would take each step back is appended to ``undo``."""
    modules = dict(model.named_modules())
    for (name, side, _), cut in plan.cuts.items():
        module = modules.get(name)
        if side == "in" and isinstance(module, (AddConv2d, AddLinear)):  # the distance to a zero is not zero
            undo.append(partial(setattr, module, "constant", module.constant))
            module.silence(cut)
    for name, parameter in model.named_parameters():
        if name in plan.slices:
            undo.append(partial(setattr, parameter, "data", parameter.data))
            parameter.data = _take(parameter.data, plan.slices[name])
    for name, bare in model.named_buffers():
        if name in plan.slices:
            owner, _, own = name.rpartition(".")
            undo.append(partial(setattr, modules[owner], own, bare))
            setattr(modules[owner], own, _take(bare, plan.slices[name]))
    for parameter, at, rows in _silent_rows(modules, plan):
        undo.append(partial(setattr, parameter, "data", parameter.data))
        parameter.data = parameter.data.index_fill(at, rows, 0.0)
    for (name, attribute), value in plan.attributes.items():
        undo.append(partial(setattr, modules[name], attribute, getattr(modules[name], attribute)))
        setattr(modules[name], attribute, value)
    layers: dict[str, dict[str, tuple[int, int]]] = {}
    for (name, side, dim), cut in plan.cuts.items():
        before, after = cut.numel(), int((~cut).sum())
        layers.setdefault(name, {})["out" if side == "both" else side] = (before, after)
        if dim is not None:
            continue
        module = modules[name]
        layer = layer_of(module)
        assert layer is not None
        for attribute in layer.read_sizes if side == "in" else layer.write_sizes:
            undo.append(partial(setattr, module, attribute, getattr(module, attribute)))
        set_width(module, side, after)
        for buffer in layer.buffers if side != "in" else ():
            value = getattr(module, buffer)
            if value is not None:
                undo.append(partial(setattr, module, buffer, value))
                setattr(module, buffer, value.index_select(0, stay(cut).to(value.device)))
    return layers


def _take(tensor: Tensor, keep: Slices) -> Tensor:
    """Slice along several dimensions; the memory format of images (channels last) survives."""
    # a 1 x 1 filter is contiguous in either format, but its strides tell; DDP's buckets go by them
    ordinary = torch.empty(tensor.shape, device="meta").stride() == tensor.stride()
    last = tensor.dim() == 4 and not ordinary and tensor.is_contiguous(memory_format=torch.channels_last)
    if IN_BLOCKS in keep:
        blocks = zip(tensor.chunk(len(keep[IN_BLOCKS])), keep[IN_BLOCKS])
        tensor = torch.cat([block.index_select(1, indices.to(tensor.device)) for block, indices in blocks])
    for dim, indices in keep.items():
        if isinstance(dim, int):
            tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.clone(memory_format=torch.channels_last) if last else tensor.contiguous()


def _silent_rows(modules: Mapping[str, nn.Module], plan: Plan) -> list[tuple[nn.Parameter, int, Tensor]]:
    """Return parameter, dimension and indices (after the cut) of what is silenced."""
    found = []
    for name, gone in plan.silenced.items():
        layer = layer_of(modules[name])
        assert layer is not None
        cut = plan.cuts.get((name, "out", None), plan.cuts.get((name, "both", None)))
        left = gone if cut is None else gone[~cut]
        for attribute, at in layer.writes:
            parameter = getattr(modules[name], attribute, None)
            if isinstance(parameter, nn.Parameter):
                found.append((parameter, at % parameter.dim(), left.nonzero().flatten().to(parameter.device)))
    return found


def _follow(
    model: nn.Module,
    plan: Plan,
    shapes: Mapping[str, torch.Size],
    optimizers: list[torch.optim.Optimizer],
    shards: Shards,
) -> None:
    """Slice gradients and optimizer state as the weights were, and silence what belongs to silent channels."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in plan.slices:
                continue
            held, keep = shards.held(parameter), plan.slices[name]
            gradient, held.grad = held.grad, None
            if held is parameter:
                # Inside optimizer.step() the last graph is still alive, and its gradient accumulator remembers the old
                # shape. It is made anew only when the dtype changes, so the parameter passes through an empty tensor.
                data = parameter.data
                detour = torch.float32 if data.dtype != torch.float32 else torch.float16
                parameter.data = torch.empty(0, dtype=detour, device=data.device)
                parameter.data = data
            else:
                shards.renew(parameter)
            if gradient is not None:
                held.grad = _changed(gradient, partial(_take, keep=keep))
            for state in (optimizer.state.get(held, {}) for optimizer in optimizers):
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.dim() > 0 and value.shape == shapes[name]:
                        state[key] = _changed(value, partial(_take, keep=keep))
        for parameter, at, rows in _silent_rows(dict(model.named_modules()), plan):
            for state in (optimizer.state.get(shards.held(parameter), {}) for optimizer in optimizers):
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        state[key] = _changed(value, partial(torch.index_fill, dim=at, index=rows, value=0.0))


def _changed(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what ``change`` makes of a tensor; a sharded one is gathered for it, and sharded alike."""
    return spread(change(whole(tensor)), tensor)


def _take_back(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


def _as_lists(masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}
