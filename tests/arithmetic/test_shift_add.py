import copy
import json
import warnings
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import earlybird as eb
from earlybird import export
from earlybird.arithmetic.add import AddConv2d
from earlybird.arithmetic.shift import ShiftConv2d
from earlybird.arithmetic.shift_add import ShiftAdd
from earlybird.cost.count import count
from earlybird.cost.energy import ASIC, FPGA, joules
from earlybird.errors import InputError
from earlybird.files import write_tensors
from earlybird.ledger import Ledger
from earlybird.models import build
from earlybird.models.blueprint import Blueprint
from earlybird.optimizers.muon import Muon, by_role
from tests.tickets.test_early_bird import sgd, train
from tests.tickets.topologies import images, make

ADDING = {"example_inputs": images(2)}


def held(optimizer):
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"operation": "mul"}, "operation is 'mul'; one of shift_add, shift, add, conv"),
            ({"shift_form": "p"}, "form 'p'"),
            ({"shift_bits": 1}, "shift weights of 1 bits"),
            ({"shift_threshold": 1.5}, "threshold 1.5"),
            ({"add_eta": 0}, "add_eta is 0"),
            ({"add_eta": float("inf")}, "add_eta is inf"),
            ({"fixed_point": 40}, "fixed point of 40 bits after the point"),
        ],
    )
    def test_bad_values_are_named_at_construction(self, settings, message):
        with pytest.raises(InputError, match=message):
            ShiftAdd(**settings)

    def test_a_single_name_is_a_pattern_too(self):
        assert ShiftAdd(leave_layers="0").leave_layers == ("0",)
        assert ShiftAdd(fixed_point="none").fixed_point is None


class TestOptimizer:
    @pytest.mark.parametrize("make_optimizer", [sgd, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)])
    @pytest.mark.parametrize("operation", ["shift", "add", "shift_add"])
    def test_every_parameter_is_held_once_and_shifts_do_not_decay(self, operation, make_optimizer):
        model = make("residual")
        optimizer = make_optimizer(model)
        optimizer.param_groups[0]["weight_decay"] = 5e-4
        before = dict(optimizer.param_groups[0])
        ShiftAdd(operation=operation, shift_form="ps").attach(model, optimizer, **ADDING)
        assert sorted(held(optimizer)) == sorted(id(parameter) for parameter in model.parameters())
        shifts = {
            id(getattr(layer, name)) for layer in model.modules() if isinstance(layer, ShiftConv2d | nn.Linear)
            for name in ("shift", "sign") if hasattr(layer, name)
        }  # fmt: skip
        for group in optimizer.param_groups:
            own = {id(parameter) for parameter in group["params"]}
            assert own <= shifts or not own & shifts
            assert group["weight_decay"] == (0 if own <= shifts else 5e-4)
            others = {key: value for key, value in group.items() if key not in ("params", "weight_decay")}
            assert others == {key: before[key] for key in others}
        train(model, optimizer, 2)

    def test_rounded_weights_take_the_old_ones_places(self):
        model = make("plain")
        optimizer = sgd(model)
        order = [name for name, _ in model.named_parameters()]
        ShiftAdd(operation="shift").attach(model, optimizer)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert len(optimizer.param_groups) == 1
        assert [names[i].replace("real", "weight") for i in held(optimizer)] == order

    def test_groups_are_kept_apart(self):
        model = make("plain")
        early = [*model[0].parameters(), *model[1].parameters()]
        late = [parameter for layer in model[3:] for parameter in layer.parameters()]
        optimizer = torch.optim.SGD([{"params": early, "lr": 0.1}, {"params": late, "lr": 0.2}], lr=1.0)
        ShiftAdd(operation="shift", shift_form="ps").attach(model, optimizer)
        rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        assert rates[id(model[0].shift)] == 0.1
        assert rates[id(model[3].sign)] == 0.2
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.1, 0.2]

    def test_several_optimizers(self):
        model = make("plain")
        first = torch.optim.SGD([*model[0].parameters()], lr=0.1)
        second = torch.optim.SGD([parameter for layer in model[1:] for parameter in layer.parameters()], lr=0.1)
        ShiftAdd(shift_form="ps").attach(model, [first, second], **ADDING)
        assert set(held(first)) == {id(model[0].shift), id(model[0].sign)}
        train(model, first, 1)

    def test_frozen_shifts_are_not_held(self):
        model = make("plain")
        optimizer = sgd(model)
        ShiftAdd(shift_form="frozen").attach(model, optimizer, **ADDING)
        trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
        assert sorted(held(optimizer)) == sorted(trained)
        before = copy.deepcopy(model)
        train(model, optimizer, 3)
        for name in ("0", "3.shift", "8"):
            assert torch.equal(model.get_submodule(name).weight, before.get_submodule(name).weight)
        assert not torch.equal(model[3].add.weight, before[3].add.weight)

    def test_gradients_of_add_layers_are_scaled_in_the_step(self):
        model = make("plain")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        running = ShiftAdd(add_eta=0.1).attach(model, optimizer, **ADDING)
        before = model[3].add.weight.detach().clone()
        train(model, optimizer, 1)
        step = (before - model[3].add.weight.detach()) / 0.5
        assert float(step.square().mean().sqrt()) == pytest.approx(0.1, rel=1e-4)
        running.detach()
        before = model[3].add.weight.detach().clone()
        train(model, optimizer, 1)
        step = (before - model[3].add.weight.detach()) / 0.5
        assert float(step.square().mean().sqrt()) != pytest.approx(0.1, rel=1e-2)

    def test_after_the_first_step_it_is_too_late(self):
        model = make("plain")
        optimizer = sgd(model)
        train(model, optimizer, 1)
        with pytest.raises(InputError, match="has made steps with the weight of layer '0'"):
            ShiftAdd(operation="shift").attach(model, optimizer)
        assert type(model[0]) is nn.Conv2d

    def test_optimizers_that_do_not_fit_are_refused(self):
        model = make("plain")
        with pytest.raises(InputError, match="holds the weight of layer '0'"):
            ShiftAdd(operation="shift").attach(model, torch.optim.SGD(model[3:].parameters(), lr=0.1))
        roles = by_role(model)
        filters = Muon([{"params": roles["filters"]}, {"params": roles["head"], "orthogonal": False}])
        with pytest.raises(InputError, match="Muon holds the norm of layer '0'"):
            ShiftAdd(operation="shift").attach(model, filters)
        with pytest.raises(InputError, match="names of parameters"):
            ShiftAdd(operation="shift").attach(model, torch.optim.SGD(model.named_parameters(), lr=0.1))
        with pytest.raises(InputError, match="no optimizer was given"):
            ShiftAdd(operation="shift").attach(model, [])
        assert type(model[0]) is nn.Conv2d
        assert not model._forward_pre_hooks


