"""Shrink a model to its ticket: physically, in place, in any model, with the optimizer taken along.

The rule: *a channel is cut when, with the ticket's removed units silent, nothing but zeros would reach any layer that
reads it*. A removed unit is silent when its scale and shift (or its filter) are zero, and it takes every norm that it
alone feeds with it, unless the ticket names that norm itself. Where a removed channel cannot be cut (a residual sum
whose other branch still writes it, a grouped convolution that would become lopsided), it is silenced instead. So in
eval mode the shrunk model computes what the masked one computes, for every ticket. Group and layer norms are the
exception that has no way out: their statistics are taken over the channels that remain.

Groups of coupled channels come from torch-pruning's dependency graph. Which of them read only zeros is found by running
the model with every layer's output replaced: zeros where it is silent, random numbers elsewhere. The cut is then made,
its outputs are compared layer by layer with those of the masked model, and it is taken back if they differ.

What is saved: seconds, MACs, bytes, in training and inference alike. The parameters stay the same objects, so
optimizers, hooks and references of the user's loop go on working; momentum and every other optimizer state of a
parameter's shape is sliced with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from earlybird.calls import Call, as_call, undisturbed, unwrapped
from earlybird.errors import InputError, ShrinkError
from earlybird.tickets.coupling import Group, find_groups
from earlybird.tickets.layers import (
    BatchNorm,
    Conv,
    TransposedConv,
    is_depthwise,
    is_norm,
    layer_of,
    mixes_channels,
    set_width,
    width,
)
from earlybird.tickets.ticket import Ticket

# A key in place of a dimension: each block of a grouped convolution keeps its own inputs.
IN_BLOCKS = "in blocks"
Slices = dict[int | str, Tensor]
# Layer (or bare parameter) name, side, and for bare parameters the dimension.
CutKey = tuple[str, str, int | None]


@dataclass(frozen=True)
class Change:
    """What `shrink` did.

    Attributes:
        layers: Layer name to ``{'out': (before, after), 'in': (before, after)}``, for every layer that changed.
        silenced: Layer name to channels that the ticket removes but that could not be cut; their scale and shift
            (or filter) are zero. Indices are those of the layer before the cut.
        rounded: Layer name to channels that stayed only because of ``round_to``. Indices as in the ticket.
        kept: Layer name to the output channels that stayed, shape (n,), for every layer whose outputs changed.
        parameters_before: Number of weights before.
        parameters_after: Number of weights after.
        seconds: Measured wall time.
    """

    layers: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    silenced: Mapping[str, list[int]] = field(default_factory=dict)
    rounded: Mapping[str, list[int]] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    parameters_before: int = 0
    parameters_after: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters "
            f"({self.parameters_after / max(self.parameters_before, 1):.1%}) in {self.seconds:.2f} s"
        ]
        for name, sides in self.layers.items():
            lines.append(f"  {name}: " + ", ".join(f"{side} {old} -> {new}" for side, (old, new) in sides.items()))
        for title, rows in (("not cut, but silent", self.silenced), ("kept by rounding", self.rounded)):
            lines.extend(f"  {name}: {len(channels)} {title}" for name, channels in rows.items() if channels)
        return "\n".join(lines)


@dataclass(frozen=True)
class _Plan:
    cuts: dict[CutKey, Tensor]  # mask of channels that go
    slices: dict[str, Slices]  # parameter name to indices that stay
    silenced: dict[str, Tensor]  # layer name to mask of channels that stay, silent
    rounded: dict[str, Tensor]


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

    Args:
        model: Any module. Its parameters stay the same objects; their contents, gradients and buffers are sliced.
        ticket: Masks over output channels, by module name; `earlybird.draw` makes one.
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments the model can run on (a batch
            of one is enough); used to follow the graph, never trained on.
        optimizer: One or several optimizers over the model's parameters. Every state tensor of a parameter's shape
            is sliced like the parameter; scalars stay; any other shape is an error.
        round_to: Keep as many further channels as make each cut layer's width a multiple of this. What stayed
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
    model = unwrapped(model)
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise InputError(f"round_to is {round_to!r}", needed="a whole number of at least 1")
    optimizers = _as_optimizers(optimizer)
    removed = _check_ticket(ticket, model)
    before = sum(parameter.numel() for parameter in model.parameters())
    if not any(bool(mask.any()) for mask in removed.values()):
        return Change(parameters_before=before, parameters_after=before, seconds=time.perf_counter() - start)

    call = as_call(example_inputs)
    groups = find_groups(model, call) if groups is None else groups
    silent, carried = _probe(model, call, removed)
    plan = _plan(model, groups, removed, silent, carried, round_to, scores or {})
    _check_optimizers(model, plan.slices, optimizers)

    unheard = {
        name: gone & ~plan.rounded.get(name, torch.zeros_like(gone)) for name, gone in (removed | carried).items()
    }
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    exact = not any(
        isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and (name, "both", None) in plan.cuts
        for name, module in model.named_modules()
    )
    wanted = _outputs(model, call, unheard) if exact else None
    undo: list[Callable[[], None]] = []
    try:
        layers = _cut(model, plan, undo)
        kept = {name: _stay(cut) for (name, side, _), cut in plan.cuts.items() if side != "in"}
        _compare(model, call, wanted, kept)
        broken = _training_error(model, call)
        if broken is not None:
            _take_back(undo)
            if _training_error(model, call) is None:  # some models cannot train on a batch of one, cut or not
                raise ShrinkError(
                    f"{type(model).__name__} does not train after the cut: {type(broken).__name__}: {broken}",
                    needed="a ticket that leaves alone what feeds branches which only training enters",
                    hint="nothing was changed",
                ) from broken
            layers = _cut(model, plan, undo)
    except BaseException:
        _take_back(undo)
        raise
    _follow(model, plan, shapes, optimizers)
    after = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - start
    return Change(layers, _as_lists(plan.silenced), _as_lists(plan.rounded), kept, before, after, seconds)


def _as_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    if optimizer is None:
        return []
    found = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    for one in found:
        if not isinstance(one, torch.optim.Optimizer):
            raise InputError(f"optimizer is a {type(one).__name__}", needed="a torch.optim.Optimizer, or several")
    return found


def _check_ticket(ticket: Ticket, model: nn.Module) -> dict[str, Tensor]:
    """Return the mask of removed channels of each layer that the ticket names."""
    if not isinstance(ticket, Ticket):
        raise InputError(f"ticket is a {type(ticket).__name__}", needed="an earlybird.Ticket")
    modules = dict(model.named_modules())
    removed = {}
    for name, mask in ticket.masks.items():
        if name not in modules:
            raise InputError(
                f"the ticket names layer '{name}', which the model does not have", hint="use the ticket's own model"
            )
        if ticket.kinds[name] != "channel":
            raise InputError(f"units of '{name}' are of kind '{ticket.kinds[name]}'", needed="kind 'channel'")
        channels = width(modules[name])
        if channels is None:
            raise InputError(f"layer '{name}' ({type(modules[name]).__name__}) has no output channels to mask")
        if channels != mask.numel():
            raise InputError(f"the ticket has {mask.numel()} channels for layer '{name}', the model {channels}")
        removed[name] = ~mask
    return removed


# ---- what is silent ----


def _tensor_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _channel_dim(module: nn.Module, value: Tensor) -> int:
    layer = layer_of(module)
    assert layer is not None
    return layer.channel_dim % value.dim()


def _is_zero(module: nn.Module, value: Tensor) -> Tensor:
    """Return which channels of a layer's input are zero throughout, shape (channels,)."""
    return value.detach().movedim(_channel_dim(module, value), 0).flatten(1).abs().amax(1) == 0


