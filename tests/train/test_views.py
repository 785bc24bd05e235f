"""Test-time augmentation against the published averages, written out."""

import pytest
import torch
from torch.nn import functional

from earlybird.train.views import mean_logits, views

IMAGES = torch.randn(3, 2, 6, 7, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.randn(2 * 6 * 7, 5, generator=torch.Generator().manual_seed(1))


def forward(images: torch.Tensor) -> torch.Tensor:
    return torch.tanh(images.flatten(1) @ WEIGHTS)  # not linear: the mean is of logits, not of images


def mirrored(images: torch.Tensor) -> torch.Tensor:
    return 0.5 * forward(images) + 0.5 * forward(images.flip(-1))


def test_one_view_is_the_image_to_the_bit() -> None:
    assert torch.equal(mean_logits(forward, IMAGES, "none"), forward(IMAGES))


def test_a_mirror_image_counts_one_half() -> None:
    torch.testing.assert_close(mean_logits(forward, IMAGES, "mirror"), mirrored(IMAGES))


def test_shifts_by_one_pixel_count_one_half_together() -> None:
    padded = functional.pad(IMAGES, (1, 1, 1, 1), mode="reflect")
    shifts = [mirrored(padded[:, :, 0:6, 0:7]), mirrored(padded[:, :, 2:8, 2:9])]
    expected = 0.5 * mirrored(IMAGES) + 0.5 * torch.stack(shifts).mean(0)
    torch.testing.assert_close(mean_logits(forward, IMAGES, "mirror_shift"), expected)


@pytest.mark.parametrize(("test_time", "count"), [("none", 1), ("mirror", 2), ("mirror_shift", 6)])
def test_weights_add_up_and_shapes_stay(test_time: str, count: int) -> None:
    found = list(views(IMAGES, test_time))
    assert len(found) == count
    assert sum(weight for weight, _ in found) == 1
    assert all(view.shape == IMAGES.shape for _, view in found)


def test_low_precision_is_averaged_in_float32() -> None:
    logits = mean_logits(lambda images: forward(images).bfloat16(), IMAGES, "mirror")
    expected = 0.5 * (forward(IMAGES).bfloat16().float() + forward(IMAGES.flip(3)).bfloat16().float())
    assert torch.equal(logits, expected)
