"""earlybird in the Trainer of transformers: parity, resume to the bit, and what is refused."""

import math
import warnings

import pytest
import torch
from torch import nn

import earlybird as eb
from earlybird.errors import InputError
from earlybird.integrations.huggingface import EarlyBirdCallback
from tests.integrations.loops import BATCHES, EPOCHS, assert_same, bird, data, width

transformers = pytest.importorskip("transformers")  # CI has it; the core does without


def network() -> nn.Module:
    """A ResNet of transformers, with a residual block that keeps its shape."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[2, 1], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config)


def trainer(folder, model=None, optimizers=(None, None), **options):
    options = {"save_strategy": "no", "per_device_train_batch_size": 16, "num_train_epochs": EPOCHS, **options}
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-2, logging_strategy="no",
        **options,
    )  # fmt: skip
    rows = [{"pixel_values": image, "labels": label} for image, label in data()]
    model = network() if model is None else model
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, optimizers=optimizers)


def train(folder, *methods, resume=None, **options):
    driver = trainer(folder, **options)
    callback = EarlyBirdCallback(list(methods)).attach(driver) if methods else None
    driver.train(resume_from_checkpoint=resume)
    return driver, callback


def optimizer_state(driver):
    return [
        value for state in driver.optimizer.state_dict()["state"].values() for value in state.values() if value.dim()
    ]


@pytest.fixture(autouse=True)
def _expected_warnings():
    with warnings.catch_warnings():
        for message in ("no agreement by the deadline", ".*pin_memory"):
            warnings.filterwarnings("ignore", message=message)
        yield


def test_the_identity_ticket_equals_the_trainer_alone_to_the_bit(tmp_path):
    plain, _ = train(tmp_path)
    driver, callback = train(tmp_path, bird(keep=1.0))
    assert callback.running.methods["EarlyBird"].drawn
    assert_same(driver.model, plain.model)
    assert all(map(torch.equal, optimizer_state(driver), optimizer_state(plain)))
    assert driver.lr_scheduler.state_dict() == plain.lr_scheduler.state_dict()


@pytest.mark.parametrize("step", [4, 8], ids=["before", "after"])
def test_resumed_with_a_fresh_model_it_ends_in_the_same_bits(tmp_path, step):
    driver, callback = train(tmp_path, bird(), save_strategy="epoch")
    search = callback.running.methods["EarlyBird"]
    assert search.drawn_at == 6
    assert width(driver.model) < width(network())
    again, second = train(tmp_path, bird(), resume=str(tmp_path / f"checkpoint-{step}"))
    assert second.running.methods["EarlyBird"].ticket == search.ticket
    assert_same(again.model, driver.model)
    assert all(map(torch.equal, optimizer_state(again), optimizer_state(driver)))
    assert again.lr_scheduler.state_dict() == driver.lr_scheduler.state_dict()
    bills = [one.bill() for one in (callback, second)]
    assert bills[0].total.steps == bills[1].total.steps
    assert bills[0].total.steps.value == BATCHES * EPOCHS
    assert bills[0].total.macs == bills[1].total.macs


def test_the_newest_checkpoint_and_a_users_own_optimizer(tmp_path):
    def optimizers(model):
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), None

    model = network()
    whole, _ = train(tmp_path, bird(), model=model, optimizers=optimizers(model), save_strategy="epoch")
    for step in (12, 16):
        (tmp_path / f"checkpoint-{step}").rename(tmp_path / f"kept-{step}")
    model = network()
    again, _ = train(tmp_path, bird(), model=model, optimizers=optimizers(model), resume=True)
    assert_same(again.model, whole.model)


def test_accumulation_clipping_and_composed_methods_resume(tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    methods = (bird(deadline="1ep"), eb.BlockFloat())
    driver, callback = train(tmp_path, *methods, save_strategy="steps", save_steps=3, **options)
    assert callback.running.methods["EarlyBird"].drawn_at == BATCHES // 2
    assert callback.bill().total.steps.value == BATCHES // 2 * EPOCHS
    again, _ = train(tmp_path, *methods, resume=str(tmp_path / "checkpoint-3"), **options)
    assert_same(again.model, driver.model)


def test_example_inputs_are_made_of_a_batch_without_moving_the_data(tmp_path):
    plain, _ = train(tmp_path)
    driver = trainer(tmp_path)
    made = []
    callback = EarlyBirdCallback(
        eb.LayerSkipping(layer_share=1.0), example_inputs=lambda batch: made.append(batch) or batch["pixel_values"]
    ).attach(driver)
    driver.train()
    assert made[0]["pixel_values"].shape == (16, 3, 8, 8)
    assert_same(driver.model, plain.model)
    assert callback.bill().total.steps.value == BATCHES * EPOCHS


def test_a_checkpoint_from_before_the_draw_is_refused_by_the_small_model(tmp_path):
    driver, _ = train(tmp_path, bird(), save_strategy="epoch")
    weights = {name: value.clone() for name, value in driver.model.state_dict().items()}
    said = r"\(step 4\) is from before its ticket was drawn, but this model is shrunk; build model"
    with pytest.raises(InputError, match=said):
        driver.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    driver.state.best_model_checkpoint = str(tmp_path / "checkpoint-4")
    with pytest.raises(InputError, match=said):
        driver._load_best_model()
    assert all(torch.equal(value, weights[name]) for name, value in driver.model.state_dict().items())
    fresh = trainer(tmp_path)
    fresh._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    assert math.isfinite(fresh.evaluate()["eval_loss"])


def test_what_cannot_work_is_refused_by_name(tmp_path):
    for method, said in ((eb.BatchDropping(), "BatchDropping thins a loader"), (eb.ShiftAdd(), "ShiftAdd replaces")):
        with pytest.raises(InputError, match=said):
            EarlyBirdCallback(method)
    with pytest.raises(InputError, match="ProgressivePrecision goes by the loss"):
        train(tmp_path, eb.ProgressivePrecision())
    driver = trainer(tmp_path)
    driver.add_callback(EarlyBirdCallback(bird()))
    with pytest.raises(InputError, match=r"EarlyBirdCallback\(\.\.\.\)\.attach\(trainer\)"):
        driver.train()
