"""Everything that runs the model to learn what a cut may do, and whether it did it: silence, outputs, training mode."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from earlybird.calls import Call, tensors_in, undisturbed
from earlybird.errors import ShrinkError
from earlybird.tickets.layers import BatchNorm, channel_dim, is_depthwise, is_norm, mixes_channels, set_width

# Name of a parameter or buffer that belongs to no layer to the dimension of its channels and which of them are meant.
BareMasks = Mapping[str, tuple[int, Tensor]]


def _tensor_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _is_zero(module: nn.Module, value: Tensor) -> Tensor:
    """Return which channels of a layer's input are zero throughout, shape (channels,)."""
    return value.detach().movedim(channel_dim(module, value.shape), 0).flatten(1).abs().amax(1) == 0


def probe(
    model: nn.Module, call: Call, removed: Mapping[str, Tensor], bare: BareMasks
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Find what only ever sees zeros when the ticket's removed units are silent.

    Parameters of no layer that only they have (``bare``) are silent with them. Every layer's output is replaced: by
    zeros where it is silent, by random numbers elsewhere. They are of one sign, so that no difference of two cancels,
    and the run is made with either sign, so that no ReLU hides a live channel.

    Returns:
        For each layer that reads channels, the mask of inputs that are always zero; and for each norm and depthwise
        convolution that the ticket does not name, the mask of channels that only removed units feed. Of shape
        (channels,).
    """
    silent: dict[str, Tensor] = {}
    carried: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    sign = 1.0

    def read(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        zero = _is_zero(module, _tensor_of(args, kwargs)).cpu()
        silent[name] = silent.get(name, torch.ones_like(zero)) & zero

    def write(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        dim = channel_dim(module, output.shape)
        live = sign * (torch.rand(output.shape[dim], generator=generator).to(output) + 0.5)
        if name in removed:
            live = live.masked_fill(removed[name].to(output.device), 0.0)
        elif _passes_silence(module):
            nothing = _is_zero(module, _tensor_of(args, kwargs))
            live = live.masked_fill(nothing, 0.0)
            if is_norm(module) or is_depthwise(module):
                carried[name] = carried.get(name, torch.ones_like(nothing).cpu()) & nothing.cpu()
        return live.view([-1 if d == dim else 1 for d in range(output.dim())]).expand_as(output).clone()

    for sign in (1.0, -1.0):  # noqa: B007  # read by `write`
        with undisturbed(model), torch.no_grad(), _without(model, bare):
            for name, module in model.named_modules():
                if mixes_channels(module):
                    module.register_forward_pre_hook(partial(read, name), with_kwargs=True)
                if mixes_channels(module) or is_depthwise(module) or is_norm(module):
                    module.register_forward_hook(partial(write, name), with_kwargs=True)
            _run(model, call, "with its channels probed")
    return silent, {name: mask for name, mask in carried.items() if mask.any()}


def _passes_silence(module: nn.Module) -> bool:
    """Whether a channel that is zero throughout leaves the layer as zero, or can be made to by zero scale and shift."""
    if isinstance(module, BatchNorm):
        return module.weight is not None
    return is_norm(module) or is_depthwise(module)


def _run(model: nn.Module, call: Call, how: str) -> Any:
    try:
        return model(*call.args, **call.kwargs)
    except Exception as error:
        raise ShrinkError(
            f"{type(model).__name__} does not run {how}: {type(error).__name__}: {error}", hint="nothing was changed"
        ) from error


@contextmanager
def _without(model: nn.Module, bare: BareMasks) -> Iterator[None]:
    """Let parameters and buffers be zero in some places."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    before = {name: tensors[name].data for name in bare}
    try:
        for name, (dim, mask) in bare.items():
            places = mask.nonzero().flatten().to(before[name].device)
            tensors[name].data = before[name].index_fill(dim, places, 0.0)
        yield
    finally:
        for name, data in before.items():
            tensors[name].data = data


def outputs(
    model: nn.Module,
    call: Call,
    unheard: Mapping[str, Tensor],
    unread: Mapping[str, Tensor],
    bare: BareMasks,
    normed: Mapping[str, Tensor],
) -> list[tuple[str, Tensor]]:
    """Run the model with some channels silent, and return each layer's outputs in the order they run.

    Args:
        model: The model, not yet cut; it is left as found.
        call: What it runs on.
        unheard: Layer name to the mask of silent channels of its output.
        unread: Layer name to the mask of silent channels of its input.
        bare: Parameters and buffers that are silent in places.
        normed: Names of group and layer norms to the channels that they take their statistics over.
    """
    found: list[tuple[str, Tensor]] = []
    whole: list[tuple[Tensor, Tensor]] = []

    def silence(module: nn.Module, args: Any, output: Tensor, gone: Tensor) -> Tensor:
        dim = channel_dim(module, output.shape)
        return output.masked_fill(
            gone.to(output.device).view([-1 if d == dim else 1 for d in range(output.dim())]), 0.0
        )

    def leave(module: nn.Module, args: tuple[Tensor, ...], gone: Tensor) -> tuple[Tensor, ...]:
        return (args[0].masked_fill(gone.to(args[0].device), 0.0), *args[1:])

    def note(module: nn.Module, args: Any, output: Tensor, name: str) -> None:
        found.append((name, output))

    with undisturbed(model), torch.no_grad(), _without(model, bare):
        for name, module in model.named_modules():
            if name in normed:
                module.register_forward_hook(partial(_renormed, keep=normed[name]), with_kwargs=True)
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


def _renormed(module: nn.Module, args: Any, kwargs: Any, output: Tensor, keep: Tensor) -> Tensor:
    """Return what a group or layer norm gives for some of its channels alone, zero in the others."""
    dim, keep = channel_dim(module, output.shape), keep.to(output.device)
    # the norm's own forward: it may be a subclass that permutes, or adds an activation
    inner = copy.copy(module)
    inner._parameters = {
        key: None if value is None else nn.Parameter(value[keep], requires_grad=False)
        for key, value in module._parameters.items()
    }
    set_width(inner, "both", len(keep))
    inner._forward_hooks = OrderedDict()
    return torch.zeros_like(output).index_copy(dim, keep, inner(_tensor_of(args, kwargs).index_select(dim, keep)))


def compare(model: nn.Module, call: Call, wanted: list[tuple[str, Tensor]], kept: Mapping[str, Tensor]) -> None:
    """Run the cut model and raise, naming the layer, where it breaks or its outputs differ from the masked model's."""
    last = ""

    def enter(name: str) -> None:
        nonlocal last
        last = name

    found: list[tuple[str, Tensor]] = []
    noted = {name for name, _ in wanted if name}  # a grouped convolution may have become a depthwise one by the cut
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
    found += [("", tensor) for tensor in tensors_in(output)]
    modules = dict(model.named_modules())
    before = "the input"
    for (name, value), (other, reference) in zip(found, wanted, strict=True):
        if name in kept:
            reference = reference.index_select(
                channel_dim(modules[name], reference.shape), kept[name].to(reference.device)
            )
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
