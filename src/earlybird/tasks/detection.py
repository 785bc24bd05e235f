"""Detection of one object an image: where it is, and what.

Zhou, Wang, Kraehenbuehl, "Objects as Points", https://arxiv.org/abs/1904.07850: an object is found at the place of the
feature map in which its centre lies. A 1x1 convolution on the last map gives at each place a score s, a class c and a
box b = (dx, dy, w, h): the centre's distance from the middle of the place, and the size, all as shares of the image. At
the true place i of an image, the loss is

    CE(s, i) + CE(c_i, class) + box_weight * smooth_l1(b_i, box)

with the first cross-entropy over all places, since there is one object. Found is what the place of the largest score
says; what a row calls accuracy is the share of test images in which the class is right and the IoU of the boxes is at
least ``box_iou``.

What it saves: nothing; it is a task to try pre-trained weights and tickets on (`earlybird.train.transfer`). It does
*not* pay as a detector: several objects, or none, need a score by itself for each place.

Deviations: a softmax over places in the place of a heat map with a focal loss; no offset of its own beside the box.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from earlybird.data.loader import Loader
from earlybird.errors import InputError
from earlybird.ledger import Ledger
from earlybird.objective import Forward
from earlybird.settings import check_number, check_share, option
from earlybird.tasks.maps import HeadTask, targets_of

__all__ = ["Detecting", "Detection", "box_iou", "detection_loss", "found"]

LEAST_PLACES = 4
"""Places of a map in each direction, at least: fewer tell little of where an object is."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Hyper-parameters of detection; `attach` starts it.

    Raises:
        InputError: A value is out of its range; the message names it.
    """

    box_iou: float = option(0.5, "Overlap from which on a box counts as right, in (0, 1].")
    box_weight: float = option(10.0, "Weight of the box's loss beside those of place and class; above 0.")

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "published": {}}

    def __post_init__(self) -> None:
        object.__setattr__(self, "box_iou", check_share("box_iou", self.box_iou))
        check_number("box_weight", self.box_weight, lambda weight: weight > 0, "a number above 0")

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
    ) -> Detecting:
        """Start: from now on `Detecting.loss` is what is to be made small.

        Args:
            model: A classifier of as many classes, on the device where it will be, before it is wrapped for several
                processes. Its last layer is frozen.
            optimizer: Gets the head as a group of its own; of several, the first one.
            example_inputs: A batch that the model runs on.
            loader: Of training images with boxes; hands them out after the labels.
            test: The same of test images.
            ledger: Where to record; by default an own one, which `Detecting.bill` reads.
            seed: Of the head's weights.

        Raises:
            InputError: There are no boxes, the feature map is too small, or another method decides the loss.
        """
        return Detecting(self, model, optimizer, example_inputs=example_inputs, loader=loader, test=test,
                         ledger=ledger, seed=seed)  # fmt: skip


def _head(channels: Sequence[int], classes: int) -> nn.Module:
    return nn.Conv2d(channels[0], 1 + 4 + classes, 1)


def detection_loss(output: Tensor, labels: Tensor, boxes: Tensor, weight: float) -> Tensor:
    """Return the loss of a batch, shape ().

    Args:
        output: (N, 1 + 4 + classes, h, w): at each place score, box and class.
        labels: int64 (N,)
        boxes: (N, 4): left, top, right, bottom, as shares of the side.
        weight: Of the box's part.
    """
    scores, inside, classes = _split(output)
    height, width = output.shape[2:]
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    column = (centre[:, 0] * width).long().clamp(0, width - 1)
    row = (centre[:, 1] * height).long().clamp(0, height - 1)
    place = row * width + column  # (N,)
    images = torch.arange(len(output), device=output.device)
    middle = torch.stack(((column + 0.5) / width, (row + 0.5) / height), 1)
    wanted = torch.cat((centre - middle, size), 1)  # (N, 4)
    return (
        functional.cross_entropy(scores, place)
        + functional.cross_entropy(classes[images, :, place], labels)
        + weight * functional.smooth_l1_loss(inside[images, :, place], wanted, beta=0.05)
    )


def found(output: Tensor) -> tuple[Tensor, Tensor]:
    """Return class int64 (N,) and box (N, 4) at the place of the largest score; see `detection_loss`."""
    scores, inside, classes = _split(output)
    height, width = output.shape[2:]
    place = scores.argmax(1)
    images = torch.arange(len(output), device=output.device)
    middle = torch.stack(((place % width + 0.5) / width, (place // width + 0.5) / height), 1)
    box = inside[images, :, place]
    centre, size = middle + box[:, :2], box[:, 2:]
    return classes[images, :, place].argmax(1), torch.cat((centre - size / 2, centre + size / 2), 1)


def _split(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores (N, places), boxes (N, 4, places) and classes (N, classes, places)."""
    flat = output.flatten(2)
    return flat[:, 0], flat[:, 1:5], flat[:, 5:]


def box_iou(one: Tensor, other: Tensor) -> Tensor:
    """Return intersection over union (N,) of boxes (N, 4), pair by pair; 0 where both are empty."""
    low, high = torch.maximum(one[:, :2], other[:, :2]), torch.minimum(one[:, 2:], other[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(1) for box in (one, other)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-12)


class Detecting(HeadTask):
    """Running detection, made by `Detection.attach`; all its state is in `state_dict`.

    Attributes:
        settings: The hyper-parameters.
    """

    def __init__(self, settings: Detection, model: nn.Module, optimizer: Any, **more: Any) -> None:
        self.settings = settings
        judged_by = f"detected at IoU {settings.box_iou:g}"
        super().__init__("detection", judged_by, "box", model, optimizer, head=_head, coarsest=True, **more)

    def loss(self, forward: Forward, images: Tensor, labels: Tensor, *beside: Tensor) -> Tensor:
        """Return the loss of a batch, shape ().

        Args:
            forward: The model, or what wraps it.
            images: (N, C, H, W)
            labels: int64 (N,)
            beside: The boxes (N, 4).
        """
        boxes = targets_of(beside, "detection")
        return detection_loss(self.outputs(forward, images), labels, boxes, self.settings.box_weight)

    @torch.no_grad()
    def judge(self, test: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        """Return in how many test images the object is found, and how many there are; the model is in eval mode."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.encoder.head.weight.device)
        for images, labels, *beside in test:
            if len(images):  # another rank may have all of a short last batch
                classes, boxes = found(self.outputs(self.encoder.model, images))
                overlap = box_iou(boxes, targets_of(tuple(beside), "detection"))
                sums[0] += ((classes == labels) & (overlap >= self.settings.box_iou)).sum()
                sums[1] += len(labels)
        return sums[0], sums[1]

    def _check_maps(self, maps: Mapping[str, torch.Size]) -> None:
        name, shape = next(iter(maps.items()))
        if min(shape[2:]) < LEAST_PLACES:
            raise InputError(
                f"the last feature map ('{name}') is {shape[2]} x {shape[3]}",
                needed=f"at least {LEAST_PLACES} x {LEAST_PLACES} places to tell where an object is",
                hint="set a larger image_size, or take a model that pools less",
            )
