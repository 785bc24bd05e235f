"""Heads and neurons: the units of transformers that can go without touching the hidden width.

A *head* writes its stretch of the queries, keys and values and is read by the columns of the output projection that
belong to it; where several query heads share a key and value head (grouped-query attention), the unit is the shared
head with all its query heads. A *neuron* is a row of the layer (two, where a gate multiplies) that leads into the
hidden part of a feed-forward pair, and a column of the layer that leads out. A unit without its columns is not heard by
anybody, so the cut is exact, and needs no trace of the graph: the names below say where everything is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from earlybird.errors import InputError, nearest
from earlybird.tickets.attention import PrunedAttention
from earlybird.tickets.layers import Side, layer_of, width
from earlybird.tickets.ticket import Ticket

Kind = Literal["head", "neuron"]
# Layer (or bare parameter) name, side, and for bare parameters the dimension.
CutKey = tuple[str, Side, int | None]
KINDS: tuple[Kind, ...] = ("head", "neuron")


@dataclass(frozen=True)
class Convention:
    """How one family of models names its parts; all names are relative to the module that owns the units.

    Attributes:
        kind: Of the units.
        writes: Layers or parameters that hold rows of the units, and how many stretches of all units lie one after
            another in each (a fused projection of queries, keys and values has three). Of parameters, some may be None.
        reads: The layer whose input the units are.
        each: Parameters with one entry a unit in their last dimension, where there are such.
    """

    kind: Kind
    writes: tuple[tuple[str, int], ...]
    reads: str
    each: tuple[str, ...] = ()


def _apart(*names: str) -> tuple[tuple[str, int], ...]:
    return tuple((name, 1) for name in names)


# Of each kind, the first that fits a module holds.
CONVENTIONS = (
    Convention("head", _apart("self.query", "self.key", "self.value"), "output.dense"),  # BERT, RoBERTa
    Convention(  # Llama, Mistral, Qwen, ViT, DeiT, Swin
        "head", _apart("q_proj", "k_proj", "v_proj"), "o_proj", ("relative_position_bias.relative_position_bias_table",)
    ),
    Convention("head", _apart("q_proj", "k_proj", "v_proj"), "out_proj"),  # BART, OPT, CLIP
    Convention("head", _apart("q_lin", "k_lin", "v_lin"), "out_lin"),  # DistilBERT
    Convention("head", (("q_attn", 1), ("c_attn", 2)), "c_proj"),  # GPT-2, cross-attention
    Convention("head", (("c_attn", 3),), "c_proj"),  # GPT-2
    Convention(  # torch.nn.MultiheadAttention
        "head",
        (
            ("in_proj_weight", 3), ("in_proj_bias", 3),
            *_apart("q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v"),
        ),
        "out_proj",
    ),
    Convention("neuron", _apart("intermediate.dense"), "output.dense"),  # BERT, RoBERTa
    Convention("neuron", _apart("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen
    Convention("neuron", (("gate_up_proj", 2),), "down_proj"),  # Phi-3
    Convention("neuron", _apart("fc1"), "fc2"),  # ViT, DeiT, Swin, BART, OPT, CLIP
    Convention("neuron", _apart("lin1"), "lin2"),  # DistilBERT
    Convention("neuron", _apart("c_fc"), "c_proj"),  # GPT-2
    Convention("neuron", _apart("linear1"), "linear2"),  # torch.nn.TransformerEncoderLayer and TransformerDecoderLayer
)  # fmt: skip
# Attributes with the numbers in one head, and those in proportion to the number of heads.
_HEAD_SIZES = ("attention_head_size", "head_dim")
_IN_PROPORTION = (
    "num_attention_heads", "num_heads", "n_heads", "n_head", "num_key_value_heads", "all_head_size", "split_size",
)  # fmt: skip


@dataclass(frozen=True)
class Units:
    """The heads of one attention module, or the neurons of one feed-forward pair.

    Attributes:
        name: Of the attention module; of the first layer of the pair.
        kind: What they are.
        count: How many.
        writes: Layer, or parameter and dimension, to the stretches in it (see `Convention`).
        reads: Name of the layer whose input they are.
        sizes: Module and attribute to a number in proportion to ``count``.
        attention: The module is torch's own attention, whose forward pass cannot do without a head.
    """

    name: str
    kind: Kind
    count: int
    writes: Mapping[tuple[str, int | None], int]
    reads: str
    sizes: Mapping[tuple[str, str], int]
    attention: bool = False


def find_units(model: nn.Module) -> dict[str, Units]:
    """Return all heads and neurons of ``model`` that can be cut, by the name that they have in a ticket.

    Args:
        model: Any module; what it is made of is recognised by the names of its parts (`CONVENTIONS`).
    """
    found: dict[str, Units] = {}
    for name, module in model.named_modules():
        for kind in KINDS:
            units = next((u for c in CONVENTIONS if c.kind == kind and (u := _fit(c, name, module)) is not None), None)
            if units is not None:
                found[units.name] = units
    return found


def _fit(convention: Convention, name: str, module: nn.Module) -> Units | None:
    """Return the units of ``module`` where the convention fits it."""
    reads = _part(module, convention.reads)
    own = [(path, parts, _part(module, path)) for path, parts in convention.writes]
    if any(isinstance(part, nn.Parameter) for _, _, part in own):
        own = [found for found in own if found[2] is not None]
    if not isinstance(reads, nn.Module) or width(reads, "in") is None or not own:
        return None
    writes: dict[tuple[str, int | None], int] = {}
    stretches = []  # how many numbers all units have in each
    for path, parts, part in own:
        if part is None:
            return None
        dim: int | None = None
        if isinstance(part, nn.Parameter):
            dim = 2 if part.dim() == 3 else 0  # bias_k and bias_v are (1, 1, E)
            extent: int | None = part.shape[dim]
        else:
            extent = width(part)
        if extent is None or extent % parts:
            return None
        writes[_join(name, path), dim] = parts
        stretches.append(extent // parts)
    if max(stretches) != width(reads, "in"):
        return None
    first = convention.writes[0][0]
    if convention.kind == "neuron":
        return Units(_join(name, first), "neuron", stretches[0], writes, _join(name, convention.reads), {})
    holder_path = first.rpartition(".")[0]
    holder = module.get_submodule(holder_path)
    head_size = next((getattr(holder, size) for size in _HEAD_SIZES if hasattr(holder, size)), None)
    if not isinstance(head_size, int) or any(stretch % head_size for stretch in stretches):
        return None
    count = min(stretches) // head_size
    if any(stretch % (count * head_size) for stretch in stretches):
        return None
    sizes = {
        (_join(name, holder_path), attribute): getattr(holder, attribute)
        for attribute in _IN_PROPORTION
        if isinstance(getattr(holder, attribute, None), int)
    }
    for path in convention.each:
        part = _part(module, path)
        if isinstance(part, nn.Parameter):
            writes[_join(name, path), part.dim() - 1] = 1
    attention = isinstance(module, nn.MultiheadAttention)
    return Units(name, "head", count, writes, _join(name, convention.reads), sizes, attention)


def _part(module: nn.Module, path: str) -> nn.Module | nn.Parameter | None:
    """Return the layer that can be cut, or the parameter, at ``path`` below ``module``."""
    *parents, last = path.split(".")
    for parent in parents:
        inner = module._modules.get(parent)
        if inner is None:
            return None
        module = inner
    found = module._modules.get(last)
    if found is not None:
        return found if layer_of(found) is not None else None
    return module._parameters.get(last)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def units_of(ticket: Ticket, model: nn.Module) -> dict[str, tuple[Units, Tensor]]:
    """Return the heads and neurons that ``ticket`` names, each with the mask of those that go, shape (count,).

    Raises:
        InputError: The model does not have them, has another number of them, or would keep none.
    """
    named = {name: mask for name, mask in ticket.masks.items() if ticket.kinds[name] in KINDS}
    found = find_units(model) if named else {}
    chosen = {}
    for name, mask in named.items():
        units, kind = found.get(name), ticket.kinds[name]
        if units is None or units.kind != kind:
            known = [other for other, one in found.items() if one.kind == kind]
            raise InputError(
                f"the ticket names units of kind '{kind}' of '{name}', which the model does not have",
                hint=nearest(name, known, "use the ticket's own model; earlybird.tickets.units.find_units lists them"),
            )
        if units.count != mask.numel():
            raise InputError(f"the ticket has {mask.numel()} {kind}s for '{name}', the model {units.count}")
        if not mask.any():
            raise InputError(
                f"the ticket removes every {kind} of '{name}'",
                needed="at least one in each layer", hint="earlybird.draw_units keeps one; nothing was changed",
            )  # fmt: skip
        chosen[name] = units, ~mask
    return chosen


def cuts_of(units: Units, gone: Tensor, model: nn.Module) -> dict[CutKey, Tensor]:
    """Return what goes with the units in ``gone``, shape (count,), of each layer and parameter, as a `Plan` has it."""
    cuts: dict[CutKey, Tensor] = {}
    for (name, dim), parts in units.writes.items():
        extent = width(model.get_submodule(name)) if dim is None else model.get_parameter(name).shape[dim]
        assert extent is not None  # _fit has seen it
        cuts[name, "out" if dim is None else "both", dim] = _spread(gone, extent, parts)
    cuts[units.reads, "in", None] = inputs_of(units, gone, model)
    return cuts


def inputs_of(units: Units, values: Tensor, model: nn.Module) -> Tensor:
    """Return one value a unit, ``values`` of shape (count,), as one an input of the layer that reads them."""
    extent = width(model.get_submodule(units.reads), "in")
    assert extent is not None
    return _spread(values, extent, 1)


def _spread(values: Tensor, extent: int, parts: int) -> Tensor:
    return values.repeat_interleave(extent // (parts * values.numel())).repeat(parts)


def attributes_of(units: Units, gone: Tensor, model: nn.Module) -> dict[tuple[str, str], object]:
    """Return module and attribute to what the attribute has to be once the units in ``gone`` are cut."""
    kept = int((~gone).sum())
    changed: dict[tuple[str, str], object] = {key: size * kept // units.count for key, size in units.sizes.items()}
    if units.attention and kept < units.count:
        changed |= {
            (units.name, "__class__"): PrunedAttention,
            # the fused kernels of eval mode take every width from the input: with this they are left alone
            (units.name, "_qkv_same_embed_dim"): False,
        }
        for name, module in model.named_modules():
            if isinstance(module, nn.TransformerEncoder) and units.name.startswith(_join(name, "layers.")):
                changed[name, "use_nested_tensor"] = False  # it feeds those kernels
    return changed


def score_units(model: nn.Module, score: str, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Return what each head and neuron is worth: name to ``(count,)``.

    - ``'magnitude'``: the root mean square of all weights that belong to a unit, over the mean of its layer;
    - ``'taylor'``: what the loss would change, to first order, if the unit fell silent, ``|sum W * dL/dW|`` over its
      columns of the output layer: the gate of Molchanov et al., arXiv 1906.10771, and of Michel et al., arXiv
      1905.10650 (there the mean of each sample's absolute value), from the gradients at hand; a layer's over its norm;
    - ``'random'``: the control.

    Args:
        model: Any module with heads or neurons.
        score: One of the three.
        generator: For ``'random'``.

    Raises:
        InputError: There are no heads and neurons, no gradients, or no such score.
    """
    found = find_units(model)
    if not found:
        raise InputError(
            f"{type(model).__name__} has no attention heads and no feed-forward neurons that are known by their names",
            needed="parts named as in earlybird.tickets.units.CONVENTIONS", hint="eb.draw is for channels",
        )  # fmt: skip
    if score == "random":
        if generator is None:
            raise InputError("score='random' needs a generator", hint="pass generator=torch.Generator().manual_seed(0)")
        return {name: torch.rand(units.count, generator=generator) for name, units in found.items()}
    if score == "magnitude":
        return {name: _magnitude(units, model) for name, units in found.items()}
    if score != "taylor":
        raise InputError(f"unknown score '{score}'", needed="one of magnitude, taylor, random")
    scores = {}
    for name, units in found.items():
        change = first_order(units, model)
        if change is None:
            raise InputError(
                f"layer '{units.reads}' has no gradient", needed="gradients for score='taylor'",
                hint="call loss.backward() before, or use score='magnitude'",
            )  # fmt: skip
        scores[name] = change.abs() / change.norm().clamp_min(torch.finfo(change.dtype).tiny)
    return scores


