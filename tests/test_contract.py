"""What every method must keep, whatever it does. A new method is tested by one row in `SETTINGS`."""

import atexit
import copy
import dataclasses
import importlib
import itertools
import os
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from earlybird.errors import InputError
from earlybird.methods import METHODS
from earlybird.objective import Objective
from earlybird.settings import accepted
from earlybird.sparse.masks import prunable, ticket_of
from tests.tickets.teachers import write_teacher
from tests.tickets.test_early_bird import cross_entropy, sgd, train_by_closures
from tests.tickets.test_early_bird import train as train_plainly
from tests.tickets.topologies import images, make

# Name to (settings that do nothing, or None where it always acts; settings that act within twelve steps).
SETTINGS = {
    "early_bird": (
        {"keep": 1.0, "look_every": "2it", "skip": "2it", "deadline": "8it"},
        {"keep": 0.5, "look_every": "2it", "skip": "2it", "deadline": "8it", "window": 2, "round_to": 1},
    ),
    "early_bert": (
        {
            "keep_heads": 1.0,
            "keep_neurons": 1.0,
            "draw_at": "8it",
            "unit_look_every": "2it",
            "unit_weights": "continue",
            "unit_optimizer_state": "keep",
        },
        {"keep_heads": 0.5, "keep_neurons": 0.5, "draw_at": "7it", "unit_look_every": "2it", "coefficient_rate": 0.01},
    ),
    "iterative": ({"keep_weights": 1.0}, {"keep_weights": 0.5, "prune_share": 0.3, "rewind_to": "2it"}),
    "at_init": ({"init_keep": 1.0}, {"init_keep": 0.5, "init_score": "magnitude", "init_round_to": 1}),
    "fixed_ticket": ({}, {"ticket": lambda model: ticket_file(model)}),
    "dynamic_sparse": (
        {"density": 1.0},
        {"density": 0.3, "regrow_every": "2it", "regrow_until": "12it", "drop_share": 0.5},
    ),
    "batch_dropping": ({"drop": 0.0}, {"drop": 0.5}),
    "layer_skipping": ({"layer_share": 1.0}, {"layer_share": 0.6}),
    "stochastic_depth": ({"depth_survival": 1.0}, {"depth_survival": 0.5}),
    "progressive_precision": ({"forward_ladder": "fp32"}, {"forward_ladder": "3,8", "rungs_at": ("5it",)}),
    "fractional_precision": (
        {"fractional_target": 1.0},
        {"fractional_target": (0.03, 0.04), "fractional_at": ("6it",)},
    ),
    "predictive_sign": ({"sign_from": "100it"}, {}),
    "block_float": ({"block_until": "0it"}, {}),
    "shift_add": ({"operation": "conv"}, {"operation": "shift_add"}),
    "progressive_resizing": ({"initial_scale": 1.0}, {"grow_from": "4it", "whole_from": "10it", "size_step": 1}),
    "simclr": (None, {"simclr_width": 8}),
    "moco": (None, {"moco_width": 8, "moco_queue": 24, "moco_momentum": 0.5}),
    "distillation": ({"soft_share": 0.0}, {"kd_until": "11it"}),
    "segmentation": (None, {}),
    "detection": (None, {}),
}
STEPS = 14
# Those of networks that the others are not for; and those of the others that are asked to work on them, too.
TOPOLOGIES = {"early_bert": ("patches",)}
ON_PATCHES = ("batch_dropping", "progressive_resizing", "progressive_precision")


def topologies(*names: str) -> tuple[str, ...]:
    return next((TOPOLOGIES[name] for name in names if name in TOPOLOGIES), ("residual", "plain", "depthwise"))


def method_class(name: str) -> type:
    module, _, attribute = METHODS[name].path.partition(":")
    return getattr(importlib.import_module(module), attribute)


@pytest.fixture(autouse=True, scope="module")
def _a_teacher(tmp_path_factory):
    SETTINGS["distillation"][1]["teacher"] = str(write_teacher(tmp_path_factory.mktemp("teacher"))[0])


# what a loader would hand out beside images and labels
BESIDE = {
    "segmentation": lambda images: (images[:, 0] > 0.5).byte(),
    "detection": lambda images: torch.tensor([0.1, 0.2, 0.6, 0.8]).repeat(len(images), 1),
}


def loss_of(running):
    """The loss that one of the methods decides, or the usual one."""
    for name, method in running.items():
        if name in BESIDE:
            return lambda model, inputs, labels, method=method, name=name: method.loss(
                model, inputs, labels, BESIDE[name](inputs)
            )
        if isinstance(method, Objective):
            return method.loss
    return None


def train(model, optimizer, steps, start=0, running=None):
    return train_plainly(model, optimizer, steps, start, loss_of(running or {}))


