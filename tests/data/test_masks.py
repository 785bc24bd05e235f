"""Photographs with masks, as patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from earlybird.data import load
from earlybird.data.masks import patches
from earlybird.errors import DataError, InputError
from tests.tasks.folders import write_masks


def test_patches_lie_row_by_row_around_the_middle() -> None:
    image = torch.arange(7 * 10).reshape(1, 7, 10)
    cut = patches(image, 3)
    assert cut.shape == (6, 1, 3, 3)
    assert torch.equal(cut[0, 0], image[0, 0:3, 0:3])
    assert torch.equal(cut[4, 0], image[0, 3:6, 3:6])


def test_a_folder_of_photographs_and_masks(tmp_path: Path) -> None:
    data = load(str(write_masks(tmp_path, count=10, size=(24, 40))), image_size=8)
    assert data.looked_for == "mask"
    assert data.train_images.shape == (8 * 15, 3, 8, 8)  # a fifth of the photographs is for the test, whole
    assert data.test_targets is not None
    assert data.test_targets.shape == (2 * 15, 8, 8)
    for images, labels, targets in (
        (data.train_images, data.train_labels, data.train_targets),
        (data.test_images, data.test_labels, data.test_targets),
    ):
        assert targets is not None
        assert torch.equal(targets.bool(), images[:, 0] < 100)  # what is marked is dark
        assert torch.equal(labels.bool(), targets.flatten(1).any(1))
    assert 0 < int(data.test_labels.sum()) < len(data.test_labels)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = write_masks(tmp_path / "a", count=3)
    with pytest.raises(InputError, match="--image-size 32 or less"):
        load(str(folder), image_size=64)
    (folder / "masks" / "0.png").rename(folder / "masks" / "other.png")
    with pytest.raises(DataError, match="a mask of the same name"):
        load(str(folder), image_size=8)
    folder = write_masks(tmp_path / "b", count=3)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "masks" / "1.png")
    with pytest.raises(DataError, match=r"1\.png is \(8, 8\)"):
        load(str(folder), image_size=8)
    folder = write_masks(tmp_path / "c", count=3)
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(path)
    with pytest.raises(InputError, match="nothing is marked"):
        load(str(folder), image_size=8)
    folder = write_masks(tmp_path / "d", count=3)
    (folder / "images" / "2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="does not decode"):
        load(str(folder), image_size=8)