def _probe(model: nn.Module, call: Call, removed: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Find what only ever sees zeros when the ticket's removed units are silent.

    Every layer's output is replaced: by zeros where it is silent, by random numbers elsewhere. They are of one sign, so
    that no difference of two cancels, and the run is made with either sign, so that no ReLU hides a live channel.

    Returns:
        For each layer that reads channels, the mask of inputs that are always zero; and for each norm that the ticket
        does not name, the mask of channels that only removed units feed. Shapes (channels,).
    """
    silent: dict[str, Tensor] = {}
    carried: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    sign = 1.0

    def read(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        zero = _is_zero(module, _tensor_of(args, kwargs)).cpu()
        silent[name] = silent.get(name, torch.ones_like(zero)) & zero

    def write(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        dim = _channel_dim(module, output)
        live = sign * (torch.rand(output.shape[dim], generator=generator).to(output) + 0.5)
        if name in removed:
            live = live.masked_fill(removed[name].to(output.device), 0.0)
        elif _passes_silence(module):
            nothing = _is_zero(module, _tensor_of(args, kwargs))
            live = live.masked_fill(nothing, 0.0)
            if is_norm(module):
                carried[name] = carried.get(name, torch.ones_like(nothing).cpu()) & nothing.cpu()
        return live.view([-1 if d == dim else 1 for d in range(output.dim())]).expand_as(output).clone()

    for sign in (1.0, -1.0):  # noqa: B007  # read by `write`
        with undisturbed(model), torch.no_grad():
            for name, module in model.named_modules():
                if mixes_channels(module):
                    module.register_forward_pre_hook(partial(read, name), with_kwargs=True)
                if isinstance(module, (Conv, nn.Linear)) or is_norm(module):
                    module.register_forward_hook(partial(write, name), with_kwargs=True)
            _run(model, call, "with its channels probed")
    return silent, {name: mask for name, mask in carried.items() if mask.any()}


def _passes_silence(module: nn.Module) -> bool:
    """Whether a channel that is zero throughout leaves the layer as zero, or can be made to by zero scale and shift."""
    if isinstance(module, BatchNorm):
        return module.weight is not None
    return is_norm(module) or (is_depthwise(module) and module.bias is None)


def _run(model: nn.Module, call: Call, how: str) -> Any:
    try:
        return model(*call.args, **call.kwargs)
    except Exception as error:
        raise ShrinkError(
            f"{type(model).__name__} does not run {how}: {type(error).__name__}: {error}", hint="nothing was changed"
        ) from error


# ---- what is cut ----


def _plan(
    model: nn.Module,
    groups: list[Group],
    removed: Mapping[str, Tensor],
    silent: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
    round_to: int,
    scores: Mapping[str, Tensor],
) -> _Plan:
    """Decide, group by group, which channels go, and translate that into slices of parameters."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    cuts: dict[CutKey, Tensor] = {}
    rounded: dict[str, Tensor] = {}
    for group in groups:
        asked = torch.zeros(group.size, dtype=torch.bool)
        unread = torch.ones(group.size, dtype=torch.bool)
        for member in group.members:
            if member.name in removed and member.side != "in":
                asked[member.root[removed[member.name][member.local]]] = True
            elif member.side == "in":
                zero = silent.get(member.name)
                unread[member.root if zero is None else member.root[~zero[member.local]]] = False
        if not asked.any():
            continue
        if group.output:
            names = [m.name for m in group.members if m.name in removed and m.side != "in"]
            raise ShrinkError(
                f"the ticket removes channels of layer '{names[0]}' that no layer is seen to read: outputs of the "
                "model itself, or read by a function that the graph cannot follow",
                needed="a ticket over hidden layers", hint="leave that layer out of the ticket; nothing was changed",
            )  # fmt: skip
        exact = cut = asked & unread
        if cut.any():
            worth = _worth(group, modules, scores)
            exact = cut = _balance(cut, group, worth)
            if cut.all():
                raise InputError(
                    f"the ticket removes every channel of layer '{group.producers[0]}'",
                    needed="at least one channel in each layer", hint="earlybird.draw keeps one; nothing was changed",
                )  # fmt: skip
            cut = _round(cut, group, worth, round_to)
        for member in group.members:
            if member.name in removed and member.side != "in":
                stayed = torch.zeros_like(removed[member.name])
                stayed[member.local] = (exact & ~cut)[member.root] & removed[member.name][member.local]
                rounded[member.name] = rounded.get(member.name, torch.zeros_like(stayed)) | stayed
            if cut.any():
                key = (member.name, member.side, member.dim)
                if key not in cuts:
                    cuts[key] = torch.zeros(_extent(key, modules, parameters), dtype=torch.bool)
                cuts[key][member.local] |= cut[member.root]
    rounded = {name: mask for name, mask in rounded.items() if mask.any()}
    silenced = {}
    for name, gone in (dict(removed) | dict(carried)).items():
        nothing = torch.zeros_like(gone)
        gone = gone & ~cuts.get((name, "out", None), nothing) & ~cuts.get((name, "both", None), nothing)
        gone &= ~rounded.get(name, nothing)
        if gone.any():
            silenced[name] = gone
    if rounded:  # a norm that the ticket does not name lives on with the rounded channels that feed it
        alive = {n: m for n, m in silenced.items() if n in removed}
        silenced = alive | {n: m for n, m in silenced.items() if n not in removed and not _fed_by(n, rounded, groups)}
    return _Plan(cuts, _plan_slices(cuts, model, modules, parameters), silenced, rounded)


def _fed_by(norm: str, rounded: Mapping[str, Tensor], groups: list[Group]) -> bool:
    return any({norm} & names and names & rounded.keys() for names in ({m.name for m in g.members} for g in groups))


def _extent(key: CutKey, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor]) -> int:
    """Return the number of channels of a layer (or bare parameter) on one side."""
    name, side, dim = key
    if dim is not None:
        return parameters[name].shape[dim]
    found = width(modules[name], side)  # type: ignore[arg-type]
    if found is None:
        raise ShrinkError(
            f"layer '{name}' ({type(modules[name]).__name__}) is tied to channels the ticket removes and cannot be cut",
            hint="leave the layers around it out of the ticket; nothing was changed",
        )
    return found


