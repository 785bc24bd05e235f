"""Images on canvases, and the boxes around them."""

from __future__ import annotations

import pytest
import torch

from earlybird.data import boxes, load
from earlybird.errors import InputError


def test_the_box_holds_what_is_bright_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "FRAGMENTS", 0)
    monkeypatch.setattr(boxes, "_NOISE", 0)
    images = torch.zeros(20, 1, 16, 16, dtype=torch.uint8)
    images[:, :, 3:13, 5:9] = 255
    canvases, found = boxes.paste(images, 32, torch.Generator().manual_seed(0))
    assert canvases.shape == (20, 1, 32, 32)
    for canvas, (left, top, right, bottom) in zip(canvases[:, 0], (found * 32).long().tolist()):
        assert canvas[top:bottom, left:right].int().sum() == canvas[canvas > boxes.DARK].int().sum() + sum(
            int(v) for v in canvas[top:bottom, left:right].flatten() if v <= boxes.DARK
        )
        for edge in (canvas[top, left:right], canvas[bottom - 1, left:right]):
            assert int(edge.max()) > boxes.DARK
        assert 0.8 * 10 - 2 <= bottom - top <= 1.4 * 10 + 2  # scaled, and the edges are blurred
        assert 0.8 * 4 - 2 <= right - left <= 1.4 * 4 + 2
    assert len({tuple(box) for box in found.tolist()}) > 10


def test_an_image_without_anything_has_the_whole_canvas() -> None:
    _, found = boxes.paste(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 16, torch.Generator().manual_seed(0))
    assert found.tolist() == [[0, 0, 1, 1]] * 2


def test_a_name_gives_the_same_canvases_each_time() -> None:
    one, other = load("digits:boxes", image_size=16), load("digits:boxes", image_size=16)
    assert torch.equal(one.train_images, other.train_images)
    assert torch.equal(one.test_targets, other.test_targets)
    assert one.looked_for == "box"
    fewer = one.with_training_images(50)
    place = next(i for i in range(len(one.train_images)) if torch.equal(one.train_images[i], fewer.train_images[7]))
    assert torch.equal(fewer.train_targets[7], one.train_targets[place])


def test_a_canvas_without_room_is_refused() -> None:
    with pytest.raises(InputError, match="at least 12 pixels"):
        load("digits:boxes", image_size=8)
