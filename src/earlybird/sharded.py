"""Sharded parameters (FSDP2, `torch.distributed.fsdp.fully_shard`): hold them whole, change them, shard what is left.

FSDP2 keeps of each parameter the rows of one rank, as a DTensor that the optimizer holds; what it knows of the sizes is
in one record a parameter. A cut renews these records from the cut weights and moves their new DTensors into the old
parameter objects (`torch.utils.swap_tensors`), so that optimizers go on with the objects they hold.

Gathering and sharding are collective: all ranks come to them at the same point. While a model is held whole, each rank
needs memory for all of its weights, once.

Checked with torch 2.13 on CPUs with gloo. The records are no public interface; where they look otherwise than here, a
cut is refused.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from earlybird.errors import ShrinkError
from earlybird.settings import accepted


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered from all ranks where it is a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which shares its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def spread(values: Tensor, like: Any) -> Tensor:
    """Return ``values``, whole on every rank, sharded as ``like`` is."""
    if not hasattr(like, "device_mesh"):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameters of ``model`` are sharded by FSDP2."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def _records(model: nn.Module) -> dict[str, Any]:
    """Return FSDP2's record of each sharded parameter, by its name in ``model``."""
    if not is_sharded(model):
        return {}
    fsdp = sys.modules["torch.distributed.fsdp"]
    names = {id(module): name for name, module in model.named_modules()}
    groups: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            state = module._get_fsdp_state()
            own = getattr(state, "_fsdp_param_groups", None)
            for group in [state._fsdp_param_group] if own is None else own:
                if group is not None:
                    groups[id(group)] = group
    found = {}
    for record in (record for group in groups.values() for record in group.fsdp_params):
        place = record._module_info
        if id(place.module) in names:
            found[f"{names[id(place.module)]}.{place.param_name}".removeprefix(".")] = record
    return found


