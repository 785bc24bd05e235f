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


def test_networks_of_blocks_are_timed_beside_the_masked_and_the_dense_one(folders):
    threads = torch.get_num_threads()
    try:
        found = tickets._inference(folders / "regroup-3", lambda who: folders / who)
    finally:
        torch.set_num_threads(threads)
    taken = found["inference_ms"]
    assert taken.keys() == {"dense", "own", "blocks"}
    assert found["inference_saved"] == pytest.approx(1 - taken["blocks"] / taken["dense"], abs=0.01)
