import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlybird.errors import InputError
from earlybird.train.recipe import Recipe
from earlybird.train.schedule import Schedule


def make(**values: object) -> Schedule:
    return Schedule.from_recipe(Recipe.from_values({"lr": 0.4, "epochs": 10, **values}), 100)


def test_cosine_starts_at_the_peak_and_ends_near_zero() -> None:
    schedule = make(schedule="cosine")
    assert schedule(0) == 0.4
    assert schedule(500) == pytest.approx(0.2)
    assert schedule(999) == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * 0.999)))


def test_one_cycle_rises_over_its_first_part_and_falls_to_zero() -> None:
    schedule = make(schedule="one_cycle")
    assert schedule(0) == pytest.approx(0.4 / 150)
    assert schedule(149) == schedule(150) == pytest.approx(0.4)
    assert schedule(575) == pytest.approx(0.2)
    assert 0 < schedule(999) < 0.001


def test_step_divides_exactly_at_the_milestones() -> None:
    schedule = make(schedule="step", milestones=("5ep", "7ep50it"))
    assert [schedule(step) for step in (0, 499)] == [0.4, 0.4]
    assert schedule(500) == pytest.approx(0.04)
    assert schedule(749) == pytest.approx(0.04)
    assert schedule(750) == pytest.approx(0.004)


def test_warmup_is_linear_and_counts_from_one() -> None:
    schedule = make(schedule="constant", lr_warmup="4it")
    assert [schedule(step) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


@pytest.mark.parametrize("kind", ["cosine", "one_cycle", "constant"])
def test_a_part_that_ends_early_has_the_rate_of_a_shorter_run(kind: str) -> None:
    whole = make(schedule=kind, lr_warmup="20it")
    short = make(schedule=kind, lr_warmup="20it", epochs=3)
    assert [whole(step, 300) for step in range(300)] == [short(step) for step in range(300)]
    assert [whole(step, 300) for step in (300, 301, 999)] == [0, 0, 0]


@given(step=st.integers(0, 999), kind=st.sampled_from(["cosine", "one_cycle", "constant"]))
def test_a_rate_is_positive_and_at_most_the_peak(step: int, kind: str) -> None:
    schedule = make(schedule=kind, lr_warmup="30it")
    assert 0 < schedule(step) <= 0.4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_warmup": "10ep"}, "lr_warmup"),
        ({"schedule": "step", "milestones": ("5ep", "3ep")}, "ascending"),
        ({"schedule": "step", "milestones": ("5ep", "5ep")}, "ascending"),
        ({"schedule": "step", "milestones": ("12ep",)}, "outside the run"),
    ],
)
def test_points_outside_the_run_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**values)
