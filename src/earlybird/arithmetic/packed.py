"""Weights of shift layers as they would be stored: a sign and an exponent, five bits each, bit after bit.

The code of a weight of ``b`` bits, 5 by default:

    highest bit       1 for a negative weight
    other b - 1 bits  e, the weight being +-2^-e

Forms 'ps' and 'frozen' have exponents down to -(2^(b-1) - 2) and zeros: e = 2^(b-1) - 1 with the highest bit 0 is zero.
Form 'q' has no zeros, and that e is its smallest exponent. Codes follow each other in the order of the flat weight, the
lowest bit first; eight codes of five bits are five bytes. What is written is read back exactly: the weights, not what
they were rounded from, so that training goes on from the rounded ones.

Elhoushi et al., DeepShift, https://arxiv.org/abs/1905.13298, state the bits; this code of them is ours.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from earlybird.arithmetic.shift import ShiftConv2d, ShiftLayer, ShiftLinear, power_of_two, weight_parameters
from earlybird.errors import InputError
from earlybird.files import read_tensors, write_tensors

__all__ = ["decode", "encode", "pack", "read_packed", "unpack", "write_packed"]

FORMAT = "earlybird-shifts-1"


def encode(weight: Tensor, bits: int = 5, *, zeros: bool = True) -> Tensor:
    """Return the code of each weight.

    Args:
        weight: Powers of two with a sign, or zero, of any shape.
        bits: Of a code.
        zeros: Whether the last exponent stands for zero (all forms but 'q').

    Returns:
        uint8 of the same shape.

    Raises:
        InputError: Some weight has no code.
    """
    last = 2 ** (bits - 1) - 1
    distance = 127 - (weight.float().abs().view(torch.int32) >> 23)  # what a float32 says of its exponent
    inside = (distance >= 0) & (distance <= last - zeros)
    if zeros:
        distance = torch.where(weight == 0, last, distance)
    codes = torch.where(inside | (weight == 0), distance + (weight < 0) * (last + 1), 0)
    wrong = weight[decode(codes, bits, zeros=zeros) != weight.float()]
    if wrong.numel():
        raise InputError(
            f"{wrong.numel()} weights, such as {float(wrong[0]):g}, have no code of {bits} bits",
            needed=f"+-2^-e with e from 0 to {last - zeros}" + (", or 0" if zeros else ""),
        )
    return codes.to(torch.uint8)


def decode(codes: Tensor, bits: int = 5, *, zeros: bool = True) -> Tensor:
    """Return the weight of each code, as float32: the inverse of `encode`."""
    last = 2 ** (bits - 1) - 1
    distance, negative = codes.to(torch.int32) & last, codes.to(torch.int32) > last
    weight = power_of_two(-distance) * torch.where(negative, -1.0, 1.0)
    return weight.masked_fill((distance == last) & ~negative, 0.0) if zeros else weight


def pack(codes: Tensor, bits: int = 5) -> Tensor:
    """Return codes as bytes, bit after bit: uint8 of shape (ceil(bits * number of codes / 8),)."""
    places = torch.arange(bits, device=codes.device)
    stream = (codes.flatten().to(torch.int32)[:, None] >> places & 1).flatten()
    stream = nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack(data: Tensor, count: int, bits: int = 5) -> Tensor:
    """Return ``count`` codes, uint8 of shape (count,): the inverse of `pack`.

    Raises:
        InputError: There are not as many bytes as these codes take.
    """
    if data.dtype != torch.uint8 or data.numel() != -(-bits * count // 8):
        raise InputError(
            f"{data.numel()} numbers of {data.dtype}", needed=f"{-(-bits * count // 8)} bytes, for {count} codes"
        )
    stream = (data.to(torch.int32)[:, None] >> torch.arange(8, device=data.device) & 1).flatten()[: bits * count]
    return (stream.view(count, bits) << torch.arange(bits, device=data.device)).sum(1).to(torch.uint8)


def write_packed(model: nn.Module, path: str | Path) -> Path:
    """Write parameters and buffers of ``model`` as one safetensors file, with weights of shift layers packed.

    A shift layer's weight is stored as ``NAME.weight``; the metadata says its shape, its bits and whether it has zeros.

    Raises:
        InputError: The model has no shift layer, or a weight of form 'q' is zero (a silenced channel).
    """
    layers = _shift_layers(model)
    tensors = dict(model.state_dict())
    about = {}
    for name, layer in layers.items():
        for own in weight_parameters(layer):
            del tensors[_inside(name, own)]
        weight, zeros = layer.weight.detach(), layer.form != "q"
        try:
            tensors[_inside(name, "weight")] = pack(encode(weight, layer.bits, zeros=zeros), layer.bits)
        except InputError as error:
            raise InputError(f"layer '{name}': {error.found}", needed=error.needed) from error
        about[name] = {"shape": list(weight.shape), "bits": layer.bits, "zeros": zeros}
    return write_tensors(path, tensors, {"format": FORMAT, "shifts": json.dumps(about)})


def read_packed(model: nn.Module, path: str | Path) -> None:
    """Load what `write_packed` wrote into a model of the same shape; its weights are then the same to the bit.

    Raises:
        InputError: The file is of another kind or damaged, or belongs to another model.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} holds no packed shifts (format {metadata.get('format')!r})", needed=FORMAT)
    layers = _shift_layers(model)
    about = json.loads(metadata["shifts"])
    mine = {
        name: {"shape": list(layer.weight.shape), "bits": layer.bits, "zeros": layer.form != "q"}
        for name, layer in layers.items()
    }
    if about != mine:
        other = next(name for name in (*about, *mine) if about.get(name) != mine.get(name))
        raise InputError(
            f"shift layer '{other}' is {about.get(other, 'not there')} in {path}, and {mine.get(other, 'not there')} "
            "in the model"
        )  # fmt: skip
    for name, layer in layers.items():
        data = tensors.pop(_inside(name, "weight"))
        shape, bits, zeros = layer.weight.shape, layer.bits, layer.form != "q"
        codes = unpack(data, shape.numel(), bits).view(shape)
        weight = decode(codes, bits, zeros=zeros)
        if zeros:
            exponent = codes.float() % 2 ** (bits - 1)
            tensors |= {_inside(name, "shift"): -exponent, _inside(name, "sign"): weight.sign()}
        else:
            tensors[_inside(name, "real")] = weight
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path} does not fit {type(model).__name__} ({reason})") from error


def _shift_layers(model: nn.Module) -> dict[str, ShiftLayer]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, (ShiftConv2d, ShiftLinear))}
    if not found:
        raise InputError(f"{type(model).__name__} has no shift layer", hint="see earlybird.arithmetic.convert")
    return found


def _inside(name: str, own: str) -> str:
    return f"{name}.{own}" if name else own
