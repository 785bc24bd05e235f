"""Let a model's batch norms, and the ReLUs that read nothing but them, run by `earlybird.kernels.batch_norm`.

    fused = FusedBatchNorms(model, images)
    ...                                     # train
    fused.remove()

It holds while a layer is in training mode, on a CPU, with images in channels_last of bfloat16 or float32. Elsewhere,
and in eval mode, every layer runs as PyTorch has it. Modules, parameters and names stay the same; channels may be cut
in mid-training.

Which ReLU a batch norm may do itself is what one pass of the model over the example shows: its output is read once, by
an `nn.ReLU`. Then the batch norm returns numbers that are clamped already, and the ReLU passes on what it gets, as it
can tell from a mark at the tensor: the same ReLU may be called with other things as well, and does its work on them.
A model that lets something else read that output in later passes, but not in the one over the example, would compute
something else. If it does so instead of the ReLU, the batch norm does without from then on, and a warning names it; if
besides the ReLU, nothing finds it out: such a model must not be given to `FusedBatchNorms`.

Whoever hangs hooks on a batch norm, on its ReLU or on a module around that takes or returns what is between them, or
wraps their ``forward``, sees what PyTorch would show: as long as the hooks are there, the ReLU is not fused.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode

from earlybird.calls import Around, as_call, as_in_training, tensors_in, unwrapped
from earlybird.kernels.batch_norm import batch_norm, supports

__all__ = ["FusedBatchNorms", "find_relus"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MARK = "_earlybird_clamped"  # at a tensor that the kernel has clamped


def find_relus(model: nn.Module, example_inputs: Any) -> dict[nn.BatchNorm2d, list[nn.Module]]:
    """Return the batch norms whose output only a ReLU reads, each with the modules that get to see it, the ReLU first.

    The model runs once, in training mode but for its batch norms, and is left as it was.

    Args:
        model: Any.
        example_inputs: What it is called with.
    """
    call = as_call(example_inputs)
    handles, readers = [], _Readers()
    with as_in_training(model), readers:
        for module in model.modules():
            handles += [
                module.register_forward_pre_hook(readers.before, with_kwargs=True),
                module.register_forward_hook(readers.after),
            ]
        try:
            result = model(*call.args, **call.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        for tensor in tensors_in(result):
            readers.note(tensor)
        del result
        return readers.found()


class _Output:
    """One result of a batch norm, and who has read it."""

    def __init__(self, module: nn.BatchNorm2d, y: Tensor) -> None:
        self.module, self.tensor = module, weakref.ref(y)
        self.relus: list[nn.Module] = []
        self.others = 0
        self.seers: list[nn.Module] = []
        self.open = True  # it still is what the batch norm has computed

    def found(self) -> list[nn.Module] | None:
        # who is still alive is kept somewhere, for whoever will read it
        kept = self.open and self.tensor() is not None
        return [*self.relus, *self.seers] if len(self.relus) == 1 and not self.others and not kept else None


class _Readers(TorchDispatchMode):
    """Sees every operator, and what goes into and out of modules."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: list[_Output] = []
        self._of: dict[int, _Output] = {}  # by the tensor's id, which another one may have later
        self._relu: nn.Module | None = None

    def _output(self, tensor: Tensor) -> _Output | None:
        output = self._of.get(id(tensor))
        return output if output is not None and output.open and output.tensor() is tensor else None

    def note(self, value: Any) -> None:
        """Count a reader other than a ReLU of every tensor in ``value``."""
        for tensor in tensors_in(value):
            output = self._output(tensor)
            if output is not None:
                output.others += 1

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of every module."""
        for tensor in tensors_in((args, kwargs)):
            output = self._output(tensor)
            if output is not None and type(module) is nn.ReLU:
                output.relus.append(module)
                self._relu = module
            elif output is not None:
                output.seers.append(module)

    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        """Forward hook of every module."""
        if module is self._relu:
            self._relu = None
            if (output := self._output(result)) is not None:
                output.open = False
        elif type(module) is nn.BatchNorm2d and isinstance(result, Tensor):
            for earlier in self._outputs:
                if earlier.module is module and not earlier.relus:
                    earlier.others += 1  # in training, an output that waits would look like one that no ReLU gets
            output = _Output(module, result)
            self._outputs.append(output)
            self._of[id(result)] = output
        else:
            for tensor in tensors_in(result):
                if (output := self._output(tensor)) is not None:
                    output.seers.append(module)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._relu is None:
            self.note((args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def found(self) -> dict[nn.BatchNorm2d, list[nn.Module]]:
        """Return what `find_relus` does, after the pass."""
        every: dict[nn.BatchNorm2d, list[list[nn.Module] | None]] = {}
        for output in self._outputs:
            every.setdefault(output.module, []).append(output.found())
        fusable = {}
        for module, calls in every.items():
            seen = [seers for seers in calls if seers is not None]
            if len(seen) == len(calls):
                fusable[module] = list(dict.fromkeys(seer for seers in seen for seer in seers))
        return fusable


class FusedBatchNorms:
    """The kernel in every `nn.BatchNorm2d` of a model, until `remove`.

    Args:
        model: Whose batch norms are meant.
        example_inputs: What the model is called with: a tensor, a sequence or a mapping.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        model = unwrapped(model)
        fusable = find_relus(model, example_inputs)
        norms = {name: module for name, module in model.named_modules() if type(module) is nn.BatchNorm2d}
        relus = dict.fromkeys(seer for seers in fusable.values() for seer in seers if type(seer) is nn.ReLU)
        self._relus: dict[nn.Module, Around] = {relu: _AroundEager(relu, _pass_on, self) for relu in relus}
        self._norms = [_Norm(name, module, fusable.get(module), self) for name, module in norms.items()]

    @property
    def fused(self) -> list[str]:
        """Names of the batch norms that do their ReLU, unless a hook is in the way."""
        return [norm.name for norm in self._norms if norm.seers is not None]

    def is_alone_at(self, relu: nn.Module) -> bool:
        """Tell whether nothing but this object runs around a ReLU."""
        return _is_alone(self._relus[relu])

    def remove(self) -> None:
        """Give every module its own ``forward`` back."""
        for own in (*self._relus.values(), *(norm.around for norm in self._norms)):
            own.remove()


