import dataclasses
import math
import tomllib
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earlybird.errors import InputError
from earlybird.step import Step
from earlybird.tickets.early_bird import EarlyBird
from earlybird.train.recipe import Recipe, keys, method_class

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


def test_every_shipped_recipe_is_valid_and_survives_its_own_text() -> None:
    assert len(RECIPES) >= 6
    for path in RECIPES:
        recipe = Recipe.from_toml(path)
        assert Recipe.from_values(recipe.values()) == recipe


@given(epochs=st.decimals(0, 5000, places=9), iterations=st.integers(0, 10**9), percent=st.decimals(0, 100, places=4))
def test_a_step_survives_its_own_text(epochs: Decimal, iterations: int, percent: Decimal) -> None:
    step = Step(Fraction(epochs), iterations, Fraction(percent) / 100)
    assert Step.parse(str(step)) == step


@pytest.mark.parametrize(("text", "value"), [(".5", 0.5), ("7e-1", 0.7), ("1e-1", 0.1), ("0.25", 0.25)])
def test_numbers_are_read_as_people_type_them(text: str, value: float) -> None:
    assert Recipe.from_values({"keep": text}).settings["keep"] == value


def test_the_published_recipe_is_the_published_setting() -> None:
    recipe = Recipe.from_toml(next(path for path in RECIPES if "published" in path.name))
    assert (recipe.lr, recipe.batch_size, recipe.epochs, recipe.weight_decay) == (0.1, 256, 160, 1e-4)
    assert recipe.milestones == (Step.parse("80ep"), Step.parse("120ep"))
    bird = recipe.build_methods()["early_bird"]
    assert (bird.score, bird.sparsity, bird.window, bird.tolerance) == ("bn_scale", 1e-4, 5, 0.1)
    assert bird.deadline is None


def test_toml_round_trip_keeps_every_key(tmp_path: Path) -> None:
    recipe = Recipe.from_values(
        {"data": "cifar10", "keep": "0.3,0.7", "deadline": "none", "milestones": "1ep,2ep", "schedule": "step",
         "ema": "0.99", "lr": "3e-05", "out": 'a "b" \\ c', "lr_warmup": "1ep50it", "clip_norm": "1"}
    )  # fmt: skip
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert Recipe.from_toml(path) == recipe
    assert Recipe.from_toml(path).hash() == recipe.hash()
    assert set(tomllib.loads(recipe.to_toml())) == {key.name for key in keys() if key.method in ("", "early_bird")}


@settings(max_examples=50, deadline=None)
@given(
    lr=st.floats(1e-9, 1e3),
    keep=st.floats(0.01, 0.99),
    epochs=st.integers(1, 10_000),
    smoothing=st.floats(0, 0.99),
    out=st.none() | st.text(st.characters(exclude_categories=("Cs",)), min_size=1),
)
def test_any_valid_values_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, lr: float, keep: float, epochs: int, smoothing: float, out: str | None
) -> None:
    recipe = Recipe.from_values({}).replace(lr=lr, keep=keep, epochs=epochs, label_smoothing=smoothing)
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    if out is not None and out != "none":
        recipe = recipe.model_copy(update={"out": out})
    path.write_text(recipe.to_toml(), encoding="utf-8", newline="")
    assert Recipe.from_toml(path) == recipe


def test_text_is_read_like_a_flag_and_values_like_values() -> None:
    as_text = Recipe.from_values(
        {"epochs": "7", "lr": "0.3", "flip": "true", "channels_last": "auto", "keep": "0.4", "threads": "2",
         "look_every": "0.5ep", "deadline": "none", "model": "vgg16", "evaluate_every": "20it", "stages": "0.8,0.6"}
    )  # fmt: skip
    as_values = Recipe.from_values(
        {"epochs": 7, "lr": 0.3, "flip": True, "channels_last": "auto", "keep": 0.4, "threads": 2,
         "look_every": Step.parse("0.5ep"), "deadline": None, "model": "vgg16", "evaluate_every": Step.parse("20it"),
         "stages": (0.8, 0.6)}
    )  # fmt: skip
    assert as_text == as_values
    assert Recipe.from_values({"channels_last": "true"}).channels_last is True


