import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from earlybird.errors import InputError
from earlybird.kernels.window import Window
from earlybird.sparse import block_kernel, blocks
from earlybird.sparse.block_kernel import POINT, Block, multiply, multiply_by_pytorch, pack
from earlybird.sparse.blocks import BlockConv2d, BlockLinear, find_blocks, from_matrix, to_blocks, to_matrix
from earlybird.sparse.masks import ticket_of
from earlybird.tickets.ticket import Ticket

SHAPES = [
    # images (N, I, H, W), outputs, window
    ((2, 3, 5, 7), 70, Window((3, 3), (1, 1), (1, 1), (1, 1))),
    ((1, 17, 5, 9), 33, Window((1, 1), (1, 1), (0, 0), (1, 1))),
    ((3, 16, 6, 6), 48, Window((3, 3), (2, 2), (1, 1), (1, 1))),
    ((2, 4, 9, 8), 5, Window((3, 2), (2, 3), (2, 0), (2, 1))),
    ((13, 8, 1, 1), 64, Window((1, 1), (1, 1), (0, 0), (1, 1))),
    ((1, 6, 2, 2), 20, Window((3, 3), (1, 1), (1, 1), (1, 1))),
    ((5, 2, 9, 9), 130, Window((5, 5), (1, 1), (2, 2), (1, 1))),
]


def some_blocks(outputs, columns, generator, parts=3, covered=False):
    """Parts of random outputs with random columns; where not covered, one output is in none."""
    order = torch.randperm(outputs, generator=generator)[: outputs if covered else outputs - 1]
    found = []
    for rows in order.chunk(min(parts, len(order))):
        number = int(torch.randint(1, columns + 1, (), generator=generator))
        chosen = torch.randperm(columns, generator=generator)[:number]
        found.append(Block(rows.sort().values, chosen.sort().values))
    return found


def masked(weight, found):
    mask = torch.zeros_like(to_matrix(weight))
    for block in found:
        mask[block.rows[:, None], block.columns] = 1
    return weight * from_matrix(mask, weight.shape)


def case(shape, outputs, window, seed=0, covered=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    weight = 0.3 * torch.randn((outputs, shape[1], *window.kernel), generator=generator)
    bias = torch.randn(outputs, generator=generator)
    found = some_blocks(outputs, to_matrix(weight).shape[1], generator, covered=covered)
    expected = torch.conv2d(x, masked(weight, found), bias, window.stride, window.padding, window.dilation)
    return x, weight, bias, found, expected


def parts_of(weight, found):
    matrix = to_matrix(weight)
    return [matrix[block.rows][:, block.columns] for block in found]


@pytest.fixture
def kernel():
    if not block_kernel.available():
        pytest.skip("the kernel cannot be compiled here")


@pytest.mark.parametrize("covered", [True, False])
@pytest.mark.parametrize(("shape", "outputs", "window"), SHAPES)
@pytest.mark.usefixtures("kernel")
def test_the_kernel_is_the_masked_dense_convolution(shape, outputs, window, covered):
    x, weight, bias, found, expected = case(shape, outputs, window, covered=covered)
    packed = pack(parts_of(weight, found), found, outputs, shape[1], weight[0, 0].numel())
    for layout in (torch.contiguous_format, torch.channels_last):
        y = multiply(x.contiguous(memory_format=layout), packed, window, bias)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(multiply(x, packed, window) + bias.view(-1, 1, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "outputs", "window"), SHAPES)
def test_pytorch_alone_is_the_masked_dense_convolution_with_its_gradients(shape, outputs, window):
    x, weight, bias, found, expected = case(shape, outputs, window)
    operands = [one.requires_grad_() for one in (x, weight, bias)]
    y = multiply_by_pytorch(x, parts_of(weight, found), found, outputs, window, bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    again = torch.conv2d(x, masked(weight, found), bias, window.stride, window.padding, window.dilation)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(torch.autograd.grad(y, operands, slope), torch.autograd.grad(again, operands, slope)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "outputs", "window"), SHAPES)
def test_bfloat16_is_as_near_to_the_truth_as_pytorchs(shape, outputs, window):
    if not block_kernel.available(torch.bfloat16):
        pytest.skip("this processor has no products of bfloat16")
    x, weight, bias, found, _ = case(shape, outputs, window)
    x, weight = x.bfloat16(), weight.bfloat16()
    packed = pack(parts_of(weight, found), found, outputs, shape[1], weight[0, 0].numel())
    y = multiply(x, packed, window, bias)
    expected = torch.conv2d(
        x.float(), masked(weight.float(), found), bias, window.stride, window.padding, window.dilation
    )
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)  # one rounding, of 8 bits


