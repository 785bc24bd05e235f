"""Batches of augmented images, reproducible from (seed, epoch, batch) alone.

Nothing is carried from one batch to the next: the order of an epoch is drawn from (seed, epoch), the augmentation of a
batch from (seed, epoch, batch), the side that an alternating flip begins with from (seed, image). Where a few
augmentations of each image are to come back (`Loader.cycle`), they are drawn from (seed, image, view). A stopped run
therefore goes on at any batch without replaying the ones before, and several ranks agree on every batch without talking
to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from earlybird.data.augment import Augment, Choices, blank, choose, normalise, take
from earlybird.data.dataset import check_images
from earlybird.errors import InputError

# what a generator is for, mixed into its seed, so that no two streams of random numbers are the same
_ORDER, _AUGMENTATION, _SAMPLE, _FLIP = 0, 1, 2, 3
_VIEW = 5  # 4 is `earlybird.skipping.batches`


class Selection(Protocol):
    """Which batches are walked through, where some are left out (`earlybird.skipping.batches`)."""

    def length(self, batches: int) -> int: ...  # noqa: D102
    def positions(self, first: int, batches: int) -> Iterator[tuple[int, int]]: ...  # noqa: D102


class Part(Protocol):
    """Random choices for a batch of images, of which a rank takes its part."""

    def part(self, part: slice) -> Any: ...  # noqa: D102


class Views(Protocol):
    """How several views of each image are made, in place of crop, flip and cutout (`earlybird.data.contrast`)."""

    @property
    def count(self) -> int:
        """Views of an image."""
        ...

    def choose(self, count: int, height: int, width: int, generator: torch.Generator) -> Part:
        """Draw the random choices for one view of ``count`` images."""
        ...

    def apply(self, images: Tensor, choices: Any) -> Tensor:
        """Return what uint8 images (B, C, H, W) look like by ``choices``, of the same type and shape, new."""
        ...


class Loader:
    """Batches of one part of a data set.

    Evaluation batches come from a loader with ``shuffle=False, drop_last=False`` and the default augmentation.

    Args:
        images: uint8 (N, C, H, W). They are moved to ``device`` once if they take less than half of what is free
            there, otherwise batch by batch.
        labels: int64 (N,).
        batch_size: Images in a batch, over all ranks together.
        mean: Of each channel, 0-1 scale.
        std: Of each channel, 0-1 scale.
        augment: Crop, flip and cutout.
        shuffle: Draw a new order for every epoch; else the images come in the order given.
        drop_last: Leave out the last batch of an epoch when it is not full.
        seed: Everything random follows from it.
        device: Where the batches are made and augmented.
        dtype: Of the inputs; may be set later.
        channels_last: Memory format of the inputs; may be set later.
        rank: This process, from 0 to ``world_size - 1``.
        world_size: Processes that share each batch: rank r gets the images r, r + world_size, ... of it. All together
            they get what one process would get, also in augmentation. A rank's share of a last, short batch may be
            empty.

    Attributes:
        selection: Which batches are walked through, or None for all; an epoch is then as long as it says, and what is
            left out is never touched.
        views: How several views of each image are made, or None for one, by ``augment``. The inputs of B images are
            then (views * B, C, H, W): first the first view of each, then the second one.
        cycle: After how many epochs an image's augmentation comes back; 0: it is always a new one.
        beside: What is handed out beside the labels, or None: a tensor (V, N, ...) with a row for each image and view,
            that of the ``epoch % V``-th view of the N images. It stays where it is; rows are moved with the batch.
        targets: What is to be found in the images (`earlybird.data.dataset.DataSet`), or None; only kept, for a method
            that hands it out.

    Raises:
        InputError: An argument does not fit the images or is out of range.
        DataError: Images or labels have the wrong type or shape.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment = Augment(),  # noqa: B008 - frozen
        shuffle: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_images(images, labels, "loader")
        if batch_size < 1:
            raise InputError(f"batch size {batch_size}", needed="at least 1")
        if drop_last and len(images) < batch_size:
            raise InputError(
                f"batch size {batch_size} with {len(images)} images gives no full batch",
                hint=f"take a batch size of at most {len(images)}",
            )
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} of {world_size}", needed="0 <= rank < world_size")
        if drop_last and batch_size % world_size:
            raise InputError(
                f"batch size {batch_size} over {world_size} processes", needed=f"a multiple of {world_size}"
            )
        if not len(mean) == len(std) == images.shape[1]:
            raise InputError(
                f"{len(mean)} means and {len(std)} standard deviations", needed=f"{images.shape[1]}, one a channel"
            )
        if seed < 0:
            raise InputError(f"seed {seed}", needed="0 or more")
        if augment.pad == "reflect" and augment.crop >= min(images.shape[2:]):
            raise InputError(
                f"a crop of {augment.crop} pixels beyond images of {images.shape[2]} x {images.shape[3]}",
                needed=f"at most {min(images.shape[2:]) - 1} where they are reflected",
                hint="lower crop, or pad with zeros",
            )
        self.device = torch.device(device)
        self.images = _place(images, self.device)
        self.labels = labels.to(self.images.device)
        self.batch_size = batch_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.augment = augment
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, seed
        self.dtype, self.channels_last = dtype, channels_last
        self.rank, self.world_size = rank, world_size
        self.selection: Selection | None = None
        self.views: Views | None = None
        self.cycle = 0
        self.beside: Tensor | None = None
        self.targets: Tensor | None = None
        self._cycled: tuple[int, Choices] | None = None
        self._next_epoch = 0

    @property
    def whole_length(self) -> int:
        """The number of batches in an epoch that leaves none out."""
        full, rest = divmod(len(self.images), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __len__(self) -> int:
        """Return the number of batches in an epoch, the same for every rank."""
        return self.whole_length if self.selection is None else self.selection.length(self.whole_length)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Walk through the next epoch: 0 the first time, then 1, 2, ..."""
        epoch = self._next_epoch
        self._next_epoch += 1
        return self.epoch(epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Return an iterator over the batches of one epoch.

        Args:
            epoch: From 0.
            start: First batch, from 0; ``len(self)`` gives none.

        Returns:
            Inputs (B, C, H, W) in the loader's type, memory format and device, labels int64 (B,), and the rows of
            ``beside``, if there is any.

        Raises:
            InputError: ``epoch`` or ``start`` is out of range.
        """
        if epoch < 0 or not 0 <= start <= len(self):
            raise InputError(
                f"batch {start} of epoch {epoch}", needed=f"an epoch from 0 and a batch from 0 to {len(self)}"
            )
        return self._walk(epoch, start)

    def sample(self, count: int, seed: int, *, augmented: bool = True) -> Tensor:
        """Return ``count`` different inputs chosen by ``seed`` alone, e.g. for calibration.

        Args:
            count: At most as many as there are images are returned.
            seed: From 0; the same for all ranks gives all ranks the same inputs.
            augmented: As in training; else only normalised.

        Returns:
            (B, C, H, W) in the loader's type, memory format and device.
        """
        index, choices = self._draw_sample(count, seed)
        return self._inputs(index, choices if augmented else Choices())

    def sample_in_batches(self, count: int, size: int, seed: int) -> Sample:
        """Return what `sample` returns, to the bit, in batches that are made when they are asked for.

        Args:
            count: See `sample`.
            size: Images in a batch; a last batch of one image is left out, since batch norm cannot use it.
            seed: See `sample`.
        """
        index, choices = self._draw_sample(count, seed)
        return Sample(len(index), size, lambda part: self._inputs(index[part], choices.part(part)))

    def of_each_class(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return ``count`` inputs of each class, only normalised, and their labels, chosen by ``seed`` alone.

        Returns:
            (B, C, H, W) in the loader's type, memory format and device, and int64 (B,).

        Raises:
            InputError: A class has fewer images.
        """
        index = pick_samples(self.labels, count, _generator(_SAMPLE, seed))
        return self._inputs(index, Choices()), self._labels(index)

    def view(self, view: int, size: int, part: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
        """Return numbers int64 (b,) and inputs (b, C, H, W) of all images, in order, as one view of a cycle shows them.

        Args:
            view: From 0 to ``cycle - 1``.
            size: Images in a batch.
            part: Of the images.

        Raises:
            InputError: There is no such view.
        """
        if not 0 <= view < self.cycle:
            raise InputError(f"view {view} of a cycle of {self.cycle}", needed="0 <= view < cycle")
        numbers = torch.arange(len(self.images))[part]
        for index in numbers.split(size):
            yield index, self._inputs(index, self._view_choices(view, index))

    def in_order(self, count: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``count`` different images chosen by ``seed`` alone, only normalised, with their labels, in batches.

        Args:
            count: At most as many as there are images are yielded.
            size: Images in a batch.
            seed: From 0; the same for all ranks gives all ranks the same images.
        """
        numbers = torch.randperm(len(self.images), generator=_generator(_SAMPLE, seed))[:count].sort().values
        for index in numbers.split(size):
            yield self._inputs(index, Choices()), self._labels(index)

    def _draw_sample(self, count: int, seed: int) -> tuple[Tensor, Choices]:
        generator = _generator(_SAMPLE, seed)
        index = torch.randperm(len(self.images), generator=generator)[:count]
        return index, self._choose(len(index), generator)

    def _positions(self, epoch: int, start: int) -> Iterable[tuple[int, int]]:
        """Return (epoch, batch) of what is walked through, which a selection takes from later epochs, too."""
        if self.selection is None:
            return ((epoch, batch) for batch in range(start, len(self)))
        chosen = self.selection.positions(epoch * len(self) + start, self.whole_length)
        return islice(chosen, len(self) - start)

    def _walk(self, first_epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        count = len(self.images)
        share = slice(self.rank, None, self.world_size)
        order: Tensor | None = None
        mirrored: Tensor | None = None
        entered: int | None = None
        plain = self.augment == Augment() and self.views is None and self.beside is None
        for epoch, batch in self._positions(first_epoch, start):
            if epoch != entered:
                entered = epoch
                order = torch.randperm(count, generator=_generator(_ORDER, self.seed, epoch)) if self.shuffle else None
                mirrored = self._first_mirrored() ^ bool(epoch % 2) if self.augment.flip == "alternating" else None
            low, high = batch * self.batch_size, min((batch + 1) * self.batch_size, count)
            index: Tensor | slice
            if order is not None:
                index = order[low:high][share]
            elif not plain:
                index = torch.arange(low, high)[share]
            else:
                index = slice(low + self.rank, high, self.world_size)
            # all ranks draw for the whole batch and keep their share
            generator = _generator(_AUGMENTATION, self.seed, epoch, batch)
            if self.views is not None:
                inputs = self._several_views(self.views, index, high - low, share, generator)
            elif self.cycle and not isinstance(index, slice):
                inputs = self._inputs(index, self._view_choices(epoch % self.cycle, index))
            else:
                choices = self._choose(high - low, generator).part(share)
                if mirrored is not None:
                    choices = replace(choices, mirrored=mirrored[index])
                inputs = self._inputs(index, choices)
            if self.beside is None:
                yield inputs, self._labels(index)
            else:
                rows = self.beside[epoch % len(self.beside)][index]
                yield inputs, self._labels(index), rows.to(self.device, non_blocking=True)

    def _several_views(
        self, views: Views, index: Tensor | slice, count: int, share: slice, generator: torch.Generator
    ) -> Tensor:  # fmt: skip
        """Return the views of the images of ``index``, a rank's share of a batch of ``count``."""
        pixels = self.images[index if isinstance(index, slice) else index.to(self.images.device)].to(self.device)
        height, width = self.images.shape[2:]
        shown = [
            views.apply(pixels, views.choose(count, height, width, generator).part(share)) for _ in range(views.count)
        ]
        return normalise(torch.cat(shown), self.mean, self.std, self.dtype, self.channels_last)

    def _view_choices(self, view: int, index: Tensor) -> Choices:
        """Return how one view of a cycle shows the images of ``index``."""
        if self._cycled is None or self._cycled[0] != view:
            choices = self._choose(len(self.images), _generator(_VIEW, self.seed, view))
            if self.augment.flip == "alternating":
                choices = replace(choices, mirrored=self._first_mirrored() ^ bool(view % 2))
            self._cycled = (view, choices)
        return self._cycled[1].part(index)

    def _first_mirrored(self) -> Tensor:
        """Return for each image whether an alternating flip mirrors it in epoch 0, bool (N,)."""
        return torch.rand(len(self.images), generator=_generator(_FLIP, self.seed)) < 0.5

    def _choose(self, count: int, generator: torch.Generator) -> Choices:
        height, width = self.images.shape[2:]
        return choose(self.augment, count, height, width, generator)

    def _inputs(self, index: Tensor | slice, choices: Choices) -> Tensor:
        # a slice is a view: evaluation reads the images where they are
        pixels = self.images[index] if isinstance(index, slice) else take(self.images, index, choices, self.augment.pad)
        if pixels.device != self.device:
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        inputs = normalise(pixels, self.mean, self.std, self.dtype, self.channels_last)
        if choices.corners is not None:
            blank(inputs, choices.corners, self.augment.cutout)
        return inputs

    def _labels(self, index: Tensor | slice) -> Tensor:
        labels = self.labels[index if isinstance(index, slice) else index.to(self.labels.device)]
        # a slice is a view, and callers may change what they are given
        return labels.clone() if labels.device == self.device else labels.to(self.device, non_blocking=True)


class Sample(Sequence[Tensor]):
    """Batches of inputs (B, C, H, W) that are made anew each time they are asked for; see `sample_in_batches`."""

    def __init__(self, count: int, size: int, make: Callable[[slice], Tensor]) -> None:
        self._count, self._size, self._make = count, size, make

    def __len__(self) -> int:
        full, rest = divmod(self._count, self._size)
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
        return self._make(slice(start, min(start + self._size, self._count)))


def pick_samples(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Return the indices of ``per_class`` random samples of each class, shape (classes * per_class,).

    Args:
        labels: int64 (N,).
        per_class: Samples of each class.
        generator: On the CPU.

    Raises:
        InputError: A class has fewer samples.
    """
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=generator)
    chosen = []
    for label in labels.unique():
        members = order[labels[order] == label][:per_class]
        if len(members) < per_class:
            raise InputError(f"class {int(label)} has {len(members)} samples", needed=f"{per_class} of each class")
        chosen.append(members)
    return torch.cat(chosen)


def _generator(*entropy: int) -> torch.Generator:
    """Return a CPU generator seeded by all of ``entropy``; NumPy promises that the mixing stays the same."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)


def _place(images: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and images.numel() > torch.cuda.mem_get_info(device)[0] // 2:
        return images.cpu().contiguous()
    return images.to(device).contiguous()
