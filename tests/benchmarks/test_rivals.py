"""Rivals do what they are named for: real properties of tiny trainings, a second each."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

import earlybird as eb
from benchmarks.rivals import composer, loop, lottery, pruning, slimming
from benchmarks.rivals import run as entry
from benchmarks.rivals.loop import Contest, Options, fit, schedule, start
from earlybird.cost.bill import Bill
from earlybird.data import load
from earlybird.errors import InputError
from earlybird.files import read_tensors
from earlybird.tickets.coupling import find_groups
from earlybird.tickets.draw import keep_for_macs
from earlybird.tickets.scores import magnitude
from earlybird.train.recipe import Recipe
from earlybird.train.run import train

DIGITS = Path(__file__).parents[2] / "recipes" / "digits.toml"
CUTTING = [name for name in entry.RIVALS if name not in entry.WHOLE_NETWORK]
Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(epochs: int = 1, **changes: Any) -> Recipe:
    return Recipe.from_toml(DIGITS, {"width": 0.2, "epochs": epochs, "dense": True, "kernels": False, **changes})


def contest(epochs: int = 1, **options: Any) -> Contest:
    return start(recipe(epochs), Options(**{"macs_share": 0.6, **options}))


def words(rival: str, out: Path, *flags: str, epochs: int = 1, share: float = 0.6) -> list[str]:
    fixed = ["--recipe", str(DIGITS), "--width", "0.2", "--epochs", str(epochs), "--macs-share", str(share)]
    return [rival, *fixed, "--out", str(out), *flags]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(rival: str, *flags: str, **settings: Any) -> dict[str, Any]:
        assert entry.main(words(rival, tmp_path / rival, *flags, **settings)) == 0
        row: dict[str, Any] = json.loads((tmp_path / rival / "row.json").read_text())
        return row

    return run


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Return the list to which every network that a contest builds is added."""
    found: list[nn.Module] = []
    build = Contest.build

    def built(self: Contest) -> nn.Module:
        found.append(build(self))
        return found[-1]

    monkeypatch.setattr(Contest, "build", built)
    return found


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished dense run of two epochs."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    train(recipe(epochs=2), folder, quiet=True)
    return folder


@pytest.mark.parametrize("rival", entry.RIVALS)
def test_a_row_says_what_was_reached_and_what_it_cost(run: Run, rival: str) -> None:
    row = run(rival)
    share = row["forward_macs"] / row["dense_forward_macs"]
    assert share == pytest.approx(0.6 if rival in CUTTING else 1.0, rel=0.05)
    bill = Bill.from_json(row["bill"])
    assert row["seconds"] == bill.total.seconds.value
    assert row["macs"] == bill.total.macs.value  # type: ignore[union-attr]
    assert 0 < row["joules"][0] < row["joules"][1]
    assert row["parameters"] == bill.parameters
    assert row["seconds_kind"] == "measured"
    assert row["curve"][-1][1] == row["accuracy"]
    assert [seconds for seconds, _ in row["curve"]] == sorted(seconds for seconds, _ in row["curve"])
    assert {"setup", "train", "evaluate"} <= set(bill.phases)
    assert bill.phases["evaluate"].images.value == len(load("digits").test_images) * len(row["curve"])
    assert ("draw" in bill.phases) == (rival in CUTTING and rival != "small-dense")
    assert ("search" in bill.phases) == (rival in (*entry.BEGIN_DENSE, "slimming"))
    trained = {"small-dense": 1, "lottery-iterative": 4}.get(rival, 2 if "search" in bill.phases else 1)
    assert bill.total.steps.value == trained * 22
    assert row["accuracy"] > 0.15  # an epoch of 22 steps teaches more than chance


def test_a_row_that_is_there_is_not_made_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = run("layer-freezing")
    monkeypatch.setattr(entry, "start", None)
    assert run("layer-freezing") == row
    assert entry.main(words("layer-freezing", tmp_path / "layer-freezing", "--seed", "1")) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["snap", "--macs-share", "0.6"], "unknown rival 'snap'; one of .*; did you mean 'snip'?"),
        (["snip"], "snip cuts the network; --macs-share"),
        (["snip", "--macs-share", "1.5"], "macs_share is 1.5"),
        (["prune-finetune-taylor", "--macs-share", "0.001"], "macs_share=0.001 cannot be met"),
        (["small-dense", "--macs-share", "0.1"], "no width gives 0.1 of the MACs"),
        (["lottery-one-shot", "--macs-share", "0.6", "--dense", "nowhere"], "no run in nowhere"),
        (["snip", "--macs-share", "0.6", "--dense", "nowhere"], "snip does not begin with a dense training"),
        (["slimming", "--macs-share", "0.6", "--finetune-epochs", "0"], "finetune_epochs is 0"),
        (["lottery-iterative", "--macs-share", "0.6", "--rewind-epochs", "1"], "rewinding to epoch 1 of 1"),
        (["snip", "--macs-share", "0.6", "--epochs", "-1"], "epochs = -1"),
        (["snip", "--macs-share", "0.6", "--out", "/dev/null/out"], "cannot write /dev/null/out"),
    ],
)
def test_wrong_input_is_said_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    given = ["--recipe", str(DIGITS), "--width", "0.2", "--epochs", "1", "--out", str(tmp_path / "out"), *words[1:]]
    assert entry.main([words[0], *given]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said)
    assert not (tmp_path / "out" / "row.json").exists()


