"""earlybird in Lightning's Trainer: the same as in a loop of one's own, resumed to the bit, whatever else is on."""

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import earlybird as eb
from earlybird.errors import InputError
from earlybird.integrations.lightning import EarlyBirdCallback
from earlybird.precision.turning_points import TurningPoints
from tests.integrations.loops import (
    BATCHES,
    EPOCHS,
    assert_same,
    bare,
    bird,
    data,
    loader,
    network,
    schedule,
    sgd,
    width,
)


class Module(pl.LightningModule):
    def __init__(self, *, compiled=False):
        super().__init__()
        self.net = torch.compile(network(), backend="eager") if compiled else network()
        self.told = nn.ReLU()  # has no parameters: not what is trained

    def training_step(self, batch, index):
        x, y = batch
        return functional.cross_entropy(self.net(x), y)

    def test_step(self, batch, index):
        x, y = batch
        self.log("loss", functional.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        optimizer = sgd(self)
        return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]


@pytest.fixture(autouse=True)
def _expected_warnings():
    with warnings.catch_warnings():
        for message in ("no agreement by the deadline", ".*does not have many workers", ".*isinstance.treespec"):
            warnings.filterwarnings("ignore", message=message)
        yield


def trainer(folder, *callbacks, epochs=EPOCHS, **options):
    options = {"enable_checkpointing": False, **options}
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=list(callbacks), **options,
    )  # fmt: skip


def fit(folder, *callbacks, module=None, checkpoint=None, data=None, **options):
    module = Module() if module is None else module
    driver = trainer(folder, *callbacks, **options)
    driver.fit(module, loader() if data is None else data, ckpt_path=checkpoint)
    return module, driver


def keep_all(folder):
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)


def optimizer_state(driver):
    return [entry["momentum_buffer"] for entry in driver.optimizers[0].state_dict()["state"].values()]


def test_the_identity_ticket_equals_lightning_alone_to_the_bit(tmp_path):
    def shuffled():
        torch.manual_seed(1)
        return DataLoader(data(), batch_size=16, shuffle=True)

    plain, alone = fit(tmp_path, data=shuffled())
    module, driver = fit(tmp_path, callback := EarlyBirdCallback(bird(keep=1.0)), data=shuffled())
    assert callback.running.methods["EarlyBird"].drawn
    assert_same(module, plain)
    assert all(map(torch.equal, optimizer_state(driver), optimizer_state(alone)))


def test_it_draws_the_ticket_of_a_bare_loop_and_ends_in_its_bits(tmp_path):
    model, _, (search,) = bare(bird())
    module, driver = fit(tmp_path, callback := EarlyBirdCallback(bird()))
    mine = callback.running.methods["EarlyBird"]
    assert (mine.drawn_at, mine.ticket) == (search.drawn_at, search.ticket)
    assert width(module) < width(network())
    assert_same(module.net, model)
    assert driver.lr_scheduler_configs[0].scheduler.last_epoch == BATCHES * EPOCHS
    bill = callback.bill()
    assert bill.total.steps.value == BATCHES * EPOCHS
    assert bill.total.macs == search.bill().total.macs


def test_epochs_and_shares_of_the_run_are_those_of_the_trainer(tmp_path):
    callback = EarlyBirdCallback(bird(deadline="1ep", skip="10%", look_every="0.5ep"))
    fit(tmp_path, callback, data=loader(8), accumulate_grad_batches=2)
    search = callback.running.methods["EarlyBird"]
    assert [entry["step"] for entry in search.history] == [2, 4]
    assert search.drawn_at == BATCHES


