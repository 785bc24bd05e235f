"""Models and loops that once broke the cut, or were cut wrongly without a word."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import earlybird as eb
from earlybird.calls import batch_size, first_sample, undisturbed
from earlybird.errors import EarlybirdError, InputError, ShrinkError
from earlybird.tickets.coupling import find_groups
from earlybird.tickets.refit import dense_outputs, estimate_batch_norms
from tests.tickets.test_early_bird import QUICK, batch, sgd, train, train_by_closures
from tests.tickets.test_shrink import assert_same_function
from tests.tickets.topologies import conv, images, make, masked, stem, tail


class Net(nn.Module):
    """Two convolutions with norms of one width, a third, a classifier; subclasses say how they are joined."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.norm_a = conv(3, width), nn.BatchNorm2d(width)
        self.b, self.norm_b = conv(width, width), nn.BatchNorm2d(width)
        self.c, self.head = conv(width, 6), nn.Linear(6, 5)
        for norm in (self.norm_a, self.norm_b):
            nn.init.uniform_(norm.weight, 0.2, 2.0)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)

    def join(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm_b(self.b(functional.relu(self.norm_a(self.a(x))))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.join(x)).mean((2, 3)))


def halves(model: nn.Module) -> eb.Ticket:
    return eb.draw(model, 0.5, scope="layer")


