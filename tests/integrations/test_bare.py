"""A bare loop and Fabric, which need nothing of ours, and what all loops share: averages, saved states, bad input."""

import importlib
import importlib.metadata
import warnings

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import earlybird as eb
from earlybird.errors import InputError
from tests.integrations.loops import BATCHES, EPOCHS, assert_same, bare, bird, loader, network, schedule, sgd, width


@pytest.fixture(autouse=True)
def _expected_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no agreement by the deadline")
        yield


def ema(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


class TestFabric:
    def train(self, *methods, resume=None, folder=None):
        fabric = Fabric(accelerator="cpu", devices=1)
        model = network()
        model, optimizer = fabric.setup(model, sgd(model))
        scheduler = schedule(optimizer)
        running = [method.attach(model, optimizer) for method in methods]
        first = 0
        if resume is not None:
            state = fabric.load(resume)
            running[0].load_state_dict(state["bird"])
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            first = state["epoch"]
        model.train()
        for epoch in range(first, EPOCHS):
            for x, y in fabric.setup_dataloaders(loader()):
                loss = functional.cross_entropy(model(x), y)
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            if folder is not None:
                state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": epoch + 1}
                fabric.save(folder / f"{epoch}.ckpt", {**state, "bird": running[0].state_dict()})
        return model.module, running

    @pytest.mark.parametrize("keep", [1.0, 0.5])
    def test_it_ends_in_the_bits_of_a_bare_loop(self, keep):
        model, _ = self.train(bird(keep=keep))
        assert_same(model, bare(bird(keep=keep))[0] if keep < 1 else bare()[0])

    @pytest.mark.parametrize("epoch", [0, 2], ids=["before", "after"])
    def test_it_resumes_to_the_bit_without_example_inputs(self, tmp_path, epoch):
        model, (search,) = self.train(bird(), folder=tmp_path)
        again, (second,) = self.train(bird(), resume=tmp_path / f"{epoch}.ckpt")
        assert second.ticket == search.ticket
        assert second.change.layers == search.change.layers
        assert_same(again, model)


def test_weights_first_then_the_optimizer_then_the_state():
    """The order of Lightning and Trainer: `EarlyBird.cut` comes before all."""
    model, _, (search,) = bare(bird())
    average = ema(model)
    saved = search.state_dict()
    fresh, fresh_average = network(), ema(network())
    bird().cut(fresh, saved, averaged=[fresh_average.module])
    fresh.load_state_dict(model.state_dict())
    fresh_average.load_state_dict(average.state_dict())
    second = bird().attach(fresh, sgd(fresh), averaged=fresh_average)
    weights = {name: value.clone() for name, value in fresh.state_dict().items()}
    second.load_state_dict(saved)
    assert second.ticket == search.ticket
    assert second.change == search.change
    assert second.state_dict()["sizes"] == saved["sizes"]
    assert all(torch.equal(value, weights[name]) for name, value in fresh.state_dict().items())
    bird().cut(fresh, saved)  # what is cut already stays as it is
    assert_same(fresh, model)


def test_a_state_from_before_the_draw_is_refused_by_a_shrunk_model_and_changes_nothing():
    fresh = network()
    early = bird().attach(fresh, sgd(fresh)).state_dict()
    model, _, (search,) = bare(bird())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for load in (search.load_state_dict, lambda state: bird().cut(model, state)):
        with pytest.raises(InputError, match=r"\(step 0\) is from before its ticket was drawn, but this model is shr"):
            load(early)
    assert search.drawn
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_state_of_a_search_on_another_model_is_refused():
    _, _, (search,) = bare(bird())
    with pytest.raises(InputError, match="belongs to another model"):
        bird().cut(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), search.state_dict())


def test_a_moving_average_equals_that_of_the_dense_weights_cut_afterwards():
    """What averages the weights one by one gives the same before and after a cut that leaves their values alone."""
    averages = []
    for along in (True, False):
        model = network()
        optimizer = sgd(model)
        average = ema(model)
        search = bird(refit="none").attach(model, optimizer, averaged=average if along else ())
        model.train()
        for number, (x, y) in enumerate([*loader(), *loader()]):
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if search.drawn and not along and number == 5:
                eb.shrink(average.module, search.ticket, x[:1])
            average.update_parameters(model)
        assert search.drawn_at == 6
        assert width(average) == width(model)
        averages.append(average)
    assert_same(*averages)