@pytest.mark.parametrize("epoch", [0, 1, 2], ids=["before", "in the epoch of the draw", "after"])
def test_resumed_in_a_fresh_module_it_ends_in_the_same_bits(tmp_path, epoch):
    module, driver = fit(tmp_path, callback := EarlyBirdCallback(bird()), keep_all(tmp_path), enable_checkpointing=True)
    path = tmp_path / f"epoch={epoch}.ckpt"
    again, resumed = fit(tmp_path, second := EarlyBirdCallback(bird()), checkpoint=path)
    assert second.running.methods["EarlyBird"].drawn_at == callback.running.methods["EarlyBird"].drawn_at == 6
    assert_same(again, module)
    assert all(map(torch.equal, optimizer_state(driver), optimizer_state(resumed)))
    assert second.bill().total.steps.value == BATCHES * EPOCHS
    assert second.bill().total.macs == callback.bill().total.macs


def test_methods_compose_and_resume_together(tmp_path):
    methods = [
        bird(), eb.ProgressiveResizing(grow_from="4it", whole_from="10it", size_step=1),
        eb.LayerSkipping(layer_share=0.6), eb.ProgressivePrecision(forward_ladder="3,8", turning_every="1it"),
    ]  # fmt: skip

    def callback():
        return EarlyBirdCallback(methods, example_inputs=lambda batch: batch[0])

    module, _ = fit(tmp_path, first := callback(), keep_all(tmp_path), enable_checkpointing=True)
    again, _ = fit(tmp_path, second := callback(), checkpoint=tmp_path / "epoch=1.ckpt")
    assert first.running.methods["EarlyBird"].drawn
    assert_same(again, module)
    assert sorted(second.running.methods) == sorted(type(method).__name__ for method in methods)


def test_methods_that_go_by_the_loss_are_told_the_mean_of_accumulated_batches(tmp_path, monkeypatch):
    seen, losses = [], []
    observe = TurningPoints.observe
    monkeypatch.setattr(
        TurningPoints, "observe", lambda self, loss: seen.append(float(loss)) or observe(self, loss)
    )  # fmt: skip
    step = Module.training_step
    monkeypatch.setattr(
        Module,
        "training_step",
        lambda *args: losses.append(step(*args)) or losses[-1],  # what Lightning divides by 2
    )
    callback = EarlyBirdCallback(eb.ProgressivePrecision(forward_ladder="3,8"))
    fit(tmp_path, callback, epochs=1, accumulate_grad_batches=2)
    means = torch.stack([loss.detach() for loss in losses]).view(-1, 2).mean(1)
    assert seen == pytest.approx(means.tolist())


def test_a_second_fit_goes_on_with_the_small_network(tmp_path):
    module, _ = fit(tmp_path, callback := EarlyBirdCallback(bird()))
    small = width(module)
    fit(tmp_path, callback, module=module, epochs=1)
    assert width(module) == small
    assert callback.bill().total.steps.value == BATCHES * (EPOCHS + 1)


def test_a_checkpoint_can_be_tested_in_a_fresh_module(tmp_path):
    module, driver = fit(tmp_path, EarlyBirdCallback(bird()))
    driver.save_checkpoint(tmp_path / "end.ckpt")
    (before,) = driver.test(module, loader(), verbose=False)
    (after,) = trainer(tmp_path, EarlyBirdCallback(bird())).test(
        Module(), loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False
    )
    assert before == after


def test_a_checkpoint_from_before_the_draw_is_refused_by_the_small_module(tmp_path):
    module, driver = fit(tmp_path, EarlyBirdCallback(bird()), keep_all(tmp_path), enable_checkpointing=True)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(InputError, match=r"\(step 4\) is from before its ticket was drawn, but this model is shrunk"):
        driver.test(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    (loss,) = trainer(tmp_path).test(Module(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert math.isfinite(loss["loss"])  # a fresh one takes it


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))]},
    ],
    ids=["accumulation and clipping", "bf16", "scaler"],
)
def test_with_the_trainers_own_options_it_draws_and_resumes(tmp_path, options):
    plugins = options.get("plugins", [])
    states = [plugin.scaler.state_dict() for plugin in plugins]
    module, _ = fit(
        tmp_path, callback := EarlyBirdCallback(bird(deadline="3it")), keep_all(tmp_path), enable_checkpointing=True,
        **options,
    )  # fmt: skip
    assert callback.running.methods["EarlyBird"].drawn_at == 3
    for plugin, state in zip(plugins, states):
        plugin.scaler.load_state_dict(state)
    again, _ = fit(tmp_path, EarlyBirdCallback(bird(deadline="3it")), checkpoint=tmp_path / "epoch=1.ckpt", **options)
    assert_same(again, module)


