import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from earlybird.skipping import gather
from earlybird.skipping.gather import FEW, Choice, run_on
from tests.tickets.topologies import BasicBlock, PreActBlock

CLOSE = {
    torch.bfloat16: {"rtol": 0.02, "atol": 0.05},  # PyTorch rounds the difference to bfloat16 before it multiplies
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.float64: {"rtol": 1e-5, "atol": 1e-4},  # sums are float32
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
needs_kernel = pytest.mark.skipif(gather._kernel() is None, reason="the kernel cannot be compiled here")


def block(kind=BasicBlock, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = kind(4, 4, 1) if kind is BasicBlock else kind(4, 3)
    return made


def batch(count, layout=torch.contiguous_format, seed=1):
    x = torch.rand(count, 4, 5, 5, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=layout).requires_grad_()


def run(one, x, rows, choice=None):
    return run_on(one, lambda inputs, _: one(inputs), x, rows, choice)


NONE = torch.tensor([], dtype=torch.long)


def through(x):
    """A leaf cannot be watched on its way: a copy of it."""
    return x * 1.0


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=25, deadline=None)
@given(runs=st.lists(st.booleans(), min_size=1, max_size=7), post_activation=st.booleans())
def test_gathered_is_what_a_mask_computes_in_eval_mode_forward_and_backward(layout, runs, post_activation):
    one = block(BasicBlock if post_activation else PreActBlock).eval()
    mask = torch.tensor(runs)
    results = []
    for gathered in (True, False):
        one.zero_grad()
        x = batch(len(runs), layout)
        inputs = through(x)
        if gathered:
            out = run(one, inputs, mask.nonzero().flatten())
        else:
            out = torch.where(mask.view(-1, 1, 1, 1), one(inputs), inputs)
        (out * batch(len(runs), seed=2).detach()).sum().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in one.parameters()]
        results.append([out.detach(), x.grad, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is not None for parameter in one.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [[], [1], [0, 2, 3, 5], list(range(6))])
def test_memory_format_and_type_stay(layout, rows):
    one = block().to(memory_format=layout)
    x = batch(6, layout)
    out = run(one, through(x), torch.tensor(rows, dtype=torch.long))
    assert out.is_contiguous(memory_format=layout)
    out.sum().backward()
    assert x.grad.is_contiguous(memory_format=layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(one, x.bfloat16(), torch.tensor(rows, dtype=torch.long)).dtype == torch.bfloat16


def every_choice(chance, rate):
    """All choices of runs and probes among the samples, each with its likelihood."""
    for fates in itertools.product(["run", "probe", "leave"] if rate else ["run", "leave"], repeat=len(chance)):
        likelihood = 1.0
        for p, fate in zip(chance.tolist(), fates, strict=True):
            likelihood *= p if fate == "run" else (1 - p) * (rate if fate == "probe" else 1 - rate)
        rows, probes = ([i for i, fate in enumerate(fates) if fate == name] for name in ("run", "probe"))
        yield likelihood, torch.tensor(rows, dtype=torch.long), torch.tensor(probes, dtype=torch.long)


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_the_credit_of_a_choice_is_right_in_the_mean_over_all_choices(rate):
    """The loss is quadratic in a sample's output, so that the mean of both views is L(with) - L(without) itself."""
    one = block().eval()
    chance = torch.tensor([0.3, 0.8])
    target = batch(2, seed=3).detach()
    x = batch(2).detach()

    def losses(out):
        return (out - target).square().sum((1, 2, 3))

    mean = torch.zeros(2)
    for likelihood, rows, probes in every_choice(chance, rate):
        p = chance.clone().requires_grad_()
        losses(run(one, x, rows, Choice(p, probes, rate))).sum().backward()
        mean += likelihood * p.grad
    with torch.no_grad():
        exact = losses(one(x)) - losses(x)
        with_it = (2 * (one(x) - target) * (one(x) - x)).sum((1, 2, 3))  # seen from the output with it alone
    torch.testing.assert_close(mean, exact if rate else with_it, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(exact, with_it, rtol=0.1)


@pytest.mark.parametrize("rows", [[], [0, 2], [0, 1, 2, 3]])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_the_credit_by_hand(rows, rate):
    one = nn.Linear(2, 2, bias=False)
    nn.init.constant_(one.weight, 1.0)  # block(x) - x = (x2, x1)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    chance = torch.tensor([0.5, 0.5, 0.25, 0.75]).requires_grad_()
    probes = torch.tensor([3]) if rate and 3 not in rows else NONE
    out = run(one, x, torch.tensor(rows, dtype=torch.long), Choice(chance, probes, rate))
    (out * torch.tensor([1.0, 10.0])).sum().backward()
    worth = torch.tensor([2.0 + 10, 4.0 + 30, 6.0 + 50, 8.0 + 70])
    expected = torch.zeros(4)
    expected[rows] = worth[rows] / chance.detach()[rows] * (0.5 if rate else 1.0)
    if len(probes):
        expected[3] = worth[3] / 0.25 / rate / 2
    torch.testing.assert_close(chance.grad, expected)


def test_probes_change_nothing_but_what_the_chances_learn():
    results = []
    for probes in (NONE, torch.tensor([1, 4])):
        one = block().train()
        x = batch(9)
        chance = torch.full((9,), 0.5, requires_grad=True)
        out = run(one, through(x), torch.tensor([0, 2, 3, 5, 8]), Choice(chance, probes, 0.2))
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in one.parameters()), *one.buffers()])
        assert (chance.grad[[1, 4]] != 0).all() == bool(len(probes))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def norms(module):
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


