"""Dynamic sparse training: as many weights at all times, exchanged as published, and charged for what they take."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, multiprocessing, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from earlybird import export, ranks
from earlybird.errors import InputError
from earlybird.files import read_tensors
from earlybird.forecast import forecast
from earlybird.sparse.budget import erk, uniform
from earlybird.sparse.dynamic import DynamicSparse, drop_and_grow, drop_fraction, worth
from earlybird.sparse.masks import prunable, random_mask
from earlybird.tickets.ticket import Ticket
from earlybird.train.recipe import Recipe
from earlybird.train.run import resume, train
from tests.processes import leave_group
from tests.tickets.topologies import images, make

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2),
}
QUICK = {"density": 0.2, "regrow_every": "2it", "regrow_until": "9it", "drop_share": 0.5}
KINDS = ({}, {"regrow": "set"}, {"regrow_step": "left_out"}, {"regrow": "set", "drop_by": "sign"})


def loss_of(model, step):
    return functional.cross_entropy(model(images(16, seed=step)), torch.arange(16) % 4)


def step_once(model, optimizer, step, accumulate=1):
    for batch in range(accumulate):
        (loss_of(model, 100 * batch + step) / accumulate).backward()
    optimizer.step()
    optimizer.zero_grad()


def start(topology="residual", optimizer="sgd", total_steps=12, **changes):
    model = make(topology)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    running = DynamicSparse(**{**QUICK, **changes}).attach(model, optimizer, total_steps=total_steps)
    return model, optimizer, running


# ---- by hand ----


def test_the_share_that_is_dropped_falls_as_a_cosine_to_zero():
    assert drop_fraction(0, 100, 0.3) == pytest.approx(0.3)
    assert drop_fraction(25, 100, 0.3) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))
    assert drop_fraction(50, 100, 0.3) == pytest.approx(0.15)
    assert drop_fraction(100, 100, 0.3) == drop_fraction(101, 100, 0.3) == 0
    assert [drop_fraction(step, 100, 0.3, decay="none") for step in (0, 50, 99, 100)] == [0.3, 0.3, 0.3, 0]


def test_the_smallest_weights_go_and_the_largest_gradients_of_the_others_come():
    weight = torch.tensor([[5.0, -0.1, 0.2], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [False, False, False]])
    gradient = torch.tensor([[9.0, 0.5, 8.0], [0.1, -0.7, 0.2]])
    assert drop_and_grow(weight, mask, gradient, 0).equal(mask)
    # -0.1 goes; the gradients 9 and 8 are of weights that stay, the next largest is -0.7
    assert drop_and_grow(weight, mask, gradient, 1).tolist() == [[True, False, True], [False, True, False]]
    # -0.1 and 0.2 go; 0.2 has the largest gradient of what is not active, and comes back
    assert drop_and_grow(weight, mask, gradient, 2).tolist() == [[True, False, True], [False, True, False]]
    assert drop_and_grow(weight, mask, gradient, 3).tolist() == [[True, False, True], [False, True, False]]


def test_ties_go_to_the_first_position():
    weight, gradient = torch.ones(6), torch.ones(6)
    mask = torch.tensor([True, True, True, False, False, False])
    assert drop_and_grow(weight, mask, gradient, 1).tolist() == [True, True, True, False, False, False]
    gradient[2] = 0  # the last of equal weights goes, and has the smallest gradient
    assert drop_and_grow(weight, mask, gradient, 1).tolist() == [True, True, False, True, False, False]


def test_by_sign_as_large_a_share_of_the_negative_weights_goes():
    weight = torch.tensor([1.0, 2, 3, 4, -10, -20, -30, -40, 0, 0])
    mask = torch.tensor([True] * 8 + [False] * 2)
    nowhere = torch.tensor([0.0] * 8 + [1.0] * 2)
    by_sign = drop_and_grow(weight, mask, nowhere, 2, by="sign")
    assert by_sign.tolist() == [False, True, True, True, False, True, True, True, True, True]
    by_size = drop_and_grow(weight, mask, nowhere, 2)
    assert by_size.tolist() == [False, False, True, True, True, True, True, True, True, True]
    assert worth(torch.tensor([3.0, 0.0, -1.0]), torch.tensor([True, True, True]), "sign").tolist() == [1.0, 0.0, 1.0]


def test_more_than_are_active_cannot_be_dropped():
    with pytest.raises(InputError, match="3 weights to drop; 0 to 2"):
        drop_and_grow(torch.ones(4), torch.tensor([True, True, False, False]), torch.ones(4), 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["magnitude", "sign"]))
def test_as_many_are_active_after_an_exchange_and_no_more_than_asked_for_are_others(seed, density, share, by):
    generator = torch.Generator().manual_seed(seed)
    shape = torch.Size((3, 4, 2, 3))
    active = round(density * 72)
    mask = random_mask(shape, active, generator)
    assert mask.sum() == active
    weight = torch.randn(shape, generator=generator).round(decimals=1) * mask  # with ties
    count = round(share * active)
    after = drop_and_grow(weight, mask, torch.randn(shape, generator=generator), count, by=by)
    assert after.sum() == active
    assert (mask & ~after).sum() == (after & ~mask).sum() <= count
    if by == "magnitude" and count and (mask & after).any() and (mask & ~after).any():
        ranked = weight[mask].abs().sort().values
        assert weight[mask & ~after].abs().max() <= ranked[count - 1]


# ---- while training ----


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_layer_has_as_many_weights_after_every_step_and_the_others_are_zero(kind, optimizer, accumulate):
    model, optimizer, running = start(optimizer=optimizer, **kind)
    weights = prunable(model)
    wanted = erk({name: weight.shape for name, weight in weights.items()}, 0.2)
    before = running.ticket.masks
    moved = []
    for step in range(12):
        step_once(model, optimizer, step, accumulate)
        masks = running.ticket.masks
        assert {name: int(mask.sum()) for name, mask in masks.items()} == wanted
        for name, mask in masks.items():
            assert not weights[name][~mask].any()
            state = [v for v in optimizer.state[weights[name]].values() if v.shape == weights[name].shape]
            assert all(not value[~mask].any() for value in state)
            grown = mask & ~before[name]
            assert not weights[name][grown].any()
            assert all(not value[grown].any() for value in state)
        moved.append(any(not mask.equal(before[name]) for name, mask in masks.items()))
        before = masks
    assert (
        [step for step, has in enumerate(moved, start=1) if has]
        == [2, 4, 6, 8]
        == [entry["step"] for entry in running.history]
    )


@pytest.mark.parametrize("accumulate", [1, 3])
def test_rigl_grows_where_the_whole_gradient_of_all_batches_of_the_step_is_largest(accumulate):
    model, optimizer, running = start()
    step_once(model, optimizer, 0)
    twin = copy.deepcopy(model)  # has no hooks of ours
    before = running.ticket.masks
    for batch in range(accumulate):
        (loss_of(twin, 100 * batch + 1) / accumulate).backward()
    step_once(model, optimizer, 1, accumulate)
    for name, weight in prunable(twin).items():
        count = round(drop_fraction(2, 9, 0.5) * int(before[name].sum()))
        assert running.ticket.masks[name].equal(drop_and_grow(weight, before[name], weight.grad, count)), name


def test_between_exchanges_gradients_are_masked():
    model, optimizer, running = start()
    for step in range(4):
        loss_of(model, step).backward()
        dense = any(weight.grad[~running.ticket.masks[name]].any() for name, weight in prunable(model).items())
        assert dense == (step % 2 == 1)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_as_published_nothing_is_trained_in_a_step_that_grows(kind):
    model, optimizer, running = start(optimizer=kind, regrow_step="left_out")
    step_once(model, optimizer, 0)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    step_once(model, optimizer, 1)
    masks = running.ticket.masks
    for (name, parameter), number in zip(model.named_parameters(), state):
        mask = masks.get(name.removesuffix(".weight"), torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, weights[name] * mask), name
        for key, value in optimizer.state[parameter].items():
            whole = value.shape == parameter.shape
            assert torch.equal(value, state[number][key] * mask if whole else state[number][key]), (name, key)
    step_once(model, optimizer, 2)
    assert any(not torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_by_default_the_weights_that_stay_are_trained_in_that_step_as_well():
    model, optimizer, running = start()
    step_once(model, optimizer, 0)
    before, old = copy.deepcopy(model.state_dict()), running.ticket.masks
    step_once(model, optimizer, 1)
    for name, mask in running.ticket.masks.items():
        stay = mask & old[name]
        assert (model.state_dict()[f"{name}.weight"][stay] != before[f"{name}.weight"][stay]).any()


def test_several_optimizers_share_one_clock():
    model = make("residual")
    parameters = list(model.parameters())
    optimizers = [OPTIMIZERS["sgd"](parameters[:5]), OPTIMIZERS["adamw"](parameters[5:])]
    running = DynamicSparse(**QUICK).attach(model, optimizers, total_steps=12)
    weights = prunable(model)
    for step in range(6):
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        for name, mask in running.ticket.masks.items():
            assert not weights[name][~mask].any()
            for optimizer in optimizers:
                state = [v for v in optimizer.state.get(weights[name], {}).values() if v.shape == mask.shape]
                assert all(not value[~mask].any() for value in state)
    assert [entry["step"] for entry in running.history] == [2, 4, 6]


def test_a_layer_without_gradients_keeps_its_weights():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    running = DynamicSparse(**QUICK, regrow="set").attach(model, optimizer, total_steps=12)
    model[1].weight.requires_grad_(False)
    before = running.ticket.masks
    for step in range(2):
        step_once(model, optimizer, step)
    after = running.ticket.masks
    assert after["1"].equal(before["1"])
    assert not after["2"].equal(before["2"])


def test_a_static_mask_never_moves_and_needs_no_length_of_the_run():
    model = make("plain")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    running = DynamicSparse(density=0.2, drop_share=0.0).attach(model, optimizer)
    before = running.ticket
    for step in range(4):
        step_once(model, optimizer, step)
    assert running.ticket == before
    assert running.history == []
    assert running.explored == pytest.approx(0.2, abs=0.01)


def test_exchanges_are_written_down():
    model, optimizer, running = start(regrow="set")
    seen = {name: mask.clone() for name, mask in running.ticket.masks.items()}
    for step in range(9):
        step_once(model, optimizer, step)
        for name, mask in running.ticket.masks.items():
            seen[name] |= mask
    total = sum(mask.numel() for mask in seen.values())
    assert running.explored == sum(int(mask.sum()) for mask in seen.values()) / total
    dropped = [entry["dropped"] for entry in running.history]
    assert dropped == pytest.approx([drop_fraction(step, 9, 0.5) for step in (2, 4, 6, 8)], abs=0.02)
    assert all(0 < entry["regrown"] <= entry["dropped"] for entry in running.history)
    churn, explored = running.traces()
    assert churn.series["regrown"] == [(entry["step"], entry["regrown"]) for entry in running.history]
    assert explored.series["all layers"][-1] == (8, running.explored)


# ---- how it begins ----


def test_uniform_leaves_the_first_layer_dense_and_erk_keeps_the_budget():
    model, _, running = start(sparse_budget="uniform")
    weights = prunable(model)
    names = list(weights)
    shapes = {name: weights[name].shape for name in names[1:]}
    assert {name: kept for name, (kept, _) in running.ticket.widths.items()} == uniform(shapes, 0.2)
    assert weights[names[0]].all()
    _, _, running = start(sparse_leave=("last", names[2]))
    assert set(running.ticket.masks) == set(names) - {names[2], names[-1]}
    kept, total = map(sum, zip(*running.ticket.widths.values()))
    assert kept == round(0.2 * total)


def test_first_weights_are_those_of_the_model_or_larger_by_the_root_of_the_density():
    plain = prunable(make("residual"))
    for rescale in (False, True):
        model, _, running = start(rescale_init=rescale)
        for name, weight in prunable(model).items():
            kept, total = running.ticket.widths[name]
            factor = math.sqrt(total / kept) if rescale else 1.0
            assert torch.equal(weight, plain[name] * factor * running.ticket.masks[name])


def test_masks_come_from_the_seed_alone_and_leave_the_global_generator_alone():
    def masks(seed, outer):
        model = make("plain")
        torch.manual_seed(outer)
        running = DynamicSparse(**QUICK).attach(model, OPTIMIZERS["sgd"](model.parameters()), total_steps=12, seed=seed)
        following = torch.rand(1)
        torch.manual_seed(outer)
        assert torch.equal(following, torch.rand(1))
        return running.ticket

    assert masks(1, 0) == masks(1, 7)
    assert masks(1, 0) != masks(2, 0)


# ---- what it costs ----


def test_the_bill_is_the_published_count_of_operations():
    """Evci et al., appendix: (3 f_S dT + 2 f_S + f_D) / (dT + 1) a sample, with ``dT`` steps between two that grow."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False))
    dense = 192 * 32 + 32 * 8
    for kind, growing in (("rigl", dense), ("set", None)):
        net = copy.deepcopy(model)
        optimizer = OPTIMIZERS["sgd"](net.parameters())
        method = DynamicSparse(density=0.2, regrow=kind, regrow_every="5it", regrow_until="100%")
        running = method.attach(net, optimizer, total_steps=20)
        sparse, first = sum(kept for kept, _ in running.ticket.widths.values()), running.ticket.widths["1"][0]
        for step in range(10):
            step_once(net, optimizer, step)
        between = 4
        a_sample = (3 * sparse * between + 2 * sparse + (growing or sparse)) / (between + 1)
        a_sample -= first  # nobody needs the gradient of the images
        total = running.bill().total
        assert total.bit_macs.value == pytest.approx(10 * 16 * a_sample)
        assert total.macs.value == 10 * 16 * (3 * dense - 192 * 32)
        assert len(running.history) == 2


