import errno
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from earlybird.errors import CheckpointError, EarlybirdError
from earlybird.train import checkpoint

CPU = torch.device("cpu")


def warnings_of(folder: Path, recipe: str = "r") -> tuple[Any, list[str]]:
    said: list[str] = []
    return checkpoint.load_newest(folder, recipe, said.append), said


def test_round_trip_of_everything_a_state_may_hold(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "tensors": {"a": torch.randn(2, 3), "empty": torch.zeros(0, 4), "scalar": torch.tensor(7, dtype=torch.int64)},
        "mask": torch.tensor([True, False]),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "views": [shared[:4], shared[2:]],
        "numbers": [1, 2.5, True, None, "text", math.inf, -math.inf],
        "nested": {"list": [{"x": 1}, [torch.ones(1)]]},
    }
    checkpoint.save(tmp_path, 3, "r", state)
    (step, loaded), said = warnings_of(tmp_path)
    assert step == 3
    assert not said
    assert loaded["numbers"] == state["numbers"]
    assert type(loaded["numbers"][2]) is bool
    for name, tensor in state["tensors"].items():  # type: ignore[attr-defined]
        assert torch.equal(loaded["tensors"][name], tensor)
        assert loaded["tensors"][name].dtype == tensor.dtype
    assert torch.equal(loaded["views"][1], shared[2:])
    assert loaded["half"].dtype == torch.bfloat16
    assert loaded["nested"]["list"][0] == {"x": 1}


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 3, 1, 1), (1, 3, 5, 5), (2, 1, 3, 3)])
def test_strides_come_back(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    checkpoint.save(tmp_path, 1, "r", {"last": tensor, "turned": torch.randn(3, 5).T})
    (_, loaded), _ = warnings_of(tmp_path)
    assert loaded["last"].stride() == tensor.stride()
    assert torch.equal(loaded["last"], tensor)
    assert loaded["turned"].stride() == (1, 5)


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc/", max_size=3), inner, max_size=3),
        max_leaves=10,
    )
)
def test_any_plain_state_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.mktemp("state")
    checkpoint.save(folder, 0, "r", {"value": value})
    (_, loaded), _ = warnings_of(folder)
    assert loaded == {"value": value}


def test_the_two_newest_stay(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        checkpoint.save(tmp_path, step, "r", {"x": torch.ones(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"checkpoint-{step:08d}.{end}" for step in (15, 100) for end in ("json", "safetensors")
    ]
    assert warnings_of(tmp_path)[0][0] == 100


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert warnings_of(tmp_path) == (None, [])


def damage_bytes(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("end", ["json", "safetensors"])
@pytest.mark.parametrize("damage", [cut_short, damage_bytes, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_newest_one_falls_back_and_says_so(end: str, damage: Any, tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, "r", {"x": torch.full((4,), float(step))})
    if damage is damage_bytes and end == "json":
        path = tmp_path / "checkpoint-00000002.json"
        path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))
    else:
        damage(tmp_path / f"checkpoint-00000002.{end}")
    (step, loaded), said = warnings_of(tmp_path)
    assert (step, loaded["x"][0].item()) == (1, 1.0)
    assert len(said) == (0 if damage is Path.unlink and end == "json" else 1)
    assert all("checkpoint-00000002" in line and "\n" not in line for line in said)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"lr": 0.5', '"lr": 0.7'),
        lambda text: text.replace('"recipe": "r"', '"recipe": "q"'),
        lambda text: text.replace('"step": 2', '"step": 3'),
        lambda text: text.replace(f'"format": {checkpoint.FORMAT}', f'"format": {checkpoint.FORMAT + 1}'),
        lambda text: text.replace('"checksum"', '"checksun"'),
        lambda text: text.replace('"$tensor"', '"$tensoR"'),
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: "{}",
        lambda text: "null",
    ],
)
def test_a_record_is_taken_only_as_it_was_written(damage: Any, tmp_path: Path) -> None:
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, "r", {"x": torch.ones(2), "lr": 0.5})
    before = path.read_text()
    path.write_text(damage(before))
    assert path.read_text() != before
    (step, _), said = warnings_of(tmp_path)
    assert step == 1
    assert len(said) == 1
    assert "\n" not in said[0]


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, KeyError])
def test_tensors_that_cannot_be_unpacked_are_damage(error: Any, tmp_path: Path, monkeypatch: Any) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, "r", {"x": torch.full((2,), float(step))})
    read = checkpoint.read_tensors

    def fail(path: Path) -> Any:
        if "2" in path.name:
            raise error("two\nlines")
        return read(path)

    monkeypatch.setattr(checkpoint, "read_tensors", fail)
    (step, _), said = warnings_of(tmp_path)
    assert (step, len(said)) == (1, 1)