def refused(model: nn.Module, ticket: eb.Ticket, match: str, **kwargs) -> None:
    before, shown = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(ShrinkError, match=match):
        eb.shrink(model, ticket, images(2), **kwargs)
    assert repr(model) == shown
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Padded(nn.Module):
    """The parameter-free shortcut of the CIFAR ResNets: channels are padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a, self.b, self.norm_b = conv(3, 8), nn.BatchNorm2d(8), conv(8, 16), nn.BatchNorm2d(16)
        self.c, self.head = conv(16, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm_a(self.a(x)))
        y = functional.relu(self.norm_b(self.b(y)) + functional.pad(y, (0, 0, 0, 0, 4, 4)))
        return self.head(self.c(y).mean((2, 3)))


class Softmax(Net):
    def join(self, x):
        return self.norm_b(self.b(functional.softmax(self.norm_a(self.a(x)) * 4, dim=1)))


class MeanGate(Net):
    def join(self, x):
        y = functional.relu(self.norm_a(self.a(x)))
        return functional.relu(self.norm_b(self.b(y * torch.sigmoid(4 * y.mean(1, keepdim=True)))))


def test_a_ticket_over_nothing_that_can_go_is_refused():
    refused(Padded(), halves(Padded()), "layer 'norm_a' that have to stay .'add' after layer 'norm_b', which meets a")


@pytest.mark.parametrize(("kind", "reason"), [(Softmax, "_softmax"), (MeanGate, "mean")])
def test_what_works_across_channels_is_left_whole_and_the_rest_is_cut(kind, reason):
    model = kind()
    ticket = halves(model)
    reference = masked(copy.deepcopy(model), {"norm_b": ticket.masks["norm_b"]})
    change = eb.shrink(model, ticket, images(2))
    assert change.whole == {"norm_a": f"'{reason}' after layer 'norm_a', which works across channels"}
    assert (model.a.out_channels, model.b.out_channels) == (8, 4)
    assert "norm_a: left whole" in str(change)
    assert_same_function(model, reference)


class Hidden(Net):
    """Numpy cannot be followed."""

    def join(self, x):
        y = functional.relu(self.norm_a(self.a(x)))
        scale = torch.from_numpy(y.detach().numpy().mean((0, 1)))
        return functional.relu(self.norm_b(self.b(y * (1 + scale))))


def test_what_the_graph_does_not_show_is_found_by_comparing_and_left_whole():
    model = Hidden()
    ticket = halves(model)
    reference = masked(copy.deepcopy(model), {"norm_b": ticket.masks["norm_b"]})
    change = eb.shrink(model, ticket, images(2))
    assert "layer 'b' of Hidden would compute something else" in change.whole["norm_a"]
    assert (model.a.out_channels, model.b.out_channels) == (8, 4)
    assert_same_function(model, reference)
    refused(Hidden(), eb.Ticket({"norm_a": ticket.masks["norm_a"]}), "would compute something else")


def test_channels_alive_only_below_zero_are_not_cut():
    class Negative(Net):
        def join(self, x):
            y = self.norm_a(self.a(x))
            return functional.relu(-(self.norm_b(self.b(functional.relu(y))) + y))

    model = Negative()
    ticket = eb.Ticket({"norm_a": torch.arange(8) >= 4})
    reference = masked(copy.deepcopy(model), ticket.masks)
    eb.shrink(model, ticket, images(2))
    assert_same_function(model, reference)
    assert model.b.out_channels == 8


class NormAfterNorm(Net):
    def join(self, x):
        return functional.relu(self.norm_b(functional.relu(self.norm_a(self.a(x)))))


def test_a_norm_that_only_removed_units_feed_goes_with_them():
    model = NormAfterNorm()
    mask = torch.arange(8) < 5
    reference = masked(copy.deepcopy(model), {"norm_a": mask, "norm_b": mask})
    change = eb.shrink(model, eb.Ticket({"norm_a": mask}), images(2))
    assert change.layers["norm_b"] == {"out": (8, 5)}
    assert_same_function(model, reference)


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "preact", "concatenation", "grouped"])
def test_magnitude_tickets_on_models_with_batch_norm(name):
    model = make(name)
    ticket = eb.draw(model, 0.6, score="magnitude", example_inputs=images(1), coupled="group")
    reference = copy.deepcopy(model)
    change = eb.shrink(model, ticket, images(1))
    assert change.parameters_after < change.parameters_before
    assert torch.isfinite(model.eval()(images())).all()
    assert model(images()).shape == reference.eval()(images()).shape


@pytest.mark.parametrize(
    "wrap", [nn.utils.spectral_norm, lambda m: nn.utils.prune.random_unstructured(m, "weight", 0.3)]
)
def test_computed_weights_are_refused(wrap):
    import torch.nn.utils.prune

    model = Net()
    wrap(model.b)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ShrinkError, match=r"computed from other parameters|traced"):
        eb.shrink(model, halves(model), images(2))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items() if "_u" not in key)


def test_branches_that_only_training_enters():
    class Auxiliary(Net):
        def __init__(self):
            super().__init__()
            self.side = nn.Linear(8, 5)

        def forward(self, x):
            y = self.join(x)
            out = self.head(self.c(y).mean((2, 3)))
            return (out, self.side(y.mean((2, 3)))) if self.training else out

    model = Auxiliary()
    ticket = halves(model)
    refused(model, eb.Ticket({"norm_b": ticket.masks["norm_b"]}), "does not train after the cut")
    change = eb.shrink(model, ticket, images(2))
    assert "does not train after the cut" in change.whole["norm_b"]
    assert (model.a.out_channels, model.b.out_channels) == (4, 8)


def test_layers_called_with_keywords_and_inputs_of_many_kinds():
    class Keywords(Net):
        def forward(self, x, *, scale, index=0):
            y = functional.relu(self.norm_a(self.a(input=x)))
            return self.head(input=self.c(functional.relu(self.norm_b(input=self.b(y)))).mean((2, 3))) * scale + index

    model = Keywords()
    inputs = {"x": images(2), "scale": torch.tensor(2.0), "index": 1}
    ticket = eb.draw(model, 0.5, example_inputs=inputs)
    reference = masked(copy.deepcopy(model), ticket.masks)
    eb.shrink(model, ticket, inputs)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs), reference.eval()(**inputs), rtol=1e-4, atol=1e-5)


def test_channel_shuffle_is_refused_or_right():
    class Shuffle(Net):
        def join(self, x):
            y = functional.relu(self.norm_a(self.a(x)))
            n, c, h, w = y.shape
            y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            return functional.relu(self.norm_b(self.b(torch.cat(y.chunk(2, dim=1), dim=1))))

    model = Shuffle()
    before = copy.deepcopy(model.state_dict())
    ticket = halves(model)
    reference = masked(copy.deepcopy(model), ticket.masks)
    try:
        eb.shrink(model, ticket, images(2))
    except EarlybirdError:
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    else:
        assert_same_function(model, reference)


def test_buffers_that_forward_writes_stay_as_they_were():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("memory", torch.zeros(2))

        def forward(self, x):
            self.calls += 1
            self.memory = self.memory + x.mean()
            return super().forward(x)

    model = Counting()
    ticket = eb.draw(model, 0.5, example_inputs=images(1))
    eb.shrink(model, ticket, images(1))
    assert model.calls == 0
    assert not model.memory.any()


def test_lbfgs_state_is_refused():
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(images()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    refused(model, halves(model), "LBFGS keeps state", optimizer=optimizer)


def test_tickets_travel_and_do_not_change():
    ticket = eb.Ticket({"a": torch.tensor([True, False])}, provenance={"step": 1})
    assert pickle.loads(pickle.dumps(ticket)) == copy.deepcopy(ticket) == ticket
    ticket.masks["a"][:] = True
    assert ticket.keep == 0.5


class TestLoops:
    def start(self, model=None, **settings):
        model = make("residual") if model is None else model
        optimizer = sgd(model)
        return (
            model,
            optimizer,
            eb.EarlyBird(**{**QUICK, **settings}).attach(model, optimizer, example_inputs=images(2)),
        )

    @pytest.mark.filterwarnings("ignore:no agreement")
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_gradients_that_are_not_finite_do_not_touch_the_scores(self, bad):
        model, optimizer, search = self.start(deadline=None, skip="90it")
        train(model, optimizer, 3)
        before = search.state_dict()["taylor"]
        assert before
        functional.cross_entropy(model(batch(3)[0]), batch(3)[1]).backward()
        for parameter in model.parameters():
            parameter.grad.fill_(bad)
        with torch.no_grad():
            weights = [p.clone() for p in model.parameters()]
            optimizer.step()
            for p, w in zip(model.parameters(), weights):
                p.copy_(w)
        after = search.state_dict()["taylor"]
        assert all(torch.equal(before[name], after[name]) for name in before)

    @pytest.mark.filterwarnings("ignore:no agreement")
    @pytest.mark.parametrize("settings", [{}, {"score": "bn_scale", "sparsity": 1e-2}], ids=["taylor", "sparsity"])
    def test_closures_train_score_and_draw_as_without(self, settings):
        """Lightning always steps with one."""
        ends = []
        for closures in (False, True):
            model, optimizer, search = self.start(deadline="8it", **settings)
            train_by_closures(model, optimizer, 10, closures=closures)
            assert search.drawn
            ends.append(model.state_dict())
        assert all(torch.equal(one, two) for one, two in zip(ends[0].values(), ends[1].values(), strict=True))

    def test_lbfgs_is_refused_before_the_first_step(self):
        model = make("plain")
        with pytest.raises(InputError, match="LBFGS keeps directions over all weights at once"):
            eb.EarlyBird(**QUICK).attach(model, torch.optim.LBFGS(model.parameters()))

    def test_frozen_norms_stay_whole(self):
        model = make("plain")
        for parameter in model[1].parameters():
            parameter.requires_grad_(False)
        model, optimizer, search = self.start(model, tolerance=1.0)
        train(model, optimizer, 13)
        assert search.drawn
        assert list(search.ticket.masks) == ["4"]
        assert model[0].out_channels == 8
        assert model[3].out_channels < 12

    def test_a_failed_refit_leaves_a_drawn_search_and_a_running_loop(self):
        model = make("residual")
        optimizer = sgd(model)
        search = eb.EarlyBird(**{**QUICK, "tolerance": 1.0}).attach(
            model, optimizer, example_inputs=images(2), calibration=lambda: [torch.ones(2, 99)]
        )
        with pytest.warns(UserWarning, match="the refit after the cut failed"):
            train(model, optimizer, 14)
        assert search.drawn
        assert search.drawn_at is not None

    def test_a_refit_that_fails_leaves_the_running_statistics(self):
        model = make("plain")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError):
            estimate_batch_norms(model, [images(4), torch.ones(2, 99)])
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    @pytest.mark.parametrize("name", ["plain", "residual"])
    def test_least_squares_under_autocast_is_solved_in_full_precision(self, name):
        model = make(name)
        optimizer = sgd(model)
        search = eb.EarlyBird(**{**QUICK, "tolerance": 1.0, "refit": "least_squares"}).attach(
            model, optimizer, example_inputs=images(2)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a refit that fails only warns
            for step in range(8):
                x, y = batch(step)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = functional.cross_entropy(model(x).float(), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert search.drawn

    def test_a_layer_that_runs_twice_is_not_solved(self):
        class Twice(Net):
            def join(self, x):
                x = functional.relu(self.norm_a(self.a(x)))
                return functional.relu(self.norm_b(self.b(functional.relu(self.norm_b(self.b(x))))))

        targets = dense_outputs(Twice(), images(8))
        assert set(targets) == {"a", "c", "head"}

    @pytest.mark.filterwarnings("ignore:no agreement")
    def test_a_search_that_resumes_after_the_draw_goes_on_with_its_bill(self):
        model, optimizer, search = self.start()
        train(model, optimizer, 20)
        spent = search.bill()
        saved = copy.deepcopy((search.state_dict(), model.state_dict(), optimizer.state_dict()))
        search.detach()
        model, optimizer, search = self.start()
        search.load_state_dict(saved[0])
        model.load_state_dict(saved[1])
        optimizer.load_state_dict(saved[2])
        train(model, optimizer, 5, start=20)
        bill = search.bill()
        assert bill.phases["search"].steps == spent.phases["search"].steps
        assert bill.phases["train"].steps.value == spent.phases["train"].steps.value + 5
        per_step = [b.phases["train"].macs.value / b.phases["train"].steps.value for b in (spent, bill)]
        assert per_step[0] == per_step[1]
        assert bill.dense is not None
        assert bill.total.seconds.value > spent.total.seconds.value

    def test_a_fused_optimizer_under_a_grad_scaler_gets_the_whole_penalty(self):
        model, optimizer, search = self.start(
            make("plain"), sparsity=0.01, deadline=None, skip="90it", score="bn_scale"
        )
        functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
        before = model[1].weight.grad.clone()
        optimizer.grad_scale = torch.tensor(1024.0)  # what GradScaler sets while a fused optimizer steps
        search._before_step(optimizer, (), {})
        torch.testing.assert_close(model[1].weight.grad - before, 10.24 * model[1].weight.sign())

    def test_every_ratio_has_a_ticket_when_the_first_is_drawn(self):
        _, optimizer, search = self.start(model := make("residual"), keep=(0.5, 0.3), tolerance=1.0)
        train(model, optimizer, 13)
        assert search.ticket == search.tickets[0.5]
        assert 0 < search.tickets[0.3].keep < search.tickets[0.5].keep

    def test_a_model_that_cannot_be_counted_after_the_cut_goes_on(self):
        model, optimizer, search = self.start()

        def picky(module, args):
            if args[0].shape[0] == 1 and search.drawn_at is not None:
                raise ValueError("no single images")

        model.register_forward_pre_hook(picky)
        with pytest.warns(UserWarning, match="MACs are not counted"):
            train(model, optimizer, 14)
        assert search.drawn
        assert "not counted" in str(search.bill())

    def test_the_trace_is_made_at_attach(self):
        class Shapes(Net):
            def join(self, x):
                return super().join(x).view(7, -1)

        model = Shapes()
        with pytest.raises(ShrinkError, match="cannot be traced"):
            self.start(model)
        assert not model._forward_pre_hooks

    def test_nothing_free_is_said_at_the_first_look(self):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.norm = conv(3, 8), nn.BatchNorm2d(8)
                self.weight = nn.Parameter(torch.randn(5, 8))

            def forward(self, x):
                return functional.linear(self.norm(self.a(x)).mean((2, 3)), self.weight)

        model, optimizer, _ = self.start(Functional())
        with pytest.raises(EarlybirdError, match=r"none of the ranked channels is free|no layer is seen"):
            train(model, optimizer, 14)

    def test_one_search_at_a_time(self):
        model, optimizer, search = self.start()
        with pytest.raises(InputError, match="attached to this model already"):
            eb.EarlyBird(**QUICK).attach(model, optimizer, example_inputs=images(2))
        search.detach()
        eb.EarlyBird(**QUICK).attach(model, optimizer, example_inputs=images(2)).detach()

    def test_two_optimizers_both_follow(self):
        model = make("plain")
        body, head = sgd(model[:6]), torch.optim.AdamW(model[6:].parameters())
        search = eb.EarlyBird(**{**QUICK, "tolerance": 1.0}).attach(model, [body, head], example_inputs=images(2))
        for step in range(14):
            x, y = batch(step)
            body.zero_grad()
            head.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            head.step()
            body.step()
        assert search.drawn
        assert head.state[model[8].weight]["exp_avg"].shape == model[8].weight.shape

    def test_a_parameter_nobody_holds_is_named(self):
        model = make("plain")
        with pytest.warns(UserWarning, match="no given optimizer holds"):
            eb.EarlyBird(**QUICK).attach(model, sgd(model[:6]), example_inputs=images(2)).detach()

    def test_published_preset_without_example_inputs(self):
        model = make("plain")
        optimizer = sgd(model)
        search = eb.EarlyBird.preset("published").attach(model, optimizer, steps_per_epoch=2)
        train(model, optimizer, 4)
        assert [entry["step"] for entry in search.history] == [0, 2, 4]

    def test_copies_and_pickles_of_an_attached_model_are_quiet(self):
        model, _, search = self.start()
        before = sum(record.images for record in search._ledger.phases.values())
        twin, revived = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        twin(images())
        revived(images())
        assert sum(record.images for record in search._ledger.phases.values()) == before
        assert torch.equal(twin[0].weight, model[0].weight)

    def test_compiled_before_attach(self):
        model = make("plain")
        compiled = torch.compile(model, backend="eager")
        optimizer = sgd(model)
        search = eb.EarlyBird(**{**QUICK, "tolerance": 1.0}).attach(compiled, optimizer, example_inputs=images(2))
        train(compiled, optimizer, 14)
        assert search.drawn
        assert list(search.ticket.masks) == ["1", "4"]

    def test_detach_stops_the_clock(self):
        _, _, search = self.start()
        search.detach()
        first = search._ledger.seconds
        sum(range(200_000))
        assert search._ledger.seconds == first

    def test_scores_of_half_precision_weights_are_kept_in_full(self):
        model = make("plain").to(torch.bfloat16)
        search = eb.EarlyBird(**QUICK).attach(model, sgd(model), example_inputs=images(2).bfloat16())
        assert {score.dtype for score in search.state_dict()["taylor"].values()} == {torch.float32}
        assert "searching" in repr(search)

    def test_mixed_arguments_reach_the_refit(self):
        class Mixed(Net):
            def forward(self, x, gain, *, shift):
                return super().forward(x) * gain + shift

        model = Mixed()
        optimizer = sgd(model)
        search = eb.EarlyBird(**{**QUICK, "tolerance": 1.0}).attach(model, optimizer)
        for step in range(14):
            x, y = batch(step)
            optimizer.zero_grad()
            functional.cross_entropy(model(x, 2.0, shift=1.0), y).backward()
            optimizer.step()
        assert search.drawn


def test_a_search_of_another_model_is_refused():
    model, other = make("plain"), nn.Sequential(*stem(8), conv(8, 8), nn.BatchNorm2d(8), *tail(8))
    optimizer = sgd(other)
    other_search = eb.EarlyBird(**QUICK).attach(other, optimizer, example_inputs=images(2))
    train(other, optimizer, 3)
    search = eb.EarlyBird(**QUICK).attach(model, sgd(model), example_inputs=images(2))
    with pytest.raises(InputError, match="another model"):
        search.load_state_dict(other_search.state_dict())
    scaled = eb.EarlyBird(**{**QUICK, "score": "bn_scale"}).attach(
        other2 := make("plain"), sgd(other2), example_inputs=images(2)
    )
    with pytest.raises(InputError, match="score 'taylor'"):
        scaled.load_state_dict(search.state_dict())


class Joined(nn.Module):
    """Two branches side by side feed a layer that works in blocks of channels: one block a branch."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.a, self.norm_a, self.b, self.norm_b = conv(3, 8), nn.BatchNorm2d(8), conv(3, 8), nn.BatchNorm2d(8)
        self.reader, self.c, self.norm_c = reader, conv(16, 12), nn.BatchNorm2d(12)
        self.tail = nn.Sequential(*tail(12))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([functional.relu(self.norm_a(self.a(x))), functional.relu(self.norm_b(self.b(x)))], 1)
        return self.tail(functional.relu(self.norm_c(self.c(self.reader(x)))))


