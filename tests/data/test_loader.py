import pytest
import torch

from earlybird.data import Augment, Loader, normalise
from earlybird.errors import DataError, InputError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
EVERYTHING = Augment(crop=2, flip=True, cutout=3)
ALTERNATING = Augment(crop=2, flip="alternating", cutout=3, pad="reflect")


def data(count=50):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count)  # each image has its own label, so that batches can be traced


def make(count=50, **settings):
    return Loader(*data(count), **({"batch_size": 8, "mean": MEAN, "std": STD, "augment": EVERYTHING} | settings))


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, second)
    )


def test_an_epoch_is_a_function_of_seed_and_number():
    first = list(make().epoch(3))
    assert same(first, list(make().epoch(3)))
    assert not same(first, list(make().epoch(4)))
    assert not same(first, list(make(seed=1).epoch(3)))


@pytest.mark.parametrize("augment", [EVERYTHING, ALTERNATING])
@pytest.mark.parametrize("shuffle", [True, False])
def test_starting_in_the_middle_gives_the_same_batches(shuffle, augment):
    settings = {"shuffle": shuffle, "drop_last": False, "augment": augment}
    loader = make(**settings)
    whole = list(loader.epoch(2))
    for start in range(len(loader) + 1):
        assert same(whole[start:], list(make(**settings).epoch(2, start)))


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_alternating_flip_tosses_a_coin_for_the_first_epoch_and_turns_each_image_from_then_on(shuffle):
    images, _ = data(200)
    plain = normalise(images, MEAN, STD)
    loader = make(200, augment=Augment(flip="alternating"), shuffle=shuffle)
    by_epoch = []
    for epoch in range(4):
        inputs, labels = (torch.cat(parts) for parts in zip(*loader.epoch(epoch)))
        mirrored = torch.empty(200, dtype=torch.bool)
        mirrored[labels] = (inputs == plain[labels].flip(3)).flatten(1).all(1)
        assert torch.equal(inputs, torch.where(mirrored[:, None, None, None], plain.flip(3), plain)[labels])
        by_epoch.append(mirrored)
    assert 70 < int(by_epoch[0].sum()) < 130
    for epoch in range(1, 4):
        assert torch.equal(by_epoch[epoch], by_epoch[0] ^ bool(epoch % 2))
    other = make(200, augment=Augment(flip="alternating"), seed=1)
    assert not torch.equal(other._first_mirrored(), loader._first_mirrored())


def test_every_image_comes_once_an_epoch():
    labels = torch.cat([y for _, y in make(drop_last=False).epoch(0)])
    assert labels.tolist() != list(range(50))
    assert sorted(labels.tolist()) == list(range(50))


def test_the_last_short_batch_is_dropped_or_kept():
    assert [len(y) for _, y in make().epoch(0)] == [8] * 6
    assert [len(y) for _, y in make(drop_last=False).epoch(0)] == [8] * 6 + [2]
    assert (len(make()), len(make(drop_last=False)), len(make(48, drop_last=False))) == (6, 7, 6)


def test_labels_follow_their_images():
    images, _ = data()
    for x, y in make(augment=Augment(), drop_last=False).epoch(1):
        assert torch.equal(x, normalise(images[y], MEAN, STD))


def test_evaluation_gives_all_images_in_order_unchanged():
    images, labels = data()
    batches = list(make(augment=Augment(), shuffle=False, drop_last=False).epoch(0))
    assert torch.equal(torch.cat([x for x, _ in batches]), normalise(images, MEAN, STD))
    assert torch.equal(torch.cat([y for _, y in batches]), labels)


def test_augmentation_differs_between_epochs_batches_and_images():
    images, labels = data(16)
    loader = Loader(
        images[:1].expand(16, -1, -1, -1), labels, batch_size=8, mean=MEAN, std=STD, augment=Augment(2), shuffle=False
    )
    (first, _), (second, _) = loader.epoch(0)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, next(loader.epoch(1))[0])