def _worth(group: Group, modules: Mapping[str, nn.Module], scores: Mapping[str, Tensor]) -> Tensor:
    """Return what each channel of a group is worth when some must stay anyway: its score, else its norm's scale."""
    worth = torch.zeros(group.size)
    scored = [member for member in group.members if member.name in scores and member.side != "in"]
    for member in scored:
        worth.index_add_(0, member.root, scores[member.name].detach().float().cpu()[member.local])
    for member in () if scored else group.members:
        weight = getattr(modules.get(member.name), "weight", None)
        if member.side == "in" or not isinstance(weight, Tensor):
            continue
        weight = weight.detach().float().cpu()
        if isinstance(modules[member.name], TransposedConv):
            weight = weight.transpose(0, 1)
        value = weight.abs() if weight.dim() == 1 else 1e-6 * weight.flatten(1).norm(dim=1)
        if value.numel() > int(member.local.max()):
            worth.index_add_(0, member.root, value[member.local])
    return worth


def _balance(cut: Tensor, group: Group, worth: Tensor) -> Tensor:
    """Give back channels until grouped convolutions and group norms keep equally many in each of their blocks."""
    cut = cut.clone()
    changed = True
    while changed:
        changed = False
        for block in group.blocks:
            kept = [int((~cut & (block == b)).sum()) for b in range(int(block.max()) + 1)]
            for b, count in enumerate(kept):
                if max(kept) > count:
                    _give_back(cut, block == b, max(kept) - count, worth)
                    changed = True
    return cut


