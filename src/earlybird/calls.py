"""What a user's loop passes, calling somebody's model without leaving a trace, and hooks that stay where they are."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from earlybird import sharded
from earlybird.errors import InputError

Owner = TypeVar("Owner")


class Call(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_call(inputs: Any) -> Call:
    """Read inputs as a call: a tensor, a sequence of positional or a mapping of keyword arguments, or a `Call`."""
    if isinstance(inputs, Call):
        return inputs
    if isinstance(inputs, Mapping):
        return Call((), dict(inputs))
    return Call(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})


def to_state(inputs: Any) -> Any:
    """Return a call, or whatever is passed in one, as nested dicts and lists that a checkpoint can hold.

    Raises:
        TypeError: It holds something else than tensors, numbers, text, None and containers of them.
    """
    if isinstance(inputs, Call):
        return {"args": to_state(inputs.args), "kwargs": to_state(inputs.kwargs)}
    if isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs):
        return {key: to_state(value) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return [to_state(value) for value in inputs]
    if inputs is None or isinstance(inputs, (Tensor, bool, int, float, str)):
        return inputs
    raise TypeError(f"a {type(inputs).__name__} cannot be saved")


def call_from_state(state: Any, device: torch.device) -> Call:
    """Rebuild on ``device`` the call that `to_state` was given."""

    def rebuilt(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, Mapping):
            return {key: rebuilt(item) for key, item in value.items()}
        return tuple(map(rebuilt, value)) if isinstance(value, (tuple, list)) else value

    return Call(rebuilt(state["args"]), rebuilt(state["kwargs"]))


def _children(inputs: Any) -> list[Any]:
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, (tuple, list)) else []


def batch_size(inputs: Any) -> int:
    """Return the first dimension of the first tensor in ``inputs`` (tensor, sequence, mapping, call); 1 without any."""
    return next((tensor.shape[0] for tensor in tensors_in(inputs) if tensor.ndim), 1)


def first_sample(inputs: Any) -> Any:
    """Return ``inputs`` with every tensor of N rows cut to a copy of its first row, in tuples and dicts."""
    with torch.inference_mode(False):  # a copy that autograd may save, and that does not hold the batch in memory
        return _sliced(inputs, batch_size(inputs))


def _sliced(inputs: Any, batch: int) -> Any:
    if isinstance(inputs, Tensor):
        return (inputs.detach()[:1] if inputs.ndim and inputs.shape[0] == batch else inputs.detach()).clone()
    if isinstance(inputs, Mapping):
        return {key: _sliced(value, batch) for key, value in inputs.items()}
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*(_sliced(value, batch) for value in inputs))
    if isinstance(inputs, (tuple, list)):
        return tuple(_sliced(value, batch) for value in inputs)
    return inputs


def inner(model: nn.Module) -> nn.Module | None:
    """Return what DDP, DataParallel, torch.compile or Lightning Fabric has wrapped, or None for anything else."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return model.module  # type: ignore[no-any-return]
    if any(isinstance(model, module._FabricModule) for name in _FABRIC if (module := sys.modules.get(name))):
        return model._forward_module  # type: ignore[return-value]
    found = getattr(model, "_orig_mod", None)
    return found if isinstance(found, nn.Module) else None


# as a package of its own, and as a part of lightning
_FABRIC = ("lightning_fabric.wrappers", "lightning.fabric.wrappers")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's module inside all wrappers that `inner` knows; their own machinery must not run here."""
    while (found := inner(model)) is not None:
        model = found
    return model


def as_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return None, one or several optimizers as a list; anything else is an `InputError`.

    A wrapper around an optimizer, as Fabric, Lightning and Accelerate put it there, is seen through.
    """
    if optimizer is None:
        return []
    found = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    for number, one in enumerate(found):
        if not isinstance(one, torch.optim.Optimizer):
            raise InputError(f"optimizer is a {type(one).__name__}", needed="a torch.optim.Optimizer, or several")
        while isinstance(wrapped := getattr(found[number], "optimizer", None), torch.optim.Optimizer):
            found[number] = wrapped
    return found


def given_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return one or several optimizers as a list, for whoever needs one; none is an `InputError`."""
    found = as_optimizers(optimizer)
    if not found:
        raise InputError("no optimizer was given", needed="the one that trains the model, or several")
    return found