class TestRun:
    def test_conv_is_plain_pytorch(self):
        plain, model = make("residual"), make("residual")
        train(plain, sgd(plain), 3)
        optimizer = sgd(model)
        running = ShiftAdd(operation="conv").attach(model, optimizer)
        train(model, optimizer, 3)
        assert same(model, plain)
        assert running.layers == ()

    def test_the_loss_falls(self):
        for operation in ("shift", "add", "shift_add"):
            torch.manual_seed(0)
            model = make("plain")
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            ShiftAdd(operation=operation).attach(model, optimizer, **ADDING)
            x, labels = images(16), torch.arange(16) % 5
            losses = []
            for _ in range(60):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), labels)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            assert losses[-1] < 0.6 * losses[0], operation

    def test_it_resumes_to_the_bit(self):
        def begin():
            model = make("residual")
            optimizer = sgd(model)
            return model, optimizer, ShiftAdd().attach(model, optimizer, seed=3, **ADDING)

        whole, optimizer, _ = begin()
        train(whole, optimizer, 6)
        first, first_optimizer, running = begin()
        train(first, first_optimizer, 2)
        saved = copy.deepcopy((running.state_dict(), first.state_dict(), first_optimizer.state_dict()))
        second, second_optimizer, again = begin()
        again.load_state_dict(saved[0])
        second.load_state_dict(saved[1])
        second_optimizer.load_state_dict(saved[2])
        train(second, second_optimizer, 4, 2)
        assert same(second, whole)

    def test_a_state_of_other_layers_is_refused(self):
        model, other = make("plain"), make("residual")
        state = ShiftAdd(operation="shift").attach(model, sgd(model)).state_dict()
        running = ShiftAdd(operation="shift").attach(other, sgd(other))
        with pytest.raises(InputError, match="3 layers were converted, in this one 7"):
            running.load_state_dict(state)

    def test_copies_train_alike_and_leave_the_original_alone(self):
        model = make("plain")
        ShiftAdd().attach(model, sgd(model), **ADDING)
        other = copy.deepcopy(model)
        train(other, sgd(other), 1)
        assert same(model, copy.deepcopy(model))
        assert not same(model, other)


