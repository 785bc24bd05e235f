"""Everything that runs the model to learn what a cut may do, and whether it did it: silence, outputs, training mode."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from earlybird.calls import Call, tensors_in, undisturbed
from earlybird.errors import ShrinkError
from earlybird.tickets.layers import BatchNorm, Conv, is_depthwise, is_norm, layer_of, mixes_channels


def _tensor_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _channel_dim(module: nn.Module, value: Tensor) -> int:
    layer = layer_of(module)
    assert layer is not None
    return layer.channel_dim % value.dim()


def _is_zero(module: nn.Module, value: Tensor) -> Tensor:
    """Return which channels of a layer's input are zero throughout, shape (channels,)."""
    return value.detach().movedim(_channel_dim(module, value), 0).flatten(1).abs().amax(1) == 0


def probe(model: nn.Module, call: Call, removed: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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


def outputs(
    model: nn.Module, call: Call, unheard: Mapping[str, Tensor], unread: Mapping[str, Tensor]
) -> list[tuple[str, Tensor]]:
    """Run the model, with some channels silent, and return each layer's outputs in the order they run.

    Args:
        model: Left as found.
        call: What it is called with.
        unheard: Layer name to the mask of outputs that are silent.
        unread: Layer name to the mask of inputs that are silent.
    """
    found: list[tuple[str, Tensor]] = []
    whole: list[tuple[Tensor, Tensor]] = []

    def silence(module: nn.Module, args: Any, output: Tensor, gone: Tensor) -> Tensor:
        dim = _channel_dim(module, output)
        return output.masked_fill(
            gone.to(output.device).view([-1 if d == dim else 1 for d in range(output.dim())]), 0.0
        )

    def leave(module: nn.Module, args: tuple[Tensor, ...], gone: Tensor) -> tuple[Tensor, ...]:
        return (args[0].masked_fill(gone.to(args[0].device), 0.0), *args[1:])

    def note(module: nn.Module, args: Any, output: Tensor, name: str) -> None:
        found.append((name, output))

    with undisturbed(model), torch.no_grad():
        for name, module in model.named_modules():
            if name in unread and isinstance(module, NonDynamicallyQuantizableLinear):
                # torch's attention takes its weight and does not call it: what reads the silent ones is zero instead
                weight = module.weight
                whole.append((weight, weight.data))
                weight.data = weight.data.masked_fill(unread[name].to(weight.device), 0.0)
            elif name in unread:
                module.register_forward_pre_hook(partial(leave, gone=unread[name]))
            if name in unheard:
                module.register_forward_hook(partial(silence, gone=unheard[name]))
            if mixes_channels(module):
                module.register_forward_hook(partial(note, name=name))
        try:
            output = _run(model, call, "with its channels silenced")
        finally:
            for weight, data in whole:
                weight.data = data
    return found + [("", tensor) for tensor in tensors_in(output)]


def compare(model: nn.Module, call: Call, wanted: list[tuple[str, Tensor]] | None, kept: Mapping[str, Tensor]) -> None:
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
    found += [("", tensor) for tensor in tensors_in(output)]
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


def training_error(model: nn.Module, call: Call) -> Exception | None:
    """Run the model in training mode, for branches that only training enters, and return what it raised."""
    with undisturbed(model), torch.no_grad():
        model.train()
        try:
            model(*call.args, **call.kwargs)
        except Exception as error:
            return error
    return None
