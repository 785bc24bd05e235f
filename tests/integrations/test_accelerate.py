"""earlybird in a loop with Accelerate: parity, resume to the bit, and what is refused."""

import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import earlybird as eb
from earlybird.errors import InputError
from earlybird.integrations.accelerate import attach
from earlybird.precision.turning_points import TurningPoints
from tests.integrations.loops import BATCHES, EPOCHS, assert_same, bare, bird, loader, network, schedule, sgd, width


class Loop:
    """A user's loop: prepared, then attached, then trained."""

    def __init__(self, *methods, average=False, clip=None, **options):
        self.clip = clip
        self.accelerator = Accelerator(cpu=True, **options)
        model = network()
        optimizer = sgd(model)
        self.loader = loader()
        self.model, self.optimizer, self.scheduler, self.prepared = self.accelerator.prepare(
            model, optimizer, schedule(optimizer), self.loader
        )
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if average else None
        self.steps = len(self.prepared) // self.accelerator.gradient_accumulation_steps
        if self.average is not None:
            self.accelerator.register_for_checkpointing(self.average)
        self.bird = attach(
            self.accelerator, list(methods), self.model, self.optimizer, steps_per_epoch=self.steps,
            total_steps=self.steps * EPOCHS, averaged=self.average or (), example_inputs=self.example(methods),
        ) if methods else None  # fmt: skip

    def example(self, methods):
        return None if len(methods) == 1 else next(iter(loader()))[0]

    def train(self, first=0, last=EPOCHS, folder=None):
        self.model.train()
        for epoch in range(first, last):
            for x, y in self.prepared:
                with self.accelerator.accumulate(self.model):
                    loss = functional.cross_entropy(self.model(x), y)
                    self.accelerator.backward(loss)
                    if self.clip and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                    if self.bird is not None:
                        self.bird.observe(loss.detach())
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                    if self.average is not None and self.accelerator.sync_gradients:
                        self.average.update_parameters(self.model)
            if folder is not None:
                self.accelerator.save_state(str(folder / str(epoch)))
        return self

    def load(self, folder):
        self.accelerator.load_state(str(folder))
        return self


@pytest.fixture(autouse=True)
def _expected_warnings():
    AcceleratorState._reset_state(reset_partial_state=True)  # one for the process, whatever the precision
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no agreement by the deadline")
        yield


def test_the_identity_ticket_equals_the_loop_without_to_the_bit():
    loop = Loop(bird(keep=1.0)).train()
    assert loop.bird.methods["EarlyBird"].drawn
    assert_same(loop.model, Loop().train().model)


def test_it_ends_in_the_bits_of_a_bare_loop():
    loop = Loop(bird()).train()
    model, _, (search,) = bare(bird())
    assert loop.bird.methods["EarlyBird"].ticket == search.ticket
    assert_same(loop.model, model)
    assert loop.bird.bill().total.steps.value == BATCHES * EPOCHS


@pytest.mark.parametrize("epoch", [0, 1, 2], ids=["before", "in the epoch of the draw", "after"])
def test_resumed_with_a_fresh_model_it_ends_in_the_same_bits(tmp_path, epoch):
    whole = Loop(bird(), average=True).train(folder=tmp_path)
    again = Loop(bird(), average=True).load(tmp_path / str(epoch)).train(epoch + 1)
    assert again.bird.methods["EarlyBird"].drawn_at == whole.bird.methods["EarlyBird"].drawn_at == 6
    assert_same(again.model, whole.model)
    assert_same(again.average, whole.average)
    assert width(again.average) == width(again.model) < width(network())
    assert again.scheduler.state_dict() == whole.scheduler.state_dict()
    assert again.bird.bill().total.macs == whole.bird.bill().total.macs


def test_accumulation_clipping_bf16_and_composed_methods_resume(tmp_path):
    methods = (
        bird(deadline="1ep"), eb.ShiftAdd(), eb.ProgressiveResizing(grow_from="20%", whole_from="50%", size_step=1),
    )  # fmt: skip
    options = {"gradient_accumulation_steps": 2, "clip": 0.5, "mixed_precision": "bf16"}
    whole = Loop(*methods, **options).train(folder=tmp_path)
    assert whole.bird.methods["EarlyBird"].drawn_at == BATCHES // 2
    assert whole.bird.bill().total.steps.value == BATCHES * EPOCHS // 2
    again = Loop(*methods, **options).load(tmp_path / "1").train(2)
    assert_same(again.model, whole.model)


def test_methods_that_go_by_the_loss_and_thin_the_loader(monkeypatch):
    seen = []
    observe = TurningPoints.observe
    monkeypatch.setattr(
        TurningPoints, "observe", lambda self, loss: seen.append(float(loss)) or observe(self, loss)
    )  # fmt: skip
    methods = [bird(), eb.ProgressivePrecision(forward_ladder="3,8", turning_every="1it"), eb.BatchDropping(drop=0.5)]
    loop = Loop(*methods)
    loop.prepared = loop.accelerator.prepare(loop.bird.methods["BatchDropping"].wrap(loop.loader))
    loop.train(last=2 * EPOCHS)
    assert loop.bird.bill().total.steps.value == BATCHES * EPOCHS
    assert loop.bird.methods["EarlyBird"].drawn_at == 6
    assert seen


def test_a_checkpoint_from_before_the_draw_is_refused_by_the_small_model(tmp_path):
    loop = Loop(bird()).train(folder=tmp_path)
    weights = {name: value.clone() for name, value in loop.model.state_dict().items()}
    with pytest.raises(InputError, match=r"\(step 4\) is from before its ticket was drawn, but this model is shrunk"):
        loop.load(tmp_path / "0")
    assert all(torch.equal(value, weights[name]) for name, value in loop.model.state_dict().items())
    loop.load(tmp_path / "2").train(3)  # a later one of the same search is taken
    assert all(torch.equal(value, weights[name]) for name, value in loop.model.state_dict().items())


def test_a_checkpoint_without_our_file_is_refused(tmp_path):
    Loop().train(last=1, folder=tmp_path)
    with pytest.raises(InputError, match=r"no file .*earlybird\.safetensors"):
        Loop(bird()).load(tmp_path / "0")
