import importlib.util

import pytest
import torch

from earlybird.arithmetic import add_kernel
from earlybird.kernels.window import Window
from tests.arithmetic import naive

SHAPES = [
    # images (N, C, H, W), outputs, window
    ((2, 3, 5, 7), 5, Window((1, 1), (1, 1), (0, 0), (1, 1))),
    ((1, 17, 5, 9), 33, Window((3, 3), (1, 1), (1, 1), (1, 1))),
    ((3, 16, 6, 6), 16, Window((3, 3), (2, 2), (1, 1), (1, 1))),
    ((2, 4, 9, 8), 3, Window((3, 2), (2, 3), (2, 0), (2, 1))),
    ((2, 5, 7, 6), 40, Window((2, 3), (1, 2), (0, 1), (3, 2))),
    ((5, 9, 1, 1), 18, Window((1, 1), (1, 1), (0, 0), (1, 1))),
    ((1, 2, 2, 11), 2, Window((5, 5), (4, 3), (4, 2), (1, 1))),
    ((0, 3, 4, 4), 2, Window((3, 3), (1, 1), (1, 1), (1, 1))),
]


def operands(shape, outputs, window, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = window.map_of(shape[2:])
    shapes = shape, (outputs, shape[1], *window.kernel), (shape[0], outputs, *size)
    return [torch.randn(one, generator=generator, dtype=dtype) for one in shapes]


@pytest.fixture(params=["kernel", "pytorch", "triton"])
def way(request, monkeypatch):
    """The device of the compiled kernel, of what is done without one, and of the kernels for GPUs.

    Where there is no GPU, Triton's interpreter runs these.
    """
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton has no build for this system")
        kernels = importlib.import_module("earlybird.arithmetic.add_triton")
        monkeypatch.setattr(add_kernel, "_triton", lambda device: kernels)
        return "cuda" if torch.cuda.is_available() else "cpu"
    if request.param == "pytorch":
        monkeypatch.setattr(add_kernel, "_kernel", lambda: None)
    elif add_kernel._kernel() is None:
        pytest.skip("the kernel cannot be compiled here")
    return "cpu"


@pytest.mark.parametrize(("shape", "outputs", "window"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_what_the_definition_says(shape, outputs, window, dtype, way):
    x, filters, gradient = operands(shape, outputs, window)
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for layout in (torch.contiguous_format, torch.channels_last):
        image = x.to(way, dtype).contiguous(memory_format=layout)
        found = add_kernel.distances(image, filters.to(way, dtype), window)
        torch.testing.assert_close(found.cpu().double(), naive.distances(x, filters, window), **close)
        assert found.is_contiguous(memory_format=add_kernel.layout(image))
        found = add_kernel.input_gradient(image, filters.to(way, dtype), gradient.to(way, dtype), window)
        torch.testing.assert_close(found.cpu().double(), naive.gradients(x, filters, gradient, window)[0], **close)
        assert found.is_contiguous(memory_format=add_kernel.layout(image))


def test_operands_need_not_be_contiguous(way):
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    x, filters, gradient = (one.to(way) for one in operands((2, 6, 5, 7), 4, window))
    strided, flipped, turned = x[:, ::2, 1:, ::2], filters[:, 1::2].flip(2), gradient[:, :, 1:, ::2].mT.contiguous().mT
    found = add_kernel.distances(strided, flipped, window)
    torch.testing.assert_close(found, naive.distances(strided, flipped, window))
    found = add_kernel.input_gradient(strided, flipped, turned, window)
    torch.testing.assert_close(found, naive.gradients(strided, flipped, turned, window)[0])


def test_what_is_no_number_stays_none(way):
    """A training that has diverged must be seen."""
    window = Window((1, 1), (1, 1), (0, 0), (1, 1))
    x, filters, gradient = (one.to(way) for one in operands((2, 3, 2, 2), 4, window))
    x[0, 0, 0, 0] = torch.nan
    found = add_kernel.distances(x, filters, window)
    assert found[0, :, 0, 0].isnan().all()
    assert found[1].isfinite().all()
    assert bool(add_kernel.input_gradient(x, filters, gradient, window)[0, 0, 0, 0].isnan())


def test_the_number_of_threads_changes_no_bit():
    if add_kernel._kernel() is None:
        pytest.skip("the kernel cannot be compiled here")
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    x, filters, gradient = operands((5, 20, 9, 9), 40, window, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(add_kernel.distances(x, filters, window))
            found.append(add_kernel.input_gradient(x, filters, gradient, window))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("budget", [1, 3000, 30_000])
def test_without_a_kernel_patches_stay_within_the_budget(budget, monkeypatch):
    window = Window((3, 2), (2, 1), (1, 1), (1, 2))
    x, filters, gradient = operands((3, 5, 9, 8), 4, window)
    whole = add_kernel.distances_by_pytorch(x, filters, window)
    of_x = add_kernel.input_gradient_by_pytorch(x, filters, gradient, window)
    monkeypatch.setattr(add_kernel, "BUDGET_BYTES", budget)
    sizes, unfold = [], add_kernel._patches

    def note(band, window):
        found = unfold(band, window)
        sizes.append((found.numel() * found.element_size(), found.shape))
        return found

    monkeypatch.setattr(add_kernel, "_patches", note)
    assert torch.equal(add_kernel.distances_by_pytorch(x, filters, window), whole)
    torch.testing.assert_close(add_kernel.input_gradient_by_pytorch(x, filters, gradient, window), of_x)
    a_line = 5 * 6 * window.map_of((9, 8))[1] * 8
    assert all(4 * taken <= max(budget, 4 * a_line) for taken, _ in sizes[-3:])
    assert len(sizes) > 2


def test_a_gpu_without_triton_is_told_and_left_to_pytorch(monkeypatch):
    assert add_kernel._triton(torch.device("cpu")) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    add_kernel._triton_kernels.cache_clear()
    with pytest.warns(UserWarning, match="slow on this GPU without Triton"):
        assert add_kernel._triton(torch.device("cuda")) is None
    add_kernel._triton_kernels.cache_clear()
