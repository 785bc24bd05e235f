from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from earlybird.train.recipe import Recipe

# 66 steps of a few milliseconds; the ticket is drawn at step 22 at the latest
SMALL: dict[str, Any] = {
    "data": "digits",
    "model": "tests.train.nets:with_dropout",
    "epochs": 3,
    "batch_size": 64,
    "keep": 0.5,
    "exact": True,
    "look_every": "4it",
    "skip": "4it",
    "window": 3,
    "round_to": 1,
    "crop": 1,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small() -> Callable[..., Recipe]:
    """A recipe that trains in under a second, with changes."""

    def make(**changes: Any) -> Recipe:
        return Recipe.from_values({**SMALL, **changes})

    return make
