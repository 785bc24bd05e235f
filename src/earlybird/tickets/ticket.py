"""The ticket: which units of a network stay.

A ticket names boolean masks over *units* (output channels, attention heads, feed-forward neurons, single weights),
says what kind each mask is, and where it came from. It is immutable, small (a bit a unit, also on disk), and, with the
original model definition, enough to rebuild the shrunk network. Units that are single weights can be masked
(`earlybird.sparse.masks`), but nothing can be shrunk to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from earlybird.errors import InputError
from earlybird.files import read_tensors, write_tensors

FORMAT = "earlybird-ticket-2"
_BYTE_A_UNIT = "earlybird-ticket-1"
"""What was written before masks were packed into bits; is read."""


class Ticket:
    """Named boolean masks over units; ``True`` stays.

    Args:
        masks: Layer name (as in ``model.named_modules()``) to mask, shape ``(units,)``; over single weights, shaped as
            the layer's weight. Copied to the CPU.
        kinds: Layer name to the kind of its units; ``'channel'`` where not given. ``'weight'``: single weights.
        provenance: How the ticket was drawn (method, keep ratio, step, ...); anything JSON can hold.

    Raises:
        InputError: A mask is not boolean, not one-dimensional (unless over weights), or is empty.
    """

    __slots__ = ("_kinds", "_masks", "_provenance")

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        kinds: Mapping[str, str] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        copied: dict[str, Tensor] = {}
        for name, mask in masks.items():
            weights = (kinds or {}).get(name) == "weight"
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.numel() == 0 or mask.dim() == 0:
                found = (
                    f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                )
            else:
                found = "" if mask.dim() == 1 or weights else f"boolean of shape {tuple(mask.shape)}"
            if found:
                needed = "shaped as the layer's weight" if weights else "of shape (units,)"
                raise InputError(f"mask of '{name}' is {found}", needed=f"a boolean tensor {needed}")
            copied[name] = mask.detach().cpu().clone()
        if not copied:
            raise InputError("a ticket without any mask", needed="at least one named mask")
        unknown = set(kinds or ()) - set(copied)
        if unknown:
            raise InputError(f"kinds name layers without a mask: {', '.join(sorted(unknown))}")
        self._masks = MappingProxyType(copied)
        self._kinds = MappingProxyType({name: (kinds or {}).get(name, "channel") for name in copied})
        # a round trip through JSON, so that what is read back equals what was put in
        try:
            self._provenance = MappingProxyType(json.loads(json.dumps(dict(provenance or {}))))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"provenance cannot be written as JSON ({error})", needed="numbers, text, lists"
            ) from error

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Layer name to boolean mask; copies, since a ticket does not change."""
        return MappingProxyType({name: mask.clone() for name, mask in self._masks.items()})

    @property
    def kinds(self) -> Mapping[str, str]:
        """Layer name to the kind of its units."""
        return self._kinds

    @property
    def over_weights(self) -> bool:
        """Whether the units, or some of them, are single weights: these can be masked, and not cut."""
        return "weight" in self._kinds.values()

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the ticket came from."""
        return self._provenance

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Layer name to ``(kept, all)`` units."""
        return {name: (int(mask.sum()), mask.numel()) for name, mask in self._masks.items()}

    @property
    def keep(self) -> float:
        """Share of all units that stays, 0 to 1."""
        kept, total = map(sum, zip(*self.widths.values()))
        return kept / total

    def without(self, layer: str) -> Ticket:
        """Return the ticket without the mask of one layer, if it has one."""
        masks = {name: mask for name, mask in self._masks.items() if name != layer}
        return Ticket(masks, {name: self._kinds[name] for name in masks}, self._provenance)

    def distance(self, other: Ticket) -> float:
        """Return the normalised Hamming distance: the share of units on which the two tickets differ, 0 to 1.

        Source: You et al., Drawing Early-Bird Tickets, arXiv 1909.11957, section 3.

        Raises:
            InputError: The tickets are not over the same units.
        """
        mine, theirs = ({n: tuple(m.shape) for n, m in ticket._masks.items()} for ticket in (self, other))
        if mine != theirs:
            different = sorted(set(mine.items()) ^ set(theirs.items()))[0][0]
            raise InputError(f"tickets over different units, first at '{different}'", needed="tickets of one model")
        differ = sum(int((mask ^ other._masks[name]).sum()) for name, mask in self._masks.items())
        return differ / sum(math.prod(shape) for shape in mine.values())

    def save(self, path: str | Path) -> Path:
        """Write the ticket as safetensors, atomically; masks packed eight to a byte, the rest as metadata."""
        about = {
            "format": FORMAT,
            "shapes": {name: list(mask.shape) for name, mask in self._masks.items()},
            "kinds": dict(self._kinds),
            "provenance": dict(self._provenance),
        }
        # one key only: safetensors writes several in random order, and equal tickets should give equal files
        return write_tensors(path, {n: packed(mask) for n, mask in self._masks.items()}, {"ticket": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Ticket:
        """Read a ticket written by `save`.

        Raises:
            InputError: The file is missing, damaged, of a later version, or something else than a ticket.
        """
        tensors, metadata = read_tensors(path)
        try:
            about = json.loads(metadata["ticket"]) if "ticket" in metadata else _first_version(metadata)
            version = str(about.get("format", ""))
            if version == _BYTE_A_UNIT:
                return cls(
                    {name: tensors[name].to(torch.bool) for name in about["order"]}, about["kinds"], about["provenance"]
                )
            if version == FORMAT:
                masks = {name: unpacked(tensors[name], shape) for name, shape in about["shapes"].items()}
                return cls(masks, about["kinds"], about["provenance"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is a damaged ticket ({type(error).__name__}: {error})") from error
        what = "is a ticket of another version" if version.startswith("earlybird-ticket-") else "is not a ticket"
        raise InputError(f"{path} {what} (format {version!r})", needed=f"a file of format {FORMAT}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ticket):
            return NotImplemented
        return (
            list(self._masks) == list(other._masks)
            and self._kinds == other._kinds
            and all(torch.equal(mask, other._masks[name]) for name, mask in self._masks.items())
        )

    def __hash__(self) -> int:
        return hash(tuple((name, packed(mask).numpy().tobytes()) for name, mask in self._masks.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Ticket, (dict(self._masks), dict(self._kinds), dict(self._provenance))

    def __repr__(self) -> str:
        kept, total = map(sum, zip(*self.widths.values()))
        return f"Ticket({kept} of {total} units in {len(self._masks)} layers, keep={self.keep:.3f})"


def round_files(run: Path) -> dict[int, Path]:
    """Return the ticket file of each round that a run's folder holds, by its number, in their order."""
    found = {}
    for path in (run / "tickets").glob("round-*.safetensors"):
        number = path.stem.removeprefix("round-")
        if number.isdigit():
            found[int(number)] = path
    return dict(sorted(found.items()))


def _first_version(metadata: Mapping[str, str]) -> dict[str, Any]:
    return {name: text if name == "format" else json.loads(text) for name, text in metadata.items()}


def packed(mask: Tensor) -> Tensor:
    """Return a boolean mask of any shape as uint8 ``(ceil(units / 8),)``, on the CPU."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpacked(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the mask that `packed` was given.

    Raises:
        ValueError: There are not as many bytes as the shape needs.
    """
    units = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != -(-units // 8):
        raise ValueError(f"{packed.numel()} bytes for a mask of shape {tuple(shape)}")
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=units).astype(bool)).reshape(shape)