class Shards:
    """The sharded parameters of a model that is held whole.

    Args:
        records: FSDP2's, by parameter name.
        whole: The parameters in their places, by name.
    """

    def __init__(self, records: Mapping[str, Any], whole: Mapping[str, nn.Parameter]) -> None:
        self._records = dict(records)
        self._names = {id(parameter): name for name, parameter in whole.items()}

    def held(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the parameter that optimizers hold: the sharded one, of which ``parameter`` is the whole."""
        name = self._names.get(id(parameter))
        return parameter if name is None else self._records[name].sharded_param

    def check(self, sizes: Mapping[str, torch.Size]) -> None:
        """Make sure that parameters can be sharded again.

        Args:
            sizes: Names of those that change to the shapes they will have.

        Raises:
            ShrinkError: One cannot; the message names it.
        """
        for name, size in sizes.items():
            if name not in self._records:
                continue
            record = self._records[name]
            if record.is_dtensor:
                found, hint = "is also split by tensor parallelism", "cut the model before it is parallelised"
            elif hasattr(local(record.sharded_param), "fsdp_pre_all_gather"):
                found, hint = f"is a {type(local(record.sharded_param)).__name__}", "shard plain tensors"
            elif record.offload_to_cpu and record.device.type != "cpu":
                found, hint = "is kept in the host's memory (CPUOffloadPolicy)", "draw the ticket without offloading"
            elif record.fsdp_placement.dim and size[record.fsdp_placement.dim] % record.shard_mesh.size():
                at, ranks = record.fsdp_placement.dim, record.shard_mesh.size()
                found = f"is sharded over {ranks} ranks along dimension {at}, of which {size[at]} would be left"
                hint = f"shard along dimension 0, or use round_to={ranks}"
            elif weakref.getweakrefs(record.sharded_param) or record.sharded_param._use_count() > 1:
                found, hint = "is held by somebody else than its module and optimizer", "let go of it"
            else:
                continue
            raise ShrinkError(f"sharded parameter '{name}' {found}", hint=f"{hint}; nothing was changed")

    def renew(self, parameter: nn.Parameter) -> None:
        """Shard ``parameter``, held whole, anew: the parameter that optimizers hold takes on its size and values."""
        record = self._records[self._names[id(parameter)]]
        old, placement = record.sharded_param, record.fsdp_placement
        old.grad = None
        context = {
            "param": parameter, "device": record.device, "shard_placement_fn": lambda _: placement,
            "mesh_info": record.mesh_info,
        }  # fmt: skip
        record._init_sharded_param(**accepted(record._init_sharded_param, context))
        if record.post_forward_mesh_info:
            record._init_sharded_post_forward_param_metadata(parameter)
        # what was gathered in the old size
        record.all_gather_outputs = []
        record.unsharded_accumulated_grad = None
        if hasattr(record, "_unsharded_param"):
            del record._unsharded_param
        new, record.sharded_param = record.sharded_param, old
        torch.utils.swap_tensors(old, new)
        record._setattr_on_modules(parameter)  # the model is held whole until the block ends


@contextmanager
def gathered(model: nn.Module) -> Iterator[Shards]:
    """Hold the sharded parameters of ``model`` whole in a block, as plain ones in their places.

    FSDP2's own hooks rest meanwhile. What the block writes into the parameters is written into the shards at its end; a
    size changes by `Shards.renew` alone. Without sharded parameters, and inside such a block, nothing happens.
    """
    if not is_sharded(model):
        yield Shards({}, {})
        return
    fsdp = sys.modules["torch.distributed.fsdp"]
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()  # what an evaluation has gathered need not be up to date
    records = _split(model)
    with torch.no_grad():
        parameters = {
            name: nn.Parameter(whole(record.sharded_param).clone(), requires_grad=record.sharded_param.requires_grad)
            for name, record in records.items()
        }
    with _held(model, records, parameters):
        yield Shards(records, parameters)
        with torch.no_grad():
            for name, record in records.items():
                local(record.sharded_param).copy_(local(spread(parameters[name].detach(), record.sharded_param)))


@contextmanager
def hollow(model: nn.Module) -> Iterator[None]:
    """Let sharded parameters of ``model`` be zeros of their whole sizes in a block: nothing is gathered.

    For what looks at shapes alone, and may run on some ranks only, or in the middle of a forward pass.
    """
    records = _split(model)
    blank = {
        name: nn.Parameter(
            local(record.sharded_param).new_zeros(()).expand(record.sharded_param.shape),
            requires_grad=record.sharded_param.requires_grad,
        )
        for name, record in records.items()
    }
    with _held(model, records, blank):
        yield


def _split(model: nn.Module) -> dict[str, Any]:
    """Return the records of parameters that are not held whole at the moment."""
    return {name: record for name, record in _records(model).items() if hasattr(_registered(record), "full_tensor")}


def _registered(record: Any) -> Any:
    return getattr(record._module_info.module, record._module_info.param_name)


@contextmanager
def _held(model: nn.Module, records: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put ``parameters`` into the places of those of ``records``, and FSDP2's hooks at rest, in a block."""
    before = {name: _registered(record) for name, record in records.items()}
    hooks = [
        (hooks, key, hook)
        for module in (model.modules() if is_sharded(model) else ())
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in hooks.items()
        if _is_of_fsdp(hook)
    ]
    try:
        for registered, key, _ in hooks:
            registered[key] = _rest  # in its place, so that the order stays
        for name, record in records.items():
            record._setattr_on_modules(parameters[name])
        yield
    finally:
        for name, record in records.items():
            record._setattr_on_modules(before[name])
        for registered, key, hook in hooks:
            registered[key] = hook


def _rest(*args: Any) -> None:
    """Do nothing, in a hook's place."""


def _is_of_fsdp(hook: Any) -> bool:
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    while hook is not None:
        if isinstance(getattr(hook, "__self__", None), FSDPState):
            return True
        hook = getattr(hook, "__wrapped__", None)
    return False
