import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from earlybird.errors import InputError
from earlybird.kernels.convolution import Gain
from earlybird.kernels.install import Kernels
from earlybird.train import tune as module
from earlybird.train.recipe import Recipe
from earlybird.train.tune import Choice, tune, untuned

CPU = torch.device("cpu")


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10))


IMAGES, LABELS = torch.randn(8, 1, 8, 8), torch.arange(8)


@pytest.fixture
def fake_times(monkeypatch: Any) -> Callable[[dict[tuple[str, bool, bool], float]], None]:
    """Let steps run for real, but claim other times for them."""

    def set_times(times: dict[tuple[str, bool, bool], float]) -> None:
        def fake(candidate: Any) -> float:
            candidate._step()
            choice = candidate.choice
            return times[choice.precision, choice.channels_last, choice.compile]

        monkeypatch.setattr(module._Candidate, "_time", fake)

    return set_times


PLAIN = {
    ("fp32", False, False): 1.0,
    ("fp32", True, False): 1.0,
    ("bf16", False, False): 1.0,
    ("bf16", True, False): 1.0,
}


def test_the_fastest_is_chosen_and_the_reason_has_its_numbers(fake_times: Any) -> None:
    fake_times({**PLAIN, ("bf16", True, False): 0.4})
    choice, record = tune(Recipe.from_values(), build, IMAGES, LABELS, steps=10)
    assert (choice.precision, choice.channels_last, choice.compile) == ("bf16", True, False)
    assert "2.50 times faster" in record["reason"]
    assert len(record["candidates"]) == 4
    assert Choice.read(json.loads(json.dumps(record))["choice"]) == choice


def test_a_large_batch_is_timed_in_part_on_a_cpu(fake_times: Any) -> None:
    fake_times({**PLAIN, ("bf16", True, False): 0.4})
    seen: list[int] = []

    class Counting(nn.Flatten):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return super().forward(images)

    _, record = tune(
        Recipe.from_values(), lambda: nn.Sequential(Counting(), nn.Linear(16, 10)), torch.randn(1024, 1, 4, 4),
        torch.zeros(1024, dtype=torch.long), steps=10,
    )  # fmt: skip
    assert set(seen) == {module.ENOUGH_IMAGES}
    # a step of the whole batch is four times as long
    assert {row["step_s"] for row in record["candidates"]} == {4.0, 1.6}


def test_a_gain_within_noise_changes_nothing(fake_times: Any) -> None:
    fake_times({**PLAIN, ("bf16", True, False): 0.98})
    choice, record = tune(Recipe.from_values(), build, IMAGES, LABELS, steps=10)
    assert (choice.precision, choice.channels_last) == ("fp32", False)
    assert "gains only" in record["reason"]


def test_slow_candidates_are_dropped_early(fake_times: Any) -> None:
    fake_times({**PLAIN, ("bf16", False, False): 9.0, ("bf16", True, False): 1.5})
    _, record = tune(Recipe.from_values({"compile": False}), build, IMAGES, LABELS, steps=10**9)
    timed = {(row["precision"], row["channels_last"]): row["steps_timed"] for row in record["candidates"]}
    assert (timed["bf16", False], timed["bf16", True]) == (1, 2)
    assert timed["fp32", False] > 2


def test_keys_that_are_given_are_not_tried_otherwise(fake_times: Any) -> None:
    fake_times({**PLAIN, ("fp32", True, False): 0.5})
    choice, record = tune(Recipe.from_values({"precision": "bf16"}), build, IMAGES, LABELS, steps=10)
    assert choice.precision == "bf16"
    assert {row["precision"] for row in record["candidates"]} == {"bf16"}
    given = Recipe.from_values({"precision": "bf16", "channels_last": True, "compile": False})
    choice, record = tune(given, build, IMAGES, LABELS, steps=10)
    assert (choice.precision, choice.channels_last, record["candidates"]) == ("bf16", True, [])


@pytest.mark.parametrize("changes", [{"exact": True}, {"tune": False}])
def test_switched_off_means_plain(changes: dict[str, Any]) -> None:
    choice, record = tune(Recipe.from_values(changes), build, IMAGES, LABELS, steps=10)
    assert choice == Choice(device="cpu", threads=torch.get_num_threads())
    assert choice == untuned(Recipe.from_values(changes), CPU)
    assert not record["candidates"]