class TestBill:
    def test_dense_is_the_network_of_convolutions(self):
        model = make("plain")
        optimizer = sgd(model)
        running = ShiftAdd(fixed_point=16).attach(model, optimizer, **ADDING)
        train(model, optimizer, 4)
        bill = running.bill()
        assert running._ledger.dense_cost.forward_macs == 64 * 27 * 8 + 64 * 72 * 12 + 60
        assert running._ledger.cost.forward_macs == 64 * 27 * 8 + 64 * 72 * 12 + 64 * 108 * 12 + 60
        assert {name.split()[0] for name in bill.total.operations} == {"shift", "add", "mult"}
        assert bill.dense.total.modelled_joules.low > 0

    def test_in_a_run_of_bf16_shifts_are_of_16_bits_and_distances_of_32(self):
        model, ledger = make("plain"), Ledger()
        optimizer = sgd(model)
        ledger.bits = 16
        ledger.watch(model, optimizer, images(2))
        ShiftAdd().attach(model, optimizer, ledger=ledger, **ADDING)
        assert model[3].shift.arithmetic.operations("forward") == {"shift 16": 1, "add fp16": 1}
        assert model[3].add.arithmetic.operations("forward") == {"add fp32": 2}


class TestExport:
    @pytest.fixture
    def trained(self, tmp_path):
        """Return a function that writes what a run of these settings would, and the blueprint and model of it."""

        def made(**settings):
            plain = Blueprint("small_cnn", 10, 1, 8, 0.125, (0.5,), (0.5,), tuple("0123456789"))
            model = plain.build()
            method = ShiftAdd(**settings)
            method.attach(model, sgd(model), example_inputs=plain.example(2), seed=5)
            model(plain.example(8))  # running statistics
            blueprint = replace(plain, conversions=(("shift_add", json.dumps(asdict(method))),))
            metadata = {"format": export.FORMAT, "blueprint": blueprint.to_json(), "order": "[]", "provenance": "{}"}
            return write_tensors(tmp_path / "model.safetensors", model.state_dict(), metadata), blueprint, model.eval()

        return made

    @pytest.mark.parametrize(
        "settings", [{}, {"operation": "add"}, {"operation": "conv"}, {"shift_form": "ps", "leave_layers": ("*.3",)}]
    )
    def test_a_file_is_read_back_as_the_same_network(self, trained, settings):
        path, blueprint, model = trained(**settings)
        images = blueprint.example(3)
        assert Blueprint.from_json(blueprint.to_json()) == blueprint
        assert torch.equal(export.load(path)(images), model(images))

    def test_onnxruntime_agrees(self, trained, tmp_path):
        pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
        pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
        path, *_ = trained(shift_form="ps")
        assert export.export_onnx(path, tmp_path / "model.onnx")[1] < 1e-5

    def test_conversions_that_make_no_sense_are_named(self, trained):
        _, blueprint, _ = trained()
        for name, settings, words in (
            ("shift_add", '{"operation": "mul"}', "operation is 'mul'"),
            ("shift_add", '{"speed": 2}', "not settings of shift_add"),
        ):
            with pytest.raises(InputError, match=words):
                replace(blueprint, conversions=((name, settings),)).build()
        with pytest.raises(InputError, match="not a blueprint"):
            Blueprint.from_json(blueprint.to_json().replace('"shift_add"', '"os.system"'))
        with pytest.raises(InputError, match="not a blueprint"):
            Blueprint.from_json(json.dumps({**json.loads(blueprint.to_json()), "conversions": 3}))


