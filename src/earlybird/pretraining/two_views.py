"""What SimCLR and MoCo share: an encoder that is trained by two views of each image, and judged by a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from earlybird.calls import given_optimizers
from earlybird.data.contrast import StrongAugment
from earlybird.data.loader import Loader
from earlybird.ledger import Ledger, ledger_for, ledgers_on
from earlybird.pretraining.encoder import Encoder
from earlybird.pretraining.probe import Probe

__all__ = ["Pretraining"]


class Pretraining:
    """What running methods share that train an encoder by two views of each image; they add the loss.

    Args:
        method: Its name.
        model: The module that is trained; its last layer is frozen.
        optimizer: Gets the projector; of several, the first one.
        projector: Makes it, from the number of features.
        views: How both views are made.
        probe: Neighbours that vote, and training images among which they are searched.
        example_inputs: A batch that the model runs on.
        loader: Makes the views, and lends the probe images.
        ledger: Where to record; None: an own one.
        seed: Of the projector, and of the probe's images.

    Attributes:
        encoder: The model, its features and the projector.
        judged_by: What the accuracy of the run is that of.
    """

    def __init__(
        self,
        method: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        projector: Callable[[int], nn.Module],
        views: StrongAugment,
        probe: tuple[int, int],
        example_inputs: Any,
        loader: Loader | None,
        ledger: Ledger | None,
        seed: int,
    ) -> None:
        self._optimizers = given_optimizers(optimizer)
        self.encoder = Encoder(model, self._optimizers, example_inputs, projector, seed, method)
        self._probe = Probe(self.encoder, loader, *probe, seed)
        self.judged_by = self._probe.name
        self._own_ledger = ledger is None
        self._ledger = ledger_for(self.encoder.model, self._optimizers, ledger, example_inputs)
        for one in ledgers_on(self.encoder.model, self._ledger):
            one.reprice(self.encoder.model)  # the last layer is frozen
        self._loader = loader
        if loader is not None:
            loader.views = views

    def judge(self, test: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        """Return how many test images the probe recognises, and how many there are; the model is in eval mode."""
        return self._probe(test)

    def bill(self) -> Any:
        """Return what was spent so far, as a `Bill`."""
        return self._ledger.bill()

    def status(self) -> dict[str, float | str]:
        """Return nothing: the loss says it all."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the projector, its optimizer state, and what the own ledger holds."""
        return {**self.encoder.state_dict(), "ledger": self._ledger.state_dict() if self._own_ledger else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.encoder.load_state_dict(state)
        if state["ledger"] and self._own_ledger:
            self._ledger.load_state_dict(state["ledger"])

    def detach(self) -> None:
        """Take hooks and projector away; the last layer learns again, and the loader shows one view."""
        self.encoder.detach()
        if self._loader is not None:
            self._loader.views = None
        if self._own_ledger:
            self._ledger.stop()