@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_any_blocks_are_the_masked_linear_layer(data):
    samples, inputs, outputs = (data.draw(st.integers(1, most)) for most in (30, 40, 90))
    seed = data.draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    found = some_blocks(outputs, inputs, generator, parts=data.draw(st.integers(1, 5)), covered=True)
    layer = BlockLinear(weight, found)
    x = torch.randn(samples, inputs, generator=generator)
    expected = x @ masked(weight, found).t()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernel")
def test_results_do_not_depend_on_the_number_of_threads():
    x, weight, bias, found, _ = case((3, 8, 9, 9), 100, Window((3, 3), (1, 1), (1, 1), (1, 1)))
    packed = pack(parts_of(weight, found), found, 100, 8, 9)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(multiply(x, packed, Window((3, 3), (1, 1), (1, 1), (1, 1)), bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.usefixtures("kernel")
def test_what_is_no_number_stays_none_and_stays_in_its_own_pixel():
    weight = torch.ones(20, 3, 1, 1)
    for dtype in (torch.float32, torch.bfloat16):
        if not block_kernel.available(dtype):
            continue
        packed = pack([weight.flatten(1).to(dtype)], [Block(torch.arange(20), torch.arange(3))], 20, 3, 1)
        x = torch.ones(1, 3, 2, 2, dtype=dtype)
        x[0, 1, 0, 1] = torch.nan
        y = multiply(x, packed, POINT)
        assert y[0, :, 0, 1].isnan().all()
        assert not y[0, :, 1].isnan().any()


def test_blocks_are_read_off_a_mask_by_hand():
    mask = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    found = find_blocks(mask)
    assert [(block.rows.tolist(), block.columns.tolist()) for block in found] == [([0, 2], [0, 2]), ([1], [1])]
    assert find_blocks(torch.zeros(2, 3, 3, 3, dtype=torch.bool)) == []


@given(seed=st.integers(0, 2**16), outputs=st.integers(1, 12), inputs=st.integers(1, 5), side=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_blocks_are_the_whole_mask(seed, outputs, inputs, side):
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(3, inputs, side, side, generator=generator) < 0.5
    mask = patterns[torch.randint(3, (outputs,), generator=generator)]
    assert torch.equal(masked(torch.ones(mask.shape), find_blocks(mask)) != 0, mask)
    assert torch.equal(from_matrix(to_matrix(mask), mask.shape), mask)


def test_a_layer_trains_and_packs_anew():
    x, weight, bias, found, expected = case((2, 3, 5, 7), 70, SHAPES[0][2])
    layer = BlockConv2d(weight, found, SHAPES[0][2], bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().mean().backward()
    optimizer.step()
    trained = layer(x).detach()
    assert not torch.allclose(trained, expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), trained, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), trained, rtol=1e-5, atol=1e-5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            other.values.mul_(2)
            torch.testing.assert_close(layer(x), trained, rtol=1e-5, atol=1e-5)
    fresh = BlockConv2d(torch.zeros_like(weight), found, SHAPES[0][2], torch.zeros_like(bias))
    fresh.load_state_dict(layer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh(x), trained, rtol=1e-5, atol=1e-5)


def test_without_a_compiler_pytorch_computes_the_same(monkeypatch):
    x, weight, bias, found, expected = case((2, 3, 5, 7), 70, SHAPES[0][2])
    monkeypatch.setattr(block_kernel, "_kernel", lambda: None)
    layer = BlockConv2d(weight, found, SHAPES[0][2], bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_autocast_computes_in_bfloat16_as_for_dense_layers():
    x, weight, bias, found, expected = case((2, 3, 5, 7), 70, SHAPES[0][2])
    layer = BlockConv2d(weight, found, SHAPES[0][2], bias)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=6e-2)


def test_rows_and_columns_need_not_be_in_order():
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    layer = BlockLinear(weight, [Block(torch.tensor([0, 2, 1, 3]), torch.tensor([5, 1, 3]))])
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x[:, [1, 3, 5]] @ weight[:, [1, 3, 5]].t(), rtol=1e-5, atol=1e-5)


def test_a_channel_outside_the_blocks_is_not_looked_at():
    """Of bfloat16, an odd number of columns is filled up with one that counts for nothing, of no other channel."""
    weight = torch.ones(20, 4, 3, 3)
    columns = torch.arange(9) * 4 + 2  # one channel of four
    x = torch.ones(1, 4, 3, 3)
    x[:, [0, 1, 3]] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        layer = BlockConv2d(weight, [Block(torch.arange(20), columns)], SHAPES[0][2]).to(dtype)
        with torch.no_grad():
            assert torch.equal(layer(x.to(dtype))[0, :, 1, 1], torch.full((20,), 9.0, dtype=dtype))


def test_what_does_not_fit_is_refused():
    one = Block(torch.arange(2), torch.arange(2))
    with pytest.raises(InputError, match="without any block"):
        BlockLinear(torch.ones(2, 2), [])
    with pytest.raises(InputError, match="each output in one block"):
        BlockLinear(torch.ones(2, 2), [one, one])
    with pytest.raises(InputError, match="do not fit a weight of 2 outputs and 1 columns"):
        BlockLinear(torch.ones(2, 1), [one])
    with pytest.raises(InputError, match="convolution in groups"):
        BlockConv2d.from_dense(nn.Conv2d(2, 2, 1, groups=2), [one])
    with pytest.raises(InputError, match=r"shape \(3, 4\); \(\.\.\., 2\)"):
        BlockLinear(torch.ones(2, 2), [one])(torch.ones(3, 4))
    layer = BlockConv2d(torch.ones(2, 2, 1, 1), [one], POINT)
    with pytest.raises(InputError, match=r"\(N, 2, H, W\)"):
        layer(torch.ones(1, 3, 2, 2))


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16),
        )  # fmt: skip


