import pytest
import torch
from torch import nn
from torch.nn import functional

import earlybird as eb
from earlybird.cost.count import count
from earlybird.errors import InputError
from earlybird.models import build
from earlybird.skipping.pixels import resize
from earlybird.train.recipe import Recipe
from earlybird.train.run import resume, train


class Seen(nn.Module):
    """Remembers the sides of what it was called with."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 1)
        self.sides = []

    def forward(self, images):
        self.sides.append(images.shape[-1])
        return self.layer(images).mean((2, 3))


def walk(steps, side=16, **settings):
    model = Seen()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # a ledger that watches nothing: counting would call the model, too
    running = eb.ProgressiveResizing(**settings).attach(model, optimizer, total_steps=steps, ledger=eb.Ledger())
    for _ in range(steps):
        model(torch.ones(2, 1, side, side)).sum().backward()
        optimizer.step()
    return model, running


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 1)

    def forward(self, images, *, by):
        return by * self.layer(images).mean((2, 3))


def test_a_model_that_is_called_with_more_than_images_is_counted(recwarn):
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    running = eb.ProgressiveResizing().attach(model, optimizer, total_steps=8)
    other = eb.Ledger()
    other.watch(model, optimizer)
    other.enter("train")
    model(torch.ones(2, 1, 16, 16), by=2.0).sum().backward()
    optimizer.step()
    assert not [str(warning.message) for warning in recwarn]
    assert running.bill().total.macs.value == 2 * 2 * 8 * 8 * 2
    for bill in (running.bill(), other.bill()):  # both know what dense would have seen
        assert bill.dense.total.macs.value == 2 * 2 * 16 * 16 * 2


def test_the_published_schedule_by_hand():
    model, _ = walk(10, initial_scale=0.5, size_step=1)  # half up to step 5, whole from step 8 on
    assert model.sides == [8, 8, 8, 8, 8, 8, 11, 13, 16, 16]


def test_sides_are_multiples_of_the_step_and_never_larger_than_the_image():
    model, _ = walk(10, side=18, initial_scale=0.5, size_step=4)
    assert all(side % 4 == 0 or side == 18 for side in model.sides)
    assert model.sides[0] == 8
    assert model.sides[-1] == 18


def test_evaluation_and_passes_without_gradients_see_whole_images():
    model, _ = walk(1, initial_scale=0.5)
    images = torch.ones(2, 1, 16, 16)
    with torch.no_grad():
        model(images)
    model.eval()(images)
    assert model.sides[1:] == [16, 16]


def test_resize_is_a_mean_over_pixels_that_keeps_type_and_layout():
    images = torch.rand(3, 2, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    small = resize(images, 0.5)
    assert (small.shape, small.dtype) == ((3, 2, 4, 4), torch.bfloat16)
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert resize(images, 1.0) is images
    assert resize(images, 0.01, 4).shape[-1] == 4  # one step at least
    constant = torch.full((1, 1, 9, 9), 0.7)
    torch.testing.assert_close(resize(constant, 0.6), torch.full((1, 1, 5, 5), 0.7))


def test_the_bill_prices_each_size_by_itself():
    model = build("small_cnn", classes=10, in_channels=1, image_size=16, width=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    price = {side: count(model, torch.zeros(1, 1, side, side)) for side in (8, 16)}
    running = eb.ProgressiveResizing(grow_from="3it", whole_from="3it").attach(model, optimizer)
    for _ in range(5):
        functional.cross_entropy(model(torch.rand(4, 1, 16, 16)), torch.zeros(4, dtype=torch.long)).backward()
        optimizer.step()
        with torch.no_grad():
            model.eval()(torch.rand(4, 1, 16, 16))
        model.train()
    training = 4 * (3 * price[8].training_macs + 2 * price[16].training_macs)
    phases = running.bill().phases
    assert phases["train"].macs.value == training
    assert phases["evaluate"].macs.value == 4 * 5 * price[16].forward_macs
    assert price[8].training_macs < price[16].training_macs / 3


def test_it_composes_with_the_early_ticket_in_the_shipped_loop_and_resumes_to_the_bit(tmp_path):
    recipe = Recipe.from_values(
        {"data": "digits", "method": "early_bird,progressive_resizing", "epochs": 3, "width": 0.25, "tune": False,
         "look_every": "5it", "skip": "5it", "deadline": "15it", "size_step": 1, "checkpoint_every": "20it"}
    )  # fmt: skip
    whole = train(recipe, tmp_path / "whole", quiet=True)
    assert whole.drawn_at == 15

    class Stop(Exception):
        pass

    def stop(kind, fields):
        if kind == "checkpoint":
            raise Stop

    with pytest.raises(Stop):
        train(recipe, tmp_path / "stopped", quiet=True, on_event=stop)
    resume(tmp_path / "stopped", quiet=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    resized = whole.bill.phases["train"]
    per_image = resized.macs.value / resized.images.value
    plain = train(recipe.replace(method=("early_bird",)), tmp_path / "plain", quiet=True).bill.phases["train"]
    assert per_image < 0.8 * plain.macs.value / plain.images.value


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"initial_scale": 0}, "initial_scale is 0"),
        ({"initial_scale": 1.5}, "initial_scale is 1.5"),
        ({"size_step": 0}, "size_step is 0"),
        ({"grow_from": "half"}, "half"),
        ({"grow_from": "90%"}, "whole_from = 80% comes before grow_from = 90%"),
        ({"grow_from": "4it", "whole_from": "3it"}, "whole_from = 3it comes before grow_from = 4it"),
        ({"whole_from": "5it"}, "whole_from = 5it comes after the end of the run"),
    ],
)
def test_wrong_settings_name_the_value(settings, said):
    with pytest.raises(InputError, match=said):
        walk(4, **settings)


def test_the_length_of_the_run_must_be_known_and_inputs_must_be_images():
    model = Seen()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="total_steps"):
        eb.ProgressiveResizing().attach(model, optimizer)
    eb.ProgressiveResizing().attach(model, optimizer, total_steps=5)
    with pytest.raises(InputError, match="batch of images"):
        model(torch.ones(2, 3))


def test_detached_it_leaves_images_alone():
    model, running = walk(1, initial_scale=0.5)
    running.detach()
    model(torch.ones(2, 1, 16, 16))
    assert model.sides == [8, 16]


def test_what_freezes_on_small_images_is_priced_anew_at_every_size_and_dense_at_the_whole():
    model = build("small_cnn", classes=10, in_channels=1, image_size=16, width=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ledger = eb.Ledger()
    ledger.watch(model, optimizer, torch.zeros(1, 1, 16, 16))
    ledger.enter("train")

    def step(side):
        model(torch.rand(4, 1, side, side)).sum().backward()
        optimizer.step()

    step(16)
    step(8)
    next(model.parameters()).requires_grad_(False)
    ledger.reprice(model)
    spent = ledger.phases["train"].macs
    step(8)
    step(16)
    price = {side: count(model, torch.zeros(1, 1, side, side)) for side in (8, 16)}
    assert ledger.phases["train"].macs - spent == 4 * (price[8].training_macs + price[16].training_macs)
    assert ledger.dense_cost == price[16]


def test_shares_out_of_order_are_refused_before_anything_is_attached():
    with pytest.raises(InputError, match="comes before grow_from"):
        eb.ProgressiveResizing(grow_from="90%")


def test_a_model_that_cannot_take_small_images_is_refused_before_the_first_step_and_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 14 * 14, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match="Sequential does not run on images of 8 x 8 pixels"):
        eb.ProgressiveResizing().attach(model, optimizer, example_inputs=torch.ones(2, 1, 16, 16), total_steps=5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model._forward_pre_hooks
    eb.ProgressiveResizing(initial_scale=1.0).attach(
        model, optimizer, example_inputs=torch.ones(2, 1, 16, 16), total_steps=5
    )


def test_images_are_resized_once_and_somebody_steps():
    model = Seen()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="no optimizer was given"):
        eb.ProgressiveResizing().attach(model, [], total_steps=5)
    first = eb.ProgressiveResizing().attach(model, optimizer, total_steps=5)
    with pytest.raises(InputError, match="resized already"):
        eb.ProgressiveResizing().attach(model, optimizer, total_steps=5)
    first.detach()
    eb.ProgressiveResizing().attach(model, optimizer, total_steps=5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_of_one_channel_keep_the_layout_that_convolutions_see(layout):
    """A plain batch of one channel is contiguous in both senses; its strides say which one it is meant in."""
    plain = torch.rand(3, 1, 8, 8)
    assert resize(plain, 0.5).stride() == torch.rand(3, 1, 4, 4).stride()
    several = torch.rand(3, 2, 8, 8).contiguous(memory_format=layout)
    assert resize(several, 0.5).is_contiguous(memory_format=layout)


def test_dense_is_priced_at_whole_images_without_being_shown_one_first():
    model = build("small_cnn", classes=10, in_channels=1, image_size=16, width=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ledger = eb.Ledger()
    ledger.watch(model, optimizer)
    ledger.enter("train")
    eb.ProgressiveResizing().attach(model, optimizer, total_steps=4, ledger=ledger)
    model(torch.rand(4, 1, 16, 16)).sum().backward()
    optimizer.step()
    assert ledger.dense_cost == count(model, torch.zeros(1, 1, 16, 16))
    assert ledger.phases["train"].macs == 4 * count(model, torch.zeros(1, 1, 8, 8)).training_macs
