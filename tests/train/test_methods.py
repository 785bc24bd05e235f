"""Every method by its name on real data, in the shipped loop: runs, resumes to the bit, reports, exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from earlybird import export
from earlybird.forecast import forecast
from earlybird.methods import METHODS
from earlybird.models import build
from earlybird.report import write
from earlybird.sparse.masks import prunable, ticket_of
from earlybird.tickets.ticket import Ticket
from earlybird.train.recipe import Recipe
from earlybird.train.run import resume, train
from tests.tasks.folders import write_masks
from tests.tickets.teachers import write_teacher

# what a run of a few seconds needs to see the method act
SETTINGS: dict[str, dict[str, Any]] = {
    "early_bird": {"look_every": "4it", "skip": "4it", "deadline": "12it"},
    "early_bert": {"model": "tests.train.nets:patches", "draw_at": "12it", "unit_look_every": "4it"},
    "iterative": {"keep_weights": 0.5, "prune_share": 0.5, "rewind_to": "4it"},
    "at_init": {},
    "fixed_ticket": {},
    "dynamic_sparse": {"density": 0.3, "regrow_every": "8it"},
    "progressive_resizing": {"size_step": 1},
    "batch_dropping": {},
    "layer_skipping": {"layer_share": 0.7},
    "stochastic_depth": {"depth_share": 0.7},
    "progressive_precision": {"forward_ladder": "4,8", "rungs_at": "50%"},
    "fractional_precision": {"fractional_target": "0.03,0.04", "fractional_at": "50%"},
    "predictive_sign": {},
    "block_float": {},
    "shift_add": {},
    "simclr": {"simclr_neighbours": 20},
    "moco": {"moco_neighbours": 20, "moco_queue": 256},
    "distillation": {"teacher_views": 0},
    "segmentation": {"image_size": 16},
    "detection": {"data": "digits:boxes", "image_size": 16},
}
OF_THEIR_OWN = (
    "simclr",
    "moco",
    "segmentation",
    "detection",
)  # what is learnt is not what a dense run learns


@pytest.fixture(autouse=True, scope="module")
def _a_teacher(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, _ = write_teacher(tmp_path_factory.mktemp("teacher"), classes=10, in_channels=1)
    SETTINGS["distillation"]["teacher"] = str(folder)


@pytest.fixture(autouse=True, scope="module")
def _a_ticket(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = build("resnet20", classes=10, in_channels=1, image_size=8, width=0.25)
    masks = {name: weight.abs() > weight.abs().median() for name, weight in prunable(model).items()}
    SETTINGS["fixed_ticket"]["ticket"] = str(ticket_of(masks).save(tmp_path_factory.mktemp("ticket") / "half"))


@pytest.fixture(autouse=True, scope="module")
def _masks(tmp_path_factory: pytest.TempPathFactory) -> None:
    SETTINGS["segmentation"]["data"] = str(write_masks(tmp_path_factory.mktemp("lines"), count=250))


def recipe(*methods: str, **more: Any) -> Recipe:
    own = {key: value for name in methods for key, value in SETTINGS[name].items()}
    base = {"data": "digits", "model": "resnet20", "width": 0.25, "epochs": 2, "batch_size": 64, "lr": 0.02}
    if "model" in own:  # one's own, which has no factor on its width
        del base["width"]
    return Recipe.from_values({**base, "exact": True, "method": ",".join(methods), **own, **more})


class Cut(Exception):
    """Stands for a kill."""


def cut_at(step: int) -> Any:
    def on_event(kind: str, fields: Any) -> None:
        if kind == "step" and fields["step"] == step:
            raise Cut

    return on_event


def test_every_method_is_here() -> None:
    assert set(SETTINGS) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_by_its_name(name: str, tmp_path: Path) -> None:
    epochs = 2 if name in ("batch_dropping", "segmentation") else 1  # those have fewer steps in one
    short = recipe(name, checkpoint_every="10it", epochs=epochs)
    whole = train(short, tmp_path / "whole", quiet=True)
    with pytest.raises(Cut):
        train(short, tmp_path / "cut", quiet=True, on_event=cut_at(14))
    again = resume(tmp_path / "cut", quiet=True)
    assert again.resumed
    one, two = (tmp_path / folder / "model.safetensors" for folder in ("whole", "cut"))
    assert one.read_bytes() == two.read_bytes()
    assert again.accuracy == whole.accuracy
    for counted in ("macs", "bit_macs"):
        spent = [getattr(result.bill.total, counted).value for result in (whole, again)]
        assert spent[0] == pytest.approx(spent[1])
    assert (whole.bill.dense is None) == (name in OF_THEIR_OWN)
    html = write([tmp_path / "whole"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The bill" in html
    assert (f"a {whole.judged_by} probe" in html) == (name in ("simclr", "moco"))
    assert "on paper" in str(forecast(recipe(name)))


@pytest.mark.parametrize("name", METHODS)
def test_the_trained_network_is_taken_out_of_the_run(name: str, tmp_path: Path) -> None:
    train(recipe(name, epochs=1), tmp_path / "run", quiet=True)
    network = export.load(tmp_path / "run")
    export.export_weights(tmp_path / "run", tmp_path / "out.safetensors")
    again = export.load(tmp_path / "out.safetensors", model=SETTINGS[name].get("model"))
    channels = 3 if name == "segmentation" else 1
    images = torch.rand(4, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network(images), again(images))
    assert all(sentence.endswith(".") for sentence in export.caveats(tmp_path / "run"))


def test_a_ticket_in_stages(tmp_path: Path) -> None:
    staged = recipe("early_bird", stages=[0.8], tolerance=0.0, deadline="16it", checkpoint_every="2it", epochs=1)
    told: list[tuple[int, str]] = []

    def on_event(kind: str, fields: Any) -> None:
        if kind == "drawn":
            told.append((fields["step"], fields.get("ticket", "")))

    whole = train(staged, tmp_path / "whole", quiet=True, on_event=on_event)
    assert told == [(10, ""), (16, "drawn at step 16")]
    assert whole.drawn_at == 16
    assert whole.bill.phases["search"].steps.value == 16
    with pytest.raises(Cut):
        train(staged, tmp_path / "cut", quiet=True, on_event=cut_at(13))
    between = Ticket.load(tmp_path / "cut" / "ticket.safetensors")
    assert between.provenance["keep"] == 0.8
    again = resume(tmp_path / "cut", quiet=True)
    assert again.resumed
    for file in ("model.safetensors", "history.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file
    tickets = [Ticket.load(tmp_path / name / "ticket.safetensors") for name in ("whole", "cut")]
    assert tickets[0] == tickets[1]
    assert tickets[0].provenance == tickets[1].provenance
    changes = [json.loads((tmp_path / name / "change.json").read_text()) for name in ("whole", "cut")]
    assert [{**change, "seconds": 0} for change in changes[:1]] == [{**change, "seconds": 0} for change in changes[1:]]
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network = export.load(tmp_path / "whole")
    assert sum(parameter.numel() for parameter in network.parameters()) == whole.parameters
    assert torch.isfinite(network(images)).all()
    html = write([tmp_path / "whole"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "drawn at step 16 by the deadline" in html


def test_a_run_that_ends_between_stages_says_so_and_is_exported_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    staged = recipe("early_bird", stages=[0.8], tolerance=1.0, deadline="none", look_every="6it", epochs=1)
    result = train(staged, tmp_path / "run", quiet=True)
    assert result.drawn_at == 18
    assert "ended before its last cut; what is left is that of step 18" in capsys.readouterr().err
    parameters = sum(parameter.numel() for parameter in export.load(tmp_path / "run").parameters())
    assert parameters == result.parameters


@pytest.mark.parametrize(
    "names",
    [
        ("early_bird", "batch_dropping", "progressive_precision"),
        ("layer_skipping", "shift_add", "early_bird"),
        ("stochastic_depth", "block_float", "early_bird", "progressive_resizing"),
    ],
    ids="-".join,
)
def test_several_compose_in_any_order(names: tuple[str, ...], tmp_path: Path) -> None:
    ends = []
    for order in (names, tuple(reversed(names))):
        out = tmp_path / "-".join(order)
        result = train(
            recipe(*order, size_step=1) if "progressive_resizing" in order else recipe(*order), out, quiet=True
        )
        assert result.drawn_at == 12
        ends.append((out / "model.safetensors").read_bytes())
        told = json.loads((out / "traces.json").read_text()) if (out / "traces.json").exists() else {}
        assert set(told) <= set(order)
    assert ends[0] == ends[1]
