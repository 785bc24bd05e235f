"""SimCLR: an encoder learns, without labels, that two views of an image are the same one and all others are not.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
https://arxiv.org/abs/2002.05709. With z1, z2 (B, d) what the projector makes of both views of B images, each of length
1, and z all 2B of them, the loss is the mean over them of (NT-Xent)

    l_i = -log( exp(z_i . z_j / t) / sum over k != i of exp(z_i . z_k / t) )        j: the other view of the same image

The projector is a perceptron of two layers with batch norm and is thrown away; what is kept is the encoder, whose
features are what the model's last layer reads. That layer stays as it was drawn.

What it saves: nothing by itself; it costs two passes an image, and many epochs. It pays where images are many and
labels few, or where one encoder starts many trainings; and a ticket that is found on it serves them all (Chen et al.,
CVPR 2021, https://arxiv.org/abs/2012.06908). It does *not* pay where labels are there for all images: training on them
is more accurate and several times shorter. What a row calls accuracy is that of a probe
(`earlybird.pretraining.probe`).

Deviations: views are made as `earlybird.data.contrast` says; the optimizer is the run's, where the paper has LARS;
batch norm sees the images of one process, where the paper's sees all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from earlybird import ranks
from earlybird.data.contrast import StrongAugment
from earlybird.data.loader import Loader
from earlybird.errors import InputError
from earlybird.ledger import Ledger
from earlybird.objective import Forward
from earlybird.pretraining.encoder import fp32, projector
from earlybird.pretraining.two_views import Pretraining
from earlybird.settings import check_count, check_number, option

__all__ = ["Contrasting", "SimClr", "nt_xent"]


@dataclass(frozen=True, kw_only=True)
class SimClr:
    """Hyper-parameters of SimCLR; `attach` starts it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    simclr_temperature: float = option(
        0.5, "Temperature t of the loss; the smaller, the more the nearest others count."
    )
    simclr_width: int = option(128, "Numbers that the projector makes of an image.")
    simclr_hidden: int | None = option(None, "Width of the projector's hidden layer; default: as many as features.")
    simclr_crop: float = option(0.08, "Smallest share of an image's area that a view shows, in (0, 1].")
    simclr_colour: float = option(0.5, "Strength of the colour jitter, 0 to 1.25.")
    simclr_grey: float = option(0.2, "Probability with which a view is grey.")
    simclr_neighbours: int = option(200, "Neighbours that vote in the probe that judges the encoder.")
    simclr_probe_images: int = option(10_000, "Training images among which they are searched.")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "published": {}}

    def __post_init__(self) -> None:
        check_number("simclr_temperature", self.simclr_temperature, lambda t: t > 0, "a number above 0")
        for name in ("simclr_width", "simclr_neighbours", "simclr_probe_images"):
            check_count(name, getattr(self, name), "128", optional=False)
        check_count("simclr_hidden", self.simclr_hidden, "512")
        self.views()

    def views(self) -> StrongAugment:
        """Return how both views of an image are made."""
        return StrongAugment(least=self.simclr_crop, colour=self.simclr_colour, grey=self.simclr_grey)

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        example_inputs: Any = None,
        loader: Loader | None = None,
        ledger: Ledger | None = None,
        seed: int = 0,
    ) -> Contrasting:
        """Start pre-training: from now on `Contrasting.loss` is what is to be made small.

        Args:
            model: The module that is trained, on the device where it will be, before it is wrapped for several
                processes. Its last layer is frozen.
            optimizer: Gets the projector as a group of its own; of several, the first one.
            example_inputs: A batch that the model runs on.
            loader: Of the training images. It makes both views from now on, and lends images to the probe.
            ledger: Where to record; by default an own one, which `Contrasting.bill` reads.
            seed: Of the projector's weights.

        Raises:
            InputError: The model does not end in a linear layer, or another method decides the loss.
        """
        return Contrasting(
            self, model, optimizer, example_inputs=example_inputs, loader=loader, ledger=ledger, seed=seed
        )


def nt_xent(z1: Tensor, z2: Tensor, t: float) -> Tensor:
    """Return the NT-Xent loss of two views, shape (); with several processes, against the images of all.

    Args:
        z1: (B, d), the first view of each image, of any length.
        z2: (B, d), the second one.
        t: Temperature.

    Raises:
        InputError: There is but one image, and no other to tell it from: the loss would be 0, whatever the model says.
    """
    context, z1, z2 = fp32(z1, z2)
    with context:
        own = functional.normalize(torch.cat((z1, z2)), dim=1)  # (2B, d)
        others, first = ranks.all_rows(own)
        if len(others) < 4:
            raise InputError(
                "a batch of one image has no others to be told from", needed="at least two", hint="raise batch_size"
            )
        cosine = own @ others.T / t
        place = torch.arange(len(own), device=own.device)
        cosine = cosine.index_put((place, first + place), cosine.new_tensor(-torch.inf))  # not with itself
        return functional.cross_entropy(cosine, first + (place + len(z1)) % len(own))


class Contrasting(Pretraining):
    """Running SimCLR, made by `SimClr.attach`; all its state is in `state_dict`.

    Attributes:
        settings: The hyper-parameters.
    """

    def __init__(
        self,
        settings: SimClr,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        **more: Any,
    ) -> None:
        self.settings = settings
        make = partial(projector, settings.simclr_hidden, settings.simclr_width, norm=True)
        probe = (settings.simclr_neighbours, settings.simclr_probe_images)
        super().__init__("simclr", model, optimizer, projector=make, views=settings.views(), probe=probe, **more)

    def loss(self, forward: Forward, images: Tensor, labels: Tensor | None = None, *beside: Tensor) -> Tensor:
        """Return the loss of a batch, shape ().

        Args:
            forward: The model, or what wraps it.
            images: (2B, C, H, W), the first view of each of B images, then the second one.
            labels: Not looked at.
            beside: Not looked at.
        """
        z1, z2 = self.encoder.project(self.encoder.features(forward, images), self._ledger).chunk(2)
        return nt_xent(z1, z2, self.settings.simclr_temperature)
