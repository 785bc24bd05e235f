"""Distillation: the loss by hand, the store of the teacher's logits, and runs with it."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from earlybird.data import Augment, Loader
from earlybird.errors import InputError
from earlybird.files import write_json
from earlybird.models import build
from earlybird.tickets.distill import Distillation, Distilling, Teacher, soft_loss
from earlybird.tickets.ticket import Ticket
from earlybird.train.recipe import Recipe
from earlybird.train.run import resume, train
from tests.tickets.teachers import write_teacher


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build("small_cnn", classes=5, in_channels=3, image_size=8, width=0.25, seed=1)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def loader(count: int = 40, **changes: Any) -> Loader:
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    shared: dict[str, Any] = {"batch_size": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return Loader(images, torch.arange(count) % 5, **{**shared, "augment": Augment(crop=2, flip=True), **changes})


def attach(teacher: Path, batches: Loader | None = None, folder: Path | None = None, **settings: Any) -> Distilling:
    model, optimizer = student()
    method = Distillation(teacher=str(teacher), **settings)
    return method.attach(model, optimizer, example_inputs=randn(2, 3, 8, 8), loader=batches, folder=folder)


def test_the_soft_loss_by_hand_both_ways() -> None:
    z, t, temperature = randn(3, 4), 2 * randn(3, 4, seed=1), 3.0
    total = 0.0
    for student_row, teacher_row in zip(z, t):
        p, q = ((row / temperature).exp() / (row / temperature).exp().sum() for row in (teacher_row, student_row))
        total += sum(float(a) * (math.log(a) - math.log(b)) for a, b in zip(p, q))
    assert float(soft_loss(z, t, temperature)) == pytest.approx(9 * total / 3, rel=1e-5)
    assert float(soft_loss(z, t, temperature, "mean")) == pytest.approx(9 * total / 12, rel=1e-5)


def test_the_soft_loss_is_least_at_the_teachers_logits_and_gives_it_no_gradient() -> None:
    t = randn(3, 4, seed=1).requires_grad_()
    z = t.detach().clone().requires_grad_()
    loss = soft_loss(z, t, 2.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-6
    assert t.grad is None


def test_soft_and_hard_labels_in_their_shares(tmp_path: Path) -> None:
    folder, teacher = write_teacher(tmp_path / "teacher")
    running = attach(folder, soft_share=0.7, temperature=4.0)
    model, _ = student()
    images, labels = randn(6, 3, 8, 8), torch.arange(6) % 5
    z, t = model(images), teacher(images)
    expected = 0.7 * soft_loss(z, t, 4.0) + 0.3 * functional.cross_entropy(z, labels)
    model, _ = student()
    assert torch.equal(running.loss(model, images, labels), expected)
    assert torch.equal(running.loss(model.eval(), images, labels, t), running.loss(model, images, labels))


def test_labels_alone_need_no_teacher() -> None:
    model, optimizer = student()
    running = Distillation(soft_share=0.0).attach(model, optimizer, label_smoothing=0.1)
    images, labels = randn(6, 3, 8, 8), torch.arange(6) % 5
    model.eval()
    assert torch.equal(
        running.loss(model, images, labels), functional.cross_entropy(model(images), labels, label_smoothing=0.1)
    )


def test_soft_labels_end_when_they_are_to(tmp_path: Path) -> None:
    folder, _ = write_teacher(tmp_path / "teacher")
    model, optimizer = student()
    method = Distillation(teacher=str(folder), kd_until="50%")
    running = method.attach(model, optimizer, example_inputs=randn(2, 3, 8, 8), total_steps=4)
    told = []
    for _ in range(4):
        told.append(running.teaches)
        running.loss(model, randn(6, 3, 8, 8), torch.arange(6) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert told == [True, True, False, False]
    again = method.attach(*student(), example_inputs=randn(2, 3, 8, 8), total_steps=4, clock=lambda step: step % 3)
    again.load_state_dict({"steps": 3, "ledger": {}})  # a second training has begun
    assert again.teaches


def test_stored_logits_are_those_of_the_very_views_that_the_student_sees(tmp_path: Path) -> None:
    folder, teacher = write_teacher(tmp_path / "teacher")
    batches = loader()
    running = attach(folder, batches, tmp_path / "run", teacher_views=3, kd_storage="fp32")
    assert (running.views, batches.cycle) == (3, 3)
    assert batches.beside is not None
    assert batches.beside.shape == (3, 40, 5)
    seen: dict[int, set[bytes]] = {}
    for epoch in (0, 1, 2, 4):
        for images, labels, logits in batches.epoch(epoch):
            assert torch.allclose(logits, teacher(images), atol=1e-5)
            assert len(labels) == len(logits)
            seen.setdefault(epoch % 3, set()).update(bytes(image.numpy().tobytes()) for image in images)
    assert len(seen[1]) == 40  # epochs 1 and 4 show the same
    assert seen[0] != seen[1] != seen[2]
    running.detach()
    assert (batches.cycle, batches.beside) == (0, None)


def test_the_store_is_read_again_by_another_student_and_not_by_one_of_other_data_or_seed(tmp_path: Path) -> None:
    folder, _ = write_teacher(tmp_path / "teacher")
    first = attach(folder, loader(), tmp_path / "runs" / "one", teacher_views=2)
    assert first.store is not None
    written = first.store.stat().st_mtime_ns
    assert first.store.parent == tmp_path / "runs" / "teacher-logits"
    spent = first._ledger.phases["setup"].macs
    assert spent == 2 * 40 * first.teacher.cost.forward_macs  # type: ignore[union-attr]
    second = attach(folder, loader(), tmp_path / "runs" / "two", teacher_views=2)
    assert second.store == first.store
    assert second.store.stat().st_mtime_ns == written
    assert not any(record.macs for record in second._ledger.phases.values())
    others = [
        attach(folder, loader(seed=1), tmp_path / "runs" / "two", teacher_views=2),
        attach(folder, loader(augment=Augment(crop=1)), tmp_path / "runs" / "two", teacher_views=2),
        attach(folder, loader(count=48), tmp_path / "runs" / "two", teacher_views=2),
        attach(folder, loader(), tmp_path / "runs" / "two", teacher_views=3),
        attach(write_teacher(tmp_path / "other", seed=8)[0], loader(), tmp_path / "runs" / "two", teacher_views=2),
    ]
    assert len({other.store for other in [first, *others]}) == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_damaged_store_is_computed_anew_with_a_note(damage: str, tmp_path: Path) -> None:
    folder, _ = write_teacher(tmp_path / "teacher")
    whole = loader()
    store = attach(folder, whole, tmp_path / "run", teacher_views=2).store
    assert store is not None
    raw = bytearray(store.read_bytes())
    if damage == "flipped":
        raw[-1] ^= 1
    store.write_bytes({"cut": raw[:-9], "flipped": raw, "foreign": b"something else"}[damage])
    again = loader()
    with pytest.warns(UserWarning, match="are damaged .* computed anew"):
        attach(folder, again, tmp_path / "run", teacher_views=2)
    assert torch.equal(again.beside, whole.beside)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(folder, loader(), tmp_path / "run", teacher_views=2)


def test_a_teacher_that_was_shown_images_in_another_scale_sees_them_in_its_own(tmp_path: Path) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    folder, network = write_teacher(tmp_path / "teacher", mean=mean, std=std)
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    own = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    theirs = (pixels - 0.5) / 0.25
    teacher = Teacher(folder / "model.safetensors", torch.device("cpu"), (0.5,) * 3, (0.25,) * 3)
    assert torch.allclose(teacher(theirs), network(own), atol=1e-4)
    plain = Teacher(folder, torch.device("cpu"), mean, std)
    assert torch.equal(plain(own), network(own))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"classes": 7}, "knows 7 classes"),
        ({"in_channels": 1}, "is for images"),
        ({"image_size": 16}, "is for images"),
        ({"class_names": ("a", "b", "c", "d", "f")}, "the class 'f' in the place of 'e'"),
    ],
)
def test_a_teacher_of_something_else_is_refused(changes: dict[str, Any], found: str, tmp_path: Path) -> None:
    folder, _ = write_teacher(tmp_path / "teacher", **changes)
    model, optimizer = student()
    with pytest.raises(InputError, match=found):
        Distillation(teacher=str(folder)).attach(
            model, optimizer, example_inputs=randn(2, 3, 8, 8), class_names=("a", "b", "c", "d", "e")
        )


def test_an_encoder_whose_head_is_not_trained_teaches_nothing(tmp_path: Path) -> None:
    folder, _ = write_teacher(tmp_path / "encoder")
    write_json(folder / "result.json", {"judged_by": "200-NN"})
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(InputError, match="200-NN probe"):
            attach(path)


def test_no_teacher_and_no_such_teacher_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no teacher was named"):
        Distillation().attach(*student(), example_inputs=randn(2, 3, 8, 8))
    with pytest.raises(InputError, match="no run in"):
        attach(tmp_path / "nothing")


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"soft_share": 1.5}, {"kd_reduction": "sum"}, {"teacher_views": -1}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Distillation(**wrong)


# ---- in the shipped loop ----

RUN = {
    "data": "digits", "model": "small_cnn", "width": 0.25, "epochs": 3, "batch_size": 64, "exact": True, "crop": 1,
    "train_images": 640, "checkpoint_every": "5it",
}  # fmt: skip


def run(folder: Path, teacher: Path | None, method: str = "distillation", on_event: Any = None, **more: Any) -> Any:
    recipe = Recipe.from_values({**RUN, "method": method, "teacher": None if teacher is None else str(teacher), **more})
    return train(recipe, folder, quiet=True, on_event=on_event)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "dense"
    train(Recipe.from_values({**RUN, "dense": True, "width": 0.5, "epochs": 8}), folder, quiet=True)
    return folder


class Cut(Exception):
    pass


def cut_at(step: int) -> Any:
    def on_event(kind: str, fields: Any) -> None:
        if kind == "step" and fields["step"] == step:
            raise Cut

    return on_event


@pytest.mark.parametrize("views", [0, 2])
def test_a_run_resumes_to_the_bit_and_its_bill_has_the_teacher(
    views: int, teacher: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(teacher.parent)
    whole = run(tmp_path / "whole" / "run", Path("dense"), teacher_views=views)
    with pytest.raises(Cut):
        run(tmp_path / "cut" / "run", Path("dense"), teacher_views=views, on_event=cut_at(13))
    monkeypatch.chdir(tmp_path)  # a resume may start from another folder
    again = resume(tmp_path / "cut" / "run", quiet=True)
    weights = [load_file(tmp_path / name / "run" / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert again.resumed
    assert again.accuracy == whole.accuracy
    dense = train(Recipe.from_values({**RUN, "dense": True}), tmp_path / "dense", quiet=True)
    passes = 2 * 640 if views else 3 * 640
    cost = Teacher(teacher, torch.device("cpu")).cost.forward_macs
    more = whole.bill.total.macs.value - dense.bill.total.macs.value
    assert more == passes * cost
    setup = whole.bill.phases["setup"].macs.value
    assert setup == (passes * cost if views else 0)
    for reference in (whole.bill.dense, again.bill.dense):  # without the teacher
        assert reference.total.macs.value == dense.bill.total.macs.value
        assert (reference.total.seconds is None) == (not views)  # steps with a teacher are slower than dense ones
        if views:
            assert reference.phases["setup"].seconds.value < whole.bill.phases["setup"].seconds.value


def test_more_views_than_epochs_are_not_computed(teacher: Path, tmp_path: Path) -> None:
    run(tmp_path / "runs" / "run", teacher, teacher_views=50, epochs=1)
    (store,) = (tmp_path / "runs" / "teacher-logits").iterdir()
    assert load_file(store)["logits"].shape == (1, 640, 10)
    assert json.loads((tmp_path / "runs" / "run" / "result.json").read_text())["judged_by"] == ""


def test_a_ticket_by_rounds_is_taught_in_each_of_them(teacher: Path, tmp_path: Path) -> None:
    result = run(
        tmp_path / "runs" / "imp", teacher, "iterative,distillation", keep_weights=0.3, prune_share=0.6,
        rewind_to="3it", teacher_views=2, kd_until="2ep",
    )  # fmt: skip
    ticket = Ticket.load(tmp_path / "runs" / "imp" / "ticket.safetensors")
    weights = load_file(tmp_path / "runs" / "imp" / "model.safetensors")
    for name, mask in ticket.masks.items():
        assert not weights[f"{name}.weight"][~mask].any()
    assert ticket.keep == pytest.approx(0.3, abs=0.01)
    assert result.bill.phases["setup"].macs.value == 2 * 640 * Teacher(teacher, torch.device("cpu")).cost.forward_macs


def test_soft_labels_of_a_good_teacher_help_a_small_student(teacher: Path, tmp_path: Path) -> None:
    taught = run(tmp_path / "taught", teacher, epochs=6)
    alone = run(tmp_path / "alone", None, epochs=6, soft_share=0.0)
    assert taught.loss < alone.loss


def test_a_share_of_the_schedule_is_that_of_all_of_it_where_the_run_begins_inside(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[bool] = []
    loss = Distilling.loss

    def spied(self: Distilling, *args: Any) -> Tensor:
        taught.append(self.teaches)
        return loss(self, *args)

    monkeypatch.setattr(Distilling, "loss", spied)
    run(tmp_path / "run", teacher, width=0.5, epochs=4, start=str(teacher), start_at="2ep", kd_until="75%")
    assert taught == [True] * 10 + [False] * 10