def test_what_lies_after_the_current_step_is_dropped(tmp_path: Path) -> None:
    for step in (10, 20):
        cut_short(checkpoint.save(tmp_path, step, "r", {"x": torch.ones(2)}))
    (tmp_path / "checkpoint-mine.json").touch()
    checkpoint.save(tmp_path, 4, "r", {"x": torch.ones(2)})
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["checkpoint-00000004.json", "checkpoint-mine.json"]
    assert warnings_of(tmp_path)[0][0] == 4


def test_a_crash_between_the_two_files_never_gives_a_mismatched_pair(tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint.save(tmp_path, 1, "r", {"x": torch.zeros(4)})
    checkpoint.save(tmp_path, 2, "r", {"x": torch.zeros(4)})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        for step in (2, 3):  # once over an old pair, once for a new one
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(tmp_path, step, "r", {"x": torch.ones(4)})
    (step, loaded), said = warnings_of(tmp_path)
    assert step == 1
    assert not loaded["x"].any()
    assert len(said) == 1
    checkpoint.save(tmp_path, 4, "r", {"x": torch.ones(4)})
    assert not (tmp_path / "checkpoint-00000003.safetensors").exists()


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        cut_short(checkpoint.save(tmp_path, step, "r", {"x": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"every checkpoint.*damaged"):
        warnings_of(tmp_path)


def test_another_recipe_and_another_format_are_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, "mine", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="another recipe"):
        warnings_of(tmp_path, "yours")
    record = json.loads(path.read_text())
    del record["checksum"]
    path.write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        warnings_of(tmp_path, "mine")


def test_full_disk_leaves_the_older_ones(tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint.save(tmp_path, 1, "r", {"x": torch.ones(1)})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(EarlybirdError, match="no space left"):
            checkpoint.save(tmp_path, 2, "r", {"x": torch.ones(1)})
    assert warnings_of(tmp_path)[0][0] == 1
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("bad", [{1: 2}, {"$tensor": "x"}, {"x": object()}, {"x": {1, 2}}])
def test_what_cannot_be_written_is_refused(bad: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, "r", {"state": bad})
    assert not list(tmp_path.iterdir())


def test_the_record_is_plain_json_and_holds_no_tensor(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, "r", {"x": torch.ones(3)})
    record = json.loads(path.read_text())
    assert record["state"] == {"x": {"$tensor": "x"}}
    assert set(record) == {"format", "step", "recipe", "sha256", "state", "checksum"}


def trained(optimizer: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    classes: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    keywords = {"momentum": 0.9} if optimizer == "sgd" else {}
    made = classes[optimizer](model.parameters(), lr=0.1, **keywords)
    step(model, made)
    return model, made


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(1)
    loss = model(torch.randn(5, 1, 4, 4, generator=generator)).square().sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_restored_model_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    model, optimizer = trained(kind)
    checkpoint.save(tmp_path, 1, "r", checkpoint.capture(model, optimizer))
    step(model, optimizer)
    other, fresh = trained(kind)
    step(other, fresh)
    (_, state), _ = warnings_of(tmp_path)
    checkpoint.restore(other, fresh, state)
    step(other, fresh)
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(one, two), name
        assert one.stride() == two.stride(), name


def test_another_model_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model, optimizer = trained("sgd")
    state = checkpoint.capture(model, optimizer)
    wider = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 2))
    before = wider[0].weight.clone()
    with pytest.raises(CheckpointError, match="shape"):
        checkpoint.restore(wider, torch.optim.SGD(wider.parameters(), lr=0.1), state)
    with pytest.raises(CheckpointError, match="differ"):
        checkpoint.restore(wider[0], torch.optim.SGD(wider.parameters(), lr=0.1), state)
    assert torch.equal(wider[0].weight, before)


def test_generators_come_back_with_half_used_gauss_pairs(tmp_path: Path) -> None:
    before = checkpoint.generators(CPU)
    try:
        torch.manual_seed(1), random.seed(2), np.random.seed(3)
        random.gauss(0, 1), np.random.standard_normal()  # each leaves the second of a pair behind
        checkpoint.save(tmp_path, 1, "r", checkpoint.generators(CPU))
        drawn = (torch.rand(3), random.gauss(0, 1), np.random.standard_normal(2), random.random())
        (_, state), _ = warnings_of(tmp_path)
        checkpoint.set_generators(state, CPU)
        again = (torch.rand(3), random.gauss(0, 1), np.random.standard_normal(2), random.random())
        assert torch.equal(drawn[0], again[0])
        assert drawn[1] == again[1]
        assert (drawn[2] == again[2]).all()
        assert drawn[3] == again[3]
    finally:
        checkpoint.set_generators(before, CPU)
