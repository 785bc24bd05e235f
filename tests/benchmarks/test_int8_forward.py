import int8_forward
import pytest
import torch
from int8_forward import WAYS, Way, check, line, tables, ways


def operands(inputs=8, outputs=16, side=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, inputs, side, side, generator=generator)
    weight = 0.1 * torch.randn(outputs, inputs, 3, 3, generator=generator)
    return [tensor.bfloat16().to(memory_format=torch.channels_last) for tensor in (x, weight)]


def test_every_way_is_the_same_convolution():
    found = ways(*operands())
    assert [*found] == ["", *WAYS]
    check(found)


def test_a_way_that_computes_something_else_is_found_out():
    ones = torch.ones(2, 2)
    check({"": Way(lambda: ones), "near": Way(lambda: ones * 1.01)})
    with pytest.raises(RuntimeError, match="other computes another convolution"):
        check({"": Way(lambda: ones), "other": Way(lambda: ones * 1.1)})


def test_the_table_shows_the_newest_session_of_each_machine():
    row = {"side": 4, "inputs": 8, "outputs": 16, "own_seconds": 2e-3, "torch": "2", "threads": 2, "date": "today"}
    row |= {"revision": "abc", "side_by_side": 1}
    found = [
        {**row, "device": device, "session": session, "ratios": dict.fromkeys(WAYS, ratio)}
        for device, session, ratio in (("big", "1", 9.0), ("big", "2", 0.5), ("small", "1", 3.0))
    ]
    of = {key: row[key] for key in ("torch", "threads", "date", "revision", "side_by_side")}
    step = {"network": "vgg16", "width": 0.5, "step_seconds": 0.08, "ratio": 1.05, "device": "big", "session": "2"}
    text = tables([*found, {**of, **step}])
    assert "| 4 | 8 to 16 | 2.000 | 0.50x |" in text
    assert "| vgg16 | 0.5 | 80.0 | 1.050x |" in text
    assert "9.00x" not in text
    assert text.index("0.50x") < text.index("small, 2 threads") < text.index("3.00x")


def test_a_quick_look_records_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(int8_forward, "SHAPES", ((4, 8, 16),))
    monkeypatch.setattr(int8_forward, "BATCH", 2)
    recorded = []
    monkeypatch.setattr(int8_forward, "record", lambda name, row, quick: recorded.append((name, row, quick)))
    monkeypatch.setattr(int8_forward, "NETWORKS", (("vgg11", 0.5),))
    options = int8_forward.read(["--quick", "--rounds", "1"])
    int8_forward.convolutions(options)
    int8_forward.steps_of_networks(options)
    assert [(name, quick) for name, _, quick in recorded] == [("int8_forward", True)] * 2
    assert set(recorded[0][1]["ratios"]) == set(WAYS)
    assert recorded[1][1]["network"] == "vgg11"
    said = capsys.readouterr().out
    assert all(line(row) in said for _, row, _ in recorded)