def _round(cut: Tensor, group: Group, worth: Tensor, round_to: int) -> Tensor:
    """Give back channels until the width is a multiple of ``round_to``, or whole."""
    cut = cut.clone()
    while cut.any() and int((~cut).sum()) % round_to:
        missing = -int((~cut).sum()) % round_to
        _give_back(cut, torch.ones_like(cut), 1 if group.blocks else missing, worth)
        cut = _balance(cut, group, worth)
    return cut


def _give_back(cut: Tensor, among: Tensor, count: int, worth: Tensor) -> None:
    candidates = (cut & among).nonzero().flatten()
    best = candidates[worth[candidates].argsort(descending=True, stable=True)[:count]]
    cut[best] = False


def _plan_slices(
    cuts: Mapping[CutKey, Tensor],
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, Tensor],
) -> dict[str, Slices]:
    """Translate cut channels into indices that stay: parameter name to ``{dimension: indices}``."""
    slices: dict[str, Slices] = {}
    for (name, side, dim), cut in cuts.items():
        if dim is not None:
            slices.setdefault(name, {})[dim] = _stay(cut)
            continue
        module = modules[name]
        layer = layer_of(module)
        assert layer is not None  # _extent has refused other types
        if isinstance(module, TransposedConv) and module.groups > 1 and not is_depthwise(module):
            raise ShrinkError(
                f"layer '{name}' is a grouped transposed convolution, which cannot be cut; nothing was changed"
            )
        in_blocks = isinstance(module, Conv) and side == "in" and module.groups > 1
        for attribute, at in layer.reads if side == "in" and not layer.joint else layer.writes:
            parameter = getattr(module, attribute, None)
            if parameter is None or (isinstance(module, nn.PReLU) and parameter.numel() == 1):
                continue
            path = f"{name}.{attribute}" if name else attribute
            if path not in parameters:
                raise ShrinkError(
                    f"weight '{path}' is computed from other parameters (a reparametrisation), and cannot be sliced",
                    hint="remove it first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
                    "prune.remove, ...); nothing was changed",
                )
            key: int | str = IN_BLOCKS if in_blocks else at % parameter.dim()
            slices.setdefault(path, {})[key] = _stay_in_blocks(cut, module) if in_blocks else _stay(cut)
    _check_shared(slices, model)
    return slices


