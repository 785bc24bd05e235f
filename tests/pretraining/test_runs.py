"""SimCLR and MoCo at work: attached, under masks, in the shipped loop, in two processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from earlybird.data import Loader, load
from earlybird.errors import InputError
from earlybird.export import load as load_network
from earlybird.models import build
from earlybird.pretraining.encoder import find_head
from earlybird.pretraining.moco import MoCo, MomentumContrast
from earlybird.pretraining.probe import knn_accuracy
from earlybird.pretraining.simclr import Contrasting, SimClr
from earlybird.sparse.masks import Masks, prunable, ticket_of
from earlybird.tickets.at_init import AtInit
from earlybird.tickets.ticket import Ticket
from earlybird.train.recipe import Recipe
from earlybird.train.run import train


def images(count: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build("resnet20", classes=5, in_channels=3, image_size=8, width=0.5, seed=1)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def moco(**settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, MomentumContrast]:
    model, optimizer = network()
    method = MoCo(**{"moco_queue": 16, "moco_width": 8, "moco_momentum": 0.5, **settings})
    return model, optimizer, method.attach(model, optimizer, example_inputs=images(2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, running: Any, seed: int = 0) -> None:
    running.loss(model, images(seed=seed)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("method", [SimClr(), MoCo(moco_queue=16)])
def test_the_encoder_and_its_projector_learn_and_the_head_stays_as_it_was_drawn(method: Any) -> None:
    model, optimizer = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    running = method.attach(model, optimizer, example_inputs=images(2))
    projected = [parameter.clone() for parameter in running.encoder.projector.parameters()]
    for seed in range(2):
        step(model, optimizer, running, seed)
    for name, tensor in model.state_dict().items():
        if name.startswith("classifier"):
            assert torch.equal(tensor, before[name])
        elif "num_batches" not in name:
            assert not torch.equal(tensor, before[name]), name
    assert all(not torch.equal(now, then) for now, then in zip(running.encoder.projector.parameters(), projected))
    running.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(list(model.parameters()))
    assert set(optimizer.state) <= set(model.parameters())
    assert not any("key" in state for state in optimizer.state.values())


def test_features_are_what_the_head_reads() -> None:
    model, optimizer = network()
    running = SimClr().attach(model, optimizer, example_inputs=images(2))
    model.eval()
    with torch.no_grad():
        features = running.encoder.features(model, images())
        assert torch.equal(running.encoder.head(features), model(images()))
    assert features.shape == (8, 32)


def test_keys_are_a_moving_average_of_the_queries_and_are_computed_by_it() -> None:
    model, optimizer, running = moco()
    step(model, optimizer, running)
    kept = [(parameter, parameter.detach().clone()) for parameter, _ in running.keys()]
    assert all(torch.equal(key, parameter) for parameter, key in running.keys())
    step(model, optimizer, running, 1)
    for (parameter, key), (_, before) in zip(running.keys(), kept, strict=True):
        assert torch.allclose(key, 0.5 * before + 0.5 * parameter, atol=1e-7)
    reference, _ = network()
    reference.train()
    weights = dict(model.state_dict())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights.update({names[id(p)]: key for p, key in running.keys() if id(p) in names})
    reference.load_state_dict(weights)
    head = find_head(reference, images(2))
    seen: list[Tensor] = []
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    reference(images(seed=2)[4:])
    projector = {id(p): key for p, key in running.keys()}
    parameters = [projector[id(p)] for p in running.encoder.projector.parameters()]
    hidden = torch.relu(seen[0] @ parameters[0].T + parameters[1])
    expected = nn.functional.normalize(hidden @ parameters[2].T + parameters[3], dim=1)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    running.loss(model, images(seed=2))
    assert torch.allclose(running.queue[8:12], expected, atol=1e-6)  # two batches of four came before
    moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
    assert len(moved) == len(buffers)
    assert all(int(b) == 3 for n, b in model.named_buffers() if "num_batches" in n)  # of the queries alone


def test_the_queue_goes_round_and_takes_the_newest_of_a_batch_that_is_larger() -> None:
    _, _, running = moco(moco_queue=6)
    rows = torch.arange(10.0)[:, None].expand(10, 8)
    running._enqueue(rows[:4])
    running._enqueue(rows[4:8])
    assert running.queue[:, 0].tolist() == [6, 7, 2, 3, 4, 5]
    running._enqueue(rows)
    assert sorted(running.queue[:, 0].tolist()) == [4, 5, 6, 7, 8, 9]


def test_a_rewound_round_begins_with_a_queue_of_its_own() -> None:
    model, optimizer, running = moco()
    drawn = running.queue
    step(model, optimizer, running)
    step(model, optimizer, running, 1)
    assert not torch.equal(running.queue[4:8], drawn[4:8])
    optimizer.state.clear()  # as iterative pruning does between rounds
    step(model, optimizer, running, 2)
    assert torch.equal(running.queue[4:], drawn[4:])
    assert not torch.equal(running.queue[:4], drawn[:4])


def test_under_a_mask_the_keys_removed_weights_are_zero_too() -> None:
    model, optimizer, running = moco()
    step(model, optimizer, running)
    weights = prunable(model, leave=("last",))
    ticket = ticket_of({name: torch.rand_like(weight) > 0.6 for name, weight in weights.items()})
    Masks(model, optimizer, ticket)
    for seed in range(3):
        step(model, optimizer, running, seed)
    keys = {id(parameter): key for parameter, key in running.keys()}
    for name, weight in weights.items():
        removed = ~ticket.masks[name]
        assert removed.any()
        assert not weight[removed].any()
        assert not keys[id(weight)][removed].any()
        assert keys[id(weight)][~removed].all()


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "Conv2d"),
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)), "ends in Linear|vector of features"),
    ],
)
def test_a_model_that_does_not_end_in_a_linear_layer_on_features_is_refused(model: nn.Module, found: str) -> None:
    with pytest.raises(InputError, match=found):
        SimClr().attach(model, torch.optim.SGD(model.parameters(), lr=0.1), example_inputs=images(2))


@pytest.mark.parametrize(
    "wrong", [{"simclr_temperature": 0.0}, {"simclr_crop": 0.0}, {"simclr_width": 0}, {"simclr_colour": 9.0}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        SimClr(**wrong)
    with pytest.raises(InputError):
        MoCo(**{name.replace("simclr", "moco"): value for name, value in wrong.items()})


def test_the_loader_goes_back_to_one_view_and_no_loader_means_no_judgement() -> None:
    data = load("digits")
    loader = Loader(data.train_images, data.train_labels, batch_size=32, mean=data.mean, std=data.std)
    model = build("small_cnn", classes=10, in_channels=1, image_size=8, width=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    running = SimClr().attach(model, optimizer, example_inputs=loader.sample(2, 0), loader=loader)
    views, labels = next(loader.epoch(0))
    assert (len(views), len(labels)) == (64, 32)
    running.detach()
    assert len(next(loader.epoch(0))[0]) == 32
    alone = SimClr().attach(model, optimizer, example_inputs=loader.sample(2, 0))
    assert isinstance(alone, Contrasting)
    with pytest.raises(InputError, match="no training images"):
        alone.judge([])


# ---- in the shipped loop ----

RUN = {"data": "digits", "model": "small_cnn", "width": 0.25, "epochs": 2, "batch_size": 64, "exact": True}


@pytest.mark.parametrize("name", ["simclr", "moco"])
def test_a_run_writes_an_encoder_with_a_fresh_head_that_other_runs_can_load(name: str, tmp_path: Path) -> None:
    result = train(Recipe.from_values({**RUN, "method": name}), tmp_path, quiet=True)
    assert result.judged_by == "200-NN"
    model = build("small_cnn", classes=10, in_channels=1, image_size=8, width=0.25)
    weights = load_file(tmp_path / "model.safetensors")
    fresh = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert model.load_state_dict(weights)
    same = [key for key, tensor in weights.items() if torch.equal(tensor, fresh[key])]
    assert {key for key in same if "num_batches" not in key} == {key for key in fresh if key.startswith("classifier")}
    assert load_network(tmp_path)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("order", ["iterative,moco", "moco,iterative"])
def test_a_ticket_of_a_pretraining_task_leaves_the_head_out(order: str, tmp_path: Path) -> None:
    more = {"keep_weights": 0.4, "prune_share": 0.4, "rewind_to": "3it", "moco_queue": 128, "epochs": 1}
    result = train(Recipe.from_values({**RUN, "method": order, **more}), tmp_path, quiet=True)
    ticket = Ticket.load(tmp_path / "ticket.safetensors")
    weights = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("classifier") for name in ticket.masks)
    assert ticket.keep == pytest.approx(0.4, abs=0.02)
    for name, mask in ticket.masks.items():
        assert not weights[f"{name}.weight"][~mask].any()
    assert result.accuracy > 0.2


@pytest.mark.skipif("EARLYBIRD_DATA" not in os.environ, reason="CIFAR-10 is not here")
def test_on_a_few_hundred_images_the_features_become_better_than_random_ones(tmp_path: Path) -> None:
    recipe = Recipe.from_values(
        {
            "data": "cifar10", "model": "small_cnn", "width": 0.25, "train_images": 500, "epochs": 15, "batch_size": 50,
            "lr": 0.1, "method": "simclr", "exact": True, "evaluate_every": "100%",
        }
    )  # fmt: skip
    train(recipe, tmp_path, quiet=True)
    data = load("cifar10").with_training_images(500)
    test, truth = data.test_images[:1000], data.test_labels[:1000]
    shown = [
        torch.cat([x for x, _ in Loader(part, labels, batch_size=500, mean=data.mean, std=data.std, shuffle=False)])
        for part, labels in ((data.train_images, data.train_labels), (test, truth))
    ]

    def accuracy(model: nn.Module) -> float:
        model.eval()
        head, seen = find_head(model, shown[0][:2]), []
        head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            for part in shown:
                model(part)
        return knn_accuracy(seen[0], data.train_labels, seen[1], truth, k=50)

    random = build("small_cnn", classes=10, width=0.25, seed=0)
    untouched = accuracy(random)
    with torch.no_grad():
        for _ in range(40):
            random.train()(shown[0])  # batch norms that know the data
    assert accuracy(load_network(tmp_path)) > max(untouched, accuracy(random)) + 0.02


def test_dense_in_the_bill_has_all_weights_though_they_were_masked_before_the_head_was_frozen() -> None:
    model, optimizer = network()
    AtInit(init_score="random", init_units="weight", init_keep=0.2).attach(model, optimizer)
    running = SimClr().attach(model, optimizer, example_inputs=images(2))
    step(model, optimizer, running)
    dense = running.bill().dense.total
    assert dense.bit_macs.value == dense.macs.value