def test_a_dense_run_is_taken_over(run: Run, dense: Path) -> None:
    arena = contest(epochs=2, dense=dense)
    network = loop.dense_network(arena)
    trained, _ = read_tensors(dense / "model.safetensors")
    assert all(torch.equal(trained[name], value) for name, value in network.state_dict().items())
    theirs = Bill.from_json(json.loads((dense / "bill.json").read_text()))
    row = run("prune-finetune-magnitude", "--dense", str(dense), epochs=2)
    bill = Bill.from_json(row["bill"])
    assert bill.phases["search"] == theirs.phases["train"]
    assert run("prune-finetune-taylor", "--dense", str(dense), epochs=2)["bill"]["phases"]["draw"]["macs"]["value"] > 0
    assert bill.phases["evaluate"].images.value == 3 * theirs.phases["evaluate"].images.value / 2
    assert bill.phases["train"].steps.value == 22  # only the fine-tuning was done here
    assert row["seconds_kind"] == "measured, the dense training taken over from run"
    assert len(row["curve"]) == 3
    assert row["curve"][0][0] < row["curve"][1][0] < row["curve"][2][0]


def test_another_training_is_not_taken_over(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert entry.main(words("lottery-one-shot", out, "--dense", str(dense), "--seed", "1", epochs=2)) == 2
    assert "another training (seed differ)" in capsys.readouterr().err
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "recipe.toml").write_text((dense / "recipe.toml").read_text())
    assert entry.main(words("lottery-one-shot", out, "--dense", str(unfinished), epochs=2)) == 2
    assert "is not finished" in capsys.readouterr().err


def test_torch_pruning_meets_the_cost_and_leaves_the_given_network_alone() -> None:
    arena = contest()
    model = arena.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = pruning.prune(arena, model, tp.importance.GroupMagnitudeImportance(p=2), 0.6)
    assert arena.count(pruned).forward_macs == pytest.approx(0.6 * arena.dense_macs, rel=0.05)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_where_rounding_is_too_coarse_for_the_cost_it_gets_finer() -> None:
    arena = contest()
    arena.round_to = 16  # for layers of 16 to 48 channels
    model = arena.build()
    with pytest.raises(InputError, match="cannot be met"):
        keep_for_macs(magnitude(model), find_groups(model, arena.example[:1]), 0.6, round_to=16)
    wanted = 0.6 * arena.dense_macs
    loop.cut_to_cost(arena, model, magnitude(model), wanted)
    assert arena.count(model).forward_macs == pytest.approx(wanted, rel=0.05)
    assert arena.notes["round_to"] < 16
    widths = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(width % arena.notes["round_to"] == 0 for width in widths)


def test_fit_is_the_products_loop(tmp_path: Path) -> None:
    """Same seed, data, schedule, optimizer and arithmetic: the same weights as a run of the product, to the bit."""
    arena = contest(epochs=2)
    model = arena.build()
    fit(arena, model, schedule(arena))
    own = recipe(epochs=2, precision="bf16", channels_last=True, compile=False)
    result = train(own, tmp_path / "run", quiet=True)
    trained, _ = read_tensors(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(trained[name], value) for name, value in model.state_dict().items())
    assert arena.curve[-1][1] == result.accuracy
    ours, theirs = arena.ledger.bill().phases["train"], result.bill.phases["train"]
    assert (ours.macs, ours.images, ours.modelled_joules) == (theirs.macs, theirs.images, theirs.modelled_joules)