class TestWithTheEarlyTicket:
    SETTINGS = {"keep": 0.5, "look_every": "2it", "skip": "2it", "deadline": "4it", "window": 2, "round_to": 1}

    def run(self, order, steps=6, topology="residual", operation="shift_add", **settings):
        model = make(topology)
        optimizer = sgd(model)
        running = {}
        for name in order:
            if name == "bird":
                running[name] = eb.EarlyBird(**{**self.SETTINGS, **settings}).attach(model, optimizer, **ADDING)
            else:
                running[name] = ShiftAdd(operation=operation).attach(model, optimizer, seed=3, **ADDING)
        train(model, optimizer, steps)
        return model, optimizer, running

    @pytest.fixture(autouse=True)
    def _deadlines_are_expected(self):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="no agreement by the deadline")
            yield

    @pytest.mark.parametrize("operation", ["shift", "add", "shift_add"])
    def test_in_any_order_the_small_network_is_the_same(self, operation):
        one, optimizer, running = self.run(("bird", "shift_add"), operation=operation)
        two, *_ = self.run(("shift_add", "bird"), operation=operation)
        assert running["bird"].drawn
        assert same(one, two)
        assert sorted(held(optimizer)) == sorted(id(parameter) for parameter in one.parameters())
        assert one[3].conv1(torch.zeros(1, one[0].out_channels, 8, 8)).shape[1] == one[3].norm1.num_features < 8

    def test_distances_to_channels_that_are_cut_stay_as_a_constant(self):
        """What `shrink` compares: the cut network computes what the masked one does."""
        model, *_ = self.run(("shift_add", "bird"), operation="add")
        cut = [layer for layer in model.modules() if isinstance(layer, AddConv2d) and layer.constant is not None]
        assert cut
        assert all(layer.constant.shape == (layer.out_channels,) for layer in cut)
        assert all(bool((layer.constant < 0).all()) for layer in cut)

    @pytest.mark.parametrize("operation", ["add", "shift_add"])
    def test_filters_can_be_ranked_too(self, operation):
        """Then the channels between the two layers of a chain, which no norm ranks, go as well."""
        model, *_ = self.run(("shift_add", "bird"), operation=operation, topology="plain", score="magnitude")
        widths = [layer.out_channels for layer in model.modules() if isinstance(layer, (ShiftConv2d, AddConv2d))]
        assert sum(widths) < (8 + 12 + 12 if operation == "shift_add" else 12)
        model.eval()(images(2)).sum().backward()

    @pytest.mark.parametrize("stop", [2, 5])
    def test_it_resumes_to_the_bit(self, stop):
        whole, *_ = self.run(("shift_add", "bird"), operation="add")
        first, first_optimizer, running = self.run(("shift_add", "bird"), stop, operation="add")
        states = {name: one.state_dict() for name, one in running.items()}
        saved = copy.deepcopy((states, first.state_dict(), first_optimizer.state_dict()))
        second, second_optimizer, running = self.run(("shift_add", "bird"), 0, operation="add")
        for name, one in running.items():
            one.load_state_dict(saved[0][name])
        second.load_state_dict(saved[1])
        second_optimizer.load_state_dict(saved[2])
        train(second, second_optimizer, 6 - stop, stop)
        assert same(second, whole)

    @pytest.mark.parametrize("form", ["q", "ps", "frozen"])
    def test_least_squares_leaves_shifts_and_distances_alone(self, form):
        model = make("flatten")
        optimizer = sgd(model)
        ShiftAdd(shift_form=form).attach(model, optimizer, **ADDING)
        eb.EarlyBird(**{**self.SETTINGS, "refit": "least_squares"}).attach(model, optimizer, **ADDING)
        train(model, optimizer, 6)
        assert model[5].shift.in_features < 24

    def test_a_search_that_has_looked_is_not_pulled_from_under(self):
        model = make("plain")
        optimizer = sgd(model)
        search = eb.EarlyBird(**self.SETTINGS).attach(model, optimizer, **ADDING)
        train(model, optimizer, 2)
        with pytest.raises(InputError, match="the search has begun"):
            search.retrace()


def test_inference_in_fixed_point_costs_a_fraction_of_floats_and_more_than_whole_numbers():
    """The figures of docs/results.md: modelled energy of the operations of ResNet-20, by both tables."""
    model = build("resnet20", classes=10, in_channels=3, image_size=32)
    image = torch.zeros(1, 3, 32, 32)
    macs = count(model, image).total.macs
    running = ShiftAdd(fixed_point=8).attach(model, sgd(model), example_inputs=image)
    with torch.no_grad():
        model.eval()(image)
    spent = running.bill().total.operations
    saved = {}
    for table in (ASIC, FPGA):
        ours = joules(spent, 0, table).compute_joules
        floats = joules({"mult fp32": macs, "add fp32": macs}, 0, table).compute_joules
        whole = joules({"mult 8x8": macs, "add 8": macs}, 0, table).compute_joules
        saved[table] = (round(1 - ours / floats, 2), round(1 - whole / ours, 2))
    assert saved == {ASIC: (0.93, 0.29), FPGA: (0.98, 0.22)}
