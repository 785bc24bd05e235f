"""Does a ticket win: criteria and correlation by hand, and a verification of a small run from end to end."""

import json
import math
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlybird.cli import main
from earlybird.errors import InputError, Interrupted
from earlybird.files import read_tensors, write_tensors
from earlybird.report import write
from earlybird.report.page import compose
from earlybird.report.read import read, read_verifications
from earlybird.step import Step
from earlybird.tickets.iterative import prune
from earlybird.tickets.ticket import Ticket
from earlybird.tickets.verify import correlation, gap, judge_ticket
from earlybird.train import children
from earlybird.train.recipe import Recipe
from earlybird.train.run import train
from earlybird.train.verification import describe, read_source, verify

TASK = {
    "data": "digits", "model": "tests.train.nets:with_dropout", "epochs": 1, "batch_size": 128, "train_images": 512,
    "exact": True, "crop": 1, "lr": 0.1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_process(monkeypatch):
    """Run contenders in this process, which is faster, and note their order."""
    order = []

    def run(recipe, path, stop, **_):
        order.append(path.name)
        train(recipe, path, quiet=True)

    monkeypatch.setattr(children, "run_one", run)
    return order


@pytest.fixture(scope="module")
def imp(tmp_path_factory):
    """A run of two rounds that rewinds to the first step; its seed is not one of those that verify it."""
    path = tmp_path_factory.mktemp("runs") / "imp"
    recipe = {**TASK, "seed": 7, "method": ("iterative",), "keep_weights": 0.25, "prune_share": 0.5}
    train(Recipe.from_values(recipe), path, quiet=True)
    return path


def rows(lr=0.1, **accuracies):
    """Runs of roles at percents, a seed each."""
    return [
        {"role": role.replace("_", "-"), "lr": lr, "seed": seed, "accuracy": percent / 100}
        for role, percents in accuracies.items()
        for seed, percent in enumerate(percents)
    ]


RUNS = {
    "dense": (92.0, 92.2, 92.4),
    "ticket": (92.1, 92.2, 92.3),
    "reinitialised": (90.0, 90.3, 90.6),
    "retrained": (92.4, 92.4, 92.4),
}


@pytest.mark.parametrize(
    ("changes", "kind", "holds"),
    [
        ({}, "jackpot", [True, True, True]),
        ({"dense": (92.6, 92.8, 93.0)}, "secondary prize", [False, True, True]),
        ({"dense": (92.5, 92.7, 92.9)}, "jackpot", [True, True, True]),  # at the tolerance
        ({"retrained": (93.0, 93.0, 93.0)}, "none", [True, True, False]),
        ({"reinitialised": (92.0, 92.1, 92.2)}, "none", [True, False, True]),  # a gap of 0.1 at a spread of 0.1
        ({"reinitialised": (91.9, 92.0, 92.1)}, "jackpot", [True, True, True]),  # of 0.2
        ({"reinitialised": (91.0, 91.9, 92.8)}, "none", [True, False, True]),  # of 0.3, at 0.9
        ({"reinitialised": ()}, "undecided", [True, None, True]),
        ({"retrained": (), "dense": ()}, "undecided", [None, True, None]),
        ({"retrained": (95.0,), "dense": ()}, "none", [None, True, False]),  # whatever dense will be
    ],
)
def test_the_criteria_decide_what_a_ticket_wins(changes, kind, holds):
    verdict = judge_ticket(rows(**{**RUNS, **changes}))
    assert [criterion.holds for criterion in verdict.criteria] == holds
    assert verdict.kind == kind


def test_a_criterion_says_its_numbers():
    verdict = judge_ticket(rows(**RUNS))
    found = verdict.gaps["reinitialised"]
    assert (found.points, found.std, found.seeds) == (pytest.approx(1.9), pytest.approx(0.2), 3)
    assert found.error == pytest.approx(0.2 / math.sqrt(3))
    assert verdict.criteria[1].reason == "+1.90 +- 0.12 points; spread over seeds 0.30"
    assert verdict.criteria[0].reason == "+0.00 +- 0.06 points against dense; tolerance 0.5"
    assert str(verdict) == "a jackpot ticket"
    assert judge_ticket(rows(**RUNS), tolerance=0.1).kind == "none"  # 0.2 below what is retrained


def test_dense_is_the_best_of_all_learning_rates():
    """A ticket that only matches dense where the learning rate leaves that behind has not won."""
    small = rows(lr=0.01, **RUNS)
    verdict = judge_ticket([*small, *rows(lr=0.1, dense=(94.0, 94.0, 94.0))])
    assert verdict.kind == "secondary prize"
    assert "dense at its best learning rate here, 0.1" in verdict.criteria[0].reason
    assert verdict.gaps["dense"].points == pytest.approx(0)  # that of its own rate
    assert any("One learning rate" in remark for remark in judge_ticket(small).remarks)
    assert not any("One learning rate" in remark for remark in verdict.remarks)


@pytest.mark.parametrize(("longer", "kind"), [(92.6, "jackpot"), (93.2, "secondary prize")])
def test_a_recipe_was_not_sufficient_if_the_tickets_bill_makes_dense_better(longer, kind):
    verdict = judge_ticket(rows(**RUNS, dense_equal_budget=(longer,) * 3))
    assert verdict.kind == kind
    assert ("not sufficient" in verdict.criteria[0].reason) == (kind != "jackpot")


def test_a_longer_dense_training_at_another_learning_rate_counts_too():
    other = rows(lr=1.0, dense=(92.0, 92.2, 92.4), dense_equal_budget=(94.0, 94.0, 94.0))
    verdict = judge_ticket([*rows(**RUNS), *other])
    assert verdict.kind == "secondary prize"
    assert "dense-equal-budget" not in verdict.gaps


def test_controls_that_are_as_good_are_told():
    verdict = judge_ticket(rows(**RUNS, shuffled=(92.0, 92.3, 92.3), random=(80.0, 81.0, 82.0)))
    assert verdict.kind == "jackpot"
    assert [remark.split()[0] for remark in verdict.remarks] == ["One", "Shuffled"]


def test_one_seed_decides_nothing_about_re_initialisation():
    verdict = judge_ticket(rows(**{role: percents[:1] for role, percents in RUNS.items()}))
    assert verdict.kind == "undecided"
    assert verdict.gaps["reinitialised"].error is None
    assert "one seed has no spread" in verdict.criteria[1].reason


def test_gaps_are_taken_within_seeds():
    found = gap({0: 0.9, 1: 0.8, 2: 0.7}, {1: 0.7, 2: 0.6, 5: 0.1})
    assert (found.points, found.std, found.seeds) == (pytest.approx(10), pytest.approx(0), 2)
    assert gap({0: 0.9}, {1: 0.9}) is None


@pytest.mark.parametrize(
    ("runs", "tolerance", "message"),
    [
        (rows(dense=(90,)), 0.5, "0 learning rates"),
        ([*rows(ticket=(90,)), *rows(lr=1.0, ticket=(90,))], 0.5, "2 learning rates"),
        (rows(ticket=(90,)), -1, "tolerance is -1"),
    ],
)
def test_rows_that_say_nothing_are_refused(runs, tolerance, message):
    with pytest.raises(InputError, match=message):
        judge_ticket(runs, tolerance=tolerance)


def test_the_correlation_of_a_tiny_network():
    """Layer a: 4 and 3 at first, 5 and 2 at the end: one stays. Layer b, with the largest weights of all: both."""
    first = {"a": torch.tensor([4.0, -3.0, 1.0, 0.5]), "b": torch.tensor([[9.0, -8.0], [0.1, 0.2]])}
    trained = {"a": torch.tensor([5.0, 0.1, -2.0, 0.2]), "b": torch.tensor([[-9.0, 7.0], [0.3, 0.1]])}
    found = correlation(first, trained, 0.5)
    assert dict(found.layers) == {"a": 0.5, "b": 1.0}
    assert found.within == 0.75
    assert found.overall == 0.75  # 9 8 4 3 at first; 9 7 5 2 at the end: 9 and 8 and 4
    assert found.chance == (2 * 2 / 4 + 2 * 2 / 4) / 4  # two of each layer at both times


def test_layers_of_other_sizes_raise_what_chance_gives():
    generator = torch.Generator().manual_seed(0)
    one, other = (
        {"small": torch.randn(4000, generator=generator), "large": 10 * torch.randn(4000, generator=generator)}
        for _ in range(2)
    )
    found = correlation(one, other, 0.3)
    assert found.within == pytest.approx(0.3, abs=0.03)
    assert found.overall == pytest.approx(found.chance, abs=0.03)
    assert found.chance > 0.5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.05, 1.0))
