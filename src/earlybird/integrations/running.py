"""What the integrations have in common: one or several methods, attached to a framework's model, and their state."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from earlybird.calls import unwrapped
from earlybird.errors import InputError
from earlybird.ledger import Ledger, ledger_of
from earlybird.settings import accepted

STATE_FILE = "earlybird.safetensors"
"""In the folder of a checkpoint."""


@runtime_checkable
class Cutting(Protocol):
    """A method that can shrink a model to a saved state before there is an optimizer."""

    def cut(self, model: nn.Module, state: Any, *, example_inputs: Any = None, averaged: Any = ()) -> None:
        """See `earlybird.EarlyBird.cut`."""


@runtime_checkable
class Observing(Protocol):
    """A running method that goes by the training loss."""

    def observe(self, loss: Tensor) -> None:
        """Take note of the loss of a step, before the step."""


def require(package: str, supported: str, extra: str) -> None:
    """Raise an `InputError` unless the installed version of ``package`` begins with ``supported``, such as '2.6'."""
    try:
        found = f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        found = f"no {package}"
    if not re.match(rf"{package} {re.escape(supported)}(\.|$)", found):
        raise InputError(
            f"{found} is installed", needed=f"{package} {supported}",
            hint=f"pip install 'earlybird[{extra}]' '{package}=={supported}.*'",
        )  # fmt: skip


class Running:
    """Methods on one model. They share a ledger, so that there is one bill.

    Args:
        methods: One method (`earlybird.EarlyBird`, say) or several, of which no two are of one class.
        example_inputs: For methods that follow the model's graph: a tensor, tuple or dict that the model runs on, or a
            function that makes it of a batch of the loader. Default: what the model is called with in training.
        seed: Of the methods' own randomness.

    Attributes:
        methods: Class name to what ``attach`` returned; empty before the training begins.
        ledger: What records, or None before.
    """

    def __init__(self, methods: Any, example_inputs: Any = None, seed: int = 0) -> None:
        found = list(methods) if isinstance(methods, (list, tuple)) else [methods]
        for method in found:
            if not callable(getattr(method, "attach", None)):
                raise InputError(f"{method!r} is no method", needed="earlybird.EarlyBird(keep=0.5), say, or a list")
        # what replaces layers comes before what hangs on them
        found.sort(key=lambda method: not hasattr(method, "convert"))
        self._settings = {type(method).__name__: method for method in found}
        if len(self._settings) < len(found):
            raise InputError(f"two methods of one class in {found!r}", needed="at most one of each")
        self._example_inputs, self._seed = example_inputs, seed
        self.methods: dict[str, Any] = {}
        self.ledger: Ledger | None = None

    def refuse(self, attribute: str, reason: str, hint: str) -> None:
        """Raise an `InputError` if a method has ``attribute``: what it does cannot be done in this loop."""
        for name, method in {**self._settings, **self.methods}.items():
            if hasattr(method, attribute):
                self.detach()
                raise InputError(f"{name} {reason}", hint=hint)

    @property
    def wants_batch(self) -> bool:
        """Whether example inputs are made of a batch."""
        return callable(self._example_inputs) and not isinstance(self._example_inputs, Tensor)

    def attach(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        batch: Any = None,
        **context: Any,
    ) -> None:
        """Attach all methods; each is given what it takes of ``context`` (``steps_per_epoch`` and so on)."""
        self.detach()
        example = self._example_inputs(batch) if self.wants_batch else self._example_inputs
        self.ledger = ledger = ledger_of(unwrapped(model))
        ledger.watch(model, optimizers, example)
        ledger.enter("train")
        context = {**context, "example_inputs": example, "ledger": ledger, "seed": self._seed}
        running: dict[str, Any] = {}
        try:
            for name, method in self._settings.items():
                running[name] = method.attach(model, optimizers, **accepted(method.attach, context))
        except BaseException:
            for one in running.values():
                one.detach()
            ledger.stop()
            raise
        self.methods = running

    def cut(self, model: nn.Module, state: Mapping[str, Any], averaged: Iterable[nn.Module] = ()) -> None:
        """Shrink a dense ``model`` and its averages as the saved methods had, so that the saved weights fit."""
        self.check(state)
        example = None if self.wants_batch else self._example_inputs
        for name, method in self._settings.items():
            if isinstance(method, Cutting):
                method.cut(model, state["methods"][name], example_inputs=example, averaged=averaged)

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise an `InputError` if the checkpoint was written with other methods."""
        if sorted(state["methods"]) != sorted(self._settings):
            raise InputError(
                f"the checkpoint was written with {', '.join(state['methods'])}", needed=", ".join(self._settings)
            )

    def observe(self, loss: Tensor) -> None:
        """Tell methods that go by the training loss; call it before each optimizer step."""
        for method in self.methods.values():
            if isinstance(method, Observing):
                method.observe(loss)

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        if self.ledger is None:
            raise InputError("nothing was trained yet", hint="ask for the bill when the training has begun")
        return self.ledger.bill()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of methods and ledger; nothing before the training has begun."""
        if self.ledger is None:
            return {}
        states = {name: method.state_dict() for name, method in self.methods.items()}
        return {"methods": states, "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, after `attach`."""
        self.check(state)
        for name, method in self.methods.items():
            method.load_state_dict(state["methods"][name])
        if self.ledger is not None:
            self.ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Take all hooks off; state and bill stay."""
        for method in self.methods.values():
            method.detach()
        if self.ledger is not None:
            self.ledger.stop()
