"""Segmentation of one class: which pixels of an image belong to it, such as those of a crack in a road.

Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015,
https://arxiv.org/abs/1411.4038: a 1x1 convolution on the last feature map of each resolution gives a score a place; the
scores are scaled up bilinearly and added up to one logit x a pixel. With p = sigmoid(x) and the mask y, the loss is

    BCE(x, y) + 1 - (2 sum(p y) + 1) / (sum(p) + sum(y) + 1)

over the batch; the second part is the Dice loss (Milletari et al., https://arxiv.org/abs/1606.04797), without which
nothing is found where few pixels are marked. What a row calls accuracy is, over all pixels of the test images together,

    F1 = 2 TP / (2 TP + FP + FN)    or    IoU = TP / (TP + FP + FN)

What it saves: nothing; it is a task to try pre-trained weights and tickets on (`earlybird.train.transfer`). It does
*not* pay where thin structures matter and the network halves the resolution at once: use a decoder that learns.

Deviations: one class; scores are added up at full resolution, where the paper adds them stage by stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from earlybird.data.loader import Loader
from earlybird.ledger import Ledger
from earlybird.objective import Forward
from earlybird.settings import check_choice, check_number, option
from earlybird.tasks.maps import HeadTask, targets_of

__all__ = ["Segmentation", "Segmenting", "counts", "segmentation_loss"]


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Hyper-parameters of segmentation; `attach` starts it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    mask_measure: Literal["f1", "iou"] = option("f1", "Of the marked pixels, what is written down as accuracy.")
    mask_dice: float = option(1.0, "Weight of the Dice loss beside binary cross-entropy; at least 0.")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "published": {"mask_dice": 0.0}}

    def __post_init__(self) -> None:
        check_choice("mask_measure", self.mask_measure, ("f1", "iou"))
        check_number("mask_dice", self.mask_dice, lambda weight: weight >= 0, "a number of at least 0")

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        example_inputs: Any = None,
        loader: Loader | None = None,
        test: Loader | None = None,
        ledger: Ledger | None = None,
        seed: int = 0,
    ) -> Segmenting:
        """Start: from now on `Segmenting.loss` is what is to be made small.

        Args:
            model: A classifier, on the device where it will be, before it is wrapped for several processes. Its last
                layer is frozen.
            optimizer: Gets the head as a group of its own; of several, the first one.
            example_inputs: A batch that the model runs on.
            loader: Of training images with masks; hands them out after the labels.
            test: The same of test images.
            ledger: Where to record; by default an own one, which `Segmenting.bill` reads.
            seed: Of the head's weights.

        Raises:
            InputError: There are no masks, the model has no feature maps, or another method decides the loss.
        """
        return Segmenting(self, model, optimizer, example_inputs=example_inputs, loader=loader, test=test,
                          ledger=ledger, seed=seed)  # fmt: skip


class _Scores(nn.Module):
    """A 1x1 convolution a map; the scores are scaled to the finest map and added up: (N, 1, H, W)."""

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        self.scores = nn.ModuleList(nn.Conv2d(number, 1, 1) for number in channels)

    def forward(self, *maps: Tensor) -> Tensor:
        """Return logits in the resolution of the first map."""
        size = maps[0].shape[2:]
        scores = [score(one) for score, one in zip(self.scores, maps)]
        scaled = [functional.interpolate(one, size, mode="bilinear", align_corners=False) for one in scores[1:]]
        return sum(scaled, scores[0])


def segmentation_loss(logits: Tensor, masks: Tensor, dice: float = 1.0) -> Tensor:
    """Return the loss of a batch, shape ().

    Args:
        logits: (N, H, W)
        masks: (N, H, W) of 0 and 1.
        dice: Weight of the Dice loss.
    """
    masks = masks.to(logits.dtype)
    entropy = functional.binary_cross_entropy_with_logits(logits, masks)
    shares = logits.sigmoid()
    overlap = (2 * (shares * masks).sum() + 1) / (shares.sum() + masks.sum() + 1)
    return entropy + dice * (1 - overlap)


def counts(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how many pixels are true positives, false positives and false negatives, each of shape ().

    Args:
        logits: (N, H, W); above 0 is marked.
        masks: (N, H, W) of 0 and 1.
    """
    marked, truth = logits > 0, masks > 0
    return (marked & truth).sum(), (marked & ~truth).sum(), (~marked & truth).sum()


class Segmenting(HeadTask):
    """Running segmentation, made by `Segmentation.attach`; all its state is in `state_dict`.

    Attributes:
        settings: The hyper-parameters.
    """

    def __init__(self, settings: Segmentation, model: nn.Module, optimizer: Any, **more: Any) -> None:
        self.settings = settings
        judged_by = f"mask {'F1' if settings.mask_measure == 'f1' else 'IoU'}"
        super().__init__("segmentation", judged_by, "mask", model, optimizer, head=_Scores, coarsest=False, **more)

    def logits(self, forward: Forward, images: Tensor, size: torch.Size) -> Tensor:
        """Return a logit a pixel (N, H, W) of ``images``, in resolution ``size``."""
        scores = self.outputs(forward, images)
        return functional.interpolate(scores, size, mode="bilinear", align_corners=False)[:, 0]

    def loss(self, forward: Forward, images: Tensor, labels: Tensor | None = None, *beside: Tensor) -> Tensor:
        """Return the loss of a batch, shape ().

        Args:
            forward: The model, or what wraps it.
            images: (N, C, H, W)
            labels: Not looked at.
            beside: The masks (N, H, W).
        """
        masks = targets_of(beside, "segmentation")
        return segmentation_loss(self.logits(forward, images, masks.shape[1:]), masks, self.settings.mask_dice)

    @torch.no_grad()
    def judge(self, test: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        """Return numerator and denominator of the measure over all pixels; the model is in eval mode."""
        device = self.encoder.head.weight.device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for images, _, *beside in test:
            if len(images):  # another rank may have all of a short last batch
                masks = targets_of(tuple(beside), "segmentation")
                logits = self.logits(self.encoder.model, images, masks.shape[1:])
                sums += torch.stack(counts(logits, masks)).double()
        true, false, missed = sums
        weight = 2 if self.settings.mask_measure == "f1" else 1
        return weight * true, weight * true + false + missed
