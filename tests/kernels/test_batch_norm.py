import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from earlybird.kernels import batch_norm as module
from earlybird.kernels.batch_norm import batch_norm, supports

EPS = 1e-5
SHAPES = [
    (2, 1, 1, 1), (2, 16, 1, 1), (65, 3, 1, 1), (3, 5, 7, 2), (1, 17, 9, 9), (4, 33, 5, 5), (2, 63, 6, 6),
    (7, 64, 16, 16), (2, 100, 13, 11), (1, 513, 3, 3), (70, 600, 1, 1), (8, 32, 32, 32),
]  # fmt: skip
TYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2**-8}
"""Relative to the largest number; a bfloat16 has eight bits."""

needs_kernel = pytest.mark.skipif(module._kernel() is None, reason="the kernel cannot be compiled here")


def operands(shape, dtype, mean=0.0, spread=1.0, seed=0):
    """x, weight, bias, running mean and variance, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    x, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    x, gradient = (one.to(dtype).contiguous(memory_format=torch.channels_last) for one in (x * spread + mean, gradient))
    vectors = [torch.randn(shape[1], generator=generator) for _ in range(3)]
    return x, *vectors, torch.rand(shape[1], generator=generator), gradient


def by_pytorch(x, weight, bias, mean, variance, momentum=0.1, eps=EPS, relu=False):
    y = functional.batch_norm(x, mean, variance, weight, bias, training=True, momentum=momentum, eps=eps)
    return y.relu() if relu else y


def run(function, x, weight, bias, mean, variance, gradient, relu, dtype=None):
    """Output, gradients of x, weight and bias, running mean and variance."""
    given = [one.detach().to(dtype or one.dtype, copy=True) for one in (x, weight, bias, mean, variance)]
    learned = [one.requires_grad_() for one in given[:3]]
    y = function(*given, 0.1, EPS, relu)
    gradients = torch.autograd.grad(y, learned, gradient.to(y.dtype))
    return [y.detach(), *gradients, *given[3:]]


def error(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@needs_kernel
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_batch_norm(shape, dtype, relu):
    given = operands(shape, dtype, mean=1.0)
    found, expected = run(batch_norm, *given, relu), run(by_pytorch, *given, relu, torch.float64)
    assert found[0].dtype == found[1].dtype == dtype
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[0].stride() == found[1].stride() == given[0].stride()
    assert error(found[0], expected[0]) < CLOSE[dtype]
    for one, other in zip(found[4:], expected[4:]):
        assert error(one, other) < 1e-6
    if shape[0] * shape[2] * shape[3] > 2:  # of two numbers the gradient is all but 0
        assert error(found[1], expected[1]) < 2 * CLOSE[dtype]
        for one, other in zip(found[2:4], expected[2:4]):
            assert one.dtype == torch.float32
            assert error(one, other) < 2e-5


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 140), st.integers(1, 9), st.integers(1, 9)).filter(
        lambda shape: shape[0] * shape[2] * shape[3] > 4
    ),
    dtype=st.sampled_from(TYPES),
    mean=st.sampled_from([0.0, -30.0, 1e4]),
    spread=st.sampled_from([1e-3, 1.0, 300.0]),
    relu=st.booleans(),
)
def test_its_error_is_no_larger_than_that_of_pytorch(shape, dtype, mean, spread, relu):
    """Also where the mean is huge beside the variance."""
    given = operands(shape, dtype, mean, spread)
    exact = run(by_pytorch, *given, relu, torch.float64)
    found, plain = run(batch_norm, *given, relu), run(by_pytorch, *given, relu)
    for name, one, other, right in zip(("y", "dx", "weight", "bias", "mean", "variance"), found, plain, exact):
        assert error(one, right) <= 1.5 * error(other, right) + CLOSE[torch.float32], name


@needs_kernel
def test_an_outlier_in_the_first_row_cancels_little():
    """Sums are around the first row."""
    x = torch.randn(16, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0] = 1e4
    given = (x.contiguous(memory_format=torch.channels_last), *operands((16, 8, 16, 16), torch.float32)[1:])
    found, expected = run(batch_norm, *given, False), run(by_pytorch, *given, False, torch.float64)
    assert error(found[5], expected[5]) < 1e-3
    assert error(found[0], expected[0]) < 1e-3


@needs_kernel
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(16, 37, 16, 16), (8, 256, 8, 8), (16, 5, 33, 33)])
def test_the_number_of_threads_changes_no_bit(shape, dtype):
    given, before, found = operands(shape, dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(batch_norm, *given, True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other))


@needs_kernel
@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_no_number_stays_none(dtype):
    """A training that has diverged must be seen."""
    x, weight, bias, mean, variance, gradient = operands((4, 40, 8, 8), dtype)
    x[1, 3, 2, 2], weight[5], bias[6], x[0, 7, 0, 0] = torch.nan, torch.nan, torch.nan, torch.inf
    found = run(batch_norm, x, weight, bias, mean, variance, gradient, True)
    for c in (3, 5, 6):
        assert bool(found[0][:, c].isnan().all())
    plain = run(by_pytorch, x, weight, bias, mean, variance, gradient, True)
    for one, other in zip(found, plain):
        assert torch.equal(one.isfinite(), other.isfinite())


@needs_kernel
def test_numbers_are_rounded_to_even():
    """Two images of one pixel are 1 and -1 when normalised, so that the output is scale + bias, in float32."""
    numbers = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    x = torch.stack([torch.ones(4000), -torch.ones(4000)]).bfloat16().view(2, -1, 1, 1)
    weight = torch.zeros(4000)
    half = numbers.bfloat16().float() + torch.tensor(1.0).mul(numbers.bfloat16().float().abs()).mul(2**-9)
    for bias in (numbers, half, torch.full((4000,), 1e-40), torch.full((4000,), 3.4e38)):
        y = batch_norm(x, weight, bias, None, None, 0.1, EPS)
        assert torch.equal(y[0].flatten(), bias.bfloat16())


@needs_kernel
def test_running_statistics_may_be_none():
    x, weight, bias, mean, variance, _ = operands((4, 8, 5, 5), torch.float32)
    found = batch_norm(x, weight, bias, None, None, 0.1, EPS)
    assert torch.equal(found, batch_norm(x, weight, bias, mean, variance, 0.1, EPS))


@needs_kernel
def test_gradients_come_in_any_layout_and_only_where_asked_for():
    x, weight, bias, mean, variance, gradient = operands((4, 8, 5, 5), torch.float32)
    expected = run(batch_norm, x, weight, bias, mean, variance, gradient, True)
    found = run(batch_norm, x, weight, bias, mean, variance, gradient.contiguous(), True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
    weight.requires_grad_()
    y = batch_norm(x, weight, bias, mean, variance, 0.1, EPS)
    y.backward(torch.ones(()).expand_as(y))
    assert weight.grad is not None
    assert x.grad is None
    assert not batch_norm(x, weight.detach(), bias, mean, variance, 0.1, EPS).requires_grad


@needs_kernel
def test_one_value_for_a_channel_is_an_error():
    x, weight, bias, mean, variance, _ = operands((1, 4, 1, 1), torch.float32)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as found:
        batch_norm(x, weight, bias, mean, variance, 0.1, EPS)
    with pytest.raises(ValueError, match="more than 1 value") as expected:
        by_pytorch(x, weight, bias, mean, variance)
    assert str(found.value) == str(expected.value)


@needs_kernel
def test_what_it_does_not_support():
    x, weight, bias, mean, variance, _ = operands((2, 4, 3, 3), torch.float32)
    assert supports(x, weight, bias, mean, variance)
    assert supports(x.bfloat16(), weight, bias, None, None)
    for other in (
        (x.contiguous(), weight, bias, mean, variance),
        (x.double(), weight, bias, mean, variance),
        (x.half(), weight, bias, mean, variance),
        (x[0], weight, bias, mean, variance),
        (x[:, :, ::2], weight, bias, mean, variance),
        (x[:0], weight, bias, mean, variance),
        (x.to("meta"), weight, bias, mean, variance),
        (torch.nn.Parameter(x), weight, bias, mean, variance),
        (x, None, None, mean, variance),
        (x, weight, None, mean, variance),
        (x, weight, bias, mean, None),
        (x, weight.bfloat16(), bias, mean, variance),
        (x, weight[:3], bias[:3], mean[:3], variance[:3]),
    ):
        assert not supports(*other)
    torch.func.vmap(lambda one: one.sum() if not supports(one, weight, bias, mean, variance) else 1 / 0)(x[None])


def test_without_a_kernel_it_supports_nothing(monkeypatch):
    monkeypatch.setattr(module, "_kernel", lambda: None)
    assert not supports(*operands((2, 4, 3, 3), torch.float32)[:5])


@needs_kernel
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_type_of_new_tensors_is_not_that_of_its_gradients(default):
    """The kernel wrote float32 into tensors of the default type: beyond their end, if that is bfloat16."""
    given = operands((4, 24, 5, 5), torch.float32)
    expected = run(by_pytorch, *given, relu=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = run(batch_norm, *given, relu=True)
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert error(one, other.double()) < CLOSE[torch.float32]


@needs_kernel
def test_the_default_device_of_new_tensors_is_not_that_of_its_own():
    """The kernel wrote to address 0."""
    given = operands((4, 24, 5, 5), torch.float32)
    expected = run(by_pytorch, *given, relu=True)
    with torch.device("meta"):
        found = run(batch_norm, *given, relu=True)
    assert all(error(one, other.double()) < CLOSE[torch.float32] for one, other in zip(found, expected, strict=True))
