import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import earlybird as eb
from earlybird.skipping.passes import Passes


def passes(seed=0, model=None):
    return Passes(nn.Linear(2, 2) if model is None else model, eb.Ledger(), seed)


@settings(max_examples=50, deadline=None)
@given(
    chances=st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0])), min_size=1, max_size=40),
    seed=st.integers(0, 1000),
)
def test_as_many_are_chosen_as_the_chances_sum_to(chances, seed):
    one = passes(seed)
    one._begin(training=True)
    chosen = one.choose(torch.tensor(chances, dtype=torch.float64))
    assert abs(int(chosen.sum()) - sum(chances)) < 1 + 1e-9
    for chance, runs in zip(chances, chosen.tolist(), strict=True):
        assert not runs or chance > 0
        assert runs or chance < 1


def test_each_sample_is_chosen_with_its_own_chance():
    one, chances = passes(), torch.tensor([0.1, 0.9, 0.5, 0.25, 1.0, 0.0])
    rounds = 2000
    counts = torch.zeros(6)
    for _ in range(rounds):
        one._begin(training=True)
        counts += one.choose(chances)
    torch.testing.assert_close(counts / rounds, chances, atol=0.04, rtol=0)


def test_numbers_begin_anew_with_each_pass_step_seed_and_kind_of_pass():
    def first(one, training):
        one._begin(training=training)
        return one.draw(3).tolist()

    one = passes()
    seen = [first(one, True), first(one, True), first(one, False)]
    one.after_step(1)
    seen += [first(one, True), first(passes(1), True)]
    assert len({tuple(numbers) for numbers in seen}) == 5
    resumed = passes()
    resumed.after_step(1)
    assert first(resumed, True) == seen[3]
    disturbed = passes()
    first(disturbed, False)
    assert first(disturbed, True) == seen[0]


def test_ledgers_are_those_that_count_the_pass():
    model, ledger, other = nn.Linear(2, 2), eb.Ledger(), eb.Ledger()
    other.watch(model)
    one = Passes(model, ledger, 0)
    one._begin(training=True)
    assert one.ledgers == []  # below the hooks: nobody has counted it
    model(torch.zeros(1, 2))
    one._begin(training=True)
    assert one.ledgers == [ledger, other]
    one._begin(training=True)
    assert one.ledgers == []
    one.remove()
    assert len(model._forward_pre_hooks) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_may_be_empty_or_one_sample(count):
    one = passes()
    one._begin(training=True)
    assert one.choose(torch.ones(count)).tolist() == [True] * count
