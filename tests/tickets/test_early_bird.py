import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import earlybird as eb
from earlybird.errors import InputError
from tests.tickets.topologies import TOPOLOGIES, images, make

QUICK = {"look_every": "2it", "skip": "2it", "deadline": "12it", "window": 3, "round_to": 1}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(16, 3, 8, 8, generator=generator)
    return x, torch.randint(0, 5, (16,), generator=generator)


def cross_entropy(model, x, y):
    return functional.cross_entropy(model(x), y)


def train(model, optimizer, steps, start=0, loss_of=None):
    model.train()
    alive = []  # an ordinary loop holds on to output and loss across the step in which the ticket is drawn
    for step in range(start, start + steps):
        x, y = batch(step)
        output = model(x) if loss_of is None else None
        loss = functional.cross_entropy(output, y) if loss_of is None else loss_of(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        alive = [output, loss]
    return alive


def train_by_closures(model, optimizer, steps, *, closures, loss_of=cross_entropy):
    """Train with the forward and backward pass inside ``optimizer.step``, or, without ``closures``, before it."""
    model.train()
    for step in range(steps):

        def closure(step=step):
            x, y = batch(step)
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        if closures:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def start(name="residual", **settings):
    model = make(name)
    optimizer = sgd(model)
    search = eb.EarlyBird(**{**QUICK, **settings}).attach(model, optimizer, example_inputs=images(2))
    return model, optimizer, search


@pytest.fixture(autouse=True)
def _deadline_warnings_are_expected():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no agreement by the deadline")
        yield


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("refit", ["none", "batch_norm", "least_squares"])
def test_identity_ticket_equals_plain_pytorch_to_the_bit(name, refit):
    plain = make(name)
    train(plain, sgd(plain), 16)
    model, optimizer, search = start(name, keep=1.0, refit=refit)
    train(model, optimizer, 16)
    assert search.drawn
    for (key, one), two in zip(model.state_dict().items(), plain.state_dict().values()):
        assert torch.equal(one, two), key


@pytest.mark.parametrize("score", ["taylor", "bn_scale", "magnitude"])
def test_the_draw_happens_inside_the_step(score):
    model, optimizer, search = start(score=score, keep=0.5)
    before = sum(p.numel() for p in model.parameters())
    train(model, optimizer, 16)
    assert search.drawn
    assert search.drawn_at is not None
    assert search.drawn_at <= 12
    assert sum(p.numel() for p in model.parameters()) == search.change.parameters_after < before
    assert search.ticket.provenance["method"] == "early_bird"
    assert search.history[0]["step"] == 2
    assert search.status() == {"ticket": f"drawn at step {search.drawn_at}"}
    bill = str(search.bill())
    for phase in ("search", "draw", "train"):
        assert phase in bill


def test_draws_when_the_window_agrees_and_not_before():
    """Against the definition: the first look at which the last `window` masks differ by at most the tolerance."""
    model, optimizer, search = start(keep=0.5, tolerance=0.15, window=4, look_every="1it", deadline=None)
    for step in range(60):
        train(model, optimizer, 1, step)
        masks = search._masks[0.5]
        agree = len(masks) >= 4 and all((masks[-1] ^ m).float().mean() <= 0.15 for m in masks[-4:-1])
        assert search.drawn == agree
        if agree:
            break
    assert search.drawn
    assert search.ticket.provenance["reason"] == "agreement"
    assert max(search.history[-1]["distances"]) <= 0.15
    steps, matrix = search.distance_matrix()
    assert steps == [entry["step"] for entry in search.history]
    torch.testing.assert_close(matrix[-1, -4:-1].tolist(), search.history[-1]["distances"])
    assert torch.equal(matrix, matrix.T)


def test_looks_follow_the_clock():
    model = make("plain")
    search = eb.EarlyBird(look_every="0.5ep", skip="1ep", deadline=None, tolerance=0.0, window=50).attach(
        model, optimizer := sgd(model), example_inputs=images(1), steps_per_epoch=6
    )
    train(model, optimizer, 20)
    assert [entry["step"] for entry in search.history] == [6, 9, 12, 15, 18]
    assert [entry["epoch"] for entry in search.history] == [1.0, 1.5, 2.0, 2.5, 3.0]


def test_epochs_need_their_length():
    model = make("plain")
    with pytest.raises(InputError, match="steps_per_epoch"):
        eb.EarlyBird().attach(model, sgd(model), example_inputs=images(1))


def test_the_deadline_draws_the_best_so_far_and_warns():
    model, optimizer, search = start(keep=0.4, tolerance=0.0, window=3, look_every="1it", skip="1it", deadline="9it")
    with pytest.warns(UserWarning, match="no agreement by the deadline"):
        train(model, optimizer, 10)
    assert search.drawn_at == 9
    assert search.ticket.provenance["reason"] == "deadline"
    worst = [max(entry["distances"]) if len(entry["distances"]) == 2 else 9 for entry in search.history]
    best = max(i for i, value in enumerate(worst) if value == min(worst))
    assert torch.equal(torch.cat(list(search.ticket.masks.values())), search._masks[0.4][best])


def test_published_preset_looks_at_the_untrained_net_every_epoch_and_draws_at_the_fifth_look():
    model = make("plain")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    search = eb.EarlyBird.preset("published", keep=0.5).attach(
        model, optimizer, example_inputs=images(1), steps_per_epoch=3
    )
    train(model, optimizer, 12)
    assert [entry["step"] for entry in search.history] == [0, 3, 6, 9, 12]
    assert search.drawn_at == 12
    assert not optimizer.state  # momentum buffers start empty, as in the published code
    assert search.ticket == eb.draw(make("plain"), 0.5, strict=True, example_inputs=images(1))


def test_sparsity_is_the_l1_subgradient_on_the_scales():
    plain, model = make("plain"), make("plain")
    for net in (plain, model):
        net[1].weight.data[0] *= -1
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    eb.EarlyBird(score="bn_scale", sparsity=0.01, look_every="99it", skip="99it", deadline=None).attach(
        model, optimizer, example_inputs=images(1)
    )
    train(plain, torch.optim.SGD(plain.parameters(), lr=1.0), 1)
    signs = model[1].weight.detach().sign().clone()
    train(model, optimizer, 1)
    torch.testing.assert_close(model[1].weight, plain[1].weight - 0.01 * signs)
    assert torch.equal(model[0].weight, plain[0].weight)


def test_taylor_scores_are_the_running_mean_of_the_term():
    model = make("plain")
    optimizer = sgd(model)
    search = eb.EarlyBird(score_memory=0.75, look_every="99it", skip="99it", deadline=None).attach(
        model, optimizer, example_inputs=images(1)
    )
    expected = torch.zeros(8)
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        norm = model[1]
        expected = 0.75 * expected + 0.25 * (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).abs().detach()
        optimizer.step()
    torch.testing.assert_close(search.state_dict()["taylor"]["1"], expected)


def test_several_ratios_in_one_search():
    model, optimizer, search = start(keep=(0.5, 0.3, 0.8), deadline="8it", tolerance=0.0)
    train(model, optimizer, 10)
    assert set(search.tickets) == {0.5, 0.3, 0.8}
    assert search.ticket == search.tickets[0.5]
    assert search.tickets[0.3].keep < search.tickets[0.5].keep < search.tickets[0.8].keep
    assert {entry["keep"] for entry in search.history} == {0.5, 0.3, 0.8}


@pytest.mark.parametrize("weights", ["continue", "reinitialise"])
def test_weights_and_optimizer_state_after_the_draw(weights):
    results = []
    for _ in range(2):
        model, optimizer, search = start(keep=0.5, weights=weights, optimizer_state="keep")
        random = torch.random.get_rng_state()
        for step in itertools.count():
            train(model, optimizer, 1, step)
            if search.drawn:
                break
        assert torch.equal(random, torch.random.get_rng_state())
        results.append({k: v.clone() for k, v in model.state_dict().items()})
        assert bool(optimizer.state) == (weights == "continue")
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


@pytest.mark.parametrize("cut_at", [1, 5, 11, 14, 20])
@pytest.mark.parametrize("refit", ["batch_norm", "least_squares"])
def test_state_round_trip_resumes_to_the_bit(cut_at, refit):
    """Stopped before, at and after the draw: the rest of the run equals the undisturbed one."""
    model, optimizer, search = start(keep=0.5, refit=refit, tolerance=0.0)
    train(model, optimizer, 24)
    first, first_optimizer, first_search = start(keep=0.5, refit=refit, tolerance=0.0)
    train(first, first_optimizer, cut_at)
    saved = copy.deepcopy((first.state_dict(), first_optimizer.state_dict(), first_search.state_dict()))

    second, second_optimizer, second_search = start(keep=0.5, refit=refit, tolerance=0.0)
    second_search.load_state_dict(saved[2])
    second.load_state_dict(saved[0])
    second_optimizer.load_state_dict(saved[1])
    assert second_search.drawn == first_search.drawn
    train(second, second_optimizer, 24 - cut_at, cut_at)
    assert second_search.history == search.history
    assert second_search.ticket == search.ticket
    assert second_search.drawn_at == search.drawn_at
    for (key, one), two in zip(second.state_dict().items(), model.state_dict().values()):
        assert torch.equal(one, two), key


def test_state_of_another_search_is_refused():
    _, _, search = start(keep=0.5)
    model, optimizer, other = start(keep=0.4)
    train(model, optimizer, 4)
    with pytest.raises(InputError, match=r"watched keep=\['0.4'\]"):
        search.load_state_dict(other.state_dict())


def test_refit_brings_the_function_back():
    """Least squares leaves the cut net nearer to the dense one's outputs than statistics alone do."""
    errors = {}
    for refit in ("none", "batch_norm", "least_squares"):
        model = make("plain", seed=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
        x = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for norm in (model[1], model[4]):
                norm.momentum = None
            model.train()
            for layer in (model[1], model[4]):
                layer.reset_running_stats()
            model(x)
            want = model.eval()(x)
            model.train()
        settings = {"look_every": "1it", "skip": "1it", "deadline": "1it", "round_to": 1, "score": "bn_scale"}
        search = eb.EarlyBird(keep=0.6, refit=refit, **settings).attach(
            model, optimizer, example_inputs=x[:1], calibration=lambda x=x: [x]
        )
        model(x).square().mean().backward()
        optimizer.step()
        assert search.drawn
        with torch.no_grad():
            errors[refit] = float((model.eval()(x) - want).square().mean())
    assert errors["least_squares"] < 0.5 * errors["none"]
    assert errors["least_squares"] < errors["batch_norm"]


def test_batch_norm_statistics_are_those_of_the_calibration_batches():
    from earlybird.tickets.refit import estimate_batch_norms

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    tracked = model[1].num_batches_tracked.clone()
    batches = [torch.randn(8, 3, 4, 4) for _ in range(3)]
    state = torch.random.get_rng_state()
    estimate_batch_norms(model, batches)
    outputs = [model[0](b) for b in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0))
    assert model[1].momentum == 0.1
    assert torch.equal(model[1].num_batches_tracked, tracked)
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"keep": 0}, "keep is 0"), ({"keep": 1.5}, "keep is 1.5"), ({"keep": float("nan")}, "keep is nan"),
        ({"keep": ()}, "no ratio"), ({"window": 2.5}, "window"), ({"score_memory": 1.0}, "score_memory"),
        ({"sparsity": float("inf")}, "sparsity"), ({"strict": "yes"}, "strict"), ({"scope": "net"}, "scope"),
        ({"keep": (0.5, 0.5)}, "twice"), ({"score": "l1"}, "score is 'l1'"), ({"window": 1}, "window"),
        ({"tolerance": -0.1}, "tolerance"), ({"look_every": "0it"}, "look_every is zero"),
        ({"look_every": "5"}, "no unit"),
        ({"macs_share": 2}, "macs_share"), ({"refit": "yes"}, "refit is 'yes'"), ({"round_to": 0}, "round_to"),
    ],
)  # fmt: skip
def test_settings_out_of_range(settings, match):
    with pytest.raises(InputError, match=match):
        eb.EarlyBird(**settings)