def test_compile_is_tried_on_long_runs_and_taken_if_repaid(fake_times: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    fake_times({**PLAIN, ("fp32", False, True): 0.5})
    choice, record = tune(Recipe.from_values(), build, IMAGES, LABELS, steps=100)
    assert not choice.compile
    assert "compile not tried" in record["reason"]
    choice, record = tune(Recipe.from_values(), build, IMAGES, LABELS, steps=10_000)
    assert choice.compile
    assert "repays" in record["reason"]
    fake_times({**PLAIN, ("fp32", False, True): 1.5})
    assert not tune(Recipe.from_values(), build, IMAGES, LABELS, steps=10_000)[0].compile


def test_a_machine_without_compiler_goes_on_eagerly(fake_times: Any, monkeypatch: Any) -> None:
    def broken(_: nn.Module) -> None:
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(torch, "compile", broken)
    fake_times(PLAIN)
    choice, record = tune(Recipe.from_values(), build, IMAGES, LABELS, steps=10_000)
    assert not choice.compile
    assert record["candidates"][-1]["failure"] == "RuntimeError: no C++ compiler"
    assert record["candidates"][-1]["step_s"] is None


def build_small_maps() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip


@pytest.fixture
def fake_kernels(monkeypatch: Any) -> Callable[[float, Kernels], None]:
    """Let own kernels make a step take that much of the time of PyTorch's, where layers ask for them."""

    def set_ratio(ratio: float, kernels: Kernels) -> None:
        def fake(candidate: Any) -> float:
            candidate._step()
            return ratio if candidate.choice.kernels else 1.0

        monkeypatch.setattr(module._Candidate, "_time", fake)
        monkeypatch.setattr(module, "choose", lambda *_: (kernels, [Gain(4, 1, 3.0, 2.0, 1.0)]))

    return set_ratio


SMALL = Kernels(products_for_weights=16, products_for_all=4)


def test_own_kernels_are_taken_where_whole_steps_gain(fake_kernels: Any) -> None:
    fake_kernels(0.5, SMALL)
    choice, record = tune(Recipe.from_values(), build_small_maps, IMAGES, LABELS, steps=2000)
    assert choice.kernels == SMALL
    assert "own kernels (weight gradients on maps of up to 16 positions" in record["reason"]
    assert "2.00 times as fast" in record["reason"]
    assert [row["kernels"] for row in record["candidates"]] == [False] * 4 + [True]
    assert record["convolutions"] == [
        {"positions": 4, "layers": 1, "pytorch_s": 3.0, "weights_s": 2.0, "passes_s": 1.0}
    ]
    assert Choice.read(json.loads(json.dumps(record))["choice"]) == choice


def test_own_kernels_that_gain_within_noise_are_not_taken(fake_kernels: Any) -> None:
    fake_kernels(0.98, SMALL)
    choice, record = tune(Recipe.from_values(), build_small_maps, IMAGES, LABELS, steps=2000)
    assert not choice.kernels
    assert "1.02 times as fast" in record["reason"]


def test_short_runs_try_own_kernels_only_when_asked(fake_kernels: Any) -> None:
    fake_kernels(0.5, SMALL)
    for values, taken in (({}, False), ({"kernels": True}, True)):
        choice, _ = tune(Recipe.from_values(values), build_small_maps, IMAGES, LABELS, steps=50)
        assert bool(choice.kernels) == taken
    large = torch.randn(1024, 1, 8, 8), torch.zeros(1024, dtype=torch.long)
    assert tune(Recipe.from_values(), build_small_maps, *large, steps=250)[0].kernels  # 1,000 steps of 256 images
    choice, _ = tune(Recipe.from_values({"kernels": False}), build_small_maps, IMAGES, LABELS, steps=2000)
    assert not choice.kernels
    assert "not tried" in tune(Recipe.from_values(), build_small_maps, IMAGES, LABELS, steps=50)[1]["reason"]


def test_own_kernels_are_timed_for_real() -> None:
    _, record = tune(Recipe.from_values({"kernels": True}), build_small_maps, IMAGES, LABELS, steps=50)
    assert [row["positions"] for row in record["convolutions"]] == [4, 64]
    assert all(row["passes_s"] > 0 for row in record["convolutions"])


@pytest.mark.parametrize(
    "kernels",
    [
        None, {}, {"products_for_weights": 4},
        {"products_for_weights": "4", "products_for_all": 0, "batch_norms": False},
        {"products_for_weights": -1, "products_for_all": 0, "batch_norms": False},
        {"products_for_weights": 4, "products_for_all": 0, "batch_norms": 1},
    ],
)  # fmt: skip
def test_a_choice_with_other_kernels_is_not_read(kernels: Any) -> None:
    written = dataclasses.asdict(Choice(device="cpu"))
    assert Choice.read({**written, "kernels": kernels}) is None


def test_a_choice_from_before_there_were_kernels_is_read() -> None:
    written = dataclasses.asdict(Choice(device="cpu"))
    del written["kernels"]
    assert Choice.read(written) == Choice(device="cpu")


def test_real_timing_disturbs_no_generator() -> None:
    before = torch.get_rng_state()
    choice, record = tune(Recipe.from_values(), build, IMAGES, LABELS, steps=50)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(row["step_s"] > 0 for row in record["candidates"])
    assert record["seconds"] > 0
    assert str(choice.precision) in record["reason"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_untuned_cuda_takes_bf16_and_channels_last() -> None:
    choice = untuned(Recipe.from_values({"tune": False}), torch.device("cuda"))
    assert (choice.precision, choice.channels_last) == ("bf16", True)
    assert untuned(Recipe.from_values({"exact": True}), torch.device("cuda")).precision == "fp32"


class Views(nn.Module):
    """Flattens by a view, which a feature map in channels_last order refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.head(x.view(x.size(0), -1))


def test_a_candidate_that_cannot_run_leaves_the_race() -> None:
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    choice, record = tune(Recipe.from_values(), Views, images, labels, steps=50)
    assert not choice.channels_last
    failures = [(row["channels_last"], "failure" in row) for row in record["candidates"]]
    assert set(failures) == {(False, False), (True, True)}


def test_a_model_that_cannot_train_at_all_is_the_users_error() -> None:
    with pytest.raises(InputError, match=r"cannot take a training step \(RuntimeError"):
        tune(Recipe.from_values(), lambda: nn.Linear(3, 4), torch.randn(4, 3, 8, 8), torch.arange(4), steps=50)
