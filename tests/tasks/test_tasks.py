"""Segmentation and detection: losses and measures by hand, and what they refuse."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from earlybird.data import Augment, Loader, load
from earlybird.errors import InputError
from earlybird.files import read_tensors
from earlybird.models import build
from earlybird.tasks.detection import Detection, box_iou, detection_loss, found
from earlybird.tasks.maps import find_maps
from earlybird.tasks.segmentation import Segmentation, counts, segmentation_loss
from earlybird.train.recipe import Recipe
from earlybird.train.run import train
from tests.tasks.folders import write_masks


def test_maps_are_the_last_of_each_resolution() -> None:
    model = build("resnet20", classes=3, in_channels=3, image_size=32, width=0.25)
    maps = find_maps(model, torch.randn(2, 3, 32, 32))
    assert {name: tuple(shape) for name, shape in maps.items()} == {
        "blocks.2": (2, 8, 32, 32), "blocks.5": (2, 8, 16, 16), "blocks": (2, 16, 8, 8),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["small_cnn", "vgg11", "mobilenet_v2", "resnet18", "preact_resnet29", "speedrun"])
def test_every_family_has_maps(name: str) -> None:
    model = build(name, classes=3, in_channels=3, image_size=32, width=0.125)
    shapes = list(find_maps(model, torch.randn(2, 3, 32, 32)).values())
    assert len(shapes) >= 2
    assert all(first[2] > second[2] for first, second in pairwise(shapes))


def test_a_network_without_maps_is_refused() -> None:
    model = build("lenet300", classes=3, in_channels=1, image_size=8)
    with pytest.raises(InputError, match="no feature maps"):
        find_maps(model, torch.randn(2, 1, 8, 8))


def test_the_loss_of_masks_by_hand() -> None:
    logits, masks = torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]])
    expected = math.log(2) + 0.5 * (1 - (2 * 0.5 + 1) / (1 + 1 + 1))
    assert segmentation_loss(logits, masks, 0.5).item() == pytest.approx(expected)
    sure = torch.tensor([[[20.0, -20.0]]])
    assert segmentation_loss(sure, masks).item() == pytest.approx(0, abs=1e-6)


def test_pixels_are_counted() -> None:
    logits = torch.tensor([[[1.0, 2.0, -1.0, -1.0, 3.0]]])
    masks = torch.tensor([[[1, 0, 1, 0, 1]]])
    assert [int(value) for value in counts(logits, masks)] == [2, 1, 1]


def test_overlap_of_boxes_by_hand() -> None:
    one = torch.tensor([[0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]]).float()
    other = torch.tensor([[1, 1, 3, 3], [0, 0, 1, 1], [2, 2, 3, 3], [0, 0, 1, 1]]).float()
    assert box_iou(one, other).tolist() == pytest.approx([1 / 7, 1, 0, 0])


def perfect(labels: Tensor, boxes: Tensor, classes: int, side: int) -> Tensor:
    """What a head would have to give."""
    output = torch.zeros(len(labels), 5 + classes, side, side)
    for n, (label, box) in enumerate(zip(labels.tolist(), boxes)):
        centre, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        column, row = (centre * side).long().tolist()
        output[n, 0, row, column] = 30
        output[n, 1:3, row, column] = centre - (torch.tensor([column, row]) + 0.5) / side
        output[n, 3:5, row, column] = size
        output[n, 5 + label, row, column] = 30
    return output


def test_what_the_loss_wants_is_what_is_found() -> None:
    labels = torch.tensor([0, 2, 1])
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.4], [0.6, 0.0, 1.0, 0.9], [0.0, 0.5, 0.2, 1.0]])
    output = perfect(labels, boxes, 3, 4)
    assert detection_loss(output, labels, boxes, 10).item() == pytest.approx(0, abs=1e-6)
    classes, where = found(output)
    assert torch.equal(classes, labels)
    assert torch.allclose(where, boxes, atol=1e-6)
    wrong = output.clone()
    wrong[:, 3] += 0.1  # everywhere 0.1 wider: smooth L1 of one of four numbers
    assert detection_loss(wrong, labels, boxes, 10).item() == pytest.approx(10 * (0.1 - 0.025) / 4, rel=1e-4)


def small(**more: Any) -> nn.Module:
    return build("resnet14", classes=2, in_channels=3, image_size=16, width=0.25, **more)


def loader(images: Tensor, targets: Tensor | None, **more: Any) -> Loader:
    made = Loader(images, torch.arange(len(images)) % 2, batch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3, **more)
    made.targets = targets
    return made


def test_only_the_network_and_the_head_learn_and_detach_gives_all_back() -> None:
    model, images = small(), torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    own = loader(images, (images[:, 0] > 128).byte())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    last = model.classifier.weight.clone()  # type: ignore[union-attr, operator]
    running = Segmentation().attach(model, optimizer, example_inputs=own.sample(2, 0), loader=own)
    before = [p.clone() for p in (*model.parameters(), *running.encoder.projector.parameters())]
    for inputs, labels, masks in own.epoch(0):
        running.loss(model, inputs, labels, masks).backward()
        optimizer.step()
    after = [*model.parameters(), *running.encoder.projector.parameters()]
    changed = [not torch.equal(one, two) for one, two in zip(before, after, strict=True)]
    assert sum(not c for c in changed) == 2  # weight and bias of the last layer
    assert torch.equal(last, model.classifier.weight)  # type: ignore[union-attr, arg-type]
    running.detach()
    assert own.beside is None
    assert len(optimizer.param_groups) == 1
    assert all(p.requires_grad for p in model.parameters())
    assert running.bill().total.macs.value > 0


def test_the_measures_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = small(), torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    masks = torch.zeros(4, 16, 16, dtype=torch.uint8)
    masks[:, :8] = 1
    own = loader(images, masks, shuffle=False)
    for measure, expected in (("f1", 2 * 0.5 / (2 * 0.5 + 0 + 0.5)), ("iou", 0.5)):
        running = Segmentation(mask_measure=measure).attach(  # type: ignore[arg-type]
            model, torch.optim.SGD(model.parameters(), lr=0.1), example_inputs=own.sample(2, 0), loader=own
        )
        said = torch.full((4, 16, 16), -1.0)
        said[:, :4] = 1  # half of what is marked is found
        monkeypatch.setattr(running, "logits", lambda *_, said=said: said)
        right, seen = running.judge(own.epoch(0))
        assert float(right / seen) == pytest.approx(expected)
        running.detach()


@pytest.mark.parametrize(
    ("method", "targets", "augment", "says"),
    [
        (Segmentation(), None, Augment(), "classes alone"),
        (Segmentation(), torch.zeros(8, 4), Augment(), "a box for each image"),
        (Detection(), torch.zeros(8, 16, 16), Augment(), "a mask for each image"),
        (Detection(), torch.zeros(8, 4), Augment(flip=True), "flip = false"),
        (Segmentation(), torch.zeros(8, 16, 16), Augment(crop=1), "crop = 0"),
    ],
)
def test_data_that_do_not_fit_are_refused_and_the_model_is_left_alone(
    method: Any, targets: Tensor | None, augment: Augment, says: str
) -> None:
    model = small()
    own = loader(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), targets, augment=augment)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=says):
        method.attach(model, optimizer, example_inputs=own.sample(2, 0), loader=own)
    assert own.beside is None
    assert len(optimizer.param_groups) == 1
    assert all(p.requires_grad for p in model.parameters())


def test_a_map_of_few_places_does_not_tell_where_things_are() -> None:
    model = build("resnet14", classes=2, in_channels=3, image_size=8, width=0.25)
    with pytest.raises(InputError, match="at least 4 x 4 places"):
        Detection().attach(
            model, torch.optim.SGD(model.parameters(), lr=0.1), example_inputs=torch.randn(2, 3, 8, 8)
        )  # fmt: skip


@pytest.mark.parametrize("settings", [{"mask_measure": "dice"}, {"mask_dice": -1.0}])
def test_settings_of_segmentation(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        Segmentation(**settings)


@pytest.mark.parametrize("settings", [{"box_iou": 0.0}, {"box_iou": 1.5}, {"box_weight": 0.0}])
def test_settings_of_detection(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        Detection(**settings)


def test_lines_are_found_in_a_run_and_the_head_is_written(tmp_path: Path) -> None:
    folder = write_masks(tmp_path / "lines", count=12)
    recipe = Recipe.from_values(
        {"data": str(folder), "image_size": 16, "method": "segmentation", "model": "resnet14", "width": 0.25,
         "epochs": 8, "batch_size": 8, "lr": 0.1, "exact": True, "evaluate_every": "8ep"}
    )  # fmt: skip
    result = train(recipe, tmp_path / "run", quiet=True)
    assert result.judged_by == "mask F1"
    assert result.accuracy > 0.9  # a dark line on a bright ground
    assert set(read_tensors(tmp_path / "run" / "head.safetensors")[0]) == {
        f"scores.{number}.{what}" for number in range(3) for what in ("weight", "bias")
    }


def test_digits_are_found_in_a_run(tmp_path: Path) -> None:
    recipe = Recipe.from_values(
        {"data": "digits:0-1+boxes", "image_size": 16, "method": "detection", "model": "resnet14", "width": 0.5,
         "epochs": 12, "batch_size": 32, "lr": 0.05, "exact": True, "evaluate_every": "12ep"}
    )  # fmt: skip
    result = train(recipe, tmp_path / "run", quiet=True)
    assert result.judged_by == "detected at IoU 0.5"
    data = load("digits:0-1+boxes", image_size=16)
    assert data.test_targets is not None
    always = torch.tensor([0.25, 0.25, 0.75, 0.75]).expand(len(data.test_targets), 4)
    guess = (box_iou(always, data.test_targets) >= 0.5).float().mean().item()
    assert result.accuracy > guess / 2 + 0.2  # of two classes, half are guessed right