def _stay(cut: Tensor) -> Tensor:
    return (~cut).nonzero().flatten()


def _stay_in_blocks(cut: Tensor, module: nn.Module) -> Tensor:
    """Return the inputs that stay in each block of a grouped convolution, shape (groups, n)."""
    per_block = cut.view(int(module.groups), -1)  # type: ignore[arg-type]
    return torch.stack([_stay(block) for block in per_block])


def _check_shared(slices: dict[str, Slices], model: nn.Module) -> None:
    """Make sure that one tensor under several names is asked for one and the same cut."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        plans = [slices.get(name, {}) for name in shared]
        for plan in plans[1:]:
            if plan.keys() != plans[0].keys() or any(not torch.equal(plan[dim], plans[0][dim]) for dim in plan):
                raise ShrinkError(
                    f"layers share the weight '{shared[0]}' = '{shared[1]}', but the ticket cuts them differently",
                    hint="leave these layers out of the ticket; nothing was changed",
                )
        for name in shared[1:]:
            slices.pop(name, None)


def _check_optimizers(model: nn.Module, slices: Mapping[str, Slices], optimizers: list[torch.optim.Optimizer]) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        whole = not any(id(p) in names and names[id(p)] in slices for g in optimizer.param_groups for p in g["params"])
        for parameter, state in () if whole else optimizer.state.items():
            for key, value in state.items():
                several = isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value)
                if several or (isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape):
                    shown = "several tensors" if several else f"shape {tuple(value.shape)}"
                    raise ShrinkError(
                        f"{type(optimizer).__name__} keeps state '{key}' of {shown} for "
                        f"'{names.get(id(parameter), 'a parameter')}'",
                        needed=f"the parameter's shape {tuple(parameter.shape)} or a scalar",
                        hint="shrink before its first step, or use another optimizer; nothing was changed",
                    )


# ---- the cut ----


def _cut(model: nn.Module, plan: _Plan, undo: list[Callable[[], None]]) -> dict[str, dict[str, tuple[int, int]]]:
    """Cut weights, buffers and sizes; what would take each step back is appended to ``undo``."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if name in plan.slices:
            undo.append(partial(setattr, parameter, "data", parameter.data))
            parameter.data = _take(parameter.data, plan.slices[name])
    for parameter, at, rows in _silent_rows(modules, plan):
        undo.append(partial(setattr, parameter, "data", parameter.data))
        parameter.data = parameter.data.index_fill(at, rows, 0.0)
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
        set_width(module, side, after)  # type: ignore[arg-type]
        for buffer in layer.buffers:
            value = getattr(module, buffer)
            if value is not None:
                undo.append(partial(setattr, module, buffer, value))
                setattr(module, buffer, value.index_select(0, _stay(cut).to(value.device)))
    return layers


def _take(tensor: Tensor, keep: Slices) -> Tensor:
    """Slice along several dimensions; the memory format of images (channels last) survives."""
    last = tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    if IN_BLOCKS in keep:
        blocks = zip(tensor.chunk(len(keep[IN_BLOCKS])), keep[IN_BLOCKS])
        tensor = torch.cat([block.index_select(1, indices.to(tensor.device)) for block, indices in blocks])
    for dim, indices in keep.items():
        if isinstance(dim, int):
            tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor.contiguous()