def test_rivals_get_the_products_kernels_while_they_train(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = start(recipe(kernels="auto"), Options())
    model, removed = arena.build(), []

    class Handle:
        def remove(self) -> None:
            removed.append(model)

    def use(given: nn.Module, images: torch.Tensor, *, dtype: torch.dtype) -> Handle:
        assert (given is model, len(images), dtype) == (True, arena.recipe.batch_size, torch.bfloat16)
        return Handle()

    monkeypatch.setattr(loop, "use_kernels", use)
    fit(arena, model, schedule(arena))
    assert removed == [model]


def test_tickets_at_initialisation_are_drawn_from_a_few_images(run: Run) -> None:
    for rival, images in (("snip", 100), ("grasp", 300), ("synflow", 101), ("random-ticket", 0)):
        bill = Bill.from_json(run(rival)["bill"])
        assert bill.phases["draw"].images.value == images
        assert bill.phases["draw"].steps.value == 0


def test_selective_backprop_goes_backward_for_fewer_images() -> None:
    arena = contest(epochs=2)
    seen: list[int] = []
    build = arena.build

    def built() -> nn.Module:
        model = build()
        model.classifier.register_full_backward_hook(lambda m, i, o: seen.append(len(o[0])))
        return model

    arena.build = built  # type: ignore[method-assign]
    composer.selective_backprop(arena)
    spent = arena.ledger.phases["train"]
    # steps 22 to 39 of 44 lie between half and nine tenths, and every other one selects
    assert seen == [64] * 22 + [32, 64] * 9 + [64] * 4
    assert spent.train_images == sum(seen) == 44 * 64 - arena.notes["images_without_backward"]
    passes = next(iter(spent.work.values()))
    assert passes.forward_images == 9 * 64
    whole = arena.count(arena.build())
    small = arena.count(arena.build(), torch.zeros(1, 1, 4, 4))
    assert sum(passes.macs.values()) == sum(seen) * whole.training_macs + 9 * 64 * small.forward_macs


def test_selection_prefers_high_losses() -> None:
    losses = torch.arange(100.0)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(100)
    for _ in range(200):
        chosen = composer.choose(losses, generator)
        assert len(chosen) == len(chosen.unique()) == 50
        counts[losses[chosen].long()] += 1
    assert counts[:20].sum() < 0.5 * counts[-20:].sum()
    assert counts[-10:].min() > counts[:10].max()


def test_frozen_layers_do_not_change_and_are_not_paid_for(networks: list[nn.Module]) -> None:
    arena = contest(epochs=4)
    frozen: list[dict[str, Tensor]] = []
    count = arena.count

    def counted(model: nn.Module, images: Tensor | None = None) -> Any:
        frozen.append({name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad})
        return count(model, images)

    arena.count = counted  # type: ignore[method-assign]
    composer.layer_freezing(arena)
    (model,) = networks[1:]  # the first one was counted at the start
    final = dict(model.named_parameters())
    # after epochs 1 and 2, and after 3, when half of ten layers are: three convolutions, two batch norms
    assert [len(found) for found in frozen] == [0, 0, 7]
    assert arena.notes["frozen_layers"] == [0, 0, 5, 10]
    assert all(torch.equal(value, final[name]) for name, value in frozen[-1].items())
    assert "features.0.weight" in frozen[-1]
    assert not torch.equal(final["classifier.weight"], arena.build().classifier.weight)
    spent, whole = arena.ledger.phases["train"], count(arena.build())
    assert spent.macs < spent.train_images * whole.training_macs
    dense = contest(epochs=4)
    fit(dense, dense.build(), schedule(dense))
    assert dense.ledger.phases["train"].macs == spent.train_images * whole.training_macs


@pytest.mark.parametrize("resize", ["crop", "resize"])
def test_images_are_really_smaller_at_first(resize: str) -> None:
    arena = contest(epochs=2, resize=resize)
    sides: dict[bool, list[int]] = {True: [], False: []}
    build = arena.build

    def note(model: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > 1:  # a single image is only counted
            sides[model.training].append(inputs[0].shape[-1])

    def built() -> nn.Module:
        model = build()
        model.register_forward_pre_hook(note)
        return model

    arena.build = built  # type: ignore[method-assign]
    composer.progressive_resizing(arena)
    trained = sides[True]
    assert trained == sorted(trained)
    assert set(trained) == {4, 8}
    assert trained.count(4) > 22  # half of the training, and a part of the way up
    assert set(sides[False]) == {8}
    spent = arena.ledger.phases
    whole, small = arena.count(build()), arena.count(build(), torch.zeros(1, 1, 4, 4))
    assert spent["train"].macs == 64 * sum((small if side == 4 else whole).training_macs for side in trained)
    assert spent["evaluate"].macs == spent["evaluate"].images * whole.forward_macs


def test_the_side_of_images_grows_in_a_straight_line() -> None:
    assert [composer.side_at(done, 32) for done in (0, 0.49, 0.5, 0.65, 0.79, 0.8, 1)] == [16, 16, 16, 24, 32, 32, 32]


def test_soft_filter_pruning_zeroes_filters_and_lets_them_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = contest(epochs=2)
    calls: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    zero_filters = slimming.zero_filters

    def spied(model: nn.Module, masks: dict[str, Tensor]) -> None:
        norms = slimming.norms_of_filters(model)
        zero_filters(model, masks)
        after = slimming.norms_of_filters(model)
        for name, mask in masks.items():
            assert bool((after[name][~mask] == 0).all())
            assert torch.equal(after[name][mask], norms[name][mask])
        calls.append((norms, {name: mask.clone() for name, mask in masks.items()}))

    monkeypatch.setattr(slimming, "zero_filters", spied)
    model, _ = slimming.soft_filter_pruning(arena)
    (_, first), (norms, last) = calls
    gone = torch.cat([~mask for mask in first.values()])
    assert 0 < int(gone.sum()) < gone.numel()
    assert bool((torch.cat(list(norms.values()))[gone] > 0).all())  # an epoch later, zeroed filters have weights again
    assert all(int(first[name].sum()) == int(last[name].sum()) for name in first)
    widths = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert widths == [int(mask.sum()) for mask in last.values()]


def test_slimming_pulls_the_scales_of_batch_norm_down(
    networks: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    means = []
    for sparsity in (0.0, 0.05):
        monkeypatch.setattr(slimming, "finetune", lambda *_: 0.0)
        monkeypatch.setattr(slimming, "cut_to_cost", lambda *_: None)
        slimming.network_slimming(contest(sparsity=sparsity))
        scales = [m.weight.detach() for m in networks[-1].modules() if isinstance(m, nn.BatchNorm2d)]
        means.append(float(torch.cat(scales).mean()))
    assert means[0] == pytest.approx(0.5, abs=0.05)
    assert means[1] < means[0] - 0.05


class Trainings:
    """Stands for `fit`: notes the weights a training begins with, and ends with others."""

    def __init__(self) -> None:
        self.began: list[dict[str, Tensor]] = []
        self.calls: list[dict[str, Any]] = []

    def __call__(self, contest: Contest, model: nn.Module, rate: Any, **settings: Any) -> float:
        self.began.append(copy.deepcopy(model.state_dict()))
        self.calls.append(settings)
        generator = torch.Generator().manual_seed(len(self.began))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer += 1
        for epoch in range(settings.get("first", 0), contest.recipe.epochs):
            if settings.get("after_epoch") is not None:
                settings["after_epoch"](epoch + 1)
        return 0.5


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[eb.Ticket, dict[str, Tensor]]]:
    """Return the list to which every ticket that a lottery draws is added, with its scores."""
    found: list[tuple[eb.Ticket, dict[str, Tensor]]] = []
    cut_to_cost = lottery.cut_to_cost

    def cut(contest: Contest, model: nn.Module, scores: dict[str, Tensor], macs: float, *, target: nn.Module) -> None:
        found.append((cut_to_cost(contest, model, scores, macs, target=target), scores))

    monkeypatch.setattr(lottery, "cut_to_cost", cut)
    return found


@pytest.mark.parametrize("epoch", [0, 1])
def test_iterative_pruning_rewinds_exactly(monkeypatch: pytest.MonkeyPatch, cuts: list[Any], epoch: int) -> None:
    trainings = Trainings()
    monkeypatch.setattr(lottery, "fit", trainings)
    monkeypatch.setattr(loop, "fit", trainings)
    arena = contest(epochs=3, rewind_epochs=epoch)
    model, _ = lottery.iterative(arena)
    assert len(trainings.began) == 4
    assert [settings.get("first", 0) for settings in trainings.calls[1:]] == [epoch] * 3
    # the first values, or those that the first training had reached by epoch 1, cut as the trained ones say
    origin = arena.build()
    if epoch:
        Trainings()(arena, origin, None)
    for (ticket, scores), began, number in zip(cuts, trainings.began[1:], (1, 2, 3), strict=True):
        eb.shrink(origin, ticket, arena.example[:1], scores=scores)
        assert all(torch.equal(began[name], value) for name, value in origin.state_dict().items())
        share = arena.count(origin).forward_macs / arena.dense_macs
        assert share == pytest.approx(arena.macs_share ** (number / 3), rel=0.05)
    assert arena.count(model).forward_macs == arena.count(origin).forward_macs


def test_one_shot_lottery_takes_widths_from_the_trained_and_values_from_the_first(
    monkeypatch: pytest.MonkeyPatch, cuts: list[Any], dense: Path
) -> None:
    trainings = Trainings()
    monkeypatch.setattr(lottery, "fit", trainings)
    arena = contest(epochs=2, dense=dense, score="bn_scale")
    lottery.one_shot(arena)
    ((ticket, scores),) = cuts
    trained, _ = read_tensors(dense / "model.safetensors")
    assert all(torch.equal(trained[f"{name}.weight"].abs(), score) for name, score in scores.items())
    origin = arena.build()
    eb.shrink(origin, ticket, arena.example[:1], scores=scores)
    (began,) = trainings.began
    assert all(torch.equal(began[name], value) for name, value in origin.state_dict().items())
