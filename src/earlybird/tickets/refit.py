"""What happens right after the cut: bring the small network's function back to the dense one's.

- `batch_norm`: running means and variances are estimated anew, since every layer sees other inputs than before.
- `least_squares`: each convolution and linear layer is solved for the dense layer's outputs, from the inputs it now
  gets (reconstruction as in ThiNet, Luo et al., arXiv 1707.06342, and He et al., arXiv 1707.06168, there for one
  layer at a time): ``W = argmin ||A W - Y||^2 + lambda ||W - W_cut||^2``, with A the patches that the small layer
  reads, Y the dense layer's outputs at the channels that stay, and lambda 0.1 % of A's mean squared norm.

Neither touches gradients, optimizer state or modes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from earlybird import ranks
from earlybird.arithmetic.add import AddLinear
from earlybird.arithmetic.shift import ShiftLinear
from earlybird.calls import as_call, evaluating, hooks_idle
from earlybird.tickets.layers import BatchNorm

# Rows of A per unknown of a layer: enough that the solution is not noise, few enough that it takes seconds.
_ROWS_PER_UNKNOWN = 16
_RIDGE = 1e-3


def estimate_batch_norms(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set running mean and variance of every batch norm to the plain average over ``batches`` (training statistics).

    Args:
        model: Left in the mode it is in; everything but the running statistics stays.
        batches: Inputs as the model takes them in training, one after another; without any, nothing changes.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    if not norms:
        return
    saved = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    statistics = [(buffer, buffer.clone()) for norm in norms for buffer in (norm.running_mean, norm.running_var)]  # type: ignore[union-attr]
    try:
        with evaluating(model), torch.no_grad():
            for number, batch in enumerate(batches):
                for norm in norms if not number else ():
                    norm.reset_running_stats()
                    norm.momentum = None
                    norm.train()
                _forward(model, batch)
    except BaseException:
        for buffer, before in statistics:
            buffer.copy_(before)  # type: ignore[union-attr]
        raise
    finally:
        for norm, (momentum, tracked) in zip(norms, saved):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(tracked)  # type: ignore[union-attr]


def share_statistics(model: nn.Module) -> None:
    """Give all ranks the mean of their running statistics: each has estimated them from inputs of its own."""
    norms = [norm for norm in model.modules() if isinstance(norm, BatchNorm) and norm.track_running_stats]
    buffers = {
        str(at): b for at, b in enumerate(b for n in norms for b in (n.running_mean, n.running_var)) if b is not None
    }
    for name, shared in ranks.share(buffers).items() if buffers else ():
        buffers[name].copy_(shared)


def dense_outputs(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Run the dense model in eval mode and return what each layer that `least_squares` can solve puts out.

    Args:
        model: The model before the cut; left as found.
        inputs: One batch.

    Returns:
        Layer name to outputs of the first images, ``(images, channels, ...)``; as many images as the solution needs.
        Layers that run more than once in a forward pass are left out: one weight would have to fit several targets.
    """
    found: dict[str, Tensor] = {}

    calls: dict[str, int] = {}

    def keep(name: str, module: nn.Module, output: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        found[name] = output[: _images_needed(module, output)].detach().clone()

    handles = [
        module.register_forward_hook(lambda m, i, o, name=name: keep(name, m, o))
        for name, module in model.named_modules()
        if _solvable(module)
    ]
    _run_hooked(model, inputs, handles)
    return {name: output for name, output in found.items() if calls[name] == 1}


def least_squares(model: nn.Module, inputs: Any, targets: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """Solve each layer of the shrunk model for the dense layer's outputs, in the order in which they run.

    Args:
        model: The model after the cut; weights are overwritten in place.
        inputs: The batch that `dense_outputs` was called with.
        targets: What it returned.
        kept: Layer name to the output channels of the dense layer that stayed, shape (n,); layers without kept all.
    """

    def solve(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in targets:
            return
        value = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        target = targets[name]
        if name in kept:
            dim = target.dim() - 1 if isinstance(module, nn.Linear) else 1
            target = target.index_select(dim, kept[name].to(target.device))
        with torch.autocast(value.device.type, enabled=False):
            _solve(module, value[: target.shape[0]].detach(), target)

    handles = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: solve(name, m, args, kwargs), with_kwargs=True
        )
        for name, module in model.named_modules()
        if _solvable(module)
    ]
    _run_hooked(model, inputs, handles)


def _solve(module: nn.Module, value: Tensor, target: Tensor) -> None:
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    bias: Tensor | None = None if module.bias is None else module.bias.data  # type: ignore[assignment]
    if isinstance(module, nn.Conv2d):
        patches = functional.unfold(
            value.float(), module.kernel_size, module.dilation, module.padding, module.stride  # type: ignore[arg-type]
        )  # fmt: skip  # (images, unknowns, positions)
        rows = patches.transpose(1, 2).flatten(0, 1)  # (rows, unknowns)
        wanted = target.float().flatten(2).transpose(1, 2).flatten(0, 1)  # (rows, out)
    else:
        rows, wanted = value.float().flatten(0, -2), target.float().flatten(0, -2)
    now = weight.float().flatten(1).T  # (unknowns, out)
    if bias is not None:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        now = torch.cat([now, bias.float()[None]], dim=0)
    gram = rows.T @ rows
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    gram.diagonal().add_(ridge)
    solution, failed = torch.linalg.solve_ex(gram, rows.T @ wanted + ridge * now)
    if int(failed) or not torch.isfinite(solution).all():
        return  # a singular system keeps the cut weights
    if bias is not None:
        bias.copy_(solution[-1])
        solution = solution[:-1]
    weight.copy_(solution.T.reshape(weight.shape))


def _solvable(module: nn.Module) -> bool:
    # shift and add layers have no weights that a linear system could be solved for
    return (isinstance(module, nn.Linear) and not isinstance(module, (ShiftLinear, AddLinear))) or (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _images_needed(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        unknowns = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        positions = output[0, 0].numel()
    else:
        unknowns, positions = int(module.in_features), max(output[0].numel() // output.shape[-1], 1)  # type: ignore[arg-type]
    return min(-(-_ROWS_PER_UNKNOWN * unknowns // positions), output.shape[0])


def _run_hooked(model: nn.Module, inputs: Any, handles: list[RemovableHandle]) -> None:
    """Run the model once in eval mode, every layer on every sample, and take the hooks off again."""
    try:
        with evaluating(model), torch.no_grad(), hooks_idle():
            _forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def _forward(model: nn.Module, inputs: Any) -> Any:
    """Call the model below its own hooks, which belong to the user's loop and to the ledger."""
    args, kwargs = as_call(inputs)
    return model.forward(*args, **kwargs)
