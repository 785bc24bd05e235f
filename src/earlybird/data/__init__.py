"""Data sets decoded once into uint8 in memory, and batches made of them by tensor work.

    from earlybird.data import Augment, Loader, load
    data = load("cifar10")
    loader = Loader(data.train_images, data.train_labels, batch_size=128, mean=data.mean, std=data.std,
                    augment=Augment(crop=4, flip=True))

`CATALOGUE` and `locate` need no torch; the other names load it when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from earlybird.data.catalogue import CATALOGUE, DataInfo, locate

if TYPE_CHECKING:
    from earlybird.data.augment import Augment, crop, cutout, flip, normalise
    from earlybird.data.dataset import DataSet
    from earlybird.data.loader import Loader
    from earlybird.data.sources import load

_LAZY = {
    "Augment": "augment",
    "DataSet": "dataset",
    "Loader": "loader",
    "crop": "augment",
    "cutout": "augment",
    "flip": "augment",
    "load": "sources",
    "normalise": "augment",
}

__all__ = [
    "CATALOGUE",
    "Augment",
    "DataInfo",
    "DataSet",
    "Loader",
    "crop",
    "cutout",
    "flip",
    "load",
    "locate",
    "normalise",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