def test_dense_in_the_bill_is_dense_though_the_model_never_was():
    model, optimizer, running = start()
    for step in range(3):
        step_once(model, optimizer, step)
    bill = running.bill()
    assert bill.dense.total.bit_macs.value == bill.dense.total.macs.value == bill.total.macs.value
    assert bill.total.bit_macs.value < 0.5 * bill.dense.total.bit_macs.value


def test_after_detach_nothing_is_held_and_nothing_said():
    model, optimizer, running = start()
    step_once(model, optimizer, 0)
    running.detach()
    step_once(model, optimizer, 1)
    step_once(model, optimizer, 2)
    for name, weight in prunable(model).items():
        assert weight.count_nonzero() > 0.5 * weight.numel(), name
        assert not {"weight_density", "gradient_density"} & model.get_submodule(name).__dict__.keys()
    assert len(running.history) == 0


# ---- refused ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"density": 0}, "density"),
        ({"drop_share": 1.0}, "drop_share"),
        ({"regrow": "snfs"}, "regrow"),
        ({"drop_by": "age"}, "drop_by"),
        ({"regrow_decay": "linear"}, "regrow_decay"),
        ({"regrow_step": "skipped"}, "regrow_step"),
        ({"regrow_every": "100"}, "no unit"),
        ({"sparse_budget": "network"}, "sparse_budget"),
        ({"rescale_init": 1}, "rescale_init"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        DynamicSparse(**values)


def test_a_run_in_which_nothing_would_regrow_is_refused():
    for changes in ({"regrow_every": "9it"}, {"regrow_every": "0it"}):
        with pytest.raises(InputError, match=r"nothing would ever regrow.*drop_share = 0"):
            start(**changes)
    with pytest.raises(InputError, match="pass total_steps"):
        start(regrow_until="75%", total_steps=None)
    with pytest.raises(InputError, match="no layer is left to be sparse"):
        start(sparse_leave=tuple(prunable(make("residual"))))
    _, _, one = start("residual")
    _, _, other = start("plain")
    with pytest.raises(InputError, match="of another model"):
        one.load_state_dict(other.state_dict())


# ---- end to end ----

RECIPE = {
    "data": "digits", "model": "small_cnn", "width": 0.25, "method": "dynamic_sparse", "density": 0.1, "epochs": 4,
    "train_images": 1024, "batch_size": 32, "regrow_every": "10it", "exact": True, "threads": 1,
}  # fmt: skip


def ticket_size(ticket):
    return sum(total for _, total in ticket.widths.values())


@pytest.mark.parametrize("regrow", ["rigl", "set"])
def test_a_sparse_run_end_to_end(tmp_path, regrow):
    recipe = Recipe.from_values({**RECIPE, "regrow": regrow})
    result = train(recipe, tmp_path / "run", quiet=True)
    assert result.accuracy > 0.9
    ticket = Ticket.load(tmp_path / "run" / "ticket.safetensors")
    assert ticket.keep == pytest.approx(0.1, abs=0.001)
    assert ticket.provenance["exchanges"] == 9  # of 128 steps, until 96
    final, _ = read_tensors(tmp_path / "run" / "model.safetensors")
    for name, mask in ticket.masks.items():
        assert not final[f"{name}.weight"][~mask].any()
    exported = prunable(export.load(tmp_path / "run"))
    assert all((exported[name] != 0).equal(mask & (exported[name] != 0)) for name, mask in ticket.masks.items())
    assert sum(int(weight.count_nonzero()) for weight in exported.values()) > 0.9 * 0.1 * ticket_size(ticket)
    churn, explored = json.loads((tmp_path / "run" / "traces.json").read_text())["dynamic_sparse"]
    assert len(churn["series"]["regrown"]) == 9
    assert explored["series"]["all layers"][-1][1] > 0.15
    paper = forecast(recipe).bill.total
    assert paper.bit_macs.value == pytest.approx(result.bill.total.bit_macs.value, rel=0.001)
    assert paper.macs.value == pytest.approx(result.bill.total.macs.value, rel=0.001)


@pytest.mark.parametrize("regrow", ["rigl", "set"])
def test_stopped_and_resumed_the_files_are_the_same(tmp_path, regrow):
    class Stop(Exception):
        pass

    def stop(kind, fields):
        if kind == "checkpoint" and fields["step"] >= 39:  # the next step exchanges
            raise Stop

    values = {**RECIPE, "epochs": 2, "regrow": regrow, "checkpoint_every": "39it", "ema": 0.9}
    recipe = Recipe.from_values(values)
    train(recipe, tmp_path / "whole", quiet=True)
    with pytest.raises(Stop):
        train(recipe, tmp_path / "stopped", quiet=True, on_event=stop)
    resume(tmp_path / "stopped", quiet=True)
    for name in ("model.safetensors", "ticket.safetensors", "traces.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    bills = [json.loads((tmp_path / name / "bill.json").read_text()) for name in ("whole", "stopped")]
    spent = [bill["phases"]["train"]["bit_macs"]["value"] for bill in bills]
    assert spent[0] == pytest.approx(spent[1], rel=1e-9)


def test_presets_are_as_published():
    rigl = Recipe.from_values({"method": "dynamic_sparse", "preset": "published"}).build_methods()["dynamic_sparse"]
    assert (rigl.regrow, rigl.regrow_step, rigl.drop_share) == ("rigl", "left_out", 0.3)
    assert (str(rigl.regrow_every), str(rigl.regrow_until)) == ("100it", "75%")
    evolved = Recipe.from_values({"method": "dynamic_sparse", "preset": "set"}).build_methods()["dynamic_sparse"]
    assert evolved == DynamicSparse(**DynamicSparse.PRESETS["set"])
    model = make("plain")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    running = evolved.attach(model, optimizer, total_steps=9, steps_per_epoch=3)
    for step in range(9):
        step_once(model, optimizer, step)
    assert [entry["step"] for entry in running.history] == [3, 6]  # not after the last epoch
    assert [entry["dropped"] for entry in running.history] == pytest.approx([0.3, 0.3], abs=0.02)


# ---- several processes ----


def grow(rank, kind):
    model = make("residual")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    running = DynamicSparse(**{**QUICK, **kind}).attach(model, optimizer, total_steps=12)
    wrapped = DistributedDataParallel(model)
    twin, before = None, {}
    for step in range(10):
        if step == 3:
            twin, before = copy.deepcopy(model), running.ticket.masks
        loss_of(wrapped, 2 * step + rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3 and running.settings.regrow == "rigl":
            # where the mean of both ranks' gradients is largest
            for other in range(2):
                (loss_of(twin, 2 * step + other) / 2).backward()
            same = total = 0
            for name, weight in prunable(twin).items():
                count = round(drop_fraction(4, 9, 0.5) * int(before[name].sum()))
                expected = drop_and_grow(weight, before[name], weight.grad, count)
                same += int((expected == running.ticket.masks[name]).sum())
                total += expected.numel()
            assert same / total > 0.999  # a sum in another order
    masks = torch.cat([mask.flatten() for mask in running.ticket.masks.values()]).to(torch.uint8)
    ours = torch.cat([*(p.detach().flatten() for p in model.parameters()), masks])
    both = [torch.empty_like(ours) for _ in range(2)]
    distributed.all_gather(both, ours)
    assert torch.equal(*both), kind


def work(rank, rendezvous):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for kind in KINDS:
        grow(rank, kind)
    own = {"a": torch.tensor([[True, False], [False, rank == 1]]), "b": torch.tensor([rank == 0])}
    first = ranks.of_the_first(own)
    assert (first["a"].tolist(), first["b"].tolist()) == ([[True, False], [False, False]], [True])
    model = make("residual")
    with pytest.raises(InputError, match="rank 0 has seed = 0, rank 1 has seed = 1"):
        DynamicSparse(**QUICK).attach(model, OPTIMIZERS["sgd"](model.parameters()), total_steps=12, seed=rank)
    leave_group()


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_grow_the_same_weights(tmp_path):
    multiprocessing.spawn(work, (str(tmp_path / "rendezvous"),), nprocs=2)
