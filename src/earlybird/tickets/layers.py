"""How each type of layer holds its channels: one table, which tracing, planning and slicing all read.

A layer *writes* channels (rows of a weight), *reads* channels (columns), or does both at once: what a norm or a
depthwise convolution reads in a channel it writes in the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from earlybird.arithmetic.add import AddConv2d, AddLinear
from earlybird.arithmetic.shift import ShiftConv2d, ShiftLinear, weight_parameters

Side = Literal["out", "in", "both"]
Conv = nn.modules.conv._ConvNd
TransposedConv = nn.modules.conv._ConvTransposeNd
BatchNorm = nn.modules.batchnorm._BatchNorm
InstanceNorm = nn.modules.instancenorm._InstanceNorm


@dataclass(frozen=True)
class Layer:
    """Where the channels of one type of layer are.

    Attributes:
        writes: Parameters and the dimension of their written channels.
        reads: Parameters and the dimension of their read channels; empty when reading and writing are one.
        write_sizes: Attributes that hold the number of written channels.
        read_sizes: Attributes that hold the number of read channels.
        buffers: Buffers with one value a channel.
        channel_dim: Dimension of the channels in its output.
    """

    writes: tuple[tuple[str, int], ...]
    reads: tuple[tuple[str, int], ...] = ()
    write_sizes: tuple[str, ...] = ()
    read_sizes: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    channel_dim: int = 1

    @property
    def joint(self) -> bool:
        """Whether reading a channel is writing it."""
        return not self.reads

    def places(self, side: Side) -> tuple[tuple[str, int], ...]:
        """Return the parameters that hold the channels of one side, and their dimension there."""
        return self.reads if side == "in" and not self.joint else self.writes


_AFFINE = (("weight", 0), ("bias", 0))
_CONV = Layer(_AFFINE, (("weight", 1),), ("out_channels",), ("in_channels",))
_TRANSPOSED = Layer((("weight", 1), ("bias", 0)), (("weight", 0),), ("out_channels",), ("in_channels",))
_DEPTHWISE = Layer(_AFFINE, (), ("out_channels", "in_channels", "groups"))
_DENSE = Layer(_AFFINE, (("weight", 1),), ("out_channels",), ("in_channels",), channel_dim=-1)
# of transformers: a linear layer whose weight lies the other way round
_CONV1D = Layer((("weight", 1), ("bias", 0)), (("weight", 0),), ("nf",), ("nx",), channel_dim=-1)
_LINEAR = Layer(_AFFINE, (("weight", 1),), ("out_features",), ("in_features",), channel_dim=-1)
_RUNNING = Layer(_AFFINE, (), ("num_features",), buffers=("running_mean", "running_var"))
_GROUP_NORM = Layer(_AFFINE, (), ("num_channels",))
_LAYER_NORM = Layer((("weight", -1), ("bias", -1)), (), ("normalized_shape",), channel_dim=-1)
_PRELU = Layer((("weight", 0),), (), ("num_parameters",))
_EMBEDDING = Layer((("weight", 1),), (), ("embedding_dim",), channel_dim=-1)


def layer_of(module: nn.Module | None) -> Layer | None:
    """Return where ``module`` holds its channels, or None for a type that cannot be cut."""
    layer = _like(module)
    if layer is not None and isinstance(module, (ShiftConv2d, ShiftLinear)):
        names = weight_parameters(module)  # its weight is computed from these, which have the weight's shape
        return replace(layer, writes=_instead(names, layer.writes), reads=_instead(names, layer.reads))
    if layer is not None and isinstance(module, (AddConv2d, AddLinear)):
        return replace(layer, buffers=("constant",))
    return layer


def _instead(names: tuple[str, ...], places: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    return tuple((own, at) for name, at in places for own in (names if name == "weight" else (name,)))


def _like(module: nn.Module | None) -> Layer | None:
    if isinstance(module, Conv):
        if is_depthwise(module):
            return _DEPTHWISE
        return _TRANSPOSED if isinstance(module, TransposedConv) else _CONV
    if module is not None and _is_conv1d(module):
        return _CONV1D
    for kind, layer in (
        (nn.Linear, _LINEAR), (BatchNorm, _RUNNING), (InstanceNorm, _RUNNING), (nn.GroupNorm, _GROUP_NORM),
        (nn.LayerNorm, _LAYER_NORM), (nn.PReLU, _PRELU), (nn.Embedding, _EMBEDDING),
    ):  # fmt: skip
        if isinstance(module, kind):
            return layer
    return _DENSE if is_dense(module) else None


def is_dense(module: nn.Module | None) -> bool:
    """Whether ``module`` is a linear layer: PyTorch's, or one that others have written with the same weight."""
    if isinstance(module, nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("Linear")
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 2
        and hasattr(module, "in_channels")
        and hasattr(module, "out_channels")
    )


def is_depthwise(module: nn.Module) -> bool:
    """Whether every channel is convolved on its own."""
    return isinstance(module, Conv) and module.groups > 1 and module.groups == module.in_channels == module.out_channels


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is the ``Conv1D`` of transformers, which need not be installed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch, instance, group or layer norm."""
    return isinstance(module, (BatchNorm, InstanceNorm, nn.GroupNorm, nn.LayerNorm))


def mixes_channels(module: nn.Module) -> bool:
    """Whether each of its outputs depends on all of its inputs: a convolution (not depthwise) or a linear layer."""
    return is_dense(module) or _is_conv1d(module) or (isinstance(module, Conv) and not is_depthwise(module))


def width(module: nn.Module, side: Side = "out") -> int | None:
    """Return how many channels ``module`` writes (or reads), None for a type that cannot be cut."""
    layer = layer_of(module)
    if layer is None:
        return None
    size = getattr(module, (layer.read_sizes if side == "in" and not layer.joint else layer.write_sizes)[0])
    return int(size[-1] if isinstance(size, tuple) else size)


def channel_dim(module: nn.Module, shape: torch.Size) -> int:
    """Return the dimension of the channels in an input or output of ``module``."""
    layer = layer_of(module)
    assert layer is not None
    dim = layer.channel_dim % len(shape)
    if isinstance(module, nn.LayerNorm) and shape[dim] != (size := module.normalized_shape[-1]) and size in shape[1:]:
        return tuple(shape).index(size, 1)  # it permutes its input itself: channels come first
    return dim


def set_width(module: nn.Module, side: Side, size: int) -> None:
    """Write the new number of channels into the attributes that hold it."""
    layer = layer_of(module)
    assert layer is not None
    for name in layer.read_sizes if side == "in" else layer.write_sizes:
        old = getattr(module, name)
        if name == "num_parameters" and old == 1:  # one slope for all channels
            continue
        setattr(module, name, (*old[:-1], size) if isinstance(old, tuple) else size)


def blocks(module: nn.Module) -> int:
    """Return in how many blocks the layer's channels fall, each on its own: groups of a convolution or group norm."""
    if isinstance(module, Conv) and not is_depthwise(module):
        return module.groups
    return module.num_groups if isinstance(module, nn.GroupNorm) else 1


def fitting_multiple(widest: int, device: torch.device) -> int:
    """Return the multiple of channels that suits ``device``, for a network whose widest layer has ``widest`` channels.

    Tensor cores work on blocks of 8 channels, a CPU's vector units on 16; narrow nets would keep too much.
    """
    return 16 if widest >= 128 and device.type == "cpu" else 8 if widest >= 64 else 1