def is_distributed() -> bool:
    """Whether this process belongs to a group, if only of one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def after_gradients(args: tuple[Any, ...], kwargs: dict[str, Any], act: Callable[[], None]) -> Any:
    """Let ``act`` run when an optimizer's step has its gradients; what a hook before the step returns.

    Args:
        args: Of the step, as the hook gets them: the optimizer, and maybe a closure.
        kwargs: Of the step.
        act: Runs now, or with ``step(closure)`` whenever the closure has computed gradients.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        act()
        return None

    def followed() -> Any:
        loss = closure()
        act()
        return loss

    return args[:1], {**kwargs, "closure": followed}


def processes() -> int:
    """Return how many processes train together."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in whatever a model returns: a tensor, or sequences and mappings of them, however nested."""
    return (
        [value] if isinstance(value, Tensor) else [tensor for child in _children(value) for tensor in tensors_in(child)]
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode; afterwards restore its modes and the random generators. Buffers may change."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode; afterwards restore its modes, buffers and the random generators."""
    buffers = [
        (module, name, buffer, buffer.detach().clone(), buffer._version)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with evaluating(model):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before, version in buffers:
                module._buffers[name] = buffer
                # batch norm writes its running statistics without telling autograd's version counter
                if buffer._version != version or not torch.equal(buffer, before):
                    buffer.copy_(before)


@contextmanager
def plain_execution(model: nn.Module) -> Iterator[None]:
    """Run eagerly, with autograd, outside autocast, operation by operation, whatever the caller has switched on."""
    first = next(model.parameters(), None)
    device = "cpu" if first is None else first.device.type
    with ExitStack() as stack:
        # nobody can see into the one operation that attention and transformer layers are where nothing learns
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        if "torch._dynamo" in sys.modules:  # imported by whoever compiles; importing it here would take a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


# where a module keeps its hooks, and which of those of the forward pass want keyword arguments or to be called always
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


# packages whose models hang hooks on themselves at their first call, to collect what they return
_HOOKED_BY_THEMSELVES = ("transformers.",)


def _of_the_model(module: nn.Module) -> set[int]:
    """Return the numbers of the forward hooks that are a part of the model."""
    hooks = (*module._forward_hooks.items(), *module._forward_pre_hooks.items())
    return {number for number, hook in hooks if str(getattr(hook, "__module__", "")).startswith(_HOOKED_BY_THEMSELVES)}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """`left_as_found`, in `plain_execution`, and below everybody's hooks on modules: they belong to the user's loop.

    Our own do nothing, those of `around` among them: each module runs its own ``forward``. Hooks that models hang on
    themselves stay. Sharded parameters are gathered for the while, which is a collective operation.
    """
    hooks = [(module, {name: getattr(module, name) for name in _HOOKS}) for module in model.modules()]
    with left_as_found(model), plain_execution(model), hooks_idle(), sharded.gathered(model):
        try:
            for module, before in hooks:
                own = _of_the_model(module)
                for name, registered in before.items():
                    setattr(module, name, OrderedDict((key, registered[key]) for key in registered if key in own))
            yield
        finally:
            for module, before in hooks:
                own = _of_the_model(module)
                for name, registered in before.items():
                    now = getattr(module, name)
                    registered.update((key, now[key]) for key in now if key in own and key not in registered)
                    setattr(module, name, registered)


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """`undisturbed`, but in training mode, except batch norms, which must not see a batch of one."""
    with undisturbed(model):
        for module in model.modules():
            module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
        yield


class Hook:
    """A hook of one model or optimizer. Copies and pickles of the model hold an idle one, which does nothing.

    Dynamo leaves it out of its graphs: it would otherwise compile anew whenever a counter in it has changed.
    """

    idle = False  # of all of them, see `hooks_idle`

    def __init__(self, call: Callable[..., Any] | None, owner: Any = None) -> None:
        self.call, self.owner = call, owner
        self._outside: tuple[Any, Any] = (None, None)  # a call, and itself outside of dynamo's graphs

    def __call__(self, *args: Any) -> Any:  # noqa: D102
        if self.call is None or Hook.idle:
            return None
        if "torch._dynamo" not in sys.modules:  # imported by whoever compiles; importing it here would take a second
            return self.call(*args)
        if self._outside[0] is not self.call:
            self._outside = (self.call, torch.compiler.disable(self.call))
        return self._outside[1](*args)

    __call__._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (None,)


def hook_owners(model: nn.Module, kind: type[Owner]) -> list[Owner]:
    """Return what has hung a hook of ours before the forward pass of ``model``, of those that are a ``kind``."""
    owners = [hook.owner for hook in model._forward_pre_hooks.values() if isinstance(hook, Hook)]
    return [owner for owner in owners if isinstance(owner, kind)]


@contextmanager
def hooks_idle() -> Iterator[None]:
    """Let our own hooks do nothing: what runs is no step of anybody's loop. Those of others may belong to the model."""
    before, Hook.idle = Hook.idle, True
    try:
        yield
    finally:
        Hook.idle = before


def around(module: nn.Module, call: Callable[..., Any], owner: Any = None) -> Around:
    """Let ``call(forward, *args, **kwargs)`` run in place of the module's ``forward``, which it is given.

    What hooks cannot do: leave a module out, run it on some samples only, or with other weights. Names, parameters and
    the module's type stay as they are. Of several, the last one that was set runs first. Until `Around.remove`.

    Args:
        module: Whose ``forward`` is meant.
        call: What runs in its place; it may call ``forward`` as often as it likes, also not at all.
        owner: On whose behalf, for `arounds`.
    """
    return Around(module, call, owner)


class Around:
    """What `around` puts in place of a ``forward``. Copies and pickles of the module have their plain one.

    It is idle where `Hook` is, and dynamo runs it outside of its graphs.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any], owner: Any) -> None:
        self.module, self.call, self.owner = module, call, owner
        self.inner: Callable[..., Any] = module.forward
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        if Hook.idle:
            return self.inner(*args, **kwargs)
        if "torch._dynamo" not in sys.modules:
            return self.call(self.inner, *args, **kwargs)
        return torch.compiler.disable(self.call)(self.inner, *args, **kwargs)

    __call__._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets

    def remove(self) -> None:
        """Give the module back what ran before; others that were set since stay."""
        outer = self.module.__dict__.get("forward")
        if outer is self:
            if isinstance(self.inner, Around):
                self.module.forward = self.inner
            else:
                self._restore()
            return
        while isinstance(outer, Around):
            if outer.inner is self:
                outer.inner = self.inner
                return
            outer = outer.inner

    def _restore(self) -> None:
        """Take the instance's ``forward`` away, so that its class's is seen again, or put back a user's own."""
        del self.module.__dict__["forward"]
        plain = getattr(self.inner, "__func__", None)
        if plain is not type(self.module).forward:
            self.module.forward = self.inner

    def _plain(self) -> Callable[..., Any]:
        inner = self.inner
        while isinstance(inner, Around):
            inner = inner.inner
        return inner

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._plain(), memo)  # a bound method is copied with the module that it is bound to

    def __reduce__(self) -> tuple[Any, ...]:
        plain = self._plain()
        return getattr, (self.module, plain.__name__)


def arounds(module: nn.Module, kind: type[Owner]) -> list[Owner]:
    """Return the owners of what runs around a module's ``forward``, of those that are a ``kind``."""
    found, outer = [], module.__dict__.get("forward")
    while isinstance(outer, Around):
        if isinstance(outer.owner, kind):
            found.append(outer.owner)
        outer = outer.inner
    return found
