"""One ticket at a time: methods that decide which units of a model stay exclude each other.

Two of them would each rank, cut or mask what the other one takes for its own. Whoever decides claims the model first,
and gives it free again when it is detached.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from earlybird.calls import Hook, hook_owners
from earlybird.errors import InputError


class Claim:
    """What a model carries while a method decides which of its units stay."""

    def __init__(self, method: str) -> None:
        self.method = method


def claim(model: nn.Module, method: str) -> Callable[[], None]:
    """Let ``method`` alone decide which units of ``model`` stay; the function returned gives the model free again.

    Raises:
        InputError: Another method decides that already.
    """
    check_unclaimed(model, method)
    if any(getattr(owner, "drawn", True) is False for owner in hook_owners(model, object)):
        raise InputError(
            f"a search for a ticket is attached to this model already, so {method} cannot decide which units stay",
            needed="one ticket at a time",
            hint="leave one of them out, or call the search's detach() first",
        )
    return model.register_forward_pre_hook(Hook(None, Claim(method))).remove


def check_unclaimed(model: nn.Module, method: str) -> None:
    """Raise an `InputError` if another method decides which units of ``model`` stay."""
    for other in hook_owners(model, Claim):
        raise InputError(
            f"{other.method} decides already which units of the model stay, so {method} cannot",
            needed="one ticket at a time",
            hint="leave one of them out, or call the other one's detach() first",
        )