def a_ticket(model):
    """Two patterns of columns in layers 2 and 6, and single weights all over in layer 0."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name in ("0", "2", "6"):
        shape = model.get_submodule(name).weight.shape
        patterns = torch.rand(2, *shape[1:], generator=generator) < 0.4
        scattered = torch.rand(shape, generator=generator) < 0.4
        masks[name] = scattered if name == "0" else patterns[torch.arange(shape[0]) % 2]
    return ticket_of(masks)


def test_a_model_of_blocks_computes_what_the_masked_one_computes():
    model, images = network(), torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(model.state_dict())
    ticket = a_ticket(model)
    fast, gains = to_blocks(model, ticket, images, always=True)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in ticket.masks.items():
            plain.get_submodule(name).weight.mul_(mask)
        torch.testing.assert_close(fast(images), plain.eval()(images), rtol=1e-5, atol=1e-5)
    assert [(gain.name, gain.replaced) for gain in gains] == [("0", False), ("2", True), ("6", True)]
    assert isinstance(fast[2], BlockConv2d)
    assert isinstance(fast[6], BlockLinear)
    assert gains[1].blocks == 2
    assert gains[0].dense_s is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("times", "replaced"), [([1.0, 0.9], True), ([1.0, 0.97], False), ([1.0, 2.0], False)])
def test_a_layer_is_replaced_only_where_it_is_clearly_faster(monkeypatch, times, replaced):
    monkeypatch.setattr(blocks, "_timed", lambda layers, x: times)
    model = network()
    fast, gains = to_blocks(model, a_ticket(model), torch.zeros(2, 3, 6, 6))
    assert [gain.replaced for gain in gains] == [False, replaced, replaced]
    assert isinstance(fast[2], BlockConv2d) == replaced


def test_a_ticket_over_channels_is_refused():
    with pytest.raises(InputError, match="kind 'channel'"):
        to_blocks(network(), Ticket({"0": torch.ones(16, dtype=torch.bool)}), torch.zeros(2, 3, 6, 6))