def test_a_network_correlates_wholly_with_itself_and_symmetrically_with_others(seed, share):
    generator = torch.Generator().manual_seed(seed)
    one, other = ({"a": torch.randn(9, 5, generator=generator), "b": torch.randn(7, generator=generator)} for _ in "12")
    same = correlation(one, {name: -3 * weight for name, weight in one.items()}, share)
    assert same.overall == same.within == 1.0
    assert correlation(one, other, share).overall == correlation(other, one, share).overall


@pytest.mark.parametrize(
    ("other", "share", "message"),
    [
        ({"a": torch.ones(3)}, 0.5, "different layers, first at 'a'"),
        ({"b": torch.ones(2)}, 0.5, "different layers, first at 'a'"),
        ({"a": torch.ones(2)}, 0.0, "share is 0.0"),
    ],
)
def test_weights_of_another_network_are_refused(other, share, message):
    with pytest.raises(InputError, match=message):
        correlation({"a": torch.ones(2)}, other, share)


def test_a_ticket_over_weights_is_verified_from_end_to_end(imp, tmp_path, in_process):
    found = verify(imp, tmp_path / "v", seeds=(0, 1), rates=(0.1, 0.01), rounds=2, quiet=True)
    roles = ["ticket", "shuffled", "random", "reinitialised"]
    own = ["dense-lr0.1", *(f"{role}-round2-lr0.1" for role in roles), "dense-equal-budget-round2-lr0.1"]
    first = [*own, "dense-lr0.01", *(f"{role}-round2-lr0.01" for role in roles)]
    retrained = ["retrained-round2-lr0.1", "retrained-round2-lr0.01"]
    assert in_process == [f"{n}-seed0" for n in first + retrained] + [f"{n}-seed1" for n in first[::-1] + retrained]
    assert found["complete"]
    assert json.loads((tmp_path / "v" / "verification.json").read_text()) == found

    def weights(name):
        return read_tensors(tmp_path / "v" / name / "model.safetensors")[0]

    def recipe(name):
        return Recipe.from_toml(tmp_path / "v" / name / "recipe.toml")

    # the same epochs for all but the one that has the whole bill of three trainings
    epochs = {row["contender"]: row["epochs"] for row in found["runs"]}
    assert {e for name, e in epochs.items() if "budget" not in name} == {1}
    assert epochs["dense-equal-budget-round2-lr0.1"] == 3
    macs = {row["contender"]: row["macs"] for row in found["runs"]}
    assert macs["dense-equal-budget-round2-lr0.1"] == pytest.approx(
        json.loads((imp / "metrics.jsonl").read_text().splitlines()[-1])["macs"], rel=0.01
    )
    ticket = Ticket.load(imp / "ticket.safetensors")
    for name in ("ticket", "reinitialised", "retrained"):
        trained = weights(f"{name}-round2-lr0.01-seed1")
        assert all(not trained[f"{layer}.weight"][~mask].any() for layer, mask in ticket.masks.items())

    def left(name):
        trained = weights(f"{name}-round2-lr0.1-seed0")
        return {layer: int(trained[f"{layer}.weight"].count_nonzero()) for layer in ticket.masks}

    kept = {name: left(name) for name in ("ticket", "shuffled", "random")}
    assert kept["ticket"] == kept["shuffled"]
    assert kept["random"] != kept["ticket"]
    assert sum(kept["random"].values()) == pytest.approx(sum(kept["ticket"].values()), abs=3)
    # all begin with the weights of the run, whatever their seed; what is retrained, with those of its dense run
    rewound = read_tensors(imp / "rewind.safetensors")[0]
    for name in ("first.safetensors", "start.safetensors"):
        held = read_tensors(tmp_path / "v" / name)[0]
        assert held.keys() == rewound.keys()
        assert all(torch.equal(held[key], rewound[key]) for key in held)
    assert recipe("dense-lr0.01-seed1").start == str(tmp_path / "v" / "first.safetensors")
    retrained = recipe("retrained-round2-lr0.01-seed1")
    assert retrained.start == str(tmp_path / "v" / "dense-lr0.01-seed1" / "model.safetensors")
    assert (retrained.lr, retrained.seed) == (0.01, 1)
    assert recipe("reinitialised-round2-lr0.01-seed1").settings["fixed_weights"] == "reinitialise"
    # which weights are large changes less at the small learning rate
    within = {entry["lr"]: entry["within"] for entry in found["correlation"]}
    assert within[0.01] > within[0.1] > 0.2
    by_hand = correlation(
        {name: rewound[f"{name}.weight"] for name in ticket.masks},
        {name: weights("dense-lr0.1-seed0")[f"{name}.weight"] for name in ticket.masks},
        0.2,
    )
    assert found["correlation"][0]["layers"] == by_hand.layers

    large, small = found["checks"]
    assert (large["lr"], small["lr"], large["round"]) == (0.1, 0.01, 2)
    accuracies = [row["accuracy"] for row in found["runs"] if row["contender"] == "ticket-round2-lr0.1"]
    assert large["accuracy"]["ticket"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert (
        large["kind"] == judge_ticket([row for row in found["runs"] if row["role"] == "dense" or row["lr"] == 0.1]).kind
    )
    text = describe(found)
    for words in ("dense-equal-budget", "(a) as accurate as dense", "learning rate 0.01", "set of first weights"):
        assert words in text
    assert "without residual blocks" in found["guideline"]
    assert "0.1 trains dense best" in found["guideline"]

    contenders = read([tmp_path / "v"])
    page, figures = compose(contenders, (), read_verifications([tmp_path / "v"]))
    assert page["headline"] == large["sentence"].rstrip(".")
    assert [contender.label for contender in contenders if contender.dense] == [
        "dense-lr0.1", "dense-equal-budget-round2-lr0.1", "dense-lr0.01"
    ]  # fmt: skip
    series = {line["name"]: line for line in figures["verification-0"]["data"]}
    assert series["ticket"]["y"] == pytest.approx(
        [100 * check["accuracy"]["ticket"]["mean"] for check in (large, small)]
    )
    assert len(series["dense-equal-budget"]["y"]) == 1
    html = write([tmp_path / "v"], tmp_path / "report.html").read_text("utf-8")
    assert "Does the ticket win?" in html
    assert 'id="verification-0"' in html
    drawn = json.loads(re.search(r'id="charts">(.*?)</script>', html, re.DOTALL)[1])
    assert "verification-0" in drawn


def test_what_is_finished_is_not_run_again(imp, tmp_path, in_process, monkeypatch):
    out = tmp_path / "v"
    more = {"rates": (0.1,), "equal_budget": False, "quiet": True}
    run = children.run_one

    def stops(recipe, path, stop, **options):
        if len(in_process) == 3:
            raise Interrupted("stopped")
        run(recipe, path, stop, **options)

    monkeypatch.setattr(children, "run_one", stops)
    with pytest.raises(Interrupted):
        verify(imp, out, seeds=(0,), **more)
    part = json.loads((out / "verification.json").read_text())
    assert not part["complete"]
    assert part["checks"][0]["kind"] == "undecided"
    monkeypatch.setattr(children, "run_one", run)
    found = verify(imp, out, seeds=(0,), **more)
    assert len(in_process) == len(set(in_process)) == 6
    assert found["left_out"] == {"dense-equal-budget": "not asked for"}
    verify(imp, out, seeds=(0, 1), **more)
    assert all(name.endswith("seed1") for name in in_process[6:])
    rounds = verify(imp, out, seeds=(0,), rounds="all", **more)
    assert [check["round"] for check in rounds["checks"]] == [1, 2]
    assert [check["keep"] for check in rounds["checks"]] == pytest.approx([0.5, 0.25], abs=0.001)
    assert len(in_process) == 12 + 5  # dense and the second round were there
    masks = {name: ~mask for name, mask in Ticket.load(imp / "ticket.safetensors").masks.items()}
    shutil.copytree(imp, tmp_path / "imp")
    for name in ("ticket.safetensors", "tickets/round-2.safetensors"):
        Ticket(masks, dict.fromkeys(masks, "weight")).save(tmp_path / "imp" / name)
    with pytest.raises(InputError, match="holds a verification of another ticket"):
        verify(tmp_path / "imp", out, seeds=(0,), **more)


def test_a_ticket_over_channels_needs_no_more_than_its_run(tmp_path, in_process):
    values = {**TASK, "keep": 0.5, "look_every": "1it", "skip": "0it", "window": 2, "round_to": 1, "deadline": "2it"}
    train(Recipe.from_values(values), tmp_path / "bird", quiet=True)
    found = verify(tmp_path / "bird", tmp_path / "v", seeds=(0,), rates=(0.1,), quiet=True)
    assert set(found["left_out"]) == {"random", "dense-equal-budget"}
    assert "of one dense training" in found["left_out"]["dense-equal-budget"]
    parameters = {row["role"]: row["parameters"] for row in found["runs"]}
    assert parameters["ticket"] == parameters["retrained"] == parameters["shuffled"] == parameters["reinitialised"]
    assert parameters["ticket"] < parameters["dense"]
    # the run's seed is 0: what was trained dense there begins as any dense run does
    train(Recipe.from_values({**TASK, "dense": True}), tmp_path / "dense", quiet=True)
    dense = read_tensors(tmp_path / "dense" / "model.safetensors")[0]
    own = read_tensors(tmp_path / "v" / "dense-lr0.1-seed0" / "model.safetensors")[0]
    assert all(torch.equal(dense[name], own[name]) for name in dense)


def test_a_ticket_that_is_rewound_to_a_later_step_begins_there_and_dense_at_the_first(tmp_path, in_process):
    values = {**TASK, "method": ("iterative",), "keep_weights": 0.5, "prune_share": 0.5, "rewind_to": "2it"}
    train(Recipe.from_values(values), tmp_path / "imp", quiet=True)
    source = read_source(tmp_path / "imp")
    rewound = read_tensors(tmp_path / "imp" / "rewind.safetensors")[0]
    assert (source.first_at, source.start_at) == (None, Step.parse("2it"))
    assert all(torch.equal(source.start[name], rewound[name]) for name in rewound)
    assert not torch.equal(source.first["0.weight"], rewound["0.weight"])
    assert source.budgets == {1: 1 + 2 / 4}
    assert source.recipe.method == ("fixed_ticket",)
    found = verify(source, tmp_path / "v", seeds=(0,), rates=(0.1,), equal_budget=False, quiet=True)
    steps = {row["role"]: json.loads((tmp_path / "v" / row["folder"] / "result.json").read_text())["steps"]
             for row in found["runs"]}  # fmt: skip
    assert steps == {"dense": 4, "ticket": 2, "shuffled": 2, "random": 2, "reinitialised": 2, "retrained": 4}
    assert "rewind to step 2it of the schedule" in describe(found)
    # with the seed of its run, the ticket is trained as in its last round
    rounds = read_tensors(tmp_path / "imp" / "model.safetensors")[0]
    own = read_tensors(tmp_path / "v" / "ticket-round1-lr0.1-seed0" / "model.safetensors")[0]
    kept = Ticket.load(tmp_path / "imp" / "ticket.safetensors").masks["0"]
    assert torch.equal(rounds["0.weight"] != 0, own["0.weight"] != 0)
    assert torch.equal(own["0.weight"] != 0, kept)


def test_a_ticket_file_goes_with_a_recipe(tmp_path, imp):
    (tmp_path / "recipe.toml").write_text(Recipe.from_values({**TASK, "seed": 7}).to_toml())
    recipe = Recipe.from_toml(tmp_path / "recipe.toml")
    source = read_source(imp / "ticket.safetensors", recipe)
    assert source.budgets == {None: None}
    rewound = read_tensors(imp / "rewind.safetensors")[0]
    assert all(torch.equal(source.start[name], rewound[name]) for name in rewound)  # those of seed 7
    other = {name: value + 1 for name, value in rewound.items()}
    write_tensors(tmp_path / "other.safetensors", other, {})
    given = recipe.replace(start=str(tmp_path / "other.safetensors"))
    source = read_source(imp / "ticket.safetensors", given)
    assert torch.equal(source.first["0.weight"], other["0.weight"])
    assert source.recipe.start is None


def test_wrong_input_is_one_line(imp, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    task = Recipe.from_values({**TASK, "seed": 7})
    (tmp_path / "recipe.toml").write_text(task.to_toml())
    (tmp_path / "wide.toml").write_text(task.replace(model="small_cnn").to_toml())
    (tmp_path / "dense.toml").write_text(task.replace(dense=True).to_toml())
    anew = task.replace(method=("fixed_ticket",), ticket="none", fixed_weights="reinitialise")
    (tmp_path / "anew.toml").write_text(anew.to_toml())
    (tmp_path / "damaged.safetensors").write_bytes((imp / "ticket.safetensors").read_bytes()[:-9])
    weights = {"4": torch.ones(24, 16, 1, 1, dtype=torch.bool)}
    Ticket(weights, {"4": "weight"}).save(tmp_path / "all.safetensors")
    train(task.replace(dense=True), tmp_path / "dense", quiet=True)
    shutil.copytree(imp, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "result.json").unlink()
    (tmp_path / "empty").mkdir()
    ticket = str(imp / "ticket.safetensors")
    cases = [
        (["nothing"], "nothing at nothing"),
        (["dense"], "drew no ticket"),
        (["unfinished"], "is not finished"),
        (["empty"], "no run in empty"),
        ([ticket], "tells no model and data"),
        ([ticket, "--recipe", "missing.toml"], "no recipe missing.toml"),
        ([ticket, "--recipe", "wide.toml"], "is not in the model"),
        ([ticket, "--recipe", "dense.toml"], "the recipe is dense"),
        ([ticket, "--recipe", "recipe.toml", "--round", "1"], "rounds of the file"),
        ([ticket, "--recipe", "anew.toml"], "weights drawn anew"),
        (["damaged.safetensors", "--recipe", "recipe.toml"], "damaged"),
        (["all.safetensors", "--recipe", "recipe.toml"], "keeps the whole network"),
        ([str(imp), "--recipe", "recipe.toml"], "both the run"),
        ([str(imp), "--round", "3"], "no ticket of round 3"),
        ([str(imp), "--round", "1", "--rounds"], "both --round and --rounds"),
        ([str(imp), "--lr", "fast"], "--lr fast"),
        ([str(imp), "--lr", "0"], "lr is 0.0"),
        ([str(imp), "--tolerance", "-1"], "tolerance is -1.0"),
        ([str(imp), "--top", "0"], "share is 0.0"),
        ([str(imp), "--jobs", "1000"], "1000 runs side by side"),
    ]  # fmt: skip
    before = sorted(tmp_path.iterdir())
    for words, message in cases:
        assert main(["verify", *words]) == 2, words
        error = capsys.readouterr().err
        assert message in error, words
        assert error.count("\n") == 1, words
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_verifies_and_reports(imp, tmp_path, in_process, capsys):
    words = ["--seeds", "1", "--lr", "0.1", "--no-equal-budget", "--out", str(tmp_path / "v"), "-q"]
    assert main(["verify", str(imp), *words]) == 0
    said = capsys.readouterr().out
    assert "undecided" in said
    assert "one seed has no spread" in said
    assert f"next: earlybird report {tmp_path / 'v'}" in said
    assert main(["report", str(tmp_path / "v")]) == 0


def test_pruning_the_first_weights_is_what_a_strong_relation_stands_for():
    """Where the largest weights stay the largest, the ticket of the trained weights is that of the first ones."""
    first = {"a": torch.tensor([3.0, -2.0, 0.1, 0.2])}
    trained = {"a": 1.1 * first["a"] + 0.01}
    whole = {"a": torch.ones(4, dtype=torch.bool)}
    assert correlation(first, trained, 0.5).overall == 1
    assert torch.equal(prune(first, whole, 0.5)["a"], prune(trained, whole, 0.5)["a"])
