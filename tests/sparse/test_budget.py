"""Budgets and rankings over single weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlybird.errors import InputError
from earlybird.sparse.budget import erk, largest, largest_by_layer, uniform

SHAPES = {"a": torch.Size([64, 3, 3, 3]), "b": torch.Size([64, 64, 3, 3]), "c": torch.Size([10, 64])}


def test_erk_by_hand():
    shapes = {"small": torch.Size([4, 5]), "large": torch.Size([100, 100])}
    # raw: 9/20 and 200/10000; small keeps eps * 9, large eps * 200
    found = erk(shapes, 0.05)
    scale = 0.05 * 10020 / (9 + 200)
    assert found == {"small": 20, "large": 481}  # eps * 9 = 21.6 > 20, so the small one is whole
    assert scale * 9 > 20
    # 0.02 * 10020 / 209 * (9, 200) = 8.63 and 191.77, together 200: the larger remainder is rounded up
    assert erk(shapes, 0.02) == {"small": 8, "large": 192}


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcdef"), st.lists(st.integers(1, 12), min_size=2, max_size=4).map(torch.Size), min_size=1
    ),
    st.floats(0.02, 1.0),
    st.sampled_from([erk, uniform]),
)
def test_budgets_add_up_and_fit_the_layers(shapes, density, budget):
    found = budget(shapes, density)
    total = density * sum(math.prod(shape) for shape in shapes.values())
    assert all(1 <= found[name] <= math.prod(shape) for name, shape in shapes.items())
    # one weight a layer stays at least, so tiny budgets may be exceeded by that
    assert abs(sum(found.values()) - total) <= len(shapes)
    if budget is uniform:
        for name, shape in shapes.items():
            assert abs(found[name] - max(density * math.prod(shape), 1)) <= 1


def test_erk_of_everything_is_everything():
    assert erk(SHAPES, 1.0) == {name: math.prod(shape) for name, shape in SHAPES.items()}


def test_the_largest_over_all_layers_stay_and_ties_go_by_position():
    scores = {"a": torch.tensor([3.0, 1.0, 1.0]), "b": torch.tensor([[1.0, 5.0]])}
    masks = largest(scores, 3)
    assert masks["a"].tolist() == [True, True, False]
    assert masks["b"].tolist() == [[False, True]]


def test_no_layer_is_emptied():
    masks = largest({"a": torch.full((5,), 9.0), "b": torch.tensor([0.1, 0.3])}, 3)
    assert masks["a"].sum() == 3
    assert masks["b"].tolist() == [False, True]


def test_what_may_not_stay_does_not():
    inf = math.inf
    masks = largest({"a": torch.tensor([-inf, 1.0, -inf]), "b": torch.tensor([-2.0, -inf])}, 2)
    assert masks["a"].tolist() == [False, True, False]
    assert masks["b"].tolist() == [True, False]
    with pytest.raises(InputError, match="only 2 may"):
        largest({"a": torch.tensor([-inf, 1.0, -inf]), "b": torch.tensor([-2.0, -inf])}, 3)
    with pytest.raises(InputError, match="no weight of layer 'a'"):
        largest({"a": torch.tensor([-inf])}, 0)
    with pytest.raises(InputError, match="not numbers"):
        largest({"a": torch.tensor([math.nan, 1.0])}, 1)


def test_by_layer_each_keeps_what_it_is_given():
    masks = largest_by_layer({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 5.0])}, {"a": 1, "b": 0})
    assert masks["a"].tolist() == [True, False]
    assert masks["b"].tolist() == [False, True]
