"""The plan of a cut: which channels of which layers go, what falls silent, and how each parameter is sliced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from earlybird.errors import InputError, ShrinkError
from earlybird.sharded import Shards
from earlybird.tickets.coupling import Group
from earlybird.tickets.layers import Conv, TransposedConv, is_depthwise, layer_of, width
from earlybird.tickets.units import CutKey, Units, attributes_of, cuts_of, inputs_of

# A key in place of a dimension: each block of a grouped convolution keeps its own inputs.
IN_BLOCKS = "in blocks"
Slices = dict[int | str, Tensor]


@dataclass(frozen=True)
class Plan:
    """What goes and what stays.

    Attributes:
        cuts: Layer (or bare parameter) and side to the mask of channels that go.
        slices: Parameter name to the indices that stay, by dimension.
        silenced: Layer name to the mask of channels that the ticket removes, but that stay and fall silent.
        alive: Layer name to the mask of channels that stay, alive, because of rounding or because their group is left
            whole; with the norms that they feed.
        whole: Layer name to the mask of those whose group is left whole.
        why: Layer name to the reason for that.
        groups: Which of the groups are cut, as indices.
        unread: Layer name to the mask of inputs that heads and neurons write which go.
        attributes: Module name and attribute to its new value, beside the sizes of the layers that are cut.
    """

    cuts: dict[CutKey, Tensor]
    slices: dict[str, Slices]
    silenced: dict[str, Tensor]
    alive: dict[str, Tensor]
    whole: dict[str, Tensor]
    why: dict[str, str]
    groups: list[int]
    unread: dict[str, Tensor]
    attributes: dict[tuple[str, str], object]


def make_plan(
    model: nn.Module,
    groups: list[Group],
    removed: Mapping[str, Tensor],
    silent: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
    chosen: Mapping[str, tuple[Units, Tensor]],
    round_to: int,
    scores: Mapping[str, Tensor],
    spared: Mapping[int, str],
) -> Plan:
    """Decide, group by group, which channels go, and translate that into slices of parameters.

    Args:
        model: What is cut.
        groups: Its coupled channels.
        removed: Layer name to the mask of channels that the ticket removes.
        silent: From `earlybird.tickets.proof.probe`, as ``carried``.
        carried: Norm to the mask of channels that only removed ones feed.
        chosen: Heads and neurons by name, with the mask of those that go.
        round_to: Multiple for the number of channels.
        scores: Layer name to scores of channels.
        spared: Index of a group to the reason why it stays whole, whatever is asked; so do those that are outputs.

    Raises:
        InputError: Every channel of a layer would go.
        ShrinkError: Some layer cannot be cut, or nothing but what stays whole is asked for.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = parameters | dict(model.named_buffers(remove_duplicate=False))
    cuts: dict[CutKey, Tensor] = {}
    alive: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    why: dict[str, str] = {}
    cut_groups: list[int] = []
    others = False
    for index, group in enumerate(groups):
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
        if group.output or index in spared:
            for member in group.members:
                gone = removed.get(member.name, carried.get(member.name))
                if gone is not None and member.side != "in":
                    left = torch.zeros_like(gone)
                    left[member.local] = gone[member.local]
                    alive[member.name] = alive.get(member.name, torch.zeros_like(gone)) | left
                    if member.name in removed and left.any():
                        whole[member.name] = whole.get(member.name, torch.zeros_like(gone)) | left
                        why.setdefault(member.name, spared.get(index) or group.why or "no layer is seen to read them")
            continue
        others = True
        exact = cut = torch.zeros_like(asked) if group.uneven else asked & unread
        if cut.any():
            worth = _worth(group, modules, scores)
            exact = cut = _balance(cut, group, worth)
            if cut.all():
                raise InputError(
                    f"the ticket removes every channel of layer '{(group.producers or (group.members[0].name,))[0]}'",
                    needed="at least one channel in each layer", hint="earlybird.draw keeps one; nothing was changed",
                )  # fmt: skip
            cut = _round(cut, group, worth, round_to)
        for member in group.members:
            gone = removed.get(member.name, carried.get(member.name))
            if gone is not None and member.side != "in":
                stayed = torch.zeros_like(gone)
                stayed[member.local] = (exact & ~cut)[member.root] & gone[member.local]
                alive[member.name] = alive.get(member.name, torch.zeros_like(stayed)) | stayed
            if cut.any():
                key = (member.name, member.side, member.dim)
                if key not in cuts:
                    cuts[key] = torch.zeros(_extent(key, modules, tensors), dtype=torch.bool)
                cuts[key][member.local] |= cut[member.root]
        if cut.any():
            cut_groups.append(index)
    if why and not others:
        name = next(iter(why))
        raise ShrinkError(
            f"the ticket removes channels of layer '{name}' that have to stay ({why[name]}), and no others",
            needed="a ticket over hidden layers", hint="leave that layer out of the ticket; nothing was changed",
        )  # fmt: skip
    alive = {name: mask for name, mask in alive.items() if mask.any()}
    silenced = {}
    for name, gone in (dict(removed) | dict(carried)).items():
        nothing = torch.zeros_like(gone)
        gone = gone & ~cuts.get((name, "out", None), nothing) & ~cuts.get((name, "both", None), nothing)
        gone &= ~alive.get(name, nothing)
        if gone.any():
            silenced[name] = gone
    unheard_by: dict[str, Tensor] = {}
    attributes: dict[tuple[str, str], object] = {}
    for units, gone in chosen.values():
        for where, cut in cuts_of(units, gone, model).items():
            if where in cuts:
                raise ShrinkError(
                    f"the ticket cuts layer '{where[0]}' twice: its channels, and the {units.kind}s of '{units.name}'",
                    hint="leave one of the two out of the ticket; nothing was changed",
                )
            cuts[where] = cut
        unheard_by[units.reads] = inputs_of(units, gone, model)
        attributes |= attributes_of(units, gone, model)
    slices = _plan_slices(cuts, model, modules, parameters)
    return Plan(cuts, slices, silenced, alive, whole, why, cut_groups, unheard_by, attributes)


