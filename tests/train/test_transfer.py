"""Tickets of pre-trained weights on other tasks, from end to end on digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from earlybird.cli import main
from earlybird.errors import InputError
from earlybird.files import read_tensors
from earlybird.report import write
from earlybird.tickets.ticket import Ticket
from earlybird.train import children
from earlybird.train.recipe import Recipe
from earlybird.train.run import train
from earlybird.train.transfer import describe, plan, read_source, transfer
from tests.tasks.folders import write_masks

_NET = {"model": "resnet14", "width": 0.25, "exact": True, "batch_size": 64}
_TASK = {"epochs": 1, "exact": True, "batch_size": 64, "train_images": 128, "lr": 0.05}


def recipe(**values: Any) -> Recipe:
    return Recipe.from_values(values)


@pytest.fixture(scope="module")
def lottery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds from pre-trained weights."""
    base = tmp_path_factory.mktemp("source")
    common = {**_NET, "data": "digits:0-4", "evaluate_every": "9ep"}
    train(recipe(**common, dense=True, epochs=2), base / "pretrained", quiet=True)
    more = {"method": "iterative", "keep_weights": 0.25, "prune_share": 0.5, "leave_dense": "first,last"}
    train(recipe(**common, **more, epochs=1, lr=0.01, start=str(base / "pretrained")), base / "lottery", quiet=True)
    return base / "lottery"


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run contenders in this process, which is faster, and note their order."""
    seen: list[str] = []

    def run(own: Recipe, path: Path, stop: Any, **_: Any) -> None:
        seen.append(f"{path.parent.name}/{path.name}")
        train(own, path, quiet=True)

    monkeypatch.setattr(children, "run_one", run)
    return seen


def test_the_rounds_begin_from_the_pretrained_weights(lottery: Path) -> None:
    rewind, _ = read_tensors(lottery / "rewind.safetensors")
    pretrained, _ = read_tensors(lottery.parent / "pretrained" / "model.safetensors")
    assert all(torch.equal(value, pretrained[name]) for name, value in rewind.items())


def test_every_contender_trains_what_it_says(lottery: Path, tmp_path: Path) -> None:
    controls = ("random_init", "shuffled", "one_shot", "reversed")
    (one,) = plan([lottery], {"others": recipe(**_TASK, data="digits:5-9")}, tmp_path, controls=controls)
    made = {contender.name: contender.recipe(3, {}) for contender in one.contenders}
    assert list(made) == ["dense", *(f"{kind}-round{n}" for n in (1, 2) for kind in ("ticket", *controls))]
    start, ticket = str(lottery / "rewind.safetensors"), str(lottery / "tickets" / "round-2.safetensors")
    assert all(own.fresh_head and own.seed == 3 and own.model == "resnet14" for own in made.values())
    assert (made["dense"].dense, made["dense"].start) == (True, start)
    expected = {
        "ticket": (start, ticket, "none"),
        "random_init": (None, ticket, "none"),
        "shuffled": (start, ticket, "shuffled"),
        "reversed": (start, ticket, "reversed"),
        "one_shot": (start, str(tmp_path / "one-shot" / "lottery" / "round-2.safetensors"), "none"),
    }
    for kind, (begins, held, control) in expected.items():
        own = made[f"{kind}-round2"]
        assert (own.start, own.settings["ticket"], own.settings["control"]) == (begins, held, control)
        assert own.method == ("fixed_ticket",)
    largest = Ticket.load(made["one_shot-round2"].settings["ticket"])
    assert largest.keep == pytest.approx(Ticket.load(ticket).keep)
    weights, _ = read_tensors(start)
    kept, gone = (
        torch.cat([weights[f"{name}.weight"].abs()[mask if stays else ~mask] for name, mask in largest.masks.items()])
        for stays in (True, False)
    )
    assert kept.min() >= gone.max()


def test_classes_masks_and_boxes_from_two_sources(lottery: Path, tmp_path: Path, order: list[str]) -> None:
    tasks = {
        "others": recipe(**_TASK, data="digits:5-9"),
        "boxes": recipe(**_TASK, data="digits:boxes", image_size=16),
    }
    found = transfer([lottery], tasks, tmp_path / "out", rounds=(2,), controls=("shuffled",), seeds=(0, 1), quiet=True)
    assert len(order) == 2 * 3 * 2
    assert found == json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert found["complete"]
    assert [(entry["task"], entry["judged_by"]) for entry in found["tasks"]] == [
        ("others", ""), ("boxes", "detected at IoU 0.5"),
    ]  # fmt: skip
    sparsity = 1 - Ticket.load(lottery / "tickets" / "round-2.safetensors").keep
    for entry in found["tasks"]:
        assert entry["sparsities"] == [pytest.approx(sparsity)]
        results = [
            json.loads((tmp_path / "out" / entry["folder"] / f"dense-seed{seed}" / "result.json").read_text())[
                "accuracy"
            ]
            for seed in (0, 1)
        ]
        assert entry["full"]["mean"] == pytest.approx(sum(results) / 2)
        for row in entry["table"]:
            assert row["matching"] == (row["reached"]["mean"] >= entry["bound"])
    said = describe(found)
    assert "boxes from lottery: detected at IoU 0.5" in said
    assert f"{sparsity:.2%}" in said

    order.clear()
    again = transfer([lottery], tasks, tmp_path / "out", rounds=(2,), controls=("shuffled",), seeds=(0, 1), quiet=True)
    assert again == found
    assert not order  # all was there
    html = write([tmp_path / "out" / "boxes"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "shuffled-round2" in html
    assert "detected at IoU 0.5" in html
    other = {"others": recipe(**{**_TASK, "lr": 0.01}, data="digits:5-9")}
    with pytest.raises(InputError, match="holds a comparison of another recipe"):
        transfer([lottery], other, tmp_path / "out", rounds=(2,), controls=("shuffled",), quiet=True)


def test_masks_of_two_sources_are_compared(lottery: Path, tmp_path: Path, order: list[str]) -> None:
    second = tmp_path / "second"
    shutil.copytree(lottery, second)
    found = transfer(
        [lottery, second], {"others": recipe(**_TASK, data="digits:5-9")}, tmp_path / "out", rounds=(1, 2),
        controls=(), seeds=(0,), quiet=True,
    )  # fmt: skip
    assert [(pair["round"], pair["jaccard"]) for pair in found["similarity"]] == [(1, 1.0), (2, 1.0)]
    assert {entry["folder"] for entry in found["tasks"]} == {"lottery-others", "second-others"}
    assert set(found["universal"]) == {"lottery", "second"}


@pytest.mark.parametrize(
    ("data", "more", "says"),
    [
        ("digits:rgb", {}, "3 channels"),
        ("digits:boxes", {"image_size": 12}, "boxes: the last feature map"),
        ("{masks}", {"image_size": 16}, "3 channels"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_before_anything_runs(
    data: str, more: dict[str, Any], says: str, lottery: Path, tmp_path: Path, order: list[str]
) -> None:
    own = recipe(**_TASK, **more, data=data.format(masks=write_masks(tmp_path / "lines", count=40)))
    with pytest.raises(InputError, match=says):
        transfer([lottery], {"boxes": own}, tmp_path / "out", quiet=True)
    assert not order


def test_folders_that_are_no_source(lottery: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rewind"):
        read_source(lottery.parent / "pretrained")
    with pytest.raises(InputError, match="no round 3"):
        read_source(lottery, (3,))
    with pytest.raises(InputError, match="named twice"):
        plan([lottery, lottery], {"others": recipe(**_TASK, data="digits:5-9")}, tmp_path)
    with pytest.raises(InputError, match="each once"):
        plan([lottery], {"others": recipe(**_TASK, data="digits:5-9")}, tmp_path, controls=("shuffled", "shuffled"))


def test_the_command(lottery: Path, tmp_path: Path, order: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "clothes.toml"
    own.write_text('data = "digits:5-9"\nepochs = 1\nexact = true\ntrain_images = 128\n')
    words = ["transfer", str(lottery), "--tasks", f"digits:0-2,{own}", "--rounds", "1", "--controls", "none"]
    words += ["--seeds", "1", "--epochs", "1", "--exact", "--train-images", "128", "--out", str(tmp_path / "out")]
    assert main([*words, "-q"]) == 0
    said = capsys.readouterr().out
    assert "largest matching sparsity of the ticket" in said
    assert "which one seed does not have" in said
    runs = ("dense-seed0", "ticket-round1-seed0")
    assert sorted(order) == [f"{task}/{run}" for task in ("clothes", "digits-0-2") for run in runs]
    assert main(["transfer", str(lottery), "--tasks", "digits", "--rounds", "x"]) == 2
    assert main(["transfer", str(tmp_path), "--tasks", "digits"]) == 2
