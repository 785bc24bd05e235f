import alternatives
import pytest
import torch
from alternatives import check, input_gradient_by_forward, line
from torch.nn import functional


def operands(side, inputs=3, outputs=5):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, inputs, side, side), (2, outputs, side, side), (outputs, inputs, 3, 3)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(memory_format=torch.channels_last)
        for shape in shapes
    ]


def by_autograd(x, y, weight):
    """Gradients of input and weight where that of the output is ``y``."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    return torch.autograd.grad(functional.conv2d(x, weight, padding=1), (x, weight), y)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7])
def test_the_turned_kernel_gives_the_gradient_of_the_input(side):
    x, y, weight = operands(side)
    of_input, _ = by_autograd(x, y, weight)
    torch.testing.assert_close(input_gradient_by_forward(x, y, weight), of_input)


def test_steps_have_one_line_each():
    new = {"network": "vgg16", "width": 0.5, "shrunk": True, "step_seconds": 0.1, "ratio": 1.5}
    assert line(new) == "| vgg16 x 0.5, shrunk by layer | 100.0 | 1.50x |"
    old = {"network": "dense", "width": 1, "step_seconds": 0.1, "ratios": {"up to 2": 1.1, "up to 4": 1.2}}
    assert line(old) == "| vgg16 x 1, dense | 100.0 | 1.20x |"


def test_a_way_that_computes_something_else_is_found_out():
    ones = torch.ones(2, 2)
    check({("forward", ""): lambda: ones, ("forward", "same"): lambda: ones * 1.001})
    with pytest.raises(RuntimeError, match="other computes another forward"):
        check({("forward", ""): lambda: ones, ("forward", "other"): lambda: ones * 1.1})


def test_steps_are_timed_dense_shrunk_and_beside_a_busy_process(monkeypatch, capsys):
    recorded = []
    monkeypatch.setattr(alternatives, "BATCH", 4)
    monkeypatch.setattr(alternatives, "NETWORKS", (("vgg11", 0.125),))
    monkeypatch.setattr(alternatives, "BUSY", ("vgg11", 0.125))
    monkeypatch.setattr(alternatives, "record", lambda name, row, quick: recorded.append(row))
    alternatives.steps(alternatives.read(["--rounds", "1"]))
    assert [(row["shrunk"], row.get("busy", False)) for row in recorded] == [
        (False, False),
        (True, False),
        (False, True),
    ]
    assert all(row["ratio"] > 0 and row["step_seconds"] > 0 for row in recorded)
    assert "vgg11 x 0.125, beside a busy process" in capsys.readouterr().out