def test_wrong_partners_are_refused():
    model, other = make("plain"), make("plain")
    with pytest.raises(InputError, match="holds no parameter"):
        eb.EarlyBird(**QUICK).attach(model, sgd(other), example_inputs=images(1))
    linear = nn.Linear(2, 2)
    with pytest.raises(InputError, match="no batch norm"):
        eb.EarlyBird(**QUICK).attach(linear, sgd(linear))
    with pytest.raises(InputError, match="unknown preset"):
        eb.EarlyBird.preset("fastest")


def test_inputs_are_taken_from_the_loop_when_not_given():
    model = make("residual")
    optimizer = sgd(model)
    search = eb.EarlyBird(**QUICK).attach(model, optimizer)
    train(model, optimizer, 14)
    assert search.drawn
    assert search.change.parameters_after < search.change.parameters_before


def test_accumulation_evaluation_and_clipping_in_between():
    model = make("residual")
    optimizer = sgd(model)
    search = eb.EarlyBird(**QUICK).attach(model, optimizer, example_inputs=images(1))
    for step in range(14):
        for half in range(2):
            x, y = batch(2 * step + half)
            (functional.cross_entropy(model(x), y) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model(images(8))
        model.train()
    assert search.drawn
    assert search.drawn_at <= 12


def test_detach_leaves_no_hook():
    model = make("plain")
    optimizer = sgd(model)
    search = eb.EarlyBird(**QUICK).attach(model, optimizer, example_inputs=images(1))
    search.detach()
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_compiled_models_shrink_too():
    model = make("plain")
    optimizer = sgd(model)
    search = eb.EarlyBird(**QUICK).attach(model, optimizer, example_inputs=images(1))
    train(torch.compile(model, backend="eager"), optimizer, 14)
    assert search.drawn
    assert model[3].out_channels < 12


def test_widths_are_rounded_and_the_change_says_which_channels_stayed():
    model, optimizer, search = start(keep=0.4, round_to=4, tolerance=1.0)
    train(model, optimizer, 14)
    assert model[0].out_channels % 4 == 0
    assert search.change.rounded
    for name, channels in search.change.rounded.items():
        assert search.ticket.masks[name][channels].all()  # the ticket is what stays
    assert search.ticket.provenance["rounded"] == sum(map(len, search.change.rounded.values()))
    twin, _, resumed = start(keep=0.4, round_to=4, tolerance=1.0)
    resumed.load_state_dict(search.state_dict())
    twin.load_state_dict(model.state_dict())
    assert resumed.ticket == search.ticket
    assert resumed.change.rounded == search.change.rounded
    assert resumed.change.layers == search.change.layers


def test_a_ledger_that_is_shared_knows_the_small_network_after_a_resume():
    """What follows is training of the small network: not a search, and not at the price of the dense one."""

    def begin():
        model = make("residual")
        optimizer = sgd(model)
        ledger = eb.Ledger()
        ledger.watch(model, optimizer, images(2))
        settings = {**QUICK, "keep": 0.5, "deadline": "4it"}
        search = eb.EarlyBird(**settings).attach(model, optimizer, example_inputs=images(2), ledger=ledger)
        return model, optimizer, ledger, search

    model, optimizer, ledger, search = begin()
    train(model, optimizer, 6)
    assert search.drawn
    saved = copy.deepcopy((search.state_dict(), model.state_dict(), optimizer.state_dict(), ledger.state_dict()))
    second, second_optimizer, second_ledger, resumed = begin()
    resumed.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    second_optimizer.load_state_dict(saved[2])
    second_ledger.load_state_dict(saved[3])
    assert second_ledger.phase == "train"
    train(model, optimizer, 3, 6)
    train(second, second_optimizer, 3, 6)
    for name, record in ledger.phases.items():
        again = second_ledger.phases[name]
        assert (again.steps, again.macs, again.moved_bytes) == (record.steps, record.macs, record.moved_bytes), name
