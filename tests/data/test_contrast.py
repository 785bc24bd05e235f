import colorsys
import math

import pytest
import torch
from torch import Tensor

from earlybird.data import Loader
from earlybird.data.augment import Augment
from earlybird.data.contrast import StrongAugment, StrongChoices, colour_maps
from earlybird.errors import InputError

WHOLE = (0.0, 0.0, 1.0, 1.0)


def pixels(count: int = 6, channels: int = 3, side: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, channels, side, side), generator=torch.Generator().manual_seed(3)).byte()


def choices(count: int, box=WHOLE, colours=(1.0, 1.0, 1.0, 0.0), mirrored=False, grey=False) -> StrongChoices:
    return StrongChoices(
        torch.tensor(box).expand(count, 4), torch.tensor(mirrored).expand(count),
        torch.tensor(colours).expand(count, 4), torch.tensor(grey).expand(count),
    )  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_whole_image_unchanged_is_the_image(channels):
    images = pixels(channels=channels)
    assert torch.equal(StrongAugment().apply(images, choices(6)), images)


def test_a_mirrored_whole_is_the_mirror_image():
    images = pixels()
    assert torch.equal(StrongAugment().apply(images, choices(6, mirrored=True)), images.flip(3))


def test_a_quarter_is_that_quarter_enlarged():
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    images[:, :, :4, 4:] = 200
    shown = StrongAugment().apply(images, choices(1, box=(0.5, 0.0, 1.0, 0.5)))
    assert (shown[:, :, :7, 1:] == 200).all()
    assert (shown[:, :, 7, 1:] == 150).all()  # a quarter of a pixel away from what is beyond


def test_brightness_contrast_and_saturation_by_hand():
    image = torch.tensor([100.0, 50.0, 150.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4).clone()
    image[:, :, :2] = 0
    luminance = 0.299 * 100 + 0.587 * 50 + 0.114 * 150
    b, c, s = 1.2, 0.5, 0.25
    changed = c * b * torch.tensor([100.0, 50.0, 150.0]) + (1 - c) * b * luminance / 2
    grey = 0.299 * changed[0] + 0.587 * changed[1] + 0.114 * changed[2]
    expected = s * changed + (1 - s) * grey
    shown = StrongAugment().apply(image.byte(), choices(1, colours=(b, c, s, 0.0)))[0, :, 3, 3]
    assert shown.float().tolist() == pytest.approx(expected.tolist(), abs=0.51)


def test_grey_images_have_equal_channels_and_the_luminance():
    images = pixels()
    shown = StrongAugment().apply(images, choices(6, grey=True)).float()
    luminance = (images.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    for channel in range(3):
        assert (shown[:, channel] - luminance).abs().max() <= 0.51


def test_a_turn_of_the_hue_keeps_greys_and_the_luminance_and_turns_as_hsv_does():
    matrix, _ = colour_maps(choices(1, colours=(1.0, 1.0, 1.0, 2 * math.pi / 3)), 3)
    assert (matrix[0] @ torch.ones(3)).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    red = matrix[0] @ torch.tensor([1.0, 0.0, 0.0])
    assert float(red @ torch.tensor([0.299, 0.587, 0.114])) == pytest.approx(0.299, abs=1e-4)
    hue = colorsys.rgb_to_hsv(*red.clamp(0, 1).tolist())[0]
    assert min(abs(hue - 1 / 3), abs(hue - 2 / 3)) < 0.12  # a third of a turn, whichever way


def test_boxes_lie_in_the_image_have_the_area_asked_for_and_coins_their_shares():
    drawn = StrongAugment(least=0.3, jitter=0.7, grey=0.4).choose(4000, 8, 8, generator())
    left, top, right, bottom = drawn.boxes.unbind(1)
    assert drawn.boxes.min() >= 0
    assert drawn.boxes.max() <= 1 + 1e-6
    area = (right - left) * (bottom - top)
    assert area.min() > 0.25
    assert area.mean() == pytest.approx(0.63, abs=0.03)
    assert drawn.mirrored.float().mean() == pytest.approx(0.5, abs=0.03)
    assert drawn.grey.float().mean() == pytest.approx(0.4, abs=0.03)
    assert (drawn.colours[:, 0] != 1).float().mean() == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("wrong", [{"least": 0.0}, {"least": 2.0}, {"colour": -1.0}, {"jitter": 1.1}, {"count": 0}])
def test_what_is_out_of_range_is_refused(wrong):
    with pytest.raises(InputError):
        StrongAugment(**wrong)


def make(count: int = 50, **changes) -> Loader:
    labels = torch.arange(count) % 5
    shared = {"batch_size": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return Loader(pixels(count), labels, **{**shared, **changes})


def test_a_loader_of_views_gives_two_of_each_image_and_goes_on_anywhere():
    loader = make()
    loader.views = StrongAugment()
    whole = list(loader.epoch(3))
    for inputs, labels in whole:
        assert inputs.shape == (16, 3, 8, 8)
        assert labels.shape == (8,)
        assert not torch.equal(inputs[:8], inputs[8:])
    for one, two in zip(whole[2:], loader.epoch(3, 2), strict=True):
        assert all(map(torch.equal, one, two))
    assert not torch.equal(whole[0][0], next(loader.epoch(4))[0])


def test_ranks_together_get_the_views_that_one_process_gets():
    whole = make()
    whole.views = StrongAugment()
    ranks = [make(rank=rank, world_size=2) for rank in (0, 1)]
    for rank in ranks:
        rank.views = StrongAugment()
    for (x, y), (x0, y0), (x1, y1) in zip(whole.epoch(1), *(rank.epoch(1) for rank in ranks)):
        assert torch.equal(y[::2], y0)
        assert torch.equal(x[:8][::2], x0[:4])
        assert torch.equal(x[8:][::2], x0[4:])
        assert torch.equal(x[8:][1::2], x1[4:])
        assert torch.equal(y[1::2], y1)


@pytest.mark.parametrize("augment", [Augment(crop=2, flip=True), Augment(crop=1, flip="alternating", cutout=2)])
def test_a_cycle_shows_each_image_in_as_many_ways_as_asked_for(augment):
    loader = make(augment=augment)
    loader.cycle = 2
    views = [torch.cat([inputs for _, inputs in loader.view(view, 7)]) for view in (0, 1)]
    assert not torch.equal(*views)
    loader.beside = torch.arange(100).view(2, 50)
    for epoch in (0, 1, 2, 5):
        for inputs, labels, rows in loader.epoch(epoch):
            numbers = rows - 50 * (epoch % 2)
            assert torch.equal(labels, numbers % 5)
            assert torch.equal(inputs, views[epoch % 2][numbers])


def test_only_views_of_the_cycle_there_are():
    loader = make()
    loader.cycle = 2
    with pytest.raises(InputError, match="view 2 of a cycle of 2"):
        next(loader.view(2, 8))


def test_some_images_with_their_labels_as_they_are():
    loader = make(augment=Augment(crop=2, flip=True))
    batches = list(loader.in_order(20, 8, seed=1))
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    plain = make(shuffle=False, batch_size=50)
    inputs, labels = next(plain.epoch(0))
    for x, y in batches:
        for image, label in zip(x, y):
            place = (inputs == image).flatten(1).all(1).nonzero()
            assert labels[place.item()] == label