def _extent(key: CutKey, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor]) -> int:
    """Return the number of channels of a layer (or bare parameter) on one side."""
    name, side, dim = key
    if dim is not None:
        return parameters[name].shape[dim]
    found = width(modules[name], side)
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
            slices.setdefault(name, {})[dim] = stay(cut)
            continue
        module = modules[name]
        layer = layer_of(module)
        assert layer is not None  # _extent has refused other types
        if isinstance(module, TransposedConv) and module.groups > 1 and not is_depthwise(module):
            raise ShrinkError(
                f"layer '{name}' is a grouped transposed convolution, which cannot be cut; nothing was changed"
            )
        in_blocks = isinstance(module, Conv) and side == "in" and module.groups > 1
        for attribute, at in layer.places(side):
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
            slices.setdefault(path, {})[key] = _stay_in_blocks(cut, module) if in_blocks else stay(cut)
    _check_shared(slices, model)
    return slices


def stay(cut: Tensor) -> Tensor:
    """Return the indices of the channels that are not cut, ascending, shape (n,)."""
    return (~cut).nonzero().flatten()


def _stay_in_blocks(cut: Tensor, module: nn.Module) -> Tensor:
    """Return the inputs that stay in each block of a grouped convolution, shape (groups, n)."""
    per_block = cut.view(int(module.groups), -1)  # type: ignore[arg-type]
    return torch.stack([stay(block) for block in per_block])


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


def check_optimizers(
    model: nn.Module, slices: Mapping[str, Slices], optimizers: list[torch.optim.Optimizer], shards: Shards
) -> None:
    """Raise a `ShrinkError` for optimizer state that cannot be sliced like its parameter."""
    names = {id(shards.held(parameter)): name for name, parameter in model.named_parameters()}
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
