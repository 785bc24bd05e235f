"""Runs on paper: by hand, against published totals, and against runs that were really made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from earlybird.cost.arithmetic import PASSES, Arithmetic
from earlybird.cost.count import count
from earlybird.errors import DataError, InputError
from earlybird.forecast import Forecast, forecast
from earlybird.models import build
from earlybird.stretches import Plan, Stretch, after
from earlybird.train.recipe import Recipe
from earlybird.train.run import train
from tests.tickets.teachers import write_teacher


def on_paper(**values: Any) -> Forecast:
    return forecast(Recipe.from_values(values))


def test_a_change_from_some_step_on_splits_the_stretch_in_which_it_falls() -> None:
    one, other = nn.Linear(1, 1), nn.Linear(2, 2)
    whole = [Stretch(10, one, 8), Stretch(5, one, 8)]
    changed = after(whole, 12, lambda stretch: Stretch(stretch.steps, other, 4))
    assert changed == [Stretch(10, one, 8), Stretch(2, one, 8), Stretch(3, other, 4)]
    assert after(whole, 0, lambda stretch: Stretch(stretch.steps, other, 4))[0].model is other
    assert after(whole, 15, lambda stretch: Stretch(stretch.steps, other, 4)) == whole


# Early-Bird's totals: 160 epochs of VGG-16 on CIFAR, FLOPs 2 a MAC, 3 times the forward pass; an epoch has 390 batches
# of 128 images here, 0.16 % fewer than 50,000
def test_the_rule_of_early_bird_gives_its_published_total() -> None:
    dense, _ = on_paper(data="cifar10", model="vgg16", epochs=160, dense=True).by_rule("early_bird")
    assert dense is not None
    assert dense * 50_000 / 49_920 == pytest.approx(15.1e15, rel=0.005)


def test_the_rule_of_fractrain_gives_its_published_shares() -> None:
    """FW-8/BW-8 is 6.25 % of full compute, FW-3/BW-6 1.46 %; ResNet-38 for 64,000 steps at 8 bits is some 1.27e14."""
    model = build("resnet38", classes=10, image_size=32)
    runs = {}
    for name, bits in (("8/8", (8, 8)), ("3/6", (3, 6))):
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.arithmetic = Arithmetic(activation=bits[0], weight=bits[0], gradient=bits[1], whole=PASSES)  # type: ignore[assignment]
        stretch = Stretch(64_000, model, 32)
        plain = Stretch(64_000, build("resnet38", classes=10, image_size=32), 32)
        run = Forecast(
            name=name, stretches=(stretch,), dense=(plain,), channels=3, batch=128, bits=32, test_images=0,
            evaluate_every=1,
        )  # fmt: skip
        runs[name] = run.by_rule("fractrain")
    assert runs["8/8"][0] == pytest.approx(1.27e14, rel=0.02)
    assert runs["8/8"][0] / runs["8/8"][1] == pytest.approx(0.0625, rel=0.01)  # type: ignore[operator]
    assert runs["3/6"][0] / runs["3/6"][1] == pytest.approx(0.0146, rel=0.02)  # type: ignore[operator]


def test_the_rule_of_e2_train_counts_executed_batches_and_blocks() -> None:
    run = on_paper(data="cifar10", model="resnet20", epochs=2, method="batch_dropping=0.5")
    ours, dense = run.by_rule("e2_train")
    assert ours == 2 * 195 * 128
    assert dense == 2 * 390 * 128
    skipping = Stretch(10, run.dense[0].model, 32, ((("blocks.1.conv1",), 0.4, None), (("blocks.2.conv1",), 0.2, None)))
    half = Forecast(
        name="", stretches=(skipping,), dense=run.dense, channels=3, batch=1, bits=32, test_images=0, evaluate_every=1
    )
    assert half.by_rule("e2_train")[0] == pytest.approx(10 * 0.7)
    layers = run.cost(run.dense[0]).layers
    lost = 0.4 * layers["blocks.1.conv1"].macs + 0.2 * layers["blocks.2.conv1"].macs
    whole = run.cost(run.dense[0]).forward_macs
    assert half.by_rule("fractrain")[0] == pytest.approx(10 * 3 * (whole - lost))


def test_the_table_of_the_fpga_has_no_price_for_bf16_and_says_so() -> None:
    run = on_paper(data="digits", epochs=1, precision="bf16", dense=True)
    assert run.by_rule("shiftaddnet") == (None, None)
    assert "no price" in str(run)
    with pytest.raises(InputError, match="no rule 'own'"):
        run.by_rule("own")


@pytest.mark.parametrize(
    "method",
    [
        {
            "method": "early_bird",
            "tolerance": 0.0,
            "scope": "layer",
            "look_every": "2it",
            "skip": "2it",
            "deadline": "20it",
        },
        {
            "method": "early_bird,batch_dropping=0.4",
            "tolerance": 0.0,
            "scope": "layer",
            "stages": (0.75,),
            "look_every": "2it",
            "skip": "2it",
            "deadline": "20it",
        },
        {"method": "batch_dropping=0.4"},
        {"method": "progressive_resizing", "size_step": 1},
        {"method": "batch_dropping=0.4,progressive_resizing"},
    ],
    ids=lambda method: method["method"],
)
def test_what_is_forecast_is_what_the_run_counts(tmp_path: Path, method: dict[str, Any]) -> None:
    recipe = Recipe.from_values({"data": "digits", "epochs": 3, "width": 0.25, "exact": True, **method})
    paper, result = forecast(recipe), train(recipe, tmp_path / "run", quiet=True)
    expected, found = paper.bill.total, result.bill.total
    spent = [result.bill.phases[name] for name in ("search", "train") if name in result.bill.phases]
    assert sum(row.steps.value for row in spent) == expected.steps.value
    assert expected.macs is not None
    macs = sum(row.macs.value for row in spent if row.macs is not None) + result.bill.phases["evaluate"].macs.value  # type: ignore[union-attr]
    assert expected.macs.value == pytest.approx(macs, rel=0.03)
    assert result.bill.dense is not None
    assert paper.bill.dense is not None
    assert result.bill.dense.total.macs.value == pytest.approx(paper.bill.dense.total.macs.value, rel=0.01)  # type: ignore[union-attr]
    assert expected.seconds is None
    assert found.seconds is not None


@pytest.mark.parametrize(
    "changes", [{}, {"teacher_views": 2}, {"teacher_views": 0}, {"teacher_views": 0, "kd_until": "30it"}]
)
def test_a_teachers_passes_are_forecast(changes: dict[str, Any], tmp_path: Path) -> None:
    teacher, _ = write_teacher(tmp_path / "teacher", classes=10, in_channels=1)
    recipe = Recipe.from_values(
        {
            "data": "digits",
            "epochs": 3,
            "width": 0.25,
            "exact": True,
            "method": "distillation",
            "teacher": str(teacher),
            **changes,
        }
    )
    paper, result = forecast(recipe), train(recipe, tmp_path / "runs" / "run", quiet=True)
    assert not paper.notes
    for expected, found in ((paper.bill, result.bill), (paper.bill.dense, result.bill.dense)):
        assert expected is not None
        assert found is not None
        assert expected.total.macs.value == pytest.approx(found.total.macs.value, rel=0.01)  # type: ignore[union-attr]
    assert paper.bill.total.macs.value > paper.bill.dense.total.macs.value  # type: ignore[union-attr]


def test_without_a_teacher_nothing_is_forecast() -> None:
    with pytest.raises(InputError, match="no teacher was named"):
        on_paper(data="digits", epochs=1, method="distillation")
    paper = on_paper(data="digits", epochs=1, method="distillation", soft_share=0.0)
    assert paper.bill.total.macs == paper.bill.dense.total.macs  # type: ignore[union-attr]


def test_points_in_steps_are_steps_of_the_shorter_run() -> None:
    """As in the run: with half of the batches left out, a ticket that is due at step 40 is drawn after 40 of them."""
    run = on_paper(
        data="digits", epochs=10, width=0.25, method="early_bird,batch_dropping=0.5", deadline="40it", skip="0it",
        look_every="8it",
    )  # fmt: skip
    dense = run.dense[0].steps
    assert [stretch.steps for stretch in run.stretches] == [40, pytest.approx(dense / 2 - 40, abs=1)]


@pytest.mark.parametrize(
    "names",
    [
        "layer_skipping,stochastic_depth", "layer_skipping,fractional_precision", "progressive_precision,block_float",
        "block_float,fractional_precision", "predictive_sign,block_float", "shift_add,fractional_precision",
    ],
)  # fmt: skip
def test_what_a_run_refuses_has_no_bill_on_paper_either(names: str) -> None:
    with pytest.raises(InputError, match="leave one of the two methods out"):
        on_paper(data="digits", model="resnet20", width=0.25, epochs=1, method=names)


def test_no_time_is_claimed() -> None:
    text = str(on_paper(data="digits", epochs=2, method="batch_dropping=0.5"))
    assert "nothing was run" in text
    assert "says nothing about time" in text
    assert "not measured" in text


def test_methods_whose_savings_cannot_be_told_are_named() -> None:
    model = build("small_cnn", classes=10, in_channels=1, image_size=8)
    plan = Plan(10, 20, 0, (1, 8, 8))
    assert plan.images().shape == (2, 1, 8, 8)
    assert count(model, plan.images(4)).forward_macs < count(model, plan.images()).forward_macs
    assert torch.equal(plan.images(4), torch.zeros(2, 1, 4, 4))


def test_data_that_is_in_no_catalogue_is_loaded_for_its_extent(tmp_path: Path) -> None:
    import numpy as np

    images = np.zeros((40, 12, 12, 3), np.uint8)
    images[::2] = 255
    np.savez(
        tmp_path / "own.npz", x_train=images, y_train=np.arange(40) % 4, x_test=images[:8], y_test=np.arange(8) % 4
    )
    run = on_paper(data=str(tmp_path / "own.npz"), model="small_cnn", batch_size=10, epochs=2, dense=True)
    assert run.bill.phases["train"].images.value == 80
    assert run.bill.phases["evaluate"].images.value == 16
    with pytest.raises(InputError, match="lower batch_size"):
        on_paper(data=str(tmp_path / "own.npz"), model="small_cnn", batch_size=50, dense=True)


def test_more_training_images_than_there_are_is_the_same_error_as_in_a_run() -> None:
    with pytest.raises(DataError, match="fewer than 60001"):
        forecast(Recipe.from_values({"data": "cifar10", "train_images": 60_001}))