def test_flags_win_over_the_file_and_the_file_over_preset_and_data(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('data = "cifar10"\npreset = "published"\nwindow = 7\nepochs = 3\n')
    recipe = Recipe.from_toml(path, {"epochs": "4"})
    assert (recipe.epochs, recipe.crop) == (4, 4)  # flag; default of the data set
    bird = recipe.build_methods()["early_bird"]
    assert (bird.window, bird.score) == (7, "bn_scale")  # file; preset


def test_another_optimizer_brings_its_own_rates() -> None:
    assert Recipe.from_values({"data": "cifar10", "optimizer": "adamw"}).lr < 0.01
    assert Recipe.from_values({"optimizer": "adamw", "lr": 0.02}).lr == 0.02


@pytest.mark.parametrize(
    ("key", "near"), [("epoch", "epochs"), ("batchsize", "batch_size"), ("kep", "keep"), ("lookevery", "look_every")]
)
def test_unknown_key_offers_the_nearest_name(key: str, near: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f"{key} = 1\n")
    with pytest.raises(InputError, match=f"unknown key '{key}'.*did you mean '{near}'") as error:
        Recipe.from_toml(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "epochs = 0", "epochs = inf", 'epochs = "many"', "epochs = true", "batch_size = -1", "lr = 0", "lr = nan",
        "lr = inf", 'lr = "fast"', "momentum = 1.0", "keep = 0", "keep = 1.5", "keep = nan", "keep = [0.5, 2.0]",
        'keep = "half"', 'optimizer = "adam"', 'schedule = "cosin"', "label_smoothing = 1", "ema = 1.0", "seed = -1",
        'look_every = "3"', "look_every = 3", 'deadline = "soon"', "window = 1", 'precision = "fp16"', "flip = 1",
        'lr_warmup = "1 epoch"', "milestones = ['1ep']", "clip_norm = 0", "width = 0", 'preset = "fastest"',
        'method = "late_bird"', "tolerance = -0.1", "exact = true\nprecision = 'bf16'", "nesterov = true\nmomentum = 0",
        "schedule = 'step'", "= 3", 'model = ""', "devices = 0", "keep = []", "score = 'weight'", "milestones = '1ep'",
        "stages = 0.7", "stages = [0.3]",
    ],
)  # fmt: skip
def test_wrong_type_or_range_is_one_line_that_names_the_key(line: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(line + "\n")
    with pytest.raises(InputError) as error:
        Recipe.from_toml(path)
    message = str(error.value)
    assert "\n" not in message
    assert error.value.exit_code == 2
    if line[0] != "=":
        assert line.split()[0] in message or "exact" in message


@pytest.mark.parametrize(("flag", "text"), [("epochs", "ten"), ("keep", "0.5,x"), ("lr", ""), ("flip", "yes")])
def test_wrong_flag_is_an_error_too(flag: str, text: str) -> None:
    with pytest.raises(InputError, match=flag):
        Recipe.from_values({flag: text})


def test_no_file_and_not_toml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no recipe"):
        Recipe.from_toml(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        Recipe.from_toml(tmp_path / "bytes.toml")
    with pytest.raises(InputError, match="cannot be read"):
        Recipe.from_toml(tmp_path)


@pytest.mark.parametrize("keep", [1, 1.0, "1", "1.0", (1.0,)])
def test_keeping_everything_is_the_dense_run(keep: Any) -> None:
    recipe = Recipe.from_values({"keep": keep})
    assert recipe.dense
    assert recipe.build_methods() == {}


def test_hash_knows_what_changes_the_weights() -> None:
    recipe = Recipe.from_values({"data": "digits"})
    assert recipe.replace(out="elsewhere", tensorboard=True, checkpoint_every="1it").hash() == recipe.hash()
    for changes in ({"seed": 1}, {"lr": 0.2}, {"keep": 0.4}, {"threads": 2}, {"dense": True}):
        assert recipe.replace(**changes).hash() != recipe.hash()
    dense = recipe.replace(dense=True)
    assert dense.replace(keep=0.3).hash() == dense.hash()


def test_every_field_of_the_method_is_a_key_with_help() -> None:
    by_name = {key.name: key for key in keys()}
    for field in dataclasses.fields(EarlyBird):
        assert by_name[field.name].method == "early_bird"
        assert by_name[field.name].help
    assert all(key.help for key in by_name.values())
    assert len(by_name) == len(keys())  # no two methods, and no method and the recipe, share a name
    assert Recipe.from_values().build_methods() == {"early_bird": EarlyBird()}
    assert method_class("early_bird") is EarlyBird


def test_recipes_are_frozen_and_names_tell_them_apart() -> None:
    recipe = Recipe.from_values({"model": "pkg.nets:build", "keep": "0.3,0.5", "data": "./my_images"})
    assert recipe.name == "build-my_images-keep0.3-0.5-seed0"
    assert math.isclose(recipe.settings["keep"][0], 0.3)
    with pytest.raises(ValueError, match="frozen"):
        recipe.lr = 3  # type: ignore[misc]


@pytest.mark.parametrize("text", ["../../x", "/", "..", "a/b:../c", "nets:x\n y", "-", "\0", "x" * 300])
def test_the_name_is_always_a_plain_file_name(text: str) -> None:
    name = Recipe.from_values({"model": text, "data": text}).name
    assert not set(name) & set("/\\:\n \0")
    assert name[0] not in ".-"
    assert len(name) < 200
    assert ".." not in name


@pytest.mark.parametrize("text", ["early_bird,progressive_resizing", ("early_bird", "progressive_resizing")])
def test_methods_compose_and_each_gets_its_own_settings(text: Any) -> None:
    recipe = Recipe.from_values({"method": text, "keep": "0.3", "initial_scale": "0.75"})
    methods = recipe.build_methods()
    assert list(methods) == ["early_bird", "progressive_resizing"]
    assert (methods["early_bird"].keep, methods["progressive_resizing"].initial_scale) == (0.3, 0.75)
    assert recipe.replace(seed=1).build_methods() == methods
    assert recipe.replace(method="progressive_resizing,early_bird").settings == recipe.settings
    assert recipe.replace(method="early_bird").settings["keep"] == 0.3
    assert recipe.name == "small_cnn-digits-keep0.3-progressive_resizing-seed0"
    assert recipe.replace(method=("progressive_resizing",)).name == "small_cnn-digits-progressive_resizing-seed0"


def test_a_recipe_file_names_one_method_or_several(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('method = "progressive_resizing"\n')
    assert Recipe.from_toml(path).method == ("progressive_resizing",)
    path.write_text('method = ["progressive_resizing", "early_bird"]\n')
    recipe = Recipe.from_toml(path)
    path.write_text(recipe.to_toml())
    assert Recipe.from_toml(path) == recipe


def test_settings_of_a_method_that_is_not_there_are_refused_unless_a_flag_changed_the_methods(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'initial_scale' belongs to the method progressive_resizing") as error:
        Recipe.from_values({"initial_scale": 0.75})
    assert "progressive_resizing,early_bird" in str(error.value)
    path = tmp_path / "recipe.toml"
    path.write_text("keep = 0.3\n")
    assert Recipe.from_toml(path, {"method": "progressive_resizing"}).build_methods().keys() == {"progressive_resizing"}
    with pytest.raises(InputError, match="'keep' belongs"):
        Recipe.from_toml(path, {"method": "progressive_resizing", "keep": "0.4"})
    with pytest.raises(InputError, match="twice"):
        Recipe.from_values({"method": "early_bird,early_bird"})


def test_keeping_everything_leaves_the_other_methods() -> None:
    recipe = Recipe.from_values({"method": "early_bird,progressive_resizing", "keep": 1, "window": 4})
    assert not recipe.dense
    assert list(recipe.build_methods()) == ["progressive_resizing"]


def test_a_file_that_says_dense_is_not_silently_stronger_than_a_flag(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(Recipe.from_values({"dense": True}).to_toml())  # as every dense run writes it: with all keys
    assert Recipe.from_toml(path, {"seed": 1}).dense
    with pytest.raises(InputError, match="dense leaves no method to which 'keep' could belong; add --no-dense"):
        Recipe.from_toml(path, {"keep": 0.7})
    assert Recipe.from_toml(path, {"keep": 0.7, "dense": False}).settings["keep"] == 0.7
    with pytest.raises(InputError, match="'method' could belong"):
        Recipe.from_toml(path, {"method": "progressive_resizing"})
    assert Recipe.from_values({"keep": 0.7, "dense": True}).dense  # said in one breath, dense is meant


@pytest.mark.parametrize(
    "key", [{"lr_head": 0.1}, {"lr_bias": 0.1}, {"sgd_momentum": 0.5}, {"stem_until": "3ep"}], ids=str
)
def test_keys_of_muon_are_refused_without_it(key: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(key))} is for optimizer 'muon', not 'sgd'"):
        Recipe.from_values(key)
    assert Recipe.from_values({**key, "optimizer": "muon"})


def test_the_fast_preset_searches_on_small_images_unless_the_recipe_names_its_methods(tmp_path: Path) -> None:
    recipe = Recipe.from_values({"preset": "fast", "keep": 0.4})
    methods = recipe.build_methods()
    assert list(methods) == ["early_bird", "progressive_resizing"]
    assert methods["early_bird"].keep == 0.4
    assert str(methods["progressive_resizing"].whole_from) == "1ep"
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert Recipe.from_toml(path) == recipe
    assert list(Recipe.from_values({"preset": "fast", "method": "early_bird"}).build_methods()) == ["early_bird"]
    assert list(Recipe.from_values({"preset": "default"}).build_methods()) == ["early_bird"]
    assert Recipe.from_values({"preset": "fast", "dense": True}).build_methods() == {}
