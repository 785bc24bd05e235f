"""Shrink a model to its ticket: physically, in place, in any model, with the optimizer taken along.

The rule: *a channel is cut when, with the ticket's removed units silent, nothing but zeros would reach any layer that
reads it*. Where a removed channel cannot be cut (a residual sum whose other branch still writes it, a grouped
convolution that would become lopsided, rounding), its scale and shift are set to zero instead. So in eval mode the
shrunk model computes what the masked one computes, for every ticket. (Group and layer norms are the exception that
has no way out: their statistics are taken over the channels that remain.)

Groups of coupled channels come from torch-pruning's dependency graph; which of them read only zeros is found by one
forward pass in which every layer's output is replaced by positive numbers, or zeros where it is silent. The plan is
tried out on a weightless copy (device ``meta``) before the first weight is touched.

What is saved: seconds, MACs, bytes, in training and inference alike. The parameters stay the same objects, so
optimizers, hooks and references of the user's loop go on working; momentum and every other optimizer state of a
parameter's shape is sliced with it.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from earlybird.errors import InputError, ShrinkError
from earlybird.tickets.coupling import (
    BatchNorm,
    ConvNd,
    ConvTransposeNd,
    Group,
    as_arguments,
    find_groups,
    is_depthwise,
    undisturbed,
)
from earlybird.tickets.ticket import Ticket

# A key in place of a dimension: each block of a grouped convolution keeps its own inputs.
IN_BLOCKS = -1


@dataclass(frozen=True)
class Change:
    """What `shrink` did.

    Attributes:
        layers: Layer name to ``{'out': (before, after), 'in': (before, after)}``, for every layer that changed.
        silenced: Layer name to channels that the ticket removes but that could not be cut; their scale and shift
            (or filter) are zero. Indices are those of the ticket.
        rounded: Layer name to channels that stayed only because of ``round_to``. Indices are those of the ticket.
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


