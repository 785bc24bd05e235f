"""MoCo v2: an encoder learns to find the other view of an image among thousands that a slower copy of it saw before.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020,
https://arxiv.org/abs/1911.05722, with the projector, temperature and views of Chen et al., "Improved Baselines with
Momentum Contrastive Learning", 2020, https://arxiv.org/abs/2003.04297. With q what encoder and projector make of one
view, k what the key encoder makes of the other, both of length 1, and a queue of keys n of earlier batches (InfoNCE),

    l = -log( exp(q . k / t) / (exp(q . k / t) + sum over n of exp(q . n / t)) )       key <- m key + (1 - m) query

The key's weights lie in the optimizer's state beside the momentum of the query's: whatever cuts, masks, saves or
restores the one does the same to the other, so under a ticket both have the same mask, and the key's removed weights
are zero.

What it saves: nothing by itself; it costs three passes an image where SimCLR costs six, and does without large batches.
When it pays and when not is as for SimCLR (`earlybird.pretraining.simclr`).

Deviations: batch norm of a key sees the keys of one process, in order, where the paper shuffles them among several; the
key's weights begin as those after the first step; the queue is 4096 keys long, for data sets of small images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from earlybird import ranks
from earlybird.calls import Hook
from earlybird.data.contrast import StrongAugment
from earlybird.data.loader import Loader
from earlybird.ledger import Ledger
from earlybird.objective import Forward
from earlybird.pretraining.encoder import fp32, projector
from earlybird.pretraining.two_views import Pretraining
from earlybird.settings import check_count, check_number, check_share, option

__all__ = ["MoCo", "MomentumContrast", "info_nce", "momentum_update"]

_KEY = "key"


@dataclass(frozen=True, kw_only=True)
class MoCo:
    """Hyper-parameters of MoCo v2; `attach` starts it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    moco_temperature: float = option(0.2, "Temperature t of the loss.")
    moco_momentum: float = option(0.99, "Share m of the key's weights that stays at each step, from 0 to below 1.")
    moco_queue: int = option(4096, "Keys of earlier batches to compare with.")
    moco_width: int = option(128, "Numbers that the projector makes of an image.")
    moco_hidden: int | None = option(None, "Width of the projector's hidden layer; default: as many as features.")
    moco_crop: float = option(0.2, "Smallest share of an image's area that a view shows, in (0, 1].")
    moco_colour: float = option(0.5, "Strength of the colour jitter, 0 to 1.25.")
    moco_grey: float = option(0.2, "Probability with which a view is grey.")
    moco_neighbours: int = option(200, "Neighbours that vote in the probe that judges the encoder.")
    moco_probe_images: int = option(10_000, "Training images among which they are searched.")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "published": {"moco_queue": 65_536, "moco_momentum": 0.999},
    }

    def __post_init__(self) -> None:
        check_number("moco_temperature", self.moco_temperature, lambda t: t > 0, "a number above 0")
        check_number("moco_momentum", self.moco_momentum, lambda m: 0 <= m < 1, "a share from 0 to below 1")
        for name in ("moco_queue", "moco_width", "moco_neighbours", "moco_probe_images"):
            check_count(name, getattr(self, name), "128", optional=False)
        check_count("moco_hidden", self.moco_hidden, "512")
        check_share("moco_crop", self.moco_crop)
        self.views()

    def views(self) -> StrongAugment:
        """Return how both views of an image are made."""
        return StrongAugment(least=self.moco_crop, colour=self.moco_colour, grey=self.moco_grey)

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        example_inputs: Any = None,
        loader: Loader | None = None,
        ledger: Ledger | None = None,
        seed: int = 0,
    ) -> MomentumContrast:
        """Start pre-training: from now on `MomentumContrast.loss` is what is to be made small.

        Args:
            model: The module that is trained, on the device where it will be, before it is wrapped for several
                processes. Its last layer is frozen.
            optimizer: Gets the projector as a group of its own; of several, the first one. Its step is the clock.
            example_inputs: A batch that the model runs on.
            loader: Of the training images. It makes both views from now on, and lends images to the probe.
            ledger: Where to record; by default an own one, which `MomentumContrast.bill` reads.
            seed: Of the projector's weights, and of the keys that the queue begins with.

        Raises:
            InputError: The model does not end in a linear layer, or another method decides the loss.
        """
        return MomentumContrast(
            self, model, optimizer, example_inputs=example_inputs, loader=loader, ledger=ledger, seed=seed
        )


def info_nce(q: Tensor, k: Tensor, queue: Tensor, t: float) -> Tensor:
    """Return the InfoNCE loss, shape (), the mean over B queries.

    Args:
        q: (B, d), queries, of any length.
        k: (B, d), the key of each, of any length; gets no gradient.
        queue: (K, d), other keys, of length 1.
        t: Temperature.
    """
    context, q, k, queue = fp32(q, k.detach(), queue)
    with context:
        q, k = functional.normalize(q, dim=1), functional.normalize(k, dim=1)
        cosine = torch.cat(((q * k).sum(1, keepdim=True), q @ queue.T), 1)  # (B, 1 + K)
        return functional.cross_entropy(cosine / t, torch.zeros(len(q), dtype=torch.long, device=q.device))


