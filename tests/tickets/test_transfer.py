"""What matches, and how alike masks are, by hand."""

from __future__ import annotations

import statistics

import pytest
import torch

from earlybird.errors import InputError
from earlybird.sparse.masks import ticket_of
from earlybird.tickets.ticket import Ticket
from earlybird.tickets.transfer import (
    bound,
    expected_jaccard,
    jaccard,
    largest_matching,
    matching,
    one_shot,
    universal,
)


def ticket(**rows: list[int]) -> Ticket:
    return ticket_of({name: torch.tensor([row], dtype=torch.bool) for name, row in rows.items()})


def test_jaccard_by_hand() -> None:
    overall, layers = jaccard(ticket(a=[1, 1, 0, 0], b=[1, 0]), ticket(a=[1, 0, 1, 0], b=[1, 0]))
    assert layers == {"a": 1 / 3, "b": 1.0}
    assert overall == (1 + 1) / (3 + 1)
    assert jaccard(ticket(a=[0, 0]), ticket(a=[0, 0])) == (1.0, {"a": 1.0})
    with pytest.raises(InputError, match="different units"):
        jaccard(ticket(a=[1, 0]), ticket(b=[1, 0]))


def test_the_jaccard_index_of_random_masks_is_as_expected() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (ticket_of({"a": torch.rand(200, 500, generator=generator) < keep}) for keep in (0.3, 0.1))
    assert jaccard(one, other)[0] == pytest.approx(expected_jaccard(0.3, 0.1), abs=0.003)


def test_one_shot_keeps_as_many_of_the_largest_over_all_layers() -> None:
    weights = {"a.weight": torch.tensor([[5.0, -4.0, 0.1]]), "b.weight": torch.tensor([[3.0, -0.2, 0.3]]),
               "a.bias": torch.tensor([9.0])}  # fmt: skip
    found = one_shot(weights, ticket(a=[0, 1, 1], b=[1, 0, 0]))
    assert {name: mask.tolist() for name, mask in found.masks.items()} == {
        "a": [[True, True, False]], "b": [[True, False, False]],
    }  # fmt: skip
    assert found.provenance["method"] == "one_shot"


def test_one_shot_names_the_layer_that_does_not_fit() -> None:
    with pytest.raises(InputError, match="layer 'a' are not there"):
        one_shot({"b.weight": torch.ones(1, 2)}, ticket(a=[1, 0]))
    with pytest.raises(InputError, match="layer 'a'"):
        one_shot({"a.weight": torch.ones(2, 2)}, ticket(a=[1, 0]))
    with pytest.raises(InputError, match="kind 'channel'"):
        one_shot({"a.weight": torch.ones(2, 2)}, Ticket({"a": torch.tensor([True, False])}))


def test_a_ticket_matches_within_the_spread_of_the_full_weights() -> None:
    full = [0.80, 0.82, 0.84]
    assert bound(full) == pytest.approx(0.80)
    tickets = {0.5: [0.81, 0.79], 0.8: [0.799, 0.8], 0.9: [0.9, 0.9], 0.95: [0.5, 0.5]}
    assert matching(full, tickets) == {0.5: True, 0.8: False, 0.9: True, 0.95: False}
    assert largest_matching(full, tickets) == 0.9
    assert largest_matching(full, {0.5: [0.1]}) is None
    assert matching(full, tickets, 1.1) == {0.5: True, 0.8: True, 0.9: True, 0.95: False}
    assert bound(full, 0) == statistics.fmean(full)
    assert bound([0.7]) == 0.7  # one value has no spread


@pytest.mark.parametrize(("full", "deviations"), [([], 1.0), ([0.5], -1.0), ([0.5], float("nan"))])
def test_what_is_no_bound(full: list[float], deviations: float) -> None:
    with pytest.raises(InputError):
        bound(full, deviations)


def test_universal_is_what_matches_everywhere() -> None:
    assert universal([{0.5: True, 0.8: True, 0.9: False}, {0.5: True, 0.8: True, 0.9: True}]) == 0.8
    assert universal([{0.5: True, 0.8: False}, {0.5: False, 0.8: True}]) is None
    assert universal([]) is None
