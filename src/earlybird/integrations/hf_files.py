"""Folders of Hugging Face models that were shrunk: the ticket travels in ``config.json``.

transformers builds a model from its config, and its configs have one number of heads and one of neurons for all layers.
Where all layers keep equally many, and the config can say so (heads need a ``head_dim`` of their own, as Llama's have
it), it does, and the model is a plain one, for whoever reads such folders. Else the keys of the config go on saying
what the model was built with, and one key more says what is left of it:

    "earlybird_ticket": {"bert.encoder.layer.0.attention": {"kind": "head", "kept": 3, "of": 4, "mask": "1011"}, ...}

`earlybird.shrink` writes it, ``save_pretrained`` and Trainer checkpoints take it along, and `load` cuts the model down
while ``from_pretrained`` builds it, before the weights are read. Plain ``from_pretrained`` refuses a folder with such a
key, since the shapes of the weights do not fit.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from earlybird.errors import InputError, nearest
from earlybird.tickets.shrink import cut_to_shape
from earlybird.tickets.ticket import Ticket
from earlybird.tickets.units import KINDS, find_units

__all__ = ["load", "record", "ticket_of"]

KEY = "earlybird_ticket"
# What configs call the number of neurons of a layer.
_NEURONS = ("intermediate_size", "n_inner", "hidden_dim")


def record(model: nn.Module, ticket: Ticket) -> None:
    """Let the config of every Hugging Face model in ``model`` say what is left: in its own words, or by the ticket.

    Masks are over the units that the config describes: of a model shrunk twice, over those before the first cut.

    Args:
        model: Has just been shrunk.
        ticket: What it was shrunk to; its channels are no part of the record.
    """
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not isinstance(module, transformers.PreTrainedModel) or name.startswith(inside or "\0"):
            continue
        prefix = f"{name}." if name else ""
        inside += (prefix,)
        before = ticket_of(module.config)
        known = {} if before is None else dict(before.masks)
        kinds = {} if before is None else dict(before.kinds)
        for own, mask in ticket.masks.items():
            if ticket.kinds[own] not in KINDS or not own.startswith(prefix):
                continue
            own = own.removeprefix(prefix)
            kinds[own] = ticket.kinds[prefix + own]
            whole = known.get(own, torch.ones_like(mask))
            known[own] = whole.masked_scatter(whole, mask)
        if _describe_plainly(module):
            module.config.__dict__.pop(KEY, None)
        elif known:
            setattr(module.config, KEY, {own: _described(kinds[own], mask) for own, mask in known.items()})


def _describe_plainly(model: transformers.PreTrainedModel) -> bool:
    """Set the numbers of heads and neurons in the model's config, if a model built from it is the one that is there."""
    counts: dict[str, set[int]] = {kind: set() for kind in KINDS}
    for units in find_units(model).values():
        counts[units.kind].add(units.count)
    if any(len(different) != 1 for different in counts.values()):
        return False
    (heads,), (neurons,) = counts["head"], counts["neuron"]
    own = model.config
    changed = {key: neurons for key in _NEURONS if hasattr(own, key)}
    shared = getattr(own, "num_key_value_heads", None)
    if hasattr(own, "head_dim"):
        changed["num_attention_heads"] = heads * own.num_attention_heads // (shared or own.num_attention_heads)
        if shared is not None:
            changed["num_key_value_heads"] = heads
    config = copy.deepcopy(own)
    for key, value in changed.items():
        setattr(config, key, value)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            twin = type(model)(config)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False  # a class that is not built from its config alone, or does not take these numbers
    if _shapes(twin) != _shapes(model):
        return False
    for key, value in changed.items():
        setattr(own, key, value)
    return True


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _described(kind: str, mask: torch.Tensor) -> dict[str, Any]:
    bits = "".join("1" if bit else "0" for bit in mask.tolist())
    return {"kind": kind, "kept": int(mask.sum()), "of": len(bits), "mask": bits}


def ticket_of(config: Any) -> Ticket | None:
    """Return the ticket that a config holds, or None.

    Raises:
        InputError: What it holds cannot be read.
    """
    described = getattr(config, KEY, None)
    if described is None:
        return None
    try:
        masks = {name: torch.tensor([int(bit) for bit in one["mask"]]).bool() for name, one in described.items()}
        return Ticket(masks, {name: one["kind"] for name, one in described.items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"'{KEY}' of the config cannot be read ({type(error).__name__}: {error})",
            needed="what earlybird.shrink wrote there",
        ) from error


def load(folder: str | Path, model_class: type[transformers.PreTrainedModel] | None = None, **options: Any) -> Any:
    """Load a model that was shrunk to heads and neurons, and saved by ``save_pretrained`` or a Trainer.

        model = load("runs/checkpoint-500")
        model = load("runs/checkpoint-500", transformers.BertModel)      # without its classifier

    Args:
        folder: Where ``config.json`` and the weights are. One of a model that was never shrunk is loaded as it is.
        model_class: A class of transformers, not of its ``Auto...``; default: the one that was saved.
        **options: Of ``from_pretrained``.

    Returns:
        The model, in eval mode, of the plain class.

    Raises:
        InputError: The class is unknown, or the ticket does not belong to the model.
    """
    kind = _saved_class(folder) if model_class is None else model_class
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise InputError(
            f"model_class is {getattr(kind, '__name__', kind)!r}",
            needed="a class of a model, such as transformers.BertForSequenceClassification",
        )

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        with torch.device("cpu"):  # where masks live, while the weights to come are on the meta device
            ticket = ticket_of(config)
            if ticket is not None:
                cut_to_shape(self, _renamed(ticket, self))

    # from_pretrained builds the class that it is called on, and then fills it: in between is where the cut belongs
    cut = type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})
    model = cut.from_pretrained(folder, **options)  # type: ignore[attr-defined]
    (model[0] if isinstance(model, tuple) else model).__class__ = kind
    return model


def _saved_class(folder: str | Path) -> Any:
    saved = (transformers.AutoConfig.from_pretrained(folder).architectures or [""])[0]
    found = getattr(transformers, saved, None)
    if found is None:
        raise InputError(
            f"{folder} holds a {saved or 'model without a name'}, which transformers {transformers.__version__} does "
            "not have",
            hint=nearest(saved, dir(transformers), "pass model_class"),
        )
    return found


def _renamed(ticket: Ticket, model: transformers.PreTrainedModel) -> Ticket:
    """Return the ticket with the names that the units have in ``model``, with or without a head on top."""
    prefix = f"{model.base_model_prefix}."
    names = {name for name, _ in model.named_modules()}

    def here(name: str) -> str:
        others = (name, name.removeprefix(prefix), prefix + name)
        known = [other for other in others if other in names]
        return known[0] if known else name

    masks = {here(name): mask for name, mask in ticket.masks.items()}
    return Ticket(masks, {here(name): kind for name, kind in ticket.kinds.items()})