def test_gradients_of_a_scaler_give_the_same_ticket():
    """With a scale that is a power of two, all is the same to the bit; a step that is skipped is none on the clock."""
    model = network()
    optimizer = sgd(model)
    scheduler = schedule(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    search = bird().attach(model, optimizer)
    model.train()
    for _ in range(EPOCHS):
        for x, y in loader():
            scaler.scale(functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
    reference, _, (other,) = bare(bird())
    assert search.ticket == other.ticket
    assert_same(model, reference)
    assert search.state_dict()["steps"] == BATCHES * EPOCHS
    (x, y) = next(iter(loader()))
    scaler.scale(functional.cross_entropy(model(x), y) * torch.inf).backward()
    scaler.step(optimizer)
    assert search.state_dict()["steps"] == BATCHES * EPOCHS


class Tied(nn.Module):
    """Words in, words out, with one table for both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 8)
        self.up, self.norm, self.down = nn.Linear(8, 24), nn.BatchNorm1d(24), nn.Linear(24, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        x = self.words(tokens).mean(1)
        return self.head(self.down(functional.relu(self.norm(self.up(x)))))


def test_tied_embeddings_survive():
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    search = bird().attach(model, optimizer)
    tokens = torch.randint(0, 20, (16, 6), generator=torch.Generator().manual_seed(0))
    model.train()
    for _ in range(8):
        functional.cross_entropy(model(tokens), tokens[:, 0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert search.drawn
    assert model.up.out_features == 12
    assert model.head.weight is model.words.weight
    assert model.words.weight.shape == (20, 8)


class TestBadInput:
    def test_an_optimizer_of_another_model(self):
        with pytest.raises(InputError, match="the optimizer holds no parameter of the model"):
            bird().attach(network(), sgd(network()))

    def test_an_optimizer_that_misses_some(self):
        model = network()
        with pytest.warns(UserWarning, match=r"no given optimizer holds 7\.weight, 7\.bias"):
            bird().attach(model, torch.optim.SGD(model[:7].parameters(), lr=0.1))

    def test_the_average_in_place_of_the_model(self):
        model = network()
        with pytest.raises(InputError, match="the optimizer holds no parameter of the model"):
            bird().attach(ema(model), sgd(model))

    def test_an_average_of_another_model(self):
        model = network()
        with pytest.raises(InputError, match="the averaged Tied has other parameters"):
            bird().attach(model, sgd(model), averaged=ema(Tied()))

    @pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
    def test_wrapped_models_are_unwrapped(self, wrap):
        model = network()
        wrapped = wrap(model)
        optimizer = sgd(wrapped)
        search = bird(deadline="2it").attach(wrapped, optimizer)
        for _ in range(2):
            functional.cross_entropy(model(next(iter(loader()))[0]), torch.zeros(16, dtype=torch.int64)).backward()
            optimizer.step()
        assert search.drawn
        assert not any(name.startswith(("module.", "_orig_mod.")) for name in search.ticket.masks)
        assert width(wrapped) == width(model) < width(network())

    @pytest.mark.parametrize(
        ("module", "package", "version", "said"),
        [
            ("lightning", "lightning", "2.7.1", r"lightning 2\.7\.1 is installed; lightning 2\.6; pip install '"),
            ("huggingface", "transformers", "4.57.0", r"transformers 4\.57\.0 is installed; transformers 5; pip"),
            ("accelerate", "accelerate", None, r"no accelerate is installed; accelerate 1; pip .*\[hf\]"),
        ],
    )
    def test_a_version_that_is_not_supported_is_named_with_the_one_that_is(
        self, monkeypatch, module, package, version, said
    ):
        loaded = importlib.import_module(f"earlybird.integrations.{module}")
        found = importlib.metadata.version

        def told(name):
            if name == package and version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version if name == package else found(name)

        monkeypatch.setattr(importlib.metadata, "version", told)
        with pytest.raises(InputError, match=said):
            importlib.reload(loaded)