def _silent_rows(modules: Mapping[str, nn.Module], plan: _Plan) -> list[tuple[nn.Parameter, int, Tensor]]:
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
    model: nn.Module, plan: _Plan, shapes: Mapping[str, torch.Size], optimizers: list[torch.optim.Optimizer]
) -> None:
    """Slice gradients and optimizer state as the weights were, and silence what belongs to silent channels."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in plan.slices:
                continue
            gradient, parameter.grad = parameter.grad, None
            # Inside optimizer.step() the last graph is still alive, and its gradient accumulator remembers the old
            # shape. It is made anew only when the dtype changes, so the parameter passes through an empty tensor.
            data = parameter.data
            detour = torch.float64 if data.dtype != torch.float64 else torch.float32
            parameter.data = torch.empty(0, dtype=detour, device=data.device)
            parameter.data = data
            if gradient is not None:
                parameter.grad = _take(gradient, plan.slices[name])
            for state in (optimizer.state.get(parameter, {}) for optimizer in optimizers):
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.dim() > 0 and value.shape == shapes[name]:
                        state[key] = _take(value, plan.slices[name])
        for parameter, at, rows in _silent_rows(dict(model.named_modules()), plan):
            for state in (optimizer.state.get(parameter, {}) for optimizer in optimizers):
                for value in state.values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        value.index_fill_(at, rows, 0.0)


# ---- the proof ----


def _outputs(model: nn.Module, call: Call, unheard: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Run the model, with the channels in ``unheard`` silent, and return each layer's outputs in the order they run."""
    found: list[tuple[str, Tensor]] = []

    def silence(module: nn.Module, args: Any, output: Tensor, gone: Tensor) -> Tensor:
        dim = _channel_dim(module, output)
        return output.masked_fill(
            gone.to(output.device).view([-1 if d == dim else 1 for d in range(output.dim())]), 0.0
        )

    def note(module: nn.Module, args: Any, output: Tensor, name: str) -> None:
        found.append((name, output))

    with undisturbed(model), torch.no_grad():
        for name, module in model.named_modules():
            if name in unheard:
                module.register_forward_hook(partial(silence, gone=unheard[name]))
            if mixes_channels(module):
                module.register_forward_hook(partial(note, name=name))
        output = _run(model, call, "with its channels silenced")
    return found + [("", tensor) for tensor in _tensors(output)]


def _compare(model: nn.Module, call: Call, wanted: list[tuple[str, Tensor]] | None, kept: Mapping[str, Tensor]) -> None:
    """Run the cut model and raise, naming the layer, where it breaks or its outputs differ from the masked model's."""
    last = ""

    def enter(name: str) -> None:
        nonlocal last
        last = name

    found: list[tuple[str, Tensor]] = []
    noted = {
        name for name, _ in wanted or () if name
    }  # a grouped convolution may have become a depthwise one by the cut
    with undisturbed(model), torch.no_grad():
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_pre_hook(lambda m, i, name=name: enter(name))
            if name in noted:
                module.register_forward_hook(lambda m, i, o, name=name: found.append((name, o)))
        try:
            output = model(*call.args, **call.kwargs)
        except Exception as error:
            raise ShrinkError(
                f"{type(model).__name__} does not run after the cut: layer '{last}': {type(error).__name__}: {error}",
                hint=f"leave the layers that feed '{last}' out of the ticket; nothing was changed",
            ) from error
    if wanted is None:  # group and layer norms take their statistics over what remains: the outputs must differ
        return
    found += [("", tensor) for tensor in _tensors(output)]
    modules = dict(model.named_modules())
    before = "the input"
    for (name, value), (other, reference) in zip(found, wanted, strict=True):
        if name in kept:
            reference = reference.index_select(_channel_dim(modules[name], reference), kept[name].to(reference.device))
        if name != other or value.shape != reference.shape or not _close(value, reference):
            where = f"layer '{name}'" if name else "the output"
            raise ShrinkError(
                f"after the cut, {where} of {type(model).__name__} would compute something else than with its channels "
                f"masked: an operation between {before} and {where} mixes channels in a way the graph does not show "
                "(padding or a mean over channels, softmax, local response norm, ...)",
                hint="leave the layers that feed it out of the ticket; nothing was changed",
            )
        before = f"layer '{name}'"


def _close(value: Tensor, reference: Tensor) -> bool:
    if not value.is_floating_point() or not torch.isfinite(reference).all():
        return True  # labels and overflows prove nothing
    loose = value.dtype in (torch.float16, torch.bfloat16)
    bound = (5e-2 if loose else 1e-3) * reference.abs().max() + 1e-6
    return bool((value - reference).abs().max() <= bound) if value.numel() else True


def _training_error(model: nn.Module, call: Call) -> Exception | None:
    """Run the model in training mode, for branches that only training enters, and return what it raised."""
    with undisturbed(model), torch.no_grad():
        model.train()
        try:
            model(*call.args, **call.kwargs)
        except Exception as error:
            return error
    return None


def _take_back(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _as_lists(masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}
