"""What is learnt: the loss of a batch is cross-entropy, unless a method decides it, and one of them at most.

Such a method says so when it is attached (`claim_loss`), and from then on has ``loss(forward, images, labels)``, which
the shipped loop calls in place of its own; a loop of your own calls it, too. Scaling, accumulation, clipping and the
backward pass stay the loop's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from earlybird.calls import Hook, hook_owners
from earlybird.errors import InputError

Forward = Callable[[Tensor], Tensor]
"""What to call for a training pass: the model, or whatever the loop has wrapped it in."""


@runtime_checkable
class Objective(Protocol):
    """What a loop asks of an attached method that decides the loss."""

    def loss(self, forward: Forward, images: Tensor, labels: Tensor, *beside: Tensor) -> Tensor:
        """Return the loss of a batch, shape (), the mean over its images.

        Args:
            forward: See `Forward`; it is called once for each backward pass, under the loop's autocast.
            images: (B, C, H, W), or all views of B images, (views * B, C, H, W), as the loader makes them.
            labels: (B,)
            beside: What the loader hands out beside them (`earlybird.data.loader.Loader.beside`).
        """
        ...


@runtime_checkable
class Judging(Protocol):
    """What a loop asks of an attached method whose network is not to be judged by its own classifier."""

    judged_by: str
    """What the accuracy is that of, in a few words."""

    def judge(self, test: Any) -> tuple[Tensor, Tensor]:
        """Return how many test images are recognised, and how many there are, of this process.

        Args:
            test: Batches of test images and labels; the model is in eval mode.
        """
        ...


def measure(judged_by: str) -> str:
    """Return what a run's accuracy is called: that of a probe on features is one, other measures have their names."""
    return f"{judged_by} accuracy".lstrip() if is_probe(judged_by) or not judged_by else judged_by


def is_probe(judged_by: str) -> bool:
    """Whether neighbours judge an encoder (`earlybird.pretraining.encoder.Probe`)."""
    return judged_by.endswith("-NN")


class _Claim:
    """What a model carries while a method decides its loss."""

    def __init__(self, method: str, reads: bool) -> None:
        self.method, self.reads = method, reads


def claim_loss(model: nn.Module, method: str, *, reads: bool = False) -> Callable[[], None]:
    """Let ``method`` alone decide the loss of ``model``; the function returned gives it free again.

    Args:
        model: The module that is trained.
        method: Its name.
        reads: Whether it reads inside the model, which therefore has to stay as it is (`reader_of`).

    Raises:
        InputError: Another method decides it already.
    """
    for other in hook_owners(model, _Claim):
        raise InputError(
            f"both {other.method} and {method} decide the loss",
            needed="one of them",
            hint="leave one of the two methods out, or call detach() of the other one first",
        )
    return model.register_forward_pre_hook(Hook(None, _Claim(method, reads))).remove


def reader_of(model: nn.Module) -> str:
    """Return the method that reads inside ``model``, or an empty text: what it reads must not be cut or replaced."""
    return next((claim.method for claim in hook_owners(model, _Claim) if claim.reads), "")


def check_may_cut(model: nn.Module, method: str) -> None:
    """Raise an `InputError` if ``method`` would cut channels of ``model`` that another method reads."""
    if reader := reader_of(model):
        raise InputError(
            f"{method} cuts channels, and {reader} reads the model's features",
            needed="a model that keeps its shape; masks over single weights do not change it",
            hint="leave one of the two methods out, or take iterative in place of the ticket over channels",
        )