def attach(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, *, acting: bool):
    settings = {key: value(model) if callable(value) else value for key, value in SETTINGS[name][acting].items()}
    method = method_class(name)(**settings)
    context = {
        "example_inputs": images(2),
        "samples": (images(8), torch.arange(8) % 4),
        "steps_per_epoch": 5,
        "total_steps": STEPS,
    }
    return method.attach(model, optimizer, **accepted(method.attach, context))


def ticket_file(model: nn.Module) -> str:
    """Write a ticket that keeps half the weights of each layer, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(weight.shape, generator=generator) < 0.5 for name, weight in prunable(model).items()}
    path = Path(tempfile.gettempdir()) / f"earlybird-contract-{os.getpid()}-{'-'.join(masks)}.safetensors"
    atexit.register(path.unlink, missing_ok=True)
    return str(ticket_of(masks).save(path))


def attach_all(order, model, optimizer):
    return {name: attach(name, model, optimizer, acting=True) for name in order}


def check_resumes_to_the_bit(names, stop):
    topology = topologies(*names)[0]
    whole = make(topology)
    optimizer = sgd(whole)
    train(whole, optimizer, STEPS, running=attach_all(names, whole, optimizer))
    first = make(topology)
    first_optimizer = sgd(first)
    running = attach_all(names, first, first_optimizer)
    train(first, first_optimizer, stop, running=running)
    states = {name: method.state_dict() for name, method in running.items()}
    saved = copy.deepcopy((states, first.state_dict(), first_optimizer.state_dict()))
    second = make(topology)
    second_optimizer = sgd(second)
    resumed = attach_all(names, second, second_optimizer)
    for name, method in resumed.items():
        method.load_state_dict(saved[0][name])
    second.load_state_dict(saved[1])
    second_optimizer.load_state_dict(saved[2])
    train(second, second_optimizer, STEPS - stop, stop, running=resumed)
    for (key, one), two in zip(second.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, two), key


@pytest.fixture(autouse=True)
def _deadline_warnings_are_expected():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no agreement by the deadline")
        yield


def test_every_method_has_a_row():
    assert set(SETTINGS) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
class TestContract:
    def test_hyper_parameters_are_frozen_keyword_only_and_explained(self, name):
        kind = method_class(name)
        assert kind.__dataclass_params__.frozen
        for field in dataclasses.fields(kind):
            assert field.kw_only
            assert field.metadata.get("help"), field.name
            assert field.default is not dataclasses.MISSING, field.name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(), dataclasses.fields(kind)[0].name, None)

    def test_the_table_says_who_found_it_and_when_it_does_not_pay(self, name):
        info = METHODS[name]
        assert info.link.startswith("https://")
        assert all((info.citation, info.saves, info.limits))

    def test_doing_nothing_equals_plain_pytorch_to_the_bit(self, name):
        if SETTINGS[name][0] is None:
            pytest.skip("it trains something else than plain PyTorch does")
        for topology in topologies(name):
            plain = make(topology)
            train(plain, sgd(plain), STEPS)
            model = make(topology)
            optimizer = sgd(model)
            running = attach(name, model, optimizer, acting=False)
            train(model, optimizer, STEPS, running={name: running})
            for (key, one), two in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
                assert torch.equal(one, two), (topology, key)

    @pytest.mark.parametrize("stop", [1, 5, 8, 11])
    def test_stopped_and_resumed_ends_in_the_same_bits(self, name, stop):
        check_resumes_to_the_bit((name,), stop)

    def test_a_step_with_a_closure_trains_as_one_without(self, name):
        """Lightning always steps with one."""
        ends = []
        for closures in (False, True):
            model = make(topologies(name)[0])
            optimizer = sgd(model)
            running = attach(name, model, optimizer, acting=True)
            loss = loss_of({name: running}) or cross_entropy
            train_by_closures(model, optimizer, STEPS, closures=closures, loss_of=loss)
            ends.append(model.state_dict())
        for (key, one), two in zip(ends[0].items(), ends[1].values(), strict=True):
            assert torch.equal(one, two), key

    def test_the_bill_adds_up_and_counts_every_step(self, name):
        model = make(topologies(name)[0])
        optimizer = sgd(model)
        begun = time.perf_counter()
        running = attach(name, model, optimizer, acting=True)
        train(model, optimizer, STEPS, running={name: running})
        running.detach()
        elapsed = time.perf_counter() - begun
        phases = running._ledger.phases
        assert sum(record.steps for record in phases.values()) == STEPS
        trained = 8 if name == "moco" else 16  # half of the views are keys, which need no backward pass
        assert sum(record.train_images for record in phases.values()) == trained * STEPS
        assert 0.5 * elapsed < sum(record.seconds for record in phases.values()) <= elapsed
        assert all(record.macs > 0 for record in phases.values() if record.steps)
        assert running.bill().total.steps.value == STEPS

    def test_parameters_stay_in_the_optimizer_exactly_once(self, name):
        model = make(topologies(name)[0])
        optimizer = sgd(model)
        running = attach(name, model, optimizer, acting=True)
        train(model, optimizer, STEPS, running={name: running})
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        beside = running.encoder.projector.parameters() if hasattr(running, "encoder") else ()
        assert sorted(held) == sorted(id(parameter) for parameter in (*model.parameters(), *beside))
        model.eval()(images()).sum().backward()

    def test_unknown_settings_are_refused(self, name):
        with pytest.raises((TypeError, InputError)):
            method_class(name)(no_such_setting=1)


# of each of these, one at most: they decide how layers compute, or which samples run a block
ALTERNATIVES = (
    {"progressive_precision", "fractional_precision", "predictive_sign", "block_float", "shift_add"},
    {"layer_skipping", "stochastic_depth", "fractional_precision"},
    {"early_bird", "iterative", "at_init", "fixed_ticket", "dynamic_sparse"},  # one ticket at a time
    {"iterative", "shift_add"},  # a weight of zero is not nothing there
    {"fixed_ticket", "shift_add"},
    {"dynamic_sparse", "shift_add"},
    {"simclr", "moco", "distillation", "segmentation", "detection"},  # one loss
    # features that are cut
    *({one, other} for one in ("early_bird", "at_init") for other in ("simclr", "moco", "segmentation", "detection")),
)
COMMON = [name for name in METHODS if name not in TOPOLOGIES]
PAIRS = list(itertools.permutations(COMMON, 2))
# layers are replaced before other methods hang on them or on their blocks; the shipped loop sees to that
READERS = ("layer_skipping", "stochastic_depth", "at_init", "simclr", "moco", "segmentation", "detection")
LATE = [(first, "shift_add") for first in READERS]
REFUSED = [pair for pair in PAIRS if pair in LATE or any(set(pair) <= those for those in ALTERNATIVES)]
# gates draw their first weights when they are attached, as many as the network has channels then
GATED = [(first, "at_init") for first in ("layer_skipping", "fractional_precision")]
MANY = (
    ("early_bird", "progressive_resizing", "batch_dropping", "layer_skipping", "progressive_precision"),
    ("early_bird", "batch_dropping", "stochastic_depth", "block_float"),
    ("early_bird", "distillation", "progressive_resizing", "stochastic_depth"),
    ("iterative", "moco", "batch_dropping", "progressive_resizing"),
)
PATCHED = [(name, other) for name in TOPOLOGIES for other in ON_PATCHES]
TOGETHER = [pair for pair in itertools.combinations(COMMON, 2) if not {pair, pair[::-1]} <= set(REFUSED)]
TOGETHER += [*MANY, *PATCHED]


@pytest.mark.parametrize("pair", REFUSED, ids=["-".join(pair) for pair in REFUSED])
def test_what_cannot_work_together_is_refused_before_the_first_step_and_leaves_the_first_one_alone(pair):
    model = make("residual")
    optimizer = sgd(model)
    first = attach(pair[0], model, optimizer, acting=True)
    with pytest.raises(InputError, match=r"leave one|before other methods|layer '0'"):
        attach(pair[1], model, optimizer, acting=True)
    train(model, optimizer, STEPS, running={pair[0]: first})


@pytest.mark.parametrize("names", TOGETHER, ids=["-".join(names) for names in TOGETHER])
class TestComposition:
    def test_in_any_order_they_end_in_the_same_bits_and_each_ones_own_bill_has_all(self, names):
        ends = []
        for order in (names, names[::-1]):
            if order in (*LATE, *GATED):
                continue
            model = make(topologies(*order)[0])
            optimizer = sgd(model)
            running = attach_all(order, model, optimizer)
            train(model, optimizer, STEPS, running=running)
            ends.append(model.state_dict())
            bills = [method.bill() for method in running.values()]
            assert {bill.parameters for bill in bills} == {sum(parameter.numel() for parameter in model.parameters())}
            for counted in ("macs", "bit_macs"):
                spent = [getattr(bill.total, counted).value for bill in bills]
                assert spent == pytest.approx([spent[0]] * len(spent), rel=1e-9), counted
        for (key, one), two in zip(ends[0].items(), ends[-1].values(), strict=True):
            assert torch.equal(one, two), key

    def test_together_they_resume_to_the_bit(self, names):
        check_resumes_to_the_bit(names[::-1] if names in LATE else names, 8)


@pytest.mark.parametrize("names", [("early_bird",), *(names for names in MANY if "early_bird" in names)], ids="-".join)
@pytest.mark.parametrize("stop", [4, 6, 8])
def test_a_ticket_that_is_drawn_in_stages_composes_and_resumes_to_the_bit_between_them(names, stop, monkeypatch):
    nothing, acting = SETTINGS["early_bird"]
    monkeypatch.setitem(SETTINGS, "early_bird", (nothing, {**acting, "stages": (0.75,), "tolerance": 0.0}))
    check_resumes_to_the_bit(names, stop)  # cuts at steps 5 and 8