def test_the_moving_average_is_cut_with_the_module_and_resumes(tmp_path):
    def average():
        return EMAWeightAveraging(decay=0.9)

    first = average()
    module, _ = fit(tmp_path, EarlyBirdCallback(bird()), first, keep_all(tmp_path), enable_checkpointing=True)
    assert width(module) < width(network())
    assert_same(first._average_model.module, module)  # at the end, Lightning puts the average into the module
    for order in (lambda a, b: (a, b), lambda a, b: (b, a)):
        again, _ = fit(
            tmp_path, *order(EarlyBirdCallback(bird()), average()), checkpoint=tmp_path / "epoch=1.ckpt",
        )  # fmt: skip
        assert_same(again, module)


def test_stochastic_weight_averaging_is_cut_along(tmp_path):
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=3)
    module, _ = fit(tmp_path, callback := EarlyBirdCallback(bird()), average)
    assert callback.running.methods["EarlyBird"].drawn_at == 6
    assert width(average._average_model) == width(module) < width(network())


def test_a_compiled_network_is_cut_and_specialises_anew(tmp_path):
    torch.compiler.reset()
    plain, _ = fit(tmp_path, EarlyBirdCallback(bird()))
    module, _ = fit(tmp_path, callback := EarlyBirdCallback(bird()), module=Module(compiled=True))
    assert callback.running.methods["EarlyBird"].drawn
    assert_same(module.net._orig_mod, plain.net)


class Two(Module):
    """Optimizes by hand, with an optimizer for the classifier and one for the rest; it calls itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.net(x) * self.scale

    def training_step(self, batch, index):
        x, y = batch
        self.manual_backward(functional.cross_entropy(self(x), y))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        last = [*self.net[-1].parameters(), self.scale]
        rest = list(self.net[:-1].parameters())
        return torch.optim.Adam(rest, lr=1e-2), torch.optim.SGD(last, lr=0.1, momentum=0.9)


def test_several_optimizers_are_all_cut(tmp_path):
    module, driver = fit(tmp_path, callback := EarlyBirdCallback(bird()), module=Two())
    assert callback.running.methods["EarlyBird"].drawn_at == 6
    assert width(module) < width(Two())
    for optimizer in driver.optimizers:
        for parameter, state in optimizer.state.items():
            assert all(value.shape == parameter.shape for value in state.values() if value.dim())


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (eb.BatchDropping(), "BatchDropping thins a loader"),
        (eb.ShiftAdd(), "ShiftAdd replaces layers"),
        (0.5, "0.5 is no method"),
        ([eb.EarlyBird(), eb.EarlyBird(keep=0.3)], "two methods of one class"),
    ],
)
def test_what_cannot_work_is_refused_by_name(method, said):
    with pytest.raises(InputError, match=said):
        EarlyBirdCallback(method)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="has no submodule 'backbone'"):
        fit(tmp_path, EarlyBirdCallback(bird(), module="backbone"))
    fit(tmp_path, EarlyBirdCallback(bird()), keep_all(tmp_path), enable_checkpointing=True)
    with pytest.raises(InputError, match="written with EarlyBird; EarlyBird, LayerSkipping"):
        fit(tmp_path, EarlyBirdCallback([bird(), eb.LayerSkipping()]), checkpoint=tmp_path / "epoch=2.ckpt")
