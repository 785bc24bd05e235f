"""What SimCLR and MoCo share: an encoder that is trained by two views of each image, and judged by a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from earlybird.calls import given_optimizers
from earlybird.data.contrast import StrongAugment
from earlybird.data.loader import Loader
from earlybird.ledger import Ledger
from earlybird.pretraining.encoder import Encoder, EncoderRun
from earlybird.pretraining.probe import Probe

__all__ = ["Pretraining"]


class Pretraining(EncoderRun):
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
        optimizers = given_optimizers(optimizer)
        encoder = Encoder(model, optimizers, example_inputs, projector, seed, method)
        self._probe = Probe(encoder, loader, *probe, seed)
        self.judged_by = self._probe.name
        super().__init__(encoder, optimizers, example_inputs, ledger)
        self._loader = loader
        if loader is not None:
            loader.views = views

    def judge(self, test: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        """Return how many test images the probe recognises, and how many there are; the model is in eval mode."""
        return self._probe(test)

    def detach(self) -> None:
        """Take hooks and projector away; the last layer learns again, and the loader shows one view."""
        super().detach()
        if self._loader is not None:
            self._loader.views = None
