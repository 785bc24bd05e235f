"""A probe: how well the neighbours among training images tell the class of an image, by the features of an encoder.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018,
https://arxiv.org/abs/1805.01978, section 3.4: the k training images whose features point in the most similar directions
vote for their class, each with weight exp(cosine / temperature).

It costs a forward pass over the training images that are asked, at each evaluation, which the bill charges there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from earlybird.data.loader import Loader
from earlybird.errors import InputError
from earlybird.pretraining.encoder import Encoder, fp32

__all__ = ["Probe", "knn_accuracy", "knn_votes"]

_JUDGED = 256
"""Images whose features are computed at a time."""


def knn_votes(
    bank: Tensor, labels: Tensor, queries: Tensor, *, k: int, temperature: float, classes: int
) -> Tensor:  # fmt: skip
    """Return the votes for each class of the ``k`` nearest neighbours of each query.

    Args:
        bank: (N, d), features with known labels.
        labels: int64 (N,)
        queries: (M, d)
        k: Neighbours; all of the bank where there are fewer.
        temperature: Of their weights exp(cosine / temperature); the smaller, the more the nearest one decides.
        classes: Number of classes.

    Returns:
        (M, classes), which add up to 1.
    """
    context, bank, queries = fp32(bank, queries)
    with context:
        cosine = functional.normalize(queries, dim=1) @ functional.normalize(bank, dim=1).T  # (M, N)
        nearest, places = cosine.topk(min(k, len(bank)), dim=1)
        weights = (nearest / temperature).softmax(1)  # (M, k)
        return torch.zeros(len(queries), classes, device=queries.device).scatter_add_(1, labels[places], weights)


def knn_accuracy(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, *, k: int = 200, temperature: float = 0.1
) -> float:
    """Return the share of queries (M, d) whose label (M,) most votes are for; see `knn_votes`."""
    classes = int(torch.cat((labels, truth)).max()) + 1
    votes = knn_votes(bank, labels, queries, k=k, temperature=temperature, classes=classes)
    return float((votes.argmax(1) == truth).float().mean())


class Probe:
    """What judges an encoder: the votes of neighbours among training images.

    Args:
        encoder: Whose features are compared.
        loader: Of the training images, or None where the encoder cannot be judged.
        k: Neighbours that vote.
        images: Training images among which they are searched; each process computes the features of all of them.
        seed: Chooses these.
    """

    temperature = 0.1

    def __init__(self, encoder: Encoder, loader: Loader | None, k: int, images: int, seed: int) -> None:
        self._encoder, self._loader, self._k, self._images, self._seed = encoder, loader, k, images, seed
        there = images if loader is None else min(images, len(loader.images))
        self._k = min(k, there)
        self.name = f"{self._k}-NN"

    @torch.no_grad()
    def __call__(self, test: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        """Return how many test images (in batches with their labels) are recognised, and how many there are."""
        if self._loader is None:
            raise InputError("no training images to compare with", hint="pass loader=loader to attach")
        encoder, model = self._encoder, self._encoder.model
        training = self._loader.in_order(self._images, _JUDGED, self._seed)
        parts = [(encoder.features(model, images), labels) for images, labels in training]
        bank, known = (torch.cat(column) for column in zip(*parts))
        right, seen = torch.zeros((), device=bank.device), torch.zeros((), device=bank.device)
        for images, labels, *_ in test:
            if not len(labels):
                continue  # another rank has all of a short last batch
            features, classes = encoder.features(model, images), 1 + int(max(known.max(), labels.max()))
            votes = knn_votes(bank, known, features, k=self._k, temperature=self.temperature, classes=classes)
            right += (votes.argmax(1) == labels).sum()
            seen += len(labels)
        return right, seen