class _AroundEager(Around):
    """Dynamo sees the plain ``forward``, which it has kernels of its own for."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) if torch.compiler.is_compiling() else super().__call__(*args, **kwargs)


class _Mark:
    """At a tensor that is clamped as long as it has this version."""

    def __init__(self, version: int) -> None:
        self.version, self.read = version, False


class _Norm:
    """One batch norm. ``seers``: modules that get to see its output, where a ReLU alone reads it."""

    def __init__(
        self, name: str, module: nn.BatchNorm2d, seers: list[nn.Module] | None, owner: FusedBatchNorms
    ) -> None:
        self.name, self.module, self.seers, self.owner = name, module, seers, owner
        self.around = _AroundEager(module, self.run, owner)
        self._last: _Mark | None = None

    def run(self, forward: Callable[..., Tensor], input: Tensor) -> Tensor:  # named as that of the module
        norm, x = self.module, input
        tracks = norm.track_running_stats
        mean, variance = (norm.running_mean, norm.running_var) if tracks else (None, None)
        if not norm.training or not _is_plain(self.around) or not supports(x, norm.weight, norm.bias, mean, variance):
            return forward(x)
        momentum = 0.0 if norm.momentum is None else norm.momentum
        if tracks and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        relu = self._does_relu()
        y = batch_norm(x, norm.weight, norm.bias, mean, variance, momentum, norm.eps, relu)
        if relu:
            mark = _Mark(y._version)
            setattr(y, _MARK, mark)
            if torch._C._current_graph_task_id() == -1:  # what a backward pass computes again may end here
                self._last = mark
        return y

    def _does_relu(self) -> bool:
        if self.seers is None:
            return False
        if self._last is not None and not self._last.read:
            warnings.warn(
                f"the output of batch norm {self.name} did not get to a ReLU as it did with the example inputs; it "
                "was clamped, and will not be from now on",
                stacklevel=2,
            )
            self.seers = None
            return False
        if _has_any_global_hook() or not _is_alone(self.around) or _has_hooks(self.module, but="_forward_pre_hooks"):
            return False
        for seer in self.seers:
            free = self.owner.is_alone_at(seer) if type(seer) is nn.ReLU else "forward" not in seer.__dict__
            if not free or _has_hooks(seer):
                return False
        return True


def _pass_on(forward: Callable[..., Tensor], input: Tensor) -> Tensor:
    """Run around a ReLU."""
    mark: _Mark | None = getattr(input, _MARK, None)
    if mark is None:
        return forward(input)
    delattr(input, _MARK)
    mark.read = True
    return input if mark.version == input._version else forward(input)


def _is_plain(own: Around) -> bool:
    """Tell whether it stands in for what the module's class does, and nobody else's ``forward``."""
    return getattr(own.inner, "__func__", None) is type(own.module).forward


def _is_alone(own: Around) -> bool:
    return own.module.__dict__.get("forward") is own and _is_plain(own)


def _has_hooks(module: nn.Module, but: str = "") -> bool:
    return any(getattr(module, name) for name in _HOOKS if name != but)
