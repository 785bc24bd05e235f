import shlex
import shutil

import pytest
import torch

import earlybird as eb
from earlybird.files import read_tensors
from earlybird.models.blueprint import Blueprint
from earlybird.sparse.blocks import find_blocks
from earlybird.sparse.masks import Masks
from earlybird.tickets.ticket import Ticket
from earlybird.train.recipe import Recipe
from tests.test_cli import complaint, run


@pytest.fixture(scope="module")
def lottery(tmp_path_factory):
    """A finished run of iterative pruning, made through the command line."""
    folder = tmp_path_factory.mktemp("runs") / "lottery"
    words = ["--data", "digits", "--model", "resnet14", "--width", "0.5", "--epochs", "1", "--exact", "--quiet"]
    words += [
        "--train-images",
        "640",
        "--method",
        "iterative",
        "--keep-weights",
        "0.5",
        "--prune-share",
        "0.3",
        "--rewind-to",
        "5it",
    ]
    assert run("train", *words, "--out", folder) == 0
    return folder


def blueprint_of(folder):
    return Blueprint.from_json(read_tensors(folder / "model.safetensors")[1]["blueprint"])


def test_show_prints_every_layer_and_where_the_ticket_came_from(lottery, capsys):
    assert run("ticket", "show", lottery) == 0
    said = capsys.readouterr().out
    ticket = Ticket.load(lottery / "ticket.safetensors")
    kept, total = ticket.widths["blocks.4.conv2"]
    line = next(line for line in said.splitlines() if line.startswith("blocks.4.conv2 "))
    assert line.split() == ["blocks.4.conv2", "weight", f"{kept:,}", f"{total:,}", f"{1 - kept / total:.1%}"]
    assert "method: iterative" in said
    assert "round: 2" in said
    assert run("ticket", "show", lottery, "--round", "1") == 0
    assert "round: 1" in capsys.readouterr().out


def test_distance_is_that_of_the_tickets(lottery, capsys):
    first, second = (lottery / "tickets" / f"round-{number}.safetensors" for number in (1, 2))
    assert run("ticket", "distance", first, second) == 0
    one, two = Ticket.load(first), Ticket.load(second)
    together, expected = capsys.readouterr().out.splitlines()[-2:]
    # what the second round keeps, the first one kept: the share of both in either is that of what was left
    assert together.split() == ["together", f"{one.distance(two):.4f}", f"{two.keep / one.keep:.4f}"]
    assert f"{one.keep * two.keep / (one.keep + two.keep - one.keep * two.keep):.4f}" in expected
    assert run("ticket", "distance", lottery, second) == 0
    assert capsys.readouterr().out.splitlines()[-2].split() == ["together", "0.0000", "1.0000"]
    assert run("ticket", "distance", lottery, lottery, "--round", "1") == 0
    assert capsys.readouterr().out.splitlines()[-2].split() == ["together", "0.0000", "1.0000"]


@pytest.mark.parametrize("criterion", ["remain", "magnitude", "saliency"])
def test_refill_writes_a_ticket_that_cuts_the_model(lottery, tmp_path, capsys, criterion):
    out = tmp_path / "refilled.safetensors"
    assert run("ticket", "refill", lottery, "--out", out, "--criterion", criterion, "--images", "32") == 0
    said = capsys.readouterr().out
    ticket = Ticket.load(out)
    assert ticket.provenance["criterion"] == criterion
    assert f"{ticket.provenance['weights_kept']:.2%} now" in said
    model = blueprint_of(lottery).build()
    change = eb.shrink(model, ticket, blueprint_of(lottery).example())
    assert change.parameters_after < change.parameters_before


def test_an_earlier_round_is_refilled_without_trained_weights_only(lottery, tmp_path, capsys):
    out = tmp_path / "refilled.safetensors"
    assert run("ticket", "refill", lottery, "--out", out, "--round", "1") == 2
    assert "--criterion remain" in complaint(capsys)
    assert not out.exists()
    assert run("ticket", "refill", lottery, "--out", out, "--round", "1", "--criterion", "remain") == 0
    assert Ticket.load(out).provenance["source"]["round"] == 1


def test_regroup_writes_blocks(lottery, tmp_path, capsys):
    out = tmp_path / "blocks.safetensors"
    assert run("ticket", "regroup", lottery, "--out", out, "--least-rows", "4", "--parts", "2") == 0
    ticket = Ticket.load(out)
    assert f"{sum(ticket.provenance['blocks'].values())} blocks" in capsys.readouterr().out
    assert len(find_blocks(ticket.masks["blocks.5.conv2"])) <= ticket.provenance["blocks"]["blocks.5.conv2"] == 2
    assert run("ticket", "regroup", lottery, "--out", out) == 0  # a ticket may be replaced