def read_weight(units: Units, model: nn.Module) -> tuple[nn.Parameter, int]:
    """Return the weight that reads the units, and the dimension in which their columns lie.

    Raises:
        InputError: It is computed from other parameters.
    """
    layer = model.get_submodule(units.reads)
    where = layer_of(layer)
    assert where is not None
    (name, dim), *others = where.reads
    weight = layer._parameters.get(name)
    if weight is None or others:
        raise InputError(
            f"the weight of layer '{units.reads}' is computed from other parameters, so its units cannot be scored",
            hint="remove the reparametrisation first",
        )
    return weight, dim % weight.dim()


@torch.no_grad()
def first_order(units: Units, model: nn.Module) -> Tensor | None:
    """Return ``sum W * dL/dW`` over the columns of each unit, float32 of shape (count,); None without a gradient.

    It is the gradient of the loss with respect to a factor on the unit's output, where that factor is 1.
    """
    weight, dim = read_weight(units, model)
    if weight.grad is None:
        return None
    columns = (weight.detach().float() * weight.grad.float()).movedim(dim, 0).flatten(1).sum(1)
    return columns.view(units.count, -1).sum(1)


def _magnitude(units: Units, model: nn.Module) -> Tensor:
    weight, at = read_weight(units, model)
    everything = [(weight, at, 1)]
    for (name, dim), parts in units.writes.items():
        if dim is not None:
            alone = model.get_parameter(name)
            everything += [(alone, dim, parts)] if alone.dim() > 1 else []
            continue
        layer = model.get_submodule(name)
        rows = layer_of(layer)
        assert rows is not None
        everything += [
            (parameter, at % parameter.dim(), parts)
            for own, at in rows.writes
            if own != "bias" and (parameter := layer._parameters.get(own)) is not None
        ]
    total, size = torch.zeros(units.count, device=weight.device), 0
    for parameter, dim, parts in everything:
        squares = parameter.detach().float().pow(2).movedim(dim, 0).flatten(1).sum(1)
        total += squares.view(parts, units.count, -1).sum((0, 2))
        size += parameter.numel() // units.count
    norm = (total / size).sqrt()
    return norm / norm.mean().clamp_min(torch.finfo(norm.dtype).tiny)
