"""Training inputs for batch-norm statistics and the refit of layers, made when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from earlybird.data import Loader
from earlybird.data.augment import choose
from earlybird.data.loader import _SAMPLE, _generator


class Calibration(Sequence[Tensor]):
    """Batches of the images of ``loader.sample(count, seed)``, to the bit, without all of them in memory at once.

    Args:
        loader: Of the training images.
        count: Images, at most as many as there are.
        size: Images in a batch; a last batch of one image is left out, since batch norm cannot use it.
        seed: The same for all ranks gives all ranks the same batches.
    """

    def __init__(self, loader: Loader, count: int, size: int, seed: int) -> None:
        self._loader, self._size = loader, size
        generator = _generator(_SAMPLE, seed)
        self._index = torch.randperm(len(loader.images), generator=generator)[:count]
        height, width = loader.images.shape[2:]
        self._choices = choose(loader.augment, len(self._index), height, width, generator)

    def __len__(self) -> int:
        full, rest = divmod(len(self._index), self._size)
        return full + (rest > 1)

    @overload
    def __getitem__(self, batch: int) -> Tensor: ...
    @overload
    def __getitem__(self, batch: slice) -> list[Tensor]: ...
    def __getitem__(self, batch: int | slice) -> Tensor | list[Tensor]:
        """Make one batch, or several."""
        if isinstance(batch, slice):
            return [self[number] for number in range(len(self))[batch]]
        start = range(len(self))[batch] * self._size
        part = slice(start, start + self._size)
        return self._loader._inputs(self._index[part], self._choices.part(part))
