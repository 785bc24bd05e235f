import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import earlybird as eb
from earlybird.errors import InputError

bits = st.lists(st.booleans(), min_size=1, max_size=40)


def ticket_of(*rows: list[bool], **provenance) -> eb.Ticket:
    return eb.Ticket({f"layer{i}": torch.tensor(row) for i, row in enumerate(rows)}, provenance=provenance)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(bits, min_size=1, max_size=4))
def test_round_trip(rows, tmp_path_factory):
    ticket = ticket_of(*rows, step=3, method="early_bird", note="ü")
    path = ticket.save(tmp_path_factory.mktemp("t") / "t.safetensors")
    back = eb.Ticket.load(path)
    assert back == ticket
    assert hash(back) == hash(ticket)
    assert dict(back.provenance) == {"step": 3, "method": "early_bird", "note": "ü"}
    assert list(back.masks) == list(ticket.masks)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), n=st.integers(1, 30))
def test_distance_is_a_metric(data, n):
    a, b, c = (ticket_of(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for _ in range(3))
    assert a.distance(a) == 0
    assert a.distance(b) == b.distance(a)
    assert a.distance(c) <= a.distance(b) + b.distance(c) + 1e-12
    assert a.distance(b) == sum(x != y for x, y in zip(a.masks["layer0"].tolist(), b.masks["layer0"].tolist())) / n


def test_distance_counts_over_all_layers():
    a = ticket_of([True, True, False], [True])
    b = ticket_of([True, False, False], [False])
    assert a.distance(b) == 2 / 4
    assert a.keep == 3 / 4
    assert a.widths == {"layer0": (2, 3), "layer1": (1, 1)}


def test_tickets_of_different_models_have_no_distance():
    with pytest.raises(InputError, match="layer1"):
        ticket_of([True], [True]).distance(ticket_of([True]))


def test_a_ticket_does_not_follow_the_tensor_it_was_made_from():
    mask = torch.tensor([True, False])
    ticket = eb.Ticket({"a": mask})
    mask[1] = True
    assert ticket.masks["a"].tolist() == [True, False]
    with pytest.raises(TypeError):
        ticket.masks["b"] = mask


@pytest.mark.parametrize(
    "mask", [torch.ones(3), torch.ones(2, 2, dtype=torch.bool), torch.ones(0, dtype=torch.bool), [True]]
)
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(InputError, match="mask of 'a'"):
        eb.Ticket({"a": mask})


def test_damaged_and_foreign_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = ticket_of([True, False]).save(tmp_path / "t.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged"):
        eb.Ticket.load(path)
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a ticket"):
        eb.Ticket.load(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="no file"):
        eb.Ticket.load(tmp_path / "absent.safetensors")
