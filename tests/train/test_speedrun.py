"""What the speed-run asks of a run: weights from images, rates by role, an end for the stem, views at test time."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from earlybird.cost.count import count
from earlybird.data import load, normalise
from earlybird.errors import InputError
from earlybird.models import build
from earlybird.optimizers.muon import Muon
from earlybird.train import loop
from earlybird.train.parts import make_optimizer
from earlybird.train.recipe import Recipe
from earlybird.train.run import Run, resume, train
from tests.train import nets

Make = Callable[..., Recipe]

SPEEDRUN: dict[str, Any] = {
    "model": "speedrun", "width": 0.25, "optimizer": "muon", "lr": 0.24, "lr_head": 0.67, "lr_bias": 0.053,
    "flip": "alternating", "pad": "reflect", "label_smoothing": 0.2, "lr_warmup": "0it",
}  # fmt: skip


class Stop(Exception):
    """Ends a run from outside, the way a crash does."""


def crash_at(step: int) -> Callable[[str, Mapping[str, Any]], None]:
    def on_event(kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "step" and fields["step"] == step:
            raise Stop

    return on_event


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


# ---- weights from images ----


def test_a_model_from_outside_is_initialised_once_from_plain_images(small: Make, tmp_path: Path) -> None:
    recipe = small(model="tests.train.nets:initialised", dense=True, epochs=1, checkpoint_every="5it")
    nets._Initialised.seen.clear()
    train(recipe, tmp_path / "whole", quiet=True)
    (images,) = nets._Initialised.seen
    data = load("digits")
    plain = normalise(data.train_images, data.mean, data.std)
    assert images.shape == plain.shape  # there are fewer than 5000
    order = torch.cdist(images.flatten(1), plain.flatten(1)).argmin(1)
    assert torch.equal(images, plain[order])
    with pytest.raises(Stop):
        train(recipe, tmp_path / "run", quiet=True, on_event=crash_at(7))
    assert len(nets._Initialised.seen) == 2
    resume(tmp_path / "run", quiet=True)
    assert len(nets._Initialised.seen) == 2
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_was_killed_before_its_first_checkpoint_is_initialised_again(small: Make, tmp_path: Path) -> None:
    recipe = small(model="tests.train.nets:initialised", dense=True, epochs=1, checkpoint_every="20it")
    with pytest.raises(Stop):
        train(recipe, tmp_path, quiet=True, on_event=crash_at(3))
    nets._Initialised.seen.clear()
    resume(tmp_path, quiet=True)
    assert len(nets._Initialised.seen) == 1


def test_the_first_weights_follow_from_the_seed_alone(small: Make, tmp_path: Path) -> None:
    found = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        torch.manual_seed(len(found))
        train(small(**SPEEDRUN, dense=True, epochs=1, seed=seed), tmp_path / name, quiet=True)
        found.append(load_file(tmp_path / name / "model.safetensors")["whiten.weight"])
    assert torch.equal(found[0], found[1])
    assert found[0].shape == (8, 1, 2, 2)
    data = load("digits")
    patches = functional.unfold(normalise(data.train_images, data.mean, data.std), 2).transpose(0, 1).flatten(1)
    whitened = found[0].flatten(1)[:4] @ patches
    torch.testing.assert_close(whitened @ whitened.T / patches.shape[1], torch.eye(4), atol=0.02, rtol=0)


def test_weights_that_are_drawn_anew_come_from_images_too(small: Make, tmp_path: Path) -> None:
    recipe = small(**SPEEDRUN, weights="reinitialise", epochs=1, evaluate_every="1it")
    train(recipe, tmp_path / "run", quiet=True)
    whiten = load_file(tmp_path / "run" / "model.safetensors")["whiten.weight"]
    train(small(**SPEEDRUN, dense=True, epochs=1), tmp_path / "dense", quiet=True)
    assert torch.equal(whiten, load_file(tmp_path / "dense" / "model.safetensors")["whiten.weight"])


# ---- rates ----


def test_steps_are_those_of_the_published_optimizers_on_the_summed_loss() -> None:
    recipe = Recipe.from_values({**SPEEDRUN, "batch_size": 8, "accumulate": 2, "stem_until": "3it", "epochs": 2})
    model = build("speedrun", classes=10, in_channels=1, image_size=8, width=0.25)
    nn.init.normal_(model.whiten.weight)
    theirs = copy.deepcopy(model)
    ours = make_optimizer(recipe, model, 5)
    assert isinstance(ours, Muon)
    bias, head, decay = 0.053, 0.67, 2e-6 * 16
    published = torch.optim.SGD(
        [
            {"params": [theirs.whiten.bias], "lr": bias, "weight_decay": decay / bias},
            {"params": [p for n, p in theirs.named_parameters() if "norm" in n and "bias" in n], "lr": bias,
             "weight_decay": decay / bias},
            {"params": [theirs.head.weight], "lr": head, "weight_decay": decay / head},
        ],
        momentum=0.85, nesterov=True,
    )  # fmt: skip
    filters = Muon([p for n, p in theirs.named_parameters() if "conv" in n], lr=0.24, momentum=0.6)
    peaks = [group["lr"] for group in published.param_groups]
    for step in range(3):
        images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        labels = torch.arange(16) % 10
        for group in ours.param_groups:
            group["lr"] = group.get("lr_scale", 1.0) * 0.24 * (1 - step / group.get("lr_end", 10))
        for peak, total, group in zip(peaks, (3, 10, 10), published.param_groups):
            group["lr"] = peak * (1 - step / total)
        filters.param_groups[0]["lr"] = 0.24 * (1 - step / 10)
        functional.cross_entropy(model(images), labels, label_smoothing=0.2).backward()
        functional.cross_entropy(theirs(images), labels, label_smoothing=0.2, reduction="sum").backward()
        for optimizer in (ours, published, filters):
            optimizer.step()
            optimizer.zero_grad()
        for parameter in theirs.parameters():
            parameter.grad = None
    for (name, one), other in zip(model.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))


def test_the_loop_gives_each_group_its_rate_and_scales_get_gradients(
    small: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    seen: list[list[float]] = []

    def step(self: Muon, closure: None = None) -> None:
        seen.append([group["lr"] for group in self.param_groups])
        scales = self.param_groups[-1]["params"]
        assert len(scales) == 6
        assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in scales)
        stepped(self, closure)

    stepped = Muon.step
    monkeypatch.setattr(Muon, "step", step)
    recipe = small(**SPEEDRUN, dense=True, epochs=2, stem_until="1ep")
    train(recipe, tmp_path, quiet=True)
    assert len(seen) == 44
    for number, rates in enumerate(seen):
        left, early = 1 - number / 44, max(1 - number / 22, 0)
        wanted = [0.24 * left, 64 * 0.67 * left, 64 * 0.053 * left, 64 * 0.053 * early, 0]
        assert rates == pytest.approx(wanted)


def test_the_stem_is_frozen_at_its_end_and_the_bill_knows(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    recipe = small(**SPEEDRUN, dense=True, epochs=2, stem_until="1ep")
    result = train(recipe, tmp_path / "frozen", quiet=True)
    model = build("speedrun", classes=10, in_channels=1, image_size=8, width=0.25)
    images = torch.zeros(1, 1, 8, 8)
    before = count(model, images).training_macs
    model.whiten.bias.requires_grad_(False)
    after = count(model, images).training_macs
    assert before - after == 16 * 8 * 9 * 7 * 7  # the gradient of what the first 3x3 convolution reads
    assert result.bill.phases["train"].macs is not None
    assert result.bill.phases["train"].macs.value == 22 * 64 * (before + after)
    # a rate of 0 alone gives the same weights
    monkeypatch.setattr(Run, "freeze_ended", lambda run: None)
    train(recipe, tmp_path / "still", quiet=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("frozen", "still"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_dense_is_estimated_as_frozen_from_the_beginning(small: Make, tmp_path: Path) -> None:
    result = train(small(**SPEEDRUN, epochs=3, stem_until="2ep"), tmp_path, quiet=True)
    model = build("speedrun", classes=10, in_channels=1, image_size=8, width=0.25)
    model.whiten.bias.requires_grad_(False)
    assert result.bill.dense is not None
    macs = result.bill.dense.phases["train"].macs
    assert macs is not None
    assert macs.value == 66 * 64 * count(model, torch.zeros(1, 1, 8, 8)).training_macs


# ---- views at test time ----


@pytest.mark.parametrize(("test_time", "count"), [("none", 1), ("mirror", 2), ("mirror_shift", 6)])
def test_only_the_last_row_is_evaluated_with_views_and_the_bill_has_them(
    test_time: str, count: int, small: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    sizes: list[int] = []

    def evaluating(run: Run) -> tuple[float, float]:
        handle = run.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        found = evaluate(run)
        handle.remove()
        return found

    evaluate = loop.evaluate
    monkeypatch.setattr("earlybird.train.run.evaluate", evaluating)
    result = train(small(test_time=test_time, epochs=2), tmp_path, quiet=True)
    assert [row["test_time"] for row in rows(tmp_path)] == ["none", test_time]
    images = len(load("digits").test_images)
    assert sum(sizes) == images * (1 + count)
    assert result.bill.phases["evaluate"].images.value == images * (1 + count)


def test_the_views_of_a_finished_run_are_not_those_of_its_weights(small: Make, tmp_path: Path) -> None:
    recipe = small(epochs=1)
    for name in ("none", "mirror_shift"):
        train(recipe.replace(test_time=name), tmp_path / name, quiet=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("none", "mirror_shift"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert rows(tmp_path / "none")[-1]["test_loss"] != rows(tmp_path / "mirror_shift")[-1]["test_loss"]
    assert recipe.hash() == recipe.replace(test_time="mirror").hash()


# ---- the recipe ----


def test_the_shipped_recipe_has_the_published_constants() -> None:
    path = Path(__file__).parents[2] / "recipes" / "speedrun-cifar10.toml"
    recipe = Recipe.from_toml(path)
    assert recipe.dense
    assert (recipe.epochs, recipe.batch_size, recipe.label_smoothing) == (8, 2000, 0.2)
    assert (recipe.crop, recipe.pad, recipe.flip, recipe.cutout) == (2, "reflect", "alternating", 0)
    model = build("speedrun", classes=10)
    groups = make_optimizer(recipe, model, 25).param_groups
    summed = [group.get("lr_scale", 1) * recipe.lr / (2000 if "lr_scale" in group else 1) for group in groups]
    assert summed == pytest.approx([0.24, 0.67, 0.053, 0.053, 0])
    assert [group["momentum"] for group in groups] == [0.6, 0.85, 0.85, 0.85, 0.85]
    penalties = [2000 * group["weight_decay"] * rate for group, rate in zip(groups, summed)]
    assert penalties == pytest.approx([0, 2e-6 * 2000, 2e-6 * 2000, 2e-6 * 2000, 0])
    assert [group.get("lr_end") for group in groups] == [None, None, None, 75, None]
    assert not Recipe.from_toml(path, {"keep": "0.7"}).dense


def test_scales_that_do_not_learn_cannot_be_ranked(small: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="all channels have the same score, 1"):
        train(small(**SPEEDRUN, epochs=1, score="bn_scale"), tmp_path / "run", quiet=True)


def test_a_first_layer_without_bias_has_none_that_could_end_early(small: Make, tmp_path: Path) -> None:
    recipe = Recipe.from_values({"data": "digits", "optimizer": "muon", "stem_until": "1ep", "model": "vgg11"})
    with pytest.raises(InputError, match="the first layer of vgg11 has no bias"):
        make_optimizer(recipe, build("vgg11", classes=10, in_channels=1, width=0.125), 5)
