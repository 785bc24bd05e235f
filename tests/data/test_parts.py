"""A part of a data set behind its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from earlybird.data import load
from earlybird.data.parts import Parts, base_of, split
from earlybird.errors import InputError
from earlybird.train.parts import located
from earlybird.train.recipe import Recipe


def test_words_behind_the_colon() -> None:
    assert split("cifar10") == ("cifar10", Parts())
    assert split("cifar10:0-4+7") == ("cifar10", Parts(classes=("0-4", "7")))
    assert split("mnist:rgb+boxes+0-4") == ("mnist", Parts(classes=("0-4",), rgb=True, boxes=True))
    with pytest.raises(InputError, match="empty word"):
        split("cifar10:0-4+")


def test_a_path_with_a_colon_is_a_path(tmp_path: Path) -> None:
    odd = tmp_path / "a:0-4"
    odd.mkdir()
    assert base_of(str(odd)) == str(odd)
    assert base_of(f"{odd}:0-4") == str(odd)


def test_classes_are_numbered_anew_and_nothing_else_changes() -> None:
    whole, part = load("digits"), load("digits:7+2-3")
    assert part.classes == ("2", "3", "7")
    for images, labels, all_images, all_labels in (
        (part.train_images, part.train_labels, whole.train_images, whole.train_labels),
        (part.test_images, part.test_labels, whole.test_images, whole.test_labels),
    ):
        for new, old in enumerate((2, 3, 7)):
            assert torch.equal(images[labels == new], all_images[all_labels == old])
        assert len(images) == sum(int((all_labels == old).sum()) for old in (2, 3, 7))
    assert (part.mean, part.std) == (whole.mean, whole.std)


def test_classes_by_name(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "x.npz",
        images=np.zeros((30, 8, 8), np.uint8),
        labels=np.arange(30) % 3,
        classes=np.array(["cat", "dog", "0"]),
    )
    assert load(f"{tmp_path / 'x.npz'}:dog+cat").classes == ("cat", "dog")
    assert load(f"{tmp_path / 'x.npz'}:0+2").classes == ("cat", "0")  # digits are numbers, whatever names are


@pytest.mark.parametrize(
    ("spec", "says"),
    [("digits:8-10", "8-10"), ("digits:4-2", "4-2"), ("digits:cat", "no classes 'cat'"), ("digits:3", "two classes")],
)
def test_classes_that_are_not_there(spec: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load(spec)


def test_grey_as_three_equal_channels() -> None:
    grey, colour = load("digits:0-4"), load("digits:0-4+rgb")
    assert colour.train_images.shape[1] == len(colour.mean) == len(colour.std) == 3
    for channel in range(3):
        assert torch.equal(colour.test_images[:, channel], grey.test_images[:, 0])


def test_a_recipe_takes_the_defaults_of_the_whole_and_finds_its_folder_again(tmp_path: Path, monkeypatch) -> None:
    assert Recipe.from_values({"data": "cifar10:0-4"}).crop == 4
    boxes = Recipe.from_values({"data": "fashion-mnist:boxes"})
    assert not boxes.flip  # a box does not move with its image
    assert ":" not in Recipe.from_values({"data": "cifar10:0-4"}).name
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert located(Recipe.from_values({"data": "mine:0-1"})).data == f"{tmp_path / 'mine'}:0-1"
