import pytest
import tickets
import torch

from earlybird.files import write_tensors
from earlybird.models.blueprint import Blueprint
from earlybird.sparse.masks import check_fits, prunable, ticket_of
from earlybird.tickets.structure import regroup
from earlybird.train.recipe import Recipe


@pytest.fixture
def folders(tmp_path):
    """A dense run and one of a regrouped ticket."""
    blueprint = Blueprint("vgg11", 10, 3, 32, 0.25, (0.5,) * 3, (0.25,) * 3, ())
    model = blueprint.build(0)
    generator = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(w.shape, generator=generator) < 0.5 for n, w in prunable(model).items()}
    ticket = regroup(ticket_of(masks), parts=2, least_rows=4)
    for name in ("dense", "regroup-3"):
        if name != "dense":
            for layer, weight in check_fits(ticket, model).items():
                weight.data.mul_(ticket.masks[layer])
            ticket.save(tmp_path / name / "ticket.safetensors")
        write_tensors(tmp_path / name / "model.safetensors", model.state_dict(), {"blueprint": blueprint.to_json()})
        recipe = Recipe.from_values({"data": "cifar10", "model": "vgg11", "width": 0.25, "dense": name == "dense"})
        (tmp_path / name / "recipe.toml").write_text(recipe.to_toml())
    return tmp_path


def test_a_network_of_blocks_is_timed_beside_the_dense_one(folders):
    threads = torch.get_num_threads()
    try:
        found = tickets._inference(folders / "regroup-3", lambda who: folders / who)
    finally:
        torch.set_num_threads(threads)
    taken = found["inference_ms"]
    assert taken.keys() == {"dense", "own"}
    assert found["inference_saved"] == pytest.approx(1 - taken["own"] / taken["dense"], abs=0.01)


def row_of(who, seed=0, **more):
    run = tickets.TASKS["kd"].runs.get(who)
    return {"task": "kd", "who": who, "label": run.label if run else who, "seed": seed, "density": 1.0,
            "accuracy": 0.5, "device": "a machine", "date": "2026-12-01", **more}  # fmt: skip


def test_the_table_has_no_rows_of_runs_that_the_task_no_longer_has(monkeypatch):
    monkeypatch.setattr(tickets, "rows", lambda name: [row_of("dense"), row_of("dense", 1), row_of("gone")])
    shown = tickets.table()
    assert "50.00 ± 0.00 (2)" in shown
    assert "gone" not in shown


def test_a_seed_that_was_measured_elsewhere_is_not_run_again(monkeypatch):
    asked = []
    monkeypatch.setattr(tickets, "rows", lambda name: [row_of(who) for who in tickets.TASKS["kd"].runs])
    monkeypatch.setattr(tickets, "run_all", lambda children, stop, **_: asked.append(len(children)))
    tickets.main(["--tasks", "kd", "--seeds", "2"])
    assert asked == [len(tickets.TASKS["kd"].runs)]  # of the second seed alone
