import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlybird.data import Augment, crop, cutout, flip, normalise
from earlybird.data import augment as module
from earlybird.data.augment import Choices, take
from earlybird.errors import InputError


def images(count=6, channels=3, height=8, width=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_crop_is_a_window_of_the_zero_padded_image():
    x, padding = images(count=40), 3
    padded = torch.nn.functional.pad(x, (padding,) * 4)
    offsets = torch.randint(-padding, padding + 1, (40, 2), generator=generator(5))
    expected = [
        padded[i, :, padding + down : padding + down + 8, padding + right : padding + right + 7]
        for i, (down, right) in enumerate(offsets.tolist())
    ]
    assert torch.equal(crop(x, padding, generator(5)), torch.stack(expected))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.data())
def test_a_reflected_crop_is_a_window_of_the_image_as_pytorch_pads_it(height, width, data):
    padding = data.draw(st.integers(1, min(height, width) - 1))
    x = images(count=40, height=height, width=width)
    padded = torch.nn.functional.pad(x.float(), (padding,) * 4, mode="reflect").to(torch.uint8)
    offsets = torch.randint(-padding, padding + 1, (40, 2), generator=generator(5))
    expected = [
        padded[i, :, padding + down : padding + down + height, padding + right : padding + right + width]
        for i, (down, right) in enumerate(offsets.tolist())
    ]
    assert torch.equal(crop(x, padding, generator(5), "reflect"), torch.stack(expected))


def test_crop_reaches_every_offset():
    x = torch.zeros(500, 1, 3, 3, dtype=torch.uint8)
    x[:, 0, 1, 1] = 9
    places = {tuple(place) for place in (crop(x, 1, generator()) == 9).nonzero()[:, 2:].tolist()}
    assert len(places) == 9


def test_flip_mirrors_about_half_and_leaves_the_rest():
    x = images(count=400)
    flipped = flip(x, generator())
    same = (flipped == x).flatten(1).all(1)
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    assert bool((same | mirrored).all())
    assert 150 < int(mirrored.sum()) < 250


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.booleans(), st.booleans(), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9))
def test_copying_and_gathering_agree(padding, mirror, pick, channels, height, width):
    x = images(count=9, channels=channels, height=height, width=width, seed=padding)
    index = torch.tensor([4, 4, 0, 8, 2, 1, 7]) if pick else None
    count = 7 if pick else 9
    choices = Choices(
        offsets=torch.randint(-padding, padding + 1, (count, 2), generator=generator(1)) if padding else None,
        mirrored=torch.rand(count, generator=generator(2)) < 0.5 if mirror else None,
    )
    copied = module._take_by_copying(x, index, choices)
    assert copied.dtype == torch.uint8
    assert torch.equal(copied, module._take_by_gathering(x, index, choices))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 8), st.booleans(), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9))
def test_copying_and_gathering_agree_on_reflected_borders(padding, mirror, channels, height, width):
    padding = min(padding, height - 1, width - 1)
    x = images(count=30, channels=channels, height=height, width=width, seed=padding)
    choices = Choices(
        offsets=torch.randint(-padding, padding + 1, (30, 2), generator=generator(1)),
        mirrored=torch.rand(30, generator=generator(2)) < 0.5 if mirror else None,
    )
    copied = module._take_by_copying(x, None, choices, "reflect")
    assert torch.equal(copied, module._take_by_gathering(x, None, choices, "reflect"))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(0, 1000))
def test_both_ways_of_cutting_out_agree(side, seed):
    x = torch.ones(20, 2, 8, 7)
    corners = module._corners(20, side, 8, 7, generator(seed))
    by_slice, by_mask = x.clone(), x.clone()
    module.blank(by_slice, corners, side)
    module._blank_by_mask(by_mask, corners, side)
    assert torch.equal(by_slice, by_mask)


def test_cutout_blanks_one_square_around_a_pixel_of_the_image():
    cut = cutout(torch.ones(300, 3, 16, 16), 4, generator())
    holes = (cut == 0).all(1)  # (N, H, W)
    assert torch.equal(holes, (cut == 0).any(1))
    sizes = holes.flatten(1).sum(1)
    assert int(sizes.max()) == 16
    assert int(sizes.min()) >= 4  # at least the quarter whose corner is the centre
    rows, columns = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(rows * columns, sizes)


def test_nothing_changes_its_input():
    x = images()
    before = x.clone()
    for call in (
        lambda: crop(x, 2, generator()),
        lambda: flip(x, generator()),
        lambda: cutout(x, 3, generator()),
        lambda: normalise(x, (0.5,) * 3, (0.2,) * 3),
    ):
        result = call()
        result.zero_()
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("side", [8, 120])  # below and above what is done in one piece an image
def test_normalise_is_the_formula_rounded_once(dtype, channels_last, side):
    x = images(count=25 if side == 8 else 3, height=side, width=side)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    result = normalise(x, mean, std, dtype, channels_last)
    exact = (x.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    torch.testing.assert_close(normalise(x, mean, std).double(), exact, atol=2e-6, rtol=0)
    assert torch.equal(result, normalise(x, mean, std).to(dtype))


def test_normalise_does_not_depend_on_the_neighbours_in_the_batch():
    x = images(count=100, height=32, width=32)
    whole = normalise(x, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    for part in (slice(0, 7), slice(13, 14), slice(1, 100, 3)):
        assert torch.equal(whole[part], normalise(x[part], (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))


def test_an_empty_batch_stays_empty():
    x = images()[:0]
    assert normalise(x, (0.5,) * 3, (0.2,) * 3).shape == (0, 3, 8, 7)
    assert take(x, None, Choices(torch.zeros(0, 2, dtype=torch.int64))).shape == (0, 3, 8, 7)


def test_the_default_augmentation_does_nothing():
    x = images()
    assert torch.equal(take(x, None, module.choose(Augment(), 6, 8, 7, generator())), x)


@pytest.mark.parametrize(
    "wrong", [{"crop": -1}, {"cutout": 1.5}, {"crop": "4"}, {"flip": "always"}, {"flip": 1}, {"pad": "edge"}]
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Augment(**wrong)