@pytest.mark.parametrize("reader", [nn.GroupNorm(2, 16), conv(16, 16, groups=2)], ids=["group_norm", "grouped"])
def test_blocks_of_a_concatenation_stay_whole(reader):
    model = Joined(copy.deepcopy(reader))
    assert sum(group.uneven for group in find_groups(model, images(1))) == 2
    ticket = eb.draw(model, 0.5, example_inputs=images(1), coupled="group")
    assert ticket.widths["norm_a"] == ticket.widths["norm_b"] == (8, 8)
    assert ticket.widths["norm_c"] == (6, 12)
    eb.shrink(model, ticket, images(1))
    assert (model.a.out_channels, model.b.out_channels, model.c.out_channels) == (8, 8, 6)
    if isinstance(reader, nn.Conv2d):  # what is asked for nevertheless falls silent
        asked = eb.Ticket({"norm_a": torch.arange(8) < 5, "norm_b": torch.arange(8) < 3})
        reference = masked(copy.deepcopy(model), asked.masks)
        assert set(eb.shrink(model, asked, images(1)).silenced) == {"norm_a", "norm_b"}
        assert_same_function(model, reference)


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "grouped"])
@pytest.mark.parametrize("round_to", [2, 4, 8])
def test_rounding_keeps_the_norms_of_channels_alive(name, round_to):
    model = make(name)
    ticket = eb.draw(model, 0.4, score="magnitude", example_inputs=images(1), coupled="group")
    change = eb.shrink(model, ticket, images(1), round_to=round_to)
    assert set(change.rounded) <= set(ticket.masks)
    assert change.rounded or all(kept % round_to == 0 for kept, _ in ticket.widths.values())
    masks = ticket.masks
    for layer, channels in change.rounded.items():
        masks[layer][channels] = True
    exact = make(name)
    eb.shrink(exact, eb.Ticket(masks), images(1))
    assert_same_function(model, exact)


def test_a_depthwise_layer_on_the_input_stays_whole():
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), *tail(8)
    )
    ticket = eb.draw(model, 0.5, example_inputs=images(1), coupled="group")
    assert ticket.widths == {"1": (3, 3), "4": (4, 8)}
    eb.shrink(model, ticket, images(1))


def test_hooks_with_keywords_of_ours_leave_no_mark():
    model = make("plain")
    seen = []
    model.register_forward_hook(lambda m, args, kwargs, output: seen.append(kwargs), with_kwargs=True)
    before = [dict(vars(module)["_forward_hooks_with_kwargs"]) for module in model.modules()]
    with undisturbed(model):
        model[0].register_forward_hook(lambda m, a, k, o: None, with_kwargs=True)
        model(images(1))
    assert not seen
    assert [dict(vars(module)["_forward_hooks_with_kwargs"]) for module in model.modules()] == before
    model(images(1))
    assert seen == [{}]


def test_a_batch_of_one_is_one_whatever_follows():
    inputs = {"x": (torch.ones(1, 3),), "shift": torch.ones(5)}
    assert batch_size(inputs) == 1
    assert first_sample(inputs)["shift"].shape == (5,)
