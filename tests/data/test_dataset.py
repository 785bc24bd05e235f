import numpy as np
import pytest
import torch

from earlybird.data import load
from earlybird.data.dataset import DataSet, channel_statistics, resize, stratified_split
from earlybird.errors import DataError


def test_statistics_are_those_of_the_pixels():
    images = torch.randint(0, 256, (30, 2, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] //= 3
    mean, std = channel_statistics(images)
    pixels = images.double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())


def test_a_constant_channel_can_be_divided_by():
    assert channel_statistics(torch.full((3, 1, 4, 4), 200, dtype=torch.uint8))[1] == (1 / 255,)


def test_the_split_is_stratified_disjoint_complete_and_seeded():
    labels = np.array([0] * 100 + [1] * 10 + [2] * 2)
    train, test = stratified_split(labels, "abc", seed=4, what="x")
    assert sorted([*train, *test]) == list(range(112))
    assert np.bincount(labels[test]).tolist() == [20, 2, 1]
    again = stratified_split(labels, "abc", seed=4, what="x")[1]
    other = stratified_split(labels, "abc", seed=5, what="x")[1]
    assert test.tolist() == again.tolist() != other.tolist()


def test_all_classes_too_small_to_split_are_named():
    with pytest.raises(DataError, match=r"cat \(1\), fish \(0\)"):
        stratified_split(np.array([0, 1, 1]), ("cat", "dog", "fish"), what="x")


def test_resize_keeps_uint8_and_colours():
    images = torch.full((2, 3, 10, 14), 77, dtype=torch.uint8)
    small = resize(images, 5)
    assert small.shape == (2, 3, 5, 5)
    assert small.dtype == torch.uint8
    assert bool((small == 77).all())
    assert resize(small, 5) is small


def good(**changes):
    parts = {
        "name": "x",
        "train_images": torch.zeros(4, 1, 3, 3, dtype=torch.uint8),
        "train_labels": torch.tensor([0, 1, 0, 1]),
        "test_images": torch.zeros(2, 1, 3, 3, dtype=torch.uint8),
        "test_labels": torch.tensor([0, 1]),
        "classes": ("a", "b"),
        "mean": (0.5,),
        "std": (0.5,),
    }
    return DataSet(**(parts | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": torch.zeros(4, 1, 3, 3)}, "training part: images are torch.float32"),
        ({"test_labels": torch.tensor([0, 2])}, "test part: label 2"),
        ({"test_images": torch.zeros(2, 1, 3, 4, dtype=torch.uint8)}, "training images are 1x3x3, test images 1x3x4"),
        ({"mean": (0.5, 0.5)}, "2 means"),
        (
            {"test_images": torch.zeros(0, 1, 3, 3, dtype=torch.uint8), "test_labels": torch.zeros(0).long()},
            "no images",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    good()
    with pytest.raises(DataError, match=message):
        good(**changes)


def test_a_part_of_the_training_images_keeps_the_shares_of_classes():
    whole = load("digits")
    part = whole.with_training_images(500)
    assert len(part.train_images) == len(part.train_labels) == 500
    shares, wanted = (torch.bincount(data.train_labels) / len(data.train_labels) for data in (part, whole))
    assert float((shares - wanted).abs().max()) < 1 / 500 + 1e-9
    again = load("digits").with_training_images(500)
    assert torch.equal(part.train_images, again.train_images)
    smaller = whole.with_training_images(100)
    known = {image.numpy().tobytes() for image in part.train_images}
    assert {image.numpy().tobytes() for image in smaller.train_images} <= known  # a smaller choice is part of a larger
    assert (part.mean, part.test_images is whole.test_images) == (whole.mean, True)
    assert torch.equal(whole.with_training_images(len(whole.train_images)).train_labels, whole.train_labels)
    with pytest.raises(DataError, match="fewer than 100000"):
        whole.with_training_images(100_000)