def test_stretch_writes_what_the_other_depth_starts_from(lottery, tmp_path, capsys):
    out = tmp_path / "elastic"
    assert run("ticket", "stretch", lottery, "--to", "resnet26", "--out", out, "--stretch", "append") == 0
    assert "--model resnet26 --method fixed_ticket" in capsys.readouterr().out
    ticket, (weights, _) = Ticket.load(out / "ticket.safetensors"), read_tensors(out / "rewind.safetensors")
    start = read_tensors(lottery / "rewind.safetensors")[0]
    assert torch.equal(weights["blocks.3.conv1.weight"], start["blocks.1.conv1.weight"])
    assert ticket.provenance["stretch"] == "append"
    blueprint = blueprint_of(lottery)
    model = Blueprint("resnet26", blueprint.classes, blueprint.in_channels, blueprint.image_size, 0.5).build()
    model.load_state_dict(weights)
    Masks(model, torch.optim.SGD(model.parameters(), lr=0.1), ticket)
    assert run("ticket", "stretch", lottery, "--to", "resnet26", "--out", out) == 2
    assert "choose another folder" in complaint(capsys)


@pytest.mark.parametrize(
    "words",
    [
        ["refill", "{run}", "--out", "{new}/a t", "--fill-back", "0.2"],
        ["regroup", "{run}", "--out", "{new}/a t", "--least-rows", "4"],
        ["stretch", "{run}", "--to", "resnet20", "--out", "{new}/elastic"],
    ],
    ids=lambda words: words[0],
)
def test_the_command_that_is_printed_trains_the_ticket(lottery, tmp_path, capsys, words):
    assert run("ticket", *(word.format(run=lottery, new=tmp_path) for word in words)) == 0
    command = shlex.split(capsys.readouterr().out.rsplit("next: earlybird ", 1)[1])
    assert run(*command, "--quiet", "--out", tmp_path / "run") == 0
    made = tmp_path / ("elastic/ticket.safetensors" if words[0] == "stretch" else "a t")
    assert Ticket.load(tmp_path / "run" / "ticket.safetensors") == Ticket.load(made)
    recipe, source = (Recipe.from_toml(folder / "recipe.toml") for folder in (tmp_path / "run", lottery))
    assert (recipe.lr, recipe.train_images, recipe.exact) == (source.lr, 640, True)
    assert str(recipe.start_at) == "5it"  # the run's rounds, too, go on from there


def test_the_printed_command_adds_the_rewinding_to_where_the_run_itself_began(lottery, tmp_path, capsys):
    begun = tmp_path / "begun"
    shutil.copytree(lottery, begun)
    recipe = Recipe.from_toml(begun / "recipe.toml").replace(start=str(lottery / "model.safetensors"), start_at="0.2ep")
    (begun / "recipe.toml").write_text(recipe.to_toml())
    assert run("ticket", "refill", begun, "--out", tmp_path / "refilled") == 0
    assert "--start-at 0.2ep5it" in capsys.readouterr().out


def test_a_finished_run_without_its_weights_says_how_to_get_them_again(lottery, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(lottery, bare)
    (bare / "model.safetensors").unlink()
    assert run("ticket", "refill", bare, "--out", tmp_path / "x") == 2
    assert "delete result.json" in complaint(capsys)
    (bare / "result.json").unlink()
    assert run("resume", bare, "--quiet") == 0
    assert Ticket.load(bare / "ticket.safetensors") == Ticket.load(lottery / "ticket.safetensors")
    assert (bare / "model.safetensors").read_bytes() == (lottery / "model.safetensors").read_bytes()


def test_channels_are_not_refilled(tmp_path, capsys):
    eb.Ticket({"conv": torch.tensor([True, False])}, {"conv": "channel"}).save(tmp_path / "ticket.safetensors")
    assert run("ticket", "refill", tmp_path, "--out", tmp_path / "new") == 2
    assert "over whole channels already" in complaint(capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "nowhere"], "no file nowhere"),
        (["show", "{run}", "--round", "7"], "a round from 1 to 2"),
        (["show", "{run}/ticket.safetensors", "--round", "1"], "the folder of a run"),
        (["shwo"], "Did you mean 'show'"),
        ([], "Missing command"),
        (["distance", "{run}", "{run}/model.safetensors"], "is not a ticket"),
        (["refill", "{run}", "--out", "{run}"], "is a folder"),
        (["refill", "{run}", "--out", "{run}/model.safetensors"], "exists and is no ticket"),
        (["refill", "{run}", "--out", "{run}/x", "--criterion", "luck"], "luck"),
        (["regroup", "{run}", "--out", "{run}/x", "--t1", "0"], "t1 is 0"),
        (["regroup", "{run}", "--out", "{run}/x", "--least-rows", "999"], "lower --parts or --least-rows"),
        (["stretch", "{run}", "--to", "resnet27", "--out", "{run}/x"], "unknown model 'resnet27'"),
        (["stretch", "{run}", "--to", "vgg11", "--out", "{run}/x"], "resnet14 becomes resnet20, resnet26"),
        (["stretch", "nowhere", "--to", "vgg11", "--out", "{run}/x"], "no file nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(lottery, capsys, words, said):
    assert run("ticket", *(word.format(run=lottery) for word in words)) == 2
    assert said in complaint(capsys)
    assert not (lottery / "x").exists()


def test_a_run_without_rewound_weights_cannot_be_stretched(lottery, tmp_path, capsys):
    for name in ("ticket.safetensors", "model.safetensors"):
        (tmp_path / name).write_bytes((lottery / name).read_bytes())
    assert run("ticket", "stretch", tmp_path, "--to", "resnet26", "--out", tmp_path / "x") == 2
    assert "--rewind weights" in complaint(capsys)
