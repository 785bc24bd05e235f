import batch_norm
import pytest
from batch_norm import HEAD, SHAPES, check, line, measure, tables, ways

from earlybird.kernels.batch_norm import _kernel

needs_kernel = pytest.mark.skipif(_kernel() is None, reason="the kernel cannot be compiled here")


@needs_kernel
@pytest.mark.parametrize("channels", [5, 32])
def test_both_ways_compute_batch_norm_and_relu(channels):
    found = ways(8, channels, batch=4)
    check(found)
    assert bool((found["kernel"]()[0] >= 0).all())
    assert bool((found["kernel alone"]()[0] < 0).any())
    assert found["kernel forward"]().shape == found["pytorch forward"]().shape == (4, channels, 8, 8)


@needs_kernel
def test_a_way_that_computes_something_else_is_found_out():
    found = ways(8, 5, batch=4)
    found["kernel"] = found["kernel alone"]
    with pytest.raises(RuntimeError, match="the kernel computes other outputs: off by"):
        check(found)


@needs_kernel
def test_a_row_has_what_its_table_shows():
    row = measure(4, 5, rounds=1, batch=4)
    assert row["bytes_a_second"] == pytest.approx(8 * 4 * 5 * 16 * 2 / row["own_seconds"])
    assert line(row).count("|") == HEAD.splitlines()[0].count("|") == HEAD.splitlines()[1].count("|")


def test_each_number_of_threads_has_a_table(head):
    row = {"side": 8, "channels": 5, "own_seconds": 0.001, "bytes_a_second": 2e10, "ratio": 3.0, "ratio_forward": 2.0,
           "ratio_alone": 2.5}  # fmt: skip
    text = tables([head(**row, threads=threads) for threads in (1, 2)])
    assert text.count("| 8 | 5 | 1.00 | 20.0 | 3.00x | 2.00x | 2.50x |") == 2
    assert "1 thread" in text


def test_a_quick_look_is_short():
    assert batch_norm.read(["--quick"]).rounds == 3
    assert 1 <= len(SHAPES[1::3]) < len(SHAPES)