@torch.no_grad()
def momentum_update(keys: list[Tensor], queries: list[Tensor], momentum: float) -> None:
    """Move each of ``keys`` towards its query, in place: ``key <- momentum * key + (1 - momentum) * query``."""
    if keys:
        torch._foreach_lerp_(keys, queries, 1 - momentum)


class MomentumContrast(Pretraining):
    """Running MoCo, made by `MoCo.attach`; all its state is in `state_dict` and in the optimizer's.

    Attributes:
        settings: The hyper-parameters.
        queue: (K, d), keys of length 1; of the oldest ones, the next batch takes the place.
    """

    queue: Tensor

    def __init__(
        self,
        settings: MoCo,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        seed: int,
        **more: Any,
    ) -> None:
        self.settings = settings
        make = partial(projector, settings.moco_hidden, settings.moco_width, norm=False)
        probe = (settings.moco_neighbours, settings.moco_probe_images)
        super().__init__(
            "moco", model, optimizer, projector=make, views=settings.views(), probe=probe, seed=seed, **more
        )
        self._seed = seed
        self._begin_queue()
        self._after = [one.register_step_post_hook(Hook(self._after_step, self)) for one in self._optimizers]

    def loss(self, forward: Forward, images: Tensor, labels: Tensor | None = None, *beside: Tensor) -> Tensor:
        """Return the loss of a batch, shape (); its keys join the queue.

        Args:
            forward: The model, or what wraps it.
            images: (2B, C, H, W), the view of each of B images that is the query, then the one that is the key.
            labels: Not looked at.
            beside: Not looked at.
        """
        queries, others = images.chunk(2)
        pairs = self.keys()
        if not pairs:  # no step yet, or a new round: keys of the network before would teach the one rewound
            self._begin_queue()
        # first, since autograd keeps the weights by which the queries are computed
        with torch.no_grad(), self._key_weights(pairs):
            k = self.encoder.project(self.encoder.features(self.encoder.model, others), self._ledger)
        q = self.encoder.project(self.encoder.features(forward, queries), self._ledger)
        loss = info_nce(q, k, self.queue, self.settings.moco_temperature)
        self._enqueue(functional.normalize(k.float(), dim=1))
        return loss

    def keys(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the query's weights that have a key, each with it; none before the first step."""
        return [
            (parameter, state[_KEY])
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if _KEY in (state := optimizer.state.get(parameter, {}))
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the projector, its optimizer state, the queue, and what the own ledger holds."""
        return {**super().state_dict(), "queue": self.queue, "oldest": self._oldest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        super().load_state_dict(state)
        self.queue = state["queue"].to(self.queue)
        self._oldest = int(state["oldest"])

    def detach(self) -> None:
        """Take hooks, projector and keys away; the last layer learns again, and the loader shows one view."""
        for hook in self._after:
            hook.remove()
        for optimizer in self._optimizers:
            for state in optimizer.state.values():
                state.pop(_KEY, None)
        super().detach()

    @contextmanager
    def _key_weights(self, pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
        """Let model and projector hold the key's weights for a while; what batch norms have seen stays the query's."""
        buffers = [
            (buffer, buffer.clone()) for module in (self.encoder.model, self.encoder.projector)
            for buffer in module.buffers()
        ]  # fmt: skip
        for parameter, key in pairs:
            parameter.data, key.data = key.data, parameter.data
        try:
            yield
        finally:
            for parameter, key in pairs:
                parameter.data, key.data = key.data, parameter.data
            for buffer, before in buffers:
                buffer.copy_(before)

    def _begin_queue(self) -> None:
        size = self.settings.moco_queue, self.settings.moco_width
        drawn = torch.randn(size, generator=torch.Generator().manual_seed(self._seed))
        self.queue = functional.normalize(drawn, dim=1).to(self.encoder.head.weight.device)
        self._oldest = 0

    @torch.no_grad()
    def _enqueue(self, k: Tensor) -> None:
        rows = ranks.all_rows(k)[0][-len(self.queue) :]
        places = (self._oldest + torch.arange(len(rows), device=rows.device)) % len(self.queue)
        self.queue = self.queue.index_copy(0, places, rows)  # autograd has kept the old one
        self._oldest = (self._oldest + len(rows)) % len(self.queue)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        keys: list[Tensor] = []
        queries: list[Tensor] = []
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if not parameter.requires_grad:
                continue
            state = optimizer.state[parameter]
            if _KEY in state:
                keys.append(state[_KEY])
                queries.append(parameter)
            else:  # not before the first step: AdamW sets itself up only in a state that is empty
                state[_KEY] = parameter.detach().clone(memory_format=torch.preserve_format)
        momentum_update(keys, queries, self.settings.moco_momentum)
