import add_layer
import pytest
import torch
from add_layer import HEADS, SHAPES, WAYS, check, line, tables, ways


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (17, 16)])
def test_all_ways_compute_an_add_layer(inputs, outputs):
    found = ways(4, inputs, outputs, batch=2)
    assert set(found) == {"kernel", "forward", *WAYS}
    check(found)
    assert found["convolution"]()[0].shape == found["forward"]().shape == (2, outputs, 4, 4)


def test_a_way_that_computes_something_else_is_found_out():
    found = ways(4, 3, 5, batch=2)
    y, of_x, of_filters = found["broadcast"]()
    found["broadcast"] = lambda: (y, of_x, 1.01 * of_filters)
    with pytest.raises(RuntimeError, match="broadcast computes other filter gradient: off by"):
        check(found)
    found["broadcast"] = lambda: (y, of_x, of_filters)
    found["cdist"] = lambda: (y + 1, of_x, of_filters)
    with pytest.raises(RuntimeError, match="cdist computes other outputs"):
        check(found)


def test_the_gradients_of_cdist_are_others():
    """They are signs; whoever compares speeds should know."""
    found = ways(4, 3, 5, batch=2)
    assert not torch.allclose(found["cdist"]()[2], found["kernel"]()[2], rtol=0.1)


def test_tables_have_as_many_cells_as_their_heads(head):
    layer = {"side": 8, "inputs": 3, "outputs": 5, "own_seconds": 0.001, "distances_a_second": 2e10,
             "ratios": dict.fromkeys(WAYS, 2.0), "broadcast_bytes": 2**21}  # fmt: skip
    step = {"operation": "add", "step_seconds": 0.1, "ratio": 2.5}
    for row, key in ((layer, "side"), (step, "operation")):
        assert line(row).count("|") == HEADS[key].splitlines()[0].count("|") == HEADS[key].splitlines()[1].count("|")
    text = tables([head(**layer), head(**step)])
    assert "| 8 | 3 to 5 | 1.00 | 20.0 | 2.00x |" in text
    assert "| add | 100 | 2.50x |" in text


def test_a_quick_look_is_short():
    assert add_layer.read(["--quick"]).rounds == 3
    assert 1 <= len(SHAPES[1::3]) < len(SHAPES)