def test_cutout_is_the_mean_colour():
    blanked = [(x == 0).flatten(1).any(1).all() for x, _ in make(augment=Augment(cutout=3)).epoch(0)]
    assert all(blanked)


@pytest.mark.parametrize("augment", [EVERYTHING, ALTERNATING, Augment()])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_get_the_batches_of_one_process(augment, shuffle, world_size):
    settings = {"augment": augment, "shuffle": shuffle, "drop_last": False, "batch_size": 12}
    ranks = [list(make(rank=rank, world_size=world_size, **settings).epoch(1)) for rank in range(world_size)]
    for number, (x, y) in enumerate(make(**settings).epoch(1)):
        for rank in range(world_size):
            assert torch.equal(ranks[rank][number][0], x[rank::world_size])
            assert torch.equal(ranks[rank][number][1], y[rank::world_size])


def test_a_rank_without_images_in_the_last_batch_gets_an_empty_one():
    batches = list(make(49, rank=1, world_size=2, drop_last=False).epoch(0))
    assert [len(x) for x, _ in batches] == [4] * 6 + [0]


def test_type_and_memory_format_may_be_set_late():
    loader = make()
    plain = next(loader.epoch(0))[0]
    loader.dtype, loader.channels_last = torch.bfloat16, True
    late = next(loader.epoch(0))[0]
    assert late.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(late, plain.to(torch.bfloat16))


def test_a_bare_loop_walks_through_the_epochs():
    loader = make()
    for epoch in range(3):
        assert same(list(loader), list(make().epoch(epoch)))


def test_sample_depends_on_its_seed_alone():
    first = make().sample(10, 7)
    assert first.shape == (10, 3, 8, 8)
    assert torch.equal(first, make(seed=3, rank=1, world_size=2).sample(10, 7))
    assert not torch.equal(first, make().sample(10, 8))
    assert len(make().sample(1000, 0)) == 50


def test_a_sample_that_is_not_augmented_holds_images_of_the_data_set():
    images, _ = data()
    plain = normalise(images, MEAN, STD)
    found = make().sample(20, 7, augmented=False)
    places = [(plain == image).flatten(1).all(1).nonzero().item() for image in found]
    assert len(set(places)) == 20
    assert places != sorted(places)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    loader = make()
    list(loader.epoch(0))
    loader.sample(4, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_batches_may_be_changed_without_harm():
    loader = make(augment=Augment(), shuffle=False, drop_last=False)
    first = [(x.clone(), y.clone()) for x, y in loader.epoch(0)]
    for x, y in loader.epoch(0):
        x.zero_()
        y.zero_()
    assert same(first, list(loader.epoch(0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"batch_size": 51}, "at most 50"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"world_size": 3}, "multiple of 3"),
        ({"mean": (0.5,)}, "one a channel"),
        ({"seed": -1}, "seed -1"),
        ({"augment": Augment(crop=8, pad="reflect")}, "at most 7"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        make(**settings)


def test_wrong_tensors_are_named():
    images, labels = data()
    for wrong, message in (
        ((images.float(), labels), "torch.float32"),
        ((images[0], labels), "shape"),
        ((images, labels[:-1]), "50 images, but 49 labels"),
        ((images, labels.int()), "torch.int32"),
        ((images, labels - 1), "label -1"),
        ((images[:0], labels[:0]), "no images"),
    ):
        with pytest.raises(DataError, match=message):
            Loader(*wrong, batch_size=2, mean=MEAN, std=STD)


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 7)])
def test_a_place_outside_the_epoch_is_refused_at_once(epoch, start):
    with pytest.raises(InputError, match="batch"):
        make().epoch(epoch, start)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_makes_the_same_batches():
    on_cpu, on_gpu = make(), make(device="cuda")
    for (x, y), (u, v) in zip(on_cpu.epoch(0), on_gpu.epoch(0)):
        assert u.device.type == v.device.type == "cuda"
        assert torch.equal(x, u.cpu())
        assert torch.equal(y, v.cpu())
