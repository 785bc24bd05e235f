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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from earlybird.calls import Around, as_in_training, unwrapped
from earlybird.kernels.batch_norm import batch_norm, supports
from earlybird.kernels.readers import sole_readers

__all__ = ["FusedBatchNorms", "find_relus"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MARK = "_earlybird_clamped"  # at a tensor that the kernel has clamped


def find_relus(model: nn.Module, example_inputs: Any) -> dict[nn.Module, list[nn.Module]]:
    """Return the batch norms whose output only a ReLU reads, each with the modules that get to see it, the ReLU first.

    The model runs once, in training mode but for its batch norms, and is left as it was.

    Args:
        model: Any.
        example_inputs: What it is called with.
    """
    with as_in_training(model):
        return sole_readers(model, example_inputs, nn.BatchNorm2d, nn.ReLU)


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
