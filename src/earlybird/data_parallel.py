"""DistributedDataParallel after a cut: new buckets for smaller gradients, in the wrapper that the user's loop calls.

DDP's reducer knows the sizes of the gradients it was made for: they lie flattened in its buckets, and its hooks sit on
autograd's accumulators, which a cut renews. The wrapper itself knows no size, so a new reducer in its place, made by
the wrapper's own method, is all that it needs; the old one takes its hooks along. Communication hooks are registered
again.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from earlybird.calls import inner, tensors_in
from earlybird.errors import InputError


def wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    """Return the DDP wrapper among those around the user's module, or None."""
    outer: nn.Module | None = model
    while outer is not None and not isinstance(outer, DistributedDataParallel):
        outer = inner(outer)
    return outer


def active_wrapper() -> DistributedDataParallel | None:
    """Return the DDP wrapper whose forward pass is running, or None; asked from a hook of the module inside."""
    return DistributedDataParallel._active_ddp_module


def check(wrapper: DistributedDataParallel) -> None:
    """Raise an `InputError` for what a wrapper may hold that no one can cut."""
    again = "train without it until the ticket is drawn, then wrap the module anew"
    if wrapper.mixed_precision is not None:
        raise InputError("DDP's own mixed_precision keeps copies of the weights", hint="use torch.autocast instead")
    if wrapper._delay_all_reduce_params:
        raise InputError("DDP delays the reduction of some parameters (delay_all_reduce_named_params)", hint=again)
    if wrapper._join_config.enable:
        raise InputError(
            "the loop runs in DDP's join(): ranks that have ended early would miss the cut",
            hint="give all ranks equally many batches (DistributedSampler does)",
        )
    for hook, state in wrapper._comm_hooks:
        names = (*getattr(state, "__dict__", ()), *getattr(type(state), "__slots__", ()))
        if any(tensors_in(getattr(state, name, None)) for name in names):
            raise InputError(
                f"DDP's communication hook {getattr(hook, '__name__', hook)} keeps tensors of the gradients' sizes in "
                f"its {type(state).__name__}",
                hint="register it after the ticket is drawn, or use one without a state, such as fp16_compress_hook",
            )
    if not wrapper._comm_hooks and wrapper._get_ddp_logging_data().get("comm_hook"):
        raise InputError(
            "DDP has a built-in communication hook, which it cannot register twice",
            hint="use register_comm_hook(None, fp16_compress_hook) of torch.distributed.algorithms.ddp_comm_hooks",
        )


def refresh(wrapper: DistributedDataParallel) -> None:
    """Give ``wrapper`` a new reducer for the parameters as they are now; every rank has to do so."""
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    if wrapper.static_graph:
        wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()  # type: ignore[union-attr]
    wrapper._has_rebuilt_buckets = False
    for hook, state in wrapper._comm_hooks:
        torch.distributed._register_comm_hook(wrapper.reducer, state, hook)  # type: ignore[attr-defined]