def test_batch_norms_see_the_samples_that_run_and_no_others():
    gathered, plain = block().train(), block().train()
    x = batch(FEW + 3)
    rows = torch.arange(1, FEW + 1)
    out = run(gathered, x, rows)
    torch.testing.assert_close(out[1 : FEW + 1], plain(x[1 : FEW + 1]))
    for ours, theirs in zip(norms(gathered), norms(plain), strict=True):
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("count", [1, FEW - 1])
def test_batch_norms_of_few_samples_use_their_running_statistics_and_leave_them(count):
    one = block().train()
    x = batch(FEW + 3)
    before = [norm.running_mean.clone() for norm in norms(one)]
    out = run(one, x, torch.arange(count))
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms(one), before, strict=True))
    assert all(norm.training for norm in norms(one))
    torch.testing.assert_close(out[:count], one.eval()(x[:count]))


def test_a_small_batch_that_runs_whole_is_a_batch_like_any_other():
    one, plain = block().train(), block().train()
    x = batch(2)
    assert torch.equal(run(one, x, torch.arange(2)), plain(x))
    assert torch.equal(norms(one)[0].running_mean, norms(plain)[0].running_mean)


def test_one_sample_of_one_pixel_runs():
    one = block().train()
    x = torch.rand(6, 4, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value"):
        one(x[:1])
    assert run(one, x, torch.tensor([2])).shape == x.shape


def test_a_block_that_no_sample_runs_is_not_called_and_its_weights_go_on_by_momentum():
    one = block()
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
    one(batch(6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = one.conv1.weight.detach().clone()

    def never(inputs, rows):
        raise AssertionError("called")

    x = batch(6)
    inputs = through(x)
    out = run_on(one, never, inputs, NONE)
    assert torch.equal(out, inputs)
    assert out.data_ptr() != inputs.data_ptr()  # whoever writes into it spoils nothing
    out.sum().backward()
    optimizer.step()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert not torch.equal(one.conv1.weight, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(3, 1, 1), (5, 7, 9), (64, 5, 5)])
@needs_kernel
def test_the_kernel_does_what_pytorch_does(layout, dtype, size, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def images(count):
        return torch.randn(count, *size, generator=generator).to(dtype).contiguous(memory_format=layout)

    x, values, outputs, gradient = images(6), images(3), images(3), images(6)
    rows = torch.tensor([0, 3, 5])
    cases = [
        lambda: gather._put(x, rows, values),
        lambda: gather._put(x, rows[:0], values[:0]),
        lambda: gather._put(x[1:4], torch.tensor([1]), values[2:]),
        lambda: gather._worth(outputs, values, gradient, rows),
        lambda: gather._worth(outputs, values, gradient[2:5], None),
    ]
    assert gather._kernel_for(x, values) is not None
    ours = [case() for case in cases]
    monkeypatch.setattr(gather, "_kernel", lambda: None)
    for mine, case in zip(ours, cases, strict=True):
        theirs = case()
        assert mine.stride() == theirs.stride()
        torch.testing.assert_close(mine, theirs, **CLOSE[dtype])
    assert torch.equal(ours[0], put_by_index(x, rows, values))


def put_by_index(x, rows, values):
    copy = x.clone()
    copy[rows] = values
    return copy


def test_what_is_not_dense_or_of_another_order_is_left_to_pytorch():
    x = torch.randn(4, 6, 5, 5).contiguous(memory_format=torch.channels_last)
    values = torch.randn(2, 6, 5, 5)
    rows = torch.tensor([1, 2])
    assert gather._kernel_for(x, values) is None
    assert gather._kernel_for(x[:, ::2], values[:, ::2]) is None
    assert gather._kernel_for(x, values.to("meta")) is None
    for image in (x, x[:, ::2], x.transpose(2, 3)[..., 1:]):
        part = values[:, : image.shape[1], :, : image.shape[3]]
        assert torch.equal(gather._put(image, rows, part), put_by_index(image, rows, part))
