"""Follow every channel through what a model computes, operator by operator.

Beside each tensor goes one of the same shape that says to which *unit* each of its elements belongs: which channel of
which layer must be there for the element to be there. Whatever only moves elements (views, permutations, slices,
concatenations, window partitions, channel shuffles) moves the labels with them, by the very same operator. Whatever
combines elements one by one ties their units together: they can only go together. Everything else has a rule of its
own here, and an operator without one leaves the units that reach it *fixed*: they stay, and `why` says what they met.

Labels are positive numbers of units, or

- ``FIXED``: an element that belongs to no unit, but is there in any case (an input, a layer's output nobody may cut);
- ``FREE``: an element of a tensor made up on the way (``torch.zeros``), which has the size of whatever it meets.

The units that were tied together are kept as a union-find over an array.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

FIXED, FREE = 0, -1

# larger tensors that belong to no layer (tables, banks of experts) are taken for fixed
_LARGEST = 2**19

_MOVES = {
    "_reshape_alias", "_unsafe_view", "alias", "cat", "channel_shuffle", "detach", "diagonal", "embedding", "expand",
    "flip", "gather", "im2col", "index", "index_select", "lift_fresh", "native_channel_shuffle", "permute",
    "pixel_shuffle", "pixel_unshuffle", "repeat", "reshape", "roll", "select", "slice", "split", "split_with_sizes",
    "squeeze", "stack", "t", "transpose", "unbind", "unfold", "unsafe_chunk", "unsafe_split",
    "unsafe_split_with_sizes", "unsqueeze", "view",
}  # fmt: skip
_INDEXED = {"embedding", "gather", "index", "index_select"}
_RESHAPES = {"_reshape_alias", "_unsafe_view", "reshape", "view"}
_POINTWISE = {
    "_prelu_kernel", "_to_copy", "bernoulli", "copy", "dropout", "empty_like", "fill", "full_like", "hardswish",
    "log_sigmoid_forward", "masked_fill", "native_dropout", "ones_like", "rand_like", "randn_like", "rrelu_with_noise",
    "tril", "triu", "where", "zero", "zeros_like",
}  # fmt: skip
_MADE_UP = {
    "empty", "full", "new_empty", "new_full", "new_ones", "new_zeros", "normal", "ones", "rand", "randn", "zeros",
}  # fmt: skip
_REDUCTIONS = {
    "all", "amax", "amin", "any", "argmax", "argmin", "count_nonzero", "linalg_vector_norm", "logsumexp", "max", "mean",
    "median", "min", "nansum", "norm", "prod", "std", "std_mean", "sum", "var", "var_mean",
}  # fmt: skip
_ALONG = {"_log_softmax", "_safe_softmax", "_softmax", "cummax", "cumprod", "cumsum", "logcumsumexp", "sort", "topk"}
_SCATTERS = {"index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce"}
_SPATIAL = re.compile(r"_?(adaptive_)?(avg|max)_pool(\d)d|_?upsample_\w+?(\d)d|_?(reflection|replication)_pad(\d)d")
_PRODUCTS = {"div", "masked_fill", "mul"}
_SHUFFLES = {"channel_shuffle", "native_channel_shuffle"}
_EVEN = {"split", "unsafe_chunk", "unsafe_split"}
_AS_STRIDED = (torch.ops.aten.as_strided, torch.ops.aten.as_strided_)


class Labels(TorchDispatchMode):
    """Labels of all tensors that are made while this mode is on.

    Args:
        bare: The tensors that belong to no known layer, by name: parameters and buffers that the model uses itself.
            Each of their elements is a unit of its own until it meets another.
    """

    def __init__(self, bare: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.paused = False
        self.where = ""
        self.bare: dict[str, Tensor] = {}
        self.even: list[list[Tensor]] = []  # parts of equal size, by their units
        self._bare_names = {id(tensor): name for name, tensor in bare.items() if 1 < tensor.numel() <= _LARGEST}
        self._labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._parent = np.zeros(1, dtype=np.int64)
        self._written = np.zeros(1, dtype=bool)
        self._summed: list[np.ndarray] = []
        self._fixed: list[tuple[np.ndarray, str]] = []
        self._split: list[Tensor] = []

    def new(self, count: int, *, written: bool = True) -> Tensor:
        """Return ``count`` new units, shape (count,); ``written`` where a layer computes them."""
        first = len(self._parent)
        units = np.arange(first, first + count)
        self._parent = np.concatenate([self._parent, units])
        self._written = np.concatenate([self._written, np.full(count, written)])
        return torch.from_numpy(units).double()

    def find(self, labels: Tensor) -> Tensor:
        """Return labels with one number for all units that are tied together, whole numbers."""
        numbers = labels.long()
        return torch.from_numpy(self._parent)[numbers.clamp_min(0)].where(numbers > 0, numbers)

    def fix(self, labels: Tensor | None, why: str) -> None:
        """Let the units in ``labels`` stay, whatever is asked."""
        if labels is not None:
            units = np.unique(_narrow(labels).numpy())
            if (units := units[units > 0].astype(np.int64)).size:
                self._fixed.append((units, why))

    def fixed(self) -> dict[int, str]:
        """Return the units that stay, as `find` names them, and the first reason for each."""
        found: dict[int, str] = {}
        for units, why in self._fixed:
            for unit in np.unique(self._parent[units]).tolist():
                found.setdefault(unit, why)
        return found

    def summed(self) -> set[int]:
        """Return the units, as `find` names them, in which a sum (anything but a product) joins what layers write."""
        return {unit for units in self._summed for unit in np.unique(self._parent[units]).tolist()}

    def join(self, one: Tensor, other: Tensor, why: str, *, product: bool = False) -> Tensor:
        """Tie the units of two tensors together, element by element, and return the labels of the result.

        Where a unit meets an element that is fixed, it is fixed, too.
        """
        one, other = torch.broadcast_tensors(one, other)
        both = (one > 0) & (other > 0) & (one != other)
        if both.any():
            self._union(one[both], other[both], product)
        self.fix(one[other == FIXED], why)
        self.fix(other[one == FIXED], why)
        found = one.where(one > 0, other)
        return found.where((found > 0) | ((one == FREE) & (other == FREE)), found.clamp_min(0))

    def _union(self, one: Tensor, other: Tensor, product: bool) -> None:
        pairs = np.unique(torch.stack([one.flatten(), other.flatten()]).long().numpy(), axis=1)
        parent = self._parent
        a, b = parent[pairs[0]], parent[pairs[1]]
        if not product:
            self._summed.append(pairs[0][(a != b) & self._written[a] & self._written[b]])
        while (a != b).any():
            np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
            while not np.array_equal(shorter := parent[parent], parent):
                parent[:] = shorter
            a, b = parent[a], parent[b]
        np.logical_or.at(self._written, parent[pairs], self._written[pairs])

    def _is_written(self, labels: Tensor) -> bool:
        units = labels[labels > 0].long().numpy()
        return bool(self._written[self._parent[units]].any())

    def settle(self) -> None:
        """Tie what was split over two dimensions along the outer ones, where nobody has read it otherwise.

        Rows of a reshape can only keep equally many elements, and the same ones: a channel shuffle.
        """
        for labels in self._split:
            found = self.find(labels).double()
            varied = _varied(found)
            for dim in varied[:-1]:
                found = self.join(found, found.narrow(dim, 0, 1), "a reshape that mixes channels", product=True)
                found = self.find(found.narrow(dim, 0, 1)).double()

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return the labels of a tensor, None where no unit is in it."""
        found: Tensor | None = self._labels.get(tensor)
        if found is None and id(tensor) in self._bare_names:
            found = self.new(tensor.numel(), written=False).view(tensor.shape)
            self.bare[self._bare_names[id(tensor)]] = found
            self._labels[tensor] = found
        return found

    def put(self, tensor: Tensor, labels: Tensor | None) -> None:
        """Set the labels of a tensor, which broadcast to its shape; None where no unit is in it."""
        if labels is None or not bool((labels != FIXED).any()):
            self._labels.pop(tensor, None)
        else:
            self._labels[tensor] = labels.expand(tensor.shape)

    def along(self, tensor: Tensor, dim: int, why: str) -> Tensor | None:
        """Return the units along one dimension of a tensor, shape (size,), for a layer that reads channels there."""
        labels = self.of(tensor)
        if labels is None:
            return None
        dim %= tensor.dim()
        rows = _narrow(labels).movedim(dim, 0).flatten(1)
        if rows.shape[1] > 1 and rows.shape[0] == 1:  # channels elsewhere: a linear layer over positions
            self.fix(rows, why)
            return None
        if rows.shape[1] > 1:
            rows = self.join(rows, rows[:, :1], why, product=True)[:, :1]
        return rows[:, 0].expand(tensor.shape[dim])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # before it is done in place
        unmoved = func._overloadpacket in _AS_STRIDED and _is_unmoved(*args, **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        if not self.paused:
            self._follow(func, args, kwargs or {}, output, unmoved)
        return output

    def _follow(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any, unmoved: bool = False
    ) -> None:
        name = func._overloadpacket.__name__.rstrip("_")
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if name in _MADE_UP:
            for result in results:
                self.put(result, torch.full((1,) * result.dim(), float(FREE)))
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if all(self.of(tensor) is None for tensor in tensors):
            return
        given = _Arguments(func, args, kwargs)
        why = f"'{name}'" + (f" after layer '{self.where}'" if self.where else "")
        if unmoved:
            self.put(results[0], self.of(tensors[0]))
        elif name in _MOVES:
            self._move(func, name, args, kwargs, output)
        elif name in _POINTWISE or torch.Tag.pointwise in func.tags:
            labels = self._meet(tensors, results[0].dim(), f"{why}, which meets a fixed size", name in _PRODUCTS)
            for result in results:
                self.put(result, labels)
        elif name in _REDUCTIONS or name in _ALONG:
            self._reduce(tensors[0], given, results, f"{why}, which works across channels", keep=name in _ALONG)
        elif name == "glu":
            one, other = _narrow(self.of(tensors[0])).chunk(2, given["dim"])  # type: ignore[arg-type]
            self.put(results[0], self.join(one, other, why, product=True))
        elif name == "constant_pad_nd":
            self._pad(tensors[0], given["pad"], results[0])
        elif match := _SPATIAL.fullmatch(name.removesuffix("_with_indices").removesuffix("_backward")):
            spatial = int(next(group for group in match.groups()[2:] if group and group.isdigit()))
            self._resize(tensors[0], spatial, results, f"{why}, which works across channels")
        elif name in _SCATTERS and len(tensors) == 3:
            self._scatter(tensors[0], tensors[2], given["dim"], results[0], f"{why}, which scatters channels")
        elif name in ("mm", "bmm", "addmm", "baddbmm"):
            self._product(tensors, results[0], f"{why}, a product that mixes channels")
        else:
            for tensor in tensors:
                self.fix(self.of(tensor), f"{why}, which is not followed")
            for result in results:
                self.put(result, None)

    def _move(self, func: Any, name: str, args: Any, kwargs: Any, output: Any) -> None:
        data = args[0]

        def labels(tensor: Tensor) -> Tensor:
            if name in _INDEXED and tensor is not data:
                return tensor.cpu()
            found = self.of(tensor)
            return torch.zeros((), dtype=torch.double).expand(tensor.shape) if found is None else found

        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "dtype", "layout")}
        # labels have other strides than what they belong to, and are copied where no view of them has the new shape
        func = torch.reshape if name in _RESHAPES else func
        moved = func(*tree_map_only(Tensor, labels, args), **tree_map_only(Tensor, labels, kwargs))
        for result, found in zip(tree_leaves(output), tree_leaves(moved)):
            if isinstance(result, Tensor):
                narrow = _narrow(found)
                self.put(result, narrow)
                if name in _RESHAPES and len(_varied(narrow)) > 1:
                    self._split.append(narrow)
        if name in _SHUFFLES:
            rows = labels(args[0]).unflatten(1, (args[1], -1))
            self._split.append(_narrow(rows))
        if name in _EVEN:
            parts = [_narrow(found) for found in tree_leaves(moved)]
            if len({part.shape for part in parts}) == 1 and parts[0].numel() > 1:
                self.even.append([part.flatten() for part in parts])

    def _meet(self, tensors: Sequence[Tensor], rank: int, why: str, product: bool = False) -> Tensor | None:
        """Tie what is combined element by element, with broadcasting."""
        known: dict[int, Tensor] = {}
        for index, tensor in enumerate(tensors):
            labels = self.of(tensor)
            if labels is not None:
                labels = _narrow(labels)
                known[index] = labels.view((1,) * (rank - labels.dim()) + labels.shape)
        written = [labels for labels in known.values() if self._is_written(labels)]
        along = {dim for labels in written for dim in _varied(labels)}
        found: Tensor | None = None
        for index, labels in list(known.items()):
            # a parameter with one value for all channels (a temperature, a map of positions) belongs to none of them
            if any(labels.shape[dim] == 1 for dim in along) and not self._is_written(labels) and (labels > 0).any():
                del known[index]
            else:
                found = labels if found is None else self.join(found, labels, why, product=product)
        if found is not None:
            varied = [dim - rank for dim in _varied(found)]
            for index, tensor in enumerate(tensors):
                if index not in known:
                    if any(tensor.dim() >= -dim and _extends(tensor, dim) for dim in varied):
                        self.fix(found, why)
                    elif tensor.numel() > 1 and not bool((found > 0).any()):
                        return None
        return found

    def _reduce(self, tensor: Tensor, given: _Arguments, results: Sequence[Tensor], why: str, *, keep: bool) -> None:
        labels = self.of(tensor)
        if labels is None:  # what it is divided by, weighted with, ...
            return
        if not tensor.dim():
            return
        labels = _narrow(labels)
        dims = given["dim"] if given["dim"] is not None else list(range(tensor.dim()))
        dims = sorted({dim % tensor.dim() for dim in (dims if isinstance(dims, (list, tuple)) else [dims])})
        dims = dims or list(range(tensor.dim()))
        if any(labels.shape[dim] > 1 for dim in dims):
            self.fix(labels, why)
            labels = None
        elif not keep and not given["keepdim"]:
            for dim in reversed(dims):
                labels = labels.squeeze(dim)
        for result in results:
            self.put(result, labels)

    def _pad(self, tensor: Tensor, pad: Sequence[int], result: Tensor) -> None:
        labels = self.of(tensor)
        assert labels is not None
        labels = _narrow(labels)
        # rims of a dimension without channels belong to the channels beside them
        kept = [amount if labels.shape[-1 - index // 2] > 1 else 0 for index, amount in enumerate(pad)]
        self.put(result, torch.constant_pad_nd(labels, kept, float(FIXED)))

    def _resize(self, tensor: Tensor, spatial: int, results: Sequence[Tensor], why: str) -> None:
        labels = self.of(tensor)
        assert labels is not None
        labels = _narrow(labels)
        if any(size > 1 for size in labels.shape[-spatial:]):
            self.fix(labels, why)
            labels = None
        for result in results:
            self.put(result, labels)

    def _scatter(self, onto: Tensor, source: Tensor, dim: int, result: Tensor, why: str) -> None:
        for tensor in (onto, source):
            labels = self.of(tensor)
            if labels is not None and tensor.dim() and _narrow(labels).shape[dim] > 1:
                self.fix(labels, why)
        self.put(result, self._meet([onto, source], result.dim(), why))

    def _product(self, tensors: Sequence[Tensor], result: Tensor, why: str) -> None:
        """Tie what is contracted; rows and columns go on. Heads (two dimensions of channels) are not for us."""
        *added, one, other = tensors
        labels = [self.of(tensor) for tensor in (one, other)]
        narrow = [None if found is None else _narrow(found) for found in labels]
        varied = [() if found is None else tuple(dim - found.dim() for dim in _varied(found)) for found in narrow]
        contracted = (-1 in varied[0], -2 in varied[1])
        both = -2 in varied[0] and -1 in varied[1]
        batches = (-3 in varied[0], -3 in varied[1])
        if max(map(len, varied)) > 1 or both or contracted[0] != contracted[1] or batches[0] != batches[1]:
            for units in labels:
                self.fix(units, why)
            self.put(result, None)
            return
        found: Tensor | None = None
        if all(contracted):
            self.join(_flat(narrow[0]), _flat(narrow[1]), why, product=True)
        elif all(batches):
            found = self.join(_flat(narrow[0]), _flat(narrow[1]), why, product=True).view(-1, 1, 1)
        elif -2 in varied[0]:
            found = narrow[0]
        elif -1 in varied[1]:
            found = narrow[1]
        self.put(result, found)
        if added:
            self.put(result, self._meet([result, *added], result.dim(), why))


def _is_unmoved(tensor: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> bool:
    """Tell whether a view has each element where it was: pooling to 1x1 in channels_last renames strides of size 1."""
    places = zip(tensor.shape, tensor.stride(), stride)
    return (
        tuple(size) == tuple(tensor.shape)
        and storage_offset in (None, tensor.storage_offset())
        and all(own == other for extent, own, other in places if extent > 1)
    )


class _Arguments:
    """Arguments of an operator by name, defaults included; None for one that it does not have."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._known = {one.name: one.default_value for one in func._schema.arguments if one.has_default_value()}
        self._known |= {one.name: value for one, value in zip(func._schema.arguments, args)} | dict(kwargs)

    def __getitem__(self, name: str) -> Any:
        return self._known.get(name)


def _extends(tensor: Tensor, dim: int) -> bool:
    """Whether a tensor has several elements along a dimension; one that was expanded takes any size."""
    return tensor.shape[dim] > 1 and (tensor.layout != torch.strided or tensor.stride(dim) != 0)


def _varied(labels: Tensor) -> list[int]:
    """Return the dimensions of narrowed labels along which they differ."""
    return [dim for dim, size in enumerate(labels.shape) if size > 1]


def _flat(labels: Tensor | None) -> Tensor:
    assert labels is not None
    return labels.flatten()


def _narrow(labels: Tensor) -> Tensor:
    """Return labels with size 1 in every dimension along which they do not differ."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and (labels.stride(dim) == 0 or bool((labels == labels.narrow(dim, 0, 1)).all())):
            labels = labels.narrow(dim, 0, 1)
    return labels