def shrink(
    model: nn.Module,
    ticket: Ticket,
    example_inputs: Any,
    *,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    round_to: int = 1,
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
        groups: The model's groups from `find_groups`, where they are already at hand.

    Returns:
        What changed.

    Raises:
        InputError: The ticket does not belong to this model, or would remove every channel of a layer.
        ShrinkError: Some layer cannot be cut. The message names it. Nothing was changed.
    """
    start = time.perf_counter()
    modules = dict(model.named_modules())
    removed = _check_ticket(ticket, modules)
    if round_to < 1:
        raise InputError(f"round_to is {round_to}", needed="a whole number of at least 1")
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or ())
    before = sum(parameter.numel() for parameter in model.parameters())
    if not any(bool(mask.any()) for mask in removed.values()):
        return Change(parameters_before=before, parameters_after=before, seconds=time.perf_counter() - start)

    groups = find_groups(model, example_inputs) if groups is None else groups
    silent = _silent_inputs(model, example_inputs, removed)
    cuts, rounded = _plan_cuts(groups, modules, removed, silent, round_to)
    silenced = _leftovers(removed, cuts, rounded)
    slices = _plan_slices(cuts, model, modules)
    _check_optimizers(model, slices, optimizers)
    _try_out(model, example_inputs, cuts, slices)

    with torch.no_grad():
        _silence(modules, silenced, optimizers)
        for name, parameter in list(model.named_parameters()):
            if name in slices:
                slice_parameter(parameter, slices[name], optimizers)
        layers = _slice_modules(model, cuts)
    after = sum(parameter.numel() for parameter in model.parameters())
    kept = {name: (~cut).nonzero().flatten() for (name, side, _), cut in cuts.items() if side != "in"}
    return Change(layers, _as_lists(silenced), _as_lists(rounded), kept, before, after, time.perf_counter() - start)


def slice_parameter(
    parameter: nn.Parameter, keep: Mapping[int, Tensor], optimizers: Iterable[torch.optim.Optimizer] = ()
) -> None:
    """Slice a parameter, its gradient and its optimizer state in place; the parameter stays the same object.

    Args:
        parameter: Of any shape.
        keep: Dimension to the indices that stay, each of shape (n,), ascending; or `IN_BLOCKS` to shape (groups, n).
        optimizers: Optimizers that may hold state for it.
    """
    shape = parameter.shape
    data, gradient = _take(parameter.data, keep), parameter.grad
    parameter.grad = None
    # Inside optimizer.step() the last graph is still alive, and the gradient accumulator in it remembers the old shape.
    # It is made anew only when the dtype changes, so the parameter passes through an empty tensor of another one.
    detour = torch.float64 if data.dtype != torch.float64 else torch.float32
    parameter.data = torch.empty(0, dtype=detour, device=data.device)
    parameter.data = data
    if gradient is not None:
        parameter.grad = _take(gradient, keep)
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == shape and value.dim() > 0:
                state[key] = _take(value, keep)


def _take(tensor: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """Slice along several dimensions; the memory format of images (channels last) survives."""
    last = tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    if IN_BLOCKS in keep:
        blocks = zip(tensor.chunk(len(keep[IN_BLOCKS])), keep[IN_BLOCKS])
        tensor = torch.cat([block.index_select(1, indices.to(tensor.device)) for block, indices in blocks])
    for dim, indices in keep.items():
        if dim != IN_BLOCKS:
            tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor.contiguous()


def _check_ticket(ticket: Ticket, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    removed = {}
    for name, mask in ticket.masks.items():
        if name not in modules:
            raise InputError(
                f"the ticket names layer '{name}', which the model does not have", hint="use the ticket's own model"
            )
        if ticket.kinds[name] != "channel":
            raise InputError(f"units of '{name}' are of kind '{ticket.kinds[name]}'", needed="kind 'channel'")
        width = out_channels(modules[name])
        if width is None:
            raise InputError(f"layer '{name}' ({type(modules[name]).__name__}) has no output channels to mask")
        if width != mask.numel():
            raise InputError(f"the ticket has {mask.numel()} channels for layer '{name}', the model {width}")
        removed[name] = ~mask
    return removed


def out_channels(module: nn.Module) -> int | None:
    """Return the number of channels a layer writes, or None for a layer without."""
    if isinstance(module, ConvNd):
        return module.out_channels
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, BatchNorm):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    return None


def _silent_inputs(model: nn.Module, example_inputs: Any, removed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the channels that each reading layer can only ever see as zeros: layer name to mask ``(in_channels,)``.

    Every layer's output is replaced: by zeros where the ticket silences it (or where a norm or depthwise layer gets
    nothing but zeros), by random positive numbers elsewhere. Positive, so that no ReLU hides a live channel; random,
    so that no difference of two cancels.
    """
    silent: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def read(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        value = inputs[0]
        dim = value.dim() - 1 if isinstance(module, nn.Linear) else 1
        zero = value.detach().movedim(dim, 0).flatten(1).abs().amax(1) == 0
        silent[name] = silent.get(name, torch.ones_like(zero)) & zero

    def write(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        dim = output.dim() - 1 if isinstance(module, (nn.Linear, nn.LayerNorm)) else 1
        width = output.shape[dim]
        live = torch.rand(width, generator=generator).to(output) + 0.5
        if name in removed:
            live = live.masked_fill(removed[name].to(output.device), 0.0)
        elif isinstance(module, (BatchNorm, nn.GroupNorm, nn.LayerNorm)) or (
            is_depthwise(module) and module.bias is None
        ):
            nothing = inputs[0].detach().movedim(dim, 0).flatten(1).abs().amax(1) == 0
            live = live.masked_fill(nothing, 0.0)
        return live.view([-1 if d == dim else 1 for d in range(output.dim())]).expand_as(output).clone()

    with undisturbed(model), torch.no_grad():
        handles = []
        for name, module in model.named_modules():
            if isinstance(module, (ConvNd, nn.Linear)):
                handles.append(module.register_forward_pre_hook(lambda m, i, name=name: read(name, m, i)))
            if isinstance(module, (ConvNd, nn.Linear, BatchNorm, nn.GroupNorm, nn.LayerNorm)):
                handles.append(module.register_forward_hook(lambda m, i, o, name=name: write(name, m, i, o)))
        try:
            args, kwargs = as_arguments(example_inputs)
            model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return {name: mask.cpu() for name, mask in silent.items()}


def _plan_cuts(
    groups: list[Group],
    modules: Mapping[str, nn.Module],
    removed: Mapping[str, Tensor],
    silent: Mapping[str, Tensor],
    round_to: int,
) -> tuple[dict[tuple[str, str, int], Tensor], dict[str, Tensor]]:
    """Decide, group by group, which channels go: ``(name, side, dim)`` to mask, and what rounding kept."""
    cuts: dict[tuple[str, str, int], Tensor] = {}
    rounded: dict[str, Tensor] = {}
    for group in groups:
        asked = torch.zeros(group.size, dtype=torch.bool)
        unread = torch.ones(group.size, dtype=torch.bool)
        for member in group.members:
            if member.name in removed and member.side != "in":
                asked[member.root[removed[member.name][member.local]]] = True
            elif member.side == "in":
                alive = ~silent.get(member.name, torch.zeros(0, dtype=torch.bool))
                if alive.numel() > int(member.local.max()):
                    unread[member.root[alive[member.local]]] = False
                else:
                    unread[:] = False
        if not asked.any():
            continue
        if group.output:
            names = [m.name for m in group.members if m.name in removed and m.side != "in"]
            raise ShrinkError(
                f"the ticket removes outputs of the model itself, written by layer '{names[0]}'",
                needed="a ticket over hidden layers", hint="leave that layer out of the ticket; nothing was changed",
            )  # fmt: skip
        cut = asked & unread
        worth = _worth(group, modules)
        cut = _balance(cut, group, worth)
        if cut.all():
            raise InputError(
                f"the ticket removes every channel of layer '{group.producers[0]}'",
                needed="at least one channel in each layer", hint="earlybird.draw keeps one; nothing was changed",
            )  # fmt: skip
        if round_to > 1:
            exact = cut
            cut = _round(cut, group, worth, round_to)
            for member in group.members:
                if member.name in removed and member.side != "in":
                    stayed = torch.zeros_like(removed[member.name])
                    stayed[member.local] = (exact & ~cut)[member.root] & removed[member.name][member.local]
                    rounded[member.name] = rounded.get(member.name, torch.zeros_like(stayed)) | stayed
        if not cut.any():
            continue
        for member in group.members:
            key = (member.name, member.side, member.dim)
            if key not in cuts:
                cuts[key] = torch.zeros(_extent(member.name, member.side, member.dim, modules), dtype=torch.bool)
            cuts[key][member.local] |= cut[member.root]
    return cuts, {name: mask for name, mask in rounded.items() if mask.any()}


def _extent(name: str, side: str, dim: int, modules: Mapping[str, nn.Module]) -> int:
    """Return the number of channels of a layer (or bare parameter) on one side."""
    if dim >= 0 or name not in modules:
        owner, _, attribute = name.rpartition(".")
        parameter: Tensor = getattr(modules[owner], attribute)
        return parameter.shape[dim]
    module = modules[name]
    if side == "in":
        assert isinstance(module, (ConvNd, nn.Linear))
        return module.in_channels if isinstance(module, ConvNd) else module.in_features
    width = out_channels(module)
    if width is None and isinstance(module, nn.PReLU):
        width = module.num_parameters
    if width is None and isinstance(module, nn.Embedding):
        width = module.embedding_dim
    if width is None:
        raise ShrinkError(
            f"layer '{name}' ({type(module).__name__}) is tied to channels the ticket removes, and it cannot be cut",
            hint="leave the layers around it out of the ticket; nothing was changed",
        )
    return width


def _worth(group: Group, modules: Mapping[str, nn.Module]) -> Tensor:
    """Return what each channel of a group is worth when some must stay anyway: its norm's scale, else its filter."""
    worth = torch.zeros(group.size)
    for member in group.members:
        module = modules.get(member.name)
        if member.side == "in" or module is None or not isinstance(getattr(module, "weight", None), Tensor):
            continue
        weight: Tensor = module.weight.detach().float().cpu()  # type: ignore[operator]
        if isinstance(module, ConvTransposeNd):
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


def _leftovers(
    removed: Mapping[str, Tensor], cuts: Mapping[tuple[str, str, int], Tensor], rounded: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the channels that the ticket removes, that are not cut, and that rounding did not ask to keep alive."""
    left = {}
    for name, gone in removed.items():
        cut = torch.zeros_like(gone)
        for side in ("out", "both"):
            cut |= cuts.get((name, side, -1), torch.zeros_like(gone))
        remaining = gone & ~cut & ~rounded.get(name, torch.zeros_like(gone))
        if remaining.any():
            left[name] = remaining
    return left


def _plan_slices(
    cuts: Mapping[tuple[str, str, int], Tensor], model: nn.Module, modules: Mapping[str, nn.Module]
) -> dict[str, dict[int, Tensor]]:
    """Translate cut channels into indices that stay: parameter name to ``{dimension: indices}``."""
    slices: dict[str, dict[int, Tensor]] = {}

    def keep(owner: str, attribute: str, dim: int, indices: Tensor) -> None:
        name = f"{owner}.{attribute}" if owner else attribute
        slices.setdefault(name, {})[dim] = indices

    for (name, side, dim), cut in cuts.items():
        stay = (~cut).nonzero().flatten()
        module = modules.get(name)
        if dim >= 0 or module is None:
            slices.setdefault(name, {})[dim] = stay
            continue
        if getattr(module, "parametrizations", None) or hasattr(module, "weight_g"):
            raise ShrinkError(
                f"layer '{name}' has a reparametrised weight, which cannot be sliced",
                hint="remove the parametrisation first (torch.nn.utils.parametrize); nothing was changed",
            )
        if isinstance(module, ConvNd):
            _keep_convolution(keep, name, module, side, stay)
        elif isinstance(module, nn.Linear):
            keep(name, "weight", 0 if side == "out" else 1, stay)
            if side == "out" and module.bias is not None:
                keep(name, "bias", 0, stay)
        elif isinstance(module, (BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.PReLU)):
            for attribute in ("weight", "bias"):
                parameter = getattr(module, attribute, None)
                if parameter is not None and parameter.shape[-1] == cut.numel():
                    keep(name, attribute, parameter.dim() - 1, stay)
        elif isinstance(module, nn.Embedding):
            keep(name, "weight", 1, stay)
    _check_shared(slices, model)
    return slices


def _keep_convolution(
    keep: Callable[[str, str, int, Tensor], None], name: str, module: ConvNd, side: str, stay: Tensor
) -> None:
    transposed = isinstance(module, ConvTransposeNd)
    if side in ("out", "both"):
        if transposed and module.groups > 1 and side == "out":
            raise ShrinkError(
                f"layer '{name}' is a grouped transposed convolution, which cannot be cut; nothing was changed"
            )
        keep(name, "weight", 1 if transposed and side == "out" else 0, stay)
        if module.bias is not None:
            keep(name, "bias", 0, stay)
    elif module.groups == 1:
        keep(name, "weight", 0 if transposed else 1, stay)
    else:
        if transposed:
            raise ShrinkError(
                f"layer '{name}' is a grouped transposed convolution, which cannot be cut; nothing was changed"
            )
        # Each block of filters reads its own block of inputs, and each block may keep other ones of them.
        width = module.in_channels // module.groups
        kept = [stay[(stay // width) == block] % width for block in range(module.groups)]
        keep(name, "weight", IN_BLOCKS, torch.stack(kept))  # (groups, inputs kept in a block)


def _check_shared(slices: dict[str, dict[int, Tensor]], model: nn.Module) -> None:
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


def _check_optimizers(model: nn.Module, slices: Mapping[str, Any], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    for name, parameter in model.named_parameters():
        for optimizer in optimizers if name in slices else ():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                    raise ShrinkError(
                        f"{type(optimizer).__name__} keeps state '{key}' of shape {tuple(value.shape)} for '{name}'",
                        needed=f"the parameter's shape {tuple(parameter.shape)} or a scalar",
                        hint="shrink before its first step, or use another optimizer; nothing was changed",
                    )


def _try_out(
    model: nn.Module, example_inputs: Any, cuts: Mapping[tuple[str, str, int], Tensor], slices: Mapping[str, Any]
) -> None:
    """Carry the plan out on a copy without weights and run it, so that what breaks does so before the real model."""
    args, kwargs = as_arguments(example_inputs)
    last = ""

    def run(trial: nn.Module, move: Callable[[Any], Any]) -> None:
        nonlocal last
        for name, module in trial.named_modules():
            if not list(module.children()):
                module.register_forward_pre_hook(lambda m, i, name=name: enter(name))
        trial.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial(*[move(value) for value in args], **{key: move(value) for key, value in kwargs.items()})

    def enter(name: str) -> None:
        nonlocal last
        last = name

    def to_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    move: Callable[[Any], Any] = to_meta

    try:
        trial = _copy_without_hooks(model, weightless=True)
        run(trial, move)
    except Exception:
        # Some models cannot run without values (a tensor made in forward, a branch on data): try with values.
        try:
            trial, move = _copy_without_hooks(model, weightless=False), copy.deepcopy
        except Exception as error:
            warnings.warn(
                f"{type(model).__name__} cannot be copied ({error}), so the cut is not tried out beforehand",
                stacklevel=3,
            )
            return
    try:
        with torch.no_grad():
            for name, parameter in list(trial.named_parameters()):
                if name in slices:
                    slice_parameter(parameter, {d: i.to(parameter.device) for d, i in slices[name].items()})
            _slice_modules(trial, cuts)
        run(trial, move)
    except Exception as error:
        raise ShrinkError(
            f"{type(model).__name__} does not run after the cut: layer '{last}': {type(error).__name__}: {error}",
            hint=f"leave the layers that feed '{last}' out of the ticket; nothing was changed",
        ) from error


def _copy_without_hooks(model: nn.Module, *, weightless: bool) -> nn.Module:
    memo: dict[int, Any] = {}
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            memo[id(hooks)] = OrderedDict()
    if weightless:
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def _silence(
    modules: Mapping[str, nn.Module], silenced: Mapping[str, Tensor], optimizers: Iterable[torch.optim.Optimizer]
) -> None:
    """Zero scale and shift (or filter and bias) of removed channels that stay, and the optimizer's memory of them."""
    for name, gone in silenced.items():
        for attribute in ("weight", "bias"):
            parameter = getattr(modules[name], attribute, None)
            if not isinstance(parameter, nn.Parameter):
                continue
            out = 1 if isinstance(modules[name], ConvTransposeNd) and parameter.dim() > 1 else 0
            rows = gone.nonzero().flatten().to(parameter.device)
            for tensor in [parameter, *(v for o in optimizers for v in o.state.get(parameter, {}).values())]:
                if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                    tensor.index_fill_(out, rows, 0.0)


def _slice_modules(
    model: nn.Module, cuts: Mapping[tuple[str, str, int], Tensor]
) -> dict[str, dict[str, tuple[int, int]]]:
    """Slice buffers and update the sizes that modules keep; return ``{name: {side: (before, after)}}``."""
    layers: dict[str, dict[str, tuple[int, int]]] = {}
    modules = dict(model.named_modules())
    for (name, side, dim), cut in cuts.items():
        before, after = cut.numel(), int((~cut).sum())
        layers.setdefault(name, {})["out" if side == "both" else side] = (before, after)
        module = modules.get(name)
        if dim >= 0 or module is None:
            continue
        if isinstance(module, ConvNd):
            if side in ("out", "both"):
                module.out_channels = after
            if side in ("in", "both"):
                module.in_channels = after
            if side == "both":
                module.groups = after
        elif isinstance(module, nn.Linear):
            setattr(module, "out_features" if side == "out" else "in_features", after)
        elif isinstance(module, BatchNorm):
            module.num_features = after
            for buffer in ("running_mean", "running_var"):
                value = getattr(module, buffer)
                if value is not None:
                    setattr(module, buffer, value.index_select(0, (~cut).nonzero().flatten().to(value.device)))
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = after
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = (*module.normalized_shape[:-1], after)
        elif isinstance(module, nn.PReLU):
            if module.num_parameters > 1:
                module.num_parameters = after
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = after
    return layers


def _as_lists(masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}
