import errno
import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from earlybird.cost.bill import Bill
from earlybird.data import Augment, Loader, load
from earlybird.errors import CheckpointError, DataError, DivergedError, EarlybirdError, InputError, Interrupted
from earlybird.kernels import convolution
from earlybird.kernels.install import Kernels
from earlybird.models import build
from earlybird.train import checkpoint, ema, tune
from earlybird.train.folder import RunFolder
from earlybird.train.loop import fit
from earlybird.train.recipe import Recipe
from earlybird.train.run import Run, resume, train
from earlybird.train.schedule import Schedule

Make = Callable[..., Recipe]


class Stop(Exception):
    """Ends a run from outside, the way a crash does."""


def at(step: int, action: Callable[[], None]) -> Callable[[str, Mapping[str, Any]], None]:
    def on_event(kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "step" and fields["step"] == step:
            action()

    return on_event


def crash() -> None:
    raise Stop


def same(one: Path, two: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_may_end_within_an_epoch_and_resumes_there(small: Make, tmp_path: Path) -> None:
    recipe = small(dense=True, model="small_cnn", width=0.25, epochs=1.3, checkpoint_every="1it")
    whole = train(recipe, tmp_path / "whole", quiet=True)
    spe, last = (row["step"] for row in rows(tmp_path / "whole"))
    assert last == whole.steps == round(1.3 * spe)
    with pytest.raises(Stop):
        train(recipe, tmp_path / "part", quiet=True, on_event=at(spe + 2, crash))
    assert resume(tmp_path / "part", quiet=True).steps == whole.steps
    assert same(tmp_path / "whole", tmp_path / "part")


def test_a_dense_run_equals_a_hand_written_loop_to_the_bit(small: Make, tmp_path: Path) -> None:
    recipe = small(dense=True, model="small_cnn", width=0.25, schedule="cosine", label_smoothing=0.1, clip_norm=1.0)
    result = train(recipe, tmp_path / "run", quiet=True)

    data = load("digits")
    loader = Loader(
        data.train_images,
        data.train_labels,
        batch_size=64,
        mean=data.mean,
        std=data.std,
        augment=Augment(crop=1),
        seed=0,
    )
    model = build("small_cnn", classes=10, in_channels=1, image_size=8, width=0.25, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = Schedule.from_recipe(recipe, len(loader))
    step = 0
    for epoch in range(3):
        for images, labels in loader.epoch(epoch):
            optimizer.param_groups[0]["lr"] = schedule(step)
            functional.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    assert (result.steps, result.drawn_at) == (step, None)
    assert result.accuracy > 0.5


def test_a_ticket_run_writes_all_it_promises(small: Make, tmp_path: Path) -> None:
    events: list[str] = []
    result = train(small(), tmp_path, quiet=True, on_event=lambda kind, _: events.append(kind))
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "recipe.toml", "metrics.jsonl", "ticket.safetensors", "bill.json", "environment.json", "tune.json",
        "history.json", "change.json", "result.json", "model.safetensors",
    }  # fmt: skip
    assert events.count("step") == 66
    assert events.count("row") == 3
    assert events[0] == "tuned"
    assert events[-1] == "done"
    assert events.index("drawn") < events.index("row")
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [22, 44, 66]
    assert [row["epoch"] for row in found] == [1.0, 2.0, 3.0]
    assert all(one["seconds"] < two["seconds"] for one, two in pairwise(found))
    assert found[-1]["accuracy"] == result.accuracy
    assert found[-1]["parameters"] == result.parameters
    assert result.drawn_at is not None
    bill = Bill.from_json(json.loads((tmp_path / "bill.json").read_text()))
    assert set(bill.phases) == {"setup", "search", "draw", "train", "evaluate"}
    assert bill.total.seconds.value == pytest.approx(result.seconds)
    assert sum(phase.steps.value for phase in bill.phases.values()) == 66
    history = json.loads((tmp_path / "history.json").read_text())
    assert len(history["matrix"]) == len(history["steps"]) == len(history["history"]) > 0
    assert Recipe.from_toml(tmp_path / "recipe.toml") == small()
    change = json.loads((tmp_path / "change.json").read_text())
    assert change["parameters_after"] == result.parameters < change["parameters_before"]


def test_the_draw_does_not_disturb_the_schedule(small: Make, tmp_path: Path) -> None:
    recipe = small(schedule="step", milestones="10it,40it", evaluate_every="1it", epochs=2)
    train(recipe, tmp_path, quiet=True)
    rates = {row["step"]: row["lr"] for row in rows(tmp_path)}
    schedule = Schedule.from_recipe(recipe, 22)
    assert all(rate == schedule(step - 1) for step, rate in rates.items())


def test_a_crash_and_resume_gives_the_same_weights_and_rows(small: Make, tmp_path: Path) -> None:
    recipe = small(checkpoint_every="7it", ema=0.9)
    train(recipe, tmp_path / "whole", quiet=True)
    for step in (3, 20, 47):
        path = tmp_path / f"crashed-{step}"
        with pytest.raises(Stop):
            train(recipe, path, quiet=True, on_event=at(step, crash))
        result = resume(path, quiet=True)
        assert same(path, tmp_path / "whole"), step
        timeless = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows(path)]
        wanted = [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows(tmp_path / "whole")
        ]
        assert timeless == wanted
        assert result.resumed == (step >= 7)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_what_follows_an_evaluation_is_not_charged_to_it(
    ema: float | None, small: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    loading: list[str | None] = []  # phase of the clock while a batch is made, and at each event
    telling: dict[str, set[str | None]] = {}
    ledgers: list[Any] = []

    def epoch(self: Any, number: int, start: int = 0) -> Any:
        batches = original(self, number, start)
        while True:
            if self.augment.crop and ledgers:  # the training loader; what tuning and calibration load has no epoch
                loading.append(ledgers[0].phase)
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    def restore(self: Any) -> None:
        ledgers.append(self.ledger)
        begin(self)

    original, begin = Loader.epoch, Run.restore
    monkeypatch.setattr(Loader, "epoch", epoch)
    monkeypatch.setattr(Run, "restore", restore)

    def note(kind: str, _: Any) -> None:
        telling.setdefault(kind, set()).add(ledgers[0].phase if ledgers else None)

    recipe = small(ema=ema, evaluate_every="3it", checkpoint_every="3it")
    result = train(recipe, tmp_path, quiet=True, on_event=note)
    assert set(loading) == {"search", "train"}
    assert telling["row"] == telling["checkpoint"] == {"search", "train"}
    assert telling["done"] == {"train"}
    assert result.bill.phases["evaluate"].images.value > 0


def test_resume_reuses_what_was_tuned(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    recipe = small(exact=False, checkpoint_every="5it")
    with pytest.raises(Stop):
        train(recipe, tmp_path, quiet=True, on_event=at(12, crash))
    text = (tmp_path / "tune.json").read_text()
    assert len(json.loads(text)["candidates"]) == 4
    monkeypatch.setattr("earlybird.train.run.tune", lambda *_, **__: pytest.fail("tuned again"))
    resume(tmp_path, quiet=True)
    assert (tmp_path / "tune.json").read_text() == text


@pytest.mark.parametrize("text", ["{}", '{"choice"', "[]", '{"choice": {"device": "cpu"}}', None])
def test_the_choice_in_the_checkpoint_wins_over_the_file(
    text: str | None, small: Make, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    recipe = small(checkpoint_every="5it", exact=False, tune=False, precision="bf16")
    with pytest.raises(Stop):
        train(recipe, tmp_path, quiet=True, on_event=at(12, crash))
    record = json.loads((tmp_path / "tune.json").read_text())
    if text is None:
        text = json.dumps({**record, "choice": {**record["choice"], "precision": "fp32"}})
        wanted = json.loads(text)["choice"]
    else:
        wanted = record["choice"]
    (tmp_path / "tune.json").write_text(text)
    monkeypatch.setattr("earlybird.train.run.tune", lambda *_, **__: pytest.fail("tuned again"))
    capsys.readouterr()
    resume(tmp_path, quiet=True)
    found = json.loads(max(tmp_path.glob("checkpoint-*.json")).read_text())["state"]["choice"]
    assert found == record["choice"]
    assert json.loads((tmp_path / "tune.json").read_text())["choice"] == wanted
    assert ("tune.json" in capsys.readouterr().err) == (wanted == record["choice"])


@pytest.mark.parametrize("text", ["{}", '{"choice"'])
def test_a_damaged_choice_without_a_checkpoint_is_made_anew(text: str, small: Make, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(small(epochs=1, checkpoint_every="60it"), tmp_path, quiet=True, on_event=at(2, crash))
    (tmp_path / "tune.json").write_text(text)
    assert resume(tmp_path, quiet=True).steps == 22
    assert json.loads((tmp_path / "tune.json").read_text())["choice"]["device"] == "cpu"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_says_how_to_go_on(name: str, small: Make, tmp_path: Path) -> None:
    recipe = small()
    train(recipe, tmp_path / "whole", quiet=True)
    handler = signal.getsignal(signal.SIGINT)
    kill = at(31, lambda: os.kill(os.getpid(), getattr(signal, name)))
    with pytest.raises(Interrupted, match=f"{name} after step 3[12] of 66.*earlybird resume") as error:
        train(recipe, tmp_path / "run", quiet=True, on_event=kill)
    assert error.value.exit_code == 3
    assert signal.getsignal(signal.SIGINT) is handler
    resume(tmp_path / "run", quiet=True)
    assert same(tmp_path / "run", tmp_path / "whole")


def test_time_that_a_kill_cost_is_on_the_bill(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("earlybird.train.folder._BEAT_EVERY_S", 0.0)
    with pytest.raises(Stop):
        train(small(checkpoint_every="10it"), tmp_path, quiet=True, on_event=at(19, crash))
    state = json.loads((tmp_path / "checkpoint-00000010.json").read_text())["state"]["ledger"]["phases"]
    saved = sum(phase["seconds"] for phase in state.values())
    beat = float((tmp_path / "run.lock").read_text())
    assert beat > saved
    result = resume(tmp_path, quiet=True)
    lost = result.bill.phases["lost"].seconds.value
    assert lost == pytest.approx(beat - saved, abs=2e-3)  # a beat is written in milliseconds
    assert result.seconds > beat


def test_a_finished_run_is_not_run_again(small: Make, tmp_path: Path) -> None:
    first = train(small(epochs=1), tmp_path, quiet=True)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != "run.lock"}
    again = resume(tmp_path, quiet=True)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert (again.accuracy, again.steps, again.drawn_at) == (first.accuracy, first.steps, first.drawn_at)
    assert again.bill == first.bill
    with pytest.raises(InputError, match="a finished run"):
        train(small(epochs=1), tmp_path, quiet=True)


def test_a_damaged_newest_checkpoint_falls_back_and_ends_the_same(small: Make, tmp_path: Path, capsys: Any) -> None:
    recipe = small(checkpoint_every="8it")
    train(recipe, tmp_path / "whole", quiet=True)
    with pytest.raises(Stop):
        train(recipe, tmp_path / "run", quiet=True, on_event=at(50, crash))
    newest = max((tmp_path / "run").glob("checkpoint-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    capsys.readouterr()
    resume(tmp_path / "run", quiet=True)
    assert "damaged" in capsys.readouterr().err
    assert same(tmp_path / "run", tmp_path / "whole")


def test_a_checkpoint_of_another_recipe_is_refused(small: Make, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(small(checkpoint_every="5it"), tmp_path, quiet=True, on_event=at(12, crash))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("lr = 0.05", "lr = 0.06"))
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("checkpoint-*")}
    with pytest.raises(CheckpointError, match="another recipe"):
        resume(tmp_path, quiet=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("checkpoint-*")} == kept


def test_resume_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run in"):
        resume(tmp_path)


def test_accumulated_batches_make_the_step_of_one_large_batch(small: Make, tmp_path: Path) -> None:
    # without batch norm and dropout the gradients of two halves add up to that of the whole
    plain = {"model": "tests.train.nets:without_batch_norm", "dense": True, "crop": 0, "epochs": 1}
    train(small(**plain, batch_size=64), tmp_path / "one", quiet=True)
    train(small(**plain, batch_size=32, accumulate=2), tmp_path / "two", quiet=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)
    assert rows(tmp_path / "one")[0]["loss"] == pytest.approx(rows(tmp_path / "two")[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("state", ["keep", "reset"])
def test_the_averaged_weights_are_those_of_the_formula(
    optimizer: str, state: str, small: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    seen: list[Run] = []
    averages: dict[str, torch.Tensor] = {}

    def seeing(run: Run, stop: Any) -> None:
        seen.append(run)
        fit(run, stop)

    def check(holder: torch.optim.Optimizer, decay: float, step: int) -> None:
        run = seen[-1]
        assert holder is run.optimizer
        before = {name: value.clone() for name, value in averages.items()}
        average(holder, decay, step)
        decay = min(0.9, (1 + run.step) / (10 + run.step))
        for name, parameter in run.model.named_parameters():
            if "ema" not in run.optimizer.state[parameter]:
                continue  # AdamW starts one step after its state was emptied
            averages[name] = run.optimizer.state[parameter]["ema"].clone()
            assert averages[name].shape == parameter.shape
            assert run.search is not None
            emptied = state == "reset" and run.search.drawn_at == run.step + (optimizer == "sgd")
            if emptied:
                assert torch.equal(averages[name], parameter)
            elif name in before and before[name].shape == parameter.shape:
                wanted = decay * before[name] + (1 - decay) * parameter.detach()
                torch.testing.assert_close(averages[name], wanted)

    average = ema.average
    monkeypatch.setattr("earlybird.train.run.fit", seeing)
    monkeypatch.setattr(ema, "average", check)
    changes = {"optimizer": optimizer, "optimizer_state": state, "nesterov": optimizer == "sgd"}
    train(small(ema=0.9, epochs=2, **changes), tmp_path, quiet=True)
    saved = load_file(tmp_path / "model.safetensors")
    assert len(averages) == len(list(seen[-1].model.parameters()))
    for name, value in averages.items():
        assert torch.equal(saved[name], value), name


def test_bf16_keeps_fp32_weights_and_is_priced_as_16_bit(small: Make, tmp_path: Path) -> None:
    recipe = small(exact=False, tune=False, precision="bf16", channels_last=True)
    result = train(recipe, tmp_path, quiet=True)
    assert all(tensor.dtype != torch.bfloat16 for tensor in load_file(tmp_path / "model.safetensors").values())
    search = result.bill.phases["search"]
    assert search.macs is not None
    assert search.bit_macs is not None
    assert search.bit_macs.value == search.macs.value / 4
    assert result.accuracy > 0.3


def test_generators_and_threads_are_given_back(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    before = checkpoint.generators(torch.device("cpu"))
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    train(small(epochs=1, threads=2), tmp_path, quiet=True)
    after = checkpoint.generators(torch.device("cpu"))
    assert all(torch.equal(before[name], after[name]) for name in before if not before[name].isnan().any())
    assert (threads[0], threads[-1]) == (2, torch.get_num_threads())


def test_nan_stops_with_the_step_and_the_last_good_checkpoint(small: Make, tmp_path: Path) -> None:
    recipe = small(model="tests.train.nets:explodes", checkpoint_every="4it")
    with pytest.raises(DivergedError, match=r"nan at step 10 .*checkpoint-00000008\.json.*lower lr") as error:
        train(recipe, tmp_path, quiet=True)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoint-00000008.json").exists()
    assert not (tmp_path / "result.json").exists()


def test_infinite_weights_are_never_saved(small: Make, tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        train(small(lr=1e30, lr_warmup="0it", schedule="constant", checkpoint_every="1it"), tmp_path, quiet=True)
    for path in tmp_path.glob("checkpoint-*.safetensors"):
        parameters = {name: value for name, value in load_file(path).items() if name.startswith("model/parameters/")}
        assert all(value.isfinite().all() for value in parameters.values())


@pytest.mark.parametrize("which", ["parameters", "buffers"])
def test_weights_that_end_as_nan_are_no_result(which: str, small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    def spoil(run: Run, loss: torch.Tensor) -> None:
        beat(run, loss)
        if run.step == run.total:
            tensors = run.model.parameters() if which == "parameters" else run.model.buffers()
            next(iter(tensors)).data.fill_(math.nan)

    beat = Run.beat
    monkeypatch.setattr(Run, "beat", spoil)
    with pytest.raises(DivergedError, match="not finite at step 22"):
        train(small(epochs=1, dense=True), tmp_path, quiet=True)
    assert not {"result.json", "model.safetensors"} & {path.name for path in tmp_path.iterdir()}


def test_a_buffer_that_is_meant_to_be_infinite_is_fine(small: Make, tmp_path: Path) -> None:
    recipe = small(model="tests.train.nets:masked", dense=True, epochs=1, checkpoint_every="5it")
    assert train(recipe, tmp_path, quiet=True).steps == 22


def test_rows_are_on_the_disk_before_the_checkpoint(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[str] = []
    sync, save = RunFolder.sync_rows, checkpoint.save
    monkeypatch.setattr(RunFolder, "sync_rows", lambda self: (calls.append("rows"), sync(self)))
    monkeypatch.setattr(checkpoint, "save", lambda *a: (calls.append("checkpoint"), save(*a))[1])
    train(small(epochs=1, checkpoint_every="11it"), tmp_path, quiet=True)
    assert calls == ["rows", "checkpoint"] * 2


def test_a_signal_just_before_the_first_step_saves(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    def restore(run: Run) -> None:
        begin(run)
        os.kill(os.getpid(), signal.SIGINT)

    begin = Run.restore
    with monkeypatch.context() as patch:
        patch.setattr(Run, "restore", restore)
        with pytest.raises(Interrupted, match="after step 1 of"):
            train(small(epochs=1), tmp_path, quiet=True)
    assert resume(tmp_path, quiet=True).steps == 22


def test_ctrl_c_in_set_up_leaves_no_run(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    def loading(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("earlybird.train.parts.load", loading)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(small(), tmp_path / "run", quiet=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "run").exists()


def test_an_empty_share_of_the_last_batch_is_not_evaluated(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    plain = train(small(epochs=1), tmp_path / "plain", quiet=True)
    sizes: list[int] = []

    def epoch(self: Loader, number: int, start: int = 0) -> Any:
        for images, labels in walk(self, number, start):
            yield images, labels
            if not self.shuffle:
                sizes.append(len(images))
                yield images[:0], labels[:0]

    walk, cross_entropy = Loader.epoch, functional.cross_entropy

    def checked(logits: torch.Tensor, labels: torch.Tensor, **keywords: Any) -> torch.Tensor:
        assert len(labels)
        return cross_entropy(logits, labels, **keywords)

    monkeypatch.setattr(Loader, "epoch", epoch)
    monkeypatch.setattr(functional, "cross_entropy", checked)
    result = train(small(epochs=1), tmp_path / "empty", quiet=True)
    assert sizes
    assert (result.accuracy, result.loss) == (plain.accuracy, plain.loss)


@pytest.mark.parametrize("count", [65, 130, 200])
def test_calibration_is_the_sample_in_parts(count: int) -> None:
    data = load("digits")
    augment = Augment(crop=1, flip=True, cutout=3)
    loader = Loader(
        data.train_images, data.train_labels, batch_size=64, mean=data.mean, std=data.std, augment=augment,
        channels_last=True,
    )  # fmt: skip
    batches = loader.sample_in_batches(count, 64, seed=5)
    parts = [part for part in torch.split(loader.sample(count, 5), 64) if len(part) > 1]
    assert len(batches) == len(parts)
    for one, two in zip(batches, parts, strict=True):
        assert torch.equal(one, two)
        assert one.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batches[-1], parts[-1])
    assert len(batches[:2]) == len(parts[:2])
    with pytest.raises(IndexError):
        batches[len(parts)]


def test_a_full_disk_stops_the_run_and_resume_goes_on(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    recipe = small(checkpoint_every="10it")
    train(recipe, tmp_path / "whole", quiet=True)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        fill = at(25, lambda: patch.setattr(os, "fsync", full))
        with pytest.raises(EarlybirdError, match="no space left") as error:
            train(recipe, tmp_path / "run", quiet=True, on_event=fill)
    assert error.value.exit_code == 2
    assert max((tmp_path / "run").glob("checkpoint-*.json")).name == "checkpoint-00000020.json"
    resume(tmp_path / "run", quiet=True)
    assert same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "tests.train.nets:wrong_classes"}, "10 classes"),
        ({"model": "tests.train.nets:without_batch_norm"}, "batch norm.*magnitude"),
        ({"model": "vgg61"}, "unknown model"),
        ({"model": "tests.train.nets:nothing"}, "nothing"),
        ({"data": "digit"}, "digits"),
        ({"batch_size": 5000}, "full batch"),
        ({"accumulate": 100}, "fewer than accumulate"),
        ({"devices": 3}, "torchrun --nproc-per-node 3"),
        ({"lr_warmup": "5ep"}, "lr_warmup"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_no_folder(
    changes: dict[str, Any], message: str, small: Make, tmp_path: Path
) -> None:
    with pytest.raises(EarlybirdError, match=message) as error:
        train(small(**changes), tmp_path / "run", quiet=True)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_asking_for_cuda_where_there_is_none(small: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sees no CUDA device"):
        train(small(accelerator="cuda"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_quiet_shows_nothing_and_a_pipe_one_line_an_epoch(small: Make, tmp_path: Path, capsys: Any) -> None:
    agrees = {"tolerance": 1.0}  # the ticket is drawn without a warning
    train(small(epochs=2, **agrees), tmp_path / "quiet", quiet=True)
    assert capsys.readouterr() == ("", "")
    train(small(epochs=2, **agrees), tmp_path / "pipe")
    shown = capsys.readouterr()
    assert not shown.out
    lines = shown.err.splitlines()
    assert [line[:9] for line in lines if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert all("accuracy" in line and "images/s" in line for line in lines if line.startswith("epoch"))
    assert any(line.startswith("ticket drawn at step") for line in lines)


def test_default_folders_are_new_ones(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = small(epochs=1, model="small_cnn", width=0.125)
    first, second = train(recipe, quiet=True), train(recipe, quiet=True)
    assert str(first.folder) == "runs/small_cnn-digits-keep0.5-seed0"
    assert str(second.folder) == "runs/small_cnn-digits-keep0.5-seed0-2"
    assert same(first.folder, second.folder)
    named = train(recipe.replace(out="here"), quiet=True)
    assert named.folder == Path("here")


def test_unless_told_otherwise_checkpoints_cost_little(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    saved: list[str] = []
    monkeypatch.setattr("earlybird.train.loop.CHECKPOINT_SHARE", 1e9)
    train(small(), tmp_path / "many", quiet=True, on_event=lambda kind, _: saved.append(kind))
    assert saved.count("checkpoint") == 3  # each epoch
    saved.clear()
    monkeypatch.setattr("earlybird.train.loop.CHECKPOINT_SHARE", 1e-9)
    train(small(), tmp_path / "few", quiet=True, on_event=lambda kind, _: saved.append(kind))
    assert saved.count("checkpoint") == 1  # the first one, whose cost is not known yet


def test_tensorboard_events_are_written(small: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(small(epochs=1, tensorboard=True), tmp_path, quiet=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_run_on_a_file_resumes_from_another_folder(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    data = load("digits")
    images, labels = data.train_images[:200, 0].numpy(), data.train_labels[:200].numpy()
    numpy.savez(tmp_path / "own.npz", images=images, labels=labels)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = small(data="own.npz", epochs=4, batch_size=32, model="small_cnn", width=0.125, checkpoint_every="3it")
    with pytest.raises(Stop):
        train(recipe, "run", quiet=True, on_event=at(9, crash))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resume("../run", quiet=True).steps > 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_run_resumes(small: Make, tmp_path: Path) -> None:
    recipe = small(exact=False, checkpoint_every="7it")
    with pytest.raises(Stop):
        train(recipe, tmp_path, quiet=True, on_event=at(40, crash))
    result = resume(tmp_path, quiet=True)
    assert result.resumed
    assert result.steps == 66


def test_non_square_images_are_refused_with_what_to_type(small: Make, tmp_path: Path) -> None:
    images = numpy.zeros((64, 8, 12), dtype=numpy.uint8)
    labels = numpy.arange(64) % 4
    numpy.savez(
        tmp_path / "wide.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels
    )  # fmt: skip
    with pytest.raises(InputError, match=r"8 x 12 pixels.*--image-size 8"):
        train(small(data=str(tmp_path / "wide.npz")), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_an_own_folder_stays_when_the_run_does_not_begin(small: Make, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError):
        train(small(batch_size=10**6), tmp_path / "mine", quiet=True)
    assert list((tmp_path / "mine").iterdir()) == []


def test_tensorboard_that_is_missing_is_said_before_anything_is_written(
    small: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="tensorboard is not installed"):
        train(small(tensorboard=True), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_second_ctrl_c_says_how_to_go_on(small: Make, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    recipe = small(checkpoint_every="5it")
    with pytest.raises(Interrupted, match=f"earlybird resume {tmp_path}"):
        train(recipe, tmp_path, quiet=True, on_event=at(12, interrupt))
    assert resume(tmp_path, quiet=True).resumed


def test_fixed_checkpoints_fall_on_their_steps_where_looks_are_rare(
    small: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    """As on a GPU or with several ranks, where the loss is looked at every ten steps only."""
    saved: list[int] = []
    monkeypatch.setattr("earlybird.train.loop._waits", lambda run: True)
    train(
        small(checkpoint_every="7it", epochs=2), tmp_path, quiet=True,
        on_event=lambda kind, fields: saved.append(fields["step"]) if kind == "checkpoint" else None,
    )  # fmt: skip
    assert saved == [step for step in range(1, 45) if step % 7 == 0]


def test_own_kernels_stay_the_same_ones_over_a_resume(small: Make, tmp_path: Path, monkeypatch: Any) -> None:
    kernels = Kernels(products_for_weights=64, products_for_all=16, batch_norms=True)
    monkeypatch.setattr(tune, "choose", lambda *_: (kernels, []))
    monkeypatch.setattr(tune, "MARGIN", -10.0)  # they are taken, whatever they gain here
    calls: list[bool] = []
    plain = convolution.convolve

    def watched(*args: Any, passes: bool) -> Any:
        calls.append(passes)
        return plain(*args, passes=passes)

    monkeypatch.setattr(convolution, "convolve", watched)
    recipe = small(
        exact=False, kernels=True, compile=False, precision="fp32", channels_last=True, model="small_cnn", width=0.25
    )
    train(recipe, tmp_path / "whole", quiet=True)
    with pytest.raises(Stop):
        train(recipe, tmp_path / "stopped", quiet=True, on_event=at(40, crash))  # after the draw
    monkeypatch.setattr(tune, "choose", lambda *_: pytest.fail("chosen once more"))
    resume(tmp_path / "stopped", quiet=True)
    assert same(tmp_path / "whole", tmp_path / "stopped")
    assert set(calls) == {False, True}
    train(recipe.replace(kernels=False), tmp_path / "without", quiet=True)
    assert not same(tmp_path / "whole", tmp_path / "without")  # the last bits differ


def test_own_kernels_without_timing_are_refused() -> None:
    for key in ("tune", "exact"):
        with pytest.raises(InputError, match="kernels"):
            Recipe.from_values({"kernels": True, key: key == "exact"})


def test_a_run_may_train_on_a_part_of_the_images(small: Make, tmp_path: Path) -> None:
    recipe = small(dense=True, model="small_cnn", width=0.25, train_images=640, epochs=2)
    assert train(recipe, tmp_path / "part", quiet=True).steps == 2 * 640 // 64
    with pytest.raises(DataError, match="fewer than 999999"):
        train(recipe.replace(train_images=999_999), tmp_path / "none", quiet=True)
    assert not (tmp_path / "none").exists()
